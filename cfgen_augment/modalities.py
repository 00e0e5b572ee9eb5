"""Modalities: blocks of features measured in the same cells, each with a noise model of its own.

A modality is a name, a likelihood and a width, and nothing depends on the name. What users pass for
several is a mapping from names to values; a matrix by itself is the one modality that has no name.
Inside, everything is a sequence with one entry per modality, in the order of the mapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cfgen_augment.counts import CellMatrix, check_cells, holds_presence, total_counts
from cfgen_augment.likelihoods import uses_size_factor, value_kind
from cfgen_augment.stored import stack_rows

AUTO = "auto"

_WIDE = 20_000  # features, above which one of several modalities gets wider hidden layers
_HIDDEN = (512, 256)
_HIDDEN_WIDE = (1024, 512)


@dataclass(frozen=True)
class Modality:
    """One block of features.

    Attributes
    ----------
    name
        What users call it; None for a matrix given by itself.
    likelihood
        Name of its noise model.
    n_features
        Its width.
    """

    name: str | None
    likelihood: str
    n_features: int

    @property
    def title(self) -> str:
        """How messages call its matrix."""
        return _title(self.name)

    @property
    def has_size_factor(self) -> bool:
        """Whether its noise model scales a composition by the cell's total."""
        return uses_size_factor(self.likelihood)


def _title(name: str | None) -> str:
    return "X" if name is None else f"X[{name!r}]"


def lay_out(
    X: object, likelihood: str | Mapping[str, str], *, n_min: int = 1
) -> tuple[tuple[Modality, ...], list[CellMatrix]]:
    """Check what is to be learned from, and say what it consists of.

    Parameters
    ----------
    X
        A cell matrix, or a mapping from names of modalities to matrices of the same cells.
    likelihood
        Name of the noise model, of every modality or by modality. ``"auto"``, which also holds for
        modalities that a mapping leaves out, is ``"nb"`` for a matrix by itself; of a modality
        that has a name it is ``"bernoulli"`` if its values are zeros and ones alone, and ``"nb"``
        otherwise.
    n_min
        Fewest cells accepted.

    Returns
    -------
    modalities, matrices
        One entry per modality, the matrices as `counts.check_cells` returns them.

    Raises
    ------
    ValueError, TypeError
        If a matrix is not what its noise model takes, names are unknown, or the modalities differ
        in their number of cells; names the modality.
    """
    parts = _parts(X)
    by_modality = spread(likelihood, list(parts), "likelihood", AUTO)
    modalities, matrices = [], []
    for (name, part), chosen in zip(parts.items(), by_modality, strict=True):
        kind = value_kind("nb" if chosen == AUTO else chosen)
        matrix = check_cells(part, kind, name=_title(name), n_min=n_min)
        if chosen == AUTO:
            chosen = "bernoulli" if name is not None and holds_presence(matrix) else "nb"
        modalities.append(Modality(name, chosen, matrix.shape[1]))
        matrices.append(matrix)
    _check_cells_agree(modalities, matrices)
    return tuple(modalities), matrices


def check_like(modalities: Sequence[Modality], X: object, *, n_min: int = 1) -> list[CellMatrix]:
    """Check cells as ones of these modalities, and return their matrices.

    Raises
    ------
    ValueError, TypeError
        If the modalities or their features are others, or as `lay_out`.
    """
    parts = each(modalities, X, "X")
    matrices = []
    for modality, part in zip(modalities, parts, strict=True):
        matrix = check_cells(
            part, value_kind(modality.likelihood), name=modality.title, n_min=n_min
        )
        if matrix.shape[1] != modality.n_features:
            raise ValueError(
                f"{modality.title}: expected the {modality.n_features:,} features the model was "
                f"fitted on; got {matrix.shape[1]:,}. Pass the same features in the same order."
            )
        matrices.append(matrix)
    _check_cells_agree(modalities, matrices)
    return matrices


def is_by_name(given: object) -> bool:
    """Whether `given` has something for every name; SciPy's DOK matrices are mappings, too."""
    return isinstance(given, Mapping) and not sparse.issparse(given)


def _parts(X: Any) -> dict[str | None, Any]:
    if not is_by_name(X):
        return {None: X}
    if not X or not all(isinstance(name, str) and name for name in X):
        raise ValueError(
            "X: expected a matrix, or a mapping from names of modalities to matrices; got a "
            f"mapping with the keys {list(X)}. Give every modality a name."
        )
    return dict(X)


