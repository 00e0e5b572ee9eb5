"""Parts of the measurement: which there are, doing one, and what is on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from benchmarks.composition.depth import biology_at_depths, totals_of_donors
from benchmarks.composition.dispersion import dispersion
from benchmarks.composition.guidance import sweep
from benchmarks.composition.space import Space
from benchmarks.composition.transfer import transfer
from benchmarks.composition.unseen import unseen
from benchmarks.composition.world import World, load_world, variants
from benchmarks.cost import measured
from benchmarks.results import commit, write_json
from cfgen_augment import CFGen

#: Kinds of parts, in the order they are done in.
KINDS = ("unseen", "whole", "dispersion", "depth")

Tables = dict[str, list[dict[str, Any]]]


class Part(NamedTuple):
    """What is done once."""

    seed: int
    variant: str
    kind: str

    def path(self, out: Path) -> Path:
        """File of the finished part."""
        return out / "parts" / f"{self.variant}_{self.kind}_seed{self.seed}.json"


@dataclass(frozen=True)
class Question:
    """What results depend on, besides the seeds and kinds, which may grow between runs."""

    data: str
    label_key: str | None = None
    donor_key: str | None = None
    layer: str | None = None
    n_splits: int = 3

    def world(self, variant: str) -> World:
        """The cells, read once per process."""
        return load_world(self.data, variant, self.label_key, self.donor_key, self.layer)


def plan(question: Question, seeds: int, kinds: Sequence[str]) -> list[Part]:
    """All parts, those of the first seed first."""
    return [
        Part(seed, variant, kind)
        for seed in range(seeds)
        for kind in KINDS
        if kind in kinds
        for variant in variants(question.data)
    ]


def do(question: Question, out: Path, part: Part, threads: int) -> float:
    """Measure one part in this process, write it, and return its seconds."""
    torch.set_num_threads(threads)
    with threadpool_limits(threads), measured() as cost:
        tables = _tables(question.world(part.variant), part, question.n_splits)
    document = {
        **part._asdict(),
        "commit": commit(),
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "tables": tables,
    }
    write_json(part.path(out), _without_nan(document))
    return cost.seconds


def _tables(world: World, part: Part, n_splits: int) -> Tables:
    seed, cells = part.seed, world.cells
    if part.kind == "unseen":
        return {"unseen": unseen(world, seed)}
    if part.kind == "dispersion":
        return {"dispersion": dispersion(world, seed, n_splits)}
    by = "donor" if part.kind == "depth" else "label"
    model = CFGen(size_factor=by, random_state=seed).fit(
        cells.counts, cells.labels, covariates={"donor": world.donors}
    )
    totals = totals_of_donors(world, model, seed)
    if part.kind == "depth":
        return {"totals": totals, "biology": biology_at_depths(world, model, seed)}
    space = Space(cells)
    return {
        "guidance": sweep(world, model, space, seed),
        "transfer": transfer(world, model, space, seed),
        "totals": totals,
    }


def collect(out: Path) -> dict[str, pd.DataFrame]:
    """All finished parts as tidy tables."""
    rows: Tables = {}
    for path in sorted((out / "parts").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        at = {"variant": document["variant"], "seed": document["seed"]}
        for name, records in document["tables"].items():
            rows.setdefault(name, []).extend({**at, **record} for record in records)
        rows.setdefault("costs", []).append(
            {**at, "kind": document["kind"]}
            | {name: document[name] for name in ("seconds", "cpu_seconds", "commit")}
        )
    return {name: pd.DataFrame(records) for name, records in rows.items()}


def _without_nan(value: Any) -> Any:
    """NaN as None, as JSON has it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
