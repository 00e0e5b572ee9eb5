"""Run every arm on every split with every seed, in processes, and go on where a run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from threadpoolctl import threadpool_limits

from benchmarks.arms import ARMS, Arm
from benchmarks.cells import Cells, Training
from benchmarks.cost import Cost, measured
from benchmarks.data import load_cells
from benchmarks.evaluation import Prepared, as_records, evaluate, prepare, real_reference
from benchmarks.results import Costs, Part, write_part
from benchmarks.settings import Place, Settings
from benchmarks.splits import Split, inner_splits, make_splits


@dataclass(frozen=True)
class Task:
    """Parts that one process does in a row: arms that share a trained model."""

    split: int
    seed: int
    arms: tuple[str, ...]

    def parts(self) -> list[Part]:
        """The parts it is made of."""
        return [Part(self.split, self.seed, arm) for arm in self.arms]


@dataclass(frozen=True)
class Outcome:
    """What a task came to: seconds per finished part, and what went wrong in the others."""

    task: Task
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1)
def cells_of(settings: Settings) -> Cells:
    """The data, read once per process."""
    return load_cells(
        settings.data,
        label_key=settings.label_key,
        donor_key=settings.donor_key,
        layer=settings.layer,
    )


def splits_of(settings: Settings) -> list[Split]:
    """The splits: the same in every process."""
    make = inner_splits if settings.inner else make_splits
    return make(
        cells_of(settings),
        n_splits=settings.n_splits,
        held_out_fraction=settings.held_out,
        thin=dict(settings.thin),
        reserve=settings.reserve,
        seed=settings.seed,
    )


@lru_cache(maxsize=1)
def _prepared(settings: Settings, place: Place, split: int) -> Prepared:
    """A split's frozen parts; tasks come ordered by split, so one at a time is kept."""
    return prepare(
        cells_of(settings), splits_of(settings)[split], settings, place.out / "embeddings"
    )


def plan(
    n_splits: int,
    n_seeds: int,
    arms: Sequence[str],
    done: Iterable[Part],
    table: Mapping[str, Arm] = ARMS,
) -> list[Task]:
    """Tasks that are left, split by split.

    Parameters
    ----------
    n_splits, n_seeds
        Every split is done with every seed.
    arms
        Names, in the order of the tables. Arms without randomness get the first seed only.
    done
        Parts that are on disk already.
    table
        What the names mean.
    """
    done = set(done)
    tasks = []
    for split in range(n_splits):
        for seed in range(n_seeds):
            families: dict[Any, list[str]] = {}
            for arm in arms:
                if (seed and table[arm].seedless) or Part(split, seed, arm) in done:
                    continue
                families.setdefault(table[arm].fit or arm, []).append(arm)
            tasks += [Task(split, seed, tuple(names)) for names in families.values()]
    return tasks


def arm_seed(settings: Settings, split: int, seed: int) -> int:
    """Seed of an arm: the same for all arms of a split and seed, different everywhere else."""
    sequence = np.random.SeedSequence([settings.seed, split, seed])
    return int(sequence.generate_state(1)[0])


def work(settings: Settings, place: Place, task: Task, arms: Mapping[str, Arm] = ARMS) -> Outcome:
    """Do a task in this process and write each part as it is finished.

    An arm that fails is told in the outcome and leaves no part, so that the others go on and a
    rerun tries it again.
    """
    outcome = Outcome(task)
    threads = torch.get_num_threads()
    torch.set_num_threads(place.threads)
    try:
        with threadpool_limits(place.threads):
            prepared = _prepared(settings, place, task.split)
            training = prepared.training_with(arm_seed(settings, task.split, task.seed))
            try:
                fitted, fit_cost = _fit(arms[task.arms[0]], training)
            except Exception as error:  # told, not hidden: see `Outcome.failures`
                outcome.failures.update(dict.fromkeys(task.arms, _message(error)))
                return outcome
            for part in task.parts():
                try:
                    seconds = _one(
                        settings, place, part, arms[part.arm], prepared, training, fitted, fit_cost
                    )
                except Exception as error:
                    outcome.failures[part.arm] = _message(error)
                else:
                    outcome.seconds[part.arm] = seconds
    finally:
        torch.set_num_threads(threads)
    return outcome


def _fit(arm: Arm, training: Training) -> tuple[Any, Cost]:
    if arm.fit is None:
        return None, Cost()
    with measured() as cost:
        fitted = arm.fit(training)
    return fitted, cost


def _one(
    settings: Settings,
    place: Place,
    part: Part,
    arm: Arm,
    prepared: Prepared,
    training: Training,
    fitted: Any,
    fit_cost: Cost,
) -> float:
    start = time.perf_counter()
    with measured() as make_cost:
        new = arm.make(training) if arm.fit is None else arm.make(training, fitted)
    with measured() as evaluate_cost:
        tables = evaluate(prepared, new, settings)
    records = {name: as_records(frame) for name, frame in tables.items()}
    if arm.real:
        records["memorisation"] = []  # its cells are the non-members that others are held against
    for name in ("realism", "memorisation"):
        for record in records[name]:
            record["arm"] = part.arm
    if part.arm == "none":
        reference = as_records(real_reference(prepared, settings))
        records["realism"] = [{**record, "arm": "real"} for record in reference]
    write_part(place.out, part, records, Costs(fit_cost, make_cost, evaluate_cost))
    return time.perf_counter() - start


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def run(
    settings: Settings,
    place: Place,
    tasks: Sequence[Task],
    expected: Callable[[Task], float],
    say: Callable[[str], None],
    table: Mapping[str, Arm] = ARMS,
) -> dict[Part, str]:
    """Do all tasks, as many at a time as `place` has jobs.

    Parameters
    ----------
    settings, place
        What to do, and where.
    tasks
        From `plan`.
    expected
        Seconds that a task is expected to take; only proportions matter, for the time left.
    say
        Takes one line for every finished task.
    table
        What the names of arms mean.

    Returns
    -------
    dict
        What went wrong, by part; empty if nothing did.
    """
    failures: dict[Part, str] = {}
    start, done, total = time.monotonic(), 0.0, sum(map(expected, tasks))
    with parallel_config(backend="loky", inner_max_num_threads=place.threads):
        outcomes = Parallel(
            n_jobs=place.jobs, return_as="generator_unordered", pre_dispatch="2*n_jobs"
        )(
            delayed(work)(settings, place, task, {name: table[name] for name in task.arms})
            for task in tasks
        )
        for number, outcome in enumerate(outcomes, start=1):
            task = outcome.task
            done += expected(task)
            left = (time.monotonic() - start) * (total / done - 1)
            took = ", ".join(f"{arm} {seconds:.0f} s" for arm, seconds in outcome.seconds.items())
            for arm, message in outcome.failures.items():
                failures[Part(task.split, task.seed, arm)] = message
                took += f"{', ' if took else ''}{arm} FAILED: {message}"
            say(
                f"[{number}/{len(tasks)}] split {task.split} seed {task.seed}: {took}; "
                f"about {duration(left)} left"
            )
    return failures


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
