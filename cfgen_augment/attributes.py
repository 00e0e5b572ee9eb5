"""Attributes of cells (label, donor, batch): categories to codes and back."""

from __future__ import annotations

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


def encode(values: NDArray, categories: NDArray, name: str) -> NDArray[np.int64]:
    """Codes of `values` in the sorted `categories`.

    Raises
    ------
    ValueError
        If a value is not among the categories; lists both.
    """
    known = dict(zip(categories.tolist(), range(len(categories)), strict=True))
    unseen = [v for v in np.unique(values).tolist() if v not in known]
    if unseen:
        raise ValueError(
            f"{name}: expected values seen in training ({_listed(categories)}); "
            f"got {_listed(unseen)}. Fit on cells that have them, or leave those cells out."
        )
    return np.array([known[v] for v in values.tolist()], dtype=np.int64)


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
    if absent := [name for name in expected.tolist() if name not in set(unique)]:
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
            "another order. Reorder with adata[:, model.feature_names_] or df[model.feature_names_]."
        )
