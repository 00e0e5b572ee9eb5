"""`CFGenSampler` by itself: totals, containers, generators, attributes, and refusals."""

from __future__ import annotations

import copy
from collections import Counter

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from cfgen_augment import CFGen, CFGenSampler

N_GENES = 40


def make(sampling_strategy="inverse-sqrt", **parameters) -> CFGenSampler:
    """A sampler that trains in no time."""
    quick = {"n_latent": 4, "max_epochs": 2, "n_steps": 2, "random_state": 0, "device": "cpu"}
    return CFGenSampler(sampling_strategy, **(quick | parameters))


def using(generator, **parameters) -> CFGenSampler:
    """A sampler with a generator of its own."""
    return CFGenSampler(
        generator=generator, **({"n_steps": 2, "random_state": 0, "device": "cpu"} | parameters)
    )


def dense(X) -> np.ndarray:
    if isinstance(X, pd.DataFrame):
        return X.to_numpy()
    return X.toarray() if sparse.issparse(X) else np.asarray(X)


def frame(X, dtype=None) -> pd.DataFrame:
    return pd.DataFrame(dense(X), columns=[f"gene{i}" for i in range(X.shape[1])], dtype=dtype)


def annotated(cells, **parts) -> anndata.AnnData:
    n_cells, n_genes = cells.X.shape
    obs = pd.DataFrame(
        {"type": pd.Categorical(cells.labels), "n_umi": dense(cells.X).sum(axis=1)},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame({"chrom": ["1", "X"] * (n_genes // 2)}, index=frame(cells.X).columns)
    return anndata.AnnData(**({"X": cells.X.copy(), "obs": obs, "var": var} | parts))


@pytest.fixture
def no_training(monkeypatch):
    """Training is out of bounds: what is wrong has to come out first."""

    def trained_anyway(*args, **kwargs):
        raise AssertionError("training began before the input was checked")

    monkeypatch.setattr("cfgen_augment.model.train_autoencoder", trained_anyway)


# ------------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("target_size", "total"),
    [(150, 150), (151, 151), (300, 300), (307, 307), (1.0, 150), (1.505, 226), (2.0, 300)],
)
@pytest.mark.parametrize("exponent", [0.5, 0.0, 1.0])
def test_inverse_sqrt_fills_the_gap_exactly(cells, trained, target_size, total, exponent):
    sampler = using(trained, target_size=target_size, exponent=exponent)
    X, y = sampler.fit_resample(cells.X, cells.labels)
    assert X.shape == (total, N_GENES)
    assert len(y) == total
    real, new = Counter(cells.labels), Counter(y[150:])
    assert {t: n for t, n in sampler.sampling_strategy_.items() if n} == new
    share = {t: n**-exponent / sum(m**-exponent for m in real.values()) for t, n in real.items()}
    assert all(abs(new[t] - share[t] * (total - 150)) < 1 for t in real)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("auto", {"B": 80, "NK": 80, "T": 80}),
        ("not majority", {"B": 80, "NK": 80, "T": 80}),
        ("all", {"B": 80, "NK": 80, "T": 80}),
        ("minority", {"B": 80, "NK": 80, "T": 58}),
        ("not minority", {"B": 80, "NK": 12, "T": 80}),
        ({"T": 60, "NK": 31}, {"B": 80, "NK": 31, "T": 60}),
        (lambda y: {"NK": (y == "B").sum() // 2}, {"B": 80, "NK": 40, "T": 58}),
    ],
    ids=["auto", "not-majority", "all", "minority", "not-minority", "dict", "callable"],
)
def test_strategies_of_imbalanced_learn(cells, trained, strategy, expected):
    sampler = using(trained, sampling_strategy=strategy)
    _, y = sampler.fit_resample(cells.X, cells.labels)
    assert Counter(y) == expected
    assert all(type(name) is str for name in sampler.sampling_strategy_)
    assert sum(sampler.sampling_strategy_.values()) == len(y) - 150


def test_a_float_is_a_ratio_for_two_classes(cells, trained):
    two = cells.labels != "T"
    _, y = using(trained, sampling_strategy=0.5).fit_resample(cells.X[two], cells.labels[two])
    assert Counter(y) == {"B": 80, "NK": 40}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("inverse-sqrt", 300), ("auto", 150 + 80 - 55), ({"NK": 20, "T": 60}, 155)],
    ids=["inverse-sqrt", "auto", "dict"],
)
def test_small_types_are_named_and_left_alone(cells, trained, strategy, expected):
    labels = cells.labels.copy()
    labels[np.flatnonzero(labels == "T")[:3]] = "NK"  # 55 T, 15 NK
    sampler = using(trained, sampling_strategy=strategy, min_cells=16)
    with pytest.warns(UserWarning, match=r"min_cells=16 cells: 'NK' \(15\)\.") as caught:
        _, y = sampler.fit_resample(cells.X, labels)
    assert caught[0].filename == __file__
    assert len(y) == expected
    assert sampler.sampling_strategy_["NK"] == 0
    assert Counter(y)["NK"] == 15


def test_numbered_types_are_named_as_numbers(cells):
    codes = np.unique(cells.labels, return_inverse=True)[1]
    with pytest.warns(UserWarning, match=r"cells: 1 \(12\)\."):
        make(min_cells=20).fit(cells.X, codes)


def test_a_type_of_one_cell_can_be_generated(cells):
    labels = cells.labels.astype(object)
    labels[0] = "alone"
    sampler = make({"alone": 9}, min_cells=1)
    X, y = sampler.fit_resample(cells.X, labels)
    assert Counter(y)["alone"] == 9
    assert X[150:].sum(axis=1).min() > 0


# ----------------------------------------------------------------- containers

CONTAINERS = {
    "ndarray": np.asarray,
    "ndarray-int32": lambda X: X.astype(np.int32),
    "ndarray-uint16": lambda X: X.astype(np.uint16),
    "ndarray-float32": lambda X: X.astype(np.float32),
    "ndarray-fortran": np.asfortranarray,
    "csr_matrix": sparse.csr_matrix,
    "csr_matrix-float64": lambda X: sparse.csr_matrix(X, dtype=np.float64),
    "csc_matrix": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": lambda X: sparse.csc_array(X, dtype=np.uint16),
    "DataFrame": frame,
    "DataFrame-float32": lambda X: frame(X, np.float32),
    "DataFrame-mixed": lambda X: frame(X).astype({"gene1": np.int32, "gene2": np.float64}),
    "DataFrame-sparse": lambda X: frame(X, pd.SparseDtype(np.int32, 0)),
    "list": lambda X: X.tolist(),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_what_goes_in_comes_out(cells, container):
    X = container(cells.X.toarray())
    before = copy.deepcopy(X)
    sampler = make(target_size=200)
    X_res, y_res = sampler.fit_resample(X, cells.labels)

    assert type(X_res) is type(X)
    if isinstance(X, pd.DataFrame):
        assert X_res.dtypes.equals(X.dtypes)
        assert X_res.columns.equals(X.columns)
        assert sampler.feature_names_in_.tolist() == X.columns.tolist()
    elif not isinstance(X, list):
        assert X_res.dtype == X.dtype
    if sparse.issparse(X):
        assert X_res.format == X.format
    np.testing.assert_array_equal(dense(X), dense(before))
    np.testing.assert_array_equal(dense(X_res)[:150], dense(before))
    np.testing.assert_array_equal(y_res[:150], cells.labels)

    reference, _ = make(target_size=200).fit_resample(cells.X.toarray(), cells.labels)
    np.testing.assert_array_equal(dense(X_res), reference)
    assert dense(X_res)[150:].sum() > 0
    np.testing.assert_array_equal(sampler.is_synthetic_, np.arange(200) >= 150)
    assert sampler.n_features_in_ == N_GENES
    assert not hasattr(sampler, "sample_indices_")


LABELS = {
    "object": lambda y: y.astype(object),
    "int": lambda y: np.unique(y, return_inverse=True)[1].astype(np.int32),
    "float": lambda y: np.unique(y, return_inverse=True)[1].astype(np.float64),
    "bool": lambda y: y == "NK",
    "list": lambda y: y.tolist(),
    "Series": lambda y: pd.Series(y, name="type"),
    "Series-categorical": lambda y: pd.Series(pd.Categorical(y, ["T", "NK", "B", "?"]), name="t"),
    "DataFrame": lambda y: pd.DataFrame({"type": y}),
}


@pytest.mark.parametrize("convert", LABELS.values(), ids=LABELS)
def test_labels_keep_their_type(cells, convert):
    y = convert(cells.labels)
    _, y_res = make(target_size=200).fit_resample(frame(cells.X), y)
    assert type(y_res) is type(y)
    assert len(y_res) == 200
    if isinstance(y, (pd.Series, pd.DataFrame)):
        expected, got = y, y_res.iloc[:150]
        assert expected.equals(got)
        assert getattr(y_res, "name", None) == getattr(y, "name", None)
        assert set(np.ravel(y_res)) == set(np.ravel(y))
    else:
        assert list(y_res[:150]) == list(y)
        assert set(y_res) == set(y)
        assert getattr(y_res, "dtype", None) == getattr(y, "dtype", None)


@pytest.mark.parametrize(
    ("container", "columns"),
    [
        (lambda X: X.astype(np.uint8), slice(None)),
        (lambda X: sparse.csc_matrix(X, dtype=np.uint8), slice(None)),
        (lambda X: frame(X, np.uint8), slice(None)),
        (lambda X: frame(X).astype({"gene0": np.uint8, "gene2": np.uint8}), [0, 2]),
        (
            lambda X: frame(X, pd.SparseDtype(np.int64, 0)).astype(
                {"gene0": pd.SparseDtype(np.uint8, 0), "gene2": pd.SparseDtype(np.uint8, 0)}
            ),
            [0, 2],
        ),
    ],
    ids=["ndarray", "csc", "DataFrame", "DataFrame-mixed", "DataFrame-mixed-sparse"],
)
@pytest.mark.parametrize("fitted_before", [False, True], ids=["own-model", "given-model"])
def test_narrow_dtypes_saturate_and_never_wrap(container, columns, fitted_before):
    counts = np.minimum(np.random.default_rng(0).poisson(250, size=(40, 4)), 255)
    labels = np.repeat(["a", "b"], 20)
    sampler = make(target_size=200)
    expected, _ = sampler.fit_resample(counts, labels)
    if fitted_before:  # on a wider dtype
        sampler = using(sampler.generator_, target_size=200)
    with pytest.warns(UserWarning, match="were held at its largest value") as caught:
        X, _ = sampler.fit_resample(container(counts), labels)
    assert [w.filename for w in caught] == [__file__]
    assert expected[:, columns].max() > 255
    expected[:, columns] = np.minimum(expected[:, columns], 255)
    np.testing.assert_array_equal(dense(X), expected)


def test_anndata_keeps_names_and_annotation(cells):
    adata = annotated(cells)
    sampler = make(target_size=200)
    result, y = sampler.fit_resample(adata, adata.obs["type"])
    assert result.n_obs == 200
    assert result.obs_names[:150].equals(adata.obs_names)
    assert result.obs_names.is_unique
    assert y.index.equals(result.obs_names)
    assert y.dtype == adata.obs["type"].dtype
    pd.testing.assert_frame_equal(result.var, adata.var)
    assert result.obs["n_umi"].iloc[:150].tolist() == adata.obs["n_umi"].tolist()
    assert result.obs["n_umi"].iloc[150:].isna().all()
    np.testing.assert_array_equal(result.obs["is_synthetic"], sampler.is_synthetic_)
    assert sampler.feature_names_in_.tolist() == adata.var_names.tolist()
    reference, _ = make(target_size=200).fit_resample(cells.X, cells.labels)
    assert (reference != result.X).nnz == 0
    assert adata.n_obs == 150
    assert "is_synthetic" not in adata.obs


def test_anndata_layer(cells):
    adata = annotated(cells, X=None, layers={"counts": cells.X})
    result, y = make(target_size=200, layer="counts").fit_resample(adata, cells.labels)
    reference, _ = make(target_size=200).fit_resample(cells.X, cells.labels)
    assert (result.layers["counts"] != reference).nnz == 0
    assert isinstance(y, np.ndarray)


# ----------------------------------------------------------------- randomness


@pytest.mark.parametrize("given", [False, True], ids=["own-model", "given-model"])
def test_seeds(cells, trained, given):
    def run(state):
        sampler = using(trained) if given else make()
        sampler.set_params(target_size=200, random_state=state)
        X, _ = sampler.fit_resample(cells.X, cells.labels)
        return X, sampler.random_seed_

    first, again, other = run(1)[0], run(1)[0], run(2)[0]
    assert (first != again).nnz == 0
    assert (first[150:] != other[150:]).nnz > 0

    drawn, seed = run(None)
    assert (drawn != run(seed)[0]).nnz == 0

    shared = np.random.RandomState(5)
    assert run(shared)[1] != run(shared)[1]
    assert run(np.random.RandomState(5))[1] == run(np.random.RandomState(5))[1]


@pytest.mark.parametrize("random_state", [None, 0])
def test_global_random_states_are_left_alone(cells, random_state):
    before = np.random.get_state()  # noqa: NPY002
    torch_before = torch.get_rng_state()
    seeds = set()
    for _ in range(2):
        sampler = make(target_size=160, random_state=random_state)
        sampler.fit_resample(cells.X, cells.labels)
        seeds.add(sampler.random_seed_)
        after = np.random.get_state()  # noqa: NPY002
        np.testing.assert_array_equal(after[1], before[1])
        assert after[2:] == before[2:]
        assert torch.equal(torch.get_rng_state(), torch_before)
    assert len(seeds) == (2 if random_state is None else 1)


# ----------------------------------------------------------------- generators


def test_a_fitted_and_a_saved_generator_only_generate(cells, trained, tmp_path, no_training):
    expected, _ = using(trained).fit_resample(cells.X, cells.labels)
    saved = trained.save(tmp_path / "model")
    for generator in (saved, str(saved)):
        X, _ = using(generator).fit_resample(cells.X, cells.labels)
        assert (expected != X).nnz == 0


def test_a_saved_generator_says_what_its_data_look_like(tmp_path):
    X = np.random.default_rng(0).normal(size=(40, 6))
    y = np.repeat(["a", "b"], [30, 10])
    model = CFGen(likelihood="gaussian", n_latent=2, max_epochs=1, random_state=0, device="cpu")
    saved = model.fit(X, y).save(tmp_path / "model")
    X_res, _ = using(saved).fit_resample(X, y)
    assert X_res.shape == (80, 6)
    assert not using(model).__sklearn_tags__().input_tags.positive_only


def test_an_unfitted_generator_is_a_template(cells):
    template = CFGen(hidden=(16,), n_latent=3, max_epochs=1, device="cpu")
    results = []
    for seed in (0, 0, 1):
        sampler = using(template, random_state=seed)
        results.append(sampler.fit_resample(cells.X, cells.labels)[0])
        assert sampler.generator_.hidden == (16,)
        assert sampler.generator_.network_.autoencoder.encoders[0][0].out_features == 16
    assert not hasattr(template, "network_")
    assert template.random_state is None
    assert (results[0] != results[1]).nnz == 0
    assert (results[0] != results[2]).nnz > 0


@pytest.mark.parametrize(
    "override",
    [{"solver": "rk4"}, {"n_steps": 1}, {"guidance": 3.0}, {"guidance": {"label": 0}}],
    ids=str,
)
def test_overrides_reach_generation_and_spare_the_generator(cells, trained, override):
    before = dict(vars(trained))
    counts = cells.X.toarray().astype(np.int32)
    plain, _ = using(trained, n_steps=None).fit_resample(counts, cells.labels)
    sampler = using(trained, **({"n_steps": None} | override))
    changed, _ = sampler.fit_resample(counts, cells.labels)
    assert (plain[150:] != changed[150:]).any()
    assert {name: getattr(sampler.generator_, name) for name in override} == override
    assert vars(trained).keys() == before.keys()
    assert all(vars(trained)[name] is before[name] for name in before)  # dtype_ too


def test_own_model_takes_parameters_of_the_sampler(cells):
    parameters = {
        "likelihood": "poisson",
        "size_factor": "shared",
        "n_latent": 3,
        "max_epochs": (1, 2),
        "batch_size": 64,
        "learning_rate": (1e-3, 2e-3),
        "solver": "heun",
        "n_steps": 3,
        "guidance": 2.0,
    }
    sampler = make(**parameters)
    sampler.fit_resample(cells.X, cells.labels)
    assert {name: getattr(sampler.generator_, name) for name in parameters} == parameters
    history = sampler.generator_.history_
    assert [len(history[stage].training) for stage in ("autoencoder", "flow")] == [1, 2]
    assert make(dispersion="gene-label")._own_generator().dispersion == "gene-label"


GENES = [f"gene{i}" for i in range(N_GENES)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (GENES[:-1], r"40 features .*1 are absent \('gene39'\)"),
        ([*GENES[:-1], "other"], r"1 are absent \('gene39'\)"),
        ([*GENES[:-1], "gene0"], "(duplicates of|unique column names).*'gene0'"),
        (GENES[::-1], "same features in another order"),
    ],
    ids=["fewer", "absent", "duplicated", "permuted"],
)
@pytest.mark.parametrize("form", ["DataFrame", "AnnData"])
@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
def test_features_must_be_the_generators(cells, trained, names, message, form):
    X = pd.DataFrame(cells.X.toarray()[:, : len(names)], columns=names)
    if form == "AnnData":
        X = anndata.AnnData(X.to_numpy(), var=pd.DataFrame(index=names))
        X.obs_names = [f"cell{i}" for i in range(150)]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        using(trained).fit_resample(X, cells.labels)


def test_labels_and_donors_must_be_the_generators(cells, trained):
    with pytest.raises(ValueError, match=r"label: expected .*'B', 'NK', 'T'.* got 'pDC'"):
        using(trained).fit_resample(cells.X, np.where(cells.labels == "T", "pDC", cells.labels))
    donor = np.where(cells.donors == "d3", "d4", cells.donors)
    with pytest.raises(ValueError, match=r"donor: expected .*'d1', 'd2', 'd3'.* got 'd4'"):
        using(trained).fit_resample(cells.X, cells.labels, donor=donor)
    with pytest.raises(ValueError, match=r"fitted with \(\['donor'\]\); got 'batch'"):
        using(trained).fit_resample(cells.X, cells.labels, batch=cells.donors)


@pytest.mark.parametrize(
    "parameter",
    [
        {"likelihood": "poisson"},
        {"dispersion": "gene-label"},
        {"size_factor": "shared"},
        {"n_latent": 8},
        {"max_epochs": 3},
        {"batch_size": 32},
        {"learning_rate": 1e-3},
    ],
    ids=lambda parameter: next(iter(parameter)),
)
def test_model_parameters_beside_a_generator_are_refused(cells, trained, parameter):
    (name,) = parameter
    with pytest.raises(ValueError, match=rf"got \['{name}'\] on the sampler"):
        using(trained, **parameter).fit_resample(cells.X, cells.labels)


# ----------------------------------------------------------------- attributes


@pytest.mark.parametrize("covariates_from", ["label", "all"])
def test_where_donors_of_synthetic_cells_come_from(cells, covariates_from):
    donor = np.char.add("of-", cells.labels)  # every type has a donor of its own
    batch = pd.Series(np.char.add("batch-", donor))
    sampler = make(covariates_from=covariates_from)
    _, y = sampler.fit_resample(cells.X, cells.labels, donor=donor, batch=batch)
    got = sampler.covariates_
    np.testing.assert_array_equal(got["donor"][:150], donor)
    assert len(got["donor"]) == len(got["batch"]) == 300
    new = sampler.is_synthetic_
    own_type = got["donor"][new] == np.char.add("of-", y[new])
    if covariates_from == "label":
        assert own_type.all()
    else:
        # Types as common as in the real data: about 0.43 of the donors match by chance.
        assert 0.1 < own_type.mean() < 0.8
        assert set(got["donor"][new]) == set(donor)
    # Both attributes come from one real cell.
    assert all(b == f"batch-{d}" for d, b in zip(got["donor"], got["batch"], strict=True))
    assert sampler.generator_.attributes_.names == ["label", "donor", "batch"]


def test_size_factors_by_donor(cells):
    donor = np.where(np.arange(150) % 2, "deep", "shallow")
    X = cells.X.multiply(np.where(donor == "deep", 10, 1)[:, None]).tocsr()
    sampler = make(size_factor="donor")
    X_res, _ = sampler.fit_resample(X, cells.labels, donor=donor)
    new = sampler.is_synthetic_
    totals = np.asarray(X_res[new].sum(axis=1)).ravel()
    deep = sampler.covariates_["donor"][new] == "deep"
    assert 6 < np.median(totals[deep]) / np.median(totals[~deep]) < 16


def test_without_attributes_there_are_no_covariates(cells, trained):
    sampler = using(trained)  # fitted with donors, asked without
    sampler.fit_resample(cells.X, cells.labels)
    assert sampler.covariates_ == {}


def test_synthesise_is_the_new_part_of_fit_resample(cells, trained):
    X, y = using(trained).fit_resample(cells.X, cells.labels)
    new, labels = using(trained).synthesise(cells.X, cells.labels)
    assert (X[150:] != new).nnz == 0
    np.testing.assert_array_equal(y[150:], labels)


# -------------------------------------------------------------------- refusals


def _at(values, index, value):
    changed = values.astype(object if value is None or isinstance(value, str) else float)
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: {"y": np.repeat("B", 150)}, "at least two classes; got one class, .*'B'"),
        (lambda X, y: {"y": y[:-1]}, "y: expected one value for each of 150 cells; got 149"),
        (lambda X, y: {"y": y[:-1].tolist()}, "each of 150 cells; got 149"),
        (lambda X, y: {"y": _at(y, 3, None)}, "y: expected a value for every cell; 1 of 150"),
        (lambda X, y: {"y": pd.Series(y).where(y != "NK")}, "12 of 150 are missing"),
        (lambda X, y: {"X": _at(X, (0, 0), np.nan)}, "NaN"),
        (lambda X, y: {"X": _at(X, (0, 0), np.inf)}, "infinity"),
        (lambda X, y: {"X": _at(X, (149, 39), -1)}, "negative value -1.*layer='counts'"),
        (lambda X, y: {"X": sparse.csr_matrix(_at(X, (149, 39), 0.5))}, "fraction 0.5"),
        (lambda X, y: {"X": np.log1p(X)}, "looks log-normalised.*layer='counts'"),
        (lambda X, y: {"X": X + 0j, "y": y}, "expected real numbers; got complex"),
        (lambda X, y: {"X": X[:0], "y": y[:0]}, "0 sample"),
        (lambda X, y: {"X": X[:, 0]}, "2D array"),
        (lambda X, y: {"likelihood": "bernoulli"}, "expected zeros and ones"),
        (lambda X, y: {"target_size": 149}, "at least the 150 cells already there; got 149 cells"),
        (lambda X, y: {"target_size": 0.9}, r"got 0.9 x 150 = 135 cells"),
        (lambda X, y: {"min_cells": 81}, "at least one type with 81 cells or more"),
        (lambda X, y: {"sampling_strategy": 0.5}, "two|binary|multi-class"),
        (lambda X, y: {"sampling_strategy": {"NK": 5}}, "12 samples and 5 samples"),
        (lambda X, y: {"sampling_strategy": {"pDC": 50}}, "pDC"),
        (lambda X, y: {"max_epochs": (1, 2, 3)}, "max_epochs: expected .* pair"),
        (lambda X, y: {"learning_rate": (1e-3, -1.0)}, "learning_rate: expected a positive"),
        (lambda X, y: {"guidance": {"donor": 2.0}}, r"attributes of the model \(\['label'\]\)"),
        (lambda X, y: {"guidance": {"label": "much"}}, "guidance: expected a number, or a mapping"),
        (lambda X, y: {"size_factor": "donor"}, "size_factor: expected .* got 'donor'"),
        (lambda X, y: {"donor": y[:-1]}, "donor: expected one value for each of 150 cells"),
        (lambda X, y: {"batch": _at(y, 7, None)}, "batch: expected a value for every cell"),
        (lambda X, y: {"device": "cuda:99"}, "device: expected one that is there; got 'cuda:99'"),
        (lambda X, y: {"device": "tpu"}, "device: expected 'auto', 'cpu'"),
        (lambda X, y: {"layer": "counts"}, "layer: expected AnnData"),
        (lambda X, y: {"X": frame(X).set_axis(["a"] * 40, axis=1)}, "unique column names"),
        (lambda X, y: {"random_state": -1}, "random_state"),
    ],
    ids=[
        *("one-class", "short-y", "short-y-list", "missing-label", "missing-labels"),
        *("nan", "infinite", "negative", "fraction", "log-normalised", "complex", "empty", "1d"),
        *("not-binary", "target-below", "target-share-below", "all-small"),
        *("float-three-classes", "dict-below", "dict-unknown", "epochs", "rates"),
        *("guidance-unknown", "guidance-not-a-number", "size-factor-without-donor"),
        *("short-donor", "missing-batch", "no-such-gpu", "no-such-device", "layer-of-array"),
        *("duplicated-features", "seed"),
    ],
)
def test_what_is_wrong_comes_out_before_training(cells, change, message, no_training):
    arguments = {"X": cells.X.toarray(), "y": cells.labels}
    changed = change(*arguments.values())
    data = {name: changed.pop(name) for name in ("X", "y", "donor", "batch") if name in changed}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(**changed).fit_resample(**(arguments | data))


