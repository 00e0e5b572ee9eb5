"""How many synthetic cells each type gets.

Types are drawn with probability proportional to ``n_type ** -exponent`` (1/sqrt(n_type) at the
default exponent of one half), so rare types get most of the new cells without every type being
forced to the same size: imbalance between types can be biology.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike, NDArray


def total_after(n_cells: int, target_size: int | float) -> int:
    """Total number of cells asked for by `target_size`.

    Parameters
    ----------
    n_cells
        Number of real cells.
    target_size
        An integer is a total number of cells; a float is a multiple of `n_cells`.

    Returns
    -------
    int
        Total number of cells, real and synthetic, never below `n_cells`.

    Raises
    ------
    ValueError
        If the target is smaller than the data already are.
    """
    if isinstance(target_size, Integral):
        total = int(target_size)
        asked = f"{total:,} cells"
    elif isinstance(target_size, Real) and math.isfinite(target_size):
        total = round(float(target_size) * n_cells)
        asked = f"{float(target_size):g} x {n_cells:,} = {total:,} cells"
    else:
        raise ValueError(
            "target_size: expected an integer (total cells) or a finite float (multiple of the "
            f"number of cells); got {target_size!r}."
        )
    if total < n_cells:
        raise ValueError(
            f"target_size: expected at least the {n_cells:,} cells already there; got {asked}. "
            "Augmentation only adds cells: raise the target, or pass a float such as 2.0 to "
            "double the data."
        )
    return total


def largest_remainder(shares: ArrayLike, total: int) -> NDArray[np.int64]:
    """Whole numbers proportional to `shares` that add up to exactly `total`.

    Every entry gets the floor of its exact share; the cells left over go to the largest
    fractional parts, ties to the larger share and then to the earlier entry.

    Parameters
    ----------
    shares
        Non-negative weights, shape ``(n_types,)``, with a positive sum.
    total
        Sum of the result, non-negative.

    Returns
    -------
    ndarray of shape (n_types,)
        Non-negative integers.
    """
    weights = np.asarray(shares, dtype=np.float64)
    exact = weights / weights.sum() * total
    # A share that is whole up to rounding error must not lose its last cell to the floor.
    whole = np.floor(exact + 1e-9).astype(np.int64)
    left_over = int(total - whole.sum())
    order = np.lexsort((np.arange(weights.size), -weights, -np.round(exact - whole, 9)))
    whole[order[:left_over]] += 1
    return whole


def allocate(
    cells_per_type: ArrayLike, n_new: int, *, exponent: float = 0.5, min_cells: int = 1
) -> NDArray[np.int64]:
    """Split `n_new` synthetic cells over the types, rarer types getting more.

    Where whole numbers leave a tie, the rarer type gets the cell, then the earlier one.

    Parameters
    ----------
    cells_per_type
        Real cells of each type, shape ``(n_types,)``.
    n_new
        Number of cells to generate in total.
    exponent
        Type ``k`` gets a share proportional to ``cells_per_type[k] ** -exponent``: 0.5 is the
        CFGen paper's 1/sqrt(n), 0 gives every type the same number of new cells, 1 follows 1/n.
    min_cells
        Types with fewer real cells get none; the others share theirs.

    Returns
    -------
    ndarray of shape (n_types,)
        Cells to generate per type; sums to exactly `n_new`.

    Raises
    ------
    ValueError
        If no type has `min_cells` cells although cells are to be generated.

    Examples
    --------
    >>> from cfgen_augment.allocation import allocate
    >>> allocate([900, 100], 400).tolist()
    [100, 300]
    """
    sizes = np.asarray(cells_per_type, dtype=np.int64)
    eligible = np.flatnonzero(sizes >= max(min_cells, 1))
    new = np.zeros(sizes.shape, dtype=np.int64)
    if n_new == 0:
        return new
    if not eligible.size:
        raise ValueError(
            f"min_cells: expected at least one type with {min_cells} cells or more; the largest "
            f"has {int(sizes.max(initial=0))}. Lower min_cells."
        )
    rarest_first = eligible[np.argsort(sizes[eligible], kind="stable")]
    # Relative to the largest share, so that steep exponents do not overflow.
    log_shares = -float(exponent) * np.log(sizes[rarest_first])
    new[rarest_first] = largest_remainder(np.exp(log_shares - log_shares.max()), n_new)
    return new
