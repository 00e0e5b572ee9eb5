"""Count data to demonstrate and measure on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData


def demo_counts() -> AnnData:
    """Real counts that come with scanpy: 700 PBMCs x 765 genes, ten labels, no donors.

    ``scanpy.datasets.pbmc68k_reduced`` packages log-normalised values. Within a cell they are
    ``log(1 + c s)`` for counts ``c`` and one scale ``s``, and the smallest non-zero count is one,
    so dividing by the smallest value of each cell gives the counts back, off a whole number by
    at most 0.11 because the values are stored in half precision.

    Raises
    ------
    ValueError
        If the packaged data no longer have that form.
    """
    import anndata
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packaged file is older than its reader
        packaged = scanpy.datasets.pbmc68k_reduced()
    scaled = np.expm1(packaged.raw.X.toarray().astype(np.float64))
    smallest = np.where(scaled > 0, scaled, np.inf).min(axis=1, keepdims=True)
    exact = scaled / smallest
    counts = np.rint(exact)
    if np.abs(exact - counts).max() > 0.2:
        raise ValueError(
            "pbmc68k_reduced: expected log-normalised counts; the values do not come back as "
            "whole numbers. Another version of scanpy packages other data."
        )
    return anndata.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=packaged.obs[["bulk_labels"]].rename(columns={"bulk_labels": "cell_type"}),
        var=packaged.raw.var[[]],
    )


def load(path: str) -> AnnData:
    """Read an h5ad file, or the packaged counts if `path` is ``"demo"``."""
    if path == "demo":
        return demo_counts()
    from cfgen_augment.annotated import read_h5ad

    return read_h5ad(Path(path))
