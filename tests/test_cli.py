"""The command as a user runs it: files, exit codes, and what appears on which stream."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from cfgen_augment import CFGen, __version__, augment_file, cli
from cfgen_augment.cli import main

COMMAND = [sys.executable, "-m", "cfgen_augment.cli"]


def write_input(file, cells, **obs):
    """Counts, labels and donors; nothing that would have to be dropped."""
    frame = pd.DataFrame(
        {"cell_type": pd.Categorical(cells.labels), "donor": cells.donors} | obs,
        index=[f"cell{i}" for i in range(len(cells.labels))],
    )
    made = anndata.AnnData(cells.X.astype(np.float32), obs=frame)
    made.var_names = [f"gene{i}" for i in range(made.n_vars)]
    made.write_h5ad(file)
    return file


@pytest.fixture
def given(cells, tmp_path):
    return write_input(tmp_path / "in.h5ad", cells)


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command in process: exit code, standard output, standard error."""

    def run(*options, source="in.h5ad", output="out.h5ad", quick=True):
        fixed = ["--label-key", "cell_type", "--device", "cpu"]
        if quick:
            fixed += ["--max-epochs", "1"]
        arguments = [tmp_path / source, tmp_path / output, *fixed, *options]
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse's way out
            code = left.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(cells, tmp_path_factory):
    """A saved model of the input, trained on donors too."""
    fitted = CFGen(n_latent=4, max_epochs=1, random_state=0, device="cpu").fit(
        cells.X,
        cells.labels,
        covariates={"donor": cells.donors},
        feature_names=[f"gene{i}" for i in range(cells.X.shape[1])],
    )
    return fitted.save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(CFGen, "fit", lambda *_, **__: pytest.fail("trained"))


def dense(file):
    return anndata.read_h5ad(file).X.toarray()


# ------------------------------------------------------------------ a whole run


