"""The official checkpoint format: a directory of args.json, best_model.pt and vocab.json."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scgpt.transformer import Config, Transformer

ARGS, WEIGHTS, VOCABULARY = "args.json", "best_model.pt", "vocab.json"
CLS = "<cls>"
SPECIALS = ("<pad>", CLS, "<eoc>")

# Parts of scGPT that act after the encoder, or (the flag encoder) only while generating: an
# embedding does not use them, so their presence is no sign of a wrong checkpoint. Batch norms are
# not among them because they would change the encoding.
UNUSED = (
    "decoder.",
    "mvc_decoder.",
    "cls_decoder.",
    "flag_encoder.",
    "batch_encoder.",
    "grad_reverse_discriminator.",
)

# What this implementation covers, and what absent settings mean.
_SUPPORTED: Mapping[str, Any] = {
    "input_emb_style": "continuous",
    "input_style": "binned",
    "cell_emb_style": "cls",
    "pre_norm": False,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, on the CPU.

    Attributes
    ----------
    model
        The encoder with the checkpoint's weights, in evaluation mode.
    vocabulary
        Token to id, the special tokens included.
    digest
        SHA-256 over the three files, for caches.
    """

    model: Transformer
    vocabulary: Mapping[str, int]
    digest: str

    @property
    def config(self) -> Config:
        """Sizes of the model and rules of its tokens."""
        return self.model.config

    @property
    def embsize(self) -> int:
        """Width of an embedding."""
        return self.model.config.embsize


def load(directory: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint without executing code from it.

    Weights saved with flash-attn's parameter names are renamed.

    Raises
    ------
    FileNotFoundError
        If one of the three files is missing.
    ValueError
        If a file is malformed, a setting is not supported, or the weights do not match the
        model that the settings describe; every missing, unexpected and misshapen one is named.
    """
    directory = Path(directory)
    absent = [name for name in (ARGS, WEIGHTS, VOCABULARY) if not (directory / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{directory}: expected a scGPT checkpoint with {ARGS}, {WEIGHTS} and {VOCABULARY}; "
            f"missing {', '.join(absent)}."
        )
    config = _config(directory / ARGS)
    vocabulary = _vocabulary(directory / VOCABULARY, config.pad_token)
    weights = _weights(directory / WEIGHTS)
    with torch.device("meta"):
        model = Transformer(config, len(vocabulary))
    _check(weights, model, directory)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    return Checkpoint(model.eval().requires_grad_(False), vocabulary, _digest(directory))


def save(
    directory: str | os.PathLike[str],
    model: Transformer,
    vocabulary: Mapping[str, int],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that the original package reads too; all of it or nothing.

    Parameters
    ----------
    directory
        New directory; an existing one is refused unless it is empty.
    model
        The encoder, with decoders or without.
    vocabulary
        Token to id.
    settings
        Further entries for ``args.json``, for the record.
    """
    directory = refuse_existing(directory)
    config = model.config
    args = {
        **(settings or {}),
        **_SUPPORTED,
        "embsize": config.embsize,
        "nheads": config.n_heads,
        "nlayers": config.n_layers,
        "d_hid": config.d_hid,
        "n_layers_cls": 3,
        "dropout": config.dropout,
        "pad_token": config.pad_token,
        "pad_value": config.pad_value,
        "mask_value": config.mask_value,
        "n_bins": config.n_bins,
        "fast_transformer": False,
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".scgpt-") as scratch:
        whole = Path(scratch) / "checkpoint"
        whole.mkdir()
        (whole / ARGS).write_text(json.dumps(args, indent=2) + "\n")
        (whole / VOCABULARY).write_text(json.dumps(dict(vocabulary), indent=2) + "\n")
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        torch.save(state, whole / WEIGHTS)
        if directory.exists():
            directory.rmdir()
        shutil.move(whole, directory)


def refuse_existing(directory: str | os.PathLike[str]) -> Path:
    """The path, if nothing would be overwritten there; an empty directory is fine."""
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(
            f"{directory}: expected a new directory for the checkpoint; it exists and is not "
            "empty. Name another one, or remove it first."
        )
    return directory


def with_specials(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The vocabulary with ``<pad>``, ``<cls>``, ``<eoc>`` appended where they are absent."""
    extended = dict(vocabulary)
    for token in SPECIALS:
        extended.setdefault(token, len(extended))
    return extended


def _config(path: Path) -> Config:
    args = _json(path)
    for name, supported in _SUPPORTED.items():
        if args.get(name, supported) != supported:
            raise ValueError(
                f"{path}: expected {name}={supported!r}, all that is supported; got {args[name]!r}."
            )
    sizes = {"embsize": "embsize", "nheads": "n_heads", "nlayers": "n_layers", "d_hid": "d_hid"}
    absent = [name for name in sizes if name not in args]
    if absent:
        raise ValueError(f"{path}: expected the sizes {', '.join(sizes)}; missing {absent}.")
    optional = ("dropout", "pad_token", "pad_value", "mask_value", "n_bins")
    given = {name: args[name] for name in optional if name in args}
    return Config(**{ours: args[theirs] for theirs, ours in sizes.items()} | given)


def _vocabulary(path: Path, pad_token: str) -> dict[str, int]:
    vocabulary = _json(path)
    if sorted(vocabulary.values(), key=str) != sorted(range(len(vocabulary)), key=str):
        raise ValueError(
            f"{path}: expected a mapping of {len(vocabulary)} tokens to the ids 0 to "
            f"{len(vocabulary) - 1}, each once; got other ids."
        )
    vocabulary = with_specials(vocabulary)
    if pad_token not in vocabulary:
        raise ValueError(f"{path}: expected the padding token {pad_token!r} in it; it is absent.")
    return vocabulary


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON; {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(content).__name__}.")
    return content


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected a state dict of tensors and nothing else, because nothing else is "
            "read; this file holds other objects or is damaged. Save model.state_dict() from the "
            "program that wrote it."
        ) from error
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(f"{path}: expected a dict of tensors; got {type(content).__name__}.")
    return {
        str(name).replace("Wqkv.", "in_proj_"): tensor.float() for name, tensor in content.items()
    }


def _check(weights: Mapping[str, Tensor], model: Transformer, directory: Path) -> None:
    """Raise, with the whole list, unless `weights` are those of `model` and known other parts."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in weights]
    faults += [
        f"unexpected {name} {tuple(tensor.shape)}"
        for name, tensor in weights.items()
        if name not in expected and not name.startswith(UNUSED)
    ]
    faults += [
        f"{name}: expected {shape}, got {tuple(weights[name].shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if faults:
        raise ValueError(
            f"{directory}: expected the weights of the model that {ARGS} and {VOCABULARY} (with "
            f"its special tokens) describe; {len(faults)} do not match:\n  " + "\n  ".join(faults)
        )


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in (ARGS, WEIGHTS, VOCABULARY):
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
