"""Several modalities of the same cells: one model, and every door to it."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
import warnings
from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from imblearn.pipeline import make_pipeline
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import FunctionTransformer

from cfgen_augment import CFGen, CFGenSampler, augment, augment_file, cli, diagnose, writing
from cfgen_augment.likelihoods import value_kind
from cfgen_augment.minibatch import Minibatch
from cfgen_augment.modalities import Modality, check_like, hidden_widths, lay_out
from cfgen_augment.size_factors import SizeFactors
from cfgen_augment.stored import StoredCells

mudata = pytest.importorskip("mudata")

SIZES = {"A": 150, "B": 100, "C": 50}


@dataclass
class Pair:
    """Counts and peaks of the same cells; deep in one is deep in the other."""

    counts: sparse.csr_matrix
    peaks: sparse.csr_matrix
    proteins: np.ndarray
    labels: np.ndarray
    donors: np.ndarray

    @property
    def X(self) -> dict[str, sparse.csr_matrix]:
        return {"rna": self.counts, "atac": self.peaks}


def simulate_pair(sizes=SIZES, n_genes=30, n_peaks=80, seed=0) -> Pair:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    donors = rng.choice(["d1", "d2"], size=len(labels))
    genes = {name: rng.lognormal(0.0, 1.0, n_genes) for name in sizes}
    logits = {name: rng.normal(-1.5, 1.5, n_peaks) for name in sizes}
    surface = {name: rng.lognormal(0.0, 1.0, 8) for name in sizes}
    depth = rng.lognormal(0.0, 0.4, len(labels))[:, None]
    own = rng.lognormal(0.0, 0.1, len(labels))[:, None]
    rate = np.stack([150 * genes[y] / genes[y].sum() for y in labels]) * depth
    present = rng.random((len(labels), n_peaks)) < 1 / (
        1 + np.exp(-np.stack([logits[y] for y in labels]))
    )
    tags = np.stack([300 * surface[y] / surface[y].sum() for y in labels]) * depth * own
    return Pair(
        sparse.csr_matrix(rng.poisson(rng.gamma(5.0, rate / 5.0)).astype(np.float32)),
        sparse.csr_matrix(present.astype(np.int8)),
        rng.poisson(tags),
        labels,
        donors,
    )


@pytest.fixture(scope="module")
def pair() -> Pair:
    return simulate_pair()


def small(**parameters) -> CFGen:
    defaults = {"n_latent": 6, "hidden": (32,), "max_epochs": 2, "random_state": 0, "device": "cpu"}
    return CFGen(**{**defaults, **parameters})


@pytest.fixture(scope="module")
def trained(pair) -> CFGen:
    """Trained enough to tell types apart; three noise models, two of them with size factors."""
    model = small(hidden=(64, 32), n_latent=8, max_epochs=(60, 120))
    return model.fit(pair.X | {"protein": pair.proteins}, pair.labels)


@pytest.fixture(scope="module")
def quick(pair) -> CFGen:
    return small().fit(pair.X, pair.labels, covariates={"donor": pair.donors})


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(dense(first[name]), dense(second[name])) for name in first
    )


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


# ------------------------------------------------------------------ what it learns


def test_modalities_of_a_generated_cell_agree_about_its_type(pair, trained):
    """Generated without labels, so that only the shared latent can make them agree."""
    new = trained.generate(n_cells=600, random_state=1)
    real = {**pair.X, "protein": pair.proteins}
    votes = {}
    for name, matrix in real.items():
        classifier = LogisticRegression(max_iter=2_000).fit(np.log1p(dense(matrix)), pair.labels)
        votes[name] = classifier.predict(np.log1p(dense(new[name])))
    assert set(votes["rna"]) == {"A", "B", "C"}
    for other in ("atac", "protein"):
        by_chance = sum(
            np.mean(votes["rna"] == t) * np.mean(votes[other] == t) for t in ("A", "B", "C")
        )
        assert np.mean(votes["rna"] == votes[other]) > 0.75 > by_chance + 0.3


def test_generated_cells_of_a_type_look_like_its_real_ones(pair, trained):
    labels = np.repeat(list(SIZES), 400)
    new = trained.generate(labels, random_state=2)
    for name in SIZES:
        real, made = pair.labels == name, labels == name
        frequency = dense(pair.peaks[real]).mean(axis=0)
        generated = dense(new["atac"][made]).mean(axis=0)
        assert np.corrcoef(frequency, generated)[0, 1] > 0.9
        assert generated.mean() == pytest.approx(frequency.mean(), abs=0.03)
        others = dense(pair.peaks[~real]).mean(axis=0)
        assert np.abs(generated - frequency).mean() < 0.6 * np.abs(generated - others).mean()
        zeros = (dense(pair.counts[real]) == 0).mean()
        assert (dense(new["rna"][made]) == 0).mean() == pytest.approx(zeros, abs=0.05)
        means = dense(pair.counts[real]).mean(axis=0)
        assert np.corrcoef(np.log(means), np.log(dense(new["rna"][made]).mean(axis=0)))[0, 1] > 0.95


def test_a_cell_deep_in_one_modality_is_deep_in_the_other(pair, trained):
    def correlation(first, second):
        totals = [np.log1p(dense(matrix).sum(axis=1)) for matrix in (first, second)]
        return np.corrcoef(*totals)[0, 1]

    real = correlation(pair.counts, pair.proteins)
    new = trained.generate(np.repeat(list(SIZES), [300, 200, 100]), random_state=3)
    assert real > 0.7
    assert correlation(new["rna"], new["protein"]) == pytest.approx(real, abs=0.15)
    apart = copy.deepcopy(trained)
    apart.size_factor_ = SizeFactors(trained.size_factor_.margins, np.eye(3))
    independent = apart.generate(np.repeat(list(SIZES), [300, 200, 100]), random_state=3)
    assert correlation(independent["rna"], independent["protein"]) < real - 0.3


def test_size_factors_are_drawn_with_the_correlation_of_the_data():
    rng = np.random.default_rng(0)
    scores = rng.multivariate_normal([0, 0], [[1.0, 0.8], [0.8, 1.0]], 3_000)
    groups = rng.integers(2, size=3_000)
    totals = np.exp(scores * [0.3, 0.5] + [6.0, 8.0] + groups[:, None])
    fit = SizeFactors.fit(totals, groups, 2)
    assert fit.correlation[0, 1] == pytest.approx(0.8, abs=0.03)
    drawn = np.log(fit.sample(np.zeros(3_000, dtype=int), rng))
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(0.8, abs=0.04)
    assert drawn.std(axis=0) == pytest.approx([0.3, 0.5], rel=0.06)
    lone = SizeFactors.fit(totals[:1], groups[:1], 2)
    assert np.isfinite(lone.sample(np.array([0, 1, -1]), rng)).all()


def test_each_modality_has_its_own_noise_model(pair, trained):
    assert trained.modalities_ == (
        Modality("rna", "nb", 30),
        Modality("atac", "bernoulli", 80),
        Modality("protein", "nb", 8),
    )
    assert trained.n_features_in_ == 118
    new = trained.generate(["A"] * 50)
    assert new["rna"].dtype == np.float32
    assert new["atac"].dtype == np.int8
    assert new["atac"].max() == 1
    assert new["protein"].dtype == pair.proteins.dtype
    assert all(sparse.issparse(matrix) for matrix in new.values())


def test_names_are_only_names(pair):
    one, other = (
        small().fit({first: pair.counts, second: pair.peaks}, pair.labels).generate(["A"] * 5)
        for first, second in (("rna", "atac"), ("atac", "rna"))
    )
    assert np.array_equal(dense(one["rna"]), dense(other["atac"]))
    assert np.array_equal(dense(one["atac"]), dense(other["rna"]))


def test_one_named_modality_is_the_model_of_its_matrix(pair):
    plain = small().fit(pair.counts, pair.labels)
    named = small().fit({"rna": pair.counts}, pair.labels)
    assert np.array_equal(dense(plain.generate(["A"] * 9)), dense(named.generate(["A"] * 9)["rna"]))


def test_losses_are_sums_so_that_a_wide_modality_does_not_silence_a_narrow_one(pair):
    """The gradient for the narrow one's decoder is as if it were alone, but for one factor."""
    model = small().fit(pair.X, pair.labels).network_.autoencoder.eval().requires_grad_(True)
    kinds = [likelihood.values for likelihood in model.likelihoods]
    rows = np.arange(64)
    x = [
        Minibatch.of(matrix, rows, kind, torch.device("cpu"))
        for matrix, kind in zip(pair.X.values(), kinds, strict=True)
    ]
    log_sizes = [own.log_totals() for own in x]
    loss = model.loss(x, log_sizes, torch.zeros(64, dtype=torch.long)) * (64 * 110)
    z = model.encode([own.dense() for own in x])
    apart = sum(
        -likelihood.log_prob(
            own.dense(), likelihood.natural(decoder(z), size), torch.zeros(64, dtype=torch.long)
        ).sum()
        for likelihood, own, decoder, size in zip(
            model.likelihoods, x, model.decoders, log_sizes, strict=True
        )
    )
    torch.testing.assert_close(loss, apart, rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        pytest.param("auto", ("nb", "bernoulli"), id="auto"),
        pytest.param("nb", ("nb", "nb"), id="one-for-all"),
        pytest.param({"rna": "poisson"}, ("poisson", "bernoulli"), id="left-out"),
        pytest.param({"rna": "gaussian", "atac": "poisson"}, ("gaussian", "poisson"), id="each"),
    ],
)
def test_likelihood_by_name_or_by_values(pair, likelihood, expected):
    model = small(likelihood=likelihood).fit(pair.X, pair.labels)
    assert tuple(modality.likelihood for modality in model.modalities_) == expected
    for name, matrix in model.generate(["A"] * 3).items():
        kind = value_kind(dict(zip(("rna", "atac"), expected, strict=True))[name])
        assert sparse.issparse(matrix) == (kind != "real")


