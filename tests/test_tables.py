"""The paper's tables: splits, spaces, what models see and share, resuming, what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import simulate
from scipy import sparse

from benchmarks.__main__ import main
from benchmarks.cells import log_normalise
from benchmarks.pages import into_page
from benchmarks.realism import mmd_rbf
from benchmarks.tables import models, summary, work
from benchmarks.tables.cells import ATAC, RNA, Measured, read, split
from benchmarks.tables.commands import choose
from benchmarks.tables.spaces import LEAST, POOLED, Space, log_space, tf_idf_space
from cfgen_augment import CFGen, model
from cfgen_augment.measures import wasserstein

SIZES = {"B": 60, "NK": 20, "T": 44}
CHEAP = ["nb", "mixup", "nb-untyped"]


def with_peaks(cells, n_peaks=60, seed=0):
    """The cells, and peaks of which each type has ten open four times as often as others."""
    random = np.random.default_rng(seed)
    rates = np.full((len(cells.labels), n_peaks), 0.1)
    for i, name in enumerate(np.unique(cells.labels)):
        rates[cells.labels == name, 10 * i : 10 * i + 10] = 0.4
    opened = sparse.csr_matrix((random.random(rates.shape) < rates).astype(np.float32))
    names = {RNA: np.array([f"g{i}" for i in range(cells.X.shape[1])])}
    names[ATAC] = np.array([f"p{i}" for i in range(n_peaks)])
    return Measured({RNA: cells.X.astype(np.float32), ATAC: opened}, names, cells.labels)


@pytest.fixture(scope="module")
def measured():
    return with_peaks(simulate(SIZES))


@pytest.fixture
def folder(tmp_path, measured):
    """Files of the simulated cells: RNA, and peaks with their cells in another order."""
    for name, values in measured.counts.items():
        adata = anndata.AnnData(
            values,
            obs=pd.DataFrame(
                {"cell_type": measured.labels}, index=[f"c{i}" for i in range(len(measured))]
            ),
            var=pd.DataFrame(index=measured.features[name]),
        )
        (adata[::-1] if name == ATAC else adata).copy().write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path


def run(folder, *others, table=1, seeds=2, out="out"):
    data = str(folder / "rna.h5ad") if table == 1 else f"{folder}/rna.h5ad,{folder}/atac.h5ad"
    return main(
        [
            *("tables", "--table", str(table), "--data", data, "--seeds", str(seeds)),
            *("--threads", "1", "--out", str(folder / out), *others),
        ]
    )


@pytest.fixture
def quick(monkeypatch):
    """CFGen trained as briefly as can be; how often it was."""
    monkeypatch.setattr(model, "_AUTO_EPOCHS", ((1, 1, 1, 1), (1, 1, 1, 1)))
    fit, trained = CFGen.fit, []
    monkeypatch.setattr(CFGen, "fit", lambda *a, **k: (trained.append(1), fit(*a, **k))[1])
    return trained


# ------------------------------------------------------------------ cells


def test_every_type_is_split_by_the_share_wanted(measured):
    training, held_out = split(measured, 0.3, 0)
    assert held_out.sizes() == {"B": 18, "NK": 6, "T": 13}
    assert len(training) + len(held_out) == len(measured)
    both = sparse.vstack([training.counts[RNA], held_out.counts[RNA]]).toarray()
    expected = measured.counts[RNA].toarray()
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(expected, axis=0))
    again, other = split(measured, 0.3, 0)[1], split(measured, 0.3, 1)[1]
    assert (again.counts[RNA] != held_out.counts[RNA]).nnz == 0
    assert (other.counts[RNA] != held_out.counts[RNA]).nnz > 0


def test_genes_are_kept_by_the_cells_that_show_them(folder, measured):
    seen = (measured.counts[RNA].toarray() > 0).sum(axis=0)
    least = int(np.median(seen)) + 1
    cells = read(str(folder / "rna.h5ad"), paired=False, min_cells=least)
    kept = measured.features[RNA][seen >= least]
    assert 0 < len(kept) < len(seen)
    assert cells.features[RNA].tolist() == kept.tolist()
    with pytest.raises(ValueError, match=r"seen in 1000 cells or more; none of 40"):
        read(str(folder / "rna.h5ad"), paired=False, min_cells=1000)


def test_pbmc3k_has_as_many_genes_as_in_the_paper(real_data, monkeypatch):
    monkeypatch.setenv("CFGEN_DATA", str(real_data("pbmc3k.h5ad").parent))
    assert read("pbmc3k", paired=False).counts[RNA].shape == (2638, 8573)


def test_paired_cells_are_put_in_one_order_and_peaks_binarised(folder, measured):
    peaks = anndata.read_h5ad(folder / "atac.h5ad")
    peaks.X = peaks.X * 3
    peaks.write_h5ad(folder / "atac.h5ad")
    cells = read(f"{folder}/rna.h5ad,{folder}/atac.h5ad", paired=True)
    for name in (RNA, ATAC):
        assert (cells.counts[name] != measured.counts[name]).nnz == 0
    assert cells.labels.tolist() == measured.labels.tolist()


def test_the_papers_multiome_is_read_from_the_layer_of_its_file(folder, measured, monkeypatch):
    mudata = pytest.importorskip("mudata")
    sides = {name: anndata.read_h5ad(folder / f"{name}.h5ad") for name in (RNA, ATAC)}
    for side in sides.values():
        side.layers["X_counts"] = side.X.copy()
        side.X = side.X / 2  # whatever its authors made of the counts
    with mudata.set_options(pull_on_update=False):
        mudata.MuData(sides).write(folder / "pbmc10k_multiome_train.h5mu")
    monkeypatch.setenv("CFGEN_DATA", str(folder))
    cells = read("pbmc10k", paired=True)
    for name in (RNA, ATAC):
        assert (cells.counts[name] != measured.counts[name]).nnz == 0
    with pytest.raises(FileNotFoundError, match=r"neurips_multiome_train.h5mu .*X_counts"):
        read("neurips", paired=True)


def test_paired_data_that_do_not_fit_are_told(folder, monkeypatch):
    peaks = anndata.read_h5ad(folder / "atac.h5ad")
    peaks[1:].copy().write_h5ad(folder / "fewer.h5ad")
    with pytest.raises(ValueError, match=r"124 and 123 cells have other obs_names"):
        read(f"{folder}/rna.h5ad,{folder}/fewer.h5ad", paired=True)
    monkeypatch.setenv("CFGEN_DATA", str(folder))
    with pytest.raises(FileNotFoundError, match=r"scicar_a549_rna.*GSE117089"):
        read("scicar-a549", paired=True)
    with pytest.raises(FileNotFoundError, match="one of scicar-a549"):
        read("nothing", paired=True)


# ----------------------------------------------------------------- spaces


def test_tf_idf_is_its_formula(measured):
    peaks = measured.counts[ATAC]
    held_out = peaks[:40].toarray()
    held_out[:, 3] = 0
    idf = np.log(1 + 40 / np.maximum(held_out.sum(axis=0), 1)) * (held_out.sum(axis=0) > 0)
    dense = peaks.toarray()
    total = np.maximum(dense.sum(axis=1, keepdims=True), 1)
    found = tf_idf_space(sparse.csr_matrix(held_out))(peaks).toarray()
    np.testing.assert_allclose(found, np.log(1 + 1e4 * dense / total) * idf, rtol=1e-5)
    assert (found[:, 3] == 0).all()


def test_components_are_those_of_the_centred_held_out_cells(measured):
    values = measured.counts[RNA]
    space = Space(values, measured.labels, log_space, 0)
    dense = log_normalise(values).toarray().astype(np.float64)
    u, s, vt = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(space.places), np.abs(u[:, :30] * s[:30]), atol=1e-2)
    # Cells that are compared are moved by the held-out cells' mean, not by their own.
    shifted = values[:50]
    expected = (dense[:50] - dense.mean(axis=0)) @ vt[:30].T
    rows = space.compare(shifted, None)
    own = np.sort(np.random.default_rng([0, 0]).permutation(len(dense))[:50])
    assert rows[0]["w2"] == pytest.approx(wasserstein((u * s)[own, :30], expected), rel=1e-3)


def test_distances_are_of_each_type_and_of_all(measured):
    training, held_out = split(measured, 0.5, 0)
    space = Space(held_out.counts[RNA], held_out.labels, log_space, 0)
    rows = pd.DataFrame(space.compare(held_out.counts[RNA], held_out.labels)).set_index("type")
    assert list(rows.index) == [POOLED, "B", "NK", "T"]
    assert rows["m"].tolist() == [62, 30, 10, 22]
    np.testing.assert_allclose(rows["w2"].astype(float), 0, atol=1e-5)
    logs = log_normalise(training.counts[RNA])
    transformed = space.compare(logs, training.labels, transformed=True)
    counted = space.compare(training.counts[RNA], training.labels)
    assert counted == transformed
    of_b = space.places[held_out.labels == "B"]
    made = space._placed(logs[training.labels == "B"])
    assert counted[1]["mmd"] == pytest.approx(mmd_rbf(of_b, made))
    # Types that were swapped are far from where they should be, and no neighbour agrees.
    swapped = np.array(["T" if name == "B" else "B" for name in training.labels])
    wrong = pd.DataFrame(space.compare(training.counts[RNA], swapped)).set_index("type")
    assert (wrong.loc[["B", "T"], "w2"] > rows.loc[["B", "T"], "w2"] + 1).all()
    assert wrong.loc["B", "f1"] < 0.2


def test_f1_of_all_leaves_small_types_out():
    cells = with_peaks(simulate({"B": 60, "NK": 2 * LEAST - 2, "T": 44}))
    training, held_out = split(cells, 0.5, 0)
    space = Space(held_out.counts[RNA], held_out.labels, log_space, 0)
    called = np.where(training.labels == "NK", "B", training.labels)
    rows = pd.DataFrame(space.compare(training.counts[RNA], called)).set_index("type")
    assert (held_out.labels == "NK").sum() == LEAST - 1
    assert rows.loc["NK", "f1"] == rows.loc["NK", "m"] == 0
    assert rows.loc[POOLED, "f1"] == pytest.approx(rows.loc[["B", "T"], "f1"].mean())
    assert rows.loc[POOLED, "f1"] != rows.loc[["B", "NK", "T"], "f1"].mean()


# ----------------------------------------------------------------- models


def job_of(measured, seed=0):
    training, held_out = split(measured, 0.3, seed)
    return models.Job(training, held_out.sizes(), seed)


@pytest.mark.parametrize("name", [models.REAL, "nb", "mixup"])
def test_models_make_what_is_wanted(measured, name):
    job = job_of(measured)
    made = models.RNA_MODELS[name].make(job, None)
    assert made.labels.tolist() == job.labels.tolist()
    assert made.values[RNA].shape == (37, 40)


def test_the_floor_is_training_cells(measured):
    job = job_of(measured)
    made = models.real(job)
    known = {row.tobytes() for row in job.cells.counts[RNA].toarray()}
    rows = [row.tobytes() for row in made.values[RNA].toarray()]
    assert set(rows) <= known
    assert len(set(rows)) == len(rows)


def test_models_without_types_do_not_see_them(measured):
    job = job_of(measured)
    other = replace(job, cells=replace(job.cells, labels=job.cells.labels[::-1].copy()))
    for name in ("nb-untyped", "mixup-untyped"):
        made = [models.RNA_MODELS[name].make(j, None) for j in (job, other)]
        assert made[0].labels is None
        assert (made[0].values[RNA] != made[1].values[RNA]).nnz == 0, name


def test_independent_features_have_the_frequencies_of_their_type(measured):
    job = replace(job_of(measured), wanted={"B": 3000, "T": 0})
    peaks = models.PAIRED_MODELS["independent"].make(job, None).values[ATAC]
    opened = job.cells.counts[ATAC][job.cells.labels == "B"].toarray().mean(axis=0)
    np.testing.assert_allclose(peaks.toarray().mean(axis=0), opened, atol=0.05)
    assert set(np.unique(peaks.data)) == {1.0}


def test_every_deep_rival_that_is_ours_says_so():
    for name in ("scdiffusion", "wgan"):
        for suffix in ("", "-untyped"):
            entry = models.RNA_MODELS[name + suffix]
            assert "our" in entry.about
            assert "ours" in entry.title
            assert "doi:" in entry.about


def test_models_are_chosen_by_name():
    assert list(choose(1, ["mixup", "nb"])) == ["real", "nb", "mixup"]
    assert list(choose(2, ["all"])) == list(models.PAIRED_MODELS)
    with pytest.raises(ValueError, match=r"--models: expected any of real.*; got peakvi"):
        choose(1, ["peakvi"])


# ---------------------------------------------------------------- command


def test_tables_are_the_mean_and_spread_of_their_parts(folder, capsys):
    assert run(folder, "--models", *CHEAP) == 0
    out = folder / "out"
    printed = capsys.readouterr().out
    text = (out / "table.md").read_text()
    assert text in printed
    parts = [json.loads((out / "parts" / f"seed{s}_nb.json").read_text()) for s in (0, 1)]
    w2 = [row["w2"] for part in parts for row in part["rows"] if row["type"] == POOLED]
    assert f"{np.mean(w2):.2f} ± {np.std(w2, ddof=1):.2f}" in text
    # NK has 6 held-out cells: told, listed, and in no mean over types.
    assert "NK (6)" in text
    by_type = [r["w2"] for p in parts for r in p["rows"] if r["type"] in ("B", "T")]
    table = pd.read_csv(out / "table.csv").set_index("model")
    assert table.loc["nb", "W2 per type"] == pytest.approx(np.mean(by_type))
    every = pd.read_csv(out / "types.csv")
    assert set(every.loc[every["model"] == "mixup", "type"]) == {"B", "NK", "T"}
    assert len(every) == 2 * 3 * 3  # seeds, types, real and two models
    without = text.split("types not given")[1]
    assert "| real cells |" in without
    assert "F1" not in without
    assert "tables --table 1 --data rna.h5ad" in text
    assert str(folder) not in text


def test_distances_above_the_floor_are_taken_split_by_split(folder):
    assert run(folder, "--models", *CHEAP) == 0
    out = folder / "out"

    def pooled(name):
        parts = [json.loads((out / "parts" / f"seed{s}_{name}.json").read_text()) for s in (0, 1)]
        return np.array([r["w2"] for p in parts for r in p["rows"] if r["type"] == POOLED])

    above = (out / "table.md").read_text().split("above those of real cells")[1]
    for name in ("mixup", "nb-untyped"):
        difference = pooled(name) - pooled("real")
        assert f"{difference.mean():.2f} ± {difference.std(ddof=1):.2f}" in above
    assert "| real cells |" not in above
    assert run(folder, "--models", "real", seeds=1, out="floor") == 0
    assert "above" not in (folder / "floor" / "table.md").read_text()


def test_finished_parts_are_kept_and_seeds_added(folder, monkeypatch):
    assert run(folder, "--models", "nb", seeds=1) == 0
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "out" / "parts").iterdir()}
    assert run(folder, "--models", "nb", "mixup", seeds=2) == 0
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "out" / "parts").iterdir()}
    assert set(after) == {f"seed{s}_{n}.json" for s in (0, 1) for n in ("real", "nb", "mixup")}
    assert {name: after[name] for name in before} == before


def test_a_table_says_all_commands_that_made_it_and_no_more(folder):
    def told(*names):
        assert run(folder, "--models", *names, seeds=1) == 0
        lines = (folder / "out" / "table.md").read_text().splitlines()
        return [line.split("--models ")[1] for line in lines if line.startswith("`python")]

    assert told("nb") == ["nb`"]
    assert told("mixup") == ["nb`", "mixup`"]
    assert told("mixup") == ["nb`", "mixup`"]
    assert told("nb", "mixup") == ["nb mixup`"]


def test_parts_do_not_depend_on_what_else_is_done(folder):
    run(folder, "--models", "nb", seeds=2, out="a")
    run(folder, "--models", "mixup", "nb-untyped", "nb", seeds=2, out="b")
    for seed in (0, 1):
        a, b = (
            json.loads(work.part_path(folder / out, seed, "nb").read_text())["rows"]
            for out in ("a", "b")
        )
        assert a == b


def test_a_model_that_fails_is_told_and_tried_again(folder, monkeypatch, capsys):
    def absent(job):
        raise ImportError("scvi-tools is not installed.")

    broken = dict(models.RNA_MODELS)
    for name in ("scvi", "scvi-prior"):
        broken[name] = replace(broken[name], fit=absent)
    monkeypatch.setitem(models.TABLES, 1, broken)
    assert run(folder, "--models", "scvi", "scvi-prior", "nb", seeds=1) == 1
    printed = capsys.readouterr().out
    assert "failed: scvi-prior, seed 0: ImportError: scvi-tools is not installed." in printed
    assert "| negative binomial |" in printed
    assert not work.part_path(folder / "out", 0, "scvi").exists()
    for name in ("scvi", "scvi-prior"):
        broken[name] = replace(broken["nb"], title=name)
    assert run(folder, "--models", "scvi", "nb", seeds=1) == 0
    assert work.part_path(folder / "out", 0, "scvi").exists()


def test_results_of_another_design_are_not_mixed(folder, capsys):
    assert run(folder, "--models", "nb", seeds=1) == 0
    assert run(folder, "--models", "nb", "--held-out", "0.4", seeds=1) == 2
    assert "Choose another --out" in capsys.readouterr().err
    assert run(folder, "--held-out", "0.6", out="other") == 2
    assert "at most .5" in capsys.readouterr().err
    assert run(folder, seeds=0, out="other") == 2


def test_unreachable_data_name_their_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CFGEN_DATA", str(tmp_path))

    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr("benchmarks.datasets._download", offline)
    for name, file in (
        ("dentate-gyrus", "dentategyrus_train.h5ad"),
        ("tabula-muris", "tabula_muris_train.h5ad"),
        ("hlca", "hlca_train.h5ad"),
    ):
        assert main(["tables", "--table", "1", "--data", name, "--out", str(tmp_path / "o")]) == 2
        told = capsys.readouterr().err
        assert file in told
        assert "https://zenodo.org/records/15031364" in told
    assert not (tmp_path / "o").exists()


def test_cfgen_is_trained_once_for_all_its_rows(folder, quick):
    names = ("cfgen", "cfgen-encoded", "cfgen-untyped", "cfgen-encoded-untyped")
    assert run(folder, "--models", *names, seeds=1) == 0
    assert len(quick) == 1
    rows = [json.loads(work.part_path(folder / "out", 0, n).read_text())["rows"] for n in names]
    types = [[row["type"] for row in of_model] for of_model in rows]
    assert types == [[POOLED, "B", "NK", "T"]] * 2 + [[POOLED]] * 2


@pytest.mark.parametrize("paired", [False, True], ids=["one modality", "two"])
def test_encoded_cells_have_the_depths_of_training_cells(measured, paired, monkeypatch):
    cells = measured if paired else replace(measured, counts={RNA: measured.counts[RNA]})
    job = models.Job(cells, {"B": 20, "T": 30}, 0)
    fitted = CFGen(max_epochs=1, random_state=0).fit(models._as_given(cells), cells.labels)
    seen = {}
    generate = fitted.generate
    monkeypatch.setattr(fitted, "generate", lambda *a, **k: (seen.update(k), generate(*a, **k))[1])
    made = models.RNA_MODELS["cfgen-encoded"].make(job, fitted)
    assert made.labels.tolist() == ["B"] * 20 + ["T"] * 30
    assert set(made.values) == set(cells.counts)
    sizes = seen["size_factors"] if paired else {RNA: seen["size_factors"]}
    for name, own in cells.counts.items():
        totals = np.asarray(own.sum(axis=1)).ravel()
        assert set(sizes[name][:20]) <= set(totals[cells.labels == "B"])
        drawn = np.asarray(made.values[name].sum(axis=1)).ravel()
        assert np.corrcoef(drawn, sizes[name])[0, 1] > 0.6


def test_both_modalities_are_compared(folder, quick):
    assert run(folder, "--models", "cfgen", "independent", table=2, seeds=1) == 0
    table = pd.read_csv(folder / "out" / "table.csv").set_index(["model", "modality"])
    assert set(table.index) == {
        (name, m) for name in ("real", "cfgen", "independent") for m in (RNA, ATAC)
    }
    assert np.isfinite(table[list(summary.COLUMNS)].to_numpy()).all()
    text = (folder / "out" / "table.md").read_text()
    assert "| RNA |" in text
    assert "| ATAC |" in text
    made = work.kept(folder / "out", "cfgen", ATAC)
    assert set(np.unique(made.values[ATAC].data)) <= {1.0}


def test_a_table_takes_its_place_in_a_document(folder):
    page = folder / "page.md"
    page.write_text(
        "# Tables\n\n## One\n\n<!-- table: 1 rna.h5ad -->\n<!-- end: 1 rna.h5ad -->\n\nB\n"
    )
    for _ in range(2):
        assert run(folder, "--models", "nb", "--docs", str(page), seeds=1) == 0
    text = page.read_text()
    assert text.count("### Table 1") == 1
    assert text.startswith(
        "# Tables\n\n## One\n\n<!-- table: 1 rna.h5ad -->\n### Table 1: rna.h5ad\n\n`python"
    )
    assert text.endswith("<!-- end: 1 rna.h5ad -->\n\nB\n")
    into_page("words", page, "2 x")
    assert page.read_text().endswith("<!-- table: 2 x -->\nwords\n<!-- end: 2 x -->\n")


# ---------------------------------------------------------------- figures


def drawn(folder, *others):
    assert main(["figures", str(folder), *others]) == 0
    return {path.name: path.read_text() for path in (folder / "figures").glob("*.svg")}


def test_figures_of_tables_say_cells_and_command(folder, monkeypatch):
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    assert run(folder, "--models", "independent", table=2, seeds=1) == 0
    figures = drawn(folder / "out")
    assert set(figures) == {
        "fig2_mean_variance.svg",
        "fig2_zeros_per_cell.svg",
        "fig9_marker_expression.svg",
        "fig9_peak_accessibility.svg",
    }
    for text in figures.values():
        assert "37 held-out cells" in text
        assert "python -m benchmarks figures out" in text
        assert "independent features" in text
    assert "r = 0." in figures["fig9_peak_accessibility.svg"]


def test_the_grid_of_guidance_trains_once(tmp_path, quick):
    cells = simulate({"B": 60, "NK": 30, "T": 44})
    adata = anndata.AnnData(
        cells.X.astype(np.float32),
        obs=pd.DataFrame(
            {"cell_type": cells.labels, "donor": cells.donors},
            index=[f"c{i}" for i in range(len(cells.labels))],
        ),
    )
    adata.write_h5ad(tmp_path / "donors.h5ad")
    for _ in range(2):
        figures = drawn(tmp_path, "--data", str(tmp_path / "donors.h5ad"))
        assert list(figures) == ["fig4_guidance.svg"]
    assert len(quick) == 1
    assert main(["figures", str(tmp_path / "nothing")]) == 2


def test_shares_of_neighbours_leave_out_the_cell_itself():
    from benchmarks.tables.guidance import nearest_shares

    places = np.arange(40, dtype=float)[:, None]
    kinds = {"kind": np.array(["a", "b"] * 20)}
    alone = nearest_shares(places, kinds, places[[20]], {"kind": "a"})
    among = nearest_shares(places, kinds, places[[20]], {"kind": "a"}, among_real=True)
    assert among["kind"] < alone["kind"]
