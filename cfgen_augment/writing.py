"""h5ad, h5mu and zarr files written: all or nothing, and matrices block by block."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from cfgen_augment.counts import CellMatrix
from cfgen_augment.files import matrix_in
from cfgen_augment.multimodal import write_mudata
from cfgen_augment.stored import as_stored, side_by_side, stack_rows

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

# Of HDF5 files. Level 4 takes over half as much time again for the same size; lzf takes less time
# for half as much size again, and is known to h5py alone.
_COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1}
_WRITTEN_VALUES = 1 << 22  # values gathered before they go to the file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` when all went well and vanishes otherwise.

    A link stays one, and what it points to is replaced.
    """
    path = path.resolve()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as made:
        complete = Path(made) / path.name
        yield complete
        with writing(path):
            if not path.is_dir():
                os.replace(complete, path)
                return
            # A directory cannot take the place of another that is not empty.
            previous = Path(made) / "previous"
            os.replace(path, previous)
            try:
                os.replace(complete, path)
            except BaseException:
                os.replace(previous, path)
                raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever fails in writing `path` into an OSError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # anndata, h5py and zarr raise a dozen kinds
        raise OSError(f"{path}: could not be written ({error}).") from error


def write(
    annotation: AnnData | MuData,
    path: Path,
    blocks: Iterable[Sequence[CellMatrix]],
    places: Sequence[Sequence[str]],
    *,
    named: Path | None = None,
) -> None:
    """Write annotation and cells to an h5ad, h5mu or zarr file, block by block.

    Parameters
    ----------
    annotation
        Everything but the cells; without ``X``. Strings in its obs become categories, as always
        when AnnData or MuData are written.
    path
        Where to; its suffix says what.
    blocks
        The cells, a matrix per modality: ``(n_block, n_features)`` each and ``n_obs`` in all, all
        of a modality CSR or all ndarrays.
    places
        Where each modality goes in the file, for example to ``X`` and to a layer.
    named
        What error messages call the file, if it will not stay at `path`.

    Raises
    ------
    OSError
        If it cannot be written; what `blocks` raises comes through as it is.
    """
    named = path if named is None else named
    with contextlib.ExitStack() as stack:
        with writing(named):
            _write_in_memory(annotation, path)
            store = _open_to_write(path, stack)
            growing = [[_Growing(store, place) for place in own] for own in places]
        _grow(growing, blocks, named)
        with writing(named):
            stack.close()  # what is still to be flushed may find the disk full
            if path.suffix == ".zarr":
                _consolidate(path)


def write_whole(cells: AnnData | MuData, path: Path, *, named: Path) -> None:
    """Write AnnData or MuData that are in memory."""
    with writing(named):
        _write_in_memory(cells, path)


def _write_in_memory(cells: Any, path: Path) -> None:
    if path.suffix == ".h5mu":
        write_mudata(cells, path, _COMPRESSION)
        return
    if path.suffix == ".h5ad":
        cells.write_h5ad(path, **_COMPRESSION)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2", UserWarning)
        cells.write_zarr(path)


def _open_to_write(path: Path, stack: contextlib.ExitStack) -> Any:
    if path.suffix in (".h5ad", ".h5mu"):
        import h5py

        return stack.enter_context(h5py.File(path, "r+"))
    import zarr

    # anndata gathered the metadata in one place, where the arrays to come are missing.
    options: dict[str, Any] = {"use_consolidated": False}
    if zarr.__version__.startswith("2."):
        options = {}
    return zarr.open_group(str(path), mode="r+", **options)


def _consolidate(path: Path) -> None:
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
        zarr.consolidate_metadata(str(path))


def _grow(
    growing: Sequence[Sequence[_Growing]], blocks: Iterable[Sequence[CellMatrix]], named: Path
) -> None:
    """Append blocks, a matrix per modality, to all places of every modality."""
    for block in _gathered(blocks):
        with writing(named):
            for own, part in zip(growing, block, strict=True):
                for matrix in own:
                    matrix.append(part)
    with writing(named):
        for own in growing:
            for matrix in own:
                matrix.finish()