def test_a_matrix_without_a_name_of_zeros_and_ones_stays_counts(pair):
    (modality,), _ = lay_out(pair.peaks, "auto")
    assert modality == Modality(None, "nb", 80)


def test_zeros_and_ones_are_told_from_counts_by_every_value():
    X = sparse.csr_matrix(np.ones((5, 4)))
    assert lay_out({"m": X}, "auto")[0][0].likelihood == "bernoulli"
    assert lay_out({"m": X.toarray().astype(bool)}, "auto")[0][0].likelihood == "bernoulli"
    X[4, 3] = 2
    assert lay_out({"m": X}, "auto")[0][0].likelihood == "nb"


def test_hidden_layers_by_width_or_by_name():
    narrow, wide = Modality("n", "nb", 20_000), Modality("w", "bernoulli", 20_001)
    assert hidden_widths("auto", [narrow, wide]) == [(512, 256), (1024, 512)]
    assert hidden_widths("auto", [Modality(None, "nb", 30_000)]) == [(512, 256)]
    assert hidden_widths({"n": (8,)}, [narrow, wide]) == [(8,), (1024, 512)]
    assert hidden_widths((16, 4), [narrow, wide]) == [(16, 4), (16, 4)]
    with pytest.raises(ValueError, match=r"hidden: expected .*\['n', 'w'\].*'x'"):
        hidden_widths({"x": (8,)}, [narrow, wide])