def test_a_user_s_run(given, tmp_path):
    options = ["--label-key=cell_type", "--donor-key=donor", "--max-epochs=1", "--seed=3"]
    done = subprocess.run(
        [*COMMAND, "in.h5ad", "out.h5ad", *options, "--target-size=2.0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["real", "synthetic", "total", "%", "before", "%", "after"]
    assert [line.split()[0] for line in lines[1:4]] == ["NK", "T", "B"]
    assert lines[4] == "150 real + 150 synthetic cells x 40 features -> out.h5ad"
    assert "autoencoder" in done.stderr
    assert "flow" in done.stderr
    assert "autoencoder" not in done.stdout
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert result.n_obs == 300
    np.testing.assert_array_equal(result.X[:150].toarray(), dense(given))
    assert result.obs["donor"].isin(["d1", "d2", "d3"]).all()
    assert result.uns["cfgen_augment"]["seed"] == 3
    assert result.uns["cfgen_augment"]["parameters"]["donor_key"] == "donor"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_real_file(real_data, run, tmp_path):
    source = real_data("scicar_mouse_kidney_rna_tiny.h5ad")
    code, out, err = run("--donor-key", "donor", "--target-size", 700, source=source)
    assert code == 0
    real, result = (anndata.read_h5ad(file) for file in (source, tmp_path / "out.h5ad"))
    assert result.n_obs == 700
    assert (result.X[: real.n_obs] != real.X).nnz == 0
    pd.testing.assert_frame_equal(result.var, real.var)
    few = real.obs["cell_type"].value_counts().loc[lambda sizes: sizes < 5].index
    assert len(few) > 0
    for name in few:
        assert repr(name) in err
    assert not result.obs["cell_type"][real.n_obs :].isin(few).any()
    assert f"{real.n_obs} real + {700 - real.n_obs} synthetic" in out


def test_help_and_refusal_need_no_torch_and_name_the_codes(given):
    # Help and a refused output must answer at once, so nothing heavy may be imported for them.
    program = (
        "import sys; from cfgen_augment.cli import main\n"
        "code = main([sys.argv[1], sys.argv[1], '--label-key', 'x'])\n"
        "assert code == 3 and 'torch' not in sys.modules, code\n"
        "main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(given)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for code in (cli.OK, cli.BAD_INPUT, cli.OUTPUT_EXISTS, cli.UNREADABLE, cli.FAILED):
        assert f"{code} " in done.stdout.split("exit codes:")[1]
    assert str(cli.INTERRUPTED) in done.stdout
    for option in ("--label-key", "--donor-key", "--target-size", "--layer", "--device"):
        assert option in done.stdout
    assert "--save-model DIR | --model DIR" in done.stdout


def test_installed_under_its_name(tmp_path):
    command = shutil.which("cfgen-augment", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("needs the package installed, not only on the path")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"cfgen-augment {__version__}\n")
    done = subprocess.run(
        [command, "absent.h5ad", "out.h5ad", "--label-key", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == cli.UNREADABLE
    assert done.stderr.startswith("cfgen-augment: error: absent.h5ad: expected an h5ad file")
    assert "Traceback" not in done.stderr


def test_zarr_in_and_out(given, model, run, tmp_path):
    pytest.importorskip("zarr")
    assert run("--model", model, "--seed", 1, output="out.zarr", quick=False)[0] == 0
    assert run("--model", model, "--seed", 1, quick=False)[0] == 0
    zarr, h5ad = anndata.read_zarr(tmp_path / "out.zarr"), anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (zarr.X != h5ad.X).nnz == 0
    pd.testing.assert_frame_equal(zarr.obs, h5ad.obs)
    code, _, err = run("--model", model, output="out.zarr", quick=False)
    assert (code, "Pass --force" in err) == (cli.OUTPUT_EXISTS, True)
    # Real cells of a store can be the input of the next run, and generated ones cannot.
    code, _, err = run("--model", model, source="out.zarr", output="two.h5ad", quick=False)
    assert code == cli.BAD_INPUT
    assert "not augmented before" in err


def test_quiet_prints_nothing(given, run, tmp_path):
    assert run("--quiet") == (0, "", "")
    assert anndata.read_h5ad(tmp_path / "out.h5ad").n_obs == 300


def test_progress_and_table_have_a_stream_each(given, run):
    code, out, err = run()
    assert code == 0
    assert "epoch" in err
    assert "epoch" not in out
    assert "synthetic cells" in out


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["loud", "quiet"])
def test_warnings_are_notes(cells, run, tmp_path, quiet):
    labels = cells.labels.astype(object)
    labels[:2] = "rare"
    adata = anndata.read_h5ad(write_input(tmp_path / "in.h5ad", cells, cell_type=labels))
    adata.obsm["X_umap"] = np.zeros((150, 2))
    adata.write_h5ad(tmp_path / "in.h5ad")
    code, _, err = run(*quiet)
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert code == 0
    assert len(notes) == 2
    assert "min_cells=5 cells: 'rare' (2)" in notes[0]
    assert "obsm['X_umap']" in notes[1]
    assert ".py" not in err
    assert "Warning" not in err


@pytest.mark.parametrize(
    ("text", "total"),
    [("2.0", 300), ("1.5", 225), ("300", 300), ("1_000", 1000), ("1,000", 1000), ("2.", 300)],
)
def test_target_size(given, model, run, tmp_path, text, total):
    code, out, _ = run("--target-size", text, "--model", model, quick=False)
    assert code == 0
    assert f"150 real + {total - 150:,} synthetic" in out
    assert anndata.read_h5ad(tmp_path / "out.h5ad").n_obs == total


def test_same_seed_same_cells(given, run, tmp_path):
    for output, seed in (("a.h5ad", 1), ("b.h5ad", 1), ("c.h5ad", 2)):
        assert run("--seed", seed, "--quiet", output=output)[0] == 0
    a, b, c = (dense(tmp_path / name) for name in ("a.h5ad", "b.h5ad", "c.h5ad"))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_layer_and_other_options_reach_the_sampler(cells, run, tmp_path):
    adata = anndata.read_h5ad(write_input(tmp_path / "in.h5ad", cells, lane=["1", "2"] * 75))
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "in.h5ad")
    options = ["--layer", "counts", "--batch-key", "lane", "--exponent", 0, "--min-cells", 13]
    options += ["--likelihood", "poisson", "--size-factor", "batch", "--covariates-from", "all"]
    code, _, err = run(*options, "--guidance", 1.5)
    assert code == 0, err
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    record = result.uns["cfgen_augment"]
    wanted = {"layer": "counts", "batch_key": "lane", "exponent": 0, "min_cells": 13}
    wanted |= {"likelihood": "poisson", "size_factor": "batch", "covariates_from": "all"}
    wanted |= {"guidance": 1.5, "max_epochs": 1, "target_size": 2.0}
    assert {name: record["parameters"][name] for name in wanted} == wanted
    # The exponent 0 shares evenly among the types that have 13 cells.
    assert dict(zip(record["types"], record["n_synthetic"], strict=True)) == {
        "NK": 0,
        "T": 75,
        "B": 75,
    }
    assert "NK" in err


# ------------------------------------------------------------------ models


def test_saved_model_gives_the_same_cells_without_training(given, run, tmp_path, monkeypatch):
    kept = tmp_path / "model"
    assert run("--save-model", kept, "--donor-key", "donor", "--seed", 4)[0] == 0
    monkeypatch.setattr(CFGen, "fit", lambda *_, **__: pytest.fail("trained"))
    options = ["--model", kept, "--donor-key", "donor", "--seed", 4]
    code, _, err = run(*options, output="again.h5ad", quick=False)
    assert code == 0
    assert "generate" in err
    np.testing.assert_array_equal(dense(tmp_path / "again.h5ad"), dense(tmp_path / "out.h5ad"))
    record = anndata.read_h5ad(tmp_path / "again.h5ad").uns["cfgen_augment"]
    assert record["parameters"]["generator"] == str(kept)
    assert CFGen.load(kept).attributes_.names == ["label", "donor"]


def test_saved_model_is_overwritten_with_force_only(given, run, tmp_path):
    kept = tmp_path / "model"
    assert run("--save-model", kept, "--quiet")[0] == 0
    before = (kept / "config.json").read_bytes()
    code, _, err = run("--save-model", kept, output="second.h5ad")
    assert code == cli.OUTPUT_EXISTS
    assert "--force" in err
    assert (kept / "config.json").read_bytes() == before
    assert run("--save-model", kept, "--force", "--quiet", output="second.h5ad")[0] == 0
    assert (kept / "config.json").read_bytes() != before


def test_foreign_directory_is_never_overwritten(given, run, tmp_path, no_training):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("dear")
    code, _, err = run("--save-model", tmp_path / "data", "--force")
    assert code == cli.OUTPUT_EXISTS
    assert "never overwritten" in err
    assert (tmp_path / "data" / "thesis.txt").read_text() == "dear"


# ------------------------------------------------------------------ reports


def test_report_compares_what_was_written(given, model, run, tmp_path, monkeypatch):
    from cfgen_augment import diagnose

    options = ["--model", model, "--seed", 5, "--target-size", 400]
    code, out, err = run(*options, "--report", tmp_path / "out.html", quick=False)
    assert (code, "note" in err) == (0, False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    table = diagnose(written, label_key="cell_type", random_state=5)
    n_ok = (table["verdict"] == "ok").sum()
    assert out.splitlines()[-1] == f"{n_ok} of 3 types ok -> {tmp_path / 'out.html'}"
    page = (tmp_path / "out.html").read_text()
    for verdict in table["verdict"]:
        assert f">{verdict}</td>" in page
    assert page.count("<img") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad", "out.html"]
    # Without --force neither is written over; the counts may lie in a layer, and be in zarr.
    code, _, err = run(*options, "--report", tmp_path / "out.html", output="b.h5ad", quick=False)
    assert code == cli.OUTPUT_EXISTS
    assert not (tmp_path / "b.h5ad").exists()
    options += ["--report", tmp_path / "out.html", "--force", "--quiet"]
    assert run(*options, quick=False) == (0, "", "")


def test_report_of_a_layer_and_a_store(cells, model, run, tmp_path):
    pytest.importorskip("zarr")
    adata = anndata.read_h5ad(write_input(tmp_path / "in.h5ad", cells))
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "in.h5ad")
    options = ["--model", model, "--layer", "counts", "--report", tmp_path / "out.html"]
    assert run(*options, output="out.zarr", quick=False)[0] == 0
    assert "150 real and 150 synthetic cells" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    ("report", "code", "message"),
    [
        ("out.txt", cli.BAD_INPUT, "expected a name that ends in .html"),
        ("absent/out.html", cli.BAD_INPUT, "expected a directory that can be written to"),
        ("taken.html", cli.OUTPUT_EXISTS, "it exists. Pass --force"),
    ],
)
def test_reports_are_refused_before_anything_is_read(run, tmp_path, report, code, message):
    (tmp_path / "taken.html").write_text("precious")
    found, out, err = run("--report", tmp_path / report, source="absent.h5ad")
    assert (found, out) == (code, "")
    assert message in err
    assert (tmp_path / "taken.html").read_text() == "precious"


def test_report_wants_a_place_of_its_own(run, tmp_path):
    code, _, err = run("--report", tmp_path / "in.html", source="in.html")
    assert code == cli.BAD_INPUT
    assert "--report: expected a place of its own" in err


def test_report_needs_matplotlib(given, run, tmp_path, monkeypatch, no_training):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("--report", tmp_path / "out.html")
    assert code == cli.BAD_INPUT
    assert "pip install 'cfgen-augment[plot]'" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError("no space left"), cli.FAILED, "but its report not: no space left"),
        (ZeroDivisionError("fault"), cli.FAILED, "but its report not: fault"),
        (KeyboardInterrupt(), cli.INTERRUPTED, "out.html not"),
    ],
)
def test_output_survives_a_report_that_fails(
    given, model, run, tmp_path, monkeypatch, error, code, message
):
    monkeypatch.setattr("cfgen_augment.report.diagnose", _raise(error))
    found, _, err = run("--model", model, "--report", tmp_path / "out.html", quick=False)
    assert found == code
    assert f"{tmp_path / 'out.h5ad'} was written" in err
    assert message in err
    assert ("Traceback" in err) == isinstance(error, ZeroDivisionError)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").n_obs == 300
    assert not (tmp_path / "out.html").exists()


