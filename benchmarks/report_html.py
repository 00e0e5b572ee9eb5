"""Pieces of an HTML page: escaped text, tables and JSON values."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from benchmarks.report_data import Cell, Table

MINUS = re.compile(r"(?<![\w.])-(?=\d|\.\d)")
DOI = re.compile(r"\b(?:https?://(?:dx\.)?doi\.org/)?(10\.\d{4,9}/[^\s\"<>;]+[^\s\"<>;.,)])")


def problem_to_html(problem: str) -> str:
    """Why a section has nothing to show."""
    return f'<p class="banner">Nothing to show: {escape(problem)}.</p>'


def text_to_html(text: str) -> str:
    """Escaped, with DOIs as links."""
    places, last = [], 0
    for match in DOI.finditer(text):
        link = escape(match[1], quote=True)
        places.append(escape(text[last : match.start()]))
        places.append(f'<a href="https://doi.org/{link}">doi:{link}</a>')
        last = match.end()
    return "".join(places) + escape(text[last:])


def json_to_html(value: Any) -> str:
    """A JSON value as nested lists."""
    if isinstance(value, dict):
        items = "".join(
            f"<dt>{escape(str(k))}</dt><dd>{json_to_html(v)}</dd>" for k, v in value.items()
        )
        return f"<dl>{items}</dl>" if items else "none"
    if isinstance(value, list):
        if any(isinstance(v, dict | list) for v in value) or any(len(str(v)) > 40 for v in value):
            return "<ul>" + "".join(f"<li>{json_to_html(v)}</li>" for v in value) + "</ul>"
        return escape(", ".join(map(str, value))) or "none"
    return "none" if value is None else text_to_html(str(value))


def table_to_html(table: Table) -> str:
    """A table that scrolls sideways where the page is narrow."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in table.columns)
    rows = "".join(
        "<tr>" + _heading(row[0]) + "".join(map(_cell, row[1:])) + "</tr>" for row in table.rows
    )
    empty = "" if table.rows else "<p>No rows.</p>"
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll" tabindex="0"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{empty}"
    )


def _heading(cell: Cell) -> str:
    return f'<th scope="row">{escape(cell.text)}</th>'


def _cell(cell: Cell) -> str:
    style = ""
    if cell.tint:
        colour = "0,114,178" if cell.tint > 0 else "213,94,0"
        style = f' style="background:rgba({colour},{0.08 + 0.42 * abs(cell.tint):.2f})"'
    text = MINUS.sub("\N{MINUS SIGN}", escape(cell.text))
    text = f"<b>{text}</b>" if cell.clear else text
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    return f"<td{style}>{text}{small}</td>"