def test_dispersion_per_label_needs_one_modality_that_has_it(pair):
    model = small(dispersion="gene-label").fit(pair.X, pair.labels)
    nb, bernoulli = model.network_.autoencoder.likelihoods
    assert nb.log_theta.shape == (3, 30)
    assert not list(bernoulli.parameters())
    with pytest.raises(ValueError, match="has no inverse dispersion"):
        small(dispersion="gene-label").fit({"atac": pair.peaks}, pair.labels)


def test_guidance_covariates_latents_and_size_factors(pair, quick):
    wanted = {"labels": ["A"] * 40, "covariates": {"donor": ["d1"] * 40}, "random_state": 0}
    plain = quick.generate(**wanted)
    assert not same(plain, quick.generate(**wanted, guidance={"label": 3.0, "donor": 1.0}))
    totals = np.full(40, 1_000.0)
    deep = quick.generate(**wanted, size_factors={"rna": totals, "atac": np.full(40, 60.0)})
    assert deep["rna"].sum() == pytest.approx(40_000, rel=0.1)
    assert deep["atac"].sum() == pytest.approx(2_400, rel=0.1)
    latents = quick.encode({name: matrix[:40] for name, matrix in pair.X.items()})
    assert latents.shape == (40, 6)
    assert not same(plain, quick.generate(**wanted, latents=latents))
    with pytest.raises(
        ValueError, match=r"size_factors: expected the modalities \['rna', 'atac'\]"
    ):
        quick.generate(["A"], size_factors={"rna": [100.0]})
    with pytest.raises(TypeError, match="size_factors: expected a mapping"):
        quick.generate(["A"], size_factors=[100.0])


# ------------------------------------------------------------------ guarantees


def test_the_same_seed_gives_the_same_cells_in_any_container(pair, quick):
    X = {"rna": pair.counts.toarray(), "atac": sparse.csc_matrix(pair.peaks)}
    again = small().fit(X, pair.labels, covariates={"donor": pair.donors})
    wanted = ["A", "B", "C"] * 5
    assert same(quick.generate(wanted), again.generate(wanted))
    assert not same(quick.generate(wanted), again.generate(wanted, random_state=1))


def test_a_matrix_that_is_a_mapping_is_a_matrix(pair):
    """SciPy's dictionaries of keys."""
    plain, dok = (small().fit(X, pair.labels) for X in (pair.counts, pair.counts.todok()))
    assert np.array_equal(plain.encode(pair.counts.todok()), dok.encode(pair.counts))


def test_blocks_and_shares_add_up_to_what_is_generated_at_once(quick):
    labels = ["A", "B", "C"] * 700
    whole = quick.generate(labels, random_state=5)
    parts = [
        block
        for which in range(2)
        for block in quick.generate_blocks(labels, random_state=5, share=(which, 2))
    ]
    assert len(parts) > 2
    assert same(whole, {n: sparse.vstack([part[n] for part in parts]) for n in whole})
    none = quick.generate([], random_state=0)
    assert {name: matrix.shape for name, matrix in none.items()} == {
        "rna": (0, 30),
        "atac": (0, 80),
    }


