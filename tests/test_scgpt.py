"""Our scGPT against the original package, and the promises of its embedding and pretraining."""

import importlib
import importlib.util
import json
import pickle
import sys
import warnings

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import kstest
from sklearn.neighbors import KNeighborsClassifier
from torchtext_stand_in import modules

from benchmarks.scgpt.checkpoint import ARGS, VOCABULARY, WEIGHTS, load, save, with_specials
from benchmarks.scgpt.decoders import PretrainedTransformer
from benchmarks.scgpt.embed import batches, embed_cells, token_lengths
from benchmarks.scgpt.pretrain import pretrain
from benchmarks.scgpt.tokens import Rules, bin_values, draw, expressed, match, tokenise
from benchmarks.scgpt.transformer import Config

GENES = [f"G{i}" for i in range(70)]
SEED = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small lose time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original():
    """The package scgpt 0.2.4, with stand-ins for what it cannot import here."""
    if importlib.util.find_spec("scgpt") is None:
        pytest.skip("scgpt is not installed: pip install --no-deps scgpt==0.2.4")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no flash-attn, deprecated calls of its dependencies
        for name, module in modules().items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("scgpt")


def build_original(original, vocabulary, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on nested tensors
        return original.model.TransformerModel(
            ntoken=len(vocabulary),
            d_model=config.embsize,
            nhead=config.n_heads,
            d_hid=config.d_hid,
            nlayers=config.n_layers,
            vocab=vocabulary,
            dropout=config.dropout,
            pad_value=config.pad_value,
            do_mvc=True,
        ).eval()


def write_official(directory, state, config, vocabulary):
    """A checkpoint laid out as the official ones, by hand."""
    directory.mkdir()
    args = {"embsize": config.embsize, "nheads": config.n_heads, "nlayers": config.n_layers}
    args |= {"d_hid": config.d_hid, "dropout": config.dropout, "n_layers_cls": 3}
    args |= {"pad_token": "<pad>", "pad_value": config.pad_value, "n_bins": 51}
    args |= {"input_emb_style": "continuous", "input_style": "binned", "fast_transformer": True}
    (directory / ARGS).write_text(json.dumps(args))
    (directory / VOCABULARY).write_text(json.dumps(vocabulary))
    torch.save(state, directory / WEIGHTS)
    return directory


@pytest.fixture(scope="module")
def config():
    return Config(embsize=16, n_heads=4, n_layers=3, d_hid=24, dropout=0.2)


@pytest.fixture(scope="module")
def vocabulary():
    """Ids in no particular order, and without <eoc>, which has to be appended."""
    tokens = np.random.default_rng(0).permutation([*GENES, "<pad>", "<cls>"])
    return {str(token): i for i, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def state(config, vocabulary):
    """Random weights under the original's names; norms and biases are random too."""
    model = PretrainedTransformer(config, len(with_specials(vocabulary)))
    random = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=random)
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, state, config, vocabulary):
    return load(write_official(tmp_path_factory.mktemp("c") / "c", state, config, vocabulary))


def some_cells(n=40, n_genes=80, seed=0):
    """Ragged counts with many ties; a third of them scaled to fractions; columns 70+ unknown."""
    random = np.random.default_rng(seed)
    depth = np.geomspace(0.05, 4, n)[:, None]
    counts = random.poisson(depth * random.gamma(0.7, 2, size=(n, n_genes))).astype(np.float32)
    counts[:, 0] += 1  # the original cannot handle cells without any gene
    counts[::3] *= 0.37
    counts = counts[random.permutation(n)]
    genes = random.permutation([*GENES, *(f"unknown{i}" for i in range(n_genes - len(GENES)))])
    genes[0] = GENES[0] if "unknown" in genes[0] else genes[0]
    return sparse.csr_matrix(counts), genes


