"""Figures 2, 4, 5 and 9 of the paper from results on disk; each says its cells and its command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.tables.cells import ATAC, RNA
from benchmarks.tables.models import REAL, TABLES, Made, Model
from benchmarks.tables.work import kept, read_manifest
from cfgen_augment import plot

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_TYPE = "type"
_MOST = 2000  # cells of a type in a panel
_COLUMNS = 4


def draw(
    results: Path,
    suffix: str,
    command: str,
    *,
    data: str | None = None,
    label_key: str | None = None,
    donor_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write the figures that results allow into ``figures/`` beside them.

    Parameters
    ----------
    results
        Directory of ``python -m benchmarks tables`` or ``run``; for the grid alone, any.
    suffix
        ``svg``, ``png`` or ``pdf``.
    command
        Written below every figure.
    data, label_key, donor_key, layer, seed
        Of the grid of guidance; without `data` there is none.

    Returns
    -------
    list of Path
        Files written.

    Raises
    ------
    FileNotFoundError
        If the directory holds no results, and no `data` are given.
    """
    made: list[tuple[str, Figure]] = []
    path = results / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "design" in document:
        made += _of_tables(results)
    elif "settings" in document:
        made += _of_run(results)
    elif data is None:
        raise FileNotFoundError(
            f"{results}: expected results of 'python -m benchmarks tables' or 'run'; there is no "
            "manifest.json. Pass their directory, or --data for the grid of guidance alone."
        )
    if data is not None:
        from benchmarks.tables.guidance import guidance_grid

        made.append(
            (
                "fig4_guidance",
                guidance_grid(
                    results,
                    data,
                    label_key=label_key,
                    donor_key=donor_key,
                    layer=layer,
                    seed=seed,
                ),
            )
        )
    written = []
    for name, figure in made:
        note = "\n".join([*document.get("command", []), command])
        below = -0.25 / figure.get_figheight()  # a quarter of an inch: legends hang over the edge
        figure.text(0, below, note, fontsize=6, va="top", color="0.4", parse_math=False)
        target = results / "figures" / f"{name}.{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, bbox_inches="tight", dpi=150)
        written.append(target)
    return written


def _of_run(results: Path) -> Iterator[tuple[str, Figure]]:
    from benchmarks.report import frequency_figures
    from benchmarks.report_data import read_results

    read = read_results(results)
    n_cells = read.manifest["data"]["n_cells"]
    for title, figure in frequency_figures(read):
        splits = int(read.f1["splits"].max())
        figure.suptitle(f"{title}; {n_cells:,} cells, {splits} splits", fontsize=9)
        setting = re.sub(r"\W+", "_", title.partition(", ")[2]).strip("_")
        yield f"fig5_{setting}", figure


def _of_tables(results: Path) -> Iterator[tuple[str, Figure]]:
    manifest = read_manifest(results)
    models = TABLES[manifest["design"]["table"]]
    found = {RNA: _panels(results, models, RNA), ATAC: _panels(results, models, ATAC)}
    drawn: tuple[tuple[str, str, Callable[..., Axes]], ...] = (
        ("fig2_mean_variance", RNA, plot.mean_variance),
        ("fig2_zeros_per_cell", RNA, plot.zeros_per_cell),
        ("fig9_marker_expression", RNA, plot.markers),
        ("fig9_peak_accessibility", ATAC, plot.accessibility),
    )
    for name, modality, how in drawn:
        if found[modality]:
            yield name, _figure(found[modality], how)


def _panels(
    results: Path, models: Mapping[str, Model], modality: str
) -> dict[str, tuple[AnnData, AnnData]]:
    """Held-out cells beside those of each model that made counts with types."""
    held_out = kept(results, "held-out", modality)
    panels = {}
    for name, model in models.items():
        made = kept(results, name, modality)
        if held_out is not None and made is not None and made.labels is not None:
            if made.logged:  # there are no counts to draw
                continue
            panels[model.title] = (_annotated(held_out, modality), _annotated(made, modality))
    # Real cells beside real cells come first, and alone they are no result.
    return panels if set(panels) - {models[REAL].title} else {}


def _annotated(made: Made, modality: str) -> AnnData:
    import anndata
    import pandas as pd

    values = made.values[modality]
    names = [f"cell{i}" for i in range(values.shape[0])]
    return anndata.AnnData(values, obs=pd.DataFrame({_TYPE: made.labels}, index=names))


def _figure(panels: Mapping[str, tuple[AnnData, AnnData]], how: Callable[..., Axes]) -> Figure:
    """A panel per model, all on the same axes."""
    with rc_context(plot.PLAIN):
        columns = min(_COLUMNS, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(3.1 * columns, 0.4 + 2.9 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for ax, (title, (real, made)) in zip(grid.flat, panels.items(), strict=False):
            how(real, made, _TYPE, ax=ax, max_cells=_MOST)
            ax.set_title(f"{title}{_correlation(ax)}")
        for ax in grid.flat[len(panels) :]:
            ax.set_visible(False)
        n = next(iter(panels.values()))[0].n_obs
        figure.suptitle(f"{n:,} held-out cells, and as many made, first seed", fontsize=9)
    return figure


def _correlation(ax: Axes) -> str:
    """``, r = 0.99`` where the panel's own title says it."""
    title = ax.get_title()
    return title[title.index(", r = ") :] if ", r = " in title else ""
