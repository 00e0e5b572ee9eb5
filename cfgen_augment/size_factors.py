r"""Size factors: the total count of a cell, log-normal per data set or per group.

.. math:: \log l \sim \mathcal{N}(\mu_g, \sigma_g^2)

A group of cells is a label, or a category of a technical covariate. The fit is maximum
likelihood for large groups. Small groups are shrunk towards the fit shared by all cells
(empirical Bayes), so a group of a single cell still has a sane mean and spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A group's variance counts as if this many cells with the pooled variance had been added.
_PRIOR_CELLS = 5.0


@dataclass(frozen=True)
class LogNormalSizeFactor:
    """Log-normal distribution of total counts, one component per group.

    Attributes
    ----------
    mean, scale
        Mean and standard deviation of the natural log of the totals, each ``(n_groups,)``.
    lowest, highest
        Range of log totals seen, for scaling the flow's size-factor embedding to [0, 1].
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    lowest: float
    highest: float

    @classmethod
    def fit(
        cls, totals: NDArray[np.float64], groups: NDArray[np.integer], n_groups: int
    ) -> LogNormalSizeFactor:
        """Fit to the totals ``(n_cells,)`` of cells in ``groups`` (codes below `n_groups`)."""
        log_total = np.log(totals)
        size = np.bincount(groups, minlength=n_groups).astype(np.float64)
        present = np.maximum(size, 1.0)
        raw_mean = np.bincount(groups, log_total, minlength=n_groups) / present
        squares = np.bincount(groups, (log_total - raw_mean[groups]) ** 2, minlength=n_groups)

        shared = log_total.mean()
        within = squares.sum() / len(log_total)
        if n_groups == 1:
            mean = raw_mean
        else:
            # Between-group variance by moments: what the group means vary by beyond the
            # variance that their own sampling error explains.
            spread = (size * (raw_mean - shared) ** 2).sum() - (np.sum(size > 0) - 1) * within
            effective = len(log_total) - (size**2).sum() / len(log_total)
            between = max(spread / max(effective, 1e-12), 0.0)
            trust = size * between / np.maximum(size * between + within, 1e-300)
            mean = trust * raw_mean + (1.0 - trust) * shared
        prior = _PRIOR_CELLS if n_groups > 1 else 0.0
        variance = (squares + prior * within) / (present + prior)
        return cls(mean, np.sqrt(variance), float(log_total.min()), float(log_total.max()))

    def sample(
        self, groups: NDArray[np.integer], random: np.random.Generator
    ) -> NDArray[np.float64]:
        """Draw a total for every cell, shape ``(len(groups),)``."""
        noise = random.standard_normal(len(groups))
        draws: NDArray[np.float64] = np.exp(self.mean[groups] + self.scale[groups] * noise)
        return draws

    def scaled(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log totals with the range seen in training mapped to [0, 1]."""
        width = max(self.highest - self.lowest, 1e-12)
        scaled: NDArray[np.float64] = (np.log(totals) - self.lowest) / width
        return scaled