def test_saving_loading_and_pickling_change_nothing(pair, tmp_path):
    names = {"rna": [f"g{i}" for i in range(30)], "atac": [f"p{i}" for i in range(80)]}
    model = small(likelihood={"atac": "poisson"}, hidden={"rna": (16,)}, max_epochs=1)
    model.fit(pair.X, pair.labels, feature_names=names)
    model.save(tmp_path / "model")
    loaded = CFGen.load(tmp_path / "model", device="cpu")
    assert loaded.modalities_ == model.modalities_
    assert loaded.dtype_ == {"rna": np.dtype(np.float32), "atac": np.dtype(np.int8)}
    assert {name: list(own) for name, own in loaded.feature_names_.items()} == names
    for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert same(model.generate(["A"] * 20), other.generate(["A"] * 20))
        assert np.array_equal(model.encode(pair.X), other.encode(pair.X))


def test_a_wide_sparse_modality_never_takes_the_memory_of_a_dense_one():
    rng = np.random.default_rng(0)
    peaks = sparse.random(1_500, 20_000, density=0.01, format="csr", random_state=0)
    peaks.data[:] = 1.0
    counts = sparse.csr_matrix(rng.poisson(0.1, (1_500, 50)))
    model = small(hidden=(4,), max_epochs=1, batch_size=64)
    tracemalloc.start()
    model.fit({"rna": counts, "atac": peaks}, np.repeat(["a", "b"], 750))
    new = model.generate(["a"] * 300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert new["atac"].shape == (300, 20_000)
    assert sparse.issparse(new["atac"])
    assert peak < 0.5 * 1_500 * 20_000 * 4


def test_modalities_on_disk_train_what_memory_trains(pair, tmp_path):
    backed = {}
    for name, matrix in pair.X.items():
        made = anndata.AnnData(matrix.astype(np.float32))
        made.write_h5ad(tmp_path / f"{name}.h5ad")
        backed[name] = anndata.read_h5ad(tmp_path / f"{name}.h5ad", backed="r").X
    in_memory = {name: matrix.astype(np.float32) for name, matrix in pair.X.items()}
    first, second = (small().fit(X, pair.labels) for X in (in_memory, backed))
    assert same(first.generate(["A"] * 9), second.generate(["A"] * 9))


def test_files_larger_than_a_buffer_train_on_the_same_cells_in_step(pair, tmp_path, monkeypatch):
    """Modalities shuffled apart would not learn that they agree."""
    monkeypatch.setattr("cfgen_augment.stored._BUFFER_VALUES", 2_000)
    monkeypatch.setattr("cfgen_augment.stored._CHUNK_ROWS", 8)
    read = {30: [], 80: []}
    load = StoredCells.load

    def recorded(self, runs):
        read[self.shape[1]].append(np.concatenate(runs).tolist())
        return load(self, runs)

    monkeypatch.setattr(StoredCells, "load", recorded)
    backed = {}
    for name, matrix in pair.X.items():
        made = anndata.AnnData(matrix.astype(np.float32))
        made.write_h5ad(tmp_path / f"{name}.h5ad")
        backed[name] = anndata.read_h5ad(tmp_path / f"{name}.h5ad", backed="r").X
    model = small(max_epochs=(2, 1)).fit(backed, pair.labels)
    assert np.isfinite(model.history_["autoencoder"].validation).all()
    assert read[30] == read[80]
    assert len(read[30]) > 6


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param(
            lambda X: X | {"atac": X["atac"] * 0.5},
            ValueError,
            r"X\['atac'\].*fraction",
            id="share",
        ),
        pytest.param(
            lambda X: X | {"rna": -X["rna"]}, ValueError, r"X\['rna'\].*negative", id="negative"
        ),
        pytest.param(
            lambda X: X | {"atac": X["atac"][:-1]},
            ValueError,
            r"X\['atac'\]: expected the 300 cells of X\['rna'\]; got 299",
            id="cells",
        ),
        pytest.param(lambda X: X | {"atac": [[1]]}, TypeError, r"X\['atac'\].*list", id="list"),
        pytest.param(lambda X: {}, ValueError, "names of modalities", id="empty"),
        pytest.param(lambda X: {0: X["rna"]}, ValueError, "names of modalities", id="number"),
    ],
)
def test_errors_name_the_modality(pair, change, error, match):
    with pytest.raises(error, match=match):
        small().fit(change(pair.X), pair.labels)


