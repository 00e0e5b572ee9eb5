"""``python -m benchmarks``: what augmenting rare types does for donors the model never saw.

python -m benchmarks run --data kang --embedder pca --out results/
python -m benchmarks report results/
python -m benchmarks pretrain-scgpt --data kang --out checkpoint/
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.settings import Place, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call, and say in one line what went wrong.

    Returns
    -------
    int
        0 if all was done; 1 if some parts failed; 2 for arguments or data that cannot be used;
        130 if interrupted.
    """
    given = _parser().parse_args(arguments)
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return given.do(given, "python -m benchmarks " + shlex.join(_without_folders(typed)))
    except (ValueError, ImportError, FileNotFoundError, FileExistsError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace, command: str) -> int:
    # Heavy imports wait until the arguments are known to be good.
    from benchmarks import estimate, results
    from benchmarks.arms import choose
    from benchmarks.data import content_hash
    from benchmarks.datasets import describe
    from benchmarks.run import cells_of, duration, plan, run, splits_of
    from benchmarks.splits import parse_thin

    settings = Settings(
        data=given.data,
        label_key=given.label_key,
        donor_key=given.donor_key,
        layer=given.layer,
        n_splits=given.splits,
        held_out=given.held_out,
        thin=tuple(parse_thin(given.thin).items()) if given.thin else (),
        reserve=given.reserve,
        n_genes=given.n_genes,
        target_size=given.target_size,
        embedders=tuple(given.embedder),
        scgpt_dir=given.scgpt_dir,
        rare_share=given.rare_share,
        celltypist=given.celltypist,
        seed=given.seed,
    )
    cells = cells_of(settings)
    splits = splits_of(settings)
    arms = choose(given.arms, pool=_oracle_possible(cells, splits), donors=cells.donors is not None)
    notes = _notes(cells, splits, settings)
    out: Path = given.out
    manifest = results.open_manifest(
        out,
        settings,
        describe(settings.data)
        | {
            "hash": content_hash(cells),
            "n_cells": len(cells),
            "n_genes": len(cells.genes),
            "n_donors": None if cells.donors is None else len(set(cells.donors)),
        },
        {
            "command": command,
            "arms": arms,
            "seeds": given.seeds,
            "about": {arm: ARMS[arm].about for arm in arms},
        },
        notes,
    )
    everything = plan(len(splits), given.seeds, arms, ())
    tasks = plan(len(splits), given.seeds, arms, results.finished(out))
    process_mb = estimate.memory_mb(cells, settings)
    n_jobs = given.jobs or estimate.jobs(process_mb, len(tasks))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    place = Place(out.resolve(), n_jobs, given.threads or max(1, (cores or 1) // n_jobs))
    expected = estimate.seconds_per_task(cells, settings)
    for note in notes:
        print(f"note: {note}")
    wanted = sum(len(task.arms) for task in everything)
    left = sum(len(task.arms) for task in tasks)
    print(
        f"{len(cells):,} cells x {len(cells.genes):,} genes, {len(splits)} splits, "
        f"{given.seeds} seeds, {len(arms)} arms: {left} of {wanted} parts to do\n"
        f"in {n_jobs} processes of {place.threads} threads: roughly "
        f"{duration(sum(map(expected, tasks)) / n_jobs)} and {process_mb * n_jobs / 1024:.1f} GiB",
        flush=True,
    )
    if given.dry_run:
        return 0
    manifest |= {"jobs": n_jobs, "threads": place.threads}
    results.write_json(out / "manifest.json", manifest)
    splits_table(splits, cells).to_csv(out / "splits.csv", index=False)
    failures: dict[Any, str] = {}
    start = time.monotonic()
    try:
        failures = run(settings, place, tasks, expected, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("\nstopped; finished parts are kept, the same command goes on from there.")
        return 130
    finally:
        missing = [
            part
            for task in plan(len(splits), given.seeds, arms, results.finished(out))
            for part in task.parts()
        ]
        results.close_manifest(out, manifest, missing, failures)
        if results.finished(out):
            results.write_tables(out, settings)
    print(f"{duration(time.monotonic() - start)} for {left} parts")
    return _report(argparse.Namespace(results=out, markdown=False), command) or int(bool(failures))


def _report(given: argparse.Namespace, command: str) -> int:
    import json

    from benchmarks import results
    from benchmarks.report import markdown_tables, write_report

    manifest = given.results / "manifest.json"
    if not manifest.exists():
        raise FileNotFoundError(
            f"{given.results}: expected results of 'python -m benchmarks run'; there is no "
            "manifest.json."
        )
    settings = Settings.from_document(json.loads(manifest.read_text())["settings"])
    results.write_tables(given.results, settings)
    if given.markdown:
        print(markdown_tables(given.results))
    else:
        print(f"report: {write_report(given.results)}")
    return 0


def _pretrain(given: argparse.Namespace, command: str) -> int:
    import numpy as np

    from benchmarks.data import load_cells
    from benchmarks.scgpt.pretrain import pretrain

    cells = load_cells(given.data, label_key=given.label_key, layer=given.layer)
    if given.genes_of is not None:
        shared = np.flatnonzero(np.isin(cells.genes, load_cells(given.genes_of).genes))
        print(f"{len(shared):,} of {len(cells.genes):,} genes are in {given.genes_of} too")
        cells = cells.with_genes(shared)
    reached = pretrain(
        cells.counts,
        cells.genes,
        given.out,
        embsize=given.embsize,
        n_layers=given.layers,
        n_heads=given.heads,
        d_hid=given.d_hid,
        epochs=given.epochs,
        seed=given.seed,
        verbose=True,
    )
    for name, value in asdict(reached).items():
        print(f"{name:14}{value:,.1f}" if isinstance(value, float) else f"{name:14}{value:,}")
    print(f"checkpoint: {given.out}; use it with --embedder scgpt --scgpt-dir {given.out}")
    return 0


def splits_table(splits: Sequence[Any], cells: Any) -> Any:
    """Who is held out in each split, and how many cells train, test and wait in the pool."""
    import pandas as pd

    return pd.DataFrame(
        {
            "split": split.number,
            "held_out": ", ".join(split.held_out),
            "n_train": len(split.train),
            "n_test": len(split.test),
            "n_pool": len(split.pool),
        }
        for split in splits
    )


def _oracle_possible(cells: Any, splits: Sequence[Any]) -> bool:
    """Whether unused real cells could at least double a type in every split."""
    return all(
        any(
            (cells.labels[split.pool] == label).sum() >= n
            for label, n in cells.take(split.train).sizes().items()
        )
        for split in splits
    )


def _notes(cells: Any, splits: Sequence[Any], settings: Settings) -> list[str]:
    notes = []
    if cells.donors is None:
        notes.append(
            "the data have no donors: stratified folds stand in, so these are not unseen donors"
        )
    elif len(splits) != settings.n_splits:
        notes.append(
            f"{len(set(cells.donors))} donors: each is left out once, so {len(splits)} splits "
            f"instead of {settings.n_splits}"
        )
    return notes


def _without_folders(arguments: Sequence[str]) -> list[str]:
    """Arguments as they can be shown to others: names of files without the folders they are in."""
    return [os.path.basename(a.rstrip("/")) or a if "/" in a else a for a in arguments]


def _size(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Does augmenting rare cell types help on donors the model never saw?",
    )
    commands = parser.add_subparsers(required=True)
    arms = "\n".join(
        textwrap.fill(
            f"{name:16}{arm.about}{' (extra)' if arm.extra else ''}",
            width=96,
            initial_indent="  ",
            subsequent_indent=" " * 18,
        )
        for name, arm in ARMS.items()
    )
    run = commands.add_parser(
        "run",
        help="run arms on held-out donors",
        description="Split by donor, augment the training donors' cells with every arm, embed, "
        "classify the held-out donors' cells, and report. Finished parts are kept: the same "
        "command goes on where a run stopped.",
        epilog=f"arms:\n{arms}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(do=_run)
    data = run.add_argument_group("data")
    data.add_argument(
        "--data", required=True, help="an .h5ad file, demo, simulated, or a name such as kang"
    )
    data.add_argument("--label-key", help="column of obs with cell types (default: cell_type)")
    data.add_argument("--donor-key", help="column of obs with donors (default: donor, if any)")
    data.add_argument("--layer", help="layer with raw counts (default: X)")
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
    design.add_argument("--splits", type=int, default=5, help="default: %(default)s")
    design.add_argument("--seeds", type=int, default=3, help="per split (default: %(default)s)")
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
    design.add_argument(
        "--celltypist", action="store_true", help="also fit CellTypist's model (extra)"
    )
    work = run.add_argument_group("work")
    work.add_argument("--out", type=Path, default=Path("results"), help="default: results/")
    work.add_argument(
        "--jobs", type=int, help="processes (default: one per core that memory allows)"
    )
    work.add_argument("--threads", type=int, help="per process (default: cores / jobs)")
    work.add_argument(
        "--dry-run", action="store_true", help="only say how long and how much memory"
    )

    report = commands.add_parser("report", help="make tables and report again")
    report.set_defaults(do=_report)
    report.add_argument("results", type=Path)
    report.add_argument("--markdown", action="store_true", help="print the tables as markdown")

    pretrain = commands.add_parser(
        "pretrain-scgpt", help="train a small scGPT in the official format"
    )
    pretrain.set_defaults(do=_pretrain)
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
