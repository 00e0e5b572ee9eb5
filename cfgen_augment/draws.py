"""Random draws straight into CSR: on the CPU no random number is spent on a zero."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

_LARGEST_COUNT = torch.iinfo(torch.int32).max
_PART_VALUES = 1 << 17  # entries worth a thread of their own, about a millisecond of work


def draw_counts(
    profile: Tensor,
    scale: Tensor,
    theta: Tensor | None = None,
    group: Tensor | None = None,
    *,
    generator: torch.Generator,
    ceiling: int = _LARGEST_COUNT,
) -> sparse.csr_matrix:
    """Draw negative binomial or Poisson counts with mean ``profile * scale``, exactly.

    On the CPU a sweep visits only what is positive, see `cfgen_augment.sweep`. Every cell has a
    random stream of its own, whose state is drawn from `generator`, so that counts depend neither
    on the number of threads nor on the cells beside them. Elsewhere the whole block is drawn as a
    Gamma-Poisson mixture: parallel hardware has no use for skipping zeros.

    Parameters
    ----------
    profile, scale : Tensor
        Means up to a factor per cell, shape ``(n, n_features)``, and that factor, ``(n, 1)``.
    theta : Tensor, optional
        Inverse dispersion, shape ``(n_groups, n_features)``; Poisson counts if None.
    group : Tensor, optional
        Row of `theta` for every cell, shape ``(n,)``; the first if None.
    generator : torch.Generator
        Source of randomness, on the device of `profile`.
    ceiling : int
        Larger counts are held at this value.
    """
    if profile.device.type != "cpu":
        return _dense(profile * scale, theta, group, generator, ceiling)
    n, n_features = profile.shape
    if theta is None:
        theta = torch.full((1, n_features), torch.inf)
    if group is None:
        group = torch.zeros(n, dtype=torch.int64)
    state = torch.empty((n, 4), dtype=torch.int64).random_(generator=generator)
    return _swept(
        profile.float().contiguous().numpy(),
        scale.double().reshape(-1).numpy(),
        theta.float().contiguous().numpy(),
        group.contiguous().numpy(),
        state.numpy().view(np.uint64),
        ceiling,
    )


def _swept(
    profile: NDArray[np.float32],
    scale: NDArray[np.float64],
    theta: NDArray[np.float32],
    group: NDArray[np.int64],
    state: NDArray[np.uint64],
    ceiling: int,
) -> sparse.csr_matrix:
    from cfgen_augment.sweep import sweep  # imports numba, and may compile

    def part(rows: slice) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        means = profile[rows]
        columns, counts = np.empty(means.size, np.int32), np.empty(means.size, np.int32)
        ends = np.empty(len(means), np.int32)
        n = sweep(
            *(means, scale[rows], theta, group[rows], state[rows]),
            *(float(ceiling), columns, counts, ends),
        )
        return columns[:n].copy(), counts[:n].copy(), ends

    n_parts = max(1, min(torch.get_num_threads(), profile.size // _PART_VALUES, len(profile)))
    cuts = np.linspace(0, len(profile), n_parts + 1).astype(int)
    rows = [slice(start, stop) for start, stop in pairwise(cuts)]
    if n_parts == 1:
        parts = [part(rows[0])]
    else:
        with ThreadPoolExecutor(n_parts) as threads:
            parts = list(threads.map(part, rows))
    columns, counts, ends = ([p[i] for p in parts] for i in range(3))
    first = np.cumsum([0, *(len(c) for c in columns[:-1])], dtype=np.int32)
    indptr = np.concatenate([[0], *(e + f for e, f in zip(ends, first, strict=True))])
    return sparse.csr_matrix(
        (np.concatenate(counts), np.concatenate(columns), indptr.astype(np.int32)),
        shape=profile.shape,
    )


def _dense(
    mean: Tensor,
    theta: Tensor | None,
    group: Tensor | None,
    generator: torch.Generator,
    ceiling: int,
) -> sparse.csr_matrix:
    """Draw every entry of ``(n, n_features)``, then keep the positive ones."""
    rate = mean
    if theta is not None:
        shape = theta.expand_as(mean) if group is None else theta[group]
        # torch.distributions.Gamma takes no generator; the sampler behind it does.
        rate = torch._standard_gamma(shape.contiguous(), generator=generator) * (mean / shape)
    # CUDA's Poisson wraps around beyond 32 bits.
    counts = torch.poisson(rate.clamp(max=float(_LARGEST_COUNT)), generator=generator)
    rows, columns = counts.nonzero(as_tuple=True)
    values = counts[rows, columns].to(torch.int64).clamp(max=ceiling)
    indptr = torch.bincount(rows, minlength=len(mean)).cumsum(0).cpu().numpy()
    return sparse.csr_matrix(
        (
            values.to(torch.int32).cpu().numpy(),
            columns.to(torch.int32).cpu().numpy(),
            np.concatenate([[0], indptr]).astype(np.int32),
        ),
        shape=tuple(mean.shape),
    )
