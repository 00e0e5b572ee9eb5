"""`CFGen.translate`: cells keep what they are and take on what the wanted covariate does."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from cfgen_augment import CFGen
from cfgen_augment.measures import log_normalise


def composition(X) -> np.ndarray:
    """Share of every gene in all counts of some cells."""
    total = np.asarray(X.sum(axis=0), dtype=float).ravel()
    return total / total.sum()


@pytest.fixture(scope="module")
def donor_data():
    """Genes 0-3 follow the type, 4-7 the donor, and gene 8 and 9 a state that only the cell has."""
    rng = np.random.default_rng(0)
    labels, donors = rng.choice(["a", "b"], 1_200), rng.choice(["d1", "d2", "d3"], 1_200)
    state = rng.random(1_200) < 0.5
    rate = np.full((1_200, 12), 20.0)
    rate[labels == "a", :2] = 80.0
    rate[labels == "b", 2:4] = 80.0
    rate[donors == "d1", 4:6] = 80.0
    rate[donors == "d2", 6:8] = 80.0
    rate[state, 8] = 80.0
    rate[~state, 9] = 80.0
    return rng.poisson(rate), labels, donors, state


@pytest.fixture(scope="module")
def donor_model(donor_data) -> CFGen:
    X, labels, donors, _ = donor_data
    model = CFGen(n_latent=6, hidden=(64, 32), max_epochs=(60, 120), random_state=0, device="cpu")
    return model.fit(X, labels, covariates={"donor": donors})


@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "no labels"])
def test_cells_take_on_the_donor_and_keep_type_and_state(donor_data, donor_model, with_labels):
    X, labels, donors, state = donor_data
    rows = np.flatnonzero(donors == "d1")
    moved = donor_model.translate(
        X[rows],
        labels[rows] if with_labels else None,
        covariates={"donor": donors[rows]},
        to={"donor": "d2"},
    )
    for label in ("a", "b"):
        is_label = labels[rows] == label
        there = composition(X[(donors == "d2") & (labels == label)])
        here = composition(X[rows][is_label])
        got = composition(moved[is_label])
        assert np.abs(got - there).max() < 0.25 * np.abs(here - there).max()
    counts = moved.toarray()
    kept = (counts[:, 8] > counts[:, 9]) == state[rows]
    assert kept.mean() > 0.85  # half by chance
    # Molecules are drawn anew, to each cell's own total.
    totals = counts.sum(axis=1) / X[rows].sum(axis=1)
    assert totals.mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("guidance", [1.0, 1.5, {"label": 1.0, "donor": 1.0}, 0.0])
def test_carried_to_what_they_are_cells_stay(donor_data, donor_model, guidance, monkeypatch):
    X, labels, donors, _ = donor_data
    seen = {}
    monkeypatch.setattr(donor_model, "generate", lambda *_, **given: seen.update(given))
    given = {"covariates": {"donor": donors}, "guidance": guidance}
    before = donor_model.encode(X)
    donor_model.translate(X, labels, **given, to={"donor": donors})
    np.testing.assert_allclose(seen["latents"], before, atol=0.01 * before.std())
    donor_model.translate(X, labels, **given, to={"donor": "d3"})
    moved = np.abs(seen["latents"] - before).max(axis=1)
    if guidance == 0.0:  # attributes left out of the flow
        assert moved.max() < 0.01 * before.std()
    else:
        assert np.median(moved[donors != "d3"]) > 0.2 * before.std()
        assert moved[donors == "d3"].max() < 0.01 * before.std()


def test_same_seed_same_cells_and_sparse_equals_dense(cells, trained):
    rows = cells.donors != "d2"
    given = {"covariates": {"donor": cells.donors[rows]}, "to": {"donor": "d2"}}
    X, labels = cells.X[rows], cells.labels[rows]
    moved = [
        trained.translate(matrix, labels, **given, random_state=seed)
        for matrix, seed in ((X, 0), (X.toarray(), 0), (X, 1))
    ]
    assert moved[0].dtype == cells.X.dtype
    assert (moved[0] != moved[1]).nnz == 0
    assert (moved[0] != moved[2]).nnz > 0


def test_totals_follow_those_given(cells, trained):
    wanted = np.full(150, 1_000.0)
    moved = trained.translate(
        cells.X,
        cells.labels,
        covariates={"donor": cells.donors},
        to={"donor": "d1"},
        size_factors=wanted,
    )
    assert moved.sum(axis=1).mean() == pytest.approx(1_000, rel=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"to": {}}, r"to: expected one or more of the covariates.*'donor'", id="none"),
        pytest.param({"to": {"batch": "b"}}, r"got \['batch'\]", id="not told what they are"),
        pytest.param({"to": {"label": "B"}}, r"got \['label'\]", id="label"),
        pytest.param({"to": {"donor": "d9"}}, "seen in training .*got 'd9'", id="unseen donor"),
        pytest.param({"to": {"donor": ["d1", "d2"]}}, "expected equal lengths", id="length"),
        pytest.param({"covariates": {"batch": ["b"] * 150}}, "got 'batch'", id="unknown covariate"),
        pytest.param({"guidance": {"sex": 1.0}}, r"got \['sex'\]", id="guidance"),
        pytest.param({"size_factors": [1.0]}, "150 positive totals", id="size factors"),
        pytest.param({"X": np.ones((150, 3))}, "40 features the model was fitted on", id="genes"),
    ],
)
def test_bad_requests_are_refused(cells, trained, given, message):
    request = {
        "X": cells.X,
        "labels": cells.labels,
        "covariates": {"donor": cells.donors},
        "to": {"donor": "d1"},
    }
    with pytest.raises(ValueError, match=message):
        trained.translate(**request | given)


def test_not_fitted(cells):
    with pytest.raises(RuntimeError, match="expected a fitted model"):
        CFGen().translate(cells.X, covariates={"donor": cells.donors}, to={"donor": "d1"})


def test_real_cells_keep_their_type_and_move_to_the_donor(real_data):
    import anndata

    adata = anndata.read_h5ad(real_data("kang_pbmc_ctrl_8donors.h5ad"))
    labels, donors = (adata.obs[key].astype(str).to_numpy() for key in ("cell_type", "donor"))
    source, target = "patient_1015", "patient_1488"
    rows = np.flatnonzero(
        np.isin(donors, [source, target])
        & np.isin(labels, ["CD4 T cells", "CD14+ Monocytes", "B cells"])
    )
    rows = np.random.default_rng(0).permutation(rows)[:1_500]
    X, labels, donors = adata.X[rows], labels[rows], donors[rows]
    model = CFGen(random_state=0, max_epochs=(30, 60), device="cpu")
    model.fit(X, labels, covariates={"donor": donors})
    logs = log_normalise(X)
    space = PCA(30, svd_solver="arpack", random_state=0).fit(logs)
    search = NearestNeighbors(n_neighbors=10).fit(space.transform(logs))

    moved = donors == source
    given = {"covariates": {"donor": donors[moved]}}

    def shares(to: str) -> tuple[float, float]:
        new = model.translate(X[moved], labels[moved], **given, to={"donor": to})
        near = search.kneighbors(space.transform(log_normalise(new)), return_distance=False)
        of_type = (labels[near] == labels[moved][:, None]).mean()
        return float(of_type), float((donors[near] == target).mean())

    (type_here, target_here), (type_there, target_there) = shares(source), shares(target)
    assert type_here > 0.9
    assert type_there > 0.9
    assert target_there > target_here + 0.07


def test_other_noise_models_translate_too(cells):
    X = cells.X.toarray() - 7.3
    model = CFGen(likelihood="gaussian", n_latent=4, max_epochs=5, random_state=0, device="cpu")
    model.fit(X, cells.labels, covariates={"donor": cells.donors})
    moved = model.translate(X, cells.labels, covariates={"donor": cells.donors}, to={"donor": "d3"})
    assert isinstance(moved, np.ndarray)
    assert moved.shape == X.shape