def test_a_model_takes_the_modalities_it_was_fitted_on(pair, quick):
    with pytest.raises(
        ValueError, match=r"expected the modalities \['rna', 'atac'\]; got \['rna'\]"
    ):
        quick.encode({"rna": pair.counts})
    with pytest.raises(TypeError, match="expected a mapping with the modalities"):
        quick.encode(pair.counts)
    with pytest.raises(ValueError, match=r"X\['atac'\]: expected the 80 features"):
        quick.encode({"rna": pair.counts, "atac": pair.peaks[:, :3]})
    alone = small(max_epochs=1).fit(pair.counts, pair.labels)
    with pytest.raises(TypeError, match="got a mapping"):
        alone.encode(pair.X)
    with pytest.raises(ValueError, match=r"X\['atac'\].*expected zeros and ones.*got 2"):
        quick.encode(pair.X | {"atac": pair.peaks * 2})
    # In another order they are the same modalities.
    turned = {"atac": pair.peaks, "rna": pair.counts}
    assert np.array_equal(quick.encode(turned), quick.encode(pair.X))
    assert [m.shape[1] for m in check_like(quick.modalities_, turned)] == [30, 80]


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"likelihood": {"protein": "nb"}}, r"likelihood: expected .*\['rna', 'atac'\].*'protein'"),
        ({"likelihood": {"rna": "normal"}}, "likelihood: expected"),
        ({"hidden": {"x": (4,)}}, r"hidden: expected .*'x'"),
        ({"hidden": {"rna": ()}}, "hidden: expected"),
    ],
)
def test_wrong_parameters_are_found_before_training(pair, monkeypatch, parameters, match):
    monkeypatch.setattr(
        "cfgen_augment.model.train_autoencoder", lambda *_, **__: pytest.fail("trained")
    )
    with pytest.raises(ValueError, match=match):
        small(**parameters).fit(pair.X, pair.labels)


def test_feature_names_are_checked_by_modality(pair):
    names = {"rna": [f"g{i}" for i in range(30)], "atac": ["p"] * 80}
    with pytest.raises(ValueError, match="unique names"):
        small().fit(pair.X, pair.labels, feature_names=names)
    with pytest.raises(ValueError, match=r"feature_names: expected the modalities"):
        small().fit(pair.X, pair.labels, feature_names={"rna": names["rna"]})


# ------------------------------------------------------------------ annotated cells


@pytest.fixture
def parts(pair) -> dict[str, anndata.AnnData]:
    """Two AnnData of the same cells, the second in another order."""
    names = np.array([f"cell{i}" for i in range(len(pair.labels))])
    order = np.random.default_rng(1).permutation(len(names))
    rna = anndata.AnnData(
        pair.counts,
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(pair.labels), "donor": pair.donors}, index=names
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(30)]),
    )
    atac = anndata.AnnData(
        pair.peaks.astype(np.float32)[order],
        obs=pd.DataFrame({"reads": np.arange(len(names))}, index=names[order]),
        var=pd.DataFrame(index=[f"peak{i}" for i in range(80)]),
    )
    return {"rna": rna, "atac": atac}


@pytest.fixture
def mdata(parts):
    with mudata.set_options(pull_on_update=False):
        made = mudata.MuData(parts)
        made.obs["cell_type"] = parts["rna"].obs["cell_type"]
        made.obs["donor"] = parts["rna"].obs["donor"]
    return made


def with_obsm(parts) -> anndata.AnnData:
    made = parts["rna"].copy()
    made.obsm["atac"] = parts["atac"][made.obs_names].X.copy()
    return made


OPTIONS = {"target_size": 400, "max_epochs": 1, "random_state": 0}


def check_augmented(part, original, n_new=100):
    """Originals first and unchanged, then marked cells; sparse stays sparse."""
    n = original.n_obs
    assert part.shape == (n + n_new, original.n_vars)
    assert part.obs_names.is_unique
    assert list(part.obs_names[:n]) == list(original.obs_names)
    assert sparse.issparse(part.X)
    assert part.X.dtype == original.X.dtype
    assert (part.X[:n] != original.X).nnz == 0
    assert part.obs["is_synthetic"].tolist() == [False] * n + [True] * n_new
    assert list(part.var_names) == list(original.var_names)


def test_every_form_gets_the_same_cells_and_comes_back_as_it_came(parts, mdata):
    before = {name: part.copy() for name, part in parts.items()}
    by_name = augment(parts, "cell_type", donor_key="donor", **OPTIONS)
    in_mudata = augment(mdata, "cell_type", donor_key="donor", **OPTIONS)
    beside = augment(
        with_obsm(parts), "cell_type", donor_key="donor", modalities=["X", "atac"], **OPTIONS
    )
    assert list(by_name) == ["rna", "atac"]
    assert isinstance(in_mudata, mudata.MuData)
    for name, original in before.items():
        check_augmented(by_name[name], original)
        check_augmented(in_mudata[name], original)
        assert (by_name[name].X != in_mudata[name].X).nnz == 0
        assert (parts[name].X != original.X).nnz == 0
    check_augmented(beside, before["rna"])
    assert (beside.X != by_name["rna"].X).nnz == 0
    assert sparse.issparse(beside.obsm["atac"])
    assert (beside.obsm["atac"][300:] != by_name["atac"].X[300:]).nnz == 0
    labels = by_name["rna"].obs["cell_type"]
    assert labels.notna().all()
    assert (
        in_mudata.obs["cell_type"].tolist() == beside.obs["cell_type"].tolist() == labels.tolist()
    )
    assert in_mudata["rna"].obs["cell_type"].tolist() == labels.tolist()
    assert in_mudata.obs["donor"].notna().all()
    assert in_mudata["atac"].obs["reads"].isna().sum() == 100
    assert in_mudata.obs_names.is_unique
    assert in_mudata.obs["is_synthetic"].sum() == 100
    assert in_mudata.uns["cfgen_augment"]["parameters"]["likelihood"] == {
        "rna": "nb",
        "atac": "bernoulli",
    }


