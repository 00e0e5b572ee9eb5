"""AnnData: taking counts out and adding cells. `containers` has its other forms."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cfgen_augment.counts import CellMatrix
from cfgen_augment.stored import StoredCells, as_stored, in_order, rows_with

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

SYNTHETIC = "is_synthetic"
_COMPARED_VALUES = 1 << 20  # values of two layers compared at a time


def is_anndata(X: object) -> TypeGuard[AnnData]:
    """Whether `X` is AnnData, without importing anndata for those who do not use it."""
    module = sys.modules.get("anndata")
    return module is not None and isinstance(X, module.AnnData)


def existing(names: Any) -> str:
    """Some names, as messages list them."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:20]) + (" ..." if len(listed) > 20 else "") if listed else "none"


def counts(adata: AnnData, layer: str | None) -> CellMatrix:
    """The matrix to learn from: ``X``, or a layer.

    Not copied if it is in memory, left on disk if its rows can be read there (CSR and dense),
    and read into memory otherwise.

    Raises
    ------
    KeyError
        If there is no such layer; lists those that exist.
    ValueError
        If ``X`` is asked for and empty.
    """
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"layer: expected one of the layers ({existing(adata.layers)}); got {layer!r}."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(
            f"X: expected raw counts; got no X at all. Pass layer=, one of: "
            f"{existing(adata.layers)}; counts in raw come by adata.raw.to_adata()."
        )
    return as_cells(matrix)


def as_cells(matrix: Any) -> CellMatrix:
    """A slot of AnnData as a matrix: as it is, on disk if it can be read there, or in memory."""
    if isinstance(matrix, np.ndarray) or sparse.issparse(matrix):
        return matrix
    if hasattr(matrix, "iloc"):
        return matrix.to_numpy()
    if getattr(matrix, "format", "csr") == "csr" and (stored := as_stored(matrix)) is not None:
        return stored
    return matrix.to_memory() if hasattr(matrix, "to_memory") else matrix[:]


def obs_column(adata: AnnData, key: str, role: str) -> pd.Series:
    """The annotation `key` of the cells.

    Raises
    ------
    KeyError
        If it is not there; lists the columns that exist.
    """
    if key not in adata.obs:
        raise KeyError(
            f"{role}: expected a column of obs ({existing(adata.obs.columns)}); got {key!r}."
        )
    return adata.obs[key]


def check_extendable(adata: AnnData, key: str) -> None:
    """Check that cells can be added and marked in ``obs[key]``.

    Raises
    ------
    ValueError
        If names of cells are not unique, or `key` is already taken.
    """
    if not adata.obs_names.is_unique:
        raise ValueError(
            "obs_names: expected unique names of cells; got duplicates. Run "
            "adata.obs_names_make_unique() first."
        )
    if "cfgen_augment" in adata.uns:
        raise ValueError(
            "uns: expected data that were not augmented before; uns['cfgen_augment'] says they "
            "were, and generated cells must not be learned from as real ones. Augment the "
            "original data with a larger target_size, or subset to the real cells, and delete "
            f"that entry and the column obs[{key!r}] (of every modality)."
        )
    if key in adata.obs:
        raise ValueError(
            f"obs: expected no column {key!r}, which marks generated cells; it is already there. "
            "Augment the original data, or choose another name with key_added=."
        )


