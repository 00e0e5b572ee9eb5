"""What is decided on a split's training cells alone: genes, and cells to add of each type."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cells import Cells, log_normalise
from cfgen_augment.allocation import allocate, total_after

# A gene of one or two cells can be alone among genes of its mean, and then looks variable.
_SEEN_IN = 3


def choose_genes(training_counts: sparse.csr_matrix, n_genes: int = 2000) -> NDArray[np.int64]:
    """Columns of the genes that vary most between the training cells.

    Genes seen in fewer than three training cells are never chosen. If no more than `n_genes` are
    left, all of them are; otherwise those with the largest dispersion (variance over mean) of
    normalised expression, standardised within 20 bins of mean expression: scanpy's flavour
    ``"seurat"``, after Satija R et al., Nat Biotechnol 33:495-502 (2015). Ties go to the earlier
    gene.

    Parameters
    ----------
    training_counts
        Raw counts of the training cells, ``(n_cells, n_genes_measured)``.
    n_genes
        Genes wanted.

    Returns
    -------
    ndarray of shape (at most n_genes,)
        Columns, ascending.

    Raises
    ------
    ValueError
        If `n_genes` is below one or no gene is seen in three cells.
    """
    if n_genes < 1:
        raise ValueError(f"n_genes: expected 1 or more; got {n_genes}.")
    seen_in = np.bincount(
        training_counts.indices[training_counts.data > 0], minlength=training_counts.shape[1]
    )
    expressed = np.flatnonzero(seen_in >= _SEEN_IN)
    if not expressed.size:
        raise ValueError(
            f"training_counts: expected genes with counts in {_SEEN_IN} cells or more; none of "
            f"{training_counts.shape[1]:,} has them in these {training_counts.shape[0]:,} cells."
        )
    if expressed.size <= n_genes:
        return expressed
    import anndata
    import scanpy

    values = log_normalise(training_counts)[:, expressed]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas and anndata, on what scanpy does inside
        table = scanpy.pp.highly_variable_genes(
            anndata.AnnData(values), flavor="seurat", n_top_genes=n_genes, inplace=False
        )
    dispersion = table["dispersions_norm"].to_numpy(dtype=np.float64)
    # Not scanpy's own flag, which takes all genes that tie at the cutoff.
    order = np.argsort(-np.nan_to_num(dispersion, nan=-np.inf), kind="stable")
    return np.sort(expressed[order[:n_genes]])


def allocation(
    cells: Cells, target_size: int | float = 2.0, *, exponent: float = 0.5, min_cells: int = 5
) -> dict[str, int]:
    """New cells of each type, by the rule and the defaults of `CFGenSampler`.

    Parameters
    ----------
    cells
        Training cells.
    target_size
        An integer is the total after augmentation, a float a multiple of the training cells.
    exponent
        A type of ``n`` cells gets a share proportional to ``n ** -exponent``.
    min_cells
        Types with fewer cells get none.

    Returns
    -------
    dict
        By type; types that get none are left out.

    Examples
    --------
    >>> from scipy import sparse
    >>> labels = np.repeat(["common", "rare"], [90, 10])
    >>> cells = Cells(sparse.csr_matrix((100, 2)), labels, np.array(["g1", "g2"]))
    >>> allocation(cells, 1.4)
    {'common': 10, 'rare': 30}
    """
    sizes = cells.sizes()
    n_new = total_after(len(cells), target_size) - len(cells)
    new = allocate(list(sizes.values()), n_new, exponent=exponent, min_cells=min_cells)
    return {name: n for name, n in zip(sizes, new.tolist(), strict=True) if n}
