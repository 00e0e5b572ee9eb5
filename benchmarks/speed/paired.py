"""Two modalities of the same cells, one of them wide: time and peak memory of every stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cost import measured
from benchmarks.speed.stages import simulated_counts
from cfgen_augment import CFGen

_MIB = 2**20


def simulated_pair(
    n_cells: int, n_genes: int, n_peaks: int
) -> tuple[dict[str, sparse.csr_matrix], NDArray]:
    """Counts at 7% density, and peaks present at 1%, of the same types."""
    X, labels = simulated_counts(n_cells, n_genes, seed=0)
    peaks, _ = simulated_counts(n_cells, n_peaks, seed=0, density=0.01)
    peaks.data[:] = 1.0
    return {"rna": X, "atac": peaks}, labels


def paired_files(
    first: Path, second: Path, label_key: str
) -> tuple[dict[str, sparse.csr_matrix], NDArray]:
    """Two h5ad files of the same cells, which go in the order of the first."""
    one, other = anndata.read_h5ad(first), anndata.read_h5ad(second)
    labels = one.obs[label_key].astype(str).to_numpy()
    matched = other[one.obs_names]
    return {"rna": sparse.csr_matrix(one.X), "atac": sparse.csr_matrix(matched.X)}, labels


def paired_table(X: dict[str, sparse.csr_matrix], labels: NDArray) -> pd.DataFrame:
    """Fit for one epoch of either stage, encode, and generate as many cells.

    Returns
    -------
    DataFrame
        CPU and wall seconds, and peak memory above what was held before, in MiB; beside them what
        the cells take as CSR and would take as dense float32, and what the weights take.
    """
    model = CFGen(max_epochs=(1, 1), random_state=0, device="cpu")
    made = {name: matrix[:, :50] for name, matrix in X.items()}  # what is done once, done
    CFGen(max_epochs=(1, 1), random_state=0, device="cpu").fit(made, labels).generate(labels[:10])
    stages: dict[str, Callable[[], object]] = {
        "fit, one epoch of either stage": lambda: model.fit(X, labels),
        "encode": lambda: model.encode(X),
        "generate": lambda: model.generate(labels, random_state=0),
    }
    rows = {}
    for name, work in stages.items():
        with measured() as cost:
            work()
        rows[name] = {"CPU s": cost.cpu_seconds, "wall s": cost.seconds, "peak MiB": cost.peak_mb}
    table = pd.DataFrame(rows).T.rename_axis("stage")
    table["CSR MiB"] = (
        sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in X.values()) / _MIB
    )
    table["dense MiB"] = sum(4 * m.shape[0] * m.shape[1] for m in X.values()) / _MIB
    weights = sum(4 * p.numel() for p in model.network_.parameters()) / _MIB
    table["weights MiB"] = weights
    return table
