"""How attributes compose: what is held out, what is measured, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from benchmarks.__main__ import main
from benchmarks.composition import dispersion as dispersions
from benchmarks.composition import guidance, parts, tables, transfer
from benchmarks.composition.depth import _thinned
from benchmarks.composition.space import Space, coverage, distances, log_profile
from benchmarks.composition.unseen import choose_combinations, unseen
from benchmarks.composition.world import World
from benchmarks.simulated import simulate
from cfgen_augment import CFGen, model

SMALL = {"cells_per_donor": 120, "n_donors": 4, "n_types": 3, "rarest": 0.3, "n_genes": 40}


@pytest.fixture
def quick(monkeypatch):
    """Trainings of one minibatch."""
    monkeypatch.setattr(model, "_AUTO_EPOCHS", ((1, 1, 1, 1), (1, 1, 1, 1)))


@pytest.fixture(scope="module")
def world() -> World:
    """Types of a donor with about forty cells each."""
    return World(*simulate(**{**SMALL, "cells_per_donor": 300}, donor_sd=0.5, interaction_sd=0.0))


# ------------------------------------------------------------- the simulation


def test_further_cells_follow_the_truth_even_where_none_were_simulated(world):
    truth = world.truth
    kept = world.without([("A1", "donor2")])
    rest = replace(truth, type_of=truth.type_of[kept], donor_of=truth.donor_of[kept])
    rest = replace(rest, size_factors=truth.size_factors[kept])
    more = rest.more("A1", "donor2", 4_000, seed=1)
    assert set(more.labels) == {"A1"}
    assert set(more.donors) == {"donor2"}
    shares = np.exp(truth.baseline + truth.programmes[0] + truth.donor_effects[1])
    made = np.asarray(more.counts.sum(axis=0)).ravel()
    np.testing.assert_allclose(made / made.sum(), shares / shares.sum(), rtol=0.2, atol=2e-4)
    assert (more.counts != rest.more("A1", "donor2", 4_000, seed=1).counts).nnz == 0


def test_donors_that_differ_in_depth_differ_in_nothing_else():
    (_, even), (_, uneven) = (simulate(**SMALL, donor_depth_sd=sd) for sd in (0.0, 0.5))
    ratio = uneven.size_factors / even.size_factors
    by_donor = [ratio[even.donor_of == d] for d in range(4)]
    assert all(np.ptp(own) < 1e-9 for own in by_donor)
    assert np.std([own[0] for own in by_donor]) > 0.1
    np.testing.assert_array_equal(even.type_of, uneven.type_of)
    np.testing.assert_array_equal(even.donor_effects, uneven.donor_effects)


# ------------------------------------------------------------------ measures


def test_shares_of_neighbours_tell_types_and_donors(world):
    space = Space(world.cells)
    labels, donors = world.cells.labels, world.donors
    own = space.shares(space.real, labels, donors, are_real=True)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    chance = space.shares(space.real, labels[shuffled], donors[shuffled], are_real=True)
    assert own["type"] > chance["type"] + 0.15
    assert own["donor"] > chance["donor"] + 0.1
    assert chance["donor"] == pytest.approx(0.25, abs=0.03)
    assert space.proportions_off(space.real, are_real=True) < 0.1
    assert space.proportions_off(space.real[labels == "A1"]) > 0.2
    # A real cell is its own nearest neighbour only where it may be.
    assert (space.neighbours(space.real)[:, 0] == np.arange(len(labels))).all()
    assert (space.neighbours(space.real, are_real=True) != np.arange(len(labels))[:, None]).all()


def test_coverage_falls_where_part_of_the_cells_is_missing():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 3)) + 6.0 * (np.arange(400) % 2)[:, None]
    new = rng.normal(size=(400, 3)) + 6.0 * (np.arange(400) % 2)[:, None]
    assert coverage(real, new) > 0.97
    assert coverage(real, new[::2]) == pytest.approx(0.5, abs=0.03)
    assert np.isnan(distances(real[:10], new)["W2"])
    assert distances(real, new[::2])["W2"] > 3 * distances(real, new)["W2"]


def test_log_profiles_do_not_depend_on_depth():
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0.0, 1.0, 50)
    shallow, deep = (
        sparse.csr_matrix(rng.poisson(depth * rate, (4_000, 50)).astype(np.float32))
        for depth in (1.0, 5.0)
    )
    np.testing.assert_allclose(log_profile(shallow), log_profile(deep), atol=0.1)


def test_thinned_cells_expect_the_totals_asked_for_and_only_lose():
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(5.0, (300, 40)).astype(np.float32))
    wanted = np.where(np.arange(300) < 150, 50.0, 1e6)
    thinned = _thinned(counts, wanted, rng)
    assert ((counts - thinned).toarray() >= 0).all()
    assert thinned[:150].sum(axis=1).mean() == pytest.approx(50, rel=0.05)
    assert (thinned[150:] != counts[150:]).nnz == 0


# ------------------------------------------------------------------- unseen


def test_combinations_differ_in_type_and_donor_and_are_not_trained_on(world, monkeypatch, quick):
    chosen = choose_combinations(world, np.random.default_rng([0, 1]))
    assert len(chosen) == len({name for name, _ in chosen}) == len({d for _, d in chosen}) == 3
    assert all((~world.without([one])).sum() >= 60 for one in chosen)
    seen = []
    fit = CFGen.fit

    def recorded(self, X, labels, *, covariates):
        seen.append((labels, covariates["donor"]))
        return fit(self, X, labels, covariates=covariates)

    monkeypatch.setattr(CFGen, "fit", recorded)
    rows = pd.DataFrame(unseen(world, seed=0))
    ((labels, donors),) = seen
    trained = set(zip(labels.tolist(), donors.tolist(), strict=True))
    assert trained.isdisjoint(chosen)
    assert len(trained) == 9
    assert set(rows["combination"]) == {f"{name}, {donor}" for name, donor in chosen}
    # Fresh draws of the truth make all of the donor's difference; other donors' cells none of it.
    mean = rows.groupby("way")[["corr", "slope", "W2"]].mean()
    assert mean.loc["real", "corr"] > 0.9
    assert mean.loc["real", "slope"] == pytest.approx(1.0, abs=0.15)
    assert abs(mean.loc["other donors' cells", "slope"]) < 0.25
    assert mean["W2"].idxmin() == "real"
    # What the donor does to other types is, in this simulation, what it does to the type.
    assert mean.loc["additive", "corr"] > 0.8
    assert np.isnan(mean.loc["additive", "W2"])


def test_an_unseen_combination_is_composed(world, monkeypatch):
    monkeypatch.setattr(model, "_AUTO_EPOCHS", ((500, 5, 60, 5), (800, 5, 100, 5)))
    rows = pd.DataFrame(unseen(world, seed=0)).groupby("way")[["corr", "W2"]].mean()
    for way in ("together", "Eq. 10, weights 1, 1", "other donors' cells, translated"):
        assert rows.loc[way, "corr"] > 0.5
        for baseline in ("type only", "other donors' cells", "NB of other donors"):
            assert rows.loc[way, "corr"] > rows.loc[baseline, "corr"] + 0.3
            assert rows.loc[way, "W2"] < rows.loc[baseline, "W2"]


# --------------------------------------------------------------- dispersion


def test_structures_find_what_the_dispersion_depends_on():
    rng = np.random.default_rng(0)
    theta = np.array([[0.3, 3.0, 30.0], [30.0, 3.0, 0.3]])
    labels = np.repeat(["a", "b"], 4_000)
    x = stats.nbinom.rvs(theta, theta / (theta + 4.0), size=(4_000, 2, 3), random_state=rng)
    grid = np.exp(dispersions._GRID)[:, None, None]
    profile = stats.nbinom.logpmf(x[:, None], grid, grid / (grid + 4.0)).sum(axis=0)
    cells = simulate(**SMALL)[0]
    cells = replace(cells.take(np.zeros(8_000, dtype=int)), labels=labels)
    found = dispersions._structures(profile, cells, np.array(["a", "b"]))
    reached = {
        name: np.take_along_axis(profile, where[None], axis=0).sum()
        for name, where in found.items()
    }
    tried = np.exp(dispersions._GRID)[found["per gene and label"]]
    assert (np.abs(np.log(tried / theta)) < 1.0).all()
    assert reached["per gene and label"] == max(reached.values())
    assert reached["per gene"] > reached["one for all"] > reached["none (Poisson)"]


def test_held_out_likelihood_is_that_of_unseen_molecules_of_unseen_donors(world, quick):
    rows = pd.DataFrame(dispersions.dispersion(world, seed=0, n_splits=2))
    cells = rows.set_index(["fitted by", "dispersion"])["cells"]
    assert np.isfinite(cells).all()
    assert cells["likelihood", "per gene"] > cells["likelihood", "none (Poisson)"]
    # Of the same model, what the likelihood chose is no worse than the moments.
    assert cells["likelihood", "per gene"] > cells["CFGen", "per gene"] - 0.5


# ------------------------------------------------------------------- tables


def test_spread_is_over_seeds_and_wins_are_counted_by_combination():
    ways = ["real", "type only", "together"]
    per = pd.DataFrame(
        {"variant": "real", "seed": s, "combination": c, "way": way, "W2": w2, "corr": corr}
        | {"MMD": 0.0, "slope": 1.0, "type": np.nan, "donor": 0.5}
        for s in (0, 1)
        for c in ("T, d1", "B, d2")
        for way, w2, corr in zip(ways, (1.0, 5.0, 4.0 if s else 6.0), (0.9, 0.0, 0.4), strict=True)
    )
    ((title, made),) = tables._unseen(per)
    assert title == "Unseen combinations (4)"
    assert made.index.tolist() == ways
    assert made.loc["together", "better than type only"] == "W2 2, corr 4"
    assert made.loc["together", "W2"] == "5.00 ± 1.15"
    assert made.loc["real", "type"] == ""


# -------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, world):
    """The command on a file as a user would have it, and where its results go."""
    path = tmp_path / "small.h5ad"
    cells = world.cells
    anndata.AnnData(
        cells.counts,
        obs=pd.DataFrame(
            {"cell_type": cells.labels, "donor": cells.donors},
            index=[f"cell{i}" for i in range(len(cells))],
        ),
        var=pd.DataFrame(index=cells.genes),
    ).write_h5ad(path)
    work = ["--jobs", "1", "--splits", "2", "--out", str(tmp_path / "out")]
    return ["composition", "--data", str(path), *work], tmp_path / "out"


def test_command_measures_writes_and_goes_on(command, quick, capsys, monkeypatch):
    arguments, out = command
    monkeypatch.setattr(guidance, "WEIGHTS", ((0.0, 0.0), (1.0, 1.0), 2.0))
    monkeypatch.setattr(transfer, "_PAIRS", 1)
    assert main([*arguments, "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 parts to do" in printed
    for row in ("| real |", "| 0, 0 |", "| together 2 |", "| type only |", "| translated |"):
        assert row in printed
    assert "| CFGen | per gene and label |" in printed
    assert (out / "tables.md").read_text().strip() in printed
    weights = pd.read_csv(out / "guidance.csv")
    assert weights["weights"].tolist() == ["real", "0, 0", "1, 1", "together 2"]
    assert set(pd.read_csv(out / "totals.csv")["size_factor"]) == {"label", "donor"}

    stamps = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    page = out.parent / "page.md"
    page.write_text(
        "Before\n\n<!-- table: small guidance -->\nold\n<!-- end: small guidance -->\n\nAfter\n"
    )
    told = ["--seeds", "2", "--parts", "unseen", "--docs", str(page)]
    assert main([*arguments, *told]) == 0
    assert "1 of 2 parts to do" in capsys.readouterr().out
    start, _, rest = page.read_text().partition("<!-- end: small guidance -->\n\nAfter\n")
    assert start.startswith("Before\n\n<!-- table: small guidance -->\n### small: Guidance weights")
    assert "| together 2 |" in start
    assert "old" not in start
    assert rest.count("<!-- table: small ") == 5  # what the page had no place for is added below
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert json.loads((out / "manifest.json").read_text())["composition"]["data"] == "small.h5ad"

    # Results of other settings are neither mixed with these nor taken for them.
    arguments[arguments.index("--splits") + 1] = "3"
    assert main([*arguments, "--seeds", "1"]) == 2
    assert "differ in n_splits" in capsys.readouterr().err


def test_a_part_that_fails_is_told_and_tried_again(command, quick, capsys, monkeypatch):
    arguments, out = command

    def broken(*_):
        raise FloatingPointError("training diverged")

    with monkeypatch.context() as patched:
        patched.setattr(parts, "unseen", broken)
        assert main([*arguments, "--seeds", "1", "--parts", "unseen"]) == 1
    assert "real unseen seed 0: FloatingPointError: training diverged" in capsys.readouterr().out
    assert main([*arguments, "--seeds", "1", "--parts", "unseen"]) == 0
    assert "1 of 1 parts to do" in capsys.readouterr().out
    assert (out / "unseen.csv").exists()


def test_cells_without_donors_are_refused(tmp_path, capsys):
    assert main(["composition", "--data", "demo", "--out", str(tmp_path / "out")]) == 2
    assert "expected cells of several donors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
