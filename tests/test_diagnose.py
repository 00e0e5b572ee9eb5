"""Real cells pass, and each way to be wrong is named by the column that is about it."""

from __future__ import annotations

import math
import re

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import simulate
from scipy import sparse

from cfgen_augment import diagnose
from cfgen_augment.diagnosis import LIMITS, MIN_CELLS, TOO_FEW
from cfgen_augment.measures import exact_copies, nearest, separability, wasserstein
from cfgen_augment.pairs import paired

SIZES = {"B": 240, "T": 160, "NK": 110}
QUICK = {"label_key": "cell_type", "max_cells": 60}


def as_adata(X, labels):
    obs = pd.DataFrame({"cell_type": labels}, index=[f"cell{i}" for i in range(len(labels))])
    made = anndata.AnnData(sparse.csr_matrix(X, dtype=np.float32), obs=obs)
    made.var_names = [f"gene{i}" for i in range(made.n_vars)]
    return made


@pytest.fixture(scope="module")
def halves():
    """Two samples of the same simulated types."""
    cells = simulate(SIZES, n_genes=60)
    first = np.random.default_rng(1).random(len(cells.labels)) < 0.5
    return tuple(as_adata(cells.X[rows], cells.labels[rows]) for rows in (first, ~first))


def changed(adata, change):
    """The same cells with their dense counts changed."""
    made = adata.copy()
    made.X = sparse.csr_matrix(change(adata.X.toarray()).astype(np.float32))
    return made


# ----------------------------------------------------------------- verdicts


