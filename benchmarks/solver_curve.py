"""Steps against error: how many steps a fixed-step solver needs on a trained field.

    python -m benchmarks.solver_curve --data cells.h5ad --label-key cell_type

The reference solution is rk4 with 400 steps from the same noise. Errors are root mean squares
over cells and latent dimensions, in units of the latents' standard deviation, and, after
decoding, of log mean expression over genes; the variance is that of all latents, over the
reference's. The fitted method rehearses on other noise. Adaptive dopri5 at 1e-5 is in the same
table.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import torch

from benchmarks.data import load
from benchmarks.hardware import hardware
from benchmarks.realism import to_markdown
from cfgen_augment import CFGen
from cfgen_augment.generation import Wanted
from cfgen_augment.solver import REHEARSAL_CELLS, TABLEAUS, Velocity, make_solver


@torch.inference_mode()
def curve(model: CFGen, labels: np.ndarray, steps: list[int], seed: int) -> pd.DataFrame:
    """Errors and network calls of every solver and number of steps."""
    network = model.network_
    codes = model.attributes_.encode({"label": labels}, len(labels))
    column, _ = model._size_factor_groups(codes)
    totals = model.size_factor_.sample(column, np.random.default_rng(seed))
    cells = Wanted(codes, totals, model._pooled(codes[:, 0], np.random.default_rng(seed)))
    terms = model.attributes_.terms(1.0, ["label"])
    velocity, noise = model._start(cells, terms, torch.Generator().manual_seed(seed))
    log_size = torch.zeros(len(labels), 1)

    def rehearse() -> tuple[Velocity, torch.Tensor]:
        some = cells[:REHEARSAL_CELLS]  # their conditions, with noise of their own
        return model._start(some, terms, torch.Generator().manual_seed(seed + 1))

    def solve(name: str, n_steps: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        calls = 0

        def counted(t: float, z: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return velocity(t, z)

        z = make_solver(name, n_steps, rehearse)(counted, noise)
        latents = network.latent_mean + network.latent_scale * z
        (mean,) = network.autoencoder.decode(latents, log_size)
        return z, mean, calls

    exact_z, exact_mean, _ = solve("rk4", 400)
    rows = []
    settings = [(solver, n) for solver in ("fitted", *TABLEAUS) for n in steps] + [("dopri5", 0)]
    for solver, n_steps in settings:
        z, mean, calls = solve(solver, n_steps)
        rows.append(
            {
                "solver": solver,
                "steps": n_steps or "adaptive",
                "network calls": calls,
                "latent error": (z - exact_z).square().mean().sqrt().item(),
                "variance": (z.var() / exact_z.var()).item(),
                "log-mean error": (mean - exact_mean).square().mean().sqrt().item(),
            }
        )
    return pd.DataFrame(rows).set_index("solver")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo", help="h5ad file, or 'demo'")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--model", help="directory of a saved model; trains one if not given")
    parser.add_argument("--cells", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    adata = load(given.data)
    labels = adata.obs[given.label_key].astype(str).to_numpy()
    model = (
        CFGen.load(given.model)
        if given.model
        else CFGen(random_state=given.seed).fit(adata.X, labels)
    )
    drawn = np.random.default_rng(given.seed).choice(labels, given.cells)
    table = curve(model, drawn, [2, 3, 4, 5, 7, 10, 20, 40], given.seed)
    print(to_markdown(table, digits=4))
    print(f"\n{given.cells:,} cells of {given.data.rsplit('/', 1)[-1]}; {hardware()}")


if __name__ == "__main__":
    main()
