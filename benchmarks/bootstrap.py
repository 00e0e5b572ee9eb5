"""Percentile bootstrap intervals of statistics of independent repeats, vectorised."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def interval(
    statistic: Callable[[Array], Array],
    values: Array,
    n_resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of `statistic` over resampled repeats.

    Parameters
    ----------
    statistic
        Maps resamples, ``(n_resamples, n_repeats, ...)``, to ``(n_resamples,)``.
    values
        One entry per repeat, ``(n_repeats, ...)``; what lies behind the first axis is resampled
        together.
    n_resamples
        Number of resamples.
    seed
        Values with as many repeats are resampled alike under the same seed.
    level
        Nominal coverage.

    Returns
    -------
    tuple of float
        Both ends; NaN with fewer than two repeats.
    """
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(seed).integers(n, size=(n_resamples, n))
    return percentiles(statistic(values[rows]), level)


def percentiles(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Ends between which the middle `level` of `values` lies; NaNs among them are left out."""
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def mean_of(resamples: Array) -> Array:
    """Mean of every resample."""
    return resamples.mean(axis=1)


def ratio_of_means(resamples: Array) -> Array:
    """Mean of the first column over that of the second, NaN where that is zero."""
    first, second = resamples.mean(axis=1).T
    return np.divide(first, second, out=np.full_like(first, np.nan), where=second != 0)