def extended(
    adata: AnnData,
    real: CellMatrix | None,
    n_new: int,
    layer: str | None,
    *,
    key: str,
    columns: Mapping[str, NDArray] | None = None,
    obsm: Collection[str] = (),
) -> tuple[AnnData, list[str], list[str]]:
    """A new AnnData with room for generated cells after the real ones, but for its matrices.

    Parameters
    ----------
    adata
        The real cells; not modified.
    real
        Their counts, ``(n_obs, n_vars)``; None if ``X`` has none to add to.
    n_new
        Number of generated cells.
    layer
        Layer that the counts belong to; None means ``X``. With a layer, ``X`` of the result is to
        hold the counts too, because nothing else can hold for generated cells.
    key
        Boolean column of obs that marks generated cells.
    columns
        Values of the generated cells in columns of obs that were generated with them. They are
        missing in every other column.
    obsm
        Keys of obsm that cells are added to.

    Returns
    -------
    result : AnnData
        obs, var, varm, varp and uns; no ``X``, no layers and no obsm.
    layers : list of str
        Layers that are to hold what ``X`` will.
    dropped : list of str
        What cannot hold with cells added: other layers, obsm, obsp, raw, and entries of uns that
        describe a neighbour graph or a transformation of ``X``.

    Raises
    ------
    ValueError
        If names of cells are not unique, or `key` is already taken.
    """
    import anndata

    check_extendable(adata, key)
    obs = extended_obs(adata, n_new, key, columns or {})
    stale = stale_entries(adata.uns)
    if layer is not None and "log1p" in adata.uns:
        stale.append("log1p")  # what scanpy would warn about, now that X holds counts
    kept = [
        k
        for k in adata.layers
        if real is not None and (k == layer or _equal(counts(adata, k), real))
    ]
    result = anndata.AnnData(
        obs=obs,
        var=adata.var.copy(),
        uns=copy.deepcopy({k: v for k, v in adata.uns.items() if k not in stale}),
        varm={k: v.copy() for k, v in adata.varm.items()},
        varp={k: v.copy() for k, v in adata.varp.items()},
    )
    dropped = [f"layers[{k!r}]" for k in adata.layers if k not in kept]
    dropped += [f"obsm[{k!r}]" for k in adata.obsm if k not in obsm]
    dropped += [f"obsp[{k!r}]" for k in adata.obsp] + [f"uns[{k!r}]" for k in stale]
    dropped += ["raw"] if adata.raw is not None else []
    if adata.X is not None and real is None:
        dropped.append("X")
    elif adata.X is not None and layer is not None:
        dropped.append("X (replaced by the counts)")
    return result, kept, dropped


def stale_entries(uns: Mapping[str, Any]) -> list[str]:
    """Entries of uns that describe a graph of neighbours, which new cells have no part in."""
    return [k for k, v in uns.items() if isinstance(v, Mapping) and "connectivities_key" in v]


def note_of(dropped: Sequence[str]) -> str:
    """What to warn about when something is dropped; empty if nothing is."""
    if not dropped:
        return ""
    return (
        f"Dropped what does not hold for generated cells: {', '.join(dropped)}. Compute it again "
        "on the augmented data."
    )


def is_sparse(matrix: CellMatrix) -> bool:
    """Whether a matrix is stored as a sparse one, in memory or on disk."""
    on_disk = isinstance(matrix, StoredCells)
    return matrix.indptr is not None if on_disk else sparse.issparse(matrix)


def _equal(matrix: CellMatrix, counts: CellMatrix) -> bool:
    """Whether two matrices of the same cells hold the same values."""
    if is_sparse(matrix) != is_sparse(counts):
        return False
    if not (isinstance(matrix, StoredCells) or isinstance(counts, StoredCells)):
        if sparse.issparse(matrix):
            return matrix.nnz == counts.nnz and (matrix != counts).nnz == 0
        return bool(np.array_equal(matrix, counts))
    if is_sparse(matrix) and matrix.nnz != counts.nnz:
        return False
    n_rows = rows_with(counts, _COMPARED_VALUES)
    pairs = zip(in_order(matrix, n_rows), in_order(counts, n_rows), strict=True)
    return all(_equal(left, right) for (_, left), (_, right) in pairs)


def extended_obs(
    adata: AnnData, n_new: int, key: str, columns: Mapping[str, NDArray]
) -> pd.DataFrame:
    """The annotation of cells with generated ones below; see `extended`."""
    import pandas as pd

    taken = set(adata.obs_names)
    prefix = "synthetic"
    while any(f"{prefix}-{i}" in taken for i in range(n_new)):
        prefix += "-new"
    names = pd.Index(
        [f"{prefix}-{i}" for i in range(n_new)], dtype=object, name=adata.obs_names.name
    )
    obs = {}
    for name, real in adata.obs.items():
        if name in columns:
            added = pd.Series(columns[name], index=names).astype(real.dtype)
        else:
            # Whole numbers and booleans get room for missing values, if there will be any.
            real = real.astype(_nullable(real.dtype)) if n_new else real
            added = pd.Series(pd.array([None] * n_new, dtype=real.dtype), index=names)
        obs[name] = pd.concat([real, added])
    frame = pd.DataFrame(obs, index=adata.obs_names.append(names), columns=adata.obs.columns)
    frame[key] = np.repeat([False, True], [adata.n_obs, n_new])
    return frame


def _nullable(dtype: Any) -> Any:
    """A dtype with the same values and room for missing ones."""
    if isinstance(dtype, np.dtype):
        if dtype.kind == "b":
            return "boolean"
        if dtype.kind in "iu":
            return dtype.name.replace("int", "Int").replace("uI", "UI")
    return dtype