def replay(monkeypatch, lengths, max_length):
    """Make the original draw what `draw` gives each cell, cell after cell."""
    draws = draw(SEED, np.arange(len(lengths)), lengths, max_length)
    cuts = np.cumsum(lengths)[:-1]
    ties = iter(np.split(draws.ties, cuts))
    orders = iter(order for order in np.split(draws.order, cuts) if len(order) >= max_length)
    monkeypatch.setattr(np.random, "rand", lambda n: next(ties))
    monkeypatch.setattr(
        torch, "randperm", lambda n, device=None: torch.from_numpy(np.argsort(next(orders)))
    )
    return draws


# ------------------------------------------------------------------ equality with the original


@pytest.mark.parametrize("max_length", [30, 500])
def test_tokens_equal_those_of_the_original_collator(original, checkpoint, monkeypatch, max_length):
    values, genes = some_cells()
    vocabulary = checkpoint.vocabulary
    ids = match(vocabulary, genes)
    cells = expressed(values, ids)
    assert (cells.lengths >= 30).any()
    assert (cells.lengths < 29).any()
    draws = replay(monkeypatch, cells.lengths, max_length)
    collate = original.DataCollator(
        pad_token_id=vocabulary["<pad>"], pad_value=-2, do_mlm=False, max_length=max_length
    )
    examples = []
    for row in values.toarray():
        found = np.flatnonzero((row != 0) & (ids >= 0))
        examples.append(
            {
                "genes": torch.from_numpy(np.insert(ids[found], 0, vocabulary["<cls>"])),
                "expressions": torch.from_numpy(np.insert(row[found], 0, -2)).float(),
            }
        )
    theirs = collate(examples)
    ours = tokenise(cells, draws, Rules.of(checkpoint.config, vocabulary, max_length))
    torch.testing.assert_close(ours.genes, theirs["gene"], rtol=0, atol=0)
    torch.testing.assert_close(ours.values, theirs["expr"], rtol=0, atol=0)
    assert torch.equal(ours.padding, theirs["gene"] == vocabulary["<pad>"])


@pytest.mark.parametrize("n_values", [1, 2, 3, 49, 50, 51, 99, 300])
@pytest.mark.parametrize("kind", ["counts", "fractions", "one count"])
def test_bins_equal_the_original_binning(original, monkeypatch, n_values, kind):
    for seed in range(5):
        random = np.random.default_rng([n_values, seed])
        row = random.gamma(0.5, 3, n_values).astype(np.float32) + np.float32(0.01)
        row = {"counts": np.ceil(row), "fractions": row, "one count": np.ones_like(row)}[kind]
        ties = random.random(n_values)
        monkeypatch.setattr(np.random, "rand", lambda n, ties=ties: ties)
        theirs = original.preprocess.binning(torch.from_numpy(row), n_bins=51)
        padded, uniforms = torch.from_numpy(row)[None], torch.from_numpy(ties)[None]
        ours = bin_values(padded, torch.tensor([n_values]), uniforms, 51)
        assert torch.equal(ours[0].long(), theirs)