def test_cells_are_matched_by_name_not_by_place(pair, parts):
    turned = {"rna": parts["rna"], "atac": parts["atac"][parts["rna"].obs_names].copy()}
    first, second = (augment(form, "cell_type", **OPTIONS) for form in (parts, turned))
    assert (first["atac"].X[300:] != second["atac"].X[300:]).nnz == 0
    assert (first["rna"].X != second["rna"].X).nnz == 0


def test_modalities_of_other_cells_are_refused(parts, mdata):
    fewer = {"rna": parts["rna"], "atac": parts["atac"][:-2].copy()}
    with pytest.raises(ValueError, match=r"modality 'atac': expected the 300 cells.*2 are absent"):
        augment(fewer, "cell_type", **OPTIONS)
    with mudata.set_options(pull_on_update=False):
        union = mudata.MuData(fewer)
        union.obs["cell_type"] = "A"
    with pytest.raises(ValueError, match=r"modality 'atac'.*2 are absent.*intersect_obs"):
        augment(union, "cell_type", **OPTIONS)
    parts["atac"].obs_names = ["same"] * 300
    with pytest.raises(ValueError, match=r"modality 'atac' has duplicates"):
        augment(parts, "cell_type", **OPTIONS)


def test_annotation_that_is_absent_or_contradicts_itself_is_named(parts, mdata):
    with pytest.raises(KeyError, match=r"label_key: expected a column of mdata.obs .*pull_obs"):
        augment(mdata, "reads", **OPTIONS)
    with pytest.raises(KeyError, match="label_key: expected a column of obs in at least one"):
        augment(parts, "type", **OPTIONS)
    parts["atac"].obs["cell_type"] = "A"
    with pytest.raises(ValueError, match=r"'rna' and 'atac' do not"):
        augment(parts, "cell_type", **OPTIONS)
    with pytest.raises(KeyError, match="modalities: expected 'X' or keys of obsm"):
        augment(parts["rna"], "cell_type", modalities=["X", "peaks"], **OPTIONS)
    with pytest.raises(TypeError, match="modalities: expected AnnData"):
        augment(mdata, "cell_type", modalities=["X"], **OPTIONS)
    with pytest.raises(KeyError, match=r"modality 'rna': layer: expected one of the layers"):
        augment(mdata, "cell_type", layer={"rna": "counts"}, **OPTIONS)
    mdata.uns["cfgen_augment"] = {}
    with pytest.raises(ValueError, match="augmented before"):
        augment(mdata, "cell_type", **OPTIONS)


def test_a_column_that_means_something_else_below_is_left_alone(mdata):
    mdata["atac"].obs["cell_type"] = "unknown"
    mdata["rna"].obs["kind"] = mdata.obs["cell_type"]
    mdata.obs["rna:kind"] = mdata.obs["cell_type"]
    result = augment(mdata, "rna:kind", **OPTIONS)
    assert result.obs["rna:kind"].notna().all()
    assert result["rna"].obs["kind"].tolist() == result.obs["rna:kind"].tolist()
    assert result["atac"].obs["cell_type"].isna().sum() == 100


def test_layers_by_modality_and_what_is_dropped(mdata):
    mdata["rna"].layers["counts"] = mdata["rna"].X.copy()
    mdata["rna"].X = mdata["rna"].X * np.float32(0.5)
    mdata["atac"].obsm["X_lsi"] = np.ones((300, 2))
    mdata.obsm["X_wnn"] = np.ones((300, 2))
    with pytest.warns(UserWarning, match=r"Dropped .*obsm\['X_lsi'\] of 'atac', obsm\['X_wnn'\]"):
        result = augment(mdata, "cell_type", layer={"rna": "counts"}, **OPTIONS)
    assert (result["rna"].X[:300] != mdata["rna"].layers["counts"]).nnz == 0
    assert (result["rna"].layers["counts"] != result["rna"].X).nnz == 0


def test_tables_in_obsm_stay_tables(pair, parts):
    adata = parts["rna"]
    adata.obsm["protein"] = pd.DataFrame(
        pair.proteins, index=adata.obs_names, columns=[f"CD{i}" for i in range(8)]
    )
    result = augment(adata, "cell_type", modalities=["X", "protein"], **OPTIONS)
    table = result.obsm["protein"]
    assert list(table.columns) == list(adata.obsm["protein"].columns)
    assert table.dtypes.eq(adata.obsm["protein"].dtypes).all()
    pd.testing.assert_frame_equal(table.iloc[:300], adata.obsm["protein"])
    with pytest.warns(UserWarning, match="Dropped what does not hold for generated cells: X"):
        alone = augment(adata, "cell_type", modalities=["protein"], **OPTIONS)
    assert alone.X is None
    assert alone.obsm["protein"].shape == (400, 8)


# ------------------------------------------------------------------ sampler and files