def _gathered(blocks: Iterable[Sequence[CellMatrix]]) -> Iterator[list[CellMatrix]]:
    """Blocks stacked into larger ones, so that no chunk of the file is packed many times over."""
    waiting: list[Sequence[CellMatrix]] = []
    values = 0
    for block in blocks:
        waiting.append(block)
        values += sum(part.nnz if sparse.issparse(part) else part.size for part in block)
        if values >= _WRITTEN_VALUES:
            yield [stack_rows(parts) for parts in zip(*waiting, strict=True)]
            waiting, values = [], 0
    if waiting:
        yield [stack_rows(parts) for parts in zip(*waiting, strict=True)]


# -------------------------------------------------------------------- shards


def write_shard(path: Path, blocks: Iterable[Sequence[CellMatrix]]) -> None:
    """Write blocks of cells, a matrix per modality, to a file of their own.

    Raises
    ------
    OSError
        If it cannot be written; what `blocks` raises comes through as it is.
    """
    import h5py

    first, blocks = _peek(blocks)
    with contextlib.ExitStack() as stack:
        with writing(path):
            store = stack.enter_context(h5py.File(path, "w"))
            growing = [[_Growing(store, str(i))] for i in range(len(first))]
        _grow(growing, blocks, path)
        with writing(path):
            stack.close()


def _peek(
    blocks: Iterable[Sequence[CellMatrix]],
) -> tuple[Sequence[CellMatrix], Iterator[Sequence[CellMatrix]]]:
    """The first block, and all of them."""
    rest = iter(blocks)
    first = next(rest)
    return first, itertools.chain([first], rest)


def read_shards(paths: Iterable[Path]) -> Iterator[list[CellMatrix]]:
    """Cells of files by `write_shard`, one file after the other, block by block."""
    import h5py

    for path in paths:
        with h5py.File(path, "r") as store:
            matrices = [as_stored(matrix_in(store[name])) for name in sorted(store, key=int)]
            for _, blocks in side_by_side(matrices):
                yield blocks


class _Growing:
    """A matrix in a file that rows are appended to."""

    def __init__(self, store: Any, place: str) -> None:
        *groups, self._name = place.split("/")
        self._parent = store
        for group in groups:
            self._parent = self._parent[group]
        self._is_hdf5 = not hasattr(store, "store_path")
        if self._name in self._parent:  # what stands for a matrix that is not there
            del self._parent[self._name]

    def append(self, block: CellMatrix) -> None:
        import anndata

        if self._name not in self._parent:
            self._start(block)
        elif sparse.issparse(block):
            anndata.io.sparse_dataset(self._parent[self._name]).append(block)
        else:
            array = self._parent[self._name]
            n_before = array.shape[0]
            array.resize((n_before + block.shape[0], block.shape[1]))
            array[n_before:] = block

    def _start(self, block: CellMatrix) -> None:
        import anndata

        options = dict(_COMPRESSION) if self._is_hdf5 else {}
        if sparse.issparse(block):
            # Nobody knows yet how many values there will be; `finish` narrows it.
            options["indptr_dtype"] = np.dtype(np.int64)
        elif self._is_hdf5:
            options["maxshape"] = (None, block.shape[1])
        anndata.io.write_elem(self._parent, self._name, block, dataset_kwargs=options)

    def finish(self) -> None:
        """Give ``indptr`` the width that SciPy would have given it."""
        import anndata

        group = self._parent[self._name]
        if not hasattr(group, "keys"):
            return
        indptr = group["indptr"][:]
        if indptr[-1] <= np.iinfo(np.int32).max:
            del group["indptr"]
            options = _COMPRESSION | {"maxshape": (None,)} if self._is_hdf5 else {}
            narrow = indptr.astype(np.int32)
            anndata.io.write_elem(group, "indptr", narrow, dataset_kwargs=options)