def test_encoding_equals_the_original_at_every_token(original, checkpoint, state, config):
    values, genes = some_cells()
    cells = expressed(values, match(checkpoint.vocabulary, genes))
    draws = draw(SEED, np.arange(len(cells.lengths)), cells.lengths, 500)
    tokens = tokenise(cells, draws, Rules.of(config, checkpoint.vocabulary, 500))
    theirs = build_original(original, checkpoint.vocabulary, config)
    theirs.load_state_dict(state)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's nested tensors are a prototype
        expected = theirs._encode(tokens.genes, tokens.values, tokens.padding)
    ours = checkpoint.model(tokens.genes, tokens.values, tokens.padding)
    real = ~tokens.padding
    torch.testing.assert_close(ours[real], expected[real], rtol=0, atol=1e-5)
    first = torch.nn.functional.normalize(expected[:, 0], dim=1).numpy()
    embedded = embed_cells(checkpoint, values, genes, seed=SEED, max_length=500)
    np.testing.assert_allclose(embedded, first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", ["plain", "flash-attn"])
def test_embedding_equals_embed_data_from_file_to_numbers(
    original, tmp_path, monkeypatch, state, config, vocabulary, names
):
    if names == "flash-attn":
        state = {k.replace("in_proj_", "Wqkv."): v for k, v in state.items()}
        state["flag_encoder.weight"] = torch.zeros(2, 16)
    directory = write_official(tmp_path / "c", state, config, vocabulary)
    values, genes = some_cells()
    ours = load(directory)
    lengths = expressed(values, match(ours.vocabulary, genes)).lengths
    embedded = embed_cells(ours, values, genes, seed=SEED, max_length=30, batch_tokens=200)

    replay(monkeypatch, lengths, 30)
    task = original.tasks.cell_emb
    loader = task.DataLoader
    monkeypatch.setattr(  # workers would each replay the draws from the start
        task,
        "DataLoader",
        lambda data, **kwargs: loader(data, **kwargs | {"num_workers": 0, "pin_memory": False}),
    )
    adata = anndata.AnnData(values)
    adata.var_names = genes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = task.embed_data(
            adata, directory, "index", 30, 7, device="cpu", use_fast_transformer=False
        )
    np.testing.assert_allclose(embedded, theirs.obsm["X_scGPT"], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ checkpoint files


def test_every_weight_that_does_not_match_is_named(tmp_path, state, config, vocabulary):
    wrong = dict(state)
    del wrong["value_encoder.norm.bias"]
    wrong["dsbn.bns.0.weight"] = torch.ones(16)
    wrong["encoder.enc_norm.weight"] = torch.ones(17)
    directory = write_official(tmp_path / "c", wrong, config, vocabulary)
    with pytest.raises(ValueError, match="3 do not match") as error:
        load(directory)
    for fault in (
        "missing value_encoder.norm.bias (16,)",
        "unexpected dsbn.bns.0.weight (16,)",
        "encoder.enc_norm.weight: expected (16,), got (17,)",
    ):
        assert fault in str(error.value)


def test_weights_cannot_run_code(tmp_path, state, config, vocabulary):
    class Attack:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "ran",))

    directory = write_official(tmp_path / "c", state, config, vocabulary)
    (directory / WEIGHTS).write_bytes(pickle.dumps(Attack(), protocol=2))
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load(directory)
    torch.save({**state, "more": Attack()}, directory / WEIGHTS)
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        (ARGS, {"input_emb_style": "category"}, "input_emb_style='continuous'"),
        (ARGS, {"pre_norm": True}, "pre_norm=False"),
        (ARGS, {"cell_emb_style": "w-pool"}, "cell_emb_style='cls'"),
        (ARGS, {"input_style": "log1p"}, "input_style='binned'"),
        (ARGS, {"nheads": 5}, "that the heads divide"),
        (ARGS, {"nlayers": 2}, "unexpected transformer_encoder.layers.2.norm1.weight"),
        (ARGS, {"pad_token": "<none>"}, "padding token '<none>'"),
        (VOCABULARY, {"another": 500}, "each once"),
        (VOCABULARY, {"another": 72}, "encoder.embedding.weight: expected"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path, state, config, vocabulary, file, change, match
):
    directory = write_official(tmp_path / "c", state, config, vocabulary)
    content = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=match):
        load(directory)


def test_missing_files_are_named(tmp_path):
    (tmp_path / ARGS).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"missing best_model\.pt, vocab\.json"):
        load(tmp_path)


def test_digest_follows_the_content(tmp_path, state, config, vocabulary):
    one = load(write_official(tmp_path / "a", state, config, vocabulary)).digest
    assert load(write_official(tmp_path / "b", state, config, vocabulary)).digest == one
    other = state | {"encoder.enc_norm.bias": state["encoder.enc_norm.bias"] + 1e-3}
    assert load(write_official(tmp_path / "d", other, config, vocabulary)).digest != one


