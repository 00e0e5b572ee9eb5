"""Train, make, compare: a file per finished seed and model, so that a rerun goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from threadpoolctl import threadpool_limits

from benchmarks.cost import measured
from benchmarks.hardware import hardware
from benchmarks.results import commit, versions, write_json
from benchmarks.tables.cells import ATAC, RNA, Measured, split
from benchmarks.tables.models import Job, Made, Model
from benchmarks.tables.spaces import Space, log_space, spaces, tf_idf_space

TRANSFORMS = {RNA: log_space, ATAC: tf_idf_space}
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Design:
    """What results depend on, besides models and seeds, which may grow between runs.

    Attributes
    ----------
    table
        1 or 2.
    data, label_key, layer, min_cells
        As for `benchmarks.tables.cells.read`.
    held_out
        Share of every type's cells that is held out.
    """

    table: int
    data: str
    label_key: str | None
    layer: str | None
    min_cells: int | None
    held_out: float

    def __post_init__(self) -> None:
        if not 0 < self.held_out <= 0.5:
            raise ValueError(
                "--held-out: expected a number above 0 and at most .5, because the row of real "
                f"cells takes as many training cells as are held out; got {self.held_out}."
            )


def open_results(
    out: Path, design: Design, cells: Measured, command: str, models: Mapping[str, Model]
) -> dict[str, Any]:
    """Manifest of the directory, made if there is none.

    Raises
    ------
    FileExistsError
        If the directory holds results of another design or of other data.
    """
    told = asdict(design) | {"data": Path(design.data).name}
    about = {
        "n_cells": len(cells),
        "n_features": {name: int(values.shape[1]) for name, values in cells.counts.items()},
        "types": cells.sizes(),
        "total": {name: int(values.sum()) for name, values in cells.counts.items()},
    }
    before: dict[str, Any] = {}
    if (out / _MANIFEST).exists():
        before = json.loads((out / _MANIFEST).read_text(encoding="utf-8"))
        if (before["design"], before["about"]) != (told, about):
            raise FileExistsError(
                f"{out}: expected no results, or ones of the same design and data; it holds those "
                f"of {before['command'][-1]!r}. Choose another --out."
            )
    earlier = before.get("models", {})
    # A command that names all that was named before makes all of it again, whatever was there.
    commands = [] if set(earlier) <= set(models) else before["command"]
    manifest = {
        "design": told,
        "about": about,
        "command": [*(c for c in commands if c != command), command],
        "models": earlier | {name: model.about for name, model in models.items()},
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
    }
    write_json(out / _MANIFEST, manifest)
    return manifest


def read_manifest(out: Path) -> dict[str, Any]:
    """Manifest of results of ``python -m benchmarks tables``.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    path = out / _MANIFEST
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "design" not in document:
        raise FileNotFoundError(
            f"{out}: expected results of 'python -m benchmarks tables'; there are none."
        )
    return document


def part_path(out: Path, seed: int, name: str) -> Path:
    """File of what is finished."""
    return out / "parts" / f"seed{seed}_{name}.json"


def cells_path(out: Path, name: str, modality: str) -> Path:
    """File of the cells that a model made with the first seed."""
    return out / "cells" / f"{name}_{modality}.npz"


def work(
    cells: Measured,
    design: Design,
    models: Mapping[str, Model],
    seeds: int,
    out: Path,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Do all that is not finished, seed by seed.

    A model that fails is told, leaves no part, and does not keep the others from going on; a rerun
    tries it again. The cells of the first seed are kept for figures.

    Returns
    -------
    dict
        What went wrong, by part.
    """
    failures: dict[str, str] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            for seed in range(seeds):
                missing = [name for name in models if not part_path(out, seed, name).exists()]
                if missing:
                    _one_seed(
                        cells, design, {n: models[n] for n in missing}, seed, out, say, failures
                    )
    finally:
        torch.set_num_threads(before)
    return failures


def _one_seed(
    cells: Measured,
    design: Design,
    models: Mapping[str, Model],
    seed: int,
    out: Path,
    say: Callable[[str], None],
    failures: dict[str, str],
) -> None:
    training, held_out = split(cells, design.held_out, seed)
    job = Job(training, held_out.sizes(), seed)
    views = spaces(held_out.counts, held_out.labels, TRANSFORMS, seed)
    if seed == 0:
        _keep(out, "held-out", Made(held_out.counts, held_out.labels))
    # Models that share what is trained follow each other, however they were named.
    families: dict[Any, list[str]] = {}
    for name, model in models.items():
        families.setdefault(model.fit or name, []).append(name)
    for names in families.values():
        fit = models[names[0]].fit
        start = time.monotonic()
        try:
            with measured() as fit_cost:
                fitted = None if fit is None else fit(job)
        except Exception as error:  # told, not hidden, see `work`
            for name in names:
                failures[f"{name}, seed {seed}"] = f"{type(error).__name__}: {error}"
            say(f"{', '.join(names)}, seed {seed}: failed, {failures[f'{names[0]}, seed {seed}']}")
            continue
        for name in names:
            try:
                with measured() as make_cost:
                    made = models[name].make(job, fitted)
                rows = _compare(views, made)
            except Exception as error:
                failures[f"{name}, seed {seed}"] = f"{type(error).__name__}: {error}"
                say(f"{name}, seed {seed}: failed, {failures[f'{name}, seed {seed}']}")
                continue
            if seed == 0:
                _keep(out, name, made)
            costs = {"fit": asdict(fit_cost), "make": asdict(make_cost)}
            document = {"seed": seed, "model": name, "costs": costs, "rows": rows}
            write_json(part_path(out, seed, name), document | {"commit": commit()})
            say(f"{name}, seed {seed}: {time.monotonic() - start:.0f} s")


def _compare(views: Mapping[str, Space], made: Made) -> list[dict[str, Any]]:
    return [
        {"modality": modality, **row}
        for modality, values in made.values.items()
        for row in views[modality].compare(values, made.labels, transformed=made.logged)
    ]


def _keep(out: Path, name: str, made: Made) -> None:
    for modality, values in made.values.items():
        path = cells_path(out, name, modality)
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = np.array([], dtype=str) if made.labels is None else made.labels.astype(str)
        np.savez_compressed(
            path,
            data=values.data.astype(np.float32),
            indices=values.indices.astype(np.int32),
            indptr=values.indptr.astype(np.int64),
            shape=np.array(values.shape),
            labels=labels,
            logged=np.array(made.logged),
        )


def kept(out: Path, name: str, modality: str) -> Made | None:
    """Cells that a model made with the first seed; None if there are none."""
    path = cells_path(out, name, modality)
    if not path.exists():
        return None
    with np.load(path) as held:
        values = sparse.csr_matrix(
            (held["data"], held["indices"], held["indptr"]), shape=tuple(held["shape"])
        )
        labels = held["labels"] if len(held["labels"]) else None
        return Made({modality: values}, labels, bool(held["logged"]))


def collect(out: Path) -> list[dict[str, Any]]:
    """Rows of all finished parts."""
    rows = []
    for path in sorted((out / "parts").glob("seed*_*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        seconds = part["costs"]["fit"]["seconds"] + part["costs"]["make"]["seconds"]
        rows += [
            {"model": part["model"], "seed": part["seed"], "seconds": seconds, **row}
            for row in part["rows"]
        ]
    return rows
