"""Random draws straight into CSR: what is zero is decided once and never visited again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import sparse
from torch import Tensor


def uniform_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), one per entry of `like`."""
    return torch.empty_like(like).uniform_(generator=generator)


def standard_gamma(shape: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma draws of rate one, one per entry of `shape`."""
    # torch.distributions.Gamma takes no generator; the sampler behind it does.
    return torch._standard_gamma(shape, generator=generator)


def draw_counts(
    log_zero: Tensor,
    walk: Tensor,
    recurrence: Callable[[Tensor], tuple[Tensor, Tensor]],
    mixture: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> sparse.csr_matrix:
    """Draw counts of the Panjer (a, b, 0) family without visiting the zeros twice.

    Both families obey ``P(k + 1) = P(k) (a + b k) / (k + 1)``: Poisson with ``a = mu, b = 0``,
    the negative binomial with ``b = mu / (mu + theta), a = theta b``. One uniform per entry
    against ``1 - P(0)`` says where a count is positive; there, the zero-truncated distribution
    function is walked until it passes a second uniform. Entries outside `walk` (large means,
    very heavy tails) are drawn as a mixture instead. Both ways are exact.

    Parameters
    ----------
    log_zero : Tensor
        ``log P(0)`` of every entry, shape ``(n, n_features)``.
    walk : Tensor
        Boolean, the entries to draw by walking.
    recurrence, mixture : callable
        Flat positions to ``(a, b)`` in float64, and to finished draws.
    """
    positive_mass = -torch.expm1(log_zero)
    touched = (uniform_like(log_zero, generator) < positive_mass) | ~walk
    at = touched.reshape(-1).nonzero().reshape(-1)
    by_walk = walk.reshape(-1)[at]
    counts = torch.zeros(at.shape, dtype=torch.int64, device=at.device)

    walked = at[by_walk]
    a, b = recurrence(walked)
    p = a * log_zero.reshape(-1)[walked].double().exp()
    left = torch.empty_like(p).uniform_(generator=generator)
    left = left * -torch.expm1(log_zero.reshape(-1)[walked].double()) - p
    drawn = torch.ones_like(walked)
    active = (left > 0).nonzero().reshape(-1)
    k = 1
    # p > 1e-18 ends the walk where rounding of the running sum hides the last sliver of mass.
    while active.numel():
        p_k = p[active] * (a[active] + b[active] * k) / (k + 1)
        k += 1
        p[active] = p_k
        drawn[active] = k
        left[active] -= p_k
        active = active[(left[active] > 0) & (p_k > 1e-18)]
    counts[by_walk] = drawn
    counts[~by_walk] = mixture(at[~by_walk]).to(torch.int64)

    positive = counts > 0
    return to_csr(at[positive], counts[positive], log_zero.shape)


def to_csr(at: Tensor, values: Tensor, shape: torch.Size) -> sparse.csr_matrix:
    """CSR from flat positions in row-major order and their values."""
    n_rows, n_columns = shape
    rows = torch.bincount(torch.div(at, n_columns, rounding_mode="floor"), minlength=n_rows)
    indptr = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
    return sparse.csr_matrix(
        (
            values.clamp(max=torch.iinfo(torch.int32).max).to(torch.int32).cpu().numpy(),
            (at % n_columns).to(torch.int32).cpu().numpy(),
            indptr.to(torch.int32).cpu().numpy(),
        ),
        shape=(n_rows, n_columns),
    )
