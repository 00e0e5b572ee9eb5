"""h5ad and zarr files: opened without reading their matrices, written block by block."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from cfgen_augment.counts import CellMatrix
from cfgen_augment.stored import UnreadableError, as_stored, in_order, stack_rows

if TYPE_CHECKING:
    from anndata import AnnData

FORMATS = (".h5ad", ".zarr")
# Of h5ad files. Level 4 takes over half as much time again for the same size; lzf takes less time
# for half as much size again, and is known to h5py alone.
_COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 1}
_WRITTEN_VALUES = 1 << 22  # values gathered before they go to the file
_MARKS_OF_ZARR = ("zarr.json", ".zgroup")  # one of them lies in every zarr group


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that a result can be written to `path`, before any work is done.

    Raises
    ------
    ValueError
        If it is no place for such a file, or its name says neither h5ad nor zarr.
    FileExistsError
        If there is such a file, and not `overwrite`.
    """
    if path.suffix != ".zarr":
        _check_no_directory(path)
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path}: expected a name that ends in .h5ad or .zarr, which says what to write; it "
            f"ends in {path.suffix!r}. Rename the output."
        )
    _check_folder(path)
    is_store = path.suffix == ".zarr" and any((path / m).is_file() for m in _MARKS_OF_ZARR)
    if path.suffix == ".zarr" and path.exists() and not is_store:
        raise ValueError(
            f"{path}: expected a new name or a zarr store; what is there is neither, and is never "
            "overwritten. Choose another name."
        )
    _check_new(path, overwrite)


def check_report(path: Path, *, overwrite: bool) -> None:
    """Check that a report can be written to `path`, before any work is done.

    Raises
    ------
    ValueError
        If it is no place for a file, or its name does not end in ``.html``.
    FileExistsError
        If there is one, and not `overwrite`.
    """
    _check_no_directory(path)
    if path.suffix != ".html":
        raise ValueError(
            f"{path}: expected a name that ends in .html; it ends in {path.suffix!r}. Rename the "
            "report."
        )
    _check_folder(path)
    _check_new(path, overwrite)


def _check_no_directory(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file name; it is a directory or a device.")


def _check_folder(path: Path) -> None:
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{path}: expected a directory that can be written to; {folder} is not one."
        )


def _check_new(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path}: expected a new file; it exists. Pass --force to overwrite it (in Python, "
            "overwrite=True)."
        )


def read_h5ad(path: Path) -> AnnData:
    """Read a file into memory.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    UnreadableError
        If it is not a complete h5ad file.
    """
    import anndata

    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an h5ad file; there is no such file.")
    with _reading(path, "h5ad file"):
        return anndata.read_h5ad(path)


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise  # nothing is wrong with the file
    except Exception as error:  # anndata and h5py raise a dozen kinds for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableError(
            f"{path}: expected a complete {what}; could not read it ({reason}). It may be "
            "truncated: copy or write it again."
        ) from error


# ------------------------------------------------------------------- opening


@contextlib.contextmanager
def opened(path: Path) -> Iterator[AnnData]:
    """AnnData of an h5ad or zarr file, whose matrices stay on disk while it is open.

    Unlike anndata's backed mode, that holds for layers, obsm, obsp and raw too. Files by
    anndata before 0.8 are read into memory.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    UnreadableError
        If it is not a complete file.
    """
    as_zarr = path.is_dir() or path.suffix == ".zarr"
    what = "zarr store" if as_zarr else "h5ad file"
    if not path.exists() or path.is_dir() != as_zarr:
        article = "a" if as_zarr else "an"
        raise FileNotFoundError(f"{path}: expected {article} {what}; there is no such file.")
    with contextlib.ExitStack() as stack:
        with _reading(path, what), warnings.catch_warnings():
            # anndata's remarks on names that are not unique; those that matter are errors here.
            warnings.filterwarnings("ignore", ".* names are not unique", UserWarning)
            adata = _open(path, as_zarr, stack)
        yield adata


