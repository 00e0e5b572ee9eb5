"""Cost per cell and peak memory as the number of cells grows: generation, and file to file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cost import measured
from benchmarks.speed.stages import simulated_counts
from cfgen_augment import CFGen, augment_file

_TRAINED_ON = 5_000


def _values(block: sparse.csr_matrix | NDArray) -> NDArray:
    return np.asarray(block.data if sparse.issparse(block) else block)


def flatness(sizes: Sequence[int], n_genes: int, folder: Path) -> pd.DataFrame:
    """Generate each number of cells block by block, and write as many into an h5ad file.

    Parameters
    ----------
    sizes
        Numbers of cells to generate.
    n_genes
        Width of the simulated counts, of which the model has seen 5,000 cells.
    folder
        Where files go.

    Returns
    -------
    DataFrame
        CPU and wall seconds per 10,000 cells, and peak memory above what the process held with
        model and input, in MiB.
    """
    X, labels = simulated_counts(_TRAINED_ON, n_genes, seed=0)
    model = CFGen(max_epochs=(2, 2), random_state=0, device="cpu").fit(X, labels)
    model.generate(labels[:100], random_state=0)  # compiles
    source = folder / "cells.h5ad"
    adata = anndata.AnnData(X, obs=pd.DataFrame({"cell_type": labels}, dtype="category"))
    adata.obs_names = [f"cell-{i}" for i in range(_TRAINED_ON)]
    adata.write_h5ad(source)
    rows = {}
    for n in sizes:
        wanted = np.random.default_rng(0).choice(labels, n)
        with measured() as cost:
            blocks = model.generate_blocks(wanted, random_state=0)
            stored = sum(np.count_nonzero(_values(block)) for block in blocks)
        row = {
            "CPU s per 10,000": cost.cpu_seconds / n * 1e4,
            "wall s per 10,000": cost.seconds / n * 1e4,
            "peak MiB": cost.peak_mb,
            "density": stored / n / n_genes,
        }
        output = folder / f"{n}.h5ad"
        with measured() as cost:
            augment_file(source, output, "cell_type", target_size=n + _TRAINED_ON, generator=model)
        row |= {
            "to file: CPU s per 10,000": cost.cpu_seconds / n * 1e4,
            "to file: peak MiB": cost.peak_mb,
            "file MiB": output.stat().st_size / 2**20,
        }
        output.unlink()
        rows[f"{n:,}"] = row
    return pd.DataFrame(rows).T.rename_axis("cells")
