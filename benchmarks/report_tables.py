"""The tables of gains: what every arm changes, for which types, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.report_data import (
    Cell,
    Results,
    Setting,
    Table,
    at,
    interval,
    number,
    setting_name,
)
from benchmarks.summary import MEASURES, groups, paired_against


def gain_cell(row: pd.Series, scale: float, small: str = "") -> Cell:
    """``+0.031 [0.010, 0.052]``, wins below, shaded by sign and size."""
    if not np.isfinite(row["gain"]):
        return Cell("")
    text = f"{row['gain']:+.3f} {interval(row['low'], row['high'])}".strip()
    clear = bool(row["low"] > 0 or row["high"] < 0)
    wins = f"{row['wins']:.0f} of {row['splits']:.0f}" if np.isfinite(row["wins"]) else ""
    tint = float(np.clip(row["gain"] / scale, -1, 1)) if scale > 0 else 0.0
    return Cell(text, " · ".join(filter(None, (wins, small))), tint, clear)


def headline(results: Results, setting: Setting) -> Table:
    """Absolute macro F1 of none, then every arm's gain by group of types."""
    rows = at(results.f1, setting)
    rows = rows[rows["kind"] == "group"]
    columns = results.groups()
    scale = largest(rows)
    base = baselines(rows)
    first = [Cell(number(base.get(g, np.nan))) for g in columns]
    lines = [[Cell("none (macro F1)"), *first]]
    lines += _gains(rows, [a for a in results.arms("gains") if a != "none"], columns, scale)
    return Table(setting_name(setting), ["arm", *columns], lines)


def per_type(results: Results, setting: Setting) -> Table:
    """Every type's F1 without new cells, then its gain, F1, recall and precision in every arm."""
    every = at(results.frames["gains"], setting)
    every = every[every["kind"] == "type"]
    rows = every[every["measure"] == "f1"]
    types = [t for t in results.sizes().index if t in set(rows["group"])]
    means = every.pivot_table(index=["arm", "group"], columns="measure", values="mean")
    by_measure = every.groupby("measure")[["group", "baseline", "splits"]]
    bases = pd.DataFrame({str(name): baselines(part) for name, part in by_measure})
    measures = [m for m in ("f1", "recall", "precision") if m in means]

    def absolute(values: pd.Series) -> str:
        letters = {"f1": "F1", "recall": "R", "precision": "P"}
        return " · ".join(f"{letters[m]} {number(values[m])}" for m in measures)

    first = [Cell(number(bases.loc[t, "f1"]), absolute(bases.loc[t])) for t in types]
    lines = [[Cell("none (F1)"), *first]]
    below = {key: absolute(means.loc[key]) for key in means.index}
    arms = [a for a in results.arms("gains") if a != "none"]
    lines += _gains(rows, arms, types, largest(rows), below)
    sizes = results.sizes()
    return Table(
        setting_name(setting), ["arm", *(f"{t} (n = {sizes[t]:.0f})" for t in types)], lines
    )


def against(results: Results, arm: str = "cfgen") -> Table:
    """What `arm` gains over every other arm, paired by split, for the types that matter most."""
    scores = results.frames["scores"]
    share = float(results.manifest.get("settings", {}).get("rare_share") or 0.05)
    members = groups(scores, rare_share=share, thinned=results.thinned())
    group = next(name for name in ("thinned", "rare", "all") if name in members)
    both = _summed(scores, ["knn10", "lr"])
    scores = pd.concat([scores, both], ignore_index=True)
    settings = [
        *results.settings(),
        *((str(name), str(kind)) for name, kind in _pairs(both) if name != "genes"),
    ]
    rows = {}
    for rival in [a for a in results.arms("scores") if a not in (arm, "none")]:
        paired = paired_against(scores, arm, rival, rare_share=share, thinned=results.thinned())
        paired = paired[(paired["measure"] == "f1") & (paired["group"] == group)]
        rows[rival] = {(r["embedder"], r["classifier"]): r for _, r in paired.iterrows()}
    gained = [abs(row["gain"]) for found in rows.values() for row in found.values()]
    lines = [
        [
            Cell(rival),
            *(Cell("") if s not in found else gain_cell(found[s], max(gained)) for s in settings),
        ]
        for rival, found in rows.items()
    ]
    title = f"Gain of {arm} over every other arm, {group} types ({', '.join(members[group])})"
    return Table(title, ["arm", *map(setting_name, settings)], lines)


def _pairs(scores: pd.DataFrame) -> list[tuple[str, str]]:
    return sorted({(str(e), str(c)) for e, c in scores[["embedder", "classifier"]].to_numpy()})


def _summed(scores: pd.DataFrame, classifiers: Sequence[str]) -> pd.DataFrame:
    """Scores of several classifiers added up, where there are all of them."""
    keys = ["split", "seed", "arm", "embedder", "type", "n_train"]
    own = scores[scores["classifier"].isin(classifiers)]
    grouped = own.groupby(keys, as_index=False)
    summed = grouped[list(MEASURES)].sum()
    complete = grouped.size()["size"] == len(classifiers)
    return summed[complete.to_numpy()].assign(classifier=" + ".join(classifiers))


