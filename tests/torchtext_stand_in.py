"""What the original scgpt imports and this environment lacks, just enough to import and call it.

torchtext is no longer released and does not work with current torch; `datasets` and IPython are
large and only needed by parts of scgpt that the tests do not touch.
"""

import importlib.util
import types


class Vocab:
    """Tokens and ids: the methods of torchtext's Vocab that scgpt calls."""

    def __init__(self, tokens):
        self.vocab = tokens  # scgpt hands it on to this constructor
        self._tokens = list(getattr(tokens, "_tokens", tokens))
        self._default = None

    def __len__(self):
        return len(self._tokens)

    def __contains__(self, token):
        return token in self._tokens

    def __getitem__(self, token):
        return self._tokens.index(token) if token in self._tokens else self._default

    def __call__(self, tokens):
        return [self[token] for token in tokens]

    def insert_token(self, token, index):
        self._tokens.insert(index, token)

    def append_token(self, token):
        self._tokens.append(token)

    def set_default_index(self, index):
        self._default = index


def modules():
    """Stand-ins by module name, for those that are absent; torchtext's always."""
    text, vocab = types.ModuleType("torchtext"), types.ModuleType("torchtext.vocab")
    vocab.Vocab, vocab.vocab = Vocab, lambda tokens, min_freq=1: Vocab(tokens)
    text.vocab = vocab
    stand_ins = {"torchtext": text, "torchtext.vocab": vocab}
    for name, attributes in {
        "datasets": ("Dataset", "load_dataset"),
        "IPython": ("get_ipython",),
        "seaborn": (),
        "networkx": (),
    }.items():
        if importlib.util.find_spec(name) is None:
            stand_ins[name] = types.ModuleType(name)
            for attribute in attributes:
                setattr(stand_ins[name], attribute, type(attribute, (), {}))
    return stand_ins