def test_nothing_is_overwritten(tmp_path, checkpoint):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="it exists and is not empty"):
        save(tmp_path, checkpoint.model, checkpoint.vocabulary)
    values, genes = some_cells()
    with pytest.raises(FileExistsError, match="it exists and is not empty"):
        pretrain(values, genes, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------- embedding


def test_a_cell_is_embedded_the_same_in_any_company(checkpoint):
    values, genes = some_cells()
    whole = embed_cells(checkpoint, values, genes, seed=1, max_length=20)
    alone = embed_cells(checkpoint, values, genes, seed=1, max_length=20, batch_tokens=1)
    fewer = embed_cells(checkpoint, values[:9], genes, seed=1, max_length=20)
    np.testing.assert_allclose(alone, whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fewer, whole[:9], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-6)
    assert whole.dtype == np.float32
    other = embed_cells(checkpoint, values, genes, seed=2, max_length=20)
    assert np.abs(other - whole).max() > 1e-3


def test_explicit_zeros_and_unsorted_or_repeated_entries_change_nothing(checkpoint):
    values, genes = some_cells()
    messy = sparse.coo_matrix(
        (
            np.concatenate([values.data / 2, values.data / 2, [0.0, 0.0]]),
            (
                np.concatenate([values.nonzero()[0]] * 2 + [[0, 1]]),
                np.concatenate([values.nonzero()[1]] * 2 + [[3, 3]]),
            ),
        ),
        shape=values.shape,
    )
    rows = messy.row.argsort(kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(messy.row, minlength=40))])
    uncanonical = sparse.csr_matrix((messy.data[rows], messy.col[rows], indptr), values.shape)
    before = uncanonical.nnz
    np.testing.assert_allclose(
        embed_cells(checkpoint, uncanonical, genes, seed=1),
        embed_cells(checkpoint, values, genes, seed=1),
        rtol=0,
        atol=1e-6,
    )
    assert uncanonical.nnz == before


def test_cells_without_a_known_gene_get_one_common_embedding(checkpoint):
    values = sparse.csr_matrix((3, 70), dtype=np.float32)
    embedded = embed_cells(checkpoint, values, GENES, seed=0)
    assert np.isfinite(embedded).all()
    np.testing.assert_array_equal(embedded, embedded[[0, 0, 0]])
    assert embed_cells(checkpoint, values[:0], GENES, seed=0).shape == (0, 16)