def _check_cells_agree(modalities: Sequence[Modality], matrices: Sequence[CellMatrix]) -> None:
    for modality, matrix in zip(modalities, matrices, strict=True):
        if matrix.shape[0] != matrices[0].shape[0]:
            raise ValueError(
                f"{modality.title}: expected the {matrices[0].shape[0]:,} cells of "
                f"{modalities[0].title}; got {matrix.shape[0]:,}. Pass matrices of the same cells "
                "in the same order."
            )


def spread(given: Any, names: Sequence[str | None], what: str, default: Any) -> list[Any]:
    """A parameter for every modality, from one value for all or a mapping.

    Raises
    ------
    ValueError
        If a mapping names what is no modality.
    """
    if not isinstance(given, Mapping):
        return [given] * len(names)
    if unknown := [name for name in given if name not in names]:
        known = "one matrix without a name" if None in names else f"modalities {list(names)}"
        raise ValueError(
            f"{what}: expected a value, or values for {known}; got one for {unknown[0]!r}. Correct "
            "the name."
        )
    return [given.get(name, default) for name in names]


def each(modalities: Sequence[Modality], given: Any, what: str) -> list[Any]:
    """What users pass for every modality: a mapping that has all of them, or the thing itself.

    Raises
    ------
    ValueError
        If modalities are missing or unknown.
    TypeError
        If there is a mapping where none is wanted, or the other way round.
    """
    if modalities[0].name is None:
        if is_by_name(given):
            raise TypeError(
                f"{what}: expected what a model of one matrix takes; got a mapping with "
                f"{list(given)}. Pass the values themselves, or fit on a mapping."
            )
        return [given]
    names = [modality.name for modality in modalities]
    if not is_by_name(given):
        raise TypeError(
            f"{what}: expected a mapping with the modalities {names}; got {type(given).__name__}. "
            "Pass values by name."
        )
    if set(given) != set(names):
        raise ValueError(
            f"{what}: expected the modalities {names}; got {list(given)}. Pass those the model "
            "was fitted on, by the same names."
        )
    return [given[name] for name in names]


def by_name(modalities: Sequence[Modality], values: Sequence[Any]) -> Any:
    """One value per modality as users see them: a mapping, or the value of the nameless one."""
    if modalities[0].name is None:
        return values[0]
    return {modality.name: value for modality, value in zip(modalities, values, strict=True)}


def stack(blocks: Sequence[Any]) -> Any:
    """Blocks of cells, each a matrix or a mapping of matrices, one below the other."""
    if not isinstance(blocks[0], Mapping):
        return stack_rows(blocks)
    return {name: stack_rows([block[name] for block in blocks]) for name in blocks[0]}


def n_sizes(modalities: Sequence[Modality]) -> int:
    """Number of a cell's size factors: one per modality that has one, and one at least.

    Where no modality has one there is one that is always 1.
    """
    return max(sum(modality.has_size_factor for modality in modalities), 1)


def totals_of(
    modalities: Sequence[Modality], matrices: Sequence[CellMatrix]
) -> NDArray[np.float64]:
    """Size factors of cells, ``(n_cells, n_sizes)``: their total counts, see `n_sizes`."""
    pairs = zip(modalities, matrices, strict=True)
    totals = [total_counts(matrix) for modality, matrix in pairs if modality.has_size_factor]
    return np.column_stack(totals or [np.ones(matrices[0].shape[0])])


def hidden_widths(
    hidden: str | Sequence[int] | Mapping[str, Any], modalities: Sequence[Modality]
) -> list[tuple[int, ...]]:
    """Widths of the encoder's hidden layers, for every modality.

    ``"auto"``, which also holds for modalities that a mapping leaves out, is (512, 256); of
    several modalities, those with more than 20,000 features get (1024, 512).

    Raises
    ------
    ValueError
        If a mapping names what is no modality.
    """
    names = [modality.name for modality in modalities]
    widths = []
    for modality, given in zip(modalities, spread(hidden, names, "hidden", AUTO), strict=True):
        if isinstance(given, str):
            wide = len(modalities) > 1 and modality.n_features > _WIDE
            given = _HIDDEN_WIDE if wide else _HIDDEN
        widths.append(tuple(given))
    return widths
