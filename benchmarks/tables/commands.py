"""``python -m benchmarks tables`` and ``figures``: their arguments, and what they do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.pages import add_docs_option, into_page
from benchmarks.tables.models import REAL, TABLES


def add_tables(commands: Any) -> None:
    """The arguments of ``tables``."""
    tables = commands.add_parser(
        "tables",
        help="the tables of the CFGen paper, measured again",
        description="Split cells at random within types, train every model on the training cells, "
        "let it make as many cells of each type as are held out, and compare both on principal "
        "components of the held-out cells. Finished parts are kept: the same command goes on "
        "where a run stopped.",
        epilog=f"models:\n{_listed()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tables.add_argument("--table", type=int, choices=sorted(TABLES), required=True)
    tables.add_argument(
        "--data",
        required=True,
        help="table 1: an .h5ad file, or a name such as pbmc3k; table 2: RNA.h5ad,ATAC.h5ad, an "
        ".h5mu file, or a name such as scicar-a549",
    )
    tables.add_argument("--label-key", help="column of obs with cell types (default: cell_type)")
    tables.add_argument("--layer", help="layer with raw counts (default: X)")
    tables.add_argument(
        "--min-cells",
        type=int,
        help="keep genes seen in so many cells (default: 20, of pbmc3k 30; table 2: 1)",
    )
    tables.add_argument(
        "--held-out", type=float, default=0.3, help="share of cells (default: %(default)s)"
    )
    tables.add_argument(
        "--models", nargs="+", default=["all"], metavar="MODEL", help="see below (default: all)"
    )
    tables.add_argument("--seeds", type=int, default=3, help="splits (default: %(default)s)")
    tables.add_argument("--threads", type=int, help="default: all cores")
    tables.add_argument("--out", type=Path, required=True, help="directory of the results")
    add_docs_option(tables)


def add_figures(commands: Any) -> None:
    """The arguments of ``figures``."""
    figures = commands.add_parser(
        "figures",
        help="the figures of the CFGen paper, from results of tables or run",
        description="From results of 'tables': mean and variance, zeros per cell (Fig. 2), marker "
        "expression and peak accessibility by type (Fig. 9). From results of 'run': gain against "
        "frequency (Fig. 5). With --data: a grid of guidance by type and donor (Fig. 4), for "
        "which CFGen is trained once and kept.",
    )
    figures.add_argument("results", type=Path, metavar="DIR")
    figures.add_argument("--data", help="cells with donors for the grid of guidance, such as kang")
    figures.add_argument("--label-key", help="column of obs with cell types (default: cell_type)")
    figures.add_argument("--donor-key", help="column of obs with donors (default: donor)")
    figures.add_argument("--layer", help="layer with raw counts (default: X)")
    figures.add_argument("--seed", type=int, default=0, help="default: 0")
    figures.add_argument(
        "--format", choices=["svg", "png", "pdf"], default="svg", help="default: %(default)s"
    )


def tables(given: argparse.Namespace, command: str) -> int:
    """Do what is left of a table, write and print it; 1 if some of it failed."""
    from benchmarks.tables import summary, work
    from benchmarks.tables.cells import read

    design = work.Design(
        given.table, given.data, given.label_key, given.layer, given.min_cells, given.held_out
    )
    if given.seeds < 1:
        raise ValueError(f"--seeds: expected 1 or more; got {given.seeds}.")
    chosen = choose(given.table, given.models)
    cells = read(
        given.data,
        paired=given.table == 2,
        label_key=given.label_key,
        layer=given.layer,
        min_cells=given.min_cells,
    )
    work.open_results(given.out, design, cells, command, chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    failures = work.work(
        cells,
        design,
        chosen,
        given.seeds,
        given.out,
        given.threads or cores or 1,
        lambda line: print(line, flush=True),
    )
    text = summary.write_tables(given.out)
    print(text)
    for part, why in failures.items():
        print(f"failed: {part}: {why}")
    if given.docs is not None:
        name = f"{given.table} {Path(given.data).name}"
        into_page(text, given.docs, name)
    return int(bool(failures))


def figures(given: argparse.Namespace, command: str) -> int:
    """Draw what the results allow; says what it wrote."""
    from benchmarks.tables.drawing import draw

    for path in draw(
        given.results,
        given.format,
        command,
        data=given.data,
        label_key=given.label_key,
        donor_key=given.donor_key,
        layer=given.layer,
        seed=given.seed,
    ):
        print(path)
    return 0


def choose(table: int, names: list[str]) -> dict[str, Any]:
    """Models of a table by name, the row of real cells always among them.

    Raises
    ------
    ValueError
        For a name that is none.
    """
    known = TABLES[table]
    unknown = sorted(set(names) - set(known) - {"all"})
    if unknown:
        raise ValueError(
            f"--models: expected any of {', '.join(known)}, all; got {', '.join(unknown)}."
        )
    return {n: m for n, m in known.items() if n in names or "all" in names or n == REAL}


def _listed() -> str:
    lines = []
    for number, models in TABLES.items():
        lines.append(f"  table {number}:")
        lines += [f"    {name:22}{model.about}" for name, model in models.items()]
    return "\n".join(lines)
