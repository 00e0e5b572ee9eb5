"""What each choice of the defaults is worth, by quantities that need no test data.

    python -m benchmarks.ablation --data cells.h5ad --label-key cell_type --seeds 3

Every row changes one thing. Held-out losses are on the part of the training cells that early
stopping looks at; realism is the largest difference over types with 200 cells or more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.data import load
from benchmarks.hardware import hardware
from benchmarks.realism import compare, to_markdown
from benchmarks.speed.reference import thousandfold
from cfgen_augment import CFGen, flow, likelihoods, stages, training

EMA_DECAY = 0.999


@contextmanager
def averaged_flow() -> Iterator[None]:
    """Train the flow with an exponential moving average of its weights, kept at the end."""
    original = training.train

    def train(module: torch.nn.Module, *arguments: object, **options: object) -> object:
        if options["description"] != "flow":
            return original(module, *arguments, **options)  # type: ignore[arg-type]
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        handle = register_optimizer_step_post_hook(lambda *_: average.update_parameters(module))
        history = original(module, *arguments, **options)  # type: ignore[arg-type]
        handle.remove()
        module.load_state_dict(average.module.state_dict())
        with torch.no_grad():
            history.validation[history.best_epoch] = arguments[1]()  # type: ignore[operator]
        return history

    with mock.patch.object(stages, "train", train):
        yield


@contextmanager
def unsettled_dispersion() -> Iterator[None]:
    """Leave the dispersion where it was when the network was best."""
    with mock.patch.object(stages, "_settle_noise"):
        yield


@contextmanager
def one_speed() -> Iterator[None]:
    """Learn rare features as fast as common ones."""

    def ones(_: likelihoods.Likelihood, mean: np.ndarray) -> torch.Tensor:
        return torch.ones(len(mean))

    with mock.patch.object(likelihoods.Likelihood, "speeds", ones):
        yield


@contextmanager
def rough_in_time() -> Iterator[None]:
    """Embed time and size as sinusoids of 1000 times their value, as the reference does."""
    with mock.patch.object(flow._ScalarEmbedding, "forward", thousandfold):
        yield


@contextmanager
def unchanged() -> Iterator[None]:
    """Change nothing."""
    yield


ARMS = {
    "defaults": (unchanged, {}),
    "dispersion not settled": (unsettled_dispersion, {}),
    "all genes learned at one speed": (one_speed, {}),
    "dispersion per label and gene": (unchanged, {"dispersion": "gene-label"}),
    "flow does not see the size factor": (unchanged, {"condition_on_size_factor": False}),
    "moving average of flow weights": (averaged_flow, {}),
    "time embedded as 1000 t": (rough_in_time, {}),
    "three blocks": (unchanged, {"flow_blocks": 3}),
    "flow width 256": (unchanged, {"flow_width": 256}),
    "latent width 20": (unchanged, {"n_latent": 20}),
    "learning rate 1e-3": (unchanged, {"learning_rate": 1e-3}),
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo", help="h5ad file, or 'demo'")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    given = parser.parse_args()
    adata = load(given.data)
    X, labels = adata.X.tocsr(), adata.obs[given.label_key].astype(str).to_numpy()
    rows = []
    for arm in given.arms:
        change, parameters = ARMS[arm]
        for seed in range(given.seeds):
            with change():
                fitted = CFGen(random_state=seed, **parameters).fit(X, labels)  # type: ignore[arg-type]
            table = compare(X, labels, fitted.generate(labels, random_state=seed), labels)
            common = table[table["real"] >= 200]
            history = fitted.history_
            trained = history["flow"]
            rows.append(
                {
                    "change": arm,
                    "AE loss": min(history["autoencoder"].validation),
                    "flow loss": trained.validation[trained.best_epoch],
                    "worst corr": common["mean corr"].min(),
                    "zeros": common["zeros diff"].abs().max(),
                    "slope": common["slope diff"].abs().max(),
                    "totals KS": common["totals KS"].max(),
                }
            )
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=seed == 0), flush=True)
    groups = pd.DataFrame(rows).groupby("change", sort=False)
    cells = groups.mean().map("{:.4f}".format) + " ± " + groups.std().map("{:.4f}".format)
    print(f"\nmean ± standard deviation over {given.seeds} seeds\n")
    print(to_markdown(cells))
    print(f"\n{given.data.rsplit('/', 1)[-1]}; {hardware()}")


if __name__ == "__main__":
    main()
