"""A results directory read and put in order, and the cells that the report's tables are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.summary import groups

#: Order of arms on the page; any other arm follows, by name.
ARMS = (
    "none",
    "reweight",
    "ros",
    "smote-log",
    "smote-counts",
    "nb",
    "mixup",
    "loras",
    "scvi",
    "scanvi",
    "scdiffusion",
    "wgan",
    "ae-resampled",
    "ae-interpolated",
    "ae-shrunk",
    "cfgen",
    "cfgen-donors",
    "oracle",
)

#: Columns of every file: the texts, then the numbers.
COLUMNS = {
    "splits": ("split held_out", "n_train n_test n_pool"),
    "scores": (
        "split arm embedder classifier type",
        "seed n_train n_added n_test recall precision f1",
    ),
    "gains": (
        "arm embedder classifier measure group kind",
        "n_train baseline mean gain low high wins splits",
    ),
    "oracle_share": ("arm embedder classifier group", "share low high"),
    "correlation": ("arm embedder classifier", "r low high p"),
    "realism": (
        "split arm type",
        "seed m w2 mmd_rbf mmd_linear knn_f1 zeros zeros_real slope slope_real total total_real "
        "totals_ks mean_corr",
    ),
    "memorisation": ("split arm type", "seed exact_copies dcr_ratio nn_ratio mia_auc"),
    "costs": ("split arm", "seed fit_seconds make_seconds cpu_seconds peak_mb"),
}

#: Further columns, which may be absent.
OPTIONAL = {
    "oracle_share": ("kind", ""),
    "correlation": ("measure", "r_log low_log high_log p_log"),
}

GROUPS = ("all", "rare", "thinned", "common")
Setting = tuple[str, str]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, smaller text below, shading in [-1, 1], and its weight."""

    text: str
    small: str = ""
    tint: float = 0.0
    clear: bool = False


