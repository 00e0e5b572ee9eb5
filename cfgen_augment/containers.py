"""Annotated cells in the forms they come in: matrices out, generated cells in.

AnnData with one matrix, and AnnData with further modalities in obsm; `multimodal` has MuData and
several AnnData. Whatever works with annotated cells asks one of these classes, and so need not
know which form it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cfgen_augment import annotated
from cfgen_augment.counts import CellMatrix, append_rows, hold_to_columns
from cfgen_augment.stored import StoredCells

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

IN_X = "X"  # name of the modality that is not in obsm

# What is to be filled in: the annotation, where in a file each modality goes, what was dropped.
Frame = tuple[Any, list[list[str]], list[str]]


class Container(ABC):
    """Annotated cells of one form; see `multimodal.adapt`."""

    n_cells: int

    @abstractmethod
    def cells(self) -> CellMatrix | dict[str, CellMatrix]:
        """The counts, as `CFGen.fit` takes them; left on disk if they can be read there by row."""

    @abstractmethod
    def feature_names(self) -> NDArray | dict[str, NDArray]:
        """Names of the features, as `CFGen.fit` takes them."""

    @abstractmethod
    def obs_column(self, key: str, role: str) -> pd.Series:
        """The annotation `key` of the cells, in their order; raises KeyError without it."""

    @abstractmethod
    def check_extendable(self, key: str) -> None:
        """Check that cells can be added and marked in ``obs[key]``; raises ValueError."""

    @abstractmethod
    def frame(self, n_new: int, *, key: str, columns: Mapping[str, NDArray]) -> Frame:
        """The result of `append` but for its matrices, and where in a file they go."""

    @abstractmethod
    def append(
        self, new: Any, *, key: str = annotated.SYNTHETIC, columns: Mapping[str, NDArray]
    ) -> tuple[Any, str]:
        """The same form with generated cells after the real ones; and what was dropped.

        The real cells stay as they are.

        Parameters
        ----------
        new
            Generated cells, as `CFGen.generate` returns them.
        key
            Boolean column of obs that marks generated cells.
        columns
            Values of the generated cells in columns of obs that were generated with them. They
            are missing in every other column.

        Returns
        -------
        result
            A new object.
        note : str
            What to warn about, because it cannot hold for generated cells; empty if nothing.
        """

    def names_of(self, result: Any) -> pd.Index:
        """Names of the cells of a result, in their order."""
        return result.obs_names

    @abstractmethod
    def real(self) -> list[CellMatrix]:
        """The counts of every modality, with the cells in the order in which they are kept."""

    def annotate(self, result: Any, document: Mapping[str, Any]) -> None:
        """Write provenance into the result's uns."""
        result.uns["cfgen_augment"] = dict(document)

    def grows(self) -> bool:
        """Whether every matrix can be written block by block."""
        return all(
            isinstance(matrix, (np.ndarray, StoredCells)) or getattr(matrix, "format", "") == "csr"
            for matrix in self.real()
        )


class OneMatrix(Container):
    """AnnData whose counts are in ``X`` or in a layer."""

    def __init__(self, adata: AnnData, layer: str | None) -> None:
        self._adata = adata
        self._layer = layer
        self.n_cells = adata.n_obs

    def cells(self) -> CellMatrix:
        """See `Container.cells`."""
        return annotated.counts(self._adata, self._layer)

    def feature_names(self) -> NDArray:
        """See `Container.feature_names`."""
        return np.asarray(self._adata.var_names, dtype=object)

    def obs_column(self, key: str, role: str) -> pd.Series:
        """See `Container.obs_column`."""
        return annotated.obs_column(self._adata, key, role)

    def check_extendable(self, key: str) -> None:
        """See `Container.check_extendable`."""
        annotated.check_extendable(self._adata, key)

    def real(self) -> list[CellMatrix]:
        """See `Container.real`."""
        return [self.cells()]

    def frame(self, n_new: int, *, key: str, columns: Mapping[str, NDArray]) -> Frame:
        """See `Container.frame`."""
        result, layers, dropped = annotated.extended(
            self._adata, self.cells(), n_new, self._layer, key=key, columns=columns
        )
        return result, [[IN_X, *(f"layers/{name}" for name in layers)]], dropped

    def append(
        self, new: Any, *, key: str = annotated.SYNTHETIC, columns: Mapping[str, NDArray]
    ) -> tuple[AnnData, str]:
        """See `Container.append`."""
        result, places, dropped = self.frame(new.shape[0], key=key, columns=columns)
        fill(result, places[0], in_memory(self.cells()), new)
        return result, annotated.note_of(dropped)