# ------------------------------------------------------------------ existing outputs


def test_output_is_refused_before_the_input_is_read(run, tmp_path):
    (tmp_path / "out.h5ad").write_text("precious")
    code, out, err = run(source="absent.h5ad")
    assert (code, out) == (cli.OUTPUT_EXISTS, "")
    assert "Pass --force to overwrite it" in err
    assert (tmp_path / "out.h5ad").read_text() == "precious"


def test_force_overwrites_even_the_input(given, model, run, tmp_path):
    before = dense(given)
    arguments = {"output": "in.h5ad", "quick": False}
    assert run("--model", model, **arguments)[0] == cli.OUTPUT_EXISTS
    assert run("--model", model, "--force", **arguments)[0] == 0
    result = dense(given)
    assert result.shape[0] == 300
    np.testing.assert_array_equal(result[:150], before)
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


def test_link_stays_a_link_and_permissions_are_the_usual_ones(given, model, run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.h5ad").symlink_to(tmp_path / "elsewhere" / "real.h5ad")
    assert run("--model", model, quick=False)[0] == 0
    assert (tmp_path / "out.h5ad").is_symlink()
    written = tmp_path / "elsewhere" / "real.h5ad"
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


# ------------------------------------------------------------------ failure leaves nothing


def _raise(error):
    def fail(*_, **__):
        raise error

    return fail


def _write_half(error):
    def fail(adata, file, **_):
        Path(file).write_bytes(b"half of a file")
        raise error

    return fail


@pytest.mark.parametrize("exists", [True, False], ids=["over-previous", "new"])
@pytest.mark.parametrize(
    ("where", "stand_in", "code", "message"),
    [
        (
            "anndata.AnnData.write_h5ad",
            _write_half(OSError("no space left")),
            cli.FAILED,
            "could not be written (no space left)",
        ),
        (
            "anndata.AnnData.write_h5ad",
            _write_half(NotImplementedError("odd column")),
            cli.FAILED,
            "could not be written (odd column)",
        ),
        (
            "anndata.AnnData.write_h5ad",
            _write_half(KeyboardInterrupt()),
            cli.INTERRUPTED,
            "interrupted; no output was written",
        ),
        (
            "cfgen_augment.model.train_flow",
            _raise(KeyboardInterrupt()),
            cli.INTERRUPTED,
            "interrupted; no output was written",
        ),
        (
            "cfgen_augment.model.train_flow",
            _raise(FloatingPointError("flow: expected a finite loss")),
            cli.FAILED,
            "flow: expected a finite loss",
        ),
        ("cfgen_augment.model.train_flow", _raise(MemoryError()), cli.FAILED, "MemoryError"),
        (
            "cfgen_augment.model.train_flow",
            _raise(RuntimeError("CUDA out of memory")),
            cli.FAILED,
            "CUDA out of memory",
        ),
    ],
    ids=["disk", "unwritable", "interrupt-write", "interrupt", "diverge", "memory", "cuda"],
)
def test_failure_leaves_no_trace(
    given, run, tmp_path, monkeypatch, where, stand_in, code, message, exists
):
    if exists:
        (tmp_path / "out.h5ad").write_text("precious")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(where, stand_in)
    # A model that had been saved before writing failed would stay: it is whole.
    found, out, err = run("--quiet", *["--force"] * exists)
    assert (found, out, err) == (code, "", f"cfgen-augment: error: {err[22:]}")
    assert message in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_model_survives_a_failure_to_write_the_output(given, run, tmp_path, monkeypatch):
    monkeypatch.setattr("anndata.AnnData.write_h5ad", _write_half(OSError("no space left")))
    assert run("--save-model", tmp_path / "model", "--quiet")[0] == cli.FAILED
    assert CFGen.load(tmp_path / "model").n_features_in_ == 40


def test_interrupt_while_saving_the_model_leaves_nothing(given, run, tmp_path, monkeypatch):
    monkeypatch.setattr("cfgen_augment.checkpoint.save_tensors", _raise(KeyboardInterrupt()))
    assert run("--save-model", tmp_path / "model", "--quiet")[0] == cli.INTERRUPTED
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--device", "cuda:9"], cli.BAD_INPUT, "got 'cuda:9', and this machine offers"),
        (["--device", "tpu"], cli.BAD_INPUT, "expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        (["--label-key", "celltype"], cli.BAD_INPUT, "column of obs (cell_type, donor); got 'cell"),
        (["--donor-key", "patient"], cli.BAD_INPUT, "donor_key: expected a column of obs (cell_ty"),
        (["--layer", "counts"], cli.BAD_INPUT, "layer: expected one of the layers (none); got 'co"),
        (["--target-size", "10"], cli.BAD_INPUT, "at least the 150 cells already there; got 10 "),
        (["--target-size", "1e5"], cli.BAD_INPUT, "expected a total such as 5000 or 5_000"),
        (["--target-size", "2,5"], cli.BAD_INPUT, "or a multiple such as 2.0; got '2,5'"),
        (["--target-size", "nan"], cli.BAD_INPUT, "got 'nan'"),
        (["--target-size", "-3"], cli.BAD_INPUT, "got '-3'"),
        (["--seed", "-1"], cli.BAD_INPUT, "random_state"),
        (["--max-epochs", "0"], cli.BAD_INPUT, "max_epochs"),
        (["--size-factor", "donor"], cli.BAD_INPUT, "size_factor: expected"),
        (["--likelihood", "gaussian"], cli.BAD_INPUT, "invalid choice: 'gaussian'"),
        (["--likelihood", "bernoulli"], cli.BAD_INPUT, "zeros and ones"),
        (["--donor", "donor"], cli.BAD_INPUT, "unrecognized arguments: --donor"),
        (["--model", "a", "--save-model", "b"], cli.BAD_INPUT, "not allowed with argument"),
        (["--model", "absent"], cli.BAD_INPUT, "--max-epochs: expected only without --model"),
        (["--save-model", "OUT"], cli.BAD_INPUT, "expected a place outside the output"),
        (["--save-model", "IN/model"], cli.BAD_INPUT, "expected a place that can be written to"),
        (["--save-model", "IN"], cli.OUTPUT_EXISTS, "never overwritten"),
        (
            ["--modalities", "X,atac", "--report", "R"],
            cli.BAD_INPUT,
            "there are several modalities",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_refused_before_training(given, run, tmp_path, monkeypatch, options, code, message):
    monkeypatch.setattr(
        "cfgen_augment.model.train_autoencoder", lambda *_, **__: pytest.fail("trained")
    )
    places = {"OUT": "out.h5ad", "IN": "in.h5ad", "IN/model": "in.h5ad/model", "R": "r.html"}
    options = [tmp_path / places[o] if o in places else o for o in options]
    found, out, err = run(*options)
    assert (found, out) == (code, "")
    assert message in err
    assert 'error: "' not in err  # as a KeyError's own text would be
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


def test_a_model_within_a_store_is_refused(given, run, tmp_path, no_training):
    """The store takes the place of whatever is there when it is complete."""
    code, _, err = run("--save-model", tmp_path / "out.zarr" / "model", output="out.zarr")
    assert code == cli.BAD_INPUT
    assert "expected a place outside the output" in err
    with pytest.raises(ValueError, match="expected a place outside the output"):
        augment_file(
            given,
            tmp_path / "out.zarr",
            "cell_type",
            save_model=tmp_path / "out.zarr" / "model",
        )
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("device", ["cuda:9", "tpu"])
def test_device_is_refused_before_anything_is_read(run, device):
    code, _, err = run("--device", device, source="absent.h5ad")
    assert code == cli.BAD_INPUT
    assert "device: expected" in err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", "expected a file name; it is a directory or a device"),
        ("absent/out.h5ad", "expected a directory that can be written to"),
        ("in.h5ad/out.h5ad", "expected a directory that can be written to"),
        ("/dev/null", "expected a file name; it is a directory or a device"),
        ("out.loom", "expected a name that ends in .h5ad, .h5mu or .zarr"),
        ("out", "it ends in ''. Rename the output"),
    ],
)
def test_places_that_cannot_hold_the_output(given, run, output, message):
    code, _, err = run("--force", output=output)
    assert code == cli.BAD_INPUT
    assert message in err


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _remove_an_array(file):
    with h5py.File(file, "r+") as store:
        del store["X/indptr"]


def _not_hdf5(file):
    file.write_text("cell_type,gene1\nB,3\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "expected an h5ad file; there is no such file"),
        (_truncate, "It may be truncated: copy or write it again"),
        (_remove_an_array, "expected a complete h5ad file"),
        (_not_hdf5, "expected a complete h5ad file"),
        (lambda file: file.write_bytes(b""), "expected a complete h5ad file"),
    ],
    ids=["absent", "truncated", "array-missing", "csv", "empty"],
)
def test_unreadable_input(given, run, tmp_path, damage, message):
    damage(given)
    code, out, err = run()
    assert (code, out) == (cli.UNREADABLE, "")
    assert err.startswith(f"cfgen-augment: error: {given}: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out.h5ad").exists()