def test_real_cells_are_ok_and_at_their_floors(halves):
    table = diagnose(*halves, "cell_type")
    assert table["verdict"].to_dict() == dict.fromkeys(["NK", "T", "B"], "ok")
    assert table.index.name == "type"
    assert table["n_real"].is_monotonic_increasing
    sizes = [a.obs["cell_type"].value_counts() for a in halves]
    assert (table["n_real"] == sizes[0][table.index]).all()
    assert (table["n_synthetic"] == sizes[1][table.index]).all()
    expected = np.minimum(table["n_real"] // 2, table["n_synthetic"])
    assert (table["n_compared"] == expected).all()
    np.testing.assert_allclose(table["w2"], table["w2_floor"], rtol=0.1)
    np.testing.assert_allclose(table[["auc", "auc_floor"]], 0.5, atol=0.2)
    np.testing.assert_allclose(table["closest_ratio"], 1.0, atol=0.06)


def independent(counts, seed=0):
    """Every gene shuffled among the cells: no gene knows of another, means and zeros are kept."""
    return np.random.default_rng(seed).permuted(counts, axis=0)


WRONG = {
    "mean_corr": lambda X: X[:, ::-1],
    "zeros_diff": lambda X: np.random.default_rng(0).binomial(X.astype(int), 0.5),
    "slope_diff": lambda X: X * 4 * (np.random.default_rng(0).random(X.shape) < 0.25),
    "w2": lambda X: X[:, ::-1],
    "auc": lambda X: X + (np.arange(X.shape[1]) < 20),
}


@pytest.mark.parametrize("column", WRONG)
def test_what_is_wrong_is_named(halves, column):
    table = diagnose(halves[0], changed(halves[1], WRONG[column]), "cell_type")
    assert column in table.loc["B", "verdict"].split(", ")
    assert (table["verdict"] != "ok").all()


def test_genes_that_do_not_know_of_each_other_are_told_apart():
    """Means, zeros, slopes and depth alike, gene by gene; only how genes go together differs."""
    rng = np.random.default_rng(0)
    program = rng.normal(size=(2, 60))

    def draw(n):
        rate = np.exp(rng.normal(size=(n, 2)) @ program * 0.5 + 0.5)
        return rng.poisson(rate)

    real, other, third = (as_adata(draw(300), ["T"] * 300) for _ in range(3))
    assert diagnose(real, other, "cell_type")["verdict"].tolist() == ["ok"]
    table = diagnose(real, changed(third, independent), "cell_type")
    assert "auc" in table.loc["T", "verdict"]
    assert abs(table.loc["T", "zeros_diff"]) < 0.02
    assert "mean_corr" not in table.loc["T", "verdict"]


def test_copies_are_found_exact_and_near(halves):
    real = halves[0]
    table = diagnose(real, real.copy(), "cell_type")
    assert (table["exact_copies"] == 1).all()
    assert (table["near_copies"] == 1).all()
    np.testing.assert_allclose(table["closest_ratio"], 0, atol=1e-5)
    assert (table["verdict"] == "closest_ratio, near_copies").all()

    def one_more(X):
        X[:, 0] += 1
        return X

    table = diagnose(real, changed(real, one_more), "cell_type")
    assert (table["exact_copies"] == 0).all()
    assert (table["near_copies"] > 0.9).all()


def test_copies_of_some_cells_among_new_ones_are_found(halves):
    """A fifth of the generated cells: no median notices."""
    real, other = (a[(a.obs["cell_type"] == "B").to_numpy()] for a in halves)
    mixed = anndata.concat([other[:80], real[:20]], index_unique="-")
    table = diagnose(real, mixed, "cell_type")
    assert table.loc["B", "exact_copies"] == pytest.approx(0.2)
    assert table.loc["B", "closest_ratio"] > 0.9
    assert table.loc["B", "verdict"] == "near_copies"


def test_small_types_are_not_judged_but_for_copies(halves):
    real, other = halves

    def few(adata, n_rare):
        rare = np.flatnonzero(adata.obs["cell_type"] == "NK")[:n_rare]
        rest = np.flatnonzero(adata.obs["cell_type"] == "T")
        return adata[np.sort(np.concatenate([rare, rest]))]

    table = diagnose(few(real, 2 * MIN_CELLS - 1), few(other, 30), "cell_type")
    assert table.loc["NK", "verdict"] == TOO_FEW
    assert table.loc["NK", ["w2", "auc", "mean_corr", "slope_diff"]].isna().all()
    assert table.loc["NK", ["zeros_diff", "closest_ratio"]].notna().all()
    assert table.loc["T", "verdict"] == "ok"
    assert diagnose(few(real, 40), few(other, 20), "cell_type").loc["NK", "verdict"] == "ok"
    copied = diagnose(few(real, 12), few(real, 12), "cell_type").loc["NK"]
    assert copied["verdict"] == f"closest_ratio, near_copies, {TOO_FEW}"
    one = diagnose(few(real, 1), few(real, 12), "cell_type").loc["NK"]
    assert (one["verdict"], one["exact_copies"]) == (TOO_FEW, pytest.approx(1 / 12))


def test_types_of_one_side_only(halves):
    real, other = halves
    table = diagnose(
        real[real.obs["cell_type"] != "NK"], other[other.obs["cell_type"] != "T"], "cell_type"
    )
    assert table.loc[["NK", "T"], "verdict"].tolist() == [TOO_FEW, TOO_FEW]
    assert table.loc["NK", "n_real"] == 0
    assert table.loc["T", "n_synthetic"] == 0
    assert table.loc["B", "verdict"] == "ok"


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_cells_that_are_all_alike_are_wrong_and_break_nothing(halves, fill):
    table = diagnose(halves[0], changed(halves[1], lambda X: np.full_like(X, fill)), "cell_type")
    assert all(
        {"mean_corr", "slope_diff", "auc"} <= set(verdict.split(", "))
        for verdict in table["verdict"]
    )
    alike = changed(halves[0], lambda X: np.full_like(X, fill))
    table = diagnose(alike, alike, "cell_type")
    assert (table["w2"] == 0).all()
    assert (table["exact_copies"] == 1).all()


def test_one_gene():
    X = np.random.default_rng(0).poisson(5.0, (100, 1))
    table = diagnose(as_adata(X, ["T"] * 100), as_adata(X[::-1], ["T"] * 100), "cell_type")
    assert table.loc["T", "auc"] == pytest.approx(0.5, abs=0.1)


def test_limits_are_those_the_documentation_states():
    rows = re.findall(r"``(\w+)``  .*``([.\d]+) \+ ([.\d]+) (.+)``$", diagnose.__doc__, re.M)
    stated = {name: (float(a), float(b), noise) for name, a, b, noise in rows}
    noise = {"1 - mean_corr_floor": "(1 - mean_corr_floor)"}
    noise |= {f"1 / sqrt({n})": f"/ sqrt({n})" for n in "mn"}
    made = {k: (*limit[:2], noise.get(limit.noise, limit.noise)) for k, limit in LIMITS.items()}
    assert stated == made


def test_real_data_halves_are_ok_and_independent_genes_are_not(real_data):
    adata = anndata.read_h5ad(real_data("kang_pbmc_ctrl_8donors.h5ad"))
    adata.X = adata.X.tocsr()
    first = np.random.default_rng(0).random(adata.n_obs) < 0.5
    real, other = adata[first].copy(), adata[~first].copy()
    options = {"label_key": "cell_type", "max_cells": 200}
    assert (diagnose(real, other, **options)["verdict"] == "ok").all()
    types = other.obs["cell_type"].to_numpy()
    dense = other.X.toarray()
    for name in np.unique(types):
        dense[types == name] = independent(dense[types == name])
    other.X = sparse.csr_matrix(dense)
    independent_genes = diagnose(real, other, "cell_type", max_cells=500)
    assert independent_genes["verdict"].str.contains("auc").all()
    assert diagnose(real, real, **options)["verdict"].str.contains("near_copies").all()


# ----------------------------------------------------------------- what goes in


@pytest.fixture(scope="module")
def augmented(halves):
    """As `augment` returns it: real cells first, marked."""
    made = anndata.concat(halves, index_unique="-")
    made.obs["is_synthetic"] = np.repeat([False, True], [a.n_obs for a in halves])
    made.uns["cfgen_augment"] = {"key_added": "is_synthetic"}
    return made


def test_augmented_data_are_split_by_their_mark(halves, augmented):
    expected = diagnose(*halves, **QUICK)
    pd.testing.assert_frame_equal(diagnose(augmented, **QUICK), expected)
    # Given as generated cells, the real ones among them are left out; as real, the generated.
    pd.testing.assert_frame_equal(diagnose(halves[0], augmented, **QUICK), expected)
    pd.testing.assert_frame_equal(diagnose(augmented, halves[1], **QUICK), expected)


def test_the_mark_s_name_comes_from_the_provenance_or_the_caller(halves, augmented):
    renamed = augmented.copy()
    renamed.obs["new"] = renamed.obs.pop("is_synthetic")
    expected = diagnose(*halves, **QUICK)
    renamed.uns["cfgen_augment"] = {"key_added": "new"}
    pd.testing.assert_frame_equal(diagnose(renamed, **QUICK), expected)
    del renamed.uns["cfgen_augment"]
    with pytest.raises(KeyError, match="a column 'is_synthetic' of obs that marks them"):
        diagnose(renamed, **QUICK)
    found = diagnose(renamed, **QUICK, key_added="new")
    pd.testing.assert_frame_equal(found, expected)


def test_containers_and_layers_give_the_same(halves, tmp_path):
    expected = diagnose(*halves, **QUICK)
    dense = [changed(a, lambda X: X) for a in halves]
    for made in dense:
        made.X = made.X.toarray()
    pd.testing.assert_frame_equal(diagnose(*dense, **QUICK), expected)
    for made, source in zip(dense, halves, strict=True):
        made.layers["counts"] = source.X.tocsc()
        made.X = np.log1p(made.X)
    pd.testing.assert_frame_equal(diagnose(*dense, **QUICK, layer="counts"), expected)
    backed = []
    for i, source in enumerate(halves):
        source.write_h5ad(tmp_path / f"{i}.h5ad")
        backed.append(anndata.read_h5ad(tmp_path / f"{i}.h5ad", backed="r"))
    pd.testing.assert_frame_equal(diagnose(*backed, **QUICK), expected)
    for adata in backed:
        adata.file.close()


def test_backed_cells_are_read_in_small_parts(halves, tmp_path, monkeypatch):
    """Never more than a block beside the sample, however the wanted rows lie."""
    from cfgen_augment import stored

    real, other = halves
    real.write_h5ad(tmp_path / "real.h5ad")
    backed = anndata.read_h5ad(tmp_path / "real.h5ad", backed="r")
    monkeypatch.setattr(stored, "_BUFFER_VALUES", 1000)
    read, largest = stored.StoredCells.read, []

    def counted(self, start, stop):
        largest.append(self.indptr[stop] - self.indptr[start])
        return read(self, start, stop)

    monkeypatch.setattr(stored.StoredCells, "read", counted)
    found = diagnose(backed, other, **QUICK)
    assert max(largest) < 2000 < real.X.nnz
    pd.testing.assert_frame_equal(found, diagnose(real, other, **QUICK))
    backed.file.close()


def test_nothing_given_is_changed_and_sparse_stays_sparse(halves, monkeypatch):
    before = [a.X.copy() for a in halves]
    most = []
    toarray = sparse.csr_matrix.toarray
    monkeypatch.setattr(
        sparse.csr_matrix,
        "toarray",
        lambda self, *a: (most.append(self.shape[0]), toarray(self))[1],
    )
    diagnose(*halves, "cell_type", max_cells=MIN_CELLS * 2)
    assert max(most) <= MIN_CELLS * 2
    for adata, X in zip(halves, before, strict=True):
        assert (adata.X != X).nnz == 0
        assert list(adata.obs) == ["cell_type"]


def test_the_cap_and_the_seed(halves):
    table = diagnose(*halves, "cell_type", max_cells=50, random_state=3)
    assert (table["n_compared"] == 25).all()
    assert (table["n_real"] > 50).all()
    again = diagnose(*halves, "cell_type", max_cells=50, random_state=3)
    pd.testing.assert_frame_equal(table, again)
    other = diagnose(*halves, "cell_type", max_cells=50, random_state=4)
    assert (table["w2"] != other["w2"]).all()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    diagnose(*halves, "cell_type", random_state=None, max_cells=50)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_types_may_be_numbers(halves):
    made = [a.copy() for a in halves]
    for a in made:
        a.obs["cluster"] = a.obs["cell_type"].map({"B": 10, "T": 9, "NK": 2}).astype(int)
    assert diagnose(*made, "cluster", max_cells=40).index.tolist() == [2, 9, 10]
    made[1].obs["cluster"] = made[1].obs["cluster"].astype(str)
    with pytest.raises(TypeError, match=r"one kind in real and synthetic; got int and str"):
        diagnose(*made, "cluster")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda r, s: (r.X, s, "cell_type"), TypeError, "real: expected AnnData; got csr_matrix"),
        (lambda r, s: (r, "cell_type"), TypeError, "synthetic: expected AnnData; got str.*label_k"),
        (lambda r, s: (r, s), TypeError, "label_key: expected the column of obs"),
        (
            lambda r, s: (r, s, "celltype"),
            KeyError,
            r"columns? of obs \(cell_type\); got 'celltype'",
        ),
        (lambda r, s: (r, None, "cell_type"), KeyError, "'is_synthetic' of obs that marks them"),
        (lambda r, s: (r, s[:, ::-1], "cell_type"), ValueError, "the same in another order"),
        (lambda r, s: (r, s[:, :5], "cell_type"), ValueError, "got others"),
        (lambda r, s: (r, s[:0], "cell_type"), ValueError, "at least one synthetic cell; got none"),
        (lambda r, s: (r, marked(s, False), "cell_type"), ValueError, "is False for all"),
        (lambda r, s: (r, marked(s, "yes"), "cell_type"), ValueError, "expected true for generate"),
        (
            lambda r, s: (r, changed(s, np.log1p), "cell_type"),
            ValueError,
            "synthetic cells: expected raw counts.*This looks log-normalised",
        ),
        (lambda r, s: (missing(r), s, "cell_type"), ValueError, r"real: obs\['cell_type'\].*1 of"),
    ],
)
def test_what_cannot_be_compared_is_refused(halves, change, error, match):
    with pytest.raises(error, match=match):
        diagnose(*change(*halves))


