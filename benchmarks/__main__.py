"""``python -m benchmarks``: what augmenting rare types does for donors the model never saw.

python -m benchmarks run --data kang --embedder pca --out results/
python -m benchmarks report results/
python -m benchmarks choices --data kang --out choices/
python -m benchmarks composition --data kang --out composition/
python -m benchmarks pretrain-scgpt --data kang --out checkpoint/
python -m benchmarks tables --table 1 --data pbmc3k --out table1/
python -m benchmarks figures table1/
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser
from benchmarks.arms import ARMS, Arm
from benchmarks.settings import Place, Settings
from benchmarks.tables import commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call, and say in one line what went wrong.

    Returns
    -------
    int
        0 if all was done; 1 if some parts failed; 2 for arguments or data that cannot be used;
        130 if interrupted.
    """
    given = parser().parse_args(arguments)
    do = {
        "run": _run,
        "choices": _choices,
        "composition": _composition,
        "report": _report,
        "pretrain-scgpt": _pretrain,
        "tables": commands.tables,
        "figures": commands.figures,
    }
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return do[given.do](given, "python -m benchmarks " + shlex.join(_without_folders(typed)))
    except (ValueError, ImportError, FileNotFoundError, FileExistsError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(given: argparse.Namespace, command: str) -> int:
    # Heavy imports wait until the arguments are known to be good.
    from benchmarks.arms import choose
    from benchmarks.run import cells_of, splits_of

    settings = _settings(given)
    cells, splits = cells_of(settings), splits_of(settings)
    arms = choose(given.arms, pool=_oracle_possible(cells, splits), donors=cells.donors is not None)
    failures = _carry_out(given, command, settings, ARMS, arms)
    if failures is None:
        return 0
    asked = argparse.Namespace(results=given.out, markdown=False, docs=None)
    return _report(asked, command) or int(bool(failures))


def _choices(given: argparse.Namespace, command: str) -> int:
    from benchmarks import results
    from benchmarks.choices import CHOICES, choose
    from benchmarks.choices_table import shown, table
    from benchmarks.realism import to_markdown
    from benchmarks.run import cells_of, splits_of

    settings = _settings(given, inner=True)
    cells, splits = cells_of(settings), splits_of(settings)
    names = choose(
        given.choices, pool=_oracle_possible(cells, splits), donors=cells.donors is not None
    )
    failures = _carry_out(given, command, settings, CHOICES, names)
    if failures is None:
        return 0
    tables = results.collect(given.out)
    thinned = [name for name, _ in settings.thin]
    rows = table(tables, list(CHOICES), rare_share=settings.rare_share, thinned=thinned)
    rows.to_csv(given.out / "choices.csv")
    print(to_markdown(shown(rows)))
    return int(bool(failures))


def _composition(given: argparse.Namespace, command: str) -> int:
    from benchmarks.composition.command import composition

    return composition(given, command)


def _settings(given: argparse.Namespace, *, inner: bool = False) -> Settings:
    from benchmarks.splits import parse_thin

    return Settings(
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
        inner=inner,
    )


def _carry_out(
    given: argparse.Namespace,
    command: str,
    settings: Settings,
    table: Mapping[str, Arm],
    arms: list[str],
) -> dict[Any, str] | None:
    """Do what is left of the arms and write manifest and tables.

    Returns what went wrong, by part; None for a dry run, which does nothing.
    """
    from benchmarks import estimate, results
    from benchmarks.data import content_hash
    from benchmarks.datasets import describe
    from benchmarks.run import cells_of, duration, plan, run, splits_of

    cells, splits = cells_of(settings), splits_of(settings)
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
            "about": {arm: table[arm].about for arm in arms},
        },
        notes,
    )
    everything = plan(len(splits), given.seeds, arms, (), table)
    tasks = plan(len(splits), given.seeds, arms, results.finished(out), table)
    process_mb = estimate.memory_mb(cells, settings)
    n_jobs = given.jobs or estimate.jobs(process_mb, len(tasks))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    place = Place(out.resolve(), n_jobs, given.threads or max(1, (cores or 1) // n_jobs))
    expected = estimate.seconds_per_task(cells, settings, table)
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
        return None
    manifest |= {"jobs": n_jobs, "threads": place.threads}
    results.write_json(out / "manifest.json", manifest)
    splits_table(splits, cells).to_csv(out / "splits.csv", index=False)
    failures: dict[Any, str] = {}
    start = time.monotonic()
    try:
        failures = run(
            settings, place, tasks, expected, lambda line: print(line, flush=True), table
        )
    except KeyboardInterrupt:
        print("\nstopped; finished parts are kept, the same command goes on from there.")
        raise
    finally:
        missing = [
            part
            for task in plan(len(splits), given.seeds, arms, results.finished(out), table)
            for part in task.parts()
        ]
        results.close_manifest(out, manifest, missing, failures)
        if results.finished(out):
            results.write_tables(out, settings)
    print(f"{duration(time.monotonic() - start)} for {left} parts")
    return failures


def _report(given: argparse.Namespace, command: str) -> int:
    import json

    from benchmarks import results
    from benchmarks.pages import into_page
    from benchmarks.report import markdown_tables, write_report

    manifest = given.results / "manifest.json"
    if not manifest.exists():
        raise FileNotFoundError(
            f"{given.results}: expected results of 'python -m benchmarks run'; there is no "
            "manifest.json."
        )
    settings = Settings.from_document(json.loads(manifest.read_text())["settings"])
    if settings.inner:
        raise ValueError(
            f"{given.results}: expected results of 'python -m benchmarks run'; got those of "
            "choices, whose command prints their table again."
        )
    results.write_tables(given.results, settings)
    if given.docs is not None:
        into_page(markdown_tables(given.results), given.docs, given.results.resolve().name)
    if given.markdown:
        print(markdown_tables(given.results))
    elif given.docs is None:
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


if __name__ == "__main__":
    sys.exit(main())
