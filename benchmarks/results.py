"""Results on disk: one file per finished (split, seed, arm), tidy tables made from all of them.

A finished part is written at once and atomically, so that whatever stops a run loses only the
part it was working on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.cost import Cost
from benchmarks.hardware import hardware
from benchmarks.settings import Settings
from benchmarks.summary import frequency_correlation, gains, oracle_share

_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "imbalanced-learn",
    "pandas",
    "scanpy",
)


class Part(NamedTuple):
    """What is done once: an arm, on a split, with a seed."""

    split: int
    seed: int
    arm: str

    def path(self, out: Path) -> Path:
        """File of the finished part."""
        return out / "parts" / f"split{self.split}_seed{self.seed}_{self.arm}.json"


@dataclass(frozen=True)
class Costs:
    """Cost of an arm: training (shared with arms of the same model), making cells, evaluation."""

    fit: Cost
    make: Cost
    evaluate: Cost


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        json.dump(document, file, indent=1, allow_nan=False)
    os.replace(file.name, path)


def write_part(
    out: Path, part: Part, tables: dict[str, list[dict[str, Any]]], costs: Costs
) -> None:
    """Put a finished part on disk."""
    write_json(
        part.path(out),
        {**part._asdict(), "commit": commit(), "costs": asdict(costs), "tables": tables},
    )


def finished(out: Path) -> set[Part]:
    """Parts that are already there."""
    done = set()
    for path in (out / "parts").glob("split*_seed*_*.json"):
        split, seed, arm = path.stem.split("_", 2)
        done.add(Part(int(split.removeprefix("split")), int(seed.removeprefix("seed")), arm))
    return done


def collect(out: Path) -> dict[str, pd.DataFrame]:
    """All finished parts as tidy tables: ``scores``, ``realism``, ``memorisation``, ``costs``."""
    rows: dict[str, list[dict[str, Any]]] = {
        "scores": [],
        "realism": [],
        "memorisation": [],
        "costs": [],
    }
    for part in sorted(finished(out)):
        document = json.loads(part.path(out).read_text(encoding="utf-8"))
        for name, records in document["tables"].items():
            rows[name] += [{**part._asdict(), **record} for record in records]
        fit, make = document["costs"]["fit"], document["costs"]["make"]
        rows["costs"].append(
            {
                **part._asdict(),
                "fit_seconds": fit["seconds"],
                "make_seconds": make["seconds"],
                "cpu_seconds": fit["cpu_seconds"] + make["cpu_seconds"],
                "peak_mb": max(fit["peak_mb"], make["peak_mb"]),
                "evaluate_seconds": document["costs"]["evaluate"]["seconds"],
                "commit": document["commit"],
            }
        )
    return {name: pd.DataFrame(records) for name, records in rows.items()}


@cache
def commit() -> str | None:
    """Commit of the code that this process loaded; None outside git.

    Followed by ``+changes`` if files differ from it.
    """
    here = Path(__file__).parent
    try:
        head, status = (
            subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--", ".", "../cfgen_augment"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if status else "")


def versions() -> dict[str, str]:
    """Versions of what the results depend on, and of this package."""
    found = {"Python": sys.version.split()[0]}
    for package in ("cfgen-augment", *_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def open_manifest(
    out: Path, settings: Settings, data: dict[str, Any], run: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The manifest of a run that starts or goes on in `out`.

    Raises
    ------
    ValueError
        If `out` holds results of other data or settings, or something else.
    """
    path = out / "manifest.json"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before: dict[str, Any] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        there = _defaults() | before["settings"]
        differing = [
            f"{name}: {there[name]!r} there, {value!r} now"
            for name, value in _comparable(settings.document()).items()
            if there[name] != value
        ]
        if before["data"]["hash"] != data["hash"]:
            differing.append("the data themselves")
        if differing:
            raise ValueError(
                f"--out {out}: expected an empty directory or results of the same settings; got "
                f"results that differ in {'; '.join(differing)}. Choose another --out. Arms and "
                "seeds may be added to what is there."
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(
            f"--out {out}: expected an empty directory or one with results to go on with; got "
            "other files and no manifest.json. Choose another --out."
        )
    return {
        "command": [*before.get("command", []), run.pop("command")],
        "started": before.get("started", now),
        "finished": None,
        "complete": False,
        "missing": [],
        "data": data,
        "settings": _comparable(settings.document()),
        "arms": sorted({*before.get("arms", []), *run.pop("arms")}),
        "seeds": max(before.get("seeds", 0), run.pop("seeds")),
        **run,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "notes": notes,
    }


def _defaults() -> dict[str, Any]:
    """Defaults of settings, which results are of that were made before a setting was there."""
    return {field.name: field.default for field in fields(Settings)}


def _comparable(document: dict[str, Any]) -> dict[str, Any]:
    """Settings without where files lie, which is nobody else's business and changes no result."""
    shown = dict(document)
    for name in ("data", "scgpt_dir"):
        if shown[name] is not None:
            shown[name] = Path(shown[name]).name
    return shown


def write_tables(out: Path, settings: Settings) -> None:
    """Make every CSV of `out` from its finished parts."""
    tables = collect(out)
    scores = tables["scores"]
    thinned = [name for name, _ in settings.thin]
    if len(scores):
        tables |= {
            "gains": gains(scores, rare_share=settings.rare_share, thinned=thinned),
            "oracle_share": oracle_share(scores, rare_share=settings.rare_share, thinned=thinned),
            "correlation": frequency_correlation(scores),
        }
    for name, table in tables.items():
        with tempfile.NamedTemporaryFile(
            "w", dir=out, suffix=".tmp", delete=False, encoding="utf-8", newline=""
        ) as file:
            table.to_csv(file, index=False)
        os.replace(file.name, out / f"{name}.csv")


def close_manifest(
    out: Path,
    manifest: dict[str, Any],
    missing: Sequence[Part],
    failures: Mapping[Part, str],
) -> None:
    """Say in the manifest what was done, what is missing, and why."""
    document = manifest | {
        "complete": not missing,
        "missing": [" ".join(map(str, part)) for part in missing],
        "failures": {" ".join(map(str, part)): text for part, text in failures.items()},
        "commits": sorted(
            {
                str(json.loads(part.path(out).read_text(encoding="utf-8"))["commit"])
                for part in finished(out)
            }
        ),
    }
    if not missing:
        document["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(out / "manifest.json", document)