def test_the_sampler_resamples_mudata_in_a_pipeline(mdata):
    labels = mdata.obs["cell_type"].astype(str).to_numpy()
    sampler = CFGenSampler(target_size=1.5, max_epochs=2, random_state=0, device="cpu")
    resampled, y = sampler.fit_resample(mdata, labels)
    check_augmented(resampled["rna"], mdata["rna"], 150)
    assert len(y) == resampled.n_obs == 450
    assert sampler.feature_names_in_[0] == "rna:gene0"
    assert sampler.n_features_in_ == 110

    def counts(cells):
        return np.log1p(cells["rna"][cells.obs_names].X.toarray())

    model = make_pipeline(sampler, FunctionTransformer(counts), LogisticRegression(max_iter=2_000))
    with mudata.set_options(pull_on_update=False):
        scores = cross_val_score(model, mdata, labels, cv=2)
    assert scores.mean() > 0.8


def test_a_trained_generator_is_held_to_its_modalities(pair, mdata, tmp_path):
    labels = mdata.obs["cell_type"].astype(str).to_numpy()
    augment(mdata, "cell_type", save_model=tmp_path / "model", **OPTIONS)
    sampler = CFGenSampler(target_size=320, generator=tmp_path / "model", random_state=0)
    again, _ = sampler.fit_resample(mdata, labels)
    assert again.n_obs == 320
    with pytest.raises(TypeError, match="expected a mapping with the modalities"):
        sampler.fit_resample(mdata["rna"], labels)
    mdata["atac"].var_names = [f"other{i}" for i in range(80)]
    with pytest.raises(ValueError, match="80 are absent"):
        sampler.fit_resample(mdata, labels)


def write_h5mu(path, mdata):
    with mudata.set_options(pull_on_update=False):
        mudata.write_h5mu(path, mdata)
    return path


def read_h5mu(path):
    with mudata.set_options(pull_on_update=False):
        return mudata.read_h5mu(path)


def test_the_h5mu_file_is_what_memory_would_write(mdata, tmp_path, monkeypatch):
    monkeypatch.setattr("cfgen_augment.writing._WRITTEN_VALUES", 500)
    mdata["rna"].layers["counts"] = mdata["rna"].X.copy()
    source = write_h5mu(tmp_path / "in.h5mu", mdata)
    expected = augment(read_h5mu(source), "cell_type", **OPTIONS)
    written = augment_file(source, tmp_path / "out.h5mu", "cell_type", **OPTIONS)
    assert written["rna"].X is None
    assert written.n_obs == 400
    found = read_h5mu(tmp_path / "out.h5mu")
    for name in ("rna", "atac"):
        check_augmented(found[name], mdata[name])
        assert (found[name].X != expected[name].X).nnz == 0
    assert (found["rna"].layers["counts"] != found["rna"].X).nnz == 0
    assert found.obs["cell_type"].tolist() == expected.obs["cell_type"].tolist()
    assert int(found.uns["cfgen_augment"]["seed"]) == 0


def test_modalities_in_obsm_from_file_to_file(parts, tmp_path):
    adata = with_obsm(parts)
    adata.write_h5ad(tmp_path / "in.h5ad")
    options = {"modalities": ["X", "atac"], **OPTIONS}
    expected = augment(adata, "cell_type", **options)
    augment_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", "cell_type", **options)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (found.X != expected.X).nnz == 0
    assert (found.obsm["atac"] != expected.obsm["atac"]).nnz == 0


def test_shares_of_several_processes_come_back_in_order(quick, tmp_path):
    """Cells of every modality by way of the disk, as several processes hand them to one."""
    labels = ["A", "B", "C"] * 800
    whole = quick.generate(labels, random_state=5)
    shards = []
    for which in range(2):
        blocks = quick.generate_blocks(labels, random_state=5, share=(which, 2))
        shards.append(tmp_path / f"shard-{which}")
        writing.write_shard(shards[-1], ([block["rna"], block["atac"]] for block in blocks))
    parts = [dict(zip(("rna", "atac"), part, strict=True)) for part in writing.read_shards(shards)]
    assert same(whole, {n: sparse.vstack([part[n] for part in parts]) for n in whole})


