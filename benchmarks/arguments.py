"""What ``python -m benchmarks`` can be told."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS, Arm
from benchmarks.choices import CHOICES
from benchmarks.pages import add_docs_option
from benchmarks.tables.commands import add_figures, add_tables


def parser() -> argparse.ArgumentParser:
    """Of all commands; ``do`` is the name of the command that was given."""
    everything = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Does augmenting rare cell types help on donors the model never saw?",
    )
    commands = everything.add_subparsers(required=True, dest="do")
    _run(commands)
    _choices(commands)

    report = commands.add_parser("report", help="make tables and report again")
    report.add_argument("results", type=Path)
    report.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    add_docs_option(report)

    _composition(commands)
    _pretrain(commands)
    add_tables(commands)
    add_figures(commands)
    return everything


def _run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run arms on held-out donors",
        description="Split by donor, augment the training donors' cells with every arm, embed, "
        "classify the held-out donors' cells, and report. Finished parts are kept: the same "
        "command goes on where a run stopped.",
        epilog=f"arms:\n{_described(ARMS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _data(run)
    design = run.add_argument_group("design")
    design.add_argument(
        "--arms", nargs="+", default=["default"], metavar="ARM", help="see below; default, all"
    )
    design.add_argument(
        "--embedder",
        nargs="+",
        default=["pca"],
        metavar="E",
        help="pca, scgpt, obsm:KEY; several are measured on the same cells (default: pca)",
    )
    design.add_argument("--scgpt-dir", help="scGPT checkpoint directory")
    _design(design, seeds=3)
    design.add_argument(
        "--celltypist", action="store_true", help="also fit CellTypist's model (extra)"
    )
    _work(run, Path("results"))


def _choices(commands: Any) -> None:
    choices = commands.add_parser(
        "choices",
        help="compare choices of CFGen's defaults on training donors alone",
        description="Hold donors out of the training donors of every split of 'run', and compare "
        "on them what CFGen's defaults were chosen among; the donors that the split holds out are "
        "never looked at. Finished parts are kept, as by 'run'.",
        epilog=f"choices (quote names with spaces):\n{_described(CHOICES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _data(choices)
    design = choices.add_argument_group("design")
    design.add_argument(
        "--choices", nargs="+", default=["all"], metavar="CHOICE", help="see below (default: all)"
    )
    _design(design, seeds=1)
    choices.set_defaults(embedder=["pca"], scgpt_dir=None, celltypist=False)
    _work(choices, Path("choices"))


def _composition(commands: Any) -> None:
    kinds = ("unseen", "whole", "dispersion", "depth")
    composition = commands.add_parser(
        "composition",
        help="measure how types and donors compose",
        description="Guidance weights, combinations of type and donor that are absent from "
        "training, depth as a technical effect, dispersions, and cells translated between donors. "
        "Finished parts are kept, as by 'run'.",
    )
    _source(composition.add_argument_group("data"))
    design = composition.add_argument_group("design")
    design.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    design.add_argument(
        "--splits", type=int, default=3, help="of donors, for dispersions (default: %(default)s)"
    )
    design.add_argument(
        "--parts",
        nargs="+",
        choices=kinds,
        default=kinds,
        metavar="PART",
        help=f"some of {', '.join(kinds)} (default: all)",
    )
    work = composition.add_argument_group("work")
    work.add_argument("--out", type=Path, default=Path("composition"), help="default: %(default)s/")
    work.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    work.add_argument("--threads", type=int, default=1, help="per process (default: %(default)s)")
    add_docs_option(work)


def _data(command: argparse.ArgumentParser) -> None:
    data = command.add_argument_group("data")
    _source(data)
    data.add_argument(
        "--thin",
        metavar="TYPE:N,...",
        help="cells that these types keep in training; the others form the oracle's pool",
    )
    data.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        help="share of the other types' training cells set aside to test memorisation "
        "(default: %(default)s)",
    )


def _source(data: Any) -> None:
    data.add_argument(
        "--data", required=True, help="an .h5ad file, demo, simulated, or a name such as kang"
    )
    data.add_argument("--label-key", help="column of obs with cell types (default: cell_type)")
    data.add_argument("--donor-key", help="column of obs with donors (default: donor, if any)")
    data.add_argument("--layer", help="layer with raw counts (default: X)")


def _design(design: Any, seeds: int) -> None:
    design.add_argument("--splits", type=int, default=5, help="default: %(default)s")
    design.add_argument("--seeds", type=int, default=seeds, help="per split (default: %(default)s)")
    design.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    design.add_argument(
        "--held-out", type=float, default=0.2, help="share of donors (default: %(default)s)"
    )
    design.add_argument(
        "--target-size",
        type=_size,
        default=2.0,
        help="2.0 doubles the training cells, 800000 is a total (default: %(default)s)",
    )
    design.add_argument(
        "--n-genes", type=int, default=2000, help="highly variable genes (default: %(default)s)"
    )
    design.add_argument(
        "--rare-share",
        type=float,
        default=0.05,
        help="types below this share of the training cells are rare (default: %(default)s)",
    )


def _work(command: argparse.ArgumentParser, out: Path) -> None:
    work = command.add_argument_group("work")
    work.add_argument("--out", type=Path, default=out, help="default: %(default)s/")
    work.add_argument(
        "--jobs", type=int, help="processes (default: one per core that memory allows)"
    )
    work.add_argument("--threads", type=int, help="per process (default: cores / jobs)")
    work.add_argument(
        "--dry-run", action="store_true", help="only say how long and how much memory"
    )


def _pretrain(commands: Any) -> None:
    pretrain = commands.add_parser(
        "pretrain-scgpt", help="train a small scGPT in the official format"
    )
    pretrain.add_argument(
        "--data",
        required=True,
        help="cells to train on: others than those of the benchmark, or held-out donors are seen",
    )
    pretrain.add_argument("--label-key", help="column that unlabelled cells are dropped by")
    pretrain.add_argument("--layer", help="layer with raw counts (default: X)")
    pretrain.add_argument(
        "--genes-of", metavar="DATA", help="train on genes that these data have too, no others"
    )
    pretrain.add_argument("--out", type=Path, required=True)
    pretrain.add_argument("--embsize", type=int, default=64)
    pretrain.add_argument("--layers", type=int, default=3)
    pretrain.add_argument("--heads", type=int, default=4)
    pretrain.add_argument("--d-hid", type=int, default=128)
    pretrain.add_argument("--epochs", type=int, default=8)
    pretrain.add_argument("--seed", type=int, default=0)


def _described(table: Mapping[str, Arm]) -> str:
    """Every name and what it stands for, in two columns."""
    wide = max(map(len, table)) + 2
    return "\n".join(
        textwrap.fill(
            f"{name:{wide}}{arm.about}{' (extra)' if arm.extra else ''}",
            width=96,
            initial_indent="  ",
            subsequent_indent=" " * (wide + 2),
        )
        for name, arm in table.items()
    )


def _size(text: str) -> int | float:
    return float(text) if "." in text else int(text)
