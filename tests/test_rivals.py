"""The arms that the benchmark holds against CFGen: what they add, drawn from what, by which law."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from conftest import simulate
from imblearn.over_sampling import SMOTE
from scipy import optimize, sparse, stats

from benchmarks.cells import Cells, New, Training, log_normalise
from benchmarks.rivals import cfgen, oversampling
from cfgen_augment import CFGen, CFGenSampler, model

N_GENES = 40
ADDING = [
    oversampling.random_oversampling,
    oversampling.smote_log,
    oversampling.smote_counts,
    oversampling.negative_binomial,
    oversampling.mixup,
    oversampling.loras,
]
ADDING_NOTHING = [oversampling.none, oversampling.reweight]
CFGEN = [
    cfgen.cfgen,
    cfgen.autoencoder_resampled,
    cfgen.autoencoder_interpolated,
    cfgen.autoencoder_shrunk,
]
TINY = {"one": 1, "two": 2, "three": 3}


def as_cells(X, labels, donors=None, first: int = 0) -> Cells:
    """Cells whose embedding says which cell it is."""
    n_cells, n_genes = X.shape
    return Cells(
        sparse.csr_matrix(X, dtype=np.float32),
        np.asarray(labels),
        np.array([f"gene{i}" for i in range(n_genes)]),
        donors,
        {"which": np.arange(first, first + n_cells)[:, None]},
    )


def make(sizes, to_add, pool=None, seed=0, n_genes=N_GENES, depth=200.0) -> Training:
    """The training side of simulated cells; `pool` says how many unused ones of each type."""
    together = {name: n + (pool or {}).get(name, 0) for name, n in sizes.items()}
    drawn = simulate(together, n_genes=n_genes, depth=depth)
    cells = as_cells(drawn.X, drawn.labels, drawn.donors)
    order = np.arange(len(cells))
    kept = np.concatenate([order[cells.labels == name][:n] for name, n in sizes.items()])
    rest = np.setdiff1d(order, kept)
    return Training(cells.take(np.sort(kept)), cells.take(rest), to_add, seed)


def quick(**parameters) -> CFGen:
    """A model that trains in no time."""
    small = {"n_latent": 4, "hidden": (64,), "flow_width": 16, "n_steps": 2}
    return CFGen(**(small | {"max_epochs": 2, "device": "cpu"} | parameters))


def run(arm, training: Training) -> New:
    return arm(training, cfgen.fit(training, quick())) if arm in CFGEN else arm(training)


def rows_of(training: Training, name: str, *, logged: bool = False) -> np.ndarray:
    counts = training.cells.counts[training.cells.labels == name]
    return (log_normalise(counts) if logged else counts).toarray().astype(np.float64)


def close_to(estimates, expected, errors) -> bool:
    """Whether all lie within six standard errors."""
    return bool((np.abs(estimates - expected) <= 6 * errors + 1e-12).all())


# ------------------------------------------------------------------ every arm


@pytest.mark.parametrize("arm", [*ADDING, *CFGEN])
def test_arm_adds_what_was_asked_for(arm):
    training = make({"B": 60, "NK": 9, "T": 30} | TINY, {"T": 5, "NK": 31, "B": 0, **TINY})
    new = run(arm, training)
    assert isinstance(new.values, sparse.csr_matrix)
    assert new.values.dtype == np.float32
    assert new.values.shape == (42, N_GENES)
    assert new.labels.dtype.kind == "U"
    sizes = dict(zip(*np.unique(new.labels, return_counts=True), strict=True))
    assert sizes == {"T": 5, "NK": 31, **TINY}
    assert np.isfinite(new.values.data).all()
    assert (new.values.data > 0).all()  # no zero is stored
    assert new.weights is None
    whole = bool((new.values.data == np.rint(new.values.data)).all())
    assert new.logged is not whole
    # Aligned: a type's new cells look more like its own mean than like the other type's.
    own, other = (rows_of(training, name, logged=new.logged).mean(axis=0) for name in ("NK", "T"))
    mean = np.asarray(new.values[new.labels == "NK"].mean(axis=0)).ravel()
    if arm not in CFGEN:  # these have hardly been trained here
        assert np.corrcoef(mean, own)[0, 1] > np.corrcoef(mean, other)[0, 1]


@pytest.mark.parametrize("arm", [*ADDING, *ADDING_NOTHING, oversampling.oracle, *CFGEN])
def test_seed_decides_and_global_states_are_left_alone(arm):
    sizes, to_add = {"B": 30, "NK": 8}, {"NK": 12, "B": 3}
    before, torch_before = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    first = run(arm, make(sizes, to_add, {"NK": 40, "B": 5}))
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    again = run(arm, make(sizes, to_add, {"NK": 40, "B": 5}))
    np.random.set_state(before)  # noqa: NPY002
    torch.set_rng_state(torch_before)
    other = run(arm, make(sizes, to_add, {"NK": 40, "B": 5}, seed=1))
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (first.values != again.values).nnz == 0
    assert np.array_equal(first.labels, again.labels)
    if arm not in ADDING_NOTHING:
        assert (first.values != other.values).nnz > 0


@pytest.mark.parametrize("arm", [*ADDING, *ADDING_NOTHING, oversampling.oracle, *CFGEN])
def test_nothing_wanted_nothing_added(arm):
    new = run(arm, make({"B": 12, "NK": 8}, {"B": 0}))
    assert new.values.shape == (0, N_GENES)
    assert len(new.labels) == 0


@pytest.mark.parametrize("arm", [*ADDING, oversampling.reweight])
@pytest.mark.parametrize("to_add", [{"X": 3}, {"B": -1}], ids=["unknown", "negative"])
def test_impossible_wishes_are_refused(arm, to_add):
    with pytest.raises(ValueError, match="to_add: expected no negative numbers"):
        arm(make({"B": 12, "NK": 8}, to_add))


@pytest.mark.parametrize("arm", [oversampling.negative_binomial, oversampling.mixup])
def test_counts_are_drawn_without_the_dense_matrix(arm):
    n_genes, n_new = 500, 20_000
    training = make({"B": 50, "T": 50}, {"B": n_new // 2, "T": n_new // 2}, None, 0, n_genes, 60.0)
    oversampling.none(training)
    tracemalloc.start()
    new = arm(training)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert new.values.shape == (n_new, n_genes)
    stored = new.values.data.nbytes + new.values.indices.nbytes
    dense = n_new * n_genes * 8
    assert stored < dense / 4  # the data are sparse enough for the test to mean something
    assert peak < dense / 2


# ------------------------------------------------------------------ nothing added


def test_reweight_gives_each_type_its_enlarged_size():
    sizes, to_add = {"B": 60, "NK": 9, "T": 30, "one": 1}, {"NK": 21, "T": 15, "one": 7}
    training = make(sizes, to_add)
    new = oversampling.reweight(training)
    assert len(new) == 0
    for name, n in sizes.items():
        weights = new.weights[training.cells.labels == name]
        assert weights.sum() == pytest.approx(n + to_add.get(name, 0))
        assert np.ptp(weights) == 0


def test_none_has_no_weights():
    new = oversampling.none(make({"B": 12, "NK": 8}, {"NK": 4}))
    assert len(new) == 0
    assert new.weights is None


# ------------------------------------------------------------------ real cells


def test_random_oversampling_copies_rows_and_their_embeddings():
    training = make({"B": 30, "NK": 6, "one": 1}, {"NK": 50, "one": 4})
    new = oversampling.random_oversampling(training)
    places = {which: row for row, which in enumerate(training.cells.obsm["which"].ravel())}
    source = training.cells.take([places[which] for which in new.obsm["which"].ravel()])
    assert (new.values != source.counts).nnz == 0
    assert np.array_equal(new.labels, source.labels)
    assert len(np.unique(new.obsm["which"])) == 7  # each of the six, and the one


def test_oracle_adds_unused_cells_and_no_more_than_there_are():
    pool = {"B": 10, "NK": 25, "T": 4}
    training = make({"B": 30, "NK": 6, "T": 9, "one": 1}, {"NK": 20, "T": 7, "one": 5}, pool)
    new = oversampling.oracle(training)
    which = new.obsm["which"].ravel()
    assert dict(zip(*np.unique(new.labels, return_counts=True), strict=True)) == {"NK": 20, "T": 4}
    assert len(np.unique(which)) == len(which)
    assert not np.isin(which, training.cells.obsm["which"]).any()
    places = {key: row for row, key in enumerate(training.pool.obsm["which"].ravel())}
    source = training.pool.take([places[key] for key in which])
    assert (new.values != source.counts).nnz == 0
    assert np.array_equal(new.labels, source.labels)


@pytest.mark.parametrize(("pool", "available"), [({"B": 5}, False), ({"B": 5, "NK": 1}, True)])
def test_oracle_is_available_where_wanted_types_have_unused_cells(pool, available):
    training = make({"B": 30, "NK": 6}, {"NK": 20}, pool)
    assert oversampling.oracle_available(training) is available
    assert len(oversampling.oracle(training)) == available


# ------------------------------------------------------------------ interpolation


def test_smote_is_that_of_imbalanced_learn_on_all_cells():
    training = make({"B": 60, "NK": 12}, {"NK": 25})
    values = log_normalise(training.cells.counts)
    seed = int(np.random.default_rng(training.seed).integers(2**32))
    trusted = SMOTE(sampling_strategy={"NK": 37}, random_state=seed)
    expected = trusted.fit_resample(values, training.cells.labels)[0][72:]
    np.testing.assert_allclose(
        oversampling.smote_log(training).values.toarray(), expected.toarray(), rtol=1e-5
    )


@pytest.mark.parametrize("n_cells", [2, 3, 4, 12])
def test_smote_lies_between_two_cells_of_the_type(n_cells):
    training = make({"B": 60, "NK": n_cells}, {"NK": 20})
    real = rows_of(training, "NK", logged=True)
    first, second = np.triu_indices(n_cells, 1)
    direction = real[second] - real[first]
    for cell in oversampling.smote_log(training).values.toarray():
        share = ((cell - real[first]) * direction).sum(axis=1) / (direction**2).sum(axis=1)
        off = cell - real[first] - np.clip(share, 0, 1)[:, None] * direction
        assert np.abs(off).max(axis=1).min() < 1e-5


def test_smote_on_counts_rounds():
    training = make({"B": 60, "NK": 12}, {"NK": 25})
    seed = int(np.random.default_rng(training.seed).integers(2**32))
    trusted = SMOTE(sampling_strategy={"NK": 37}, random_state=seed)
    counts = training.cells.counts.astype(np.float64)
    expected = trusted.fit_resample(counts, training.cells.labels)[0][72:].toarray()
    off = np.abs(oversampling.smote_counts(training).values.toarray() - expected)
    assert off.max() <= 0.5 + 1e-5


@pytest.mark.parametrize("n_cells", [1, 3, 7, 20])
def test_loras_combines_cells_of_the_type(n_cells):
    training = make({"B": 60, "NK": n_cells}, {"NK": 15})
    real = rows_of(training, "NK", logged=True)
    hull = np.vstack([real.T, np.full(n_cells, 1e3)])  # weights are held to a sum of one
    new = oversampling.loras(training).values.toarray().astype(np.float64)
    assert np.array_equal(new.any(axis=0), real.any(axis=0))
    off = [optimize.nnls(hull, np.append(cell, 1e3))[1] for cell in new]
    assert max(off) < 6 * oversampling._LORAS_SIGMA  # its length has 40 genes of a fifth of it


def test_loras_stays_within_a_neighbourhood():
    rng = np.random.default_rng(0)
    counts = np.zeros((30, 20), dtype=int)
    counts[:15, :10] = rng.poisson(30.0, (15, 10))
    counts[15:, 10:] = rng.poisson(30.0, (15, 10))
    cells = as_cells(counts, np.repeat("NK", 30))
    new = oversampling.loras(Training(cells, cells.take([]), {"NK": 45}, 0)).values.toarray()
    sides = np.stack([new[:, :10].any(axis=1), new[:, 10:].any(axis=1)])
    assert (sides.sum(axis=0) == 1).all()  # k = 8 of the 15 on the same side
    assert 15 <= sides[0].sum() <= 30  # all cells take turns


def test_loras_noise_is_that_of_combined_shadow_samples():
    n_genes, n_new = 25, 4_000
    cells = as_cells(np.tile(np.arange(1, n_genes + 1), (10, 1)), np.repeat("NK", 10))
    new = oversampling.loras(Training(cells, cells.take([]), {"NK": n_new}, 0))
    noise = new.values.toarray() - log_normalise(cells.counts[:1]).toarray()
    # Sum of squared weights: of each draw, and of two draws of one shadow sample.
    own = (1 + (99**2 - 1) / 12 / 50**2) / n_genes
    shared = (1 - own) / (8 * np.ceil(2 * n_genes / 8))
    expected = oversampling._LORAS_SIGMA * np.sqrt(own + shared)
    assert noise.std() == pytest.approx(expected, rel=0.02)
    assert abs(noise.mean()) < 6 * expected / np.sqrt(noise.size)


# ------------------------------------------------------------------ count models


def test_negative_binomial_has_the_moments_of_the_type():
    n_new = 40_000
    training = make({"B": 60, "NK": 15}, {"NK": n_new})
    real = rows_of(training, "NK")
    real_mean, real_variance = real.mean(axis=0), real.var(axis=0, ddof=1)
    new = oversampling.negative_binomial(training).values.toarray().astype(np.float64)
    dispersed = real_variance > real_mean
    assert dispersed.any()
    assert (~dispersed & (real_mean > 0)).any()
    laws = [
        stats.nbinom(m**2 / (v - m), m / v) if d else stats.poisson(m)
        for m, v, d in zip(real_mean, real_variance, dispersed, strict=True)
    ]
    mean, variance, kurtosis = np.nan_to_num([law.stats("mvk") for law in laws]).T
    np.testing.assert_allclose(mean, real_mean)
    np.testing.assert_allclose(variance[dispersed], real_variance[dispersed])
    assert close_to(new.mean(axis=0), mean, np.sqrt(variance / n_new))
    assert close_to(new.var(axis=0), variance, variance * np.sqrt((kurtosis + 2) / n_new))
    gene = int(np.argmin(np.where(dispersed, np.abs(real_mean - 2), np.inf)))
    k = np.arange(6)
    expected = laws[gene].pmf(k)
    share = (new[:, gene, None] == k).mean(axis=0)
    assert close_to(share, expected, np.sqrt(expected * (1 - expected) / n_new))
    correlation = np.corrcoef(new[:, real_mean > 0.5].T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.05  # genes are independent


def test_negative_binomial_of_one_cell_is_poisson():
    n_new = 20_000
    training = make({"B": 60, "one": 1}, {"one": n_new})
    mean = rows_of(training, "one")[0]
    new = oversampling.negative_binomial(training).values.toarray().astype(np.float64)
    assert not new[:, mean == 0].any()
    kurtosis = np.divide(1.0, mean, out=np.zeros_like(mean), where=mean > 0)
    assert close_to(new.mean(axis=0), mean, np.sqrt(mean / n_new))
    assert close_to(new.var(axis=0), mean, mean * np.sqrt((kurtosis + 2) / n_new))


@pytest.mark.parametrize("n_cells", [1, 2, 3, 15])
def test_mixup_has_the_moments_of_halved_pairs(n_cells):
    n_new = 40_000
    training = make({"B": 60, "NK": n_cells}, {"NK": n_new})
    real = rows_of(training, "NK")
    new = oversampling.mixup(training).values.toarray().astype(np.float64)
    mean, variance = real.mean(axis=0), real.var(axis=0)
    expected = mean / 2 + (variance * (n_cells - 2) / (n_cells - 1) / 2 if n_cells > 1 else 0)
    kurtosis = np.nan_to_num(stats.kurtosis(new[:, mean > 0], axis=0))
    assert not new[:, mean == 0].any()
    assert close_to(new.mean(axis=0), mean, np.sqrt(expected / n_new))
    spread = expected[mean > 0]
    assert close_to(new[:, mean > 0].var(axis=0), spread, spread * np.sqrt((kurtosis + 2) / n_new))


def test_mixup_never_holds_more_molecules_than_a_pair():
    training = make({"B": 60, "two": 2}, {"two": 200})
    most = rows_of(training, "two").sum(axis=0)
    new = oversampling.mixup(training).values.toarray()
    assert (new <= most).all()
    assert (new > rows_of(training, "two").max(axis=0)).any()


# ------------------------------------------------------------------ CFGen


def test_cfgen_is_the_sampler_at_its_defaults(monkeypatch):
    monkeypatch.setattr(model, "_AUTO_EPOCHS", ((2, 1, 2, 1), (2, 1, 2, 1)))
    sizes, to_add = {"B": 40, "NK": 8, "T": 20}, {"NK": 30, "T": 10}
    training = make(sizes, to_add, seed=3)
    totals = {name: n + to_add.get(name, 0) for name, n in sizes.items()}
    sampler = CFGenSampler(sampling_strategy=totals, random_state=training.seed)
    X, y = sampler.fit_resample(training.cells.counts, training.cells.labels)
    new = cfgen.cfgen(training, cfgen.fit(training))
    assert (new.values != X[len(training.cells) :]).nnz == 0
    assert np.array_equal(new.labels, y[len(training.cells) :])


def test_cfgen_with_donors_is_the_sampler_given_donors():
    training = make({"B": 40, "NK": 8, "T": 20}, {"NK": 30, "T": 10})
    counts, labels, donors = training.cells.counts, training.cells.labels, training.cells.donors
    sampler = CFGenSampler(
        {"B": 40, "NK": 38, "T": 30}, generator=quick(), random_state=training.seed
    )
    X, _ = sampler.fit_resample(counts, labels, donor=donors)
    fitted = cfgen.fit_with_donors(training, quick())
    assert fitted.attributes_.names == ["label", "donor"]
    assert (cfgen.cfgen(training, fitted).values != X[len(labels) :]).nnz == 0
    assert len(cfgen.autoencoder_resampled(training, fitted)) == 40


def test_cfgen_with_donors_needs_donors():
    drawn = simulate({"B": 12, "NK": 8})
    cells = as_cells(drawn.X, drawn.labels)
    with pytest.raises(ValueError, match="expected donors"):
        cfgen.fit_with_donors(Training(cells, cells.take([]), {"NK": 4}, 0), quick())


@pytest.fixture(scope="module")
def shared() -> tuple[Training, CFGen]:
    """A training side with a type of one cell, and a model that knows the types apart."""
    training = make({"B": 80, "NK": 12, "T": 58, "one": 1}, {"NK": 1_000, "T": 40, "one": 5})
    network = {"n_latent": 8, "hidden": (512, 256), "dispersion": "gene-label"}
    template = quick(max_epochs=(60, 2), **network)
    return training, cfgen.fit(training, template)


@pytest.fixture
def drawn(shared, monkeypatch):
    """What the arms hand to the decoder: latents, log totals and groups of all new cells."""
    handed: list[tuple] = []
    draw = shared[1].network_.draw

    def spy(latents, log_size, groups, generator):
        handed.append((latents, log_size[:, 0], groups))
        return draw(latents, log_size, groups, generator)

    monkeypatch.setattr(shared[1].network_, "draw", spy)

    def collect(arm):
        handed.clear()
        new = arm(*shared)
        return new, *(torch.cat(parts).numpy() for parts in zip(*handed, strict=True))

    return collect


@pytest.fixture
def encoded(shared) -> dict[str, np.ndarray]:
    """Latents of the training cells of each type."""
    training, fitted = shared
    with torch.inference_mode():
        return {
            name: fitted.network_.autoencoder.encode(
                [torch.from_numpy(rows_of(training, name).astype(np.float32))]
            ).numpy()
            for name in training.to_add
        }


def distance_to(points: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Largest coordinate's distance from each latent to the nearest of `points`."""
    return np.abs(latents[:, None] - points[None]).max(axis=2).min(axis=1)