def test_a_failed_write_leaves_no_h5mu(mdata, tmp_path, monkeypatch):
    source = write_h5mu(tmp_path / "in.h5mu", mdata)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("cfgen_augment.writing._Growing.append", fail)
    with pytest.raises(OSError, match=r"out.h5mu: could not be written \(no space left\)"):
        augment_file(source, tmp_path / "out.h5mu", "cell_type", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5mu"]


def run(*arguments) -> int:
    fixed = ["--label-key", "cell_type", "--device", "cpu", "--max-epochs", "1", "--seed", "0"]
    return cli.main([str(argument) for argument in (*arguments, *fixed)])


def test_the_command_takes_and_writes_h5mu(mdata, tmp_path, capsys):
    source, target = write_h5mu(tmp_path / "in.h5mu", mdata), tmp_path / "out.h5mu"
    assert run(source, target, "--target-size", "400", "--likelihood", "rna=poisson") == cli.OK
    assert "300 real + 100 synthetic cells x 110 features" in capsys.readouterr().out
    found = read_h5mu(target)
    check_augmented(found["rna"], mdata["rna"])
    assert found.uns["cfgen_augment"]["parameters"]["likelihood"]["rna"] == "poisson"
    before = target.read_bytes()
    assert run(source, target) == cli.OUTPUT_EXISTS
    assert target.read_bytes() == before
    assert run(target, tmp_path / "twice.h5mu") == cli.BAD_INPUT
    assert "augmented before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "options", "match"),
    [
        ("out.h5ad", [], "ends in .h5mu, as that of the input"),
        ("out.h5mu", ["--report", "r.html"], "diagnose on one modality at a time"),
        ("out.h5mu", ["--modalities", "X,atac"], "modalities: expected AnnData"),
        ("out.h5mu", ["--likelihood", "prot=nb"], "likelihood: expected"),
    ],
)
def test_what_the_command_cannot_do_with_h5mu(
    mdata, tmp_path, capsys, monkeypatch, output, options, match
):
    monkeypatch.chdir(tmp_path)
    source = write_h5mu(tmp_path / "in.h5mu", mdata)
    assert run(source, output, *options) == cli.BAD_INPUT
    assert match in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5mu"]


def test_without_mudata_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "mudata", None)
    (tmp_path / "in.h5mu").write_bytes(b"")
    assert run(tmp_path / "in.h5mu", tmp_path / "out.h5mu") == cli.BAD_INPUT
    assert "pip install 'cfgen-augment[multimodal]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match="multimodal"):
        augment_file(tmp_path / "in.h5mu", tmp_path / "out.h5mu", "cell_type")


def test_a_file_that_is_no_h5mu_cannot_be_read(parts, tmp_path, capsys):
    parts["rna"].write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "cells.h5ad").rename(tmp_path / "in.h5mu")
    assert run(tmp_path / "in.h5mu", tmp_path / "out.h5mu") == cli.UNREADABLE
    assert "it does not hold MuData" in capsys.readouterr().err


# ------------------------------------------------------------------ real data


def test_real_paired_cells(real_data):
    """Kidney cells of sci-CAR: fifteen types, 1,482 genes, and which of 1,499 peaks are open."""
    rna = anndata.read_h5ad(real_data("scicar_mouse_kidney_rna_tiny.h5ad"))
    atac = anndata.read_h5ad(real_data("scicar_mouse_kidney_atac_tiny.h5ad"))
    atac.X = (atac.X > 0).astype(np.float32)
    options = {"target_size": 800, "max_epochs": (20, 40), "exponent": -2.0, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is dropped, and types that are too small
        result = augment({"rna": rna, "atac": atac}, "cell_type", **options)
    assert {name: part.n_obs for name, part in result.items()} == {"rna": 800, "atac": 800}
    new = result["rna"].obs["is_synthetic"].to_numpy()
    for name in result:
        real, made = (np.asarray((result[name].X[m] > 0).mean(axis=0)).ravel() for m in (~new, new))
        assert np.corrcoef(real, made)[0, 1] > 0.8
        assert made.mean() == pytest.approx(real.mean(), rel=0.3)


@pytest.mark.parametrize("to_file", [False, True], ids=["in memory", "to a file"])
def test_columns_of_a_table_in_obsm_hold_what_they_can(parts, tmp_path, to_file):
    """The model generates in the widest of the columns' dtypes."""
    adata = parts["rna"]
    random = np.random.default_rng(0)
    counts = random.negative_binomial(2, 0.02, (adata.n_obs, 2))
    narrow = np.minimum(counts[:, 0], 127).astype(np.int8)
    adata.obsm["protein"] = pd.DataFrame(
        {"CD3": narrow, "CD4": 4 * counts[:, 1]}, index=adata.obs_names
    )
    options = {"modalities": ["X", "protein"], **OPTIONS}
    given, out = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    adata.write_h5ad(given)
    with pytest.warns(UserWarning, match="were held at its largest value"):
        made = (
            augment_file(given, out, "cell_type", **options)
            if to_file
            else augment(adata, "cell_type", **options)
        )
    table = (anndata.read_h5ad(out) if to_file else made).obsm["protein"]
    assert table["CD3"].dtype == np.int8
    assert table["CD3"].min() >= 0
    assert table["CD3"].max() == 127


def test_a_modality_can_be_diagnosed_alone(mdata):
    made = augment(mdata, "cell_type", key_added="made", **OPTIONS)
    with pytest.raises(TypeError, match=r"Of several modalities pass one.*push_obs"):
        diagnose(made, label_key="cell_type")
    made.push_obs(columns=["cell_type"])
    for name in ("rna", "atac"):
        table = diagnose(made[name], label_key="cell_type")
        assert table["n_real"].sum() == mdata.n_obs
        assert table["n_synthetic"].sum() == made.n_obs - mdata.n_obs
