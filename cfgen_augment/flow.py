r"""The conditional flow: probability path, velocity field, loss and guidance.

Symbols: ``z_0`` noise, ``z_1`` a standardised latent, ``t`` in [0, 1] from noise to data, ``v``
the velocity. Equation and algorithm numbers are those of the CFGen paper (arXiv 2407.11734).

The first attribute is the label, and its categories have centres ``m`` and scales ``s``: what
the network ``u`` has to know is how cells lie around the centre, in units of the scale,

.. math:: v(z, t \mid y) = m_y + s_y \, u\bigl((z - t m_y) / s_y, t \mid y\bigr) ,

since a path from noise ``s_y z_0`` to ``z_1 = m_y + s_y r`` is one from ``z_0`` to ``r``, scaled
and moved along by ``t m_y``. Seen so, labels resemble each other. A label may therefore be
*pooled*: it gives its centre and scale, and ``u`` is that of cells of all labels.

Where further attributes are given, the centre is that of an additive model, a label's effect and
one of every other attribute's category: labels and donors are correlated in real data, and what is
left around it can be pooled over both.

Fields are trained on noise of different scales, ``s_y`` where the label is given and one where it
is not. Guidance adds them up along one path, so they are first brought to noise of one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

SIGMA_MIN = 1e-4  # width of the path at the data end
_FASTEST = 10.0  # radians that the fastest sinusoid of an embedding turns over its range
_TRUSTED_CELLS = 20.0  # a category's own scale or effect weighs half at this size
NULL = 0  # the code of an attribute that is not given; categories start at one


def interpolate(z_0: Tensor, z_1: Tensor, t: Tensor) -> Tensor:
    r"""Point on the Gaussian path with linear schedule.

    .. math:: z_t = t z_1 + (1 - (1 - \sigma_{min}) t) z_0

    Shapes: `z_0`, `z_1` ``(n, n_latent)``, `t` ``(n, 1)``.
    """
    return t * z_1 + (1.0 - (1.0 - SIGMA_MIN) * t) * z_0


def target_velocity(z_0: Tensor, z_1: Tensor) -> Tensor:
    r"""Time derivative of the path, :math:`u = z_1 - (1 - \sigma_{min}) z_0`."""
    return z_1 - (1.0 - SIGMA_MIN) * z_0


def on_noise_of_scale(
    field: Callable[[Tensor, Tensor], Tensor], ratio: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The field of the same data for noise `ratio` times as wide, exactly.

    With :math:`\rho` the ratio and :math:`c = \rho + (1 - \rho) (1 - \sigma_{min}) t`, a point on
    the path from wider noise is :math:`c` times one at time :math:`t / c` on the path that `field`
    was trained on, and both say the same of the data and the noise they came from:

    .. math:: v_\rho(z, t) = \frac{1}{c} \Bigl[\rho \, v\Bigl(\frac{z}{c}, \frac{t}{c}\Bigr)
        + (1 - \rho) (1 - \sigma_{min}) z\Bigr]

    Parameters
    ----------
    field
        Velocity as a function of `z` ``(n, n_latent)`` and `t` ``(n, 1)`` or ``(1, 1)``.
    ratio
        Scale of the noise over that of the noise `field` was trained on, ``(n, 1)``.
    """
    rest = (1.0 - ratio) * (1.0 - SIGMA_MIN)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        c = ratio + rest * t
        return (ratio * field(z / c, t / c) + rest * z) / c

    return velocity


