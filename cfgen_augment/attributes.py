"""Attributes of cells (label, donor, batch): categories to codes and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _listed(values: ArrayLike, most: int = 10) -> str:
    names = [repr(v) for v in np.asarray(values).tolist()]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_attribute(values: ArrayLike, name: str, n_cells: int | None = None) -> NDArray:
    """One value per cell as a one-dimensional array without gaps.

    Raises
    ------
    ValueError
        If the length is wrong or a value is missing.
    TypeError
        If the values are neither strings, numbers nor booleans of one kind.
    """
    array = np.asarray(values)
    if array.dtype.kind == "U" and not isinstance(values, np.ndarray):
        # NumPy writes a NaN or a number in a list of strings as a word.
        kept = np.asarray(values, dtype=object)
        if not all(isinstance(v, str) for v in kept.flat):
            array = kept
    if array.dtype.kind == "O":
        # Plain strings and numbers, not NumPy's scalars, so that the checks below know them.
        plain = [v.item() if isinstance(v, np.generic) else v for v in array.flat]
        array = np.fromiter(plain, dtype=object, count=array.size).reshape(array.shape)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one value per cell; got shape {array.shape}.")
    if n_cells is not None and len(array) != n_cells:
        raise ValueError(
            f"{name}: expected one value for each of {n_cells:,} cells; got {len(array):,}. "
            "Check that X and its annotation were subset together."
        )
    if array.dtype.kind == "O":
        # NaN, NaT and pandas.NA are not equal to themselves, or refuse to say.
        missing = np.array([v is None or (v == v) is not True for v in array.tolist()], dtype=bool)
    elif array.dtype.kind == "f":
        missing = np.isnan(array)
    else:
        missing = np.zeros(len(array), dtype=bool)
    if missing.any():
        raise ValueError(
            f"{name}: expected a value for every cell; {int(missing.sum()):,} of {len(array):,} "
            "are missing. Drop those cells, or give them a category of their own."
        )
    if array.dtype.kind == "O":
        kinds = {type(v) for v in array.tolist()}
        if len(kinds) > 1 or not kinds <= {str, int, float, bool}:
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(
                f"{name}: expected strings, numbers or booleans of one kind; got {found}. "
                "Convert, for example with .astype(str)."
            )
    elif array.dtype.kind not in "biufU":
        raise TypeError(f"{name}: expected strings, numbers or booleans; got {array.dtype}.")
    return array


@dataclass(frozen=True)
class Attributes:
    """The attributes a model was fitted with and their categories.

    Attributes
    ----------
    categories
        Sorted categories of every attribute by name, ``"label"`` first.
    """

    categories: dict[str, NDArray]

    @classmethod
    def fit(cls, values: Mapping[str, NDArray]) -> Attributes:
        """Collect the categories of `values`, one array ``(n_cells,)`` per attribute."""
        return cls({name: np.unique(array) for name, array in values.items()})

    @property
    def names(self) -> list[str]:
        """Names of the attributes, in the order of the columns of their codes."""
        return list(self.categories)

    @property
    def sizes(self) -> list[int]:
        """Number of categories of each attribute."""
        return [len(categories) for categories in self.categories.values()]

    def encode(self, wanted: Mapping[str, NDArray], n_cells: int) -> NDArray[np.int64]:
        """Codes ``(n_cells, n_attributes)`` of the attributes in `wanted`, -1 for the others.

        Raises
        ------
        ValueError
            If a value was not seen in training; lists both.
        """
        codes = np.full((n_cells, len(self.categories)), -1, dtype=np.int64)
        for column, (name, categories) in enumerate(self.categories.items()):
            if name not in wanted:
                continue
            values = wanted[name]
            known = {value: code for code, value in enumerate(categories.tolist())}
            if unseen := [v for v in np.unique(values).tolist() if v not in known]:
                raise ValueError(
                    f"{name}: expected values seen in training ({_listed(categories)}); got "
                    f"{_listed(unseen)}. Fit on cells that have them, or leave those cells out."
                )
            codes[:, column] = [known[value] for value in values.tolist()]
        return codes

    def terms(
        self, guidance: float | Mapping[str, float], given: Collection[str]
    ) -> list[tuple[float, NDArray[np.bool_]]]:
        """Fields that make up the guided one: coefficients, and the attributes each sees.

        A number `w` weighs the attributes in `given` together, ``(1 - w) v_0 + w v_given``; at
        one it is plain conditional sampling. A mapping weighs each attribute alone and composes
        them (Eq. 10), ``v_0 + sum_i w_i (v_i - v_0)``; attributes it does not name have weight 1.
        Terms with coefficient zero are left out, so that they cost no network call.

        Returns
        -------
        list of (float, ndarray of shape (n_attributes,))
            Coefficients, which add up to one, and masks.

        Raises
        ------
        ValueError
            If `guidance` names an unknown attribute or holds anything but finite numbers.
        """
        if isinstance(guidance, Mapping):
            if unknown := [name for name in guidance if name not in self.categories]:
                raise ValueError(
                    f"guidance: expected attributes of the model ({self.names}); got {unknown}."
                )
            by_mask = [
                (guidance.get(name, 1.0), np.array([name == other for other in self.names]))
                for name in self.names
                if name in given
            ]
        else:
            by_mask = [(guidance, np.array([name in given for name in self.names]))]
        values = guidance.values() if isinstance(guidance, Mapping) else [guidance]
        if not all(isinstance(w, Real) and np.isfinite(w) for w in values):
            raise ValueError(f"guidance: expected finite numbers; got {guidance!r}.")
        nothing = np.zeros(len(self.names), dtype=bool)
        if not given:
            return [(1.0, nothing)]
        rest = 1.0 - sum(float(weight) for weight, _ in by_mask)
        terms = [(rest, nothing), *((float(weight), mask) for weight, mask in by_mask)]
        return [(weight, mask) for weight, mask in terms if abs(weight) > 1e-9]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Plain values, read back by `from_json`."""
        return {
            name: {"dtype": values.dtype.str, "values": values.tolist()}
            for name, values in self.categories.items()
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Mapping[str, Any]]) -> Attributes:
        """Read what `to_json` made."""
        return cls(
            {
                name: np.array(entry["values"], dtype=np.dtype(entry["dtype"]))
                for name, entry in document.items()
            }
        )


def check_feature_names(names: ArrayLike, expected: NDArray) -> None:
    """Check that features are exactly those a model was fitted on, in its order.

    Raises
    ------
    ValueError
        If names are duplicated, absent, unknown or permuted.
    """
    got = np.asarray(names).astype(str)
    unique, count = np.unique(got, return_counts=True)
    if (count > 1).any():
        raise ValueError(
            f"features: expected unique names; got duplicates of {_listed(unique[count > 1])}. "
            "Make them unique, for example with adata.var_names_make_unique()."
        )
    present = set(unique.tolist())
    if absent := [name for name in expected.tolist() if name not in present]:
        raise ValueError(
            f"features: expected the {len(expected):,} features the model was fitted on; "
            f"{len(absent):,} are absent ({_listed(absent, 5)}). Use data that contain them."
        )
    if len(got) != len(expected):
        known = set(expected.tolist())
        unknown = [name for name in got.tolist() if name not in known]
        raise ValueError(
            f"features: expected the {len(expected):,} features the model was fitted on; got "
            f"{len(unknown):,} more ({_listed(unknown, 5)}). Subset to model.feature_names_."
        )
    if (got != expected).any():
        raise ValueError(
            "features: expected the order the model was fitted on; got the same features in "
            "another order. Reorder with adata[:, model.feature_names_]."
        )
