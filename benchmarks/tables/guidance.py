"""Figure 4 of the paper: cells of one type in the style of one donor, by how much each guides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from benchmarks.cells import Cells, log_normalise
from benchmarks.data import load_cells
from cfgen_augment import CFGen
from cfgen_augment.generation import LABEL
from cfgen_augment.plot import PLAIN, SYNTHETIC, short

WEIGHTS = (0.0, 1.0, 2.0)
_DONOR = "donor"
_MADE = 300  # cells in a panel
_COMPONENTS, _NEIGHBOURS = 30, 10
_OF_TYPE, _OF_BOTH, _OTHERS = "#E69F00", "#D55E00", "0.85"


def guidance_grid(
    results: Path,
    data: str,
    *,
    label_key: str | None = None,
    donor_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> Figure:
    """Generated among real cells on two principal components, by weight of type and donor.

    The type is the one of middle rank by size, the donor the one with most cells of it. Each panel
    says the mean share, among each generated cell's ten nearest real cells on 30 components, of
    cells of the type, and of cells of the donor; the title says these shares for real cells of
    both. CFGen is trained once with donors as an attribute, and kept beside the results.

    Parameters
    ----------
    results
        Directory that keeps the model.
    data, label_key, donor_key, layer
        As for `benchmarks.data.load_cells`; cells need donors.
    seed
        Of training and generation.

    Raises
    ------
    ValueError
        If cells have no donors.
    """
    cells = load_cells(data, label_key=label_key, donor_key=donor_key, layer=layer)
    if cells.donors is None:
        raise ValueError(
            f"--data {data}: expected cells of several donors for the grid of guidance; these "
            "have none. Name their column with --donor-key."
        )
    model = _trained(results / f"guidance_{Path(data).stem}_seed{seed}", cells, seed)
    sizes = cells.sizes()
    wanted_type = sorted(sizes, key=lambda name: (sizes[name], name))[len(sizes) // 2]
    of_type = cells.labels == wanted_type
    donors, numbers = np.unique(cells.donors[of_type], return_counts=True)
    wanted = {LABEL: wanted_type, _DONOR: str(donors[np.argmax(numbers)])}
    values = log_normalise(cells.counts)
    width = min(_COMPONENTS, *(size - 1 for size in values.shape))
    space = PCA(width, svd_solver="arpack", random_state=seed).fit(values)
    real = space.transform(values)
    panels = {
        (by_type, by_donor): space.transform(
            log_normalise(_made(model, wanted, by_type, by_donor, seed))
        )
        for by_type in WEIGHTS
        for by_donor in WEIGHTS
    }
    return _drawn(cells, cells.donors, real, panels, wanted)


def _trained(path: Path, cells: Cells, seed: int) -> CFGen:
    if path.is_dir():
        return CFGen.load(path)
    model = CFGen(random_state=seed).fit(
        cells.counts,
        cells.labels,
        covariates={_DONOR: np.asarray(cells.donors)},
        feature_names=cells.genes,
    )
    model.save(path)
    return model


def _made(
    model: CFGen, wanted: Mapping[str, str], by_type: float, by_donor: float, seed: int
) -> Any:
    """Counts; an attribute of weight 0 is not given at all."""
    weights = {LABEL: by_type, _DONOR: by_donor}
    given = {name: weight for name, weight in weights.items() if weight}
    return model.generate(
        np.full(_MADE, wanted[LABEL]) if by_type else None,
        covariates={_DONOR: np.full(_MADE, wanted[_DONOR])} if by_donor else None,
        n_cells=_MADE,
        guidance=given or None,
        random_state=seed,
    )


def nearest_shares(
    real: NDArray,
    attributes: Mapping[str, NDArray],
    made: NDArray,
    wanted: Mapping[str, Any],
    *,
    among_real: bool = False,
) -> dict[str, float]:
    """Share of each made cell's ten nearest real cells that have the wanted value, on average.

    Parameters
    ----------
    real, made
        Places, ``(n_real, width)`` and ``(n_made, width)``.
    attributes
        Values of the real cells, by attribute.
    wanted
        Value wanted, by attribute.
    among_real
        Whether `made` are real cells themselves, which are not their own neighbours.
    """
    search = NearestNeighbors(n_neighbors=min(_NEIGHBOURS + among_real, len(real))).fit(real)
    found = search.kneighbors(made, return_distance=False)[:, int(among_real) :]
    return {
        name: float((attributes[name][found] == value).mean()) for name, value in wanted.items()
    }


def _drawn(
    cells: Cells,
    donors: NDArray,
    real: NDArray,
    panels: Mapping[tuple[float, float], NDArray],
    wanted: Mapping[str, str],
) -> Figure:
    attributes = {LABEL: cells.labels, _DONOR: donors}
    of_type = cells.labels == wanted[LABEL]
    of_both = of_type & (donors == wanted[_DONOR])
    layers = (
        (real[~of_type], _OTHERS, "other real cells"),
        (real[of_type & ~of_both], _OF_TYPE, short(wanted[LABEL])),
        (real[of_both], _OF_BOTH, f"{short(wanted[LABEL])}, {short(wanted[_DONOR])}"),
    )
    ceiling = nearest_shares(real, attributes, real[of_both], wanted, among_real=True)
    with rc_context(PLAIN):
        figure = Figure(figsize=(9, 8.6), layout="constrained")
        grid = figure.subplots(len(WEIGHTS), len(WEIGHTS), sharex=True, sharey=True)
        for (by_type, by_donor), made in panels.items():
            ax = grid[WEIGHTS.index(by_type), WEIGHTS.index(by_donor)]
            for places, colour, name in (*layers, (made, SYNTHETIC, "generated")):
                ax.scatter(*places[:, :2].T, s=3, lw=0, color=colour, label=name, rasterized=True)
            shares = nearest_shares(real, attributes, made, wanted)
            ax.set_title(
                f"type {by_type:g}, donor {by_donor:g}: {shares[LABEL]:.0%}, {shares[_DONOR]:.0%}"
            )
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower right", ncols=2, frameon=False, markerscale=4
        )
        figure.supxlabel("PC 1", fontsize=9)
        figure.supylabel("PC 2", fontsize=9)
        figure.suptitle(
            f"Guidance by type and donor: {len(cells):,} real cells, {_MADE} generated in each "
            "panel.\nPercent: ten nearest real cells of the type, of the donor; of real cells of "
            f"both {ceiling[LABEL]:.0%}, {ceiling[_DONOR]:.0%}",
            fontsize=9,
        )
    return figure
