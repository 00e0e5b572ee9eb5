"""Count data to demonstrate and measure on: by path, by name, packaged, or simulated."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cells import Cells
from benchmarks.datasets import Source, locate
from cfgen_augment.counts import check_cells

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

_LABEL_KEY = "cell_type"
_DONOR_KEYS = ("donor", "donor_id")  # the second is CELLxGENE's
_SYMBOLS = "feature_name"  # where CELLxGENE keeps gene symbols; its var_names are Ensembl ids
_BLOCK = 1 << 22  # values hashed at a time


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
    from cfgen_augment.files import read_h5ad

    return read_h5ad(Path(path))


def load_cells(
    name_or_path: str,
    *,
    label_key: str | None = None,
    donor_key: str | None = None,
    layer: str | None = None,
) -> Cells:
    """Labelled raw counts, ready to be split.

    Parameters
    ----------
    name_or_path
        An h5ad file; ``"demo"``, packaged with scanpy; ``"simulated"``; or a name, which stands
        for a file of `benchmarks.datasets.DATA_SETS` or for ``<name>.h5ad``. Names look in the
        directory ``$CFGEN_DATA`` first and download then.
    label_key
        Column of obs with cell types, by default ``cell_type``.
    donor_key
        Column of obs with donors, by default ``donor`` or ``donor_id``; without these, or with
        one donor in all, the cells have none.
    layer
        Layer with raw counts, or ``"raw"`` for ``adata.raw``; by default X.

    Returns
    -------
    Cells
        Cells without a label or donor are dropped, and genes of the same name numbered; both are
        logged. Genes go by ``var["feature_name"]`` where that exists, as in CELLxGENE's files.

    Raises
    ------
    FileNotFoundError
        If there is no such file, and none can be downloaded.
    KeyError
        If a column or layer is not there; lists those that are.
    ValueError
        If values are not counts, or a download is not what it should be.
    """
    if name_or_path == "simulated":
        if (label_key, donor_key, layer) != (None, None, None):
            raise ValueError(
                "simulated: expected no label_key, donor_key or layer, because the simulation has "
                "no columns to choose from. Leave them out."
            )
        from benchmarks.simulated import simulate

        return simulate()[0]
    if name_or_path == "demo":
        source, adata = Source("demo"), demo_counts()
    else:
        source, path = locate(name_or_path)
        adata = load(str(path))
    return _as_cells(
        adata,
        label_key or source.label_key or _LABEL_KEY,
        donor_key or source.donor_key,
        layer or source.layer,
        source,
    )


def content_hash(cells: Cells) -> str:
    """SHA-256 of everything in `cells`, whatever integer type their indices are stored in."""
    counts = cells.counts
    if not counts.has_canonical_format or (counts.data == 0).any():
        counts = counts.copy()
        counts.sum_duplicates()
        counts.eliminate_zeros()
    digest = hashlib.sha256()

    def add(values: NDArray, dtype: str) -> None:
        flat = values.reshape(-1)
        digest.update(json.dumps([list(values.shape), dtype]).encode())
        for start in range(0, flat.size, _BLOCK):
            digest.update(np.ascontiguousarray(flat[start : start + _BLOCK], dtype=dtype).tobytes())

    digest.update(json.dumps(list(counts.shape)).encode())
    add(counts.indptr, "<i8")
    add(counts.indices, "<i8")
    add(counts.data, "<f4")
    for names in (cells.labels, cells.genes, cells.donors):
        digest.update(json.dumps(None if names is None else list(map(str, names))).encode())
    for key in sorted(cells.obsm):
        digest.update(json.dumps(key).encode())
        add(np.asarray(cells.obsm[key]), "<f8")
    return digest.hexdigest()


def _as_cells(
    adata: AnnData, label_key: str, donor_key: str | None, layer: str | None, source: Source
) -> Cells:
    from cfgen_augment.annotated import counts as counts_of
    from cfgen_augment.annotated import obs_column

    if layer == "raw" and layer not in adata.layers and adata.raw is not None:
        matrix, var, names = adata.raw.X, adata.raw.var, adata.raw.var_names
    else:
        matrix, var, names = counts_of(adata, layer), adata.var, adata.var_names
    columns = {"label_key": obs_column(adata, label_key, "label_key")}
    if donor_key is not None:
        columns["donor_key"] = obs_column(adata, donor_key, "donor_key")
    else:
        found = next((key for key in _DONOR_KEYS if key in adata.obs), None)
        if found is not None and adata.obs[found].nunique() > 1:
            columns["donor_key"] = adata.obs[found]
        elif found is not None:
            logger.warning("obs[%r] names one donor only: cells are split without donors.", found)
    kept = np.ones(adata.n_obs, dtype=bool)
    if source.only is not None:
        key, value = source.only
        kept &= (obs_column(adata, key, "only").astype(str) == value).to_numpy()
    for role, column in columns.items():
        missing = column.isna().to_numpy() | (
            column.isin(source.unlabelled).to_numpy() if role == "label_key" else False
        )
        if (missing & kept).any():
            logger.warning(
                "Dropped %s of %s cells, which have no value in obs[%r].",
                f"{(missing & kept).sum():,}",
                f"{kept.sum():,}",
                column.name,
            )
        kept &= ~missing
    if not kept.any():
        raise ValueError(
            f"label_key: expected labelled cells; all {adata.n_obs:,} cells lack a value in "
            f"{' or '.join(f'obs[{c.name!r}]' for c in columns.values())}. Choose another column."
        )
    values = check_cells(matrix, "count", name="counts" if layer is None else f"counts ({layer})")
    counts = sparse.csr_matrix(values[kept], dtype=np.float32)
    counts.eliminate_zeros()
    donors = columns.get("donor_key")
    return Cells(
        counts=counts,
        labels=_strings(columns["label_key"], kept),
        genes=_gene_names(var[_SYMBOLS] if _SYMBOLS in var else names.to_series()),
        donors=None if donors is None else _strings(donors, kept),
        obsm={
            key: np.asarray(value)[kept]
            for key, value in adata.obsm.items()
            if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f"
        },
    )


def _strings(column: pd.Series, kept: NDArray) -> NDArray:
    return np.asarray(column[kept].astype(str).to_list(), dtype=str)


def _gene_names(column: pd.Series) -> NDArray:
    import pandas as pd
    from anndata.utils import make_index_unique

    names = pd.Index(column.astype(str).str.strip().to_list())  # some files pad them
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        logger.warning(
            "%d gene names occur more than once, among them %s: numbered from the second on.",
            len(repeated),
            repeated[0],
        )
        names = make_index_unique(names)
    return np.asarray(names.to_list(), dtype=str)
