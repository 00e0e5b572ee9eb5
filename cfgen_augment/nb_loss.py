r"""The negative binomial loss of sparse counts, with its gradient in closed form.

With ``e = mu / theta``, the log-gammas of a zero cancel and the loss of all entries is

.. math::

    -\log p = \sum_{\text{all}} \theta \log(1 + e)
        + \sum_{x > 0} \bigl[ x \log(1 + 1/e) - \log\Gamma(x + \theta) + \log\Gamma(\theta)
        + \log\Gamma(x + 1) \bigr] ,

so that the dense block is touched by cheap functions only, and by few of them. Its derivatives
are

.. math::

    \frac{\partial}{\partial \log\mu} = g = \frac{\mu - x}{1 + e}, \qquad
    \frac{\partial}{\partial \log\theta} = \theta \log(1 + e) - g
        - \theta \bigl[ \psi(x + \theta) - \psi(\theta) \bigr] ,

and through ``mu = l softmax(h)`` that by the output is ``g - softmax(h) sum(g)``.
`NegativeBinomial.log_prob` is the same in one readable line, and what the tests hold this to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cfgen_augment.minibatch import Minibatch, gather, scatter

_SHIFT = 5  # steps of the digamma's recurrence, after which its series is exact to 1e-8


def nb_loss(
    x: Minibatch, output: Tensor, log_size: Tensor, log_theta: Tensor, group: Tensor | None
) -> Tensor:
    """Mean over entries of ``-log NB(x | softmax(output) * l, theta)``, in nats.

    Parameters
    ----------
    x
        Counts, ``(n, n_features)``.
    output
        What the decoder says, ``(n, n_features)``.
    log_size
        Log size factors, ``(n, 1)``.
    log_theta
        Log inverse dispersions, ``(n_groups, n_features)``.
    group
        Row of `log_theta` that each cell goes by, ``(n,)``; None if there is one.
    """
    loss: Tensor = _NBLoss.apply(output, log_size, log_theta, group, x.at, x.values, x.shape)
    return loss


def digamma_difference(x: Tensor, theta: Tensor) -> Tensor:
    r"""``digamma(x + theta) - digamma(theta)`` for ``x >= 1`` without cancellation.

    By the recurrence :math:`\psi(\theta) = \psi(\theta + 1) - 1 / \theta` up to large arguments
    ``a``, ``b``, and there by :math:`\psi(a) \sim \log a - 1 / 2a - 1 / 12 a^2 + 1 / 120 a^4 -
    1 / 252 a^6`, each term as a difference of its own. PyTorch's digamma is neither vectorised
    on CPUs nor, where `theta` is large, precise enough in float32 to be subtracted.
    """
    total = torch.zeros_like(x)
    for k in range(_SHIFT):
        low = theta + k
        total.addcdiv_(x, (low + x).mul_(low))
    a = theta + _SHIFT
    b = a + x
    total.add_(torch.log1p(x / a)).addcdiv_(x, a * b, value=0.5)
    u, v = a.pow_(-2), b.pow_(-2)
    return total.add_((u - v).mul_(1 / 12 - (u + v) / 120 + (u * u + u * v + v * v) / 252))


def _per_cell(values: Tensor, group: Tensor | None) -> Tensor:
    """Values per group, ``(n_groups, n_features)``, for each cell, or as they are for one."""
    return values if group is None else values.index_select(0, group)


def _per_group(entries: Tensor, group: Tensor | None, n_groups: int) -> Tensor:
    """Sums of entries ``(n, n_features)`` over the cells of a group."""
    if group is None:
        return entries.sum(dim=0, keepdim=True)
    return entries.new_zeros(n_groups, entries.shape[1]).index_add_(0, group, entries)


class _NBLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        log_size: Tensor,
        log_theta: Tensor,
        group: Tensor | None,
        at: Tensor,
        x: Tensor,
        shape: tuple[int, int],
    ) -> Tensor:
        theta = log_theta.exp()
        p = torch.softmax(output, dim=1)
        # log p = output - log_norm is needed where p itself may have underflowed. Its largest
        # entry never has.
        log_norm = output.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log()
        size = log_size.exp()
        mu = p.mul_(size)

        block = (output + (log_size - log_norm)).sub_(_per_cell(log_theta, group))  # log(mu/theta)
        log_ratio = gather(block, at, shape)
        e = torch.mul(mu, _per_cell(theta.reciprocal(), group), out=block)
        log1p_sum = _per_group(torch.log1p(e), group, len(theta))
        e_1 = e.add_(1.0)

        theta_x = gather(_per_cell(theta, group), at, shape)
        at_counts = F.softplus(-log_ratio).mul_(x)
        at_counts -= torch.lgamma(x + theta_x)
        at_counts += gather(_per_cell(torch.lgamma(theta), group), at, shape)
        at_counts += torch.lgamma(x + 1.0)

        ctx.save_for_backward(mu, e_1, size, theta, theta_x, log1p_sum, group, at, x)
        return ((theta * log1p_sum).sum() + at_counts.sum()) / output.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mu, e_1, size, theta, theta_x, log1p_sum, group, at, x = ctx.saved_tensors
        shape = mu.shape
        scale = grad / mu.numel()
        g = mu / e_1
        # Places are unique, so that the order of additions is no matter.
        g.view(-1).scatter_add_(0, at, -x / gather(e_1, at, shape))
        by_theta = None
        if ctx.needs_input_grad[2]:
            rest = scatter(digamma_difference(x, theta_x).mul_(theta_x), at, shape)
            rest = _per_group(rest.add_(g), group, len(theta))
            by_theta = (theta * log1p_sum - rest).mul_(scale)
        by_size = g.sum(dim=1, keepdim=True)
        by_output = g.addcmul_(mu, by_size / size, value=-1.0).mul_(scale)
        return by_output, by_size * scale, by_theta, None, None, None, None
