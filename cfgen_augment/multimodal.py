"""Several modalities of annotated cells: MuData, and AnnData of the same cells by name.

The only room that knows MuData.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cfgen_augment import annotated
from cfgen_augment.containers import (
    IN_X,
    Container,
    Frame,
    OneMatrix,
    WithObsm,
    fill,
    in_memory,
)
from cfgen_augment.counts import CellMatrix

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData


class SeveralAnnData(Container):
    """A mapping from names of modalities to AnnData of the same cells, matched by obs_names.

    The cells go in the order of the first; the others may have another one, which they keep.
    """

    def __init__(
        self, parts: Mapping[str, AnnData], layer: str | Mapping[str, str | None] | None
    ) -> None:
        from cfgen_augment.modalities import spread  # imports torch; files are checked without

        self._parts = dict(parts)
        names = list(self._parts)
        self._layers = dict(zip(names, spread(layer, names, "layer", None), strict=True))
        self._order: dict[str, NDArray[np.intp] | None] = {}
        reference = self._reference()
        self.n_cells = len(reference)
        for name, part in self._parts.items():
            self._order[name] = _matched(reference, part.obs_names, name, self._referee())

    def _reference(self) -> pd.Index:
        return next(iter(self._parts.values())).obs_names

    def _referee(self) -> str:
        return f"modality {next(iter(self._parts))!r}"

    def cells(self) -> dict[str, CellMatrix]:
        """See `Container.cells`; cells of another order on disk are read into memory."""
        matrices = zip(self._parts, self.real(), self._order.values(), strict=True)
        return {
            name: matrix if order is None else in_memory(matrix)[order]
            for name, matrix, order in matrices
        }

    def real(self) -> list[CellMatrix]:
        """See `Container.real`."""
        matrices = []
        for name, part in self._parts.items():
            try:
                matrices.append(annotated.counts(part, self._layers[name]))
            except (KeyError, ValueError) as error:
                raise type(error)(f"modality {name!r}: {error.args[0]}") from error
        return matrices

    def feature_names(self) -> dict[str, NDArray]:
        """See `Container.feature_names`."""
        return {name: np.asarray(p.var_names, dtype=object) for name, p in self._parts.items()}

    def obs_column(self, key: str, role: str) -> pd.Series:
        """See `Container.obs_column`; modalities that have it must agree."""
        found = {n: self._aligned(n, key) for n, part in self._parts.items() if key in part.obs}
        if not found:
            columns = {name: annotated.existing(p.obs.columns) for name, p in self._parts.items()}
            raise KeyError(
                f"{role}: expected a column of obs in at least one modality ({columns}); got "
                f"{key!r}."
            )
        first, *others = found
        for name in others:
            if not _equal_values(found[first], found[name]):
                raise ValueError(
                    f"{role}: expected modalities to agree in obs[{key!r}]; {first!r} and {name!r} "
                    "do not. Delete or rename the column where it means something else."
                )
        return found[first]

    def _aligned(self, name: str, key: str) -> pd.Series:
        column, order = self._parts[name].obs[key], self._order[name]
        return column if order is None else column.iloc[order]

    def check_extendable(self, key: str) -> None:
        """See `Container.check_extendable`."""
        for name, part in self._parts.items():
            try:
                annotated.check_extendable(part, key)
            except ValueError as error:
                raise ValueError(f"modality {name!r}: {error}") from error

    def frame(self, n_new: int, *, key: str, columns: Mapping[str, NDArray]) -> Frame:
        """See `Container.frame`."""
        results, places, dropped = {}, [], []
        for (name, part), real in zip(self._parts.items(), self.real(), strict=True):
            result, layers, gone = annotated.extended(
                part,
                real,
                n_new,
                self._layers[name],
                key=key,
                columns=self._own_columns(name, columns),
            )
            results[name] = result
            places.append([f"mod/{name}/{p}" for p in (IN_X, *(f"layers/{k}" for k in layers))])
            dropped += [f"{what} of {name!r}" for what in gone]
        return results, places, dropped

    def _own_columns(self, name: str, columns: Mapping[str, NDArray]) -> dict[str, NDArray]:
        return {key: values for key, values in columns.items() if key in self._parts[name].obs}

    def append(
        self, new: Any, *, key: str = annotated.SYNTHETIC, columns: Mapping[str, NDArray]
    ) -> tuple[Any, str]:
        """See `Container.append`."""
        n_new = next(iter(new.values())).shape[0]
        results, places, dropped = SeveralAnnData.frame(self, n_new, key=key, columns=columns)
        for name, own, real in zip(results, places, self.real(), strict=True):
            inside = [place.removeprefix(f"mod/{name}/") for place in own]
            fill(results[name], inside, in_memory(real), new[name])
        result = self._together(results, n_new, key=key, columns=columns, dropped=dropped)
        return result, annotated.note_of(dropped)

    def _together(
        self,
        results: dict[str, AnnData],
        n_new: int,
        *,
        key: str,
        columns: Mapping[str, NDArray],
        dropped: list[str],
    ) -> Any:
        """The modalities as users passed them; adds to what was dropped."""
        return results

    def names_of(self, result: Any) -> pd.Index:
        """See `Container.names_of`."""
        return next(iter(result.values())).obs_names

    def annotate(self, result: Any, document: Mapping[str, Any]) -> None:
        """See `Container.annotate`."""
        for part in result.values():
            part.uns["cfgen_augment"] = dict(document)


class InMuData(SeveralAnnData):
    """MuData: the order and the annotation of the cells are its own."""

    def __init__(self, mdata: MuData, layer: str | Mapping[str, str | None] | None) -> None:
        if mdata.axis != 0:
            raise ValueError(
                "mdata: expected modalities of the same cells (axis=0); got MuData of axis "
                f"{mdata.axis}."
            )
        self._mdata = mdata
        super().__init__(mdata.mod, layer)

    def _reference(self) -> pd.Index:
        return self._mdata.obs_names

    def _referee(self) -> str:
        return "mdata"

    def obs_column(self, key: str, role: str) -> pd.Series:
        """See `Container.obs_column`."""
        if key not in self._mdata.obs:
            owners = [name for name, part in self._parts.items() if key in part.obs]
            remedy = f" Modality {owners[0]!r} has it: run mdata.pull_obs({key!r})." * bool(owners)
            raise KeyError(
                f"{role}: expected a column of mdata.obs "
                f"({annotated.existing(self._mdata.obs.columns)}); got {key!r}.{remedy}"
            )
        return self._mdata.obs[key]

    def check_extendable(self, key: str) -> None:
        """See `Container.check_extendable`."""
        annotated.check_extendable(self._mdata, key)
        super().check_extendable(key)

    def _own_columns(self, name: str, columns: Mapping[str, NDArray]) -> dict[str, NDArray]:
        # A column of a modality says the same as the one above it that it was copied to, or not.
        own = {}
        for key, values in columns.items():
            for inside in {key, key.removeprefix(f"{name}:")} & set(self._parts[name].obs):
                if _equal_values(self._mdata.obs[key], self._aligned(name, inside)):
                    own[inside] = values
        return own

    def frame(self, n_new: int, *, key: str, columns: Mapping[str, NDArray]) -> Frame:
        """See `Container.frame`."""
        results, places, dropped = super().frame(n_new, key=key, columns=columns)
        result = self._together(results, n_new, key=key, columns=columns, dropped=dropped)
        return result, places, dropped

    def _together(
        self,
        results: dict[str, AnnData],
        n_new: int,
        *,
        key: str,
        columns: Mapping[str, NDArray],
        dropped: list[str],
    ) -> MuData:
        mdata = self._mdata
        stale = annotated.stale_entries(mdata.uns)
        dropped += [f"obsm[{k!r}]" for k in mdata.obsm if k not in mdata.mod]
        dropped += [f"obsp[{k!r}]" for k in mdata.obsp] + [f"uns[{k!r}]" for k in stale]
        return mudata_of(
            results,
            obs=annotated.extended_obs(mdata, n_new, key, columns),
            var=mdata.var.copy(),
            uns=copy.deepcopy({k: v for k, v in mdata.uns.items() if k not in stale}),
            varm={k: v.copy() for k, v in mdata.varm.items()},
            varp={k: v.copy() for k, v in mdata.varp.items()},
        )

    def names_of(self, result: Any) -> pd.Index:
        """See `Container.names_of`."""
        return result.obs_names

    def annotate(self, result: Any, document: Mapping[str, Any]) -> None:
        """See `Container.annotate`."""
        super().annotate(result.mod, document)  # each can be taken out and looked at alone
        result.uns["cfgen_augment"] = dict(document)


def adapt(
    X: Any,
    layer: str | Mapping[str, str | None] | None = None,
    modalities: Sequence[str] | None = None,
) -> Container | None:
    """Annotated cells in whichever form they are; None if `X` is none of them.

    Parameters
    ----------
    X
        AnnData, MuData, or a mapping from names of modalities to AnnData of the same cells.
    layer
        Layer that holds the counts instead of ``X``; of several modalities, one for all or a
        mapping from their names, where those left out use ``X``.
    modalities
        Of AnnData, what is a modality: keys of obsm, and ``"X"`` for ``X`` or its layer. None
        means that there is one matrix.

    Raises
    ------
    KeyError
        If a modality is not there.
    ValueError
        If modalities are not of the same cells.
    TypeError
        If `modalities` or a mapping of layers is given where it means nothing.
    """
    from cfgen_augment.modalities import is_by_name  # imports torch

    several = _is_mudata(X) or (
        is_by_name(X) and bool(X) and all(map(annotated.is_anndata, X.values()))
    )
    if modalities is not None and not annotated.is_anndata(X):
        raise TypeError(
            "modalities: expected AnnData, whose keys of obsm it names; got "
            f"{type(X).__name__}. Leave modalities at None."
        )
    if several:
        return InMuData(X, layer) if _is_mudata(X) else SeveralAnnData(X, layer)
    if not annotated.is_anndata(X):
        return None
    if isinstance(layer, Mapping):
        raise TypeError(
            f"layer: expected the name of a layer of AnnData; got {dict(layer)}. Layers by "
            "modality are for MuData and for several AnnData."
        )
    return OneMatrix(X, layer) if modalities is None else WithObsm(X, layer, modalities)


def check_mudata() -> None:
    """Check that MuData can be used.

    Raises
    ------
    ImportError
        If mudata is not installed; names the extra.
    """
    try:
        import mudata  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "mudata: expected it to be installed, for MuData and h5mu files; it is not. Run: pip "
            "install 'cfgen-augment[multimodal]'"
        ) from error


def mudata_of(parts: Mapping[str, AnnData], **slots: Any) -> MuData:
    """MuData of some modalities, whose cells and annotation are those of `slots`."""
    import mudata

    with mudata.set_options(pull_on_update=False):
        made = mudata.MuData(dict(parts))
        made.obs = slots["obs"]
        made.update()
        var = slots.get("var")
        if var is not None and made.var_names.equals(var.index):
            made.var = var
        for name in ("obsm", "obsp", "varm", "varp", "uns"):
            mine = getattr(made, name)
            for key, value in slots.get(name, {}).items():
                if key not in parts:  # that is who has the cell, or the feature
                    mine[key] = value
    return made


def write_mudata(mdata: MuData, path: Path, options: Mapping[str, Any]) -> None:
    """Write an h5mu file; `options` are of its data sets."""
    import mudata

    with mudata.set_options(pull_on_update=False):
        mudata.write_h5mu(path, mdata, **options)


def _is_mudata(X: object) -> bool:
    module = sys.modules.get("mudata")
    return module is not None and isinstance(X, module.MuData)


def _matched(
    reference: pd.Index, names: pd.Index, modality: str, referee: str
) -> NDArray[np.intp] | None:
    """Where the cells of `reference` are in a modality; None if in the same places."""
    for index, where in ((reference, referee), (names, f"modality {modality!r}")):
        if not index.is_unique:
            raise ValueError(
                f"obs_names: expected unique names of cells; {where} has duplicates. Run "
                "obs_names_make_unique() first."
            )
    if names.equals(reference):
        return None
    absent, others = reference.difference(names), names.difference(reference)
    if len(absent) or len(others):
        raise ValueError(
            f"modality {modality!r}: expected the {len(reference):,} cells of {referee}; "
            f"{len(absent):,} are absent ({annotated.existing(absent[:3])}) and {len(others):,} "
            f"are others ({annotated.existing(others[:3])}). Subset all modalities to the cells "
            "that they share, for example with mudata.pp.intersect_obs."
        )
    order: NDArray[np.intp] = names.get_indexer(reference)
    return order


def _equal_values(first: pd.Series, second: pd.Series) -> bool:
    return bool((first.astype(object).to_numpy() == second.astype(object).to_numpy()).all())


def strip(result: Any) -> Any:
    """Annotation without the matrices."""
    for part in result.mod.values() if _is_mudata(result) else [result]:
        del part.X, part.layers, part.obsm
    return result
