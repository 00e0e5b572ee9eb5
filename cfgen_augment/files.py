"""h5ad, h5mu and zarr files: checked, and opened without reading their matrices."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfgen_augment.multimodal import check_mudata, mudata_of
from cfgen_augment.stored import UnreadableError

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

FORMATS = (".h5ad", ".h5mu", ".zarr")
_MARKS_OF_ZARR = ("zarr.json", ".zgroup")  # one of them lies in every zarr group


def check_apart(model: Path, output: Path) -> None:
    """Check that a model is not to be saved where the output will be.

    Raises
    ------
    ValueError
        If it is the output, or within it: a store that appears whole would replace it.
    """
    place, taken = model.resolve(), output.resolve()
    if taken in (place, *place.parents):
        raise ValueError(
            f"save_model: expected a place outside the output {output}; got {model}. Choose "
            "another (in the command, --save-model)."
        )


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that a result can be written to `path`, before any work is done.

    Raises
    ------
    ValueError
        If it is no place for such a file, or its name says none of those formats.
    FileExistsError
        If there is such a file, and not `overwrite`.
    """
    if path.suffix != ".zarr":
        _check_no_directory(path)
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path}: expected a name that ends in .h5ad, .h5mu or .zarr, which says what to "
            f"write; it ends in {path.suffix!r}. Rename the output."
        )
    _check_folder(path)
    is_store = path.suffix == ".zarr" and any((path / m).is_file() for m in _MARKS_OF_ZARR)
    if path.suffix == ".zarr" and path.exists() and not is_store:
        raise ValueError(
            f"{path}: expected a new name or a zarr store; what is there is neither, and is never "
            "overwritten. Choose another name."
        )
    _check_new(path, overwrite)


def check_kinds(source: Path, output: Path) -> None:
    """Check that MuData are written as MuData, and AnnData as AnnData.

    Raises
    ------
    ValueError
        If one name ends in ``.h5mu`` and the other does not.
    """
    if (source.suffix == ".h5mu") != (output.suffix == ".h5mu"):
        expected = "ends in .h5mu, as" if source.suffix == ".h5mu" else "does not end in .h5mu, as"
        raise ValueError(
            f"{output}: expected a name that {expected} that of the input ({source.name}). Rename "
            "the output."
        )


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
def opened(path: Path) -> Iterator[AnnData | MuData]:
    """AnnData of an h5ad or zarr file, whose matrices stay on disk while it is open.

    Of an h5mu file, MuData; the suffix says so.

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
    suffix = path.suffix if path.suffix == ".h5mu" else ".h5ad"
    what = "zarr store" if as_zarr else f"{suffix[1:]} file"
    if suffix == ".h5mu":
        check_mudata()
    if not path.exists() or path.is_dir() != as_zarr:
        article = "a" if as_zarr else "an"
        raise FileNotFoundError(f"{path}: expected {article} {what}; there is no such file.")
    with contextlib.ExitStack() as stack:
        with _reading(path, what), warnings.catch_warnings():
            # anndata's remarks on names that are not unique; those that matter are errors here.
            warnings.filterwarnings("ignore", ".* names are not unique", UserWarning)
            cells = _open_h5mu(path, stack) if suffix == ".h5mu" else _open(path, as_zarr, stack)
        yield cells


def _open(path: Path, as_zarr: bool, stack: contextlib.ExitStack) -> AnnData:
    store: Any
    if as_zarr:
        import zarr

        store = zarr.open_group(str(path), mode="r")
    else:
        import h5py

        store = stack.enter_context(h5py.File(path, "r"))
    if store.attrs.get("encoding-type") != "anndata":
        import anndata

        return anndata.read_zarr(path) if as_zarr else anndata.read_h5ad(path)
    return _of_group(store)


def _open_h5mu(path: Path, stack: contextlib.ExitStack) -> MuData:
    import anndata
    import h5py

    store = stack.enter_context(h5py.File(path, "r"))
    if store.attrs.get("encoding-type") != "MuData":
        raise ValueError("it does not hold MuData")
    if store.attrs.get("axis", 0) != 0:
        raise ValueError("its modalities share features, not cells")
    order = store["mod"].attrs.get("mod-order", list(store["mod"]))
    parts = {str(name): _of_group(store["mod"][name]) for name in order}
    slots = {
        name: anndata.io.read_elem(store[name])
        for name in ("obs", "var", "obsm", "obsp", "varm", "varp", "uns")
        if name in store
    }
    return mudata_of(parts, **slots)


def _of_group(store: Any) -> AnnData:
    import anndata

    tables = {name: anndata.io.read_elem(store[name]) for name in ("obs", "var")}
    small = {n: anndata.io.read_elem(store[n]) for n in ("uns", "varm", "varp") if n in store}
    large = {
        name: {key: matrix_in(store[name][key]) for key in store[name]}
        for name in ("layers", "obsm", "obsp")
        if name in store
    }
    raw = None
    if "raw" in store and store["raw"].attrs.get("encoding-type") == "raw":
        raw = {
            "X": matrix_in(store["raw"]["X"]),
            "var": anndata.io.read_elem(store["raw"]["var"]),
        }
    X = matrix_in(store["X"]) if "X" in store else None
    return anndata.AnnData(X=X, raw=raw, **tables, **small, **large)


def matrix_in(element: Any) -> Any:
    """An element of a file as a matrix on disk, or in memory if it is not one."""
    import anndata

    encoding = element.attrs.get("encoding-type")
    if encoding in ("csr_matrix", "csc_matrix"):
        for member in ("data", "indices", "indptr"):
            element[member]  # anndata would ask for it when it is too late to say what is wrong
        return anndata.io.sparse_dataset(element)
    return element if encoding == "array" else anndata.io.read_elem(element)
