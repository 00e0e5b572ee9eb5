"""Roughly how long a run takes and how much memory, said before it starts.

Seconds were measured on Kang (about 8,300 training cells, as many new ones, 1,287 genes), one
thread of a 2-core machine, and are scaled by cells x genes. They are for planning: other
machines differ by a factor of two or three, and the time left that a run shows comes from the
run itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.arms import ARMS, Arm
from benchmarks.cells import Cells
from benchmarks.settings import Settings
from cfgen_augment.allocation import total_after

if TYPE_CHECKING:
    from benchmarks.run import Task

_REFERENCE = 16_600 * 1_287  # cells x genes that the seconds below belong to
_EVALUATION = 9.0
_MAKE = 2.0
_FIT = {"cfgen": 70.0, "cfgen-donors": 75.0, "scdiffusion": 130.0, "wgan": 140.0, "scvi": 140.0}
_FIT["scanvi"] = 170.0
_PROCESS_MB = 700  # an interpreter with torch, scikit-learn and scanpy
_COPIES = 6  # of the cells: counts, log values, both stacked with the new ones, a classifier's own


def seconds_per_task(
    cells: Cells, settings: Settings, table: Mapping[str, Arm] = ARMS
) -> Callable[[Task], float]:
    """How long a task is expected to take on one core.

    Parameters
    ----------
    cells
        All cells.
    settings
        Of the run; scGPT is timed on a few cells right now.
    table
        What the names of arms mean; one that trains takes as long as CFGen unless known.
    """
    after = _cells_after(cells, settings)
    scale = after * min(len(cells.genes), settings.n_genes) / _REFERENCE
    embedding = 0.0
    if settings.scgpt_dir is not None and "scgpt" in settings.embedders:
        embedding = _scgpt_seconds_per_cell(cells, settings) * after / 2

    def seconds(task: Task) -> float:
        each = _EVALUATION + _MAKE
        own = sum(each * scale + embedding * (not table[a].seedless) for a in task.arms)
        name = task.arms[0]
        fit = _FIT.get(name, _FIT["cfgen"] if table[name].fit else 0.0)
        return own + fit * scale

    return seconds


def memory_mb(cells: Cells, settings: Settings) -> float:
    """Peak resident memory that one process is expected to need, in MiB."""
    bytes_per_cell = 8 * cells.counts.nnz / max(len(cells), 1)
    return _PROCESS_MB + _COPIES * bytes_per_cell * _cells_after(cells, settings) / 2**20


def jobs(process_mb: float, n_tasks: int) -> int:
    """Processes to run at a time: one per core, fewer if memory or work is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, n_tasks, int(0.8 * _available_mb() / process_mb)))


def _cells_after(cells: Cells, settings: Settings) -> int:
    train = round(len(cells) * (1 - settings.held_out))
    target = settings.target_size
    return max(train, total_after(train, target) if isinstance(target, float) else target)


def _available_mb() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def _scgpt_seconds_per_cell(cells: Cells, settings: Settings, n: int = 64) -> float:
    from benchmarks.embedders import scgpt_embedding
    from benchmarks.scgpt.checkpoint import load

    rows: Sequence[int] = np.linspace(0, len(cells) - 1, min(n, len(cells))).astype(int).tolist()
    checkpoint = load(str(settings.scgpt_dir))
    values = cells.counts[rows]
    start = time.perf_counter()
    scgpt_embedding(checkpoint, values, cells.genes, seed=settings.seed)
    return (time.perf_counter() - start) / len(rows)