def drop_attributes(attributes: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Choose what each cell is conditioned on, cell by cell.

    With probability `dropout` nothing; otherwise one of its attributes at random, joined by each
    of the others with probability one half. The network so learns the unconditional field, the
    field of every single attribute, which is what Eq. 10 composes (Algorithm 1), and the field of
    every subset. The last goes beyond the paper: attributes of real cells are correlated, and a
    composition of single ones, which takes them for independent, misses rare combinations.

    Parameters
    ----------
    attributes
        Category codes, shape ``(n, n_attributes)``.
    dropout
        Probability of conditioning on nothing.
    generator
        Source of randomness.

    Returns
    -------
    Tensor of shape (n, n_attributes)
        The codes, those dropped replaced by `NULL`.
    """
    n_cells, n_attributes = attributes.shape
    device = attributes.device
    chosen = torch.randint(n_attributes, (n_cells, 1), generator=generator, device=device)
    joined = torch.rand((n_cells, n_attributes), generator=generator, device=device) < 0.5
    kept = torch.rand((n_cells, 1), generator=generator, device=device) >= dropout
    keep = kept & (joined | (torch.arange(n_attributes, device=device) == chosen))
    return torch.where(keep, attributes, NULL)


class _ResidualBlock(nn.Module):
    """``x + W2 SiLU(W1 SiLU(x) + W_c c)``, the last layer starting at zero."""

    def __init__(self, width: int, n_embedding: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.condition = nn.Linear(n_embedding, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.inner(F.silu(x)) + self.condition(condition)
        out: Tensor = x + self.outer(F.silu(h))
        return out


class _ScalarEmbedding(nn.Module):
    """A number in [0, 1] to a vector: sinusoids of 1 to 10 radians, then a two-layer MLP.

    The reference takes ``1000 s``, as models with a thousand discrete times do. The field is then
    rough in time: it fits held-out cells less well, and few steps cannot follow it.
    """

    def __init__(self, n_embedding: int) -> None:
        super().__init__()
        self.n_frequencies = n_embedding // 2
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.n_frequencies, n_embedding),
            nn.SiLU(),
            nn.Linear(n_embedding, n_embedding),
        )

    def forward(self, s: Tensor) -> Tensor:
        # Computed here, not stored: a buffer would have to survive construction on `meta`.
        exponent = torch.arange(self.n_frequencies, device=s.device) / self.n_frequencies
        angle = s * _FASTEST**exponent
        out: Tensor = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return out


@dataclass(frozen=True)
class Condition:
    """What the field knows of cells besides where and when they are.

    Attributes
    ----------
    embedding
        Of attributes and size factor, ``(n, n_embedding)``.
    centre, scale
        ``(n, n_latent)`` and ``(n, 1)``; zero and one where the label is not given.
    """

    embedding: Tensor
    centre: Tensor
    scale: Tensor


class VelocityField(nn.Module):
    """Residual network for ``v(z, t | attributes, size factor)``, around the labels' centres.

    Parameters
    ----------
    n_latent
        Width of the latents.
    n_categories
        Number of categories of each attribute, the label first; the null category, and for the
        label the pooled one, are added here.
    width, n_blocks, n_embedding
        Width and number of residual blocks, and width of the embeddings.
    n_size_factors
        Number of size factors of a cell that the field also depends on.
    """

    def __init__(
        self,
        n_latent: int,
        n_categories: Sequence[int],
        *,
        width: int,
        n_blocks: int,
        n_embedding: int,
        n_size_factors: int,
    ) -> None:
        super().__init__()
        self.inlet = nn.Linear(n_latent, width)
        self.time = _ScalarEmbedding(n_embedding)
        n_labels, *others = n_categories
        self.attributes = nn.ModuleList(
            nn.Embedding(n, n_embedding) for n in (n_labels + 2, *(n + 1 for n in others))
        )
        rows = [n + 1 for n in n_categories]
        self._starts = [sum(rows[:k]) for k in range(len(rows))]  # of each attribute in `effects`
        self.register_buffer("effects", torch.zeros(sum(rows), n_latent))
        self.register_buffer("expected", torch.zeros(len(others), n_labels + 1, n_latent))
        self.register_buffer("scales", torch.ones(n_labels + 1, 1))
        self.register_buffer("size_centres", torch.zeros(n_labels + 1, n_size_factors))
        self.effects: Tensor
        self.expected: Tensor
        self.scales: Tensor
        self.size_centres: Tensor
        self.size_factors = nn.ModuleList(
            _ScalarEmbedding(n_embedding) for _ in range(n_size_factors)
        )
        self.blocks = nn.ModuleList(_ResidualBlock(width, n_embedding) for _ in range(n_blocks))
        self.outlet = nn.Sequential(nn.SiLU(), nn.Linear(width, n_latent))

    def start_at_zero(self) -> None:
        """Make every residual block start as the identity."""
        for block in self.blocks:
            nn.init.zeros_(block.outer.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(block.outer.bias)  # type: ignore[union-attr, arg-type]

    def start_without_centres(self, device: torch.device) -> None:
        """Centres at zero and scales at one, so that the network alone tells labels apart."""
        self.effects = torch.zeros(self.effects.shape, device=device)
        self.expected = torch.zeros(self.expected.shape, device=device)
        self.scales = torch.ones(self.scales.shape, device=device)
        self.size_centres = torch.zeros(self.size_centres.shape, device=device)

    def centre_on(self, latents: Tensor, attributes: Tensor, log_size: Tensor | None) -> None:
        """Fix centres by least squares, and scales to each label's root mean square around them.

        A label's effect is free, those of other attributes are shrunk (ridge), so that a label's
        centre without them is its mean. The scale is one number per label, over all dimensions,
        so that even a few cells tell it.

        Parameters
        ----------
        latents, attributes, log_size
            Standardised latents ``(n, n_latent)``, category codes ``(n, n_attributes)``, all
            given, and scaled log size factors ``(n, n_size_factors)`` or None.
        """
        self.start_without_centres(latents.device)
        labels, *others = attributes.unbind(1)
        n_labels = len(self.scales)
        cells = torch.bincount(labels, minlength=n_labels)[:, None].double()

        def mean(values: Tensor) -> Tensor:  # in double: a GPU adds in an order of its own
            sums = cells.new_zeros(n_labels, values.shape[1])
            return sums.index_add_(0, labels, values.double()) / cells.clamp_min(1.0)

        # A solution comes by columns; by rows, as copies are, so that equal models hash equal.
        self.effects = self._effects(latents, attributes).float().contiguous()
        for k, codes in enumerate(others):
            self.expected[k] = mean(self.effects[self._starts[k + 1] + codes])
        if log_size is not None:
            self.size_centres = mean(log_size).float()
        label_alone = torch.zeros_like(attributes)
        label_alone[:, 0] = labels
        squares = (latents - self.centre(label_alone)).square()
        own = mean(squares.mean(dim=1, keepdim=True)) * cells / (cells - 1.0).clamp_min(1.0)
        trust = cells / (cells + _TRUSTED_CELLS)
        scales = (trust * own + (1.0 - trust) * squares.mean()).sqrt().float()
        self.scales = torch.where(cells > 0, scales, self.scales).clamp_min(1e-3)

    def _effects(self, latents: Tensor, attributes: Tensor) -> Tensor:
        """Effects of all categories, in double: the normal equations of the additive model."""
        size = len(self.effects)
        codes = attributes + torch.tensor(self._starts, device=attributes.device)
        together = latents.new_zeros(size * size, dtype=torch.float64)
        wanted = latents.new_zeros((size, latents.shape[1]), dtype=torch.float64)
        for column in codes.unbind(1):
            wanted.index_add_(0, column, latents.double())
            for other in codes.unbind(1):
                together += torch.bincount(column * size + other, minlength=size * size)
        together = together.view(size, size)
        absent = (together.diagonal() == 0).double()  # the null category is
        ridge = torch.full_like(absent, _TRUSTED_CELLS)
        ridge[: len(self.scales)] = absent[: len(self.scales)]
        return torch.linalg.solve(together + torch.diag(ridge), wanted)

    def centre(self, attributes: Tensor) -> Tensor:
        """Centres ``(n, n_latent)`` for category codes ``(n, n_attributes)``.

        What is not given counts as it is on average in the label; without a label, zero.
        """
        labels, *others = attributes.unbind(1)
        centre = self.effects[labels]
        for start, expected, codes in zip(self._starts[1:], self.expected, others, strict=True):
            given = (codes != NULL)[:, None]
            centre = centre + torch.where(given, self.effects[start + codes], expected[labels])
        return torch.where((labels != NULL)[:, None], centre, 0.0)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        attributes: Tensor,
        log_size: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Velocity ``(n, n_latent)`` at `z`.

        `t` is ``(n, 1)`` or ``(1, 1)``; the others as in `embed`.
        """
        return self.at(z, t, self.embed(attributes, log_size, pooled))

    def embed(
        self, attributes: Tensor, log_size: Tensor | None, pooled: Tensor | None = None
    ) -> Condition:
        """What the field is conditioned on besides time.

        Parameters
        ----------
        attributes
            Category codes, ``(n, n_attributes)``.
        log_size
            Log size factors scaled to [0, 1], ``(n, n_size_factors)``, if the field depends on
            them.
        pooled
            Which cells know no more of their label than its centre, ``(n,)``; None means none.
        """
        labels, *others = attributes.unbind(1)
        seen = labels
        if pooled is not None:
            seen = torch.where(pooled & (labels != NULL), len(self.scales), labels)
        parts = [
            embedding(codes)
            for embedding, codes in zip(self.attributes, (seen, *others), strict=True)
        ]
        if log_size is not None:
            # Deep for its label: what is deep for one is shallow for another.
            deep = (log_size - self.size_centres[labels]).split(1, dim=1)
            parts += [embed(own) for embed, own in zip(self.size_factors, deep, strict=True)]
        embedding = torch.stack(parts).sum(dim=0)
        return Condition(embedding, self.centre(attributes), self.scales[labels])

    def at(self, z: Tensor, t: Tensor, given: Condition) -> Tensor:
        """Velocity ``(n, n_latent)`` given what `embed` made of the conditions."""
        condition = F.silu(self.time(t) + given.embedding)  # here, not in every block
        h = self.inlet((z - t * given.centre) / given.scale)
        for block in self.blocks:
            h = block(h, condition)
        out: Tensor = torch.addcmul(given.centre, self.outlet(h), given.scale)
        return out


def flow_matching_loss(
    field: VelocityField,
    z_1: Tensor,
    attributes: Tensor,
    log_size: Tensor | None,
    generator: torch.Generator,
    share: slice | None = None,
    pooled: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the field against the conditional velocity (Flow Matching).

    In units of the scale of what each cell is conditioned on, which is also that of its noise.
    Noise and antithetic times are drawn from `generator`, for all cells. With a `share` the mean is
    over the cells in it, and zero if there are none.
    """
    z_0 = torch.empty_like(z_1).normal_(generator=generator)
    half = torch.rand(((len(z_1) + 1) // 2, 1), generator=generator, device=z_1.device)
    t = torch.cat([half, 1.0 - half])[: len(z_1)]
    if share is not None:
        z_0, z_1, t, attributes = (whole[share] for whole in (z_0, z_1, t, attributes))
        log_size = None if log_size is None else log_size[share]
        pooled = None if pooled is None else pooled[share]
    given = field.embed(attributes, log_size, pooled)
    z_0 = z_0 * given.scale
    error = field.at(interpolate(z_0, z_1, t), t, given) - target_velocity(z_0, z_1)
    return (error / given.scale).square().mean() if len(error) else error.sum()


def noise_scale(
    field: VelocityField, attributes: Tensor, terms: Sequence[tuple[float, NDArray[np.bool_]]]
) -> Tensor:
    """Standard deviation ``(n, 1)`` of the noise that the guided field carries to data.

    That of the cells' labels where any term sees them.
    """
    sees_label = any(weight and mask[0] for weight, mask in terms)
    labels = attributes[:, 0] if sees_label else torch.full_like(attributes[:, 0], NULL)
    return field.scales[labels]


def guided(
    field: VelocityField,
    attributes: Tensor,
    terms: Sequence[tuple[float, NDArray[np.bool_]]],
    log_size: Tensor | None,
    pooled: Tensor | None = None,
) -> Callable[[float, Tensor], Tensor]:
    r"""The guided field as a function of time and latent (Algorithm 2).

    .. math:: v = \sum_k c_k \, v(z, t \mid y_{S_k}, l)

    With subsets `S_k` of none and of single attributes this is Eq. 10,
    :math:`v = v_0 + \sum_i w_i (v_i - v_0)`; with none and all of them it is classifier-free
    guidance on all at once. All fields are those for noise of the scale `noise_scale`.

    Parameters
    ----------
    field
        Trained velocity field.
    attributes
        Category codes, shape ``(n, n_attributes)``.
    terms
        Coefficients and the attributes that each term sees, see `Attributes.terms`; every term
        costs one network call.
    log_size
        Scaled log size factors, or None.
    pooled
        Which cells' labels are pooled, ``(n,)``, or None.
    """
    device = attributes.device
    scale = noise_scale(field, attributes, terms)

    def term(mask: NDArray[np.bool_]) -> Callable[[Tensor, Tensor], Tensor]:
        # Conditions stay the same at all times, so they are embedded once.
        seen = torch.where(torch.as_tensor(mask, device=device), attributes, NULL)
        given = field.embed(seen, log_size, pooled)

        def own(z: Tensor, t: Tensor) -> Tensor:
            return field.at(z, t, given)

        same = torch.equal(given.scale, scale)
        return own if same else on_noise_of_scale(own, scale / given.scale)

    seen = [(weight, term(mask)) for weight, mask in terms]

    def velocity(t: float, z: Tensor) -> Tensor:
        time = torch.full((1, 1), float(t), dtype=z.dtype, device=z.device)
        (weight, own), *others = seen
        v: Tensor = weight * own(z, time)
        for weight, own in others:
            v = v + weight * own(z, time)
        return v

    return velocity