def marked(adata, value):
    made = adata.copy()
    made.obs["is_synthetic"] = value
    return made


def missing(adata):
    made = adata.copy()
    made.obs["cell_type"] = made.obs["cell_type"].astype(object)
    made.obs.iloc[0, 0] = None
    return made


@pytest.mark.parametrize("max_cells", [2 * MIN_CELLS - 1, 100.0, None])
def test_a_cap_too_low_is_refused(halves, max_cells):
    with pytest.raises(ValueError, match="max_cells: expected a whole number of at least 40"):
        diagnose(*halves, "cell_type", max_cells=max_cells)


# ----------------------------------------------------------------- measures


def test_separability_of_gaussians_is_its_closed_form():
    """The best classifier of N(0, 1) and N(d, 1) has an area of Phi(d / sqrt(2))."""
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (1500, 1)), rng.normal(1, 1, (1500, 1))
    assert separability(a, b, seed=0) == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.02)
    assert separability(a, rng.normal(0, 1, (1500, 1)), seed=0) == pytest.approx(0.5, abs=0.03)


def test_separability_sees_spreads():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (800, 2)), rng.normal(0, 3, (800, 2))
    assert separability(a, b, seed=0) > 0.85


def test_wasserstein_is_pot_s_and_wants_samples_of_one_size():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)), rng.normal(1, 2, size=(40, 3))
    with pytest.raises(ValueError, match="one size; got 40 and 39 cells"):
        wasserstein(a, b[:-1])
    import ot

    uniform = np.full(40, 1 / 40)
    cost = ((a[:, None] - b) ** 2).sum(axis=2)
    assert wasserstein(a, b) == pytest.approx(math.sqrt(ot.emd2(uniform, uniform, cost)))


def test_nearest_and_copies_of_rows_that_repeat():
    X = sparse.csr_matrix(np.array([[3.0, 0], [3, 0], [0, 4], [9, 9]]))
    np.testing.assert_allclose(
        nearest(X.toarray(), X)[:, 1], [0, 0, 5, math.hypot(9, 5)], atol=1e-6
    )
    assert exact_copies(X[2:], X) == 0.5


# ----------------------------------------------------------------- pairs


def test_matched_pairs_are_as_many_and_the_same_in_every_call(halves):
    pairs = paired(halves[0], halves[1][:100], "cell_type", random_state=1)
    for (label, real, new), (_, again, _) in zip(pairs.matched(30), pairs.matched(30), strict=True):
        wanted = min(pairs.real.number(label), pairs.synthetic.number(label), 30)
        assert real.shape[0] == new.shape[0] == wanted
        assert (real != again).nnz == 0


def test_pairs_without_a_type_in_common(halves):
    real, other = (a[a.obs["cell_type"] == t] for a, t in zip(halves, ("B", "T"), strict=True))
    with pytest.raises(ValueError, match=r"real cells are 'B', those of synthetic ones 'T'"):
        list(paired(real, other, "cell_type").matched(10))