def losses(results: Results, shown: int = 2) -> Table:
    """How many types every arm harms and helps, and its largest losses beside its largest gains."""
    rows = results.f1[results.f1["kind"] == "type"]
    settings = set(results.settings())
    pairs = zip(rows["embedder"], rows["classifier"], strict=True)
    rows = rows[[pair in settings for pair in pairs]]
    scale = largest(rows)
    lines = []
    for arm in [a for a in results.arms("gains") if a != "none"]:
        own = rows[rows["arm"] == arm].sort_values("gain", kind="stable")
        line = [Cell(arm)]
        for sign, end in ((-1, "high"), (1, "low")):
            some = own[sign * own["gain"] > 0]
            clear = int((sign * some[end] > 0).sum())
            line.append(Cell(f"{len(some)} of {len(own)}", f"{clear} clear"))
        ends = [own[own["gain"] < 0].head(shown), own[own["gain"] > 0].iloc[::-1].head(shown)]
        for some in ends:
            cells = [_where(row, scale) for _, row in some.iterrows()]
            line += cells + [Cell("n/a")] * (shown - len(cells))
        lines.append(line)
    ordinals = ["largest", *(f"{i}." for i in range(2, shown + 1))]
    columns = ["arm", "types lower", "types higher"]
    columns += [f"{o} {what}" for what in ("loss", "gain") for o in ordinals]
    return Table("Largest losses and gains of each arm", columns, lines)


def correlation(results: Results) -> Table:
    """Pearson's r of gain and frequency, every arm and setting; with log frequency below."""
    settings = results.settings()
    frame = results.frames["correlation"]
    found = {(r["arm"], r["embedder"], r["classifier"]): r for _, r in frame.iterrows()}
    lines = []
    for arm in results.arms("correlation"):
        rows = [found.get((arm, *setting)) for setting in settings]
        lines.append([Cell(arm), *(Cell("n/a") if r is None else _r_cell(r) for r in rows)])
    title = f"Pearson's r of the gain in {results.frequency_measure()} and the share of cells"
    return Table(title, ["arm", *map(setting_name, settings)], lines)


def _r_cell(row: pd.Series) -> Cell:
    if not np.isfinite(row["r"]):
        return Cell("n/a")
    text = f"{row['r']:+.2f} {interval(row['low'], row['high'], 2)}".strip()
    small = [f"p = {row['p']:.2g}"] if np.isfinite(row["p"]) else []
    if np.isfinite(row["r_log"]):
        log = f"log: {row['r_log']:+.2f} {interval(row['low_log'], row['high_log'], 2)}"
        small.append(log.strip())
    clear = bool(row["low"] > 0 or row["high"] < 0)
    return Cell(text, ", ".join(small), 0.6 * float(row["r"]), clear)


def oracle_share(results: Results, setting: Setting, types: bool = False) -> Table:
    """Share of the oracle's gain that every arm recovers, by group, and by type if `types`."""
    rows = at(results.frames["oracle_share"], setting)
    macro = rows[rows["kind"].isin(["group", ""])]
    single = rows[(rows["kind"] == "type") & types]
    columns = [("group", g) for g in results.groups() if g in set(macro["group"])]
    columns += [("type", t) for t in results.types(set(single["group"]))]
    found = {
        (kind, row["arm"], row["group"]): row
        for kind, part in (("group", macro), ("type", single))
        for _, row in part.iterrows()
    }
    lines = []
    for arm in results.arms("oracle_share"):
        line = [Cell(arm)]
        for kind, group in columns:
            row = found.get((kind, arm, group))
            if row is None or not np.isfinite(row["share"]):
                line.append(Cell("n/a"))
                continue
            text = f"{row['share']:.2f} {interval(row['low'], row['high'], 2)}".strip()
            clear = bool(row["low"] > 0 or row["high"] < 0)
            line.append(Cell(text, "", float(np.clip(row["share"], -1, 1)), clear))
        lines.append(line)
    return Table(setting_name(setting), ["arm", *(name for _, name in columns)], lines)


def neighbours(results: Results, embedder: str, groups: Sequence[str]) -> Table:
    """Gain at every number of neighbours."""
    rows = results.f1[(results.f1["embedder"] == embedder) & (results.f1["kind"] == "group")]
    found = sorted({int(c[3:]) for c in rows["classifier"] if c[3:].isdigit() and c[:3] == "knn"})
    rows = rows.assign(group=rows["group"] + rows["classifier"].str.replace("knn", ", k = "))
    wanted = [f"{g}, k = {k}" for g in groups for k in found]
    wanted = [w for w in wanted if w in set(rows["group"])]
    arms = [a for a in results.arms("gains") if a != "none"]
    rows = rows[rows["group"].isin(wanted)]
    base = baselines(rows)
    first = [Cell(number(base.get(w, np.nan))) for w in wanted]
    lines = [[Cell("none (macro F1)"), *first], *_gains(rows, arms, wanted, largest(rows))]
    return Table(f"kNN on {embedder}", ["arm", *wanted], lines)


def baselines(rows: pd.DataFrame) -> pd.Series:
    """Score of none by group, from an arm that was compared in the most splits."""
    return rows.sort_values("splits", kind="stable").groupby("group")["baseline"].last()


def largest(rows: pd.DataFrame) -> float:
    """Largest absolute gain, at which shading is full."""
    values = rows["gain"].abs().to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    return float(values.max()) if values.size else 0.0


def _gains(
    rows: pd.DataFrame,
    arms: Sequence[str],
    groups: Sequence[str],
    scale: float,
    below: dict[Any, str] | None = None,
) -> list[list[Cell]]:
    """One line per arm, one cell per group."""
    found = {(row["arm"], row["group"]): row for _, row in rows.iterrows()}
    lines = []
    for arm in arms:
        line = [Cell(arm)]
        for group in groups:
            row, small = found.get((arm, group)), (below or {}).get((arm, group), "")
            line.append(Cell("") if row is None else gain_cell(row, scale, small))
        lines.append(line)
    return lines


def _where(row: pd.Series, scale: float) -> Cell:
    name = setting_name((row["embedder"], row["classifier"]))
    return gain_cell(row, scale, f"{row['group']}, {name}")
