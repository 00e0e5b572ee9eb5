"""Cell matrices: what may come in, how deep each cell is, and rows as dense minibatches.

Everything here works on ``ndarray``, on SciPy CSR and on cells on disk, scans every stored value,
block by block, and never makes more than a minibatch dense.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cfgen_augment.notices import notify
from cfgen_augment.stored import StoredCells, Survey, as_stored, broken, in_order, rows_with

# An ndarray, a CSR matrix or array, or `StoredCells`. SciPy has no type that covers its sparse
# containers.
CellMatrix: TypeAlias = Any
ValueKind: TypeAlias = Literal["count", "binary", "real"]

_SCAN = 1 << 22  # values checked at a time: bounds the temporaries of a whole-matrix scan
_REMEDY = (
    "pass the raw counts (for AnnData layer='counts' or --layer counts, or adata.raw.to_adata() if "
    "they are in .raw), or likelihood='gaussian' for features that are not counts."
)
_LARGEST_COUNT = 2**31 - 1  # what drawn counts are held in
_EXPECTED = {
    "count": "raw counts (non-negative whole numbers)",
    "binary": "zeros and ones",
    "real": "finite numbers",
}


def check_cells(X: object, kind: ValueKind, *, name: str = "X", n_min: int = 1) -> CellMatrix:
    """Check a cell matrix and return it as one that the rest of the package reads.

    Parameters
    ----------
    X
        ``(n_cells, n_features)`` ndarray, SciPy sparse matrix or array, or a matrix on disk: see
        `StoredCells`. Never modified; CSR and ndarray input is returned without a copy when it
        is already canonical.
    kind
        What the values must be: ``"count"``, ``"binary"`` or ``"real"``.
    name
        How error messages call the matrix.
    n_min
        Fewest cells accepted.

    Returns
    -------
    ndarray, canonical CSR or StoredCells
        The same values. Cells on disk are read once, for all that is asked of them before
        training: the check, `total_counts` and `feature_moments`.

    Raises
    ------
    TypeError
        If `X` is not a two-dimensional numeric array or sparse matrix.
    ValueError
        If it is empty, malformed, on disk by columns, or holds values that are not of `kind`.
    UnreadableError
        If it is on disk and cannot be read.
    """
    if sparse.issparse(X):
        matrix = _check_sparse(X, name)
    elif isinstance(X, np.ndarray):
        matrix = np.asarray(X)
    elif (on_disk := as_stored(X)) is not None:
        matrix = on_disk
    else:
        raise TypeError(
            f"{name}: expected a NumPy array or a SciPy sparse matrix; got {type(X).__name__}. "
            "Convert it: tables with X.to_numpy(), AnnData by adata.X or adata.layers[...]."
        )
    if matrix.ndim != 2:
        raise ValueError(
            f"{name}: expected two dimensions (n_cells, n_features); got shape {matrix.shape}. "
            "Reshape your data, for example with X.reshape(1, -1) for a single cell."
        )
    if matrix.dtype.kind not in "buif":
        raise TypeError(
            f"{name}: expected numbers; got dtype {matrix.dtype}. Convert with X.astype(float)."
        )
    if not matrix.dtype.isnative and not isinstance(matrix, StoredCells):
        matrix = matrix.astype(matrix.dtype.newbyteorder("="))  # SciPy and torch take no other
    n_cells, n_features = matrix.shape
    if n_features < 1:
        raise ValueError(
            f"{name}: expected at least one feature; found array with 0 feature(s) "
            f"(shape={matrix.shape}) while a minimum of 1 is required."
        )
    if n_cells < n_min:
        raise ValueError(
            f"{name}: expected at least {n_min} cell(s); found array with {n_cells} sample(s) "
            f"(shape={matrix.shape}) while a minimum of {n_min} is required."
        )
    if not isinstance(matrix, StoredCells):
        _check_values(matrix.data if sparse.issparse(matrix) else matrix, kind, name)
    elif matrix.survey is None or matrix.survey.kind != kind:
        matrix.survey = _survey(matrix, kind, name)
    return matrix


def _survey(X: StoredCells, kind: ValueKind, name: str) -> Survey:
    """Check the values, and sum them up on the way."""
    totals = np.empty(X.shape[0])
    moments = _Moments(X.shape[1])
    for rows, block in in_order(X, rows_with(X, _SCAN)):
        _check_values(block.data if sparse.issparse(block) else block, kind, name)
        totals[rows] = _row_sums(block)
        moments.add(block)
    return Survey(kind, totals, moments.mean, moments.variance)


def _check_sparse(X: sparse.spmatrix | sparse.sparray, name: str) -> sparse.csr_matrix:
    if X.format in ("csr", "csc"):
        try:
            X.check_format(full_check=True)
        except (ValueError, IndexError) as error:
            raise broken(name, X.format, error) from error
    matrix = X.tocsr()
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    return matrix


def _check_values(values: NDArray, kind: ValueKind, name: str) -> None:
    if values.dtype.kind == "b" or (values.dtype.kind == "u" and kind == "count"):
        return
    flat = values.reshape(-1) if values.flags.c_contiguous else values.ravel(order="K")
    for start in range(0, flat.size, _SCAN):
        block = flat[start : start + _SCAN]
        if block.dtype.kind == "f" and not np.isfinite(block).all():
            what = "NaN" if np.isnan(block).any() else "infinity"
            raise ValueError(
                f"{name}: expected {_EXPECTED[kind]}; Input contains {what}. Remove or replace "
                "those entries: a missing count is usually a zero."
            )
        if kind == "real":
            continue
        if block.min() < 0:
            raise ValueError(
                f"{name}: expected {_EXPECTED[kind]}; got the negative value {block.min():g}. "
                f"Negative values in data: this looks scaled or centred; {_REMEDY}"
            )
        if kind == "count" and float(block.max()) > _LARGEST_COUNT:
            raise ValueError(
                f"{name}: expected counts up to {_LARGEST_COUNT:,}; got {block.max():g}. No cell "
                "has that many molecules of a gene: check what the matrix holds."
            )
        if kind == "binary" and (bad := block[(block != 0) & (block != 1)]).size:
            raise ValueError(
                f"{name}: expected {_EXPECTED[kind]} for likelihood='bernoulli'; got {bad[0]:g}. "
                "Binarise with X > 0, or use likelihood='poisson' for counts."
            )
        if block.dtype.kind == "f" and (bad := block[block != np.floor(block)]).size:
            raise ValueError(
                f"{name}: expected {_EXPECTED[kind]}; got the fraction {bad[0]:g}. This looks "
                f"log-normalised; {_REMEDY}"
            )


def holds_presence(X: CellMatrix) -> bool:
    """Whether zeros and ones are the only values; `X` as `check_cells` returns it."""
    for _, block in in_order(X, rows_with(X, _SCAN)):
        values = block.data if sparse.issparse(block) else block
        if not ((values == 0) | (values == 1)).all():
            return False  # of counts the first block says so
    return True


def dense_rows(X: CellMatrix, rows: NDArray[np.integer] | slice) -> NDArray[np.float32]:
    """Some cells as a dense float32 array of shape ``(len(rows), n_features)``."""
    block = X[rows]
    if sparse.issparse(block):
        block = block.toarray()
    return np.ascontiguousarray(block, dtype=np.float32)


def nonzeros(
    X: CellMatrix, rows: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The non-zeros of some cells: places in the flattened block, ascending, and values.

    Explicit zeros of CSR are left out, so that the same matrix gives the same in every container.
    """
    block = X[rows]
    if not sparse.issparse(block):
        flat = block.reshape(-1)
        places = np.flatnonzero(flat)
        return places, flat[places].astype(np.float32)
    starts = np.arange(len(rows), dtype=np.int64) * X.shape[1]
    places = np.repeat(starts, np.diff(block.indptr))
    places += block.indices
    values = block.data.astype(np.float32, copy=False)
    if not values.all():
        stored = values != 0
        places, values = places[stored], values[stored]
    return places, values


