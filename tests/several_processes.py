"""What `test_processes` runs, alone and in several processes; writes what came out as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import simulate
from torch import nn

from cfgen_augment import CFGen, augment_file, files, stored, writing
from cfgen_augment.processes import Processes, launched

CELLS = simulate({"B": 80, "NK": 12, "T": 58})


def trained(together: Processes, X, **parameters) -> dict:
    # Processes split the counts of their own cells, in ways of their own.
    exact = {"random_state": 0, "max_epochs": (6, 6), "batch_size": 50, "count_splitting": False}
    parameters = exact | parameters
    model = CFGen(n_latent=8, device="cpu", distributed=together.size > 1, **parameters)
    model.fit(X, CELLS.labels, covariates={"donor": CELLS.donors})
    weights = {name: w.double() for name, w in model.network_.state_dict().items()}
    return {
        "losses": [
            losses
            for history in model.history_.values()
            for losses in (history.training, history.validation)
        ],
        "best": [history.best_epoch for history in model.history_.values()],
        "checksum": sum(float(w.sum()) for w in weights.values()),
        "weights": {name: w.tolist() for name, w in weights.items()},
        "layers": sorted({type(layer).__name__ for layer in model.network_.modules()}),
        "latents": model.encode(CELLS.X).tolist(),
    }


def batch_norm(together: Processes, n: int) -> dict:
    """Outputs, gradients and moments of a minibatch of `n`, of which processes have shares."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)) * 2.0 + 30.0
    weight = torch.linspace(-1.0, 2.0, 3 * n).reshape(n, 3)
    share = together.share(n)
    layer = nn.BatchNorm1d(3)
    module = nn.Sequential(layer)
    own = x[share].requires_grad_()
    with together.whole_minibatches(module):
        out = module(own)
    (out.square() * weight[share]).sum().backward()
    together.sum_gradients(module)
    assert module[0] is layer
    return {
        "out": np.concatenate(together.gather(out.detach().numpy())).tolist(),
        "by_x": np.concatenate(together.gather(own.grad.numpy())).tolist(),
        "by_weight": layer.weight.grad.tolist(),
        "by_bias": layer.bias.grad.tolist(),
        **{name: value.tolist() for name, value in layer.state_dict().items()},
    }


def failure(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def warned(together: Processes) -> list[str]:
    with warnings.catch_warnings(record=True) as heard, together.first_repeats():
        warnings.simplefilter("always")
        warnings.warn("same", UserWarning, stacklevel=1)
        warnings.warn(f"of {together.rank}", UserWarning, stacklevel=1)
    return [str(w.message) for w in heard]


def augmented(folder: Path, name: str, container: str, distributed: bool) -> list:
    """Augment a file; what every process is told of the result."""
    written = augment_file(
        folder / f"in-{container}.h5ad",
        folder / f"{name}-{container}.h5ad",
        "cell_type",
        target_size=300,  # a single block: some shares are empty
        generator=folder / "model",
        device="cpu",
        random_state=0,
        distributed=distributed,
    )
    return [written.n_obs, written.X is None, written.obs["cell_type"].tolist()]


def failing_shard(together: Processes, folder: Path) -> str:
    """Write a file while the second process cannot write its share."""
    output = folder / "never.h5ad"
    write_shard = writing.write_shard

    def full_disk(path, blocks):
        write_shard(path, blocks)
        if together.rank == 1:
            raise OSError("disk full")

    writing.write_shard = full_disk
    augmented = failure(
        partial(
            augment_file,
            *(folder / "in.h5ad", output, "cell_type"),
            generator=folder / "model",
            device="cpu",
            distributed=True,
        )
    )
    writing.write_shard = write_shard
    assert not output.exists()
    return augmented


def main(folder: Path, name: str, distributed: bool) -> None:
    together = launched(distributed, "cpu")
    stored._BUFFER_VALUES = 1500  # so that the file is read in several buffers
    made = {
        "size": together.size,
        "share": [together.share(7).start, together.share(7).stop],
        "agreed": together.agree(f"from {together.rank}"),
        "batch norm": [batch_norm(together, n) for n in (11, 2, 3)],
        "trained": trained(together, CELLS.X),
        # Minibatches of two cells, of which some process has none. Batch norm makes little
        # more than signs of two cells, and training for long would carry rounding far.
        "tiny": trained(
            *(together, CELLS.X),
            validation_fraction=0.9,
            batch_size=2,
            max_epochs=1,
            learning_rate=1e-4,
        ),
        # Nothing is held out: all cells say when to stop.
        "no held-out": trained(together, CELLS.X, validation_fraction=0.0, max_epochs=2),
        "splitting": trained(together, CELLS.X, count_splitting=True),
        "gene-label": trained(together, CELLS.X, dispersion="gene-label", max_epochs=2),
        "gaussian": trained(together, CELLS.X, likelihood="gaussian", max_epochs=2),
    }
    for container in ("dense", "csc"):
        made[container] = augmented(folder, name, container, distributed)
    with files.opened(folder / "in.h5ad") as adata:
        made["on disk"] = trained(together, adata.X)
    if together.size > 1:
        made |= {
            "unseeded": trained(together, CELLS.X, random_state=None, max_epochs=1)["checksum"],
            "warned": warned(together),
            "failing shard": failing_shard(together, folder),
        }
    (folder / f"{name}-{together.rank}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "distributed")