def _open(path: Path, as_zarr: bool, stack: contextlib.ExitStack) -> AnnData:
    import anndata

    store: Any
    if as_zarr:
        import zarr

        store = zarr.open_group(str(path), mode="r")
    else:
        import h5py

        store = stack.enter_context(h5py.File(path, "r"))
    if store.attrs.get("encoding-type") != "anndata":
        return anndata.read_zarr(path) if as_zarr else anndata.read_h5ad(path)
    tables = {name: anndata.io.read_elem(store[name]) for name in ("obs", "var")}
    small = {n: anndata.io.read_elem(store[n]) for n in ("uns", "varm", "varp") if n in store}
    large = {
        name: {key: _matrix(store[name][key]) for key in store[name]}
        for name in ("layers", "obsm", "obsp")
        if name in store
    }
    raw = None
    if "raw" in store and store["raw"].attrs.get("encoding-type") == "raw":
        raw = {
            "X": _matrix(store["raw"]["X"]),
            "var": anndata.io.read_elem(store["raw"]["var"]),
        }
    X = _matrix(store["X"]) if "X" in store else None
    return anndata.AnnData(X=X, raw=raw, **tables, **small, **large)


def _matrix(element: Any) -> Any:
    """An element as a matrix on disk, or in memory if it is not one."""
    import anndata

    encoding = element.attrs.get("encoding-type")
    if encoding in ("csr_matrix", "csc_matrix"):
        for member in ("data", "indices", "indptr"):
            element[member]  # anndata would ask for it when it is too late to say what is wrong
        return anndata.io.sparse_dataset(element)
    return element if encoding == "array" else anndata.io.read_elem(element)


# ------------------------------------------------------------------- writing


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
    annotation: AnnData,
    path: Path,
    blocks: Iterable[CellMatrix],
    layers: Sequence[str] = (),
    *,
    named: Path | None = None,
) -> None:
    """Write annotation and cells to an h5ad or zarr file, block by block.

    Parameters
    ----------
    annotation
        Everything but the cells; without ``X``. Strings in its obs become categories, as always
        when AnnData are written.
    path
        Where to; its suffix says what.
    blocks
        The cells, ``(n_block, n_vars)`` each and ``n_obs`` in all, all CSR or all ndarrays.
    layers
        Layers that hold the same as ``X``.
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
            places = [(store, "X"), *((store["layers"], name) for name in layers)]
            growing = [_Growing(*place) for place in places]
        for block in _gathered(blocks):
            with writing(named):
                for matrix in growing:
                    matrix.append(block)
        with writing(named):
            for matrix in growing:
                matrix.finish()
            stack.close()  # what is still to be flushed may find the disk full
            if path.suffix == ".zarr":
                _consolidate(path)


def write_whole(adata: AnnData, path: Path, *, named: Path) -> None:
    """Write AnnData that are in memory."""
    with writing(named):
        _write_in_memory(adata, path)


def _write_in_memory(adata: AnnData, path: Path) -> None:
    if path.suffix == ".h5ad":
        adata.write_h5ad(path, **_COMPRESSION)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2", UserWarning)
        adata.write_zarr(path)


def _open_to_write(path: Path, stack: contextlib.ExitStack) -> Any:
    if path.suffix == ".h5ad":
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


def _gathered(blocks: Iterable[CellMatrix]) -> Iterator[CellMatrix]:
    """Blocks stacked into larger ones, so that no chunk of the file is packed many times over."""
    waiting: list[CellMatrix] = []
    values = 0
    for block in blocks:
        waiting.append(block)
        values += block.nnz if sparse.issparse(block) else block.size
        if values >= _WRITTEN_VALUES:
            yield stack_rows(waiting)
            waiting, values = [], 0
    if waiting:
        yield stack_rows(waiting)


# -------------------------------------------------------------------- shards


def write_shard(path: Path, blocks: Iterable[CellMatrix]) -> None:
    """Write blocks of cells, and nothing else, to a file of their own.

    Raises
    ------
    OSError
        If it cannot be written; what `blocks` raises comes through as it is.
    """
    import h5py

    with contextlib.ExitStack() as stack:
        with writing(path):
            growing = _Growing(stack.enter_context(h5py.File(path, "w")), "X")
        for block in _gathered(blocks):
            with writing(path):
                growing.append(block)
        with writing(path):
            growing.finish()
            stack.close()


def read_shards(paths: Iterable[Path]) -> Iterator[CellMatrix]:
    """Cells of files by `write_shard`, one file after the other, block by block."""
    import h5py

    for path in paths:
        with h5py.File(path, "r") as store:
            X = as_stored(_matrix(store["X"]))
            for _, block in in_order(X):
                yield block


class _Growing:
    """A matrix in a file that rows are appended to."""

    def __init__(self, parent: Any, name: str) -> None:
        self._parent = parent
        self._name = name
        self._is_hdf5 = not hasattr(parent, "store_path")

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
