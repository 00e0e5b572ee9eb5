"""Real and generated cells side by side, type by type, read no more than needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cfgen_augment import annotated
from cfgen_augment.attributes import check_attribute
from cfgen_augment.counts import CellMatrix, check_cells
from cfgen_augment.parameters import RandomState, entropy
from cfgen_augment.stored import take

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Side:
    """Either the real or the generated cells of a pair.

    Attributes
    ----------
    role
        ``"real"`` or ``"synthetic"``, for error messages.
    counts
        Raw counts, in memory or on disk, ``(n_cells, n_genes)``; not only of this side's cells.
    rows
        Which of them are of this side, ascending, ``(n_side,)``.
    labels
        Types of this side's cells, ``(n_side,)``.
    """

    role: str
    counts: CellMatrix
    rows: NDArray[np.intp]
    labels: NDArray

    def number(self, label: Any) -> int:
        """Cells of a type."""
        return int((self.labels == label).sum())

    def sample(self, label: Any, most: int, random: np.random.Generator) -> sparse.csr_matrix:
        """Raw counts of at most `most` cells of a type, checked, CSR.

        Raises
        ------
        ValueError
            If they are not counts.
        """
        rows = self.rows[self.labels == label]
        if len(rows) > most:
            rows = np.sort(random.choice(rows, most, replace=False))
        cells = sparse.csr_matrix(take(self.counts, rows))
        return check_cells(cells, "count", name=f"{self.role} cells", n_min=0)


@dataclass(frozen=True)
class Pairs:
    """Real and generated cells with the same genes, made by `paired`.

    Attributes
    ----------
    genes
        Names of the genes, ``(n_genes,)``.
    real, synthetic
        The cells.
    seed
        Of the samples that are drawn of them.
    """

    genes: NDArray
    real: Side
    synthetic: Side
    seed: int

    @property
    def types(self) -> list[Any]:
        """Types of either side, those with the fewest real cells first."""
        found = {*self.real.labels.tolist(), *self.synthetic.labels.tolist()}
        return sorted(found, key=lambda label: (self.real.number(label), label))

    def sample(self, label: Any, most: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Counts of at most `most` cells of a type of either side, the same in every call."""
        of_type = self.types.index(label)
        real, synthetic = (
            side.sample(label, most, np.random.default_rng([self.seed, of_type, i]))
            for i, side in enumerate((self.real, self.synthetic))
        )
        return real, synthetic

    def matched(self, most: int) -> Iterator[tuple[Any, sparse.csr_matrix, sparse.csr_matrix]]:
        """Types that both sides have, with as many real as generated cells, at most `most`.

        All types together then make up either side alike, however rare types were added to.

        Raises
        ------
        ValueError
            If both sides have no type in common, or `most` is no number of cells.
        """
        if not isinstance(most, Integral) or most < 1:
            raise ValueError(f"max_cells: expected a whole number from 1; got {most!r}.")
        common = [t for t in self.types if self.real.number(t) and self.synthetic.number(t)]
        if not common:
            raise ValueError(
                "synthetic: expected cells of a type that real cells have; the types of real "
                f"cells are {_listed(self.real.labels)}, those of synthetic ones "
                f"{_listed(self.synthetic.labels)}. Check label_key."
            )
        for label in common:
            number = min(self.real.number(label), self.synthetic.number(label), most)
            yield label, *self.sample(label, number)


def _listed(labels: NDArray) -> str:
    names = [repr(name) for name in np.unique(labels).tolist()]
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "") or "none"


