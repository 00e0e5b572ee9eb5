"""Cells on disk: rows of an h5ad or zarr file, read in blocks and never as a whole.

`StoredCells` wraps what anndata hands out for a matrix on disk (its backed CSR datasets, and
dense h5py or zarr arrays), by the members they have, without importing any of the three. The
functions here take matrices in memory as well, so that those who call them need not ask.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

_BUFFER_VALUES = 1 << 22  # stored values read at a time; up to three such blocks exist at once
_CHUNK_ROWS = 256  # consecutive rows that stay together when training rows are shuffled
_FILE_CHUNKS = 4  # chunks of the file in such a run: at most a quarter is unpacked in vain
_RUNS_PER_BUFFER = 8  # however large the file's chunks are, this many runs meet in a buffer
_GAP = 32  # unwanted rows that are read along rather than skipped


class UnreadableError(OSError):
    """A file that should hold cells and cannot be read."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a file found.

    Attributes
    ----------
    kind
        What the values were checked to be.
    totals
        Sum of every row, ``(n_cells,)``.
    mean, variance
        Of every feature, ``(n_features,)``.
    """

    kind: str
    totals: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


@dataclass(frozen=True)
class _Held:
    """Some rows of a file in memory; `rows` are their numbers, ascending."""

    rows: NDArray[np.intp]
    cells: Any

    def find(self, rows: NDArray[np.integer]) -> Any | None:
        """The cells `rows`, or None if not all of them are here."""
        at = np.searchsorted(self.rows, rows)
        if len(rows) and at.max() >= len(self.rows):
            return None
        return self.cells[at] if np.array_equal(self.rows[at], rows) else None


class StoredCells:
    """A matrix of cells on disk, read by rows.

    Parameters
    ----------
    X
        A backed CSR dataset of anndata (its ``group`` has members ``data``, ``indices`` and
        ``indptr``), or a dense two-dimensional h5py or zarr array.

    Attributes
    ----------
    shape, dtype, ndim
        As of an array.
    indptr
        Where every row begins, in memory, ``(n_cells + 1,)``; None for a dense array.
    survey
        What `counts.check_cells` found in its pass over the file; None before.

    Raises
    ------
    ValueError
        If the index arrays do not fit together.
    """

    ndim = 2

    def __init__(self, X: Any) -> None:
        group = getattr(X, "group", None)
        self.shape: tuple[int, int] = tuple(int(n) for n in X.shape)  # type: ignore[assignment]
        self.indptr: NDArray[np.int64] | None = None
        self._values: Any = X if group is None else group["data"]
        self._indices: Any = None
        if group is not None:
            self._indices = group["indices"]
            self.indptr = self._attempt(lambda: group["indptr"][:]).astype(np.int64)
            self._check_index_arrays(self.indptr)
        # Foreign byte orders are turned on reading: SciPy does not know them.
        self.dtype = np.dtype(self._values.dtype).newbyteorder("=")
        self.survey: Survey | None = None
        self._kept: _Held | None = None
        self._buffer: _Held | None = None

    def _check_index_arrays(self, indptr: NDArray[np.int64]) -> None:
        fits = len(indptr) == self.shape[0] + 1 and indptr[0] == 0
        ends = {int(indptr[-1]), self._values.shape[0], self._indices.shape[0]} if fits else ()
        if len(ends) != 1 or (np.diff(indptr) < 0).any():
            raise broken("X", "csr", "indptr does not fit the values")

    @property
    def nnz(self) -> int:
        """Number of stored values, zeros of a dense array included."""
        return math.prod(self.shape) if self.indptr is None else int(self.indptr[-1])

    def _attempt(self, read: Callable[[], Any]) -> Any:
        """What `read` returns, its failures in one kind of error that names the file."""
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:  # h5py, zarr and their codecs raise a dozen kinds
            place = getattr(getattr(self._values, "file", None), "filename", None)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnreadableError(
                f"{place or self._values}: expected a complete file; could not read its cells "
                f"({reason}). It may be truncated: copy or write it again."
            ) from error

    def read(self, start: int, stop: int) -> Any:
        """Rows `start` up to `stop` as an ndarray or canonical CSR."""
        if self.indptr is None:
            block = self._attempt(lambda: self._values[start:stop])
            return np.asarray(block, dtype=self.dtype)
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        data, indices = self._attempt(lambda: (self._values[first:last], self._indices[first:last]))
        indptr = self.indptr[start : stop + 1] - first
        shape = (stop - start, self.shape[1])
        try:
            block = sparse.csr_matrix((data.astype(self.dtype, copy=False), indices, indptr), shape)
            block.check_format(full_check=True)
        except (ValueError, IndexError) as error:
            raise broken("X", "csr", error) from error
        if not block.has_canonical_format:
            block.sum_duplicates()
        return block

    def __getitem__(self, rows: slice | NDArray[np.integer]) -> Any:
        """Some rows, in the order asked for; from memory where they are there already."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return self.read(start, max(start, stop))
        rows = rows.astype(np.intp, copy=False)
        for held in (self._buffer, self._kept):
            if held is not None and (found := held.find(rows)) is not None:
                return found
        wanted, back = np.unique(rows, return_inverse=True)
        if not len(wanted):
            return self.read(0, 0)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > _GAP) + 1)
        return self.load(runs).cells[back]

    def load(self, runs: Sequence[NDArray[np.intp]]) -> _Held:
        """Rows in ascending runs, each of them read in one go."""
        parts = []
        for run in runs:
            part = self.read(int(run[0]), int(run[-1]) + 1)
            whole = len(run) == part.shape[0]
            parts.append(part if whole else part[run - run[0]])
        return _Held(np.concatenate(runs), stack_rows(parts))

    def to_memory(self) -> Any:
        """All cells."""
        return self.read(0, self.shape[0])

    def in_order(self, n_rows: int, among: slice = slice(None)) -> Iterator[tuple[slice, Any]]:
        """All cells, or those `among`, `n_rows` at a time; see the function `in_order`."""
        first, last, _ = among.indices(self.shape[0])
        step = max(self._buffer_rows // n_rows, 1) * n_rows
        bounds = [(start, min(start + step, last)) for start in range(first, last, step)]
        reads = (partial(self.read, *bound) for bound in bounds)
        for (begin, _), block in zip(bounds, read_ahead(reads), strict=True):
            for start in range(0, block.shape[0], n_rows):
                stop = min(start + n_rows, block.shape[0])
                whole = stop - start == block.shape[0]
                yield slice(begin + start, begin + stop), block if whole else block[start:stop]

    @property
    def _buffer_rows(self) -> int:
        return max(rows_with(self, _BUFFER_VALUES), 2)

    @property
    def chunk_rows(self) -> int:
        """Rows that are unpacked together, where the file is cut into chunks."""
        chunks = getattr(self._values, "chunks", None) or (1,)
        return chunks[0] if self.indptr is None else rows_with(self, chunks[0])

    def hold(self, cells: _Held | None) -> None:
        """Answer for the rows of `cells` from memory until others are held."""
        self._buffer = cells

    def holds(self, rows: NDArray[np.intp]) -> bool:
        """Whether `rows` are those that are held."""
        return self._buffer is not None and np.array_equal(self._buffer.rows, rows)

    def keeping(self, rows: NDArray[np.intp]) -> StoredCells:
        """The same cells, with `rows` (ascending) in memory; see the function `keep`."""
        made = copy.copy(self)
        if len(rows) < self.shape[0]:
            parts = []
            for block, cells in self.in_order(self._buffer_rows):
                first, last = np.searchsorted(rows, (block.start, block.stop))
                parts.append(cells[rows[first:last] - block.start])
            made._kept = _Held(rows, stack_rows(parts))
        return made


def as_stored(X: object) -> StoredCells | None:
    """`X` as cells on disk, or None if it is something else.

    Raises
    ------
    ValueError
        If it is on disk and stored by columns.
    """
    if isinstance(X, StoredCells):
        return X
    if isinstance(X, np.ndarray) or sparse.issparse(X):
        return None
    if hasattr(X, "group") and hasattr(X, "format"):
        if X.format != "csr":
            raise ValueError(
                f"X: expected a matrix on disk stored by rows (CSR or dense); got "
                f"{X.format.upper()}, of which rows cannot be read without reading all. Read it "
                "into memory with X.to_memory(), or write it as CSR."
            )
        return StoredCells(X)
    # Dask arrays have chunks too; they are computed, not read.
    on_disk = hasattr(X, "chunks") and not hasattr(X, "compute")
    return StoredCells(X) if on_disk and len(getattr(X, "shape", ())) == 2 else None


def rows_with(X: Any, n_values: int) -> int:
    """Rows that store some `n_values` values, on average; at least one."""
    return _rows_with(X.shape[0], X.size if isinstance(X, np.ndarray) else X.nnz, n_values)


def _rows_with(n_rows: int, n_stored: int, n_values: int) -> int:
    return max(int(n_values * n_rows / max(n_stored, n_rows, 1)), 1)


def in_order(
    X: Any, n_rows: int | None = None, among: slice = slice(None)
) -> Iterator[tuple[slice, Any]]:
    """All cells of a matrix, or those `among`, `n_rows` at a time: which, and they in memory.

    None takes as many as memory should hold at a time.
    """
    n_rows = rows_with(X, _BUFFER_VALUES) if n_rows is None else n_rows
    if isinstance(X, StoredCells):
        yield from X.in_order(n_rows, among)
        return
    first, last, _ = among.indices(X.shape[0])
    for start in range(first, last, n_rows):
        rows = slice(start, min(start + n_rows, last))
        yield rows, X[rows]


def side_by_side(
    matrices: Sequence[Any], n_rows: int | None = None, among: slice = slice(None)
) -> Iterator[tuple[slice, list[Any]]]:
    """As `in_order`, of several matrices of the same cells."""
    n_rows = min(rows_with(X, _BUFFER_VALUES) for X in matrices) if n_rows is None else n_rows
    for parts in zip(*(in_order(X, n_rows, among) for X in matrices), strict=True):
        yield parts[0][0], [block for _, block in parts]


def take(X: Any, rows: NDArray[np.intp]) -> Any:
    """The cells `rows` (ascending), in memory.

    On disk they are read in stretches, so that no memory holds more than a block besides them,
    and what lies between rows far apart is not read.
    """
    if not isinstance(X, StoredCells):
        return X[rows]
    step = rows_with(X, _BUFFER_VALUES)
    parts = np.split(rows, np.searchsorted(rows, np.arange(step, X.shape[0], step)))
    return stack_rows([X[part] for part in parts if len(part)] or [X.read(0, 0)])


def buffers(
    X: Any, rows: NDArray[np.intp], random: np.random.Generator, beside: Sequence[Any] = ()
) -> Iterator[NDArray[np.intp]]:
    """Training rows for one epoch, as groups to be shuffled and cut into minibatches one by one.

    Of a matrix in memory, all `rows` (ascending) at once. Of one on disk, runs of consecutive
    rows are read in random order, several into a buffer, and each buffer is a group; the next one
    is read while the present one is trained on. Every row comes once, and no group has a single
    row. While a group is worked on, ``X[rows]`` of its rows does not touch the disk. The same
    holds for further matrices of the same cells, those `beside`.
    """
    stored = [matrix for matrix in (X, *beside) if isinstance(matrix, StoredCells)]
    if stored:
        yield from _read_buffers(stored, rows, random)
    else:
        yield rows


def _read_buffers(
    stored: Sequence[StoredCells], rows: NDArray[np.intp], random: np.random.Generator
) -> Iterator[NDArray[np.intp]]:
    n_stored = sum(X.nnz for X in stored)
    buffer_rows = max(_rows_with(stored[0].shape[0], n_stored, _BUFFER_VALUES), 2)
    run_rows = max(_CHUNK_ROWS, _FILE_CHUNKS * max(X.chunk_rows for X in stored))
    run_rows = max(min(run_rows, buffer_rows // _RUNS_PER_BUFFER), 2)
    # No run, and so no buffer, has a single row: batch norm could not train on one.
    most = max(len(rows) // 2, 1)
    n_buffers = min(math.ceil(len(rows) / buffer_rows), most)
    n_runs = max(len(rows) // run_rows, n_buffers)
    runs = np.array_split(rows, n_runs)
    if n_buffers == 1:
        # What fits is read once and shuffled as a whole: exactly what memory gives.
        for X in stored:
            if not X.holds(rows):
                X.hold(X.load(runs))
        yield rows
        return

    def load(wanted: Sequence[NDArray[np.intp]]) -> list[_Held]:
        return [X.load(wanted) for X in stored]

    groups = np.array_split(random.permutation(n_runs), n_buffers)
    loads = (partial(load, [runs[i] for i in np.sort(group)]) for group in groups)
    for loaded in read_ahead(loads):
        for X, held in zip(stored, loaded, strict=True):
            X.hold(held)
        yield loaded[0].rows
    for X in stored:
        X.hold(None)


def keep(X: Any, rows: NDArray[np.intp]) -> Any:
    """`X` for an epoch after epoch over the same held-out `rows` (ascending).

    On disk they lie scattered, and every epoch would read most of the file for them, so they are
    read once and stay in memory until the returned matrix is let go; unless they are all cells.
    """
    return X.keeping(rows) if isinstance(X, StoredCells) else X


def stack_rows(blocks: Sequence[Any]) -> Any:
    """Blocks of rows as one matrix: CSR if they are, else an ndarray."""
    if len(blocks) == 1:
        return blocks[0]
    if sparse.issparse(blocks[0]):
        return sparse.vstack(blocks, format="csr")
    return np.concatenate(blocks)


def read_ahead(reads: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """What each of `reads` returns, the next one running while the present is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="cells") as reader:
        pending: Future | None = None
        for read in reads:
            following = reader.submit(read)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def broken(name: str, form: str, reason: object) -> ValueError:
    """The error for index arrays that do not make a matrix."""
    return ValueError(
        f"{name}: expected a well-formed {form.upper()} matrix; got one whose index arrays are "
        f"broken ({reason}). The file or the code that built it is at fault: rebuild the matrix."
    )
