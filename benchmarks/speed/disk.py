"""Training from memory and from disk: peak memory, and the time of a pass."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from benchmarks.cost import measured
from benchmarks.speed.stages import simulated_counts
from cfgen_augment import CFGen
from cfgen_augment.counts import CellMatrix


def from_disk(n_cells: int, n_genes: int, folder: Path) -> pd.DataFrame:
    """Fit for one epoch of either stage from memory and from h5ad files.

    Parameters
    ----------
    n_cells, n_genes
        Size of the simulated counts.
    folder
        Where files go.

    Returns
    -------
    DataFrame
        Seconds of the whole fit (the check of the counts, one epoch of autoencoder and flow, the
        dispersion, latents of all cells), their ratio to memory, and peak memory above what was
        held before, in MiB; for the fit from memory the counts come on top of it.
    """
    X, labels = simulated_counts(n_cells, n_genes, seed=0)
    size = (X.data.nbytes + X.indices.nbytes + X.indptr.nbytes) / 2**20
    files = {}
    adata = anndata.AnnData(X, obs=pd.DataFrame({"cell_type": labels}, dtype="category"))
    adata.obs_names = [f"cell-{i}" for i in range(n_cells)]
    for compression in (None, "gzip"):
        path = folder / f"{compression}.h5ad"
        adata.write_h5ad(path, compression=compression)
        files[f"h5ad, {compression or 'plain'}"] = path
    del adata

    def fit(cells: CellMatrix, n: int = n_cells) -> dict[str, float]:
        model = CFGen(max_epochs=(1, 1), random_state=0, device="cpu")
        with measured() as cost:
            model.fit(cells, labels[:n])
        return {"CPU s": cost.cpu_seconds, "wall s": cost.seconds, "peak MiB": cost.peak_mb}

    fit(X[:1_000], 1_000)  # imports and allocations that happen once
    rows = {"memory": fit(X)}
    del X
    for name, path in files.items():
        rows[name] = fit(anndata.read_h5ad(path, backed="r").X)
    table = pd.DataFrame(rows).T.rename_axis("cells from")
    table.insert(1, "ratio", table["CPU s"] / table.loc["memory", "CPU s"])
    table["CSR MiB"] = size
    return table
