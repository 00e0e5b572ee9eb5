r"""Size factors: the total count of a cell, log-normal per data set or per group.

.. math:: \log (l + s_g) \sim \mathcal{N}(\mu_g, \sigma_g^2)

A group of cells is a label, or a category of a technical covariate. The fit is maximum
likelihood. Groups with enough cells get a shift `s_g` of their own (the three-parameter
log-normal): real depths are skewed on the log scale, some types to the left, some to the right,
and without it the spread of deep types comes out too wide. Small groups have no shift and are
shrunk towards the fit shared by all cells (empirical Bayes), so a group of a single cell still
has a sane mean and spread. Draws stay within the range of totals seen, and the fit of groups with
enough cells is that of a normal truncated to it: filters cut data off at both ends, and a plain
fit, cut off once more, would give draws that spread less than the cells. The size factors of
several modalities of a cell are drawn together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

_CELLS_FOR_A_SHIFT = 100  # fewer cannot tell skewness from chance

# Shifts tried, as multiples of the smallest total (below zero) and of the mean (above).
_SHIFTS_DOWN = (0.9, 0.8, 0.6, 0.4, 0.2)
_SHIFTS_UP = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

_GAIN = 3.0  # nats; by chance a needless shift gains more in one group of seventy (chi-squared)

_TINY = 1e-12

# Widest scale of the normal before truncation, in standard deviations of the sample. At three the
# density within the range is all but flat, and the likelihood says no more.
_WIDEST = 3.0

# A group's variance and range count as if this many cells from everywhere had been added.
_PRIOR_CELLS = 5.0


@dataclass(frozen=True)
class LogNormalSizeFactor:
    """Log-normal distribution of total counts, one component per group.

    Attributes
    ----------
    mean, scale
        Mean and standard deviation of ``log(total + shift)`` before truncation to the range,
        each ``(n_groups,)``.
    shift
        Shift of every group in counts, zero for small groups, ``(n_groups,)``.
    lowest, highest
        Range of log totals that draws stay within, each ``(n_groups,)``.
    share
        Share of the cells in each group, ``(n_groups,)``.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]
    share: NDArray[np.float64]

    @classmethod
    def fit(
        cls, totals: NDArray[np.float64], groups: NDArray[np.integer], n_groups: int
    ) -> LogNormalSizeFactor:
        """Fit to the totals ``(n_cells,)`` of cells in ``groups`` (codes below `n_groups`)."""
        log_total = np.log(totals)
        size = np.bincount(groups, minlength=n_groups).astype(np.float64)
        raw_mean = np.bincount(groups, log_total, minlength=n_groups) / np.maximum(size, 1.0)
        squares = np.bincount(groups, (log_total - raw_mean[groups]) ** 2, minlength=n_groups)
        shared = log_total.mean()
        within = squares.sum() / len(log_total)
        if n_groups == 1:
            trust, prior = np.ones(1), 0.0
        else:
            present = size > 0
            between, shared = _between(raw_mean[present], within / size[present])
            trust = size * between / np.maximum(size * between + within, 1e-300)
            prior = _PRIOR_CELLS
        # A few cells may tell where their group lies, but not how far it reaches.
        reach = np.minimum(trust, size / (size + prior))
        lowest = np.full(n_groups, np.inf)
        highest = np.full(n_groups, -np.inf)
        np.minimum.at(lowest, groups, log_total)
        np.maximum.at(highest, groups, log_total)
        mean = _blend(trust, raw_mean, shared)
        low = _blend(reach, np.minimum(lowest, log_total.max()), log_total.min())
        high = _blend(reach, np.maximum(highest, log_total.min()), log_total.max())
        scale = np.sqrt((squares + prior * within) / (size + prior))
        shift = np.zeros(n_groups)
        for group in np.flatnonzero(size >= _CELLS_FOR_A_SHIFT):
            own = totals[groups == group]
            shift[group] = _most_likely_shift(own)
            mean[group], scale[group] = _truncated_normal(np.log(own + shift[group]))
            low[group], high[group] = lowest[group], highest[group]  # total + shift > 0 there
        return cls(
            mean=mean,
            scale=scale,
            shift=shift,
            lowest=low,
            highest=high,
            share=size / size.sum(),
        )

    def quantile(self, groups: NDArray[np.integer], u: NDArray[np.float64]) -> NDArray[np.float64]:
        """The totals below which a share `u` of a cell's group lies, each ``(n_cells,)``."""
        mean, scale = self.mean[groups], np.maximum(self.scale[groups], _TINY)
        shift = self.shift[groups]
        least, most = np.exp(self.lowest[groups]), np.exp(self.highest[groups])
        # Inverse distribution function of the truncated normal.
        low = stats.norm.cdf((np.log(least + shift) - mean) / scale)
        high = stats.norm.cdf((np.log(most + shift) - mean) / scale)
        drawn = np.exp(mean + scale * stats.norm.ppf(low + (high - low) * u)) - shift
        totals: NDArray[np.float64] = np.clip(drawn, least, most)
        return totals

    def scores(
        self, totals: NDArray[np.float64], groups: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Standard normal scores of cells within their groups, ``(n_cells,)``."""
        shifted = np.log(totals + self.shift[groups])
        scores: NDArray[np.float64] = (shifted - self.mean[groups]) / np.maximum(
            self.scale[groups], _TINY
        )
        return scores

    def scaled(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log totals with the range seen in training mapped to [0, 1]."""
        low, high = self.lowest.min(), self.highest.max()
        scaled: NDArray[np.float64] = (np.log(totals) - low) / max(high - low, 1e-12)
        return scaled

    def to_json(self) -> dict[str, list[float]]:
        """Plain lists, read back by `from_json`."""
        return {name: values.tolist() for name, values in asdict(self).items()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> LogNormalSizeFactor:
        """Read what `to_json` made."""
        return cls(**{name: np.array(values, dtype=float) for name, values in document.items()})


@dataclass(frozen=True)
class SizeFactors:
    """The joint distribution of a cell's size factors, one per modality that has one.

    Each is log-normal by itself. Deep cells are deep in every modality, so their normal scores
    within a group are correlated (a Gaussian copula), by one matrix for all groups: that of small
    groups could not be told.

    Attributes
    ----------
    margins
        The distribution of each size factor.
    correlation
        Of the normal scores, ``(n_sizes, n_sizes)``.
    """

    margins: tuple[LogNormalSizeFactor, ...]
    correlation: NDArray[np.float64]

    @classmethod
    def fit(
        cls, totals: NDArray[np.float64], groups: NDArray[np.integer], n_groups: int
    ) -> SizeFactors:
        """Fit to totals ``(n_cells, n_sizes)``; see `LogNormalSizeFactor.fit`."""
        margins = tuple(LogNormalSizeFactor.fit(own, groups, n_groups) for own in totals.T)
        n_cells, n_sizes = totals.shape
        products = np.eye(n_sizes)
        if n_sizes > 1:
            pairs = zip(margins, totals.T, strict=True)
            scores = np.column_stack([margin.scores(own, groups) for margin, own in pairs])
            products = scores.T @ scores
        norms = np.sqrt(np.maximum(np.diag(products), _TINY))
        # From few cells no two are perfectly correlated.
        correlation = products / np.outer(norms, norms) * (n_cells / (n_cells + _PRIOR_CELLS))
        np.fill_diagonal(correlation, 1.0)
        return cls(margins, correlation)

    def sample(
        self, groups: NDArray[np.integer], random: np.random.Generator
    ) -> NDArray[np.float64]:
        """Draw the totals of every cell, shape ``(len(groups), n_sizes)``.

        A group code of -1 stands for a cell whose group is not given: it gets one at random, as
        common as in training.
        """
        unknown = groups < 0
        groups = groups.copy()
        share = self.margins[0].share
        groups[unknown] = random.choice(len(share), size=unknown.sum(), p=share)
        u = random.random((len(groups), len(self.margins)))
        if len(self.margins) > 1:
            independent = stats.norm.ppf(np.maximum(u, np.finfo(float).tiny))
            u = stats.norm.cdf(independent @ np.linalg.cholesky(self.correlation).T)
        drawn = [margin.quantile(groups, u[:, k]) for k, margin in enumerate(self.margins)]
        return np.column_stack(drawn)

    def scaled(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log totals ``(n_cells, n_sizes)``, the range seen in training mapped to [0, 1]."""
        scaled = np.empty(totals.shape)
        for k, margin in enumerate(self.margins):
            scaled[:, k] = margin.scaled(totals[:, k])
        return scaled

    def to_json(self) -> dict[str, Any]:
        """Plain lists, read back by `from_json`."""
        margins = [margin.to_json() for margin in self.margins]
        return {"margins": margins, "correlation": self.correlation.tolist()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> SizeFactors:
        """Read what `to_json` made."""
        margins = tuple(LogNormalSizeFactor.from_json(entry) for entry in document["margins"])
        n = len(margins)
        return cls(margins, np.array(document["correlation"], dtype=float).reshape(n, n))


def _between(means: NDArray[np.float64], errors: NDArray[np.float64]) -> tuple[float, float]:
    """Variance between groups, and the mean of groups, by the estimator of Paule and Mandel.

    Every group counts, however few cells it has, for it is groups that the variance is between:
    weighed by their cells, three large types that happen to be alike would say that all types
    are. The variance solves ``sum w (m - m_w)^2 = n_groups - 1`` with ``w = 1 / (variance +
    error)`` and the mean ``m_w`` weighted by ``w``.

    Parameters
    ----------
    means, errors
        Mean of every group and its sampling variance, each ``(n_groups,)``.
    """

    def excess(variance: float) -> float:
        weights = 1.0 / np.maximum(variance + errors, tiny)
        centre = np.average(means, weights=weights)
        return float((weights * (means - centre) ** 2).sum()) - (len(means) - 1)

    tiny = 1e-12
    most = float(np.ptp(means)) ** 2 + tiny  # at which the sum is below n_groups - 1
    between = float(optimize.brentq(excess, 0.0, most)) if excess(0.0) > 0 else 0.0
    weights = 1.0 / np.maximum(between + errors, tiny)
    return between, float(np.average(means, weights=weights))


def _most_likely_shift(totals: NDArray[np.float64]) -> float:
    """Shift of the three-parameter log-normal by profile likelihood over a grid.

    For a shift ``s``, mean and scale have closed forms, and up to a constant the log likelihood
    is ``-n log(sd(log(l + s))) - sum log(l + s)``. The grid ends before ``s = -min(l)``, where it
    has no bound. A shift has to earn its place: zero stays unless another gains `_GAIN` nats.
    """

    def log_likelihood(shift: float) -> float:
        log_shifted = np.log(totals + shift)
        return float(-len(totals) * np.log(log_shifted.std() + 1e-300) - log_shifted.sum())

    if totals.std() <= 1e-9 * totals.mean():
        return 0.0
    shifts = [
        *(-totals.min() * np.array(_SHIFTS_DOWN)),
        *(totals.mean() * np.array(_SHIFTS_UP)),
    ]
    best = max(shifts, key=log_likelihood)
    return float(best) if log_likelihood(best) > log_likelihood(0.0) + _GAIN else 0.0


def _truncated_normal(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and scale, before truncation, of a normal truncated to the range of `values`.

    Maximum likelihood. Mean and variance are sufficient, so the likelihood costs nothing; the mode
    is kept within the range, beyond which mean and scale can no longer be told apart.
    """
    mean, scale = float(values.mean()), float(values.std())
    if scale <= 1e-9 * (1.0 + abs(mean)):
        return mean, scale
    low, high = (values.min() - mean) / scale, (values.max() - mean) / scale

    def cost(at: NDArray[np.float64]) -> float:
        """Negative log likelihood per value, of values in units of their own spread."""
        centre, width = at
        inside = special.ndtr((high - centre) / width) - special.ndtr((low - centre) / width)
        return float(np.log(width * inside) + (1.0 + centre**2) / (2.0 * width**2))

    bounds = [(low, high), (1.0, _WIDEST)]
    centre, width = optimize.minimize(cost, [0.0, 1.0], bounds=bounds).x
    return mean + scale * float(centre), scale * float(width)


def _blend(
    trust: NDArray[np.float64], own: NDArray[np.float64], shared: float
) -> NDArray[np.float64]:
    blended: NDArray[np.float64] = trust * own + (1.0 - trust) * shared
    return blended
