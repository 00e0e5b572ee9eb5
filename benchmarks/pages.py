"""Tables put into pages of the documentation, so that pages hold what commands printed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def add_docs_option(command: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Let a command put what it prints into a page."""
    command.add_argument(
        "--docs",
        type=Path,
        metavar="PAGE",
        help="also put the tables into this markdown page, in place of earlier ones of the same "
        "results",
    )


def into_page(text: str, page: Path, name: str) -> None:
    """Put `text` between the marks with this `name`, or below the page if there are none."""
    start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    new = f"{start}\n{text.strip()}\n{end}"
    if start in old and end in old:
        between = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        whole = between.sub(lambda _: new, old)
    else:
        whole = old.rstrip() + f"\n\n{new}\n"
    page.write_text(whole.lstrip(), encoding="utf-8")
