"""What every stage costs beside its floor, and CFGen beside its rivals.

    python -m benchmarks.speed                          # stages, 10,000 cells x 2,000 genes
    python -m benchmarks.speed --genes 2000 8000 28000
    python -m benchmarks.speed --sizes 10000 100000 1000000
    python -m benchmarks.speed --disk --cells 100000    # training from memory and from files
    python -m benchmarks.speed --paired RNA.h5ad ATAC.h5ad   # two modalities; 'simulated' alone
    python -m benchmarks.speed --rivals                 # on simulated counts, or on --data

Counts are simulated at 7% density unless `--data` is given. A stage's floor is the time of the
matrix products it cannot avoid, or of touching its bytes once, taken in turns with the stage in
the same process; ratios are medians over repeats of CPU seconds over the floor's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.data import load
from benchmarks.hardware import hardware
from benchmarks.realism import to_markdown
from benchmarks.speed.disk import from_disk
from benchmarks.speed.paired import paired_files, paired_table, simulated_pair
from benchmarks.speed.rivals import against_rivals
from benchmarks.speed.sizes import flatness
from benchmarks.speed.stages import import_seconds, simulated_counts, stage_table


def main() -> None:
    """Run from the command line; prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, nargs="+", default=[2_000], help="widths (simulated)")
    parser.add_argument("--cells", type=int, default=10_000, help="cells to train on, at most")
    parser.add_argument("--sizes", type=int, nargs="+", help="only: cost per cell at these sizes")
    parser.add_argument("--disk", action="store_true", help="only: training from files")
    parser.add_argument(
        "--paired",
        nargs="+",
        metavar="H5AD",
        help="only: two modalities of the same cells, two files or 'simulated'",
    )
    parser.add_argument("--rivals", action="store_true", help="only: CFGen beside its rivals")
    parser.add_argument("--data", help="h5ad file, or 'demo'")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.rivals:
        if given.data is None:
            X, labels = simulated_counts(given.cells, given.genes[0], seed=0)
        else:
            adata = load(given.data)
            rows = np.random.default_rng(0).permutation(adata.n_obs)[: given.cells]
            X, labels = adata.X.tocsr()[rows], adata.obs[given.label_key].astype(str).iloc[rows]
            labels = labels.to_numpy()
        print(to_markdown(against_rivals(X, labels, given.repeats), digits=2))
    elif given.paired:
        if given.paired == ["simulated"]:
            pair, labels = simulated_pair(given.cells, given.genes[0], 50_000)
        else:
            first, second = map(Path, given.paired)
            pair, labels = paired_files(first, second, given.label_key)
        print(to_markdown(paired_table(pair, labels), digits=2))
    elif given.disk:
        with tempfile.TemporaryDirectory() as folder:
            table = from_disk(given.cells, given.genes[0], Path(folder))
            print(f"\n{given.cells:,} cells x {given.genes[0]:,} genes\n")
            print(to_markdown(table, digits=2))
    elif given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            print(to_markdown(flatness(given.sizes, given.genes[0], Path(folder)), digits=2))
    else:
        for n_genes in given.genes:
            X, labels = simulated_counts(given.cells, n_genes, seed=0)
            print(f"\n{given.cells:,} cells x {n_genes:,} genes\n")
            print(to_markdown(stage_table(X, labels, given.repeats), digits=2), flush=True)
        print(f"\nimport cfgen_augment: {import_seconds():.3f} s")
    print(f"\n{hardware()}")


if __name__ == "__main__":
    main()