class WithObsm(Container):
    """AnnData with modalities in obsm, beside ``X`` or instead of it."""

    def __init__(self, adata: AnnData, layer: str | None, names: Sequence[str]) -> None:
        known = [IN_X, *adata.obsm]
        if unknown := [name for name in names if name not in known]:
            raise KeyError(
                f"modalities: expected 'X' or keys of obsm ({annotated.existing(adata.obsm)}); got "
                f"{unknown[0]!r}."
            )
        if not names or len(set(names)) < len(names) or isinstance(names, str):
            raise ValueError(
                f"modalities: expected names, each once; got {names!r}. Pass for example "
                "['X', 'protein']."
            )
        self._adata = adata
        self._layer = layer
        self._names = list(names)
        self.n_cells = adata.n_obs

    def cells(self) -> dict[str, CellMatrix]:
        """See `Container.cells`."""
        return dict(zip(self._names, self.real(), strict=True))

    def real(self) -> list[CellMatrix]:
        """See `Container.real`."""
        return [
            annotated.counts(self._adata, self._layer)
            if name == IN_X
            else annotated.as_cells(self._adata.obsm[name])
            for name in self._names
        ]

    def feature_names(self) -> dict[str, NDArray]:
        """See `Container.feature_names`; columns that have none are numbered."""
        names = {}
        for name in self._names:
            matrix = self._adata.var if name == IN_X else self._adata.obsm[name]
            found = matrix.index if name == IN_X else getattr(matrix, "columns", None)
            found = range(matrix.shape[1]) if found is None else found
            names[name] = np.asarray(found).astype(str)
        return names

    def obs_column(self, key: str, role: str) -> pd.Series:
        """See `Container.obs_column`."""
        return annotated.obs_column(self._adata, key, role)

    def check_extendable(self, key: str) -> None:
        """See `Container.check_extendable`."""
        annotated.check_extendable(self._adata, key)

    def grows(self) -> bool:
        """See `Container.grows`."""
        tables = [hasattr(self._adata.obsm[name], "iloc") for name in self._names if name != IN_X]
        return not any(tables) and super().grows()

    def frame(self, n_new: int, *, key: str, columns: Mapping[str, NDArray]) -> Frame:
        """See `Container.frame`."""
        result, layers, dropped = annotated.extended(
            self._adata,
            annotated.counts(self._adata, self._layer) if IN_X in self._names else None,
            n_new,
            self._layer,
            key=key,
            columns=columns,
            obsm=self._names,
        )
        in_X = [IN_X, *(f"layers/{name}" for name in layers)]
        return result, [in_X if name == IN_X else [f"obsm/{name}"] for name in self._names], dropped

    def append(
        self, new: Any, *, key: str = annotated.SYNTHETIC, columns: Mapping[str, NDArray]
    ) -> tuple[AnnData, str]:
        """See `Container.append`."""
        n_new = next(iter(new.values())).shape[0]
        result, places, dropped = self.frame(n_new, key=key, columns=columns)
        for name, own, real in zip(self._names, places, self.real(), strict=True):
            if name == IN_X:
                fill(result, own, in_memory(real), new[name])
                continue
            given = self._adata.obsm[name]
            made = hold_to_columns(new[name], getattr(given, "dtypes", ()))
            matrix = append_rows(in_memory(real), made)
            if hasattr(given, "iloc"):
                matrix = type(given)(matrix, index=result.obs_names, columns=given.columns)
                matrix = matrix.astype(dict(given.dtypes))
            result.obsm[name] = matrix
        return result, annotated.note_of(dropped)


def in_memory(matrix: CellMatrix) -> CellMatrix:
    """The matrix, read if it is on disk."""
    return matrix.to_memory() if isinstance(matrix, StoredCells) else matrix


def fill(result: AnnData, places: Sequence[str], real: CellMatrix, new: CellMatrix) -> None:
    """Put real and generated counts into ``X`` and the layers that hold the same."""
    result.X = append_rows(real, new)
    for place in places[1:]:
        # Normalising X in place must not change the counts.
        result.layers[place.removeprefix("layers/")] = result.X.copy()
