"""Cells of the tables: of one or several modalities, split within types into two."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cells import Cells
from benchmarks.data import load, load_cells

if TYPE_CHECKING:
    from anndata import AnnData

RNA, ATAC = "rna", "atac"
#: Genes are kept that are seen in so many labelled cells. The paper says 20; its notebook for
#: PBMC3K filters at 30, and only that leaves the 8,573 genes that the paper gives.
MIN_CELLS, MIN_CELLS_OF = 20, {"pbmc3k": 30}
_UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class Pair:
    """RNA and ATAC of the same cells that go by a name.

    Attributes
    ----------
    files
        In the directory that ``$CFGEN_DATA`` names: one h5mu file, or one h5ad file of RNA and one
        of ATAC.
    source
        Where they are from.
    layer
        Layer with the raw counts; None is ``X``.
    """

    files: tuple[str, ...]
    source: str
    layer: str | None = None


#: The paper's two as the reference's configuration names them, layer and file.
PAIRED = {
    "scicar-a549": Pair(
        ("scicar_a549_rna.h5ad", "scicar_a549_atac_binary.h5ad"),
        "sci-CAR of A549 cells after 0, 1 and 3 h of dexamethasone (Cao et al., Science 361:1380, "
        "2018, doi:10.1126/science.aau0730), GEO GSE117089",
    ),
    "scicar-kidney": Pair(
        ("scicar_mouse_kidney_rna_tiny.h5ad", "scicar_mouse_kidney_atac_tiny.h5ad"),
        "sci-CAR of mouse kidney (Cao et al., Science 361:1380, 2018, "
        "doi:10.1126/science.aau0730), GEO GSE117089",
    ),
    "pbmc10k": Pair(
        ("pbmc10k_multiome_train.h5mu",),
        "the paper's PBMC10k, 10x Genomics Multiome, Zenodo 10.5281/zenodo.15031364",
        layer="X_counts",
    ),
    "neurips": Pair(
        ("neurips_multiome_train.h5mu",),
        "the paper's bone marrow, Luecken et al. 2021, GEO GSE194122; as processed for it, Zenodo "
        "10.5281/zenodo.15031364",
        layer="X_counts",
    ),
}


@dataclass(frozen=True)
class Measured:
    """Real cells with counts of one or several modalities.

    Attributes
    ----------
    counts
        By modality, CSR of float32, each ``(n_cells, n_features)``.
    features
        Names of every modality's features.
    labels
        Type of every cell, strings.
    """

    counts: Mapping[str, sparse.csr_matrix]
    features: Mapping[str, NDArray]
    labels: NDArray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray) -> Measured:
        """The cells at `rows`."""
        counts = {name: values[rows] for name, values in self.counts.items()}
        return Measured(counts, self.features, self.labels[rows])

    def sizes(self) -> dict[str, int]:
        """Cells of every type, types sorted by name."""
        names, sizes = np.unique(self.labels, return_counts=True)
        return {str(name): int(n) for name, n in zip(names, sizes, strict=True)}

    def one(self, name: str) -> Cells:
        """One modality, as models of one take it."""
        return Cells(self.counts[name], self.labels, self.features[name])


def read(
    data: str,
    *,
    paired: bool,
    label_key: str | None = None,
    layer: str | None = None,
    min_cells: int | None = None,
) -> Measured:
    """Labelled cells of RNA, or of RNA and ATAC.

    Parameters
    ----------
    data
        As for `benchmarks.data.load_cells`; where `paired`, a name of `PAIRED`, the paths of two
        h5ad files with a comma between them, or an h5mu file with modalities rna and atac.
    paired
        Whether there is ATAC too. It is binarised.
    label_key, layer
        As for `benchmarks.data.load_cells`.
    min_cells
        Features are kept that are seen in so many labelled cells. None is `MIN_CELLS` of RNA
        alone, or what `MIN_CELLS_OF` says, and one of paired data.

    Raises
    ------
    FileNotFoundError
        If data are not there; says where to get them.
    ValueError
        If the two modalities are not of the same cells, or no feature is left.
    """
    if not paired:
        cells = load_cells(data, label_key=label_key, layer=layer)
        counts, features = {RNA: cells.counts}, {RNA: cells.genes}
        labels = cells.labels
        least = MIN_CELLS_OF.get(Path(data).stem, MIN_CELLS) if min_cells is None else min_cells
    else:
        if layer is None and data in PAIRED:
            layer = PAIRED[data].layer
        counts, features, labels = _aligned(_pair(data), label_key or "cell_type", layer)
        least = 1 if min_cells is None else min_cells
    kept = {name: seen_in(values) >= max(least, 1) for name, values in counts.items()}
    for name, which in kept.items():
        if not which.any():
            raise ValueError(
                f"--min-cells: expected {name} features seen in {least} cells or more; none of "
                f"{len(which):,} is. Pass a smaller number."
            )
    return Measured(
        {name: values[:, kept[name]].tocsr() for name, values in counts.items()},
        {name: names[kept[name]] for name, names in features.items()},
        labels,
    )


def seen_in(counts: sparse.csr_matrix) -> NDArray[np.intp]:
    """Cells in which every feature is not zero."""
    return np.bincount(counts.indices[counts.data != 0], minlength=counts.shape[1])


def split(cells: Measured, held_out: float, seed: int) -> tuple[Measured, Measured]:
    """Training and held-out cells: of every type, `held_out` of its cells, rounded, at random."""
    random = np.random.default_rng(seed)
    out = np.zeros(len(cells), dtype=bool)
    for name in cells.sizes():
        rows = random.permutation(np.flatnonzero(cells.labels == name))
        out[rows[: round(held_out * len(rows))]] = True
    return cells.take(np.flatnonzero(~out)), cells.take(np.flatnonzero(out))


def _pair(data: str) -> dict[str, AnnData]:
    files = [Path(name) for name in data.split(",")]
    if data in PAIRED:
        files = _named(data)
    elif len(files) == 1 and files[0].suffix != ".h5mu":
        raise FileNotFoundError(
            f"{data}: expected RNA and ATAC of the same cells: one of {', '.join(PAIRED)}, the "
            "paths of two h5ad files with a comma between them, or an h5mu file."
        )
    if len(files) == 1:
        return _of_h5mu(files[0])
    if len(files) != 2:
        raise ValueError(f"--data: expected two files, RNA and ATAC; got {len(files)}.")
    return {name: load(str(file)) for name, file in zip((RNA, ATAC), files, strict=True)}


def _named(name: str) -> list[Path]:
    pair, folder = PAIRED[name], os.environ.get("CFGEN_DATA")
    files = [Path(folder or "", file) for file in pair.files]
    if folder is None or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"{name}: looked for {' and '.join(pair.files)} in $CFGEN_DATA "
            f"({folder or 'which is not set'}). Put there, under that name, {pair.source}: raw "
            f"counts in {'X' if pair.layer is None else f'layers[{pair.layer!r}]'} and the types "
            "in obs['cell_type'] of RNA. Or pass files of your own."
        )
    return files


def _of_h5mu(file: Path) -> dict[str, AnnData]:
    import mudata

    with mudata.set_options(pull_on_update=False):  # what modalities hold is enough, and no warning
        held = mudata.read_h5mu(file)
    missing = [name for name in (RNA, ATAC) if name not in held.mod]
    if missing:
        raise ValueError(
            f"{file}: expected modalities {RNA} and {ATAC}; got {', '.join(held.mod)}. Rename them."
        )
    return {name: held[name] for name in (RNA, ATAC)}


def _aligned(
    sides: Mapping[str, AnnData], label_key: str, layer: str | None
) -> tuple[dict[str, sparse.csr_matrix], dict[str, NDArray], NDArray]:
    """Counts, names and labels of the labelled cells; ATAC as zeros and ones."""
    from cfgen_augment.annotated import counts as counts_of
    from cfgen_augment.annotated import obs_column
    from cfgen_augment.counts import check_cells

    rna, atac = sides[RNA], sides[ATAC]
    if not rna.obs_names.equals(atac.obs_names):
        if set(rna.obs_names) != set(atac.obs_names):
            raise ValueError(
                f"--data: expected RNA and ATAC of the same cells; {rna.n_obs:,} and "
                f"{atac.n_obs:,} cells have other obs_names. Subset both to those they share."
            )
        atac = atac[rna.obs_names]
    labels = obs_column(rna, label_key, "label_key")
    kept = ~(labels.isna() | labels.isin([_UNLABELLED])).to_numpy()
    counts = {}
    for name, side in ((RNA, rna), (ATAC, atac)):
        values = check_cells(counts_of(side, layer), "count", name=name)
        counts[name] = sparse.csr_matrix(values[kept], dtype=np.float32)
        counts[name].eliminate_zeros()
    counts[ATAC].data[:] = 1.0
    features = {name: np.asarray(side.var_names, dtype=str) for name, side in sides.items()}
    return counts, features, np.asarray(labels[kept].astype(str).to_list(), dtype=str)
