"""`CFGen` on arrays: training, generation, guidance, determinism, bad input."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
import warnings

import joblib
import numpy as np
import pytest
import torch
from conftest import simulate
from scipy import sparse

from cfgen_augment import CFGen
from cfgen_augment.autoencoder import Autoencoder
from cfgen_augment.generation import Wanted
from cfgen_augment.likelihoods import make_likelihood
from cfgen_augment.minibatch import Minibatch
from cfgen_augment.solver import make_solver
from cfgen_augment.stages import encode_cells


def small(**parameters):
    defaults = {"n_latent": 6, "hidden": (32, 16), "flow_width": 32, "max_epochs": 2}
    return CFGen(**{**defaults, "device": "cpu", "random_state": 0, **parameters})


def fit_small(cells, **parameters):
    return small(**parameters).fit(cells.X, cells.labels)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and abs(a - b).sum() == 0


# ------------------------------------------------------------------- what it generates


def test_generated_types_resemble_their_own_type_most(cells, trained):
    new = trained.generate(cells.labels, random_state=1)
    profiles = {}
    for name in trained.classes_:
        for kind, X in (("real", cells.X), ("new", new)):
            mean = np.asarray(X[cells.labels == name].mean(axis=0)).ravel()
            profiles[kind, name] = np.log1p(mean / mean.sum() * 1e3)
    for name in trained.classes_:
        correlation = {
            other: np.corrcoef(profiles["new", name], profiles["real", other])[0, 1]
            for other in trained.classes_
        }
        assert max(correlation, key=correlation.get) == name
        assert correlation[name] > 0.9


def test_counts_are_csr_whole_and_in_the_training_dtype(cells, trained):
    new = trained.generate(["B"] * 7, random_state=0)
    assert sparse.issparse(new)
    assert new.format == "csr"
    assert new.shape == (7, cells.X.shape[1])
    assert new.dtype == cells.X.dtype
    assert new.has_canonical_format
    assert (new.data > 0).all()


def test_totals_follow_the_size_factors_given(trained):
    totals = np.repeat([50.0, 2_000.0], 200)
    new = trained.generate(["T"] * 400, size_factors=totals, random_state=0)
    drawn = np.asarray(new.sum(axis=1)).ravel()
    assert drawn[:200].mean() == pytest.approx(50, rel=0.1)
    assert drawn[200:].mean() == pytest.approx(2_000, rel=0.1)


def test_generated_variance_matches_the_real_one():
    data = simulate({"a": 400, "b": 400}, n_genes=30, seed=3)
    model = CFGen(n_latent=8, max_epochs=(80, 120), random_state=0, device="cpu")
    new = model.fit(data.X, data.labels).generate(data.labels, random_state=0)
    for name in ("a", "b"):
        real = data.X[data.labels == name].toarray().var(axis=0)
        made = new[data.labels == name].toarray().var(axis=0)
        assert abs(np.median(np.log(made / real))) < 0.15


@pytest.mark.parametrize(
    ("given", "calls_per_evaluation"),
    [
        pytest.param({"labels": ["B"] * 3}, 1, id="label alone"),
        pytest.param({"covariates": {"donor": ["d1"] * 3}}, 1, id="donor alone"),
        pytest.param({"n_cells": 3}, 1, id="unconditional"),
        pytest.param({"labels": ["B"] * 3, "guidance": 2.0}, 2, id="stronger label"),
        pytest.param({"labels": ["B"] * 3, "guidance": {"label": 0.0}}, 1, id="label at zero"),
        pytest.param(
            {"labels": ["B"] * 3, "covariates": {"donor": ["d1"] * 3}}, 1, id="label and donor"
        ),
        pytest.param(
            {"labels": ["B"] * 3, "covariates": {"donor": ["d1"] * 3}, "guidance": 2.0},
            2,
            id="both stronger",
        ),
        pytest.param(
            {"labels": ["B"] * 3, "covariates": {"donor": ["d1"] * 3}, "guidance": {"label": 1.0}},
            3,
            id="composed by equation ten",
        ),
    ],
)
def test_any_subset_of_attributes_and_no_needless_network_call(
    trained, given, calls_per_evaluation
):
    calls = []
    handle = trained.network_.field.inlet.register_forward_hook(lambda *_: calls.append(1))
    new = trained.generate(**given, random_state=0)
    handle.remove()
    assert new.shape[0] == 3
    rehearsal = 5 * trained.n_steps  # its own steps, and four calls of rk4 for each
    assert len(calls) == calls_per_evaluation * (rehearsal + trained.n_steps)


def test_guidance_by_label_changes_what_is_generated(trained):
    wanted = ["NK"] * 100
    plain = trained.generate(wanted, random_state=0)
    left_out = trained.generate(wanted, guidance={"label": 0.0}, random_state=0)
    assert not same(plain, left_out)


def test_default_solver_agrees_with_dopri5_from_the_same_noise(trained):
    labels = np.repeat(trained.classes_, 100)
    codes = trained.attributes_.encode({"label": labels}, len(labels))
    cells = Wanted(codes, np.full((len(labels), 1), 200.0), np.arange(len(labels)) % 2 == 0)
    label_alone = trained.attributes_.terms(1.0, ["label"])
    velocity, noise = trained._start(cells, label_alone, torch.Generator().manual_seed(0))
    exact, default = (
        trained.network_.latents(noise, velocity, solver)
        for solver in (
            make_solver("dopri5", 1, None),
            trained._solver(cells, label_alone, np.random.default_rng(1)),
        )
    )
    assert (exact - default).square().mean().sqrt() < 0.05 * exact.std()
    assert default.std() == pytest.approx(exact.std().item(), rel=0.01)


# ------------------------------------------------------------------ small labels


def latents_drawn(model, label: str, n: int, **changed) -> np.ndarray:
    """Standardised latents of generated cells of a label."""
    model = copy.deepcopy(model)
    for name, value in changed.items():
        setattr(model, name, value)
    codes = model.attributes_.encode({"label": np.full(n, label)}, n)
    pooled = model._pooled(codes[:, 0], np.random.default_rng(0))
    cells = Wanted(codes, np.full((n, 1), 200.0), pooled)
    terms = model.attributes_.terms(1.0, ["label"])
    solver = model._solver(cells, terms, np.random.default_rng(1))
    velocity, noise = model._start(cells, terms, torch.Generator().manual_seed(2))
    return solver(velocity, noise).numpy()


def test_the_share_of_pooled_cells_falls_with_a_labels_size(trained):
    assert dict(zip(trained.classes_, trained.label_counts_, strict=True)) == {
        "B": 80,
        "NK": 12,
        "T": 58,
    }
    model = copy.deepcopy(trained)
    labels = np.repeat([0, 1, 2], 4_000)
    for pooling in (0.0, 60.0, 1e9):
        model.pooling = pooling
        drawn = model._pooled(labels, np.random.default_rng(0)).reshape(3, -1).mean(axis=1)
        expected = pooling / (np.array([80, 12, 58]) + pooling)
        np.testing.assert_allclose(drawn, expected, atol=0.03)


def test_a_label_of_few_cells_varies_as_cells_do(trained, cells):
    network = trained.network_
    real = (trained.encode(cells.X) - network.latent_mean.numpy()) / network.latent_scale.numpy()
    own = real[cells.labels == "NK"]
    new = latents_drawn(trained, "NK", 500)
    distance = np.linalg.norm(own - own.mean(axis=0), axis=1).mean()
    made = np.linalg.norm(new - own.mean(axis=0), axis=1).mean()
    assert made == pytest.approx(distance, rel=0.25)
    # New cells are not the twelve again: as far from the closest as those are from each other.
    closest = np.sort(np.linalg.norm(own[:, None] - own[None], axis=2), axis=1)[:, 1].mean()
    to_real = np.linalg.norm(new[:, None] - own[None], axis=2).min(axis=1).mean()
    assert to_real > 0.8 * closest


def test_temperature_scales_the_distance_to_the_centre(trained):
    spread = [
        latents_drawn(trained, "B", 400, temperature=t, pooling=1e9).std(axis=0).mean()
        for t in (0.0, 0.5, 1.0)
    ]
    assert spread[0] < 0.1 * spread[2]
    assert spread[1] == pytest.approx(0.5 * spread[2], rel=0.2)


def test_without_label_weight_there_is_no_classifier(cells):
    with_one, without = (
        CFGen(max_epochs=1, label_weight=weight, random_state=0, device="cpu").fit(
            cells.X, cells.labels
        )
        for weight in (0.005, 0.0)
    )
    assert any("label_head" in name for name in with_one.network_.state_dict())
    assert not any("label_head" in name for name in without.network_.state_dict())


def test_telling_labels_apart_draws_their_latents_apart(cells):
    def separation(weight: float) -> float:
        model = CFGen(
            n_latent=8, max_epochs=(60, 1), label_weight=weight, random_state=0, device="cpu"
        ).fit(cells.X, cells.labels)
        z = model.encode(cells.X)
        means = [z[cells.labels == label].mean(axis=0) for label in model.classes_]
        within = np.mean([z[cells.labels == label].var(axis=0).sum() for label in model.classes_])
        return float(np.var(means, axis=0).sum() / within)

    assert separation(0.1) > 1.2 * separation(0.0)


@pytest.mark.parametrize(("n_features", "expected"), [(10, 10), (1_300, 1_300), (5_200, 1_300)])
def test_features_that_tell_little_do_not_make_the_label_outweigh_the_cell(n_features, expected):
    model = Autoencoder(
        [make_likelihood("gaussian", n_features)], [n_features], 4, [(8,)], n_labels=3
    )
    torch.nn.init.zeros_(model.label_head.weight)
    torch.nn.init.zeros_(model.label_head.bias)
    x, labels = Minibatch((6, n_features), torch.ones(6, n_features), None), torch.arange(6) % 3
    with_label, alone = (
        model.loss([x], [None], labels, label_weight=weight).item() for weight in (1.0, 0.0)
    )
    beside_a_cell = (with_label - alone) * n_features / np.log(3)
    assert beside_a_cell == pytest.approx(expected, rel=1e-2)


# ------------------------------------------------------------- every size and likelihood


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [
        pytest.param({"a": 33, "b": 32}, 64, id="one cell over a batch"),
        pytest.param({"a": 9, "b": 8}, 16, id="n % batch_size == 1"),
        pytest.param({"a": 6, "b": 4}, 256, id="fewer cells than a batch"),
        pytest.param({"a": 30, "b": 2}, 8, id="two cells in a class"),
        pytest.param({"a": 30, "b": 1}, 8, id="one cell in a class"),
        pytest.param({"a": 1, "b": 1}, 2, id="two cells"),
    ],
)
def test_every_number_of_cells_works(sizes, batch_size):
    data = simulate(sizes, n_genes=12)
    model = fit_small(data, batch_size=batch_size)
    new = model.generate(["a", "b"], random_state=0)
    assert new.shape == (2, 12)
    assert np.isfinite(new.data).all()


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "bernoulli", "gaussian"])
def test_every_likelihood_trains_and_generates_its_kind_of_values(likelihood):
    data = simulate({"a": 40, "b": 20}, n_genes=10)
    X = data.X.toarray().astype(np.float64)
    X = (X > 1).astype(float) if likelihood == "bernoulli" else X
    X = X - 7.3 if likelihood == "gaussian" else X
    new = small(likelihood=likelihood, max_epochs=(60, 60)).fit(X, data.labels).generate(["a"] * 50)
    values = new.toarray() if sparse.issparse(new) else new
    assert sparse.issparse(new) == (likelihood != "gaussian")
    if likelihood == "bernoulli":
        assert set(np.unique(values)) <= {0.0, 1.0}
    mean = X[data.labels == "a"].mean(axis=0)
    scale = X.std(axis=0).max()
    assert np.abs(values.mean(axis=0) - mean).max() < 2 * scale


@pytest.mark.parametrize("size_factor", ["shared", "label", "donor"])
def test_depth_follows_the_groups_it_was_fitted_by(size_factor):
    data = simulate({"a": 120, "b": 120}, n_genes=20)
    deep = np.where(data.labels == "a", "deep", "shallow")
    X = data.X.toarray()
    X[deep == "deep"] *= 4
    model = small(size_factor=size_factor).fit(X, data.labels, covariates={"donor": deep})
    labels = np.repeat(["a", "b"], 300)
    donors = np.where(labels == "a", "deep", "shallow")
    new = model.generate(labels, covariates={"donor": donors}, random_state=0)
    totals = np.asarray(new.sum(axis=1)).ravel()
    ratio = totals[:300].mean() / totals[300:].mean()
    if size_factor == "shared":
        assert 0.7 < ratio < 1.4
    else:
        assert 3.0 < ratio < 5.0


def test_dispersion_per_label_and_gene():
    rng = np.random.default_rng(0)
    labels = np.repeat(["poisson", "bursty"], 400)
    shape = np.where(labels == "poisson", 200.0, 0.5)[:, None]
    X = rng.poisson(rng.gamma(shape, 10.0 / shape, (800, 24)))
    model = CFGen(
        dispersion="gene-label", n_latent=2, max_epochs=(30, 5), random_state=0, device="cpu"
    )
    model.fit(X, labels)
    log_theta = model.network_.autoencoder.likelihoods[0].log_theta.median(dim=1).values
    bursty, poisson = log_theta.tolist()  # classes_ are sorted
    assert bursty < np.log(2.0)
    assert poisson > np.log(8.0)
    with pytest.raises(ValueError, match=r"gene-label.*expected labels"):
        model.generate(n_cells=3)


def test_cells_without_any_count_are_accepted():
    data = simulate({"a": 30, "b": 20}, n_genes=10)
    X = data.X.toarray()
    X[:3] = 0
    new = small().fit(X, data.labels).generate(["a"] * 5)
    assert np.isfinite(new.data).all()


# ---------------------------------------------------------------------- determinism


def test_fit_twice_is_equal_and_sparse_equals_dense(cells):
    dense = small().fit(cells.X.toarray(), cells.labels).generate(cells.labels)
    for X in (cells.X, cells.X.tocsc(), sparse.csr_array(cells.X)):
        assert same(small().fit(X, cells.labels).generate(cells.labels), dense)


def test_another_seed_gives_other_cells(cells, trained):
    one, two = (trained.generate(cells.labels, random_state=seed) for seed in (1, 2))
    assert not same(one, two)
    assert same(one, trained.generate(cells.labels, random_state=1))


def test_no_global_random_state_is_read_or_changed(cells):
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_before = torch.get_rng_state()
    first = fit_small(cells).generate(cells.labels)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)
    with torch.random.fork_rng():
        torch.rand(17)
        assert same(fit_small(cells).generate(cells.labels), first)


def test_neither_input_nor_parameters_are_modified(cells):
    X, labels = cells.X.copy(), cells.labels.copy()
    model = small()
    parameters = copy.deepcopy(vars(model))
    model.fit(X, labels)
    assert same(X, cells.X)
    assert (labels == cells.labels).all()
    assert {name: getattr(model, name) for name in parameters} == parameters


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_generate_the_same(trained, copier):
    again = copier(trained)
    assert same(
        again.generate(["B"] * 9, random_state=3), trained.generate(["B"] * 9, random_state=3)
    )


def test_never_dense_as_a_whole(cells, monkeypatch):
    monkeypatch.setattr("cfgen_augment.stages._BLOCK_VALUES", 1)
    monkeypatch.setattr("cfgen_augment.stages._FEWEST_ROWS", 32)
    rows = []
    original = sparse.csr_matrix.toarray

    def watched(self, *arguments, **options):
        rows.append(self.shape[0])
        return original(self, *arguments, **options)

    monkeypatch.setattr(sparse.csr_matrix, "toarray", watched)
    fit_small(cells, batch_size=16).generate(cells.labels)
    assert 0 < max(rows) <= 32


def test_equal_models_hash_equal_so_that_a_pipeline_can_cache_them(trained):
    assert joblib.hash(trained) == joblib.hash(copy.deepcopy(trained))


@pytest.mark.parametrize(
    ("patience", "epochs", "expected"),
    [("auto", (28, 90), (5, 18)), ("auto", 7, (5, 5)), (3, (28, 90), (3, 3))],
)
def test_patience_leaves_room_to_stop_early(patience, epochs, expected):
    schedules = small(patience=patience, max_epochs=epochs)._schedules(n_rows=1_000)
    assert tuple(schedule.patience for schedule in schedules) == expected


@pytest.mark.parametrize(
    ("n_rows", "autoencoder", "flow"),
    [
        pytest.param(100, 100, 300, id="tiny"),  # a minibatch an epoch: enough of them
        pytest.param(1_000, 50, 100, id="small"),  # epochs: more would overfit
        pytest.param(6_400, 36, 48, id="usual"),  # minibatches
        pytest.param(128_000, 10, 20, id="large"),  # epochs: every cell is seen often enough
    ],
)
def test_automatic_epochs(n_rows, autoencoder, flow):
    schedules = CFGen()._schedules(n_rows)
    assert tuple(schedule.max_epochs for schedule in schedules) == (autoencoder, flow)


def test_features_with_a_large_offset_keep_their_spread():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.normal(1e4, 0.5, 300), rng.normal(0.0, 1.0, 300)])
    model = small(likelihood="gaussian", max_epochs=(60, 60)).fit(X, np.repeat(["a", "b"], 150))
    new = model.generate(np.repeat(["a", "b"], 150))
    assert new[:, 0].mean() == pytest.approx(1e4, abs=0.3)
    assert new[:, 0].std() == pytest.approx(0.5, rel=0.4)


def test_wide_sparse_data_never_take_the_memory_of_dense_ones():
    rng = np.random.default_rng(0)
    X = sparse.random(1_500, 20_000, density=0.01, format="csr", random_state=0)
    X.data = rng.poisson(1.0, X.nnz) + 1.0
    model = small(hidden=(4,), max_epochs=1, batch_size=64)
    tracemalloc.start()
    model.fit(X, np.repeat(["a", "b"], 750))
    model.generate(["a"] * 300)
    _, peak = tracemalloc.get_traced_memory()  # what NumPy and SciPy hold, not torch
    tracemalloc.stop()
    assert peak < 0.5 * 1_500 * 20_000 * 4


def test_rare_combinations_of_correlated_attributes_are_generated():
    # Type a comes almost always from d1 and b from d2; genes 0-2 follow the type, 3-5 the donor.
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b"], 1_000)
    common = np.where(labels == "a", "d1", "d2")
    donors = np.where(rng.random(1_000) < 0.1, np.where(common == "d1", "d2", "d1"), common)
    rate = np.full((1_000, 6), 20.0)
    rate[labels == "a", :2] = 80.0
    rate[donors == "d2", 5] = 80.0
    X = rng.poisson(rate)
    model = CFGen(n_latent=6, hidden=(64, 32), max_epochs=(80, 200), random_state=0, device="cpu")
    model.fit(X, labels, covariates={"donor": donors})
    new = model.generate(["a"] * 400, covariates={"donor": ["d2"] * 400}).toarray().mean(axis=0)
    real = X[(labels == "a") & (donors == "d2")].mean(axis=0)
    np.testing.assert_allclose(new / new.sum(), real / real.sum(), atol=0.06)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fitted_on_gpu_loads_on_cpu(cells, tmp_path):
    model = fit_small(cells, device="cuda")
    model.save(tmp_path / "model")
    loaded = CFGen.load(tmp_path / "model", device="cpu")
    assert loaded.device_.type == "cpu"
    assert loaded.generate(["B"] * 3, random_state=0).shape[0] == 3


# ------------------------------------------------------------------------ bad input

BAD_FITS = [
    pytest.param({"X": np.full((6, 3), np.nan)}, "Input contains NaN", id="nan"),
    pytest.param({"X": np.full((6, 3), np.inf)}, "Input contains infinity", id="inf"),
    pytest.param({"X": np.full((6, 3), -1.0)}, r"negative value -1", id="negative"),
    pytest.param({"X": np.full((6, 3), 1e10)}, "counts up to 2,147,483,647", id="huge"),
    pytest.param({"X": np.full((6, 3), 0.5)}, "looks log-normalised", id="fractions"),
    pytest.param({"X": np.zeros((0, 3))}, "at least 2 cell", id="no cells"),
    pytest.param({"X": np.zeros((6, 0))}, "at least one feature", id="no features"),
    pytest.param({"X": np.zeros(6)}, "two dimensions", id="one dimension"),
    pytest.param({"labels": ["a"] * 5}, "each of 6 cells; got 5", id="too few labels"),
    pytest.param({"labels": ["a", None] * 3}, "3 of 6 are missing", id="missing labels"),
    pytest.param({"labels": [0.0, np.nan] * 3}, "3 of 6 are missing", id="nan labels"),
    pytest.param({"covariates": {"donor": ["d"] * 5}}, "donor: .*got 5", id="too few donors"),
    pytest.param({"covariates": {"label": ["d"] * 6}}, "other than 'label'", id="reserved name"),
    pytest.param({"feature_names": ["g", "g", "h"]}, "duplicates of 'g'", id="duplicate genes"),
    pytest.param({"feature_names": ["g"]}, "feature_names: .*got 1", id="too few genes"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FITS)
def test_bad_data_are_refused_before_training(monkeypatch, change, message):
    monkeypatch.setattr(
        "cfgen_augment.model.train_autoencoder", lambda *_, **__: pytest.fail("trained")
    )
    given = {"X": np.ones((6, 3)), "labels": ["a", "b"] * 3, **change}
    with pytest.raises(ValueError, match=message):
        small().fit(given.pop("X"), given.pop("labels"), **given)


BAD_PARAMETERS = [
    ("likelihood", "normal"),
    ("dispersion", "cell"),
    ("size_factor", "plate"),
    ("n_latent", 0),
    ("hidden", ()),
    ("max_epochs", 0),
    ("max_epochs", (1, 2, 3)),
    ("max_epochs", "many"),
    ("batch_size", 1),
    ("learning_rate", -1.0),
    ("learning_rate", float("nan")),
    ("attribute_dropout", 1.0),
    ("validation_fraction", -0.1),
    ("patience", True),
    ("solver", "euler"),
    ("n_steps", 2.5),
    ("guidance", "strong"),
    ("device", "tpu"),
    ("device", "cuda:99"),
    ("random_state", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMETERS)
def test_bad_parameters_are_named(cells, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got"):
        fit_small(cells, **{name: value})


BAD_REQUESTS = [
    pytest.param({"labels": ["B", "platelet"]}, "got 'platelet'", id="unseen label"),
    pytest.param(
        {"labels": ["B"], "covariates": {"donor": ["d9"]}}, "donor: .*got 'd9'", id="unseen donor"
    ),
    pytest.param({"labels": ["B"], "covariates": {"sex": ["f"]}}, "got 'sex'", id="unknown name"),
    pytest.param({}, "got none of them", id="nothing"),
    pytest.param({"labels": ["B"], "n_cells": 2}, "expected equal lengths", id="lengths"),
    pytest.param({"labels": ["B"], "size_factors": [0.0]}, "positive totals", id="zero total"),
    pytest.param({"labels": ["B"], "size_factors": [1.0, 2.0]}, "1 positive totals", id="totals"),
    pytest.param(
        {"labels": ["B"], "guidance": {"sex": 1.0}}, "got \\['sex'\\]", id="guidance name"
    ),
    pytest.param({"labels": ["B"], "guidance": np.inf}, "finite numbers", id="guidance value"),
]


@pytest.mark.parametrize(("given", "message"), BAD_REQUESTS)
def test_bad_requests_are_refused(trained, given, message):
    with pytest.raises(ValueError, match=message):
        trained.generate(**given)


def test_not_fitted():
    with pytest.raises(RuntimeError, match="Call fit first"):
        small().generate(["a"])


def test_failed_refit_leaves_no_mixture(cells, monkeypatch):
    model = fit_small(cells)
    monkeypatch.setattr(
        "cfgen_augment.model.train_flow", lambda *_, **__: (_ for _ in ()).throw(MemoryError())
    )
    with pytest.raises(MemoryError):
        model.fit(cells.X, cells.labels)
    with pytest.raises(RuntimeError, match="Call fit first"):
        model.generate(["B"])


def test_counts_too_large_for_the_dtype_are_held_with_a_warning():
    data = simulate({"a": 30, "b": 30}, n_genes=5, depth=400)
    model = small().fit(np.minimum(data.X.toarray(), 255).astype(np.uint8), data.labels)
    with pytest.warns(UserWarning, match="larger than uint8 can hold"):
        new = model.generate(["a"] * 20, size_factors=[5_000.0] * 20)
    assert new.dtype == np.uint8
    assert new.max() == 255


def test_empty_request_gives_no_cells(trained):
    with warnings.catch_warnings():
        new = trained.generate([], random_state=0)
    assert new.shape == (0, trained.n_features_in_)


# ---------------------------------------------------------------------- real data


def test_encoder_sees_log_counts_and_latents_are_standardised(cells, trained):
    latents = encode_cells(trained.network_.autoencoder, [cells.X], torch.device("cpu"))
    scaled = (latents - trained.network_.latent_mean) / trained.network_.latent_scale
    assert torch.allclose(scaled.mean(dim=0), torch.zeros(8), atol=1e-4)
    assert torch.allclose(scaled.std(dim=0, correction=0), torch.ones(8), atol=1e-3)


def test_real_cells_come_back_real(real_data):
    import anndata

    adata = anndata.read_h5ad(real_data("kang_pbmc_ctrl_8donors.h5ad"))
    random = np.random.default_rng(0)
    rows = np.sort(random.choice(adata.n_obs, 1_500, replace=False))
    X, labels = adata.X[rows], adata.obs["cell_type"].astype(str).to_numpy()[rows]
    new = CFGen(random_state=0, max_epochs=(30, 60), device="cpu").fit(X, labels).generate(labels)
    for name in ("CD4 T cells", "CD14+ Monocytes"):
        real, made = X[labels == name].toarray(), new[labels == name].toarray()
        assert np.corrcoef(real.mean(axis=0), made.mean(axis=0))[0, 1] > 0.98
        assert abs((real == 0).mean() - (made == 0).mean()) < 0.02


# ------------------------------------------------------- latents of one's own


def test_latents_of_real_cells_decode_to_their_own_expression(trained, cells):
    model, X, labels = trained, cells.X, cells.labels
    latents = model.encode(X)
    assert latents.shape == (X.shape[0], model.n_latent)
    depth = np.asarray(X.sum(axis=1)).ravel()
    again = model.generate(labels, latents=latents, size_factors=depth, random_state=0)
    for name in np.unique(labels):
        real, new = (np.asarray(m[labels == name].mean(axis=0)).ravel() for m in (X, again))
        assert np.corrcoef(real, new)[0, 1] > 0.9


def test_given_latents_replace_the_flow_and_nothing_else(trained, cells):
    X, labels = cells.X, cells.labels
    a = trained.generate(labels, latents=trained.encode(X), guidance=1.0, random_state=3)
    b = trained.generate(labels, latents=trained.encode(X), guidance=2.0, random_state=3)
    assert (a != b).nnz == 0
    with pytest.raises(ValueError, match="expected finite values of shape"):
        trained.generate(labels, latents=np.zeros((len(labels), 3)))
    with pytest.raises(ValueError, match="features the model was fitted on"):
        trained.encode(X[:, :-1])


@pytest.mark.parametrize("solver", ["fitted", "midpoint"])
def test_cells_that_left_all_data_are_an_error(cells, solver):
    model = CFGen(max_epochs=1, solver=solver, random_state=0, device="cpu")
    model.fit(cells.X, cells.labels)
    with pytest.raises(ValueError, match=r"latents: expected finite values; .* lower them"):
        model.generate(["T"] * 5, guidance=1e30)
    with pytest.raises(ValueError, match=r"with 100 that are not finite"):
        model.generate(["T"] * 2, latents=np.full((2, model.n_latent), np.nan))


def test_other_byte_orders_are_read(cells):
    foreign = cells.X.toarray().astype(">i4")
    model = CFGen(max_epochs=1, random_state=0, device="cpu").fit(foreign, cells.labels)
    plain = CFGen(max_epochs=1, random_state=0, device="cpu").fit(
        foreign.astype(np.int32), cells.labels
    )
    new = model.generate(["T"] * 5)
    assert new.dtype == np.int32
    assert (new != plain.generate(["T"] * 5)).nnz == 0


def test_covariates_may_be_a_table(cells):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"donor": cells.donors})
    model = CFGen(max_epochs=1, random_state=0, device="cpu")
    model.fit(cells.X, cells.labels, covariates=table)
    assert model.generate(covariates=table[:7]).shape[0] == 7
    moved = model.translate(
        cells.X[:4], cells.labels[:4], covariates=table[:4], to=pandas.Series({"donor": "d1"})
    )
    assert moved.shape == (4, cells.X.shape[1])
    with pytest.raises(TypeError, match=r"covariates: expected names that are text; got \[1\]"):
        CFGen().fit(cells.X, cells.labels, covariates={1: cells.donors})


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"donr": 2.0}, r"expected attributes of the model .* got \['donr'\]"),
        ({"label": "x"}, "expected a number, or a mapping from attributes to numbers"),
    ],
)
def test_guidance_is_checked_before_training(cells, monkeypatch, guidance, message):
    monkeypatch.setattr(
        "cfgen_augment.model.train_autoencoder", lambda *_, **__: pytest.fail("trained")
    )
    with pytest.raises(ValueError, match=message):
        CFGen(guidance=guidance).fit(cells.X, cells.labels)


def test_the_dispersion_settles_in_as_many_steps_whatever_the_batch(cells, monkeypatch):
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: (steps.append(1), step(*a, **k)))
    for batch_size in (50, 128, 4096):
        steps.clear()
        model = CFGen(max_epochs=1, batch_size=batch_size, random_state=0, device="cpu")
        model.fit(cells.X, cells.labels)
        # AdamW is an Adam, too: a step or a few of either stage.
        assert 300 <= len(steps) <= 310
