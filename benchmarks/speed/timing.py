"""Times as ratios: what is compared takes turns in one process, and medians are taken of pairs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Work = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """Medians over repeats.

    Attributes
    ----------
    cpu, wall
        Seconds.
    ratio
        CPU seconds over those of the first work of the run, repeat by repeat.
    """

    cpu: float
    wall: float
    ratio: float


def interleaved(works: Mapping[str, Work], repeats: int) -> dict[str, Measured]:
    """Run every work in turn, `repeats` times after one round of warm-up.

    Parameters
    ----------
    works
        What to time, by name; ratios are to the first.
    repeats
        Rounds that count.
    """
    seconds = {name: np.zeros((repeats, 2)) for name in works}
    for repeat in range(-1, repeats):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            taken = time.process_time() - cpu, time.perf_counter() - wall
            if repeat >= 0:
                seconds[name][repeat] = taken
    first = next(iter(seconds.values()))[:, 0]
    return {
        name: Measured(
            cpu=float(np.median(taken[:, 0])),
            wall=float(np.median(taken[:, 1])),
            ratio=float(np.median(taken[:, 0] / first)),
        )
        for name, taken in seconds.items()
    }


def products(widths: Sequence[int], n_rows: int, *, backward: bool = False) -> Work:
    """The matrix products of linear layers of the given widths on `n_rows` rows, and no more.

    With `backward`, also those of the gradients of weights and, but for the first layer, inputs.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layers = [
        (random(n_rows, n_in), random(n_out, n_in), random(n_rows, n_out))
        for n_in, n_out in itertools.pairwise(widths)
    ]

    def work() -> None:
        with torch.inference_mode():
            for i, (x, weight, gradient) in enumerate(layers):
                x @ weight.T
                if backward:
                    gradient.T @ x
                    if i:
                        gradient @ weight

    return work


def repeated(work: Work, times: int) -> Work:
    """`work`, `times` times over."""

    def several() -> None:
        for _ in range(times):
            work()

    return several
