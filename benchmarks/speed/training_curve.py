"""Training: held-out likelihood against seconds, and steps against their matrix products.

    python -m benchmarks.speed.training_curve --data cells.h5ad --label-key cell_type

Two recipes in one run, by turns. ``present`` is what `CFGen` does by default. ``reference`` is how
the reference implementation trains, with our parts: the plain density on the dense block, learning
rate 1e-3 throughout, 256 cells a batch, an unfused optimiser, and the loss read in every step.
Held-out losses are of both on whole counts and without the classifier of labels, for only equal
losses compare; step times are with them. Seconds leave out the measurement of held-out losses.
Seconds on a busy machine tell little; ratios are medians over rounds in which the recipes and the
matrix products take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.data import load
from benchmarks.hardware import hardware
from benchmarks.realism import to_markdown
from benchmarks.speed.floor import training_products
from cfgen_augment import CFGen, stages, training
from cfgen_augment.autoencoder import Autoencoder
from cfgen_augment.counts import CellMatrix, check_cells, feature_moments, total_counts
from cfgen_augment.flow import VelocityField, drop_attributes, flow_matching_loss
from cfgen_augment.likelihoods import Likelihood, NegativeBinomial
from cfgen_augment.minibatch import Minibatch
from cfgen_augment.modalities import Modality, hidden_widths
from cfgen_augment.training import Schedule, hold_out, initialise

RECIPES = ("present", "reference")
_CPU = torch.device("cpu")
_REFERENCE_BATCH = 256
_REFERENCE_RATE = 1e-3


@dataclass(frozen=True)
class Problem:
    """Cells to train on and to measure by, split as `CFGen.fit` splits them."""

    X: CellMatrix
    labels: NDArray[np.int64]
    totals: NDArray[np.float64]
    rows: NDArray[np.intp]
    held_out: NDArray[np.intp]

    @classmethod
    def of(cls, X: CellMatrix, labels: NDArray[np.int64], seed: int = 0) -> Problem:
        """Hold out a tenth of every label."""
        X = check_cells(X, "count", n_min=2)
        rows, held_out = hold_out(labels, 0.1, np.random.default_rng(seed))
        return cls(X, labels, total_counts(X), rows, held_out)

    def autoencoder(self) -> Autoencoder:
        """The default autoencoder for these cells, no weights set."""
        model = CFGen()
        with torch.device("meta"):
            made = Autoencoder(
                [NegativeBinomial(self.X.shape[1])],
                [self.X.shape[1]],
                model.n_latent,
                hidden_widths(model.hidden, [Modality(None, "nb", self.X.shape[1])]),
                n_labels=int(self.labels.max()) + 1,
            )
        return made.to_empty(device="cpu")

    def schedules(self, recipe: str, reference_epochs: int) -> tuple[Schedule, Schedule]:
        """Schedules of the autoencoder and of the flow."""
        if recipe == "present":
            return CFGen()._schedules(len(self.rows))
        reference = Schedule(_REFERENCE_RATE, reference_epochs, _REFERENCE_BATCH, reference_epochs)
        return reference, reference


def _reference_step(
    module: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, *_: object
) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return torch.tensor(loss.item())


def _reference_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-5, fused=False)


@contextmanager
def trained_as(recipe: str) -> Iterator[None]:
    """Put the parts of a recipe in place."""
    if recipe == "present":
        yield
        return
    with (
        mock.patch.object(NegativeBinomial, "loss", Likelihood.loss),
        mock.patch.object(training, "annealed", return_value=1.0),
        mock.patch.object(training, "descend", _reference_step),
        mock.patch.object(stages, "autoencoder_optimizer", _reference_optimizer),
    ):
        yield


def curve(problem: Problem, recipe: str, schedule: Schedule, seed: int) -> pd.DataFrame:
    """Held-out loss of every epoch, nats per entry, with the steps and seconds spent so far."""
    spent = np.zeros(2)
    rows: list[dict[str, Any]] = []
    train = training.train

    def clocks() -> NDArray[np.float64]:
        return np.array([time.process_time(), time.perf_counter()])

    def timed(module: nn.Module, loss: Any, validate: Callable[[], float], **rest: Any) -> Any:
        since = clocks()

        def timed_validate() -> float:
            nonlocal since, spent
            spent = spent + clocks() - since
            value = validate()
            rows.append({"CPU s": spent[0], "wall s": spent[1], "held-out": value})
            since = clocks()
            return value

        return train(module, loss, timed_validate, **rest)

    # The curve is the network's; its dispersion settles afterwards, which the reference has not.
    settled = mock.patch.object(stages, "_settle_noise")
    with trained_as(recipe), settled, mock.patch.object(stages, "train", timed):
        stages.train_autoencoder(
            problem.autoencoder(),
            [problem.X],
            problem.labels,
            problem.totals[:, None],
            count_splitting=False,
            label_weight=0.0,
            rows=problem.rows,
            held_out=problem.held_out,
            schedule=schedule,
            device=_CPU,
            random=np.random.default_rng(seed),
            verbose=False,
        )
    table = pd.DataFrame(rows)
    per_epoch = -(-len(problem.rows) // schedule.batch_size)
    table.insert(0, "steps", per_epoch * np.arange(1, len(table) + 1))
    table.insert(0, "seed", seed)
    table.insert(0, "recipe", recipe)
    return table


@dataclass(frozen=True)
class Stage:
    """One stage of training, ready to take steps."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]

    def step(self) -> None:
        """Draw a batch and descend."""
        training.descend(self.module, self.loss(), self.optimizer)


