"""Figures of generated beside real cells, for data of one's own; needs matplotlib.

Each draws on ``ax``, or on new axes, and returns it; nothing is shown or written. Real and
generated cells are drawn in equal numbers of every type, or augmentation, which adds to rare types
most, would look like a difference between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cfgen_augment.measures import log_normalise
from cfgen_augment.pairs import Pairs, paired
from cfgen_augment.parameters import RandomState

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

REAL, SYNTHETIC = "0.25", "#0072B2"
#: Type names are shown as they are: a dollar sign starts no formula.
PLAIN: dict[Any, Any] = {
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
}
_MANY = 2000  # points that an SVG holds as one picture
_NAMED = 12  # types that a legend has room for


def short(name: str, length: int = 26) -> str:
    """`name` on one line, cut to `length` characters."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"


def check_matplotlib() -> None:
    """Check that figures can be drawn, before anything else is done for them.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"matplotlib: expected it to be installed; could not import it ({error}). Run: "
            "pip install 'cfgen-augment[plot]'"
        ) from error


def mean_variance(
    real: AnnData | Pairs,
    synthetic: AnnData | None = None,
    label_key: str | None = None,
    *,
    ax: Axes | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    max_cells: int = 300,
    random_state: RandomState = 0,
) -> Axes:
    """Variance of every gene's counts against their mean, real and generated.

    The line is that of Poisson counts, ``variance = mean``.

    Parameters
    ----------
    real, synthetic, label_key, layer, key_added, random_state
        As in `cfgen_augment.diagnose`.
    ax
        Axes to draw on; new ones of pyplot if None.
    max_cells
        Most real, and most generated cells of every type.

    Returns
    -------
    Axes
        What was drawn on.

    Raises
    ------
    TypeError, KeyError, ValueError
        As `cfgen_augment.diagnose`; also if both sides have no type in common.
    ImportError
        If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib import rc_context

    pairs = paired(
        real,
        synthetic,
        label_key,
        layer=layer,
        key_added=key_added,
        random_state=random_state,
    )
    sums = np.zeros((2, 2, len(pairs.genes)))  # side, power, gene: whole numbers, summed exactly
    n_cells = 0
    for _, *sides in pairs.matched(max_cells):
        n_cells += sides[0].shape[0]
        for i, cells in enumerate(sides):
            values = cells.astype(np.float64)
            sums[i, 0] += np.asarray(values.sum(axis=0)).ravel()
            sums[i, 1] += np.asarray(values.multiply(values).sum(axis=0)).ravel()
    with rc_context(PLAIN):
        ax = _axes(ax)
        ax.set(xscale="log", yscale="log")
        for (total, squares), colour, name in zip(
            sums, (REAL, SYNTHETIC), ("real", "synthetic"), strict=True
        ):
            mean = total / n_cells
            variance = squares / n_cells - mean**2
            seen = (mean > 0) & (variance > 0)
            _points(ax, mean[seen], variance[seen], colour, name)
        ends = ax.get_xlim()
        ax.plot(ends, ends, color="0.6", lw=0.8, zorder=0, label="Poisson")
        ax.set_xlim(ends)
        ax.set(xlabel="mean count of a gene", ylabel="variance", title="Mean and variance")
        ax.legend(frameon=False)
    return ax


def zeros_per_cell(
    real: AnnData | Pairs,
    synthetic: AnnData | None = None,
    label_key: str | None = None,
    *,
    ax: Axes | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    max_cells: int = 300,
    random_state: RandomState = 0,
) -> Axes:
    """How many cells have which share of genes without a count, real and generated.

    Parameters
    ----------
    real, synthetic, label_key, ax, layer, key_added, max_cells, random_state
        As in `mean_variance`.

    Returns
    -------
    Axes
        What was drawn on.

    Raises
    ------
    TypeError, KeyError, ValueError, ImportError
        As `mean_variance`.
    """
    check_matplotlib()
    from matplotlib import rc_context

    pairs = paired(
        real,
        synthetic,
        label_key,
        layer=layer,
        key_added=key_added,
        random_state=random_state,
    )
    found: list[list[NDArray]] = [[], []]
    for _, *sides in pairs.matched(max_cells):
        for of_side, cells in zip(found, sides, strict=True):
            of_side.append(1 - np.diff((cells != 0).indptr) / cells.shape[1])
    both = [np.concatenate(of_side) for of_side in found]
    bins = np.histogram_bin_edges(np.concatenate(both), bins=40)
    with rc_context(PLAIN):
        ax = _axes(ax)
        for shares, colour, name in zip(
            both, (REAL, SYNTHETIC), ("real", "synthetic"), strict=True
        ):
            ax.hist(shares, bins.tolist(), histtype="step", lw=1.4, color=colour, label=name)
        ax.set(xlabel="share of zeros in a cell", ylabel="cells", title="Zeros per cell")
        ax.legend(frameon=False, loc="upper left")
    return ax