@dataclass(frozen=True)
class Table:
    """A table ready to be written: `rows` have one cell per column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Results:
    """What a results directory holds.

    Attributes
    ----------
    manifest
        The manifest; empty if it cannot be read.
    frames
        One frame per file in `COLUMNS`; empty where it cannot be used.
    problems
        Why a file cannot be used, by its name without suffix.
    """

    manifest: dict[str, Any]
    frames: dict[str, pd.DataFrame]
    problems: dict[str, str]

    @property
    def f1(self) -> pd.DataFrame:
        """The gains in F1."""
        gains = self.frames["gains"]
        return gains[gains["measure"] == "f1"]

    def arms(self, *frames: str) -> list[str]:
        """Arms that occur in `frames` (all by default), in the order of the page."""
        found: set[str] = set()
        for name, frame in self.frames.items():
            if "arm" in frame.columns and (not frames or name in frames):
                found |= set(frame["arm"])
        return in_order(found - {"real"})

    def settings(self) -> list[Setting]:
        """Pairs of embedder and classifier of the headline, embeddings before genes."""
        pairs = {(str(e), str(c)) for e, c in self.f1[["embedder", "classifier"]].to_numpy()}
        kept = [(e, c) for e, c in pairs if not c.startswith("knn") or c == "knn10"]
        return sorted(kept, key=lambda pair: (pair[0] == "genes", pair[0], pair[1]))

    def groups(self) -> list[str]:
        """Groups of types that were scored, in the order of the page."""
        found = set(self.f1.loc[self.f1["kind"] == "group", "group"])
        return [g for g in GROUPS if g in found] + sorted(found - set(GROUPS))

    def sizes(self) -> pd.Series:
        """Mean number of training cells by type, rarest first."""
        gains, scores = self.f1, self.frames["scores"]
        by_type = gains[gains["kind"] == "type"].groupby("group")["n_train"].mean()
        if by_type.empty:
            by_type = scores[scores["arm"] == "none"].groupby("type")["n_train"].mean()
        return by_type.sort_values(kind="stable")

    def types(self, names: set[str]) -> list[str]:
        """`names`, rarest first; types without a size follow."""
        known = [str(t) for t in self.sizes().index if t in names]
        return known + sorted(names - set(known))

    def thinned(self) -> list[str]:
        """Types that ``--thin`` made rare."""
        thin = self.manifest.get("settings", {}).get("thin") or []
        if isinstance(thin, str):
            thin = [part.rpartition(":")[0].strip() for part in thin.split(",")]
        return [str(name) for name in thin if str(name)]

    def members(self) -> dict[str, list[str]]:
        """Types of every group, by the rule that their macro scores were made with."""
        scores = self.frames["scores"]
        share = self.manifest.get("settings", {}).get("rare_share")
        if scores.empty or share is None:
            return {}
        return groups(scores, rare_share=float(share), thinned=self.thinned())

    def focus(self) -> tuple[str, list[str]]:
        """The types whose realism is averaged, and what they are called: thinned, rare or all."""
        measured = self.types(set(self.frames["realism"]["type"]))
        members = self.members()
        for name in ("thinned", "rare"):
            found = [t for t in measured if t in members.get(name, [])]
            if found:
                return name, found
        return "all", measured

    def frequency_measure(self) -> str:
        """The measure whose gain was correlated with frequency."""
        named = set(self.frames["correlation"]["measure"]) - {""}
        return str(named.pop()) if len(named) == 1 else "f1"


def in_order(arms: Iterable[str]) -> list[str]:
    """`arms` in the order of the page."""
    places = {arm: i for i, arm in enumerate(ARMS)}
    return sorted(arms, key=lambda arm: (places.get(arm, len(places)), arm))


def setting_name(setting: Setting) -> str:
    """``("pca", "knn10")`` as ``kNN (k = 10) on pca``."""
    embedder, classifier = setting
    names = []
    for part in classifier.split(" + "):
        name = {"lr": "LR", "celltypist": "CellTypist"}.get(part, part)
        names.append(f"kNN (k = {part[3:]})" if part.startswith("knn") else name)
    return f"{' + '.join(names)} on {embedder}"


def read_results(folder: Path) -> Results:
    """Everything in `folder`; files that are missing or malformed become `Results.problems`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"expected a results directory, got {folder}, which is none: give the folder that "
            "`python -m benchmarks run --out` wrote"
        )
    frames, problems = {}, {}
    for name, (texts, numbers) in COLUMNS.items():
        frame, problem = _read(folder / f"{name}.csv", texts.split(), numbers.split())
        for texts_or_numbers, empty in zip(OPTIONAL.get(name, ()), ("", np.nan), strict=False):
            for column in texts_or_numbers.split():
                if column not in frame:
                    frame[column] = empty
                elif empty != "":
                    frame[column] = pd.to_numeric(frame[column], errors="coerce")
        frames[name] = frame
        if problem:
            problems[name] = problem
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems["manifest"] = "manifest.json is missing"
    except ValueError as error:
        problems["manifest"] = f"manifest.json cannot be read: {error}"
    return Results(manifest, frames, problems)


def _read(path: Path, texts: list[str], numbers: list[str]) -> tuple[pd.DataFrame, str]:
    """One file; names such as NA and None are types and arms, not missing values."""
    nothing = pd.DataFrame(
        {name: pd.Series(dtype=str if name in texts else float) for name in texts + numbers}
    )
    if not path.is_file():
        return nothing, f"{path.name} is missing"
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return nothing, f"{path.name} is empty"
    except pd.errors.ParserError as error:
        return nothing, f"{path.name} cannot be read: {error}"
    absent = [name for name in texts + numbers if name not in frame.columns]
    if absent:
        return nothing, f"{path.name} lacks the columns {', '.join(absent)}"
    if frame.empty:
        return nothing, f"{path.name} has no rows"
    for name in numbers:
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame, ""


def interval(low: float, high: float, digits: int = 3) -> str:
    """``[0.010, 0.052]``; empty where there is none."""
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite([low, high]).all() else ""


def number(value: float, digits: int = 3) -> str:
    """`value` to `digits` places; ``n/a`` where it is undefined."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "n/a"


def at(frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Rows of one embedder and classifier."""
    return frame[(frame["embedder"] == setting[0]) & (frame["classifier"] == setting[1])]
