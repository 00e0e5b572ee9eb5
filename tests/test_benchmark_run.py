"""The benchmark as a whole: nothing leaks, nothing finished is lost, nothing fails silently."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.arms import ARMS, choose
from benchmarks.cells import Cells, New, log_normalise, nothing
from benchmarks.embedders import ObsmEmbedder, PCAEmbedder, make_embedder
from benchmarks.evaluation import evaluate, prepare
from benchmarks.results import Part
from benchmarks.rivals import oversampling
from benchmarks.run import arm_seed, plan
from benchmarks.settings import Settings
from benchmarks.splits import make_splits


def donor_cells(seed=0, n_donors=6, per_donor=60, n_genes=40):
    """Three types with markers of their own, in every donor."""
    random = np.random.default_rng(seed)
    labels = np.array(["common"] * 35 + ["middle"] * 17 + ["rare"] * 8)
    rates = np.full((60, n_genes), 1.0)
    for i, name in enumerate(["common", "middle", "rare"]):
        rates[labels == name, 5 * i : 5 * i + 5] = 5.0
    counts = np.concatenate([random.poisson(rates) for _ in range(n_donors)])
    return Cells(
        sparse.csr_matrix(counts.astype(np.float32)),
        np.tile(labels, n_donors),
        np.array([f"g{i}" for i in range(n_genes)]),
        donors=np.repeat([f"donor{i}" for i in range(n_donors)], per_donor),
    )


SETTINGS = Settings(data="made here", n_splits=2, n_genes=30)


def split_of(cells, settings=SETTINGS):
    return make_splits(
        cells,
        n_splits=settings.n_splits,
        held_out_fraction=settings.held_out,
        thin=dict(settings.thin),
        reserve=settings.reserve,
        seed=settings.seed,
    )[0]


# ------------------------------------------------------------------ leakage


def test_nothing_of_held_out_donors_reaches_training(tmp_path):
    cells = donor_cells()
    split = split_of(cells)
    # The most variable gene of all, but only in donors that are held out.
    planted = cells.counts.toarray()
    planted[split.train, 39] = 0
    planted[split.pool, 39] = 0
    planted[split.test, 39] = np.arange(len(split.test)) * 50
    before = replace(cells, counts=sparse.csr_matrix(planted))
    planted[split.test] = np.random.default_rng(1).poisson(30, (len(split.test), 40))
    after = replace(cells, counts=sparse.csr_matrix(planted.astype(np.float32)))
    a, b = (prepare(data, split, SETTINGS, tmp_path) for data in (before, after))
    assert "g39" not in a.training.cells.genes
    assert a.training.cells.genes.tolist() == b.training.cells.genes.tolist()
    assert a.training.to_add == b.training.to_add
    np.testing.assert_array_equal(a.places["pca"][0], b.places["pca"][0])
    for arm in ("ros", "smote-log", "nb", "mixup", "loras"):
        made = [ARMS[arm].make(p.training_with(3)) for p in (a, b)]
        assert (made[0].values != made[1].values).nnz == 0, arm
    # The test would be blind if held-out cells were not embedded differently.
    assert not np.array_equal(a.places["pca"][1], b.places["pca"][1])


def test_thinning_and_reserve_leave_the_held_out_donors_whole():
    cells = donor_cells()
    thinned = split_of(cells, replace(SETTINGS, thin=(("rare", 6),)))
    assert thinned.test.tolist() == split_of(cells).test.tolist()
    assert cells.take(thinned.train).sizes()["rare"] == 6
    assert set(cells.donors[thinned.pool]).isdisjoint(thinned.held_out)


def test_synthetic_cells_are_never_shown_to_an_embedder(tmp_path):
    prepared = prepare(donor_cells(), split_of(donor_cells()), SETTINGS, tmp_path)
    pca = prepared.embedders["pca"]._pca
    components, mean = pca.components_.copy(), pca.mean_.copy()
    evaluate(prepared, oversampling.negative_binomial(prepared.training_with(0)), SETTINGS)
    np.testing.assert_array_equal(components, pca.components_)
    np.testing.assert_array_equal(mean, pca.mean_)


# --------------------------------------------------------------- evaluation


def test_pca_is_that_of_the_dense_matrix():
    cells = donor_cells()
    places = PCAEmbedder(cells, 5).real(cells)
    dense = log_normalise(cells.counts).toarray().astype(np.float64)
    centred = dense - dense.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(places), np.abs(u[:, :5] * s[:5]), atol=1e-3)


def test_log_normalise_is_the_formula():
    counts = donor_cells().counts
    dense = counts.toarray()
    expected = np.log1p(1e4 * dense / dense.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_normalise(counts).toarray(), expected, rtol=1e-5)


def test_an_arm_that_adds_nothing_is_scored_on_real_cells_alone(tmp_path):
    prepared = prepare(donor_cells(), split_of(donor_cells()), SETTINGS, tmp_path)
    tables = evaluate(prepared, nothing(30), SETTINGS)
    assert tables["realism"].empty
    assert tables["memorisation"].empty
    scores = tables["scores"]
    assert set(scores["classifier"]) == {"knn5", "knn10", "knn30", "lr"}
    assert set(scores["embedder"]) == {"pca", "genes"}
    assert (scores["n_added"] == 0).all()
    assert scores.loc[scores["type"] == "common", "f1"].min() > 0.7


def test_weights_change_the_classifiers(tmp_path):
    prepared = prepare(donor_cells(), split_of(donor_cells()), SETTINGS, tmp_path)
    plain = evaluate(prepared, nothing(30), SETTINGS)["scores"]
    weighed = evaluate(prepared, oversampling.reweight(prepared.training_with(0)), SETTINGS)
    assert not plain["recall"].equals(weighed["scores"]["recall"])


def test_a_precomputed_embedding_serves_only_copies_of_real_cells(tmp_path):
    cells = donor_cells()
    stored = np.random.default_rng(0).normal(size=(len(cells), 4))
    cells = replace(cells, obsm={"X_mine": stored})
    settings = replace(SETTINGS, embedders=("obsm:X_mine",))
    prepared = prepare(cells, split_of(cells), settings, tmp_path)
    copied = evaluate(
        prepared, oversampling.random_oversampling(prepared.training_with(0)), settings
    )
    assert "obsm:X_mine" in set(copied["scores"]["embedder"])
    made = evaluate(prepared, oversampling.negative_binomial(prepared.training_with(0)), settings)
    assert set(made["scores"]["embedder"]) == {"genes"}
    with pytest.raises(ValueError, match="X_other"):
        make_embedder("obsm:X_other", cells, scgpt_dir=None, cache=tmp_path, seed=0)
    assert ObsmEmbedder("X_mine").new(New(cells.counts, cells.labels)) is None


# --------------------------------------------------------------------- plan


def test_plan_holds_every_part_once_and_drops_what_is_done():
    arms = choose(["default"], pool=True, donors=True)
    tasks = plan(3, 2, arms, ())
    parts = [part for task in tasks for part in task.parts()]
    assert len(parts) == len(set(parts))
    seedless = sum(ARMS[arm].seedless for arm in arms)
    assert len(parts) == 3 * (2 * len(arms) - seedless)
    assert [t.split for t in tasks] == sorted(t.split for t in tasks)
    left = plan(3, 2, arms, parts[5:])
    assert sorted(p for t in left for p in t.parts()) == sorted(parts[:5])


def test_arms_that_share_a_model_share_a_task():
    (task,) = plan(1, 1, ["ae-shrunk", "cfgen"], ())
    assert task.arms == ("ae-shrunk", "cfgen")


def test_seeds_differ_between_splits_and_seeds_but_not_between_arms():
    seeds = {arm_seed(SETTINGS, split, seed) for split in range(5) for seed in range(3)}
    assert len(seeds) == 15


@pytest.mark.parametrize(
    ("names", "pool", "donors", "expected"),
    [
        pytest.param(["nb"], False, False, ["none", "nb"], id="none is always there"),
        pytest.param(["mixup", "nb"], True, True, ["none", "nb", "mixup"], id="order of tables"),
    ],
)
def test_choose(names, pool, donors, expected):
    assert choose(names, pool=pool, donors=donors) == expected


def test_choose_says_why_not():
    assert "oracle" not in choose(["default"], pool=False, donors=True)
    assert "wgan" not in choose(["default"], pool=True, donors=True)
    with pytest.raises(ValueError, match="unused real cells"):
        choose(["oracle"], pool=False, donors=True)
    with pytest.raises(ValueError, match="got nosuch"):
        choose(["nosuch"], pool=True, donors=True)
    with pytest.raises(ValueError, match="have none"):
        choose(["cfgen-donors"], pool=True, donors=False)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        pytest.param({"held_out": 1.0}, "--held-out", id="all held out"),
        pytest.param({"n_splits": 0}, "--n-splits", id="no splits"),
        pytest.param({"target_size": 0.5}, "target_size", id="shrinks"),
        pytest.param({"embedders": ("scgpt",)}, "--scgpt-dir", id="no checkpoint"),
        pytest.param({"embedders": ("pca", "pca")}, "twice", id="twice"),
    ],
)
def test_settings_refuse(changed, match):
    with pytest.raises(ValueError, match=match):
        replace(SETTINGS, **changed)


def test_settings_survive_the_manifest():
    settings = replace(SETTINGS, thin=(("B: cells", 4), ("A", 2)), embedders=("pca", "obsm:x"))
    assert Settings.from_document(json.loads(json.dumps(settings.document()))) == settings


# -------------------------------------------------------------- the command

ARMS_OF_TEST = ["--arms", "nb", "mixup", "ros"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A small run, on a file as a user would have it."""
    cells = donor_cells()
    path = tmp_path_factory.mktemp("data") / "small.h5ad"
    anndata.AnnData(
        cells.counts,
        obs=pd.DataFrame(
            {"cell_type": cells.labels, "donor": cells.donors},
            index=[f"cell{i}" for i in range(len(cells))],
        ),
        var=pd.DataFrame(index=cells.genes),
    ).write_h5ad(path)
    work = ["--splits", "2", "--seeds", "2", "--jobs", "1", "--threads", "1"]
    return ["run", "--data", str(path), *work]