def autoencoder_stage(problem: Problem, batch_size: int, present: bool) -> Stage:
    """The autoencoder on random batches, in the recipe that is in place."""
    random = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    label_weight = CFGen().label_weight if present else 0.0
    model = problem.autoencoder()
    initialise(model, torch.Generator().manual_seed(0))
    model.start_at([feature_moments(problem.X)], [problem.totals])
    log_totals = torch.as_tensor(np.log(problem.totals), dtype=torch.float32)[:, None]
    labels = torch.as_tensor(problem.labels)

    def loss() -> Tensor:
        rows = random.choice(problem.rows, min(batch_size, len(problem.rows)), replace=False)
        at = torch.from_numpy(rows)
        x, size, seen = Minibatch.of(problem.X, rows, "count", _CPU), log_totals[at], None
        if present:
            seen, x = x.split(generator)
            size = x.log_totals()
        parts = None if seen is None else [seen]
        return model.loss([x], [size], labels[at], seen=parts, label_weight=label_weight)

    return Stage(model, stages.autoencoder_optimizer(model, 1e-3), loss)


def flow_stage(problem: Problem, batch_size: int, fused: bool) -> Stage:
    """The flow on random latents, which cost what real ones do."""
    model = CFGen()
    field = VelocityField(
        model.n_latent,
        [int(problem.labels.max()) + 1],
        width=model.flow_width,
        n_blocks=model.flow_blocks,
        n_embedding=model.flow_width,
        n_size_factors=1,
    )
    generator = torch.Generator().manual_seed(0)
    initialise(field, generator)
    latents = torch.randn(batch_size, model.n_latent, generator=generator)
    codes = torch.as_tensor(np.resize(problem.labels, batch_size) + 1)[:, None]
    size = torch.rand(batch_size, 1, generator=generator)

    def loss() -> Tensor:
        given = drop_attributes(codes, model.attribute_dropout, generator)
        return flow_matching_loss(field, latents, given, size, generator)

    return Stage(field, torch.optim.AdamW(field.parameters(), lr=1e-3, fused=fused), loss)


def step_table(problem: Problem, rounds: int) -> pd.DataFrame:
    """CPU milliseconds of a step and of its matrix products, medians, and of their ratio."""
    timed: dict[tuple[str, str, int], tuple[str, Callable[[], None], Callable[[], None]]] = {}
    for recipe in RECIPES:
        sizes = [schedule.batch_size for schedule in problem.schedules(recipe, 1)]
        with trained_as(recipe):
            made = {
                ("autoencoder", sizes[0]): autoencoder_stage(
                    problem, sizes[0], recipe == "present"
                ),
                ("flow", sizes[1]): flow_stage(problem, sizes[1], fused=recipe == "present"),
            }
            for (name, size), stage in made.items():
                floor = training_products(stage.module, stage.loss)
                timed[name, recipe, size] = recipe, stage.step, floor

    def cpu_ms(run: Callable[[], None]) -> float:
        since = time.process_time()
        run()
        return 1e3 * (time.process_time() - since)

    measured: dict[tuple[str, str, int], list[tuple[float, float]]] = {key: [] for key in timed}
    for _ in range(rounds + 3):  # the first three warm up
        for key, (recipe, step, floor) in timed.items():
            with trained_as(recipe):
                measured[key].append((cpu_ms(step), cpu_ms(floor)))
    rows = []
    for (name, recipe, size), times in sorted(measured.items()):
        step_ms, floor_ms = np.array(times[3:]).T
        rows.append(
            {
                "stage": name,
                "recipe": recipe,
                "batch": size,
                "step ms": float(np.median(step_ms)),
                "products ms": float(np.median(floor_ms)),
                "ratio": float(np.median(step_ms / floor_ms)),
            }
        )
    return pd.DataFrame(rows).set_index("stage")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo", help="h5ad file of raw counts, or 'demo'")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--cells", type=int, help="train on a random part of so many cells")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="of the step times")
    parser.add_argument("--reference-epochs", type=int, default=60, help="the reference's are 300")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    adata = load(given.data)
    labels = np.unique(adata.obs[given.label_key].astype(str), return_inverse=True)[1]
    chosen = np.arange(adata.n_obs)
    if given.cells is not None and given.cells < adata.n_obs:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, given.cells, replace=False))
    problem = Problem.of(adata.X[chosen], labels[chosen])

    print(to_markdown(step_table(problem, given.rounds), digits=2), flush=True)
    ends = []
    for seed in range(given.seeds):
        for recipe in RECIPES:
            schedule = problem.schedules(recipe, given.reference_epochs)[0]
            table = curve(problem, recipe, schedule, seed)
            shown = table.iloc[np.unique(np.linspace(0, len(table) - 1, 13).astype(int))]
            print("\n" + to_markdown(shown.set_index("recipe"), digits=4), flush=True)
            best = table.loc[table["held-out"].idxmin()]
            ends.append({**best, "CPU s in all": table["CPU s"].iloc[-1]})
    print("\nBest held-out loss, when it was reached, and when training ended:\n")
    print(to_markdown(pd.DataFrame(ends).set_index("recipe"), digits=4))
    print(f"\n{len(chosen):,} cells of {given.data.rsplit('/', 1)[-1]}; {hardware()}")


if __name__ == "__main__":
    main()