def _corrupt_weights(directory):
    _truncate(directory / "weights.safetensors")


def _corrupt_config(directory):
    (directory / "config.json").write_text('{"format":')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_corrupt_weights, "truncated or belongs to another model"),
        (_corrupt_config, "it is damaged"),
        (lambda directory: (directory / "config.json").unlink(), "config.json is not there"),
        (shutil.rmtree, "config.json is not there"),
    ],
    ids=["weights", "config", "config-missing", "absent"],
)
def test_unreadable_model(given, model, run, tmp_path, damage, message):
    copied = shutil.copytree(model, tmp_path / "model")
    damage(copied)
    code, out, err = run("--model", copied, quick=False)
    assert (code, out) == (cli.UNREADABLE, "")
    assert message in err
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels", "label: expected values seen in training"),
        ("missing", "obs['cell_type']: expected a value for every cell; 1 of 150 are missing"),
        ("normalised", "This looks log-normalised; pass the raw counts"),
        ("genes", "in another order"),
        ("names", "Run adata.obs_names_make_unique() first"),
        ("indices", "got one whose index arrays are broken"),
        ("done", "expected no column 'is_synthetic'"),
    ],
)
def test_data_a_model_cannot_use(cells, model, run, tmp_path, change, message):
    labels = cells.labels.astype(object)
    if change == "labels":
        labels[labels == "T"] = "CD8 T"
    elif change == "missing":
        labels[0] = None
    obs = {"is_synthetic": cells.labels == "B"} if change == "done" else {}
    adata = anndata.read_h5ad(write_input(tmp_path / "in.h5ad", cells, cell_type=labels, **obs))
    if change == "normalised":
        adata.X = adata.X.log1p()
    elif change == "genes":
        adata.var_names = list(adata.var_names[::-1])
    elif change == "names":
        adata.obs_names = ["same"] * adata.n_obs
    adata.write_h5ad(tmp_path / "in.h5ad")
    if change == "indices":
        with h5py.File(tmp_path / "in.h5ad", "r+") as store:
            store["X/indices"][0] = 1000
    code, out, err = run("--model", model, quick=False)
    assert (code, out) == (cli.BAD_INPUT, "")
    assert err.startswith("cfgen-augment: error: ")
    assert message in err
    assert not (tmp_path / "out.h5ad").exists()