def test_run_writes_tables_manifest_and_report(tmp_path, capsys, command):
    out = tmp_path / "results"
    assert main([*command, *ARMS_OF_TEST, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "14 of 14 parts" in printed
    assert "roughly" in printed
    for name in ("scores", "gains", "realism", "memorisation", "costs", "splits", "correlation"):
        assert len(pd.read_csv(out / f"{name}.csv")), name
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["data"]["n_donors"] > 1
    assert "report.html" in {path.name for path in out.iterdir()}
    scores = pd.read_csv(out / "scores.csv")
    assert set(scores["arm"]) == {"none", "nb", "mixup", "ros"}
    realism = pd.read_csv(out / "realism.csv")
    assert "real" in set(realism["arm"])

    # Again: nothing is left to do, and adding an arm does only that arm.
    stamps = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert main([*command, *ARMS_OF_TEST, "smote-log", "--out", str(out)]) == 0
    assert "4 of 18 parts" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())

    # Other settings do not mix with what is there.
    assert main([*command, *ARMS_OF_TEST, "--out", str(out), "--target-size", "3.0"]) == 2
    assert "target_size: 2.0 there, 3.0 now" in capsys.readouterr().err

    page = out.parent / "page.md"
    assert main(["report", str(out), "--markdown", "--docs", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "| nb |" in printed.replace("`", "")
    assert (
        page.read_text()
        == f"<!-- table: {out.name} -->\n{printed.strip()}\n<!-- end: {out.name} -->\n"
    )


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, command):
    def started(out):
        return [sys.executable, "-m", "benchmarks", *command, *ARMS_OF_TEST, "--out", str(out)]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(started(killed), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(results.finished(killed)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = results.finished(killed)
    assert 2 <= len(kept) < 14, "the kill was to come in the middle"
    stamps = {part: part.path(killed).stat().st_mtime_ns for part in kept}
    for out in (killed, whole):
        subprocess.run(started(out), check=True, stdout=subprocess.DEVNULL)
    assert {part: part.path(killed).stat().st_mtime_ns for part in kept} == stamps
    for name in ("scores", "gains", "realism", "memorisation"):
        pd.testing.assert_frame_equal(
            pd.read_csv(killed / f"{name}.csv"), pd.read_csv(whole / f"{name}.csv")
        )


def test_an_arm_that_fails_is_told_and_leaves_the_others(tmp_path, monkeypatch, capsys, command):
    def fails(training):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(ARMS, "mixup", replace(ARMS["mixup"], make=fails))
    out = tmp_path / "results"
    assert main([*command, *ARMS_OF_TEST, "--out", str(out)]) == 1
    assert "no such luck" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert not manifest["complete"]
    assert manifest["failures"]["0 0 mixup"] == "RuntimeError: no such luck"
    assert Part(0, 0, "mixup") not in results.finished(out)
    assert Part(1, 1, "ros") in results.finished(out)


def test_dry_run_writes_nothing(tmp_path, capsys, command):
    out = tmp_path / "results"
    assert main([*command, "--out", str(out), "--dry-run"]) == 0
    assert "GiB" in capsys.readouterr().out
    assert not out.exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path, capsys, command):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_report_of_nothing_is_an_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
