"""Figures of the benchmark: frames in, a figure out; nothing is shown or written.

Gains and losses are drawn alike: axes of gain are symmetric about zero, blue is a gain and
vermilion a loss (Okabe and Ito's colours, which most colour-blind readers tell apart), and a
filled dot is one whose interval leaves out zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from cfgen_augment.plot import PLAIN, short

GAIN, LOSS, NEITHER = "#0072B2", "#D55E00", "0.3"
STYLES = (("black", "o"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "^"), ("#56B4E9", "v"))


def reach(gains: pd.DataFrame) -> float:
    """Half-width of a symmetric axis that holds every gain and interval in `gains`."""
    values = gains[["gain", "low", "high"]].to_numpy(dtype=float)
    values = np.abs(values[np.isfinite(values)])
    return 1.06 * float(values.max()) if values.size and values.max() > 0 else 0.1


def dots(
    gains: pd.DataFrame,
    at: NDArray[np.float64],
    ax: Axes | None = None,
    *,
    colour: str | None = None,
    marker: str = "o",
) -> Axes:
    """Gains with their intervals as horizontal bars.

    Parameters
    ----------
    gains
        Columns ``gain``, ``low``, ``high``, one row per dot.
    at
        Height of every dot, ``(n_rows,)``.
    ax
        Axes to draw on; new ones if None.
    colour
        One colour for all; None colours by sign.
    marker
        Matplotlib marker.
    """
    ax = ax if ax is not None else _alone()
    gain, low, high = (gains[c].to_numpy(dtype=float) for c in ("gain", "low", "high"))
    clear = (low > 0) | (high < 0)
    for sign, own in ((gain > 0, GAIN), (gain < 0, LOSS), (gain == 0, NEITHER)):
        shade = colour or own
        ax.hlines(at[sign], low[sign], high[sign], color=shade, lw=1.3, alpha=0.75)
        for filled in (True, False):
            shown = sign & (clear == filled)
            ax.plot(
                gain[shown],
                at[shown],
                marker,
                ms=4.2,
                mec=shade,
                mew=1.1,
                mfc=shade if filled else "white",
            )
    return ax


def headline(
    gains: pd.DataFrame,
    settings: Sequence[tuple[str, str]],
    labels: Sequence[str],
    arms: Sequence[str],
    groups: Sequence[str],
) -> Figure:
    """Gain in macro F1 of every arm, one panel per group of types, one marker per setting.

    Parameters
    ----------
    gains
        Rows of ``gains.csv`` of one measure.
    settings, labels
        Pairs of embedder and classifier, and their names in the legend.
    arms, groups
        Order of rows and of panels.
    """
    with rc_context(PLAIN):
        height = 0.9 + len(arms) * max(0.24, 0.12 * len(settings))
        figure = Figure(figsize=(2.0 + 2.6 * len(groups), height), layout="constrained")
        grid = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        spread = np.linspace(-0.27, 0.27, len(settings)) if len(settings) > 1 else np.zeros(1)
        for ax, group in zip(grid, groups, strict=True):
            panel = gains[gains["group"] == group]
            for i, (embedder, classifier) in enumerate(settings):
                rows = panel[(panel.embedder == embedder) & (panel.classifier == classifier)]
                rows = rows[rows["arm"].isin(arms)]
                at = np.array([list(arms).index(a) for a in rows["arm"]], dtype=float)
                colour, marker = STYLES[i % len(STYLES)]
                dots(rows, at + spread[i], ax, colour=colour, marker=marker)
            for row in range(1, len(arms), 2):
                ax.axhspan(row - 0.5, row + 0.5, color="0.955", lw=0, zorder=0)
            _zero(ax, reach(gains[gains["group"].isin(groups)]))
            ax.set(title=f"{group} types", xlabel="gain in macro F1")
            ax.set_yticks(np.arange(len(arms)), [short(a) for a in arms])
        grid[0].set_ylim(len(arms) - 0.5, -0.5)
        handles = [
            Line2D([], [], color=c, marker=m, ms=4.5, lw=1.3, label=short(label, 60))
            for label, (c, m) in zip(labels, STYLES * len(labels), strict=False)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def gains_by_type(gains: pd.DataFrame, arms: Sequence[str], columns: int = 6) -> Figure:
    """Gain of every type, rarest at the bottom, in one panel per arm.

    Parameters
    ----------
    gains
        Rows of ``gains.csv`` of kind ``type``, one measure, embedder and classifier.
    arms
        Order of the panels.
    columns
        Panels side by side.
    """
    sizes = gains.groupby("group")["n_train"].mean().sort_values(kind="stable")
    types = [str(t) for t in sizes.index]
    names = [f"{short(t)} ({n:.0f})" for t, n in sizes.items()]
    with rc_context(PLAIN):
        columns = min(columns, max(len(arms), 1))
        lines = math.ceil(len(arms) / columns) or 1
        figure = Figure(
            figsize=(2.1 + 1.85 * columns, 0.3 + lines * (0.75 + 0.19 * len(types))),
            layout="constrained",
        )
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        limit = reach(gains)
        for ax, arm in zip(grid.flat, arms, strict=False):
            rows = gains[gains["arm"] == arm]
            at = np.array([types.index(t) for t in rows["group"]], dtype=float)
            for row in range(0, len(types), 2):
                ax.axhspan(row - 0.5, row + 0.5, color="0.955", lw=0, zorder=0)
            dots(rows, at, ax)
            _zero(ax, limit)
            ax.set_title(short(arm), fontweight="bold")
            ax.set_yticks(np.arange(len(types)), names)
        grid[0, 0].set_ylim(-0.6, len(types) - 0.4)
        _finish(grid, len(arms))
        figure.supxlabel("gain in F1 over none", fontsize=9)
        figure.supylabel("type (training cells)", fontsize=9)
        _signs(figure)
    return figure


def gain_against_frequency(
    gains: pd.DataFrame,
    correlation: pd.DataFrame,
    arms: Sequence[str],
    measure: str = "F1",
    columns: int = 6,
) -> Figure:
    """Gain of every type against its number of training cells, as in the CFGen paper's Fig. 5.

    Parameters
    ----------
    gains
        Rows of ``gains.csv`` of kind ``type``, one measure, embedder and classifier.
    correlation
        Rows of ``correlation.csv`` of the same setting; Pearson's r is printed in each panel,
        with the frequency and with its logarithm, which is the axis.
    arms
        Order of the panels.
    measure
        What `gains` are of.
    columns
        Panels side by side.
    """
    with rc_context(PLAIN):
        columns = min(columns, max(len(arms), 1))
        lines = math.ceil(len(arms) / columns) or 1
        figure = Figure(figsize=(0.7 + 2.05 * columns, 0.4 + 2.0 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        limit = reach(gains)
        for ax, arm in zip(grid.flat, arms, strict=False):
            rows = gains[(gains["arm"] == arm) & (gains["n_train"] > 0)]
            x = rows["n_train"].to_numpy(dtype=float)
            gain, low, high = (rows[c].to_numpy(dtype=float) for c in ("gain", "low", "high"))
            ax.axhline(0, color="0.3", lw=0.8)
            for sign, colour in ((gain > 0, GAIN), (gain < 0, LOSS), (gain == 0, NEITHER)):
                ax.vlines(x[sign], low[sign], high[sign], color=colour, lw=1.1, alpha=0.6)
                for filled in (True, False):
                    shown = sign & (((low > 0) | (high < 0)) == filled)
                    face = colour if filled else "white"
                    ax.plot(x[shown], gain[shown], "o", ms=4, mec=colour, mfc=face)
            ax.set(xscale="log", ylim=(-limit, limit))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter("{x:,.0f}")  # powers would be formulas
            ax.set_title(f"{short(arm)}\n{pearson(correlation, arm)}", fontsize=8.5)
        _finish(grid, len(arms))
        figure.supxlabel("training cells of the type", fontsize=9)
        figure.supylabel(f"gain in {measure} over none", fontsize=9)
        _signs(figure)
    return figure


def pearson(correlation: pd.DataFrame, arm: str) -> str:
    """``r = -0.51 [-0.80, -0.02]`` of `arm` and the same with log frequency, or that none is."""
    rows = correlation[correlation["arm"] == arm]
    if rows.empty or not np.isfinite(rows["r"].iloc[0]):
        return "r undefined"
    lines = []
    for name, suffix in (("r", ""), ("r (log)", "_log")):
        if "r" + suffix in rows and np.isfinite(rows["r" + suffix].iloc[0]):
            r, low, high = (rows[column + suffix].iloc[0] for column in ("r", "low", "high"))
            ends = f" [{low:.2f}, {high:.2f}]" if np.isfinite([low, high]).all() else ""
            lines.append(f"{name} = {r:+.2f}{ends}")
    return "\n".join(lines)


def _alone() -> Axes:
    return Figure(layout="constrained").subplots()


def _zero(ax: Axes, limit: float) -> None:
    ax.axvline(0, color="0.3", lw=0.8)
    ax.set_xlim(-limit, limit)
    ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _finish(grid: NDArray, used: int) -> None:
    """Hide panels without an arm; the panel above the gap then carries the tick labels."""
    for i, ax in enumerate(grid.flat):
        if i >= used:
            ax.set_visible(False)
            if i >= grid.shape[1]:
                grid.flat[i - grid.shape[1]].tick_params(labelbottom=True)


def _signs(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=GAIN, marker="o", ms=4.5, lw=1.3, label="gain"),
        Line2D([], [], color=LOSS, marker="o", ms=4.5, lw=1.3, label="loss"),
        Line2D([], [], color="0.3", marker="o", ms=4.5, lw=1.3, mfc="white", label="spans zero"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8.5)