def total_counts(X: CellMatrix) -> NDArray[np.float64]:
    """Total count of each cell, shape ``(n_cells,)``.

    A cell without any count is taken to have a total of one, which keeps its logarithm, and so
    the size-factor fit, finite.
    """
    if isinstance(X, StoredCells) and X.survey is not None:
        return np.maximum(X.survey.totals, 1.0)
    totals = [_row_sums(block) for _, block in in_order(X, rows_with(X, _SCAN))]
    return np.maximum(np.concatenate(totals), 1.0)


def feature_moments(X: CellMatrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance (``ddof=0``) of every feature, each of shape ``(n_features,)``."""
    if isinstance(X, StoredCells) and X.survey is not None:
        return X.survey.mean, X.survey.variance
    moments = _Moments(X.shape[1])
    for _, block in in_order(X, rows_with(X, _SCAN)):
        moments.add(block)
    return moments.mean, moments.variance


def _row_sums(block: CellMatrix) -> NDArray[np.float64]:
    if sparse.issparse(block):
        return block @ np.ones(block.shape[1])
    return block.sum(axis=1, dtype=np.float64)


class _Moments:
    """Mean and variance of every feature over blocks of rows.

    Each block is centred on its own mean, and blocks are merged by Chan's rule,
    ``S = S_a + S_b + d^2 n_a n_b / (n_a + n_b)`` with ``d`` the difference of the means, so that
    offsets far larger than the spread cost no digits and one pass is enough.
    """

    def __init__(self, n_features: int) -> None:
        self.n_cells = 0
        self.mean = np.zeros(n_features)
        self.squares = np.zeros(n_features)  # of deviations from the mean

    @property
    def variance(self) -> NDArray[np.float64]:
        return self.squares / self.n_cells

    def add(self, block: CellMatrix) -> None:
        n, n_features = block.shape
        if sparse.issparse(block):
            mean = np.bincount(block.indices, block.data, minlength=n_features) / n
            squares = np.bincount(
                block.indices, np.square(block.data - mean[block.indices]), minlength=n_features
            )
            stored = np.bincount(block.indices, minlength=n_features)
            squares += (n - stored) * np.square(mean)
        else:
            mean = block.sum(axis=0, dtype=np.float64) / n
            squares = np.square(block - mean).sum(axis=0)
        total = self.n_cells + n
        step = mean - self.mean
        self.squares += squares + np.square(step) * (self.n_cells * n / total)
        self.mean += step * (n / total)
        self.n_cells = total


def append_rows(cells: CellMatrix, new: CellMatrix) -> CellMatrix:
    """`new` below `cells`, in the container, format and dtype of `cells`.

    Continuous values that join whole numbers are rounded, and held within the dtype's range.
    """
    new = rows_like(new, cells.dtype, is_sparse=sparse.issparse(cells))
    if sparse.issparse(cells):
        return sparse.vstack([cells, new], format=cells.format, dtype=cells.dtype)
    return np.concatenate([cells, new])


def rows_like(new: CellMatrix, dtype: np.dtype, *, is_sparse: bool) -> CellMatrix:
    """`new` as CSR or as an ndarray, in the dtype of the cells it will join; see `append_rows`."""
    if dtype.kind in "iu" and new.dtype.kind == "f":
        limits = np.iinfo(dtype)
        new = new.toarray() if sparse.issparse(new) else new
        new = np.clip(np.rint(new), limits.min, limits.max)
    if is_sparse:
        new = new if sparse.issparse(new) else sparse.csr_matrix(new)
    elif sparse.issparse(new):
        new = new.toarray()
    return new.astype(dtype, copy=False)


def as_dtype(X: CellMatrix, dtype: np.dtype) -> tuple[CellMatrix, int]:
    """Cast drawn counts to `dtype`, holding values it cannot represent at its largest.

    Returns
    -------
    matrix
        The counts in `dtype`; float32 for sparse counts in float16, which SciPy does not have.
    int
        How many values were too large and were held.
    """
    if dtype.kind == "f":
        limit: float = 2.0 ** (np.finfo(dtype).nmant + 1)  # largest run of exact whole numbers
    elif dtype.kind == "b":
        limit = 1
    else:
        limit = np.iinfo(dtype).max
    values = X.data if sparse.issparse(X) else X
    too_large = int((values > limit).sum())
    if too_large:
        X = X.minimum(limit) if sparse.issparse(X) else np.minimum(X, limit)
    if sparse.issparse(X) and dtype == np.float16:
        dtype = np.dtype(np.float32)
    return X.astype(dtype, copy=False), too_large


def hold_to_columns(new: CellMatrix, dtypes: Any) -> CellMatrix:
    """Hold generated counts at what the columns of a DataFrame of mixed dtypes can hold.

    The model generates in the one dtype that holds every column; a cast back to a narrower
    column would wrap around without a word.
    """
    if len(set(dtypes)) < 2 or new.dtype.kind not in "iuf" or not new.shape[0]:
        return new
    limits = np.full(new.shape[1], np.inf)
    for column, dtype in enumerate(dtypes):
        plain = np.dtype(getattr(dtype, "subtype", getattr(dtype, "numpy_dtype", dtype)))
        if plain.kind in "biu":
            limits[column] = 1 if plain.kind == "b" else np.iinfo(plain).max
    values = new.data if sparse.issparse(new) else new
    limit = limits[new.indices] if sparse.issparse(new) else limits
    if n_large := int((values > limit).sum()):
        notify(
            f"{n_large:,} generated counts were larger than the dtype of their column can hold "
            "and were held at its largest value; pass wider columns to keep them.",
        )
        np.minimum(values, limit, out=values, casting="unsafe")
    return new