def paired(
    real: AnnData | Pairs,
    synthetic: AnnData | None = None,
    label_key: str | None = None,
    *,
    layer: str | None = None,
    key_added: str | None = None,
    random_state: RandomState = 0,
) -> Pairs:
    """Put real and generated cells side by side.

    Where obs marks generated cells, as `augment` does, only unmarked cells are taken for real and
    only marked ones for generated.

    Parameters
    ----------
    real
        Real cells with raw counts, ``(n_obs, n_vars)``, in memory, backed, or of
        `files.opened`; or what `augment` returned, real and generated cells together. Pairs are
        returned as they are.
    synthetic
        Generated cells with the same genes; None if `real` holds them.
    label_key
        Column of obs with the types.
    layer
        Layer with the raw counts; None uses ``X``.
    key_added
        Column of obs that marks generated cells; None uses what `augment` noted in uns, or
        ``"is_synthetic"``.
    random_state
        Seed of the samples.

    Raises
    ------
    TypeError
        If `real` or `synthetic` are not AnnData, or `label_key` is not given.
    KeyError
        If a column of obs or a layer is not there.
    ValueError
        If there are no real or no generated cells, or their genes differ.
    """
    if isinstance(real, Pairs):
        return real
    for role, cells in (("real", real), ("synthetic", synthetic)):
        if not annotated.is_anndata(cells) and (role == "real" or cells is not None):
            raise TypeError(
                f"{role}: expected AnnData; got {type(cells).__name__}. Of several modalities pass "
                "one, with the types in its own obs (MuData.push_obs copies them there); wrap "
                "counts with anndata.AnnData(counts, obs=...); name label_key= if there is nothing "
                "in between."
            )
    if label_key is None:
        raise TypeError("label_key: expected the column of obs with the types; got None. Pass it.")
    if synthetic is None and (key := _mark_key(real, key_added)) not in real.obs:
        raise KeyError(
            f"synthetic: expected generated cells, or a column {key!r} of obs that marks them in "
            "real; got neither. Pass synthetic=, or the name of that column as key_added=."
        )
    others = real if synthetic is None else synthetic
    if not np.array_equal(real.var_names, others.var_names):
        same = set(real.var_names) == set(others.var_names)
        how = "the same in another order" if same else "others"
        raise ValueError(
            f"synthetic: expected the genes of the real cells in their order; got {how}. Take "
            "synthetic[:, real.var_names], or subset both to the genes they share."
        )
    sides = (
        _side(real, "real", False, label_key, layer, key_added),
        _side(others, "synthetic", True, label_key, layer, key_added),
    )
    kinds = {type(label) for side in sides for label in side.labels[:1].tolist()}
    if len(kinds) > 1:
        raise TypeError(
            f"obs[{label_key!r}]: expected types of one kind in real and synthetic; got "
            f"{' and '.join(sorted(kind.__name__ for kind in kinds))}. Convert with .astype(str)."
        )
    return Pairs(real.var_names.to_numpy(), *sides, entropy(random_state))


def _mark_key(adata: AnnData, key_added: str | None) -> str:
    if key_added is not None:
        return key_added
    noted = adata.uns.get("cfgen_augment", {})
    return str(noted.get("key_added", annotated.SYNTHETIC))


def _side(
    adata: AnnData,
    role: str,
    wanted: bool,
    label_key: str,
    layer: str | None,
    key_added: str | None,
) -> Side:
    """The cells of `adata` that are marked as `wanted`, or all if nothing is marked."""
    key = _mark_key(adata, key_added)
    if key in adata.obs:
        column = adata.obs[key]
        if str(column.dtype) not in ("bool", "boolean") or column.isna().any():
            raise ValueError(
                f"obs[{key!r}]: expected true for generated and false for real cells; got "
                f"{column.dtype} values. Convert them, or pass another column as key_added=."
            )
        rows = np.flatnonzero(column.to_numpy(dtype=bool) == wanted)
        why = f"; obs[{key!r}] is {not wanted} for all {adata.n_obs:,}"
    else:
        rows, why = np.arange(adata.n_obs), ""
    if not len(rows):
        raise ValueError(f"{role}: expected at least one {role} cell; got none{why}.")
    labels = annotated.obs_column(adata, label_key, "label_key").iloc[rows]
    matrix = annotated.counts(adata, layer)
    matrix = matrix.tocsr() if sparse.issparse(matrix) else matrix
    return Side(role, matrix, rows, check_attribute(labels, f"{role}: obs[{label_key!r}]"))