@pytest.mark.parametrize(
    ("parts", "layer", "error", "message"),
    [
        ({}, "counts", KeyError, r"layer: expected one of the layers \(none\); got 'counts'"),
        ({"X": None}, None, ValueError, "got no X at all"),
        ({"obs": pd.DataFrame({"is_synthetic": [False] * 150})}, None, ValueError, "already there"),
        ({"obs": pd.DataFrame(index=["cell"] * 150)}, None, ValueError, "obs_names_make_unique"),
    ],
    ids=["no-layer", "no-X", "taken", "duplicated-names"],
)
@pytest.mark.filterwarnings(
    "ignore:Observation names are not unique:UserWarning",
    "ignore:Transforming to str index:anndata.ImplicitModificationWarning",
)
def test_anndata_that_cannot_be_used(cells, parts, layer, error, message, no_training):
    adata = annotated(cells, **parts)
    with pytest.raises(error, match=message):
        make(layer=layer).fit_resample(adata, cells.labels)


def test_fit_checks_without_training(cells, no_training):
    sampler = make(target_size=200)
    assert sampler.fit(cells.X, cells.labels) is sampler
    assert sum(sampler.sampling_strategy_.values()) == 50
    assert not hasattr(sampler, "generator_")
    with pytest.raises(ValueError, match="log-normalised"):
        make().fit(cells.X.astype(float).log1p(), cells.labels)


def test_a_template_is_checked_before_training(cells, no_training):
    with pytest.raises(ValueError, match=r"likelihood: expected 'auto' or one of"):
        using(CFGen(likelihood="normal")).fit_resample(cells.X, cells.labels)
    with pytest.raises(FileNotFoundError):
        using("no-such-model").fit_resample(cells.X, cells.labels)


def test_labels_one_versus_all_come_back_so(cells):
    hot = (cells.labels[:, None] == np.unique(cells.labels)).astype(int)
    _, from_array = make().fit_resample(cells.X, hot)
    _, from_anndata = make().fit_resample(annotated(cells), hot)
    np.testing.assert_array_equal(from_array, from_anndata)
    assert from_array.shape[1] == 3


def test_a_mapping_to_arrays_is_told_where_to_go(cells):
    with pytest.raises(TypeError, match=r"got one to csr_matrix\. Wrap each in AnnData"):
        make().fit_resample({"rna": cells.X, "atac": cells.X}, cells.labels)
