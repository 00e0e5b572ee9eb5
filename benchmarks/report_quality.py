"""The tables beside the gains: realism, memorisation, costs and splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.report_data import Cell, Results, Table, in_order, number

#: Column of the table, what it is made of, format, and the least difference to real cells that is
#: shaded in full: no more colour than the difference is worth.
REALISM = (
    ("cells", "m", ".0f", np.inf),
    ("W2", "w2", ".2f", 0.0),
    ("MMD RBF", "mmd_rbf", ".4f", 0.0),
    ("MMD linear", "mmd_linear", ".2f", 0.0),
    ("10-NN F1", "knn_f1", ".3f", 0.05),
    ("zeros - real", "zeros_diff", "+.3f", 0.02),
    ("slope - real", "slope_diff", "+.3f", 0.05),
    ("total / real", "total_ratio", ".3f", 0.05),
    ("totals KS", "totals_ks", ".3f", 0.05),
    ("mean corr", "mean_corr", ".3f", 0.02),
)

MEMORISATION = (
    ("exact copies", "exact_copies"),
    ("closest-record ratio", "dcr_ratio"),
    ("neighbour ratio", "nn_ratio"),
    ("membership AUC", "mia_auc"),
)


def over_splits(frame: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    """Mean over seeds within a split, then over splits, by `keys`."""
    within = frame.groupby([*keys, "split"])[columns].mean()
    return within.groupby(level=keys).mean()


def realism(results: Results, types: Sequence[str], title: str) -> Table:
    """Realism averaged over splits, then over `types`; the row of real cells comes first.

    Shading is the mean difference to the row of real cells over the splits and types that both
    have, full at the 80th percentile of the arms' absolute differences. Below the number of
    cells: how many pairs of split and type could be measured, where that is not all of them.
    """
    frame = results.frames["realism"]
    frame = frame[frame["type"].isin(list(types))].assign(
        zeros_diff=lambda f: f["zeros"] - f["zeros_real"],
        slope_diff=lambda f: f["slope"] - f["slope_real"],
        total_ratio=lambda f: f["total"] / f["total_real"],
    )
    sources = [source for _, source, _, _ in REALISM]
    pairs = frame.groupby(["arm", "type", "split"])[sources].mean()
    means = pairs.groupby(level=["arm", "type"]).mean().groupby(level="arm").mean()
    arms = [a for a in ("real",) if a in means.index] + in_order(set(means.index) - {"real"})
    counts = pairs["m"].groupby(level="arm").count()
    lines = [[Cell("real cells" if arm == "real" else arm)] for arm in arms]
    for _, source, form, least in REALISM:
        wide = pairs[source].unstack("arm")
        paired = wide.sub(wide.get("real", np.nan), axis=0)
        differences = paired.groupby(level="type").mean().mean().reindex(arms)
        made = differences.drop("real", errors="ignore").abs().dropna()
        scale = max(least, float(np.percentile(made, 80)) if len(made) else 0.0)
        for line, arm in zip(lines, arms, strict=True):
            value, difference = float(means.loc[arm, source]), float(differences[arm])
            shaded = np.isfinite(difference) and scale > 0
            tint = float(np.clip(difference / scale, -1, 1)) if shaded else 0.0
            lacking = source == "m" and counts[arm] < counts.max()
            small = f"{counts[arm]} of {counts.max()}" if lacking else ""
            line.append(Cell(f"{value:{form}}" if np.isfinite(value) else "n/a", small, tint))
    return Table(title, ["arm", *(name for name, _, _, _ in REALISM)], lines)


def memorisation(results: Results) -> Table:
    """Mean over types of every measure, and its range over types below."""
    columns = [source for _, source in MEMORISATION]
    means = over_splits(results.frames["memorisation"], ["arm", "type"], columns)
    lines = []
    for arm in results.arms("memorisation"):
        own = means.loc[arm]
        line = [Cell(arm)]
        for source in columns:
            values = own[source].dropna()
            small = f"{values.min():.3f} to {values.max():.3f}" if len(values) else ""
            line.append(Cell(number(values.mean() if len(values) else np.nan), small))
        lines.append(line)
    return Table(
        "Mean over types, and range over types", ["arm", *(n for n, _ in MEMORISATION)], lines
    )


def memorisation_by_type(results: Results, title: str, column: str) -> Table:
    """One measure of memorisation, arms by types."""
    means = over_splits(results.frames["memorisation"], ["arm", "type"], [column])[column]
    types = results.types(set(means.index.get_level_values("type")))
    lines = [
        [Cell(arm), *(Cell(number(means.get((arm, t), np.nan))) for t in types)]
        for arm in results.arms("memorisation")
    ]
    return Table(title, ["arm", *types], lines)


def costs(results: Results) -> Table:
    """Seconds and memory of every arm: mean over runs, and the maximum below."""
    frame = results.frames["costs"]
    lines = []
    for arm in results.arms("costs"):
        own = frame[frame["arm"] == arm]
        line = [Cell(arm), Cell(f"{len(own)}")]
        for column, digits in (
            ("fit_seconds", 2),
            ("make_seconds", 2),
            ("cpu_seconds", 2),
            ("peak_mb", 0),
        ):
            most = f"max {number(own[column].max(), digits)}"
            line.append(Cell(number(own[column].mean(), digits), most))
        lines.append(line)
    columns = ["arm", "runs", "fit, s", "make, s", "CPU, s", "peak memory, MB"]
    return Table("Mean over splits and seeds", columns, lines)


def splits(results: Results) -> Table:
    """Who is held out of every split, and how many cells that leaves."""
    lines = [
        [
            Cell(str(row.split)),
            Cell(str(row.held_out)),
            *(Cell(number(n, 0)) for n in (row.n_train, row.n_test, row.n_pool)),
        ]
        for row in results.frames["splits"].itertuples(index=False)
    ]
    columns = ["split", "held out", "training cells", "test cells", "pool (oracle only)"]
    return Table("Splits", columns, lines)