def markers(
    real: AnnData | Pairs,
    synthetic: AnnData | None = None,
    label_key: str | None = None,
    *,
    genes: Sequence[str] | None = None,
    n_markers: int = 5,
    ax: Axes | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    max_cells: int = 300,
    random_state: RandomState = 0,
) -> Axes:
    """Mean log-normalised expression of marker genes in every type, generated against real.

    A dot is a gene in a type; `r` is Pearson's correlation over dots.

    Parameters
    ----------
    real, synthetic, label_key, ax, layer, key_added, max_cells, random_state
        As in `mean_variance`.
    genes
        Genes to draw; None takes those whose mean in real cells of a type is furthest above their
        mean over the other types.
    n_markers
        Genes of each type that are then taken.

    Returns
    -------
    Axes
        What was drawn on.

    Raises
    ------
    TypeError, KeyError, ValueError, ImportError
        As `mean_variance`; KeyError also if `genes` holds some that are not there.
    """
    check_matplotlib()
    from matplotlib import rc_context

    pairs = paired(
        real,
        synthetic,
        label_key,
        layer=layer,
        key_added=key_added,
        random_state=random_state,
    )
    if genes is not None:
        genes = [genes] if isinstance(genes, str) else list(genes)
        if absent := [g for g in genes if g not in set(pairs.genes)]:
            raise KeyError(f"genes: expected names of genes of real; got {', '.join(absent[:10])}.")
    if (n_markers if genes is None else len(genes)) < 1:
        raise ValueError("genes, n_markers: expected at least one gene; got none. Pass some.")
    types, means = [], []
    for label, *sides in pairs.matched(max_cells):
        types.append(label)
        logs = [log_normalise(cells).astype(np.float64) for cells in sides]
        means.append([np.asarray(side.mean(axis=0)).ravel() for side in logs])
    by_side = np.array(means).swapaxes(0, 1)  # side, type, gene
    if genes is None:
        chosen = _markers(by_side[0], n_markers)
    else:
        chosen = np.flatnonzero(np.isin(pairs.genes, genes))
    x, y = by_side[:, :, chosen]
    with rc_context(PLAIN):
        ax = _axes(ax)
        for i, (label, colour) in enumerate(zip(types, _palette(len(types)), strict=True)):
            _points(ax, x[i], y[i], colour, short(str(label)), size=14)
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        ax.plot([low, high], [low, high], color="0.6", lw=0.8, zorder=0)
        varies = np.ptp(x) > 0 and np.ptp(y) > 0
        r = f", r = {np.corrcoef(x.ravel(), y.ravel())[0, 1]:.3f}" if varies else ""
        ax.set(xlabel="real: mean log expression", ylabel="synthetic", title=f"Marker genes{r}")
        if len(types) <= _NAMED:
            ax.legend(frameon=False, fontsize=7, loc="upper left")
    return ax


def accessibility(
    real: AnnData | Pairs,
    synthetic: AnnData | None = None,
    label_key: str | None = None,
    *,
    ax: Axes | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    max_cells: int = 300,
    random_state: RandomState = 0,
) -> Axes:
    """Share of cells in which a peak is open, in every type, generated against real.

    A dot is a peak in a type. The legend has Pearson's correlation over the peaks of each type
    that are open in some cell of either side.

    Parameters
    ----------
    real, synthetic, label_key, ax, layer, key_added, max_cells, random_state
        As in `mean_variance`; of peaks, binarised or fragment counts.

    Returns
    -------
    Axes
        What was drawn on.

    Raises
    ------
    TypeError, KeyError, ValueError, ImportError
        As `mean_variance`.
    """
    check_matplotlib()
    from matplotlib import rc_context

    pairs = paired(
        real,
        synthetic,
        label_key,
        layer=layer,
        key_added=key_added,
        random_state=random_state,
    )
    shares = {}
    for label, *sides in pairs.matched(max_cells):
        opened = [np.asarray((cells != 0).mean(axis=0)).ravel() for cells in sides]
        shares[label] = [share[(opened[0] > 0) | (opened[1] > 0)] for share in opened]
    with rc_context(PLAIN):
        ax = _axes(ax)
        for colour, (label, (x, y)) in zip(_palette(len(shares)), shares.items(), strict=True):
            varies = len(x) and np.ptp(x) > 0 and np.ptp(y) > 0
            r = f", r = {np.corrcoef(x, y)[0, 1]:.3f}" if varies else ""
            _points(ax, x, y, colour, short(str(label)) + r)
        ends = [0.0, max(float(share.max(initial=0)) for both in shares.values() for share in both)]
        ax.plot(ends, ends, color="0.6", lw=0.8, zorder=0)
        ax.set(
            xlabel="real: share of cells with the peak open",
            ylabel="synthetic",
            title="Peak accessibility",
        )
        if len(shares) <= _NAMED:
            ax.legend(frameon=False, fontsize=7, loc="upper left")
    return ax


def _palette(n_types: int) -> list[Any]:
    from matplotlib import colormaps

    if n_types <= 10:
        return [colormaps["tab10"](i) for i in range(n_types)]
    return [colormaps["viridis"](i / (n_types - 1)) for i in range(n_types)]


def _markers(means: NDArray, n_markers: int) -> NDArray[np.intp]:
    """Genes of `means`, ``(n_types, n_genes)``, that stand out most in each type."""
    if len(means) > 1:
        others = (means.sum(axis=0) - means) / (len(means) - 1)
        means = means - others
    return np.unique(np.argsort(-means, axis=1, kind="stable")[:, :n_markers])


def _points(ax: Axes, x: NDArray, y: NDArray, colour: Any, name: str, size: float = 5) -> None:
    ax.scatter(
        x,
        y,
        s=size,
        alpha=0.6,
        lw=0,
        color=colour,
        label=name,
        rasterized=len(x) > _MANY,
    )


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]