@pytest.mark.parametrize("arm", CFGEN[1:])
def test_only_the_latent_differs_from_cfgen(arm, drawn, shared):
    classes = shared[1].classes_
    generated, latents, log_size, groups = drawn(cfgen.cfgen)
    new, other_latents, other_log_size, other_groups = drawn(arm)
    assert np.array_equal(generated.labels, new.labels)
    assert np.array_equal(log_size, other_log_size)
    assert np.array_equal(groups, other_groups)
    assert np.array_equal(classes[groups], new.labels)
    assert np.abs(latents - other_latents).max() > 0.1
    assert np.array_equal(new.labels, np.repeat(["NK", "T", "one"], [1_000, 40, 5]))


def test_resampled_latents_are_those_of_real_cells(drawn, encoded):
    new, latents, *_ = drawn(cfgen.autoencoder_resampled)
    for name, real in encoded.items():
        chosen = latents[new.labels == name]
        assert distance_to(real, chosen).max() < 1e-4
    assert distance_to(latents[new.labels == "NK"], encoded["NK"]).max() < 1e-4  # all are used


def test_interpolated_latents_lie_between_two_real_ones(drawn, encoded):
    new, latents, *_ = drawn(cfgen.autoencoder_interpolated)
    assert distance_to(encoded["one"], latents[new.labels == "one"]).max() < 1e-4
    for name in ("NK", "T"):
        real = encoded[name].astype(np.float64)
        first, second = np.triu_indices(len(real), 1)
        direction = real[second] - real[first]
        shares = []
        for z in latents[new.labels == name]:
            share = ((z - real[first]) * direction).sum(axis=1) / (direction**2).sum(axis=1)
            off = np.abs(z - real[first] - share[:, None] * direction).max(axis=1)
            assert off.min() < 1e-4
            shares.append(share[off.argmin()])
        error = np.sqrt((1 / 80 - 1 / 144) / len(shares))  # of the uniform's second moment
        assert close_to(np.mean((np.array(shares) - 0.5) ** 2), 1 / 12, error)


def test_shrunk_latents_are_half_way_to_the_mean(drawn, encoded):
    new, latents, *_ = drawn(cfgen.autoencoder_shrunk)
    for name, real in encoded.items():
        half_way = (real + real.mean(axis=0)) / 2
        assert distance_to(half_way, latents[new.labels == name]).max() < 1e-4


@pytest.mark.parametrize("arm", CFGEN[1:])
def test_decoded_cells_look_like_their_type(arm, shared):
    training, fitted = shared
    new = arm(training, fitted)
    mean = np.asarray(new.values[new.labels == "NK"].mean(axis=0)).ravel()
    match = {
        name: np.corrcoef(mean, rows_of(training, name).mean(axis=0))[0, 1]
        for name in ("B", "NK", "T")
    }
    assert match["NK"] > 0.95
    assert match["NK"] > max(match["B"], match["T"]) + 0.3
