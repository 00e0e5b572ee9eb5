"""``python -m benchmarks composition``: do what is left, write tables, print them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from benchmarks import results
from benchmarks.composition.parts import Part, Question, collect, do, plan
from benchmarks.composition.tables import sections
from benchmarks.composition.world import variants
from benchmarks.data import content_hash
from benchmarks.hardware import hardware
from benchmarks.pages import into_page


def composition(given: argparse.Namespace, command: str) -> int:
    """Carry out the command.

    Returns
    -------
    int
        0 if all was done, 1 if parts failed.
    """
    question = Question(
        given.data, given.label_key, given.donor_key, given.layer, n_splits=given.splits
    )
    out: Path = given.out
    jobs, threads = given.jobs, given.threads
    _open(out, question, command)
    parts = plan(question, given.seeds, given.parts)
    left = [part for part in parts if not part.path(out).exists()]
    print(f"{len(left)} of {len(parts)} parts to do in {jobs} processes", flush=True)
    failed = 0
    for part, outcome in _carried_out(question, out, left, jobs, threads):
        name = " ".join(map(str, (part.variant, part.kind, "seed", part.seed)))
        if isinstance(outcome, Exception):
            failed += 1
            print(f"{name}: {type(outcome).__name__}: {outcome}", flush=True)
        else:
            print(f"{name}: {outcome:.0f} s", flush=True)
    tables = collect(out)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
    data = Path(given.data).stem
    made = sections(tables, data)
    text = "\n\n".join(made.values())
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{Path(given.data).name}; {given.seeds} seeds; {hardware()}")
    if given.docs is not None:
        for name, section in made.items():
            into_page(section, given.docs, f"{data} {name}")
    return int(failed > 0)


def _carried_out(
    question: Question, out: Path, left: list[Part], jobs: int, threads: int
) -> Iterator[tuple[Part, float | Exception]]:
    """Every part and its seconds, or what went wrong with it, as they are finished."""
    if jobs == 1:
        for part in left:
            try:
                yield part, do(question, out, part, threads)
            except Exception as error:  # told, and tried again by the next run
                yield part, error
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        working = {pool.submit(do, question, out, part, threads): part for part in left}
        for done in as_completed(working):
            failure = done.exception()
            yield working[done], failure if isinstance(failure, Exception) else done.result()


def _open(out: Path, question: Question, command: str) -> None:
    """Start a directory of results, or see that it holds results of the same question.

    Raises
    ------
    ValueError
        If it holds something else.
    """
    path = out / "manifest.json"
    document = asdict(question) | {
        "data": Path(question.data).name,
        "hash": [
            content_hash(question.world(variant).cells) for variant in variants(question.data)
        ],
    }
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            name for name in document if there.get("composition", {}).get(name) != document[name]
        ]
        if differing:
            raise ValueError(
                f"--out {out}: expected results of the same data and settings; those there differ "
                f"in {', '.join(differing)}. Choose another --out."
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"--out {out}: expected an empty directory or one with results to go on with; got "
            "other files and no manifest.json. Choose another --out."
        )
    results.write_json(
        path,
        {
            "composition": document,
            "command": command,
            "commit": results.commit(),
            "versions": results.versions(),
            "hardware": hardware(),
        },
    )
