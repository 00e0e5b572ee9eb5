"""The report: a diagnosis and figures as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfgen_augment import __version__, files, plot, writing
from cfgen_augment.diagnosis import LIMITS, MIN_CELLS, TOO_FEW, diagnose
from cfgen_augment.pairs import Pairs, paired
from cfgen_augment.parameters import RandomState

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:75rem;margin:auto;
padding:1.5rem}
table{border-collapse:collapse;font-size:13px}
th,td{padding:.25rem .55rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:last-child,th:last-child{text-align:left}
td.fails{background:rgba(213,94,0,.22);font-weight:600}
.scroll{overflow-x:auto} figure{display:inline-block;margin:0 1rem 1rem 0;vertical-align:top}
figure img{max-width:100%} figcaption{color:#555;font-size:13px} small{color:#555}
"""
_SIZE = (4.6, 3.6)  # of a figure, inches


def write_report(
    path: str | os.PathLike,
    real: AnnData | Pairs,
    synthetic: AnnData | None = None,
    label_key: str | None = None,
    *,
    layer: str | None = None,
    key_added: str | None = None,
    max_cells: int = 1000,
    random_state: RandomState = 0,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Write what `cfgen_augment.diagnose` finds, with figures, to one HTML file.

    Types are read one after the other and no more than `max_cells` cells of either side at a time,
    so that files of any size can be given backed.

    Parameters
    ----------
    path
        File to write, ``.html``. It appears complete or not at all.
    real, synthetic, label_key, layer, key_added, max_cells, random_state
        As in `cfgen_augment.diagnose`.
    overwrite
        Whether a file at `path` may be replaced.

    Returns
    -------
    DataFrame
        What `cfgen_augment.diagnose` returns.

    Raises
    ------
    FileExistsError
        If `path` exists and may not be replaced; before anything is read.
    OSError
        If it cannot be written.
    ImportError
        If matplotlib is not installed.
    TypeError, KeyError, ValueError
        As `cfgen_augment.diagnose`; also if both sides have no type in common, or `path` is no
        place for a file or does not end in ``.html``.
    """
    path = Path(path)
    files.check_report(path, overwrite=overwrite)
    plot.check_matplotlib()
    pairs = paired(
        real,
        synthetic,
        label_key,
        layer=layer,
        key_added=key_added,
        random_state=random_state,
    )
    table = diagnose(pairs, max_cells=max_cells)
    page = _page(table, pairs)
    with writing.replacing(path) as place, writing.writing(path):
        place.write_text(page, encoding="utf-8")
    return table


def _page(table: pd.DataFrame, pairs: Pairs) -> str:
    n_ok = int((table["verdict"] == "ok").sum())
    n_few = int(table["verdict"].str.contains(TOO_FEW).sum())
    limits = "".join(
        f"<tr><th>{name}</th><td>{tolerated:g} + {factor:g} x ({noise})</td></tr>"
        for name, (tolerated, factor, noise) in LIMITS.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Real and synthetic cells</title><style>{_STYLE}</style></head><body>"
        "<h1>Real and synthetic cells</h1>"
        f"<p>{len(pairs.real.rows):,} real and {len(pairs.synthetic.rows):,} synthetic cells, "
        f"{len(pairs.genes):,} features, {len(table)} types: {n_ok} ok, {n_few} with too few "
        f"cells to be judged, {len(table) - n_ok - n_few} with differences.</p>"
        f"<h2>Diagnosis</h2>{_table(table)}"
        "<p><small>A floor is the same measure between two halves of the real cells, m cells "
        "each. The verdict names the columns whose excess over real cells is above the limit; "
        f"types need {2 * MIN_CELLS} real and {MIN_CELLS} synthetic cells. Columns and excesses "
        "are explained under cfgen_augment.diagnose.</small></p>"
        f"<details><summary>Limits</summary><table>{limits}</table></details>"
        f"<h2>Figures</h2>{_figures(pairs)}"
        f"<p><small>cfgen-augment {escape(__version__)}, seed {pairs.seed}</small></p>"
        "</body></html>\n"
    )


def _table(table: pd.DataFrame) -> str:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in ("type", *table.columns))
    rows = []
    for label, row in zip(table.index, table.to_dict("records"), strict=True):
        failing = set(row["verdict"].split(", "))
        cells = "".join(
            ('<td class="fails">' if name in failing else "<td>") + escape(_shown(value)) + "</td>"
            for name, value in row.items()
        )
        rows.append(f'<tr><th scope="row">{escape(str(label))}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value != value else f"{value:.3f}"


def _figures(pairs: Pairs) -> str:
    from matplotlib.figure import Figure

    drawn: Mapping[str, Any] = {
        "Variance of every gene's counts against their mean": plot.mean_variance,
        "Cells by their share of genes without a count": plot.zeros_per_cell,
        "Mean log expression of each type's markers": plot.markers,
    }
    shown = []
    for caption, draw in drawn.items():
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(pairs, ax=figure.subplots())
        shown.append(figure_to_html(figure, caption))
    return "".join(shown)


def figure_to_html(figure: Figure, caption: str) -> str:
    """A figure as SVG inside the page; the same figure gives the same text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.BytesIO()
    # Names are fixed and there is no date; texts stay texts, which is smaller than outlines.
    settings: dict[Any, Any] = {"svg.hashsalt": caption, "svg.fonttype": "none", **plot.PLAIN}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        canvas = FigureCanvasSVG(figure)
        engine = figure.get_layout_engine()
        if engine is not None:  # once, here: drawing, and saving before it, would repeat it
            engine.execute(figure)
            figure.set_layout_engine("none")
        canvas.print_svg(file, metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode("ascii")
    name = escape(caption, quote=True)
    return (
        f'<figure><div class="scroll" tabindex="0"><img alt="{name}" '
        f'src="data:image/svg+xml;base64,{data}"></div><figcaption>{name}</figcaption></figure>'
    )
