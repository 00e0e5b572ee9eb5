"""Several processes give what one gives: training, generation, files, and their errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from conftest import simulate
from test_files import assert_same

from cfgen_augment import CFGen, CFGenSampler, augment, cli
from cfgen_augment.processes import ALONE, Processes, launched

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def environment(**more) -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def run(*command: str | Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("n", [0, 1, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_nearly_equal_and_leave_nothing_out(n, size):
    shares = [Processes(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in range(n)[share]] == list(range(n))
    lengths = {share.stop - share.start for share in shares}
    assert max(lengths) - min(lengths) <= 1


def test_one_process_needs_neither_fabric_nor_a_process_group():
    code = (
        "import sys, numpy as np, torch; from cfgen_augment import CFGen;"
        "CFGen(max_epochs=1, n_latent=2, device='cpu').fit(np.ones((9, 3)), [*'aaabbbccc']);"
        "assert not torch.distributed.is_initialized();"
        "assert 'lightning_fabric' not in sys.modules"
    )
    run("-c", code)


def without_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def test_processes_that_nobody_launched_are_refused(cells, monkeypatch, tmp_path, capsys):
    pytest.importorskip("lightning_fabric")
    without_launcher(monkeypatch)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        CFGen(distributed=True).fit(cells.X, cells.labels)
    with pytest.raises(ValueError, match="started by torchrun or srun"):
        CFGenSampler(distributed=True).fit_resample(cells.X, cells.labels)
    code = cli.main(["in.h5ad", str(tmp_path / "o.h5ad"), "--label-key", "x", "--distributed"])
    assert code == cli.BAD_INPUT
    assert "torchrun" in capsys.readouterr().err
    assert launched(False, "cpu") is ALONE


def test_without_fabric_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ImportError, match=r"cfgen-augment\[distributed\]"):
        launched(True, "cpu")


def test_a_gpu_that_is_named_cannot_be_everyones():
    assert Processes(1, 2).own_device("cpu") == "cpu"
    assert ALONE.own_device("cuda:3") == "cuda:3"
    with pytest.raises(ValueError, match="a GPU of its own; got 'cuda:0'"):
        Processes(1, 2).own_device("cuda:0")


def test_distributed_is_checked_and_not_saved(cells, tmp_path):
    with pytest.raises(ValueError, match="distributed: expected True or False; got 'yes'"):
        CFGen(distributed="yes").fit(cells.X, cells.labels)
    model = CFGen(n_latent=2, max_epochs=1, device="cpu").fit(cells.X, cells.labels)
    model.distributed = True  # as if it had been
    model.save(tmp_path / "model")
    assert CFGen.load(tmp_path / "model").distributed is False


def test_shares_of_blocks_are_the_cells_that_one_process_generates(trained):
    labels = np.repeat(["B", "T"], 2000)
    whole = trained.generate(labels, random_state=5)
    shares = [
        list(trained.generate_blocks(labels, random_state=5, share=(which, 3)))
        for which in range(3)
    ]
    assert [len(blocks) for blocks in shares] == [1, 1, 2]
    stacked = np.concatenate([b.toarray() for blocks in shares for b in blocks])
    np.testing.assert_array_equal(stacked, whole.toarray())
    empty = list(trained.generate_blocks(["B"], share=(0, 2)))
    assert [block.shape for block in empty] == [(0, trained.n_features_in_)]
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="share: expected"):
            trained.generate_blocks(labels, share=share)


# ----------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    """A file of cells, and a model of them."""
    made = tmp_path_factory.mktemp("processes")
    cells = simulate({"B": 80, "NK": 12, "T": 58})
    adata = anndata.AnnData(cells.X, obs={"cell_type": cells.labels, "donor": cells.donors})
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"gene{i}" for i in range(adata.n_vars)]
    adata.write_h5ad(made / "in.h5ad")
    for container, format in (("dense", cells.X.toarray()), ("csc", cells.X.tocsc())):
        adata.X = format
        adata.write_h5ad(made / f"in-{container}.h5ad")
    trained.save(made / "model")
    return made


@pytest.fixture(scope="module")
def results(folder):
    """What came out of one process, and of each of three that `torchrun` started."""
    pytest.importorskip("lightning_fabric")
    script = HERE / "several_processes.py"
    run(script, folder, "alone", "alone")
    run(*TORCHRUN, "3", script, folder, "three", "distributed")
    names = ("alone-0", "three-0", "three-1", "three-2")
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def test_processes_know_each_other(results):
    assert [made["size"] for made in results] == [1, 3, 3, 3]
    assert [made["share"] for made in results] == [[0, 7], [0, 2], [2, 4], [4, 7]]
    assert [made["agreed"] for made in results[1:]] == ["from 0"] * 3


def test_shared_batch_norm_is_that_of_the_whole_minibatch(results):
    alone, *several = (made["batch norm"] for made in results)
    for found in several:
        for expected, got in zip(alone, found, strict=True):
            assert expected.keys() == got.keys()
            for name in expected:
                np.testing.assert_allclose(
                    got[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name
                )


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("trained", 5e-3),
        ("on disk", 5e-3),
        ("no held-out", 5e-3),
        ("gene-label", 5e-3),
        ("gaussian", 5e-3),
        ("tiny", 5e-2),
    ],
)
def test_training_together_is_training_alone(results, case, tolerance):
    alone, first, *others = (made[case] for made in results)
    for losses, expected in zip(first["losses"], alone["losses"], strict=True):
        np.testing.assert_allclose(losses, expected, rtol=0.2 * tolerance)
    assert first["best"] == alone["best"]
    # Biases before a batch norm do nothing: AdamW makes steps out of the rounding of their
    # gradients, and they shift the latents as a whole.
    found, expected = (np.array(made["latents"]) for made in (first, alone))
    assert distance(found - found.mean(axis=0), expected - expected.mean(axis=0)) < tolerance
    free = {f"autoencoder.{x}.bias" for x in ("encoder.0", "encoder.3", "encoder.6")}
    free |= {f"autoencoder.{x}.bias" for x in ("decoder.0", "decoder.3")} | {"latent_mean"}
    names = [n for n in alone["weights"] if n not in free and "running_mean" not in n]
    found, expected = (
        np.concatenate([np.ravel(made["weights"][name]) for name in names])
        for made in (first, alone)
    )
    assert distance(found, expected) < tolerance
    # To the last bit, or processes would drift apart.
    assert others == [first, first]
    assert first["layers"] == alone["layers"]


def test_counts_are_split_in_each_process_and_all_learn_alike(results):
    alone, first, *others = (made["splitting"] for made in results)
    assert others == [first, first]
    for losses, expected in zip(first["losses"], alone["losses"], strict=True):
        np.testing.assert_allclose(losses, expected, rtol=0.15)
        assert losses != expected


def distance(found, expected):
    """Relative to what is expected, all entries together."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("container", ["dense", "csc"])
