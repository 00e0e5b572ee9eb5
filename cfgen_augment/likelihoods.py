r"""Noise models: how counts are distributed around what the decoder says.

One object per noise model. ``natural`` turns the decoder's output and the size factor into the
quantity the model is written in (log mean for counts, logit for presence, mean for continuous
features), and ``log_prob`` takes that quantity. ``sample`` starts from the decoder's output itself,
so that nothing dense is computed but what the draw reads; counts are drawn straight into CSR.

Symbols: ``x`` counts, ``mu`` mean, ``theta`` inverse dispersion, ``l`` size factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from cfgen_augment.counts import ValueKind
from cfgen_augment.draws import draw_counts
from cfgen_augment.minibatch import Minibatch
from cfgen_augment.nb_loss import nb_loss

_LOG_THETA_RANGE = (-10.0, 10.0)  # beyond, float32 cannot tell the model from its limits

_MOST_PRESENT = 0.99  # of all features, a cell has at most
_SHIFT_STEPS = 6
_NEVER = -1e4  # logit of what cannot be; infinity would make cells of nothing else undefined

_POOLING_CELLS = 50.0  # a label's own dispersion weighs as much as the pooled one at this size


class Likelihood(nn.Module):
    """A noise model for one block of features.

    Subclasses are `NegativeBinomial`, `Poisson`, `Bernoulli` and `Gaussian`.

    Attributes
    ----------
    values : {"count", "binary", "real"}
        What the data must look like.
    uses_size_factor : bool
        Whether the cell's total count scales its mean, or its odds.
    """

    values: ValueKind = "count"
    uses_size_factor: bool = False

    def initialise(self, mean: np.ndarray, variance: np.ndarray, totals: np.ndarray) -> Tensor:
        """Start from the data's moments; return a starting bias for the decoder's output.

        Parameters
        ----------
        mean, variance
            Per feature over the training cells, shape ``(n_features,)``.
        totals
            Total count of each training cell, shape ``(n_cells,)``.
        """
        raise TypeError(f"{type(self).__name__} is not a noise model by itself")

    def speeds(self, mean: np.ndarray) -> Tensor:
        """How fast features of a `mean` ``(n_features,)`` are learned, relative, up to 1.

        As the square root of their counts, which is how much a minibatch tells of them beside
        its noise; from one count per cell on there is less and less to be gained by waiting.
        """
        return torch.as_tensor(np.sqrt(mean / (1.0 + mean)), dtype=torch.float32)

    def encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder sees: ``log(1 + x)`` for counts; of which zero must give zero."""
        return torch.log1p(x)

    def natural(self, output: Tensor, log_size: Tensor | None) -> Tensor:
        """Natural scale of decoder output ``(n, n_features)`` and log size factor ``(n, 1)``."""
        return output

    def log_prob(self, x: Tensor, natural: Tensor, group: Tensor | None = None) -> Tensor:
        """Log probability of every entry, shape ``(n, n_features)``."""
        raise TypeError(f"{type(self).__name__} is not a noise model by itself")

    def loss(
        self, x: Minibatch, output: Tensor, log_size: Tensor | None, group: Tensor | None = None
    ) -> Tensor:
        """Mean of ``-log_prob`` of a minibatch, from the decoder's output.

        Noise models whose zeros need less work than their non-zeros say the same faster.
        """
        return -self.log_prob(x.dense(), self.natural(output, log_size), group).mean()

    def pool(self, cells: np.ndarray) -> None:
        """Make what is known of labels with few `cells`, ``(n_labels,)``, more like all others'."""
        return None

    def sample(
        self,
        output: Tensor,
        log_size: Tensor | None,
        group: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> sparse.csr_matrix | np.ndarray:
        """Draw one cell per row: CSR of int32 for counts, an ndarray for continuous features.

        Parameters
        ----------
        output, log_size
            What `natural` takes: decoder output ``(n, n_features)``, log size factor ``(n, 1)``.
        group
            Group of every cell, ``(n,)``, where the dispersion is per group.
        generator
            Source of randomness, on the device of `output`.
        """
        raise TypeError(f"{type(self).__name__} is not a noise model by itself")

    def _given(self, log_size: Tensor | None) -> Tensor:
        if log_size is None:
            raise ValueError(f"{type(self).__name__} needs the cells' size factors")
        return log_size


class _Composition(Likelihood):
    """Counts whose mean is ``softmax(output) * l``."""

    uses_size_factor = True

    def initialise(self, mean: np.ndarray, variance: np.ndarray, totals: np.ndarray) -> Tensor:
        """Start from the data's moments, see `Likelihood.initialise`."""
        # Half a count in the whole data set for genes never seen, so that their log is finite.
        profile = mean + 0.5 / len(totals)
        return torch.as_tensor(np.log(profile / profile.sum()), dtype=torch.float32)

    def natural(self, output: Tensor, log_size: Tensor | None) -> Tensor:
        """Log mean, ``log_softmax(output) + log l``."""
        return F.log_softmax(output, dim=-1) + self._given(log_size)

    @torch.no_grad()
    def sample(
        self,
        output: Tensor,
        log_size: Tensor | None,
        group: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> sparse.csr_matrix:
        """Draw one cell per row, see `Likelihood.sample`."""
        size = self._given(log_size).exp()
        theta, row = self._dispersion(group)
        # Profile and size stay apart: their product is needed only where an event falls.
        profile = torch.softmax(output, dim=-1)
        return draw_counts(profile, size, theta, row, generator=generator)

    def _dispersion(self, group: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Inverse dispersions ``(n_groups, n_features)``, and the row of them for every cell."""
        return None, None


class NegativeBinomial(_Composition):
    r"""Negative binomial with mean ``mu`` and inverse dispersion ``theta``.

    The story: a rate is drawn from a Gamma with mean ``mu`` and shape ``theta``, then a Poisson
    count at that rate, so that

    .. math:: \mathrm{Var}[x] = \mu + \mu^2 / \theta .

    Parameters
    ----------
    n_features
        Number of genes.
    n_groups
        One dispersion per gene (1), or one per group and gene.
    """

    def __init__(self, n_features: int, n_groups: int = 1) -> None:
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(n_groups, n_features))

    def initialise(self, mean: np.ndarray, variance: np.ndarray, totals: np.ndarray) -> Tensor:
        """Start from the data's moments, see `Likelihood.initialise`."""
        # Method of moments for the whole population; the fit then lowers the dispersion by what
        # the decoder explains. Depth varies too, which inflates the variance by mean^2 cv^2.
        depth_cv2 = totals.var() / totals.mean() ** 2
        excess = variance - mean - mean**2 * depth_cv2
        theta = mean**2 / np.maximum(excess, 1e-4 * mean**2 + 1e-12)
        start = torch.as_tensor(np.log(np.clip(theta, 0.05, 50.0)), dtype=torch.float32)
        with torch.no_grad():
            self.log_theta.copy_(start.expand_as(self.log_theta))
        return super().initialise(mean, variance, totals)

    @torch.no_grad()
    def pool(self, cells: np.ndarray) -> None:
        """Pool the dispersions of labels with few cells, see `Likelihood.pool`."""
        if self.log_theta.shape[0] == 1:
            return
        # What few cells say of a gene's dispersion is noise: a label's own counts as much as it
        # has cells.
        of_label = torch.as_tensor(cells, dtype=self.log_theta.dtype, device=self.log_theta.device)
        shared = (of_label / of_label.sum()) @ self.log_theta
        trust = (of_label / (of_label + _POOLING_CELLS))[:, None]
        self.log_theta.copy_(trust * self.log_theta + (1.0 - trust) * shared)

    def _log_theta(self, group: Tensor | None) -> Tensor:
        log_theta = self.log_theta.clamp(*_LOG_THETA_RANGE)
        row = self._row(group)
        return log_theta if row is None else log_theta[row]

    def _dispersion(self, group: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return self.log_theta.clamp(*_LOG_THETA_RANGE).exp(), self._row(group)

    def _row(self, group: Tensor | None) -> Tensor | None:
        """Row of the dispersion for every cell; None where there is but one."""
        if self.log_theta.shape[0] == 1:
            return None
        if group is None:
            raise ValueError(
                "dispersion='gene-label': expected a label for every cell; got none. Pass labels, "
                "or fit with dispersion='gene'."
            )
        return group

    def log_prob(self, x: Tensor, natural: Tensor, group: Tensor | None = None) -> Tensor:
        """``log NB(x | mu, theta)`` with ``natural = log mu``."""
        log_theta = self._log_theta(group)
        theta = log_theta.exp()
        log_ratio = natural - log_theta
        # log(1 + mu / theta) and log(1 + theta / mu): differences of logs would lose the whole of
        # theta * log(1 + mu / theta) to rounding where theta is large.
        return (
            -theta * F.softplus(log_ratio)
            - x * F.softplus(-log_ratio)
            + (torch.lgamma(x + theta) - torch.lgamma(theta))  # first: both may be huge
            - torch.lgamma(x + 1.0)
        )

    def loss(
        self, x: Minibatch, output: Tensor, log_size: Tensor | None, group: Tensor | None = None
    ) -> Tensor:
        """Mean of ``-log_prob``, see `Likelihood.loss`; in closed form for the zeros."""
        log_theta = self.log_theta.clamp(*_LOG_THETA_RANGE)
        return nb_loss(x, output, self._given(log_size), log_theta, self._row(group))


class Poisson(_Composition):
    r"""Poisson counts with mean ``mu = softmax(output) * l``."""

    def log_prob(self, x: Tensor, natural: Tensor, group: Tensor | None = None) -> Tensor:
        """``x log mu - mu - log x!`` with ``natural = log mu``."""
        return x * natural - natural.exp() - torch.lgamma(x + 1.0)

    def loss(
        self, x: Minibatch, output: Tensor, log_size: Tensor | None, group: Tensor | None = None
    ) -> Tensor:
        """Mean of ``-log_prob``, see `Likelihood.loss`; the means of a cell add up to its size."""
        log_size = self._given(log_size)
        log_mean = x.gather(self.natural(output, log_size))
        at_counts = x.values * log_mean - torch.lgamma(x.values + 1.0)
        return (log_size.exp().sum() - at_counts.sum()) / output.numel()


class Bernoulli(Likelihood):
    r"""Presence or absence, for binarised ATAC peaks; the size factor is how many are present.

    .. math:: \mathrm{logit}\, P(x_j = 1) = h(z)_j + c, \qquad \sum_j P(x_j = 1) = l

    Deep cells have more peaks open, whatever their state: here the size factor says so, as it does
    for counts, and the latent need not. The paper has no size factor in it.

    Peaks can be dealt out to encoder and likelihood like molecules, see `Minibatch.split`: where
    the encoder has not seen a peak open, the odds of its being open in the other part are the
    whole cell's times a constant, which goes into :math:`c`.
    """

    values = "binary"
    uses_size_factor = True

    def initialise(self, mean: np.ndarray, variance: np.ndarray, totals: np.ndarray) -> Tensor:
        """Start from the data's moments, see `Likelihood.initialise`."""
        present = (mean * len(totals) + 0.5) / (len(totals) + 1.0)
        return torch.as_tensor(np.log(present / (1.0 - present)), dtype=torch.float32)

    def natural(self, output: Tensor, log_size: Tensor | None) -> Tensor:
        """Logit of presence, ``output + c``."""
        return output + self._shift(output, self._given(log_size))

    @staticmethod
    @torch.no_grad()
    def _shift(output: Tensor, log_size: Tensor) -> Tensor:
        """What is to be added for as many to be present as the size says, ``(n, 1)``.

        Without a gradient, and none is missing: the likelihood does not change with the shift
        where the expected total is the observed one.
        """
        n_features = output.shape[1]
        share = (log_size.exp() / n_features).clamp_max(_MOST_PRESENT)
        shift = (share * n_features).log() - output.logsumexp(dim=1, keepdim=True)
        for _ in range(_SHIFT_STEPS):
            # Newton's for the logit of the share, nearly linear at either end; one step does
            # where few are present.
            present = torch.sigmoid(output + shift)
            found = present.mean(dim=1, keepdim=True)
            slope = found - present.square_().mean(dim=1, keepdim=True)
            away = (share.logit() - found.logit(1e-9)) * found * (1.0 - found)
            shift += (away / slope.clamp_min(1e-9)).clamp_(-3.0, 3.0)
        return shift

    def log_prob(self, x: Tensor, natural: Tensor, group: Tensor | None = None) -> Tensor:
        """``x log p + (1 - x) log(1 - p)`` with ``natural = logit p``."""
        return -F.binary_cross_entropy_with_logits(natural, x, reduction="none")

    def loss(
        self, x: Minibatch, output: Tensor, log_size: Tensor | None, group: Tensor | None = None
    ) -> Tensor:
        """Mean of ``-log_prob``, see `Likelihood.loss`.

        Stored zeros are peaks that a split has dealt to the encoder: their absence here tells
        nothing, so they have no term and no part in the total.
        """
        assert x.at is not None
        known = x.at[x.values == 0]
        if len(known):
            output = output.flatten().index_fill(0, known, _NEVER).view(x.shape)
        natural = self.natural(output, log_size)
        return (
            F.softplus(natural).sum() - (x.gather(natural)[x.values > 0]).sum()
        ) / output.numel()

    @torch.no_grad()
    def sample(
        self,
        output: Tensor,
        log_size: Tensor | None,
        group: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> sparse.csr_matrix:
        """Draw one cell per row, see `Likelihood.sample`."""
        # Present is what has any event at a rate of -log(1 - p), which is softplus(logit).
        rate = F.softplus(self.natural(output, log_size))
        one = torch.ones((len(output), 1), device=output.device)
        return draw_counts(rate, one, generator=generator, ceiling=1)


class Gaussian(Likelihood):
    """Normal noise with a standard deviation per feature, for features that are not counts."""

    values = "real"

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(n_features))
        self.register_buffer("feature_mean", torch.zeros(n_features))
        self.register_buffer("feature_scale", torch.ones(n_features))
        self.feature_mean: Tensor
        self.feature_scale: Tensor

    def initialise(self, mean: np.ndarray, variance: np.ndarray, totals: np.ndarray) -> Tensor:
        """Start from the data's moments, see `Likelihood.initialise`."""
        scale = np.sqrt(variance)
        # A constant feature carries nothing: any scale leaves its standardised value at zero. The
        # floor follows the mean, below whose rounding error float32 sees no spread.
        scale = np.maximum(scale, 1e-6 * np.maximum(np.abs(mean), 1.0))
        with torch.no_grad():
            self.feature_mean.copy_(torch.as_tensor(mean))
            self.feature_scale.copy_(torch.as_tensor(scale))
            self.log_scale.zero_()
        return torch.zeros(len(mean))

    def speeds(self, mean: np.ndarray) -> Tensor:
        """All the same: features are standardised."""
        return torch.ones(len(mean))

    def encoder_input(self, x: Tensor) -> Tensor:
        """Standardised features."""
        return (x - self.feature_mean) / self.feature_scale

    def natural(self, output: Tensor, log_size: Tensor | None) -> Tensor:
        """Mean of every feature, in the units of the data."""
        return self.feature_mean + self.feature_scale * output

    def _scale(self) -> Tensor:
        return self.feature_scale * self.log_scale.clamp(-10.0, 10.0).exp()

    def log_prob(self, x: Tensor, natural: Tensor, group: Tensor | None = None) -> Tensor:
        """Log density of ``N(natural, scale^2)``."""
        scale = self._scale()
        return (
            -0.5 * torch.square((x - natural) / scale) - scale.log() - 0.5 * math.log(2.0 * math.pi)
        )

    @torch.no_grad()
    def sample(
        self,
        output: Tensor,
        log_size: Tensor | None,
        group: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> np.ndarray:
        """Draw one cell per row, see `Likelihood.sample`."""
        noise = torch.empty_like(output).normal_(generator=generator)
        return (self.natural(output, log_size) + self._scale() * noise).cpu().numpy()


_KINDS: dict[str, type[Likelihood]] = {
    "nb": NegativeBinomial,
    "poisson": Poisson,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}

LIKELIHOODS = tuple(_KINDS)


def value_kind(name: str) -> ValueKind:
    """What the data of the noise model called `name` must look like."""
    return _KINDS[name].values


def uses_size_factor(name: str) -> bool:
    """Whether the noise model called `name` scales a composition by the cell's total count."""
    return _KINDS[name].uses_size_factor


def make_likelihood(name: str, n_features: int, n_groups: int = 1) -> Likelihood:
    """The noise model called `name`; `n_groups` > 1 asks for a dispersion per group and gene.

    Raises
    ------
    ValueError
        If the name is unknown, or groups are asked of a model without a dispersion.
    """
    if name not in _KINDS:
        raise ValueError(f"likelihood: expected one of {LIKELIHOODS}; got {name!r}.")
    if name == "nb":
        return NegativeBinomial(n_features, n_groups)
    if n_groups > 1:
        raise ValueError(
            f"dispersion='gene-label': expected likelihood='nb'; got likelihood={name!r}, which "
            "has no inverse dispersion. Use dispersion='gene'."
        )
    return Gaussian(n_features) if name == "gaussian" else _KINDS[name]()


def make_likelihoods(kinds: Sequence[tuple[str, int]], n_groups: int = 1) -> list[Likelihood]:
    """The noise models of several blocks of features, each a name and a number of features.

    `n_groups` > 1 is for those that have a dispersion.

    Raises
    ------
    ValueError
        As `make_likelihood`, if none of them has a dispersion.
    """
    dispersed = any(name == "nb" for name, _ in kinds)
    return [
        make_likelihood(name, n_features, n_groups if name == "nb" or not dispersed else 1)
        for name, n_features in kinds
    ]
