"""The report: one HTML page that needs nothing else, and the same tables as markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks import figures, report_quality, report_tables
from benchmarks.report_data import Cell, Results, Setting, Table, at, read_results, setting_name
from benchmarks.report_html import (
    json_to_html,
    problem_to_html,
    table_to_html,
    text_to_html,
)
from benchmarks.report_text import INTRODUCTIONS, READING, STYLE, TITLES
from cfgen_augment.report import figure_to_html

#: Files without which a section has nothing to say.
NEEDS = {
    "headline": "gains",
    "against": "scores",
    "losses": "gains",
    "types": "gains",
    "frequency": "gains",
    "oracle": "oracle_share",
    "neighbours": "gains",
    "realism": "realism",
    "memorisation": "memorisation",
    "costs": "costs",
    "splits": "splits",
}


def write_report(results: Path) -> Path:
    """Write ``report.html`` into a results directory.

    Parameters
    ----------
    results
        Directory with ``manifest.json`` and the tables that a run wrote. What is missing is said
        in its section.

    Returns
    -------
    Path
        The page: one file, figures and style inside.
    """
    read = read_results(results)
    name = str(read.manifest.get("data", {}).get("name", "unknown data"))
    body = [f"<h1>Held-out-donor benchmark: {escape(name)}</h1>", _status(read), _data(read)]
    links = " · ".join(f'<a href="#{key}">{title}</a>' for key, title in TITLES.items())
    body.append(f"<nav>{links}</nav>")
    for key, title in TITLES.items():
        body.append(f'<section id="{key}"><h2>{title}</h2>')
        if key in INTRODUCTIONS:
            body.append(f"<p>{INTRODUCTIONS[key]}</p>")
        problem = read.problems.get(NEEDS.get(key, ""))
        body += [problem_to_html(problem)] if problem else list(SECTIONS[key](read))
        body.append("</section>")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmark: {escape(name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    path = Path(results) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def markdown_tables(results: Path) -> str:
    """The main tables as markdown, with the numbers of the CSVs.

    Parameters
    ----------
    results
        Directory as for `write_report`.
    """
    read = read_results(results)
    parts = [f"**{line}**" for line in [_unfinished(read)] if line]

    def add(title: str, needs: str, make: Callable[[], list[Table]], small: bool = True) -> None:
        parts.append(f"### {title}")
        if needs in read.problems:
            parts.append(f"{read.problems[needs][:1].upper()}{read.problems[needs][1:]}.")
            return
        for table in make():
            parts.append(f"{_plain(table.title)}:\n\n{_markdown(table, small)}")

    settings = read.settings()
    gains = report_tables
    add("Gain in macro F1", "gains", lambda: [gains.headline(read, s) for s in settings])
    if "cfgen" in read.arms("scores"):
        add("CFGen against every arm", "scores", lambda: [gains.against(read)])
    add("Gain by type", "gains", lambda: [gains.per_type(read, s) for s in settings], small=False)
    add("Gain against frequency", "correlation", lambda: [gains.correlation(read)])
    add(
        "Share of the oracle's gain",
        "oracle_share",
        lambda: [gains.oracle_share(read, s) for s in settings],
    )
    add("Realism", "realism", lambda: [_focus(read)])
    add("Memorisation", "memorisation", lambda: [report_quality.memorisation(read)])
    add("Costs", "costs", lambda: [report_quality.costs(read)])
    return "\n\n".join(parts) + "\n"


def _headline(read: Results) -> Iterator[str]:
    arms = [a for a in read.arms("gains") if a != "none"]
    groups, settings = read.groups(), read.settings()
    rows = read.f1[read.f1["kind"] == "group"]
    if groups and arms:
        embedders = sorted({e for e, _ in settings if e != "genes"}) or ["genes"]
        for embedder in embedders:
            shown = [s for s in settings if s[0] in (embedder, "genes")]
            names = [setting_name(s) for s in shown]
            figure = figures.headline(rows, shown, names, arms, groups)
            yield figure_to_html(figure, f"Gain in macro F1 by arm and group of types, {embedder}")
    for setting in settings:
        yield table_to_html(report_tables.headline(read, setting))


def _against(read: Results) -> Iterator[str]:
    if "cfgen" not in read.arms("scores"):
        yield "<p>CFGen is not among the arms.</p>"
        return
    yield table_to_html(report_tables.against(read))


def _losses(read: Results) -> Iterator[str]:
    yield table_to_html(report_tables.losses(read))


def _types(read: Results) -> Iterator[str]:
    for setting in read.settings():
        rows = _type_rows(read, setting)
        if not rows.empty:
            arms = [a for a in read.arms("gains") if a in set(rows["arm"]) - {"none"}]
            yield figure_to_html(
                figures.gains_by_type(rows, arms), f"Gain by type, {setting_name(setting)}"
            )
        yield table_to_html(report_tables.per_type(read, setting))


def frequency_figures(read: Results) -> Iterator[tuple[str, Figure]]:
    """Gain against training cells with its title, for every embedder and classifier."""
    measure = read.frequency_measure()
    for setting in read.settings():
        rows = _type_rows(read, setting, measure)
        if rows.empty:
            continue
        arms = [a for a in read.arms("gains") if a in set(rows["arm"]) - {"none"}]
        own = at(read.frames["correlation"], setting)
        name = {"f1": "F1"}.get(measure, measure)
        yield (
            f"Gain in {name} against training cells, {setting_name(setting)}",
            figures.gain_against_frequency(rows, own, arms, name),
        )


def _frequency(read: Results) -> Iterator[str]:
    for title, figure in frequency_figures(read):
        yield figure_to_html(figure, title)
    if "correlation" in read.problems:
        yield problem_to_html(read.problems["correlation"])
    else:
        yield table_to_html(report_tables.correlation(read))


def _oracle(read: Results) -> Iterator[str]:
    for setting in read.settings():
        yield table_to_html(report_tables.oracle_share(read, setting, types=True))


def _neighbours(read: Results) -> Iterator[str]:
    rows = read.f1[read.f1["classifier"].str.startswith("knn")]
    for embedder in sorted(set(rows["embedder"])):
        yield table_to_html(report_tables.neighbours(read, embedder, read.groups()))


def _realism(read: Results) -> Iterator[str]:
    yield table_to_html(_focus(read))
    sizes = read.sizes()
    for name in read.types(set(read.frames["realism"]["type"])):
        title = f"{name} ({sizes[name]:.0f} training cells)" if name in sizes.index else name
        yield table_to_html(report_quality.realism(read, [name], title))


def _memorisation(read: Results) -> Iterator[str]:
    yield table_to_html(report_quality.memorisation(read))
    for title, column in report_quality.MEMORISATION:
        yield table_to_html(report_quality.memorisation_by_type(read, title, column))


def _costs(read: Results) -> Iterator[str]:
    yield table_to_html(report_quality.costs(read))


def _splits(read: Results) -> Iterator[str]:
    yield table_to_html(report_quality.splits(read))


def _reading(read: Results) -> Iterator[str]:
    yield "<ul>" + "".join(f"<li>{line}</li>" for line in READING) + "</ul>"
    share = read.manifest.get("settings", {}).get("rare_share")
    members = read.members()
    if share is not None:
        rare = ", ".join(members.get("rare", [])) or "none"
        yield (
            f"<p>Rare: a median share of less than {escape(str(share))} of a split's training "
            f"cells ({escape(rare)}). Common: all others.</p>"
        )
    yield f"<p>Thinned in training: {escape(', '.join(read.thinned()) or 'none')}.</p>"
    listed = ", ".join(f"{t} ({n:.0f})" for t, n in read.sizes().items())
    yield f"<p>Types by mean number of training cells: {escape(listed)}.</p>"


def _provenance(read: Results) -> Iterator[str]:
    if "manifest" in read.problems:
        yield problem_to_html(read.problems["manifest"])
    else:
        yield json_to_html(read.manifest)
    if read.problems:
        lines = "".join(f"<li>{escape(p)}</li>" for p in read.problems.values())
        yield f"<p>Files that could not be used:</p><ul>{lines}</ul>"


SECTIONS: dict[str, Callable[[Results], Iterator[str]]] = {
    "headline": _headline,
    "against": _against,
    "losses": _losses,
    "types": _types,
    "frequency": _frequency,
    "oracle": _oracle,
    "neighbours": _neighbours,
    "realism": _realism,
    "memorisation": _memorisation,
    "costs": _costs,
    "splits": _splits,
    "reading": _reading,
    "provenance": _provenance,
}


def _type_rows(read: Results, setting: Setting, measure: str = "f1") -> pd.DataFrame:
    rows = at(read.frames["gains"], setting)
    rows = rows[rows["measure"] == measure]
    return rows[rows["kind"] == "type"]


def _focus(read: Results) -> Table:
    name, types = read.focus()
    title = f"Mean over {name} types ({', '.join(types)})"
    return report_quality.realism(read, types, title)


def _unfinished(read: Results) -> str:
    """Why the run is not complete; empty if it is."""
    if "manifest" in read.problems:
        return f"Nothing says whether this run is complete: {read.problems['manifest']}."
    if read.manifest.get("complete") and read.manifest.get("finished"):
        return ""
    missing = [str(m) for m in read.manifest.get("missing") or []]
    shown = ", ".join(missing[:12]) + (f" and {len(missing) - 12} more" if missing[12:] else "")
    failed = len(read.manifest.get("failures") or {})
    line = f"This run is incomplete. Missing (split, seed, arm): {shown or 'not stated'}."
    return line + (f" {failed} of them failed; see Provenance." if failed else "")


def _status(read: Results) -> str:
    line = _unfinished(read)
    notes = [str(note) for note in read.manifest.get("notes") or []]
    banner = f'<p class="banner" role="alert">{escape(line)}</p>' if line else ""
    return banner + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _data(read: Results) -> str:
    data = read.manifest.get("data", {})
    donors = data.get("n_donors")
    sizes = [f"{data[k]} {k[2:]}" for k in ("n_cells", "n_genes") if k in data]
    sizes.append(f"{donors} donors" if donors else "no donors")
    citation = text_to_html(str(data.get("citation") or "source not stated"))
    return f"<p>{escape(', '.join(sizes))}. {citation}</p>"


def _markdown(table: Table, small: bool) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def shown(cell: Cell) -> str:
        return _plain(f"{cell.text} ({cell.small})" if small and cell.small else cell.text)

    head = [line([_plain(c) for c in table.columns]), "|" + "---|" * len(table.columns)]
    return "\n".join(head + [line([shown(cell) for cell in row]) for row in table.rows])


def _plain(text: str) -> str:
    """`text` on one line, with what markdown would read as markup escaped."""
    return re.sub(r"([\\|`*<>$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