def test_files_of_every_format_are_written_together(results, folder, container):
    assert all(made[container] == results[0][container] for made in results)
    assert results[0][container][:2] == [300, True]
    expected, found = (
        anndata.read_h5ad(folder / f"{name}-{container}.h5ad") for name in ("alone", "three")
    )
    assert_same(found, expected)


def test_without_a_seed_processes_take_the_same(results):
    assert len({made["unseeded"] for made in results[1:]}) == 1


def test_the_first_process_repeats_what_others_warn_of(results):
    assert results[1]["warned"] == ["same", "of 0", "of 1", "of 2"]
    assert results[2]["warned"] == results[3]["warned"] == []


def test_a_failure_in_one_process_is_one_in_all(results, folder):
    for made in (results[1], results[3]):
        assert made["failing shard"] == "RuntimeError: process 1 of 3 failed: disk full"
    assert results[2]["failing shard"] == "OSError: disk full"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_command_under_torchrun_writes_the_file_of_one_process(folder, tmp_path):
    pytest.importorskip("lightning_fabric")
    options = ["--label-key", "cell_type", "--donor-key", "donor", "--target-size", "4_000"]
    options += ["--model", str(folder / "model"), "--seed", "3", "--device", "cpu"]
    alone, together = tmp_path / "alone.h5ad", tmp_path / "together.h5ad"
    expected = run("-m", "cfgen_augment.cli", folder / "in.h5ad", alone, *options)
    command = ("-m", "cfgen_augment.cli", folder / "in.h5ad", together, *options)
    done = run(*TORCHRUN, "2", *command, "--distributed")
    assert done.stdout.replace("together", "alone") == expected.stdout
    assert_same(anndata.read_h5ad(together), anndata.read_h5ad(alone))
    assert sorted(path.name for path in tmp_path.iterdir()) == [alone.name, together.name]


def test_srun_starts_the_command_too(folder, tmp_path):
    pytest.importorskip("lightning_fabric")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--label-key", "cell_type", "--target-size", "300", "--max-epochs", "2"]
    options += ["--seed", "0", "--device", "cpu", "--distributed"]
    options += ["--save-model", str(tmp_path / "model")]
    places = [str(folder / "in.h5ad"), str(tmp_path / "out.h5ad")]
    # What srun tells the processes that it starts.
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "augment",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cfgen_augment.cli", *places, *options],
            env=environment(**slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=180) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert not told[1][0]
    assert "synthetic" in told[0][0]
    assert "autoencoder" not in told[1][1]
    assert "autoencoder" in told[0][1]  # the progress bar

    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    # Not the same cells: each process has split the counts of its own.
    expected = augment(
        anndata.read_h5ad(folder / "in.h5ad"),
        "cell_type",
        target_size=300,
        max_epochs=2,
        random_state=0,
        device="cpu",
    )
    assert written.obs["cell_type"].tolist() == expected.obs["cell_type"].tolist()
    np.testing.assert_equal(dict(written.uns), dict(expected.uns))
    means = [np.asarray(made.X[150:].mean(axis=0)).ravel() for made in (written, expected)]
    assert np.corrcoef(*means)[0, 1] > 0.95
    model = CFGen.load(tmp_path / "model")
    np.testing.assert_allclose(
        model.generate(["B"] * 50, random_state=1).mean(), written.X.mean(), rtol=0.5
    )