def test_genes_match_by_exact_symbol(checkpoint):
    values, _ = some_cells(n_genes=70)
    lower = [gene.lower() for gene in GENES]
    with pytest.raises(ValueError, match="none matches"):
        embed_cells(checkpoint, values, lower, seed=0)
    with pytest.warns(UserWarning, match="only 30 of 70 genes are known"):
        embed_cells(checkpoint, values, GENES[:30] + lower[30:], seed=0)
    with pytest.raises(ValueError, match="expected 70 symbols"):
        embed_cells(checkpoint, values, GENES[:-1], seed=0)
    values.data[0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        embed_cells(checkpoint, values, GENES, seed=0)


def test_equal_values_spread_over_the_bins_by_their_uniforms():
    # All 50 edges coincide with the value, so bin b takes the uniforms in [(50-b)/50, (51-b)/50).
    uniforms = torch.tensor([[0.0, 0.019, 0.021, 0.5, 0.981, 0.999]], dtype=torch.float64)
    bins = bin_values(torch.ones(1, 6), torch.tensor([6]), uniforms, 51)
    assert bins.tolist() == [[50, 50, 49, 25, 1, 1]]


def test_every_cell_draws_its_own_uniforms_and_an_order_only_if_too_long():
    lengths = np.array([400, 20, 400, 20])
    draws = draw(3, np.array([7, 8, 9, 8]), lengths, 400)  # 400 genes and <cls> are too many
    cells = np.split(draws.ties, np.cumsum(lengths)[:-1])
    np.testing.assert_array_equal(cells[1], cells[3])
    assert abs(np.corrcoef(cells[0], cells[2])[0, 1]) < 0.2
    assert abs(np.corrcoef(draws.ties[:400], draws.order[:400])[0, 1]) < 0.2
    assert kstest(draws.ties[:400], "uniform").pvalue > 0.01
    assert kstest(draws.order[:400], "uniform").pvalue > 0.01
    np.testing.assert_array_equal(draws.order[400:420], 0)
    np.testing.assert_array_equal(draw(3, np.array([9]), np.array([400]), 1200).ties, cells[2])


def test_batches_cover_every_cell_once_within_the_budget():
    values, genes = some_cells()
    vocabulary = with_specials({gene: i for i, gene in enumerate(GENES)})
    lengths = token_lengths(values, match(vocabulary, genes), 25)
    assert lengths.max() == 25
    parts = list(batches(lengths, 100))
    assert sorted(np.concatenate(parts)) == list(range(40))
    assert all(lengths[rows].max() * len(rows) <= 100 for rows in parts)


# ----------------------------------------------------------------------------------- pretraining


def two_types(n=240, seed=3):
    """Two types that differ in which of 60 genes they express highly."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    programme = random.gamma(0.4, 4, size=(2, 60))
    counts = random.poisson(programme[labels] * random.uniform(0.7, 1.4, (n, 1)))
    return sparse.csr_matrix(counts.astype(np.float32)), labels


SMALL = {"embsize": 16, "n_heads": 2, "n_layers": 2, "d_hid": 16, "max_length": 20, "seed": 4}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("p") / "new" / "checkpoint"
    counts, _ = two_types()
    before = torch.get_rng_state()
    result = pretrain(
        counts, GENES[:60], directory, epochs=30, device="cpu", learning_rate=4e-3, **SMALL
    )
    assert torch.equal(torch.get_rng_state(), before)
    return directory, result


def test_pretraining_beats_the_means_on_held_out_cells(pretrained):
    _, result = pretrained
    assert result.masked_mse < 0.9 * result.masked_mean_mse
    assert result.masked_mse < result.masked_gene_mse
    assert result.cls_mse < result.cls_gene_mse


def test_cls_learns_to_tell_types_apart(pretrained):
    directory, _ = pretrained
    counts, labels = two_types(seed=3)
    embedded = embed_cells(load(directory), counts, GENES[:60], seed=0)
    knn = KNeighborsClassifier(10).fit(embedded[:160], labels[:160])
    assert knn.score(embedded[160:], labels[160:]) > 0.95


def test_the_original_loads_a_pretrained_checkpoint_strictly(original, pretrained):
    directory, _ = pretrained
    ours = load(directory)
    state = torch.load(directory / WEIGHTS, weights_only=True)
    theirs = build_original(original, ours.vocabulary, ours.config)
    theirs.load_state_dict(state, strict=True)
    model = PretrainedTransformer(ours.config, len(ours.vocabulary)).eval()
    model.load_state_dict(state, strict=True)
    counts, _ = two_types(8)
    cells = expressed(counts, match(ours.vocabulary, GENES[:60]))
    draws = draw(0, np.arange(8), cells.lengths, 50)
    genes, values, padding = tokenise(cells, draws, Rules.of(ours.config, ours.vocabulary, 50))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(genes, values, padding, MVC=True)
        own, from_cls = model.predict(genes, values, padding, genes)
    real = ~padding
    torch.testing.assert_close(own[real], expected["mlm_output"][real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(from_cls[real], expected["mvc_output"][real], rtol=1e-4, atol=1e-4)
    args = json.loads((directory / ARGS).read_text())
    assert {"embsize", "nheads", "nlayers", "d_hid", "n_layers_cls", "pad_value"} <= set(args)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    counts, _ = two_types(60)
    digests = []
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        pretrain(
            counts, GENES[:60], tmp_path / name, epochs=1, device="cpu", **SMALL | {"seed": seed}
        )
        digests.append((tmp_path / name / WEIGHTS).read_bytes())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epochs": 0}, "at least one epoch"),
        ({"mask_ratio": 1.0}, "mask ratio between 0 and 1"),
        ({"max_length": 1}, "2 or more"),
        ({"n_heads": 3}, "that the heads divide"),
        ({"learning_rate": 1e30}, "Lower the learning rate"),
    ],
)
def test_pretraining_says_what_it_cannot_do(tmp_path, change, match):
    counts, _ = two_types(40)
    with pytest.raises(ValueError, match=match):
        pretrain(counts, GENES[:60], tmp_path / "c", **{"epochs": 1, **SMALL, **change})
    assert not (tmp_path / "c").exists()
