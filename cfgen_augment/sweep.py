r"""Counts drawn in one sweep along a cell's genes, at the cost of its events; compiled by numba.

Lay the genes of a cell side by side, gene ``g`` as wide as its mean ``mu_g``. Along this line runs
a Poisson process of rate one; a gene's events are then Poisson with mean ``mu_g``, independent of
those of its neighbours. The time to the next event is all that has to be remembered: a gene that it
passes over is zero, and has cost a subtraction and a comparison, no random number.

For the negative binomial every event brings a cluster of ``K`` counts and is kept with probability
``1 / K``, ``K`` geometric with success probability ``theta / (theta + mu)``. Clusters of size ``k``
are then kept at rate

.. math:: \mu \, \frac{\theta}{\theta + \mu} \, p^{k - 1} \, \frac{1}{k} = \theta \,
    \frac{p^k}{k}, \qquad p = \frac{\mu}{\theta + \mu},

which is the negative binomial as a Poisson number of logarithmic-series clusters (Quenouille,
1949). No logarithm of ``1 + mu / theta`` is taken where nothing happens, so there is nothing to
round at large ``theta``. Genes with many events are drawn as a Gamma-Poisson mixture instead; the
process forgets, and skips them.

Import this module when counts are first drawn, not before: numba takes a third of a second, and
compiles for some seconds where it finds no compiled copy on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import njit
from numpy.typing import NDArray

_MIXTURE_MEAN = 4.0  # above it a mixture is cheaper than events one by one
_POISSON_GAPS = 10.0  # mean below which Poisson draws count gaps; Hoermann's PTRS needs 10
_BUFFER = 64  # events between two looks at what they bring
_MOST_RATE = 1e12  # far above any count that is kept, and exact in PTRS's arithmetic


def _compiled(function: Callable) -> Callable:
    """Compile without the interpreter's lock, with a copy on disk where there is a place for it."""
    compiled = partial(njit, nogil=True, error_model="numpy")  # a division by zero is infinite
    try:
        return compiled(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's own can be written
        return compiled()(function)


@_compiled
def _uniform(state: NDArray[np.uint64]) -> float:
    """Uniform number in (0, 1); advances `state`, four words of xoshiro256++."""
    s0, s1, s2, s3 = state[0], state[1], state[2], state[3]
    mixed = s0 + s3
    bits = ((mixed << np.uint64(23)) | (mixed >> np.uint64(41))) + s0
    shifted = s1 << np.uint64(17)
    s2 ^= s0
    s3 ^= s1
    s1 ^= s2
    s0 ^= s3
    s2 ^= shifted
    state[0], state[1], state[2] = s0, s1, s2
    state[3] = (s3 << np.uint64(45)) | (s3 >> np.uint64(19))
    return (float(bits >> np.uint64(12)) + 0.5) * 2.0**-52


@_compiled
def _exponential(state: NDArray[np.uint64]) -> float:
    """Exponential number with mean one."""
    return -math.log(_uniform(state))


@_compiled
def _unit_gamma(state: NDArray[np.uint64], shape: float) -> float:
    """Gamma number with mean one (Marsaglia and Tsang, 2000); one where `shape` is infinite."""
    if math.isinf(shape):
        return 1.0
    boost = 1.0 if shape >= 1.0 else _uniform(state) ** (1.0 / shape)
    d = (shape if shape >= 1.0 else shape + 1.0) - 1.0 / 3.0
    while True:
        a, b = 2.0 * _uniform(state) - 1.0, 2.0 * _uniform(state) - 1.0
        radius = a * a + b * b
        if radius >= 1.0 or radius == 0.0:
            continue
        normal = a * math.sqrt(-2.0 * math.log(radius) / radius)
        v = (1.0 + normal / math.sqrt(9.0 * d)) ** 3
        if v > 0.0:
            log_bound = 0.5 * normal * normal + d * (1.0 - v + math.log(v))
            if math.log(_uniform(state)) < log_bound:
                return d * v * boost / shape


@_compiled
def _poisson(state: NDArray[np.uint64], mean: float) -> float:
    """Poisson number: gaps are counted if it is small, else Hoermann's PTRS (1993)."""
    if mean < _POISSON_GAPS:
        count = 0.0
        left = mean - _exponential(state)
        while left > 0.0:
            count += 1.0
            left -= _exponential(state)
        return count
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    squeeze = 0.9277 - 3.6224 / (b - 2.0)
    log_scale = math.log(1.1239 + 1.1328 / (b - 3.4))
    while True:
        u, v = _uniform(state) - 0.5, _uniform(state)
        room = 0.5 - abs(u)
        count = np.floor((2.0 * a / room + b) * u + mean + 0.43)
        if room >= 0.07 and v <= squeeze:
            return count
        if count < 0.0 or (room < 0.013 and v > room):
            continue
        log_bound = count * math.log(mean) - mean - math.lgamma(count + 1.0)
        if math.log(v) + log_scale - math.log(a / (room * room) + b) <= log_bound:
            return count


@_compiled
def _cluster(state: NDArray[np.uint64], shape: float, mean: float) -> float:
    """Counts that an event brings, zero if it is not kept; `shape` may be infinite."""
    # One uniform decides twice: what is left of it beyond P(K = 1) = shape / (shape + mean) is
    # again uniform, on (0, mean), and since K >= 2 there, its upper half is never kept.
    beyond = _uniform(state) * (shape + mean) - shape
    if not beyond >= 0.0:  # NaN where the shape is infinite
        return 1.0
    if beyond >= 0.5 * mean:
        return 0.0
    size = 2.0 + np.floor(_exponential(state) / math.log(1.0 + shape / mean))
    return size if beyond * size < mean else 0.0


@_compiled
def _fill(state: NDArray[np.uint64], gaps: NDArray[np.float64], scale: float) -> None:
    for j in range(gaps.size):
        gaps[j] = scale * _exponential(state)


@_compiled
def _settle(
    state: NDArray[np.uint64],
    events: NDArray[np.int32],
    n_events: int,
    profile: NDArray[np.float32],
    scale: float,
    theta: NDArray[np.float32],
    ceiling: float,
    columns: NDArray[np.int32],
    counts: NDArray[np.int32],
    start: int,
    stop: int,
) -> int:
    """Write what the events bring behind `stop` of a cell that starts at `start`."""
    for j in range(n_events):
        gene = events[j]
        large = gene < 0
        if large:
            gene = ~gene
        shape, mean = float(theta[gene]), float(profile[gene]) * scale
        if large:
            drawn = _poisson(state, min(mean * _unit_gamma(state, shape), _MOST_RATE))
        else:
            drawn = _cluster(state, shape, mean)
        if drawn == 0.0:
            continue
        if stop > start and columns[stop - 1] == gene:
            drawn += counts[stop - 1]
        else:
            columns[stop] = gene
            stop += 1
        counts[stop - 1] = np.int32(min(drawn, ceiling))
    return stop


@_compiled
def sweep(
    profiles: NDArray[np.float32],
    scales: NDArray[np.float64],
    theta: NDArray[np.float32],
    groups: NDArray[np.int64],
    states: NDArray[np.uint64],
    ceiling: float,
    columns: NDArray[np.int32],
    counts: NDArray[np.int32],
    ends: NDArray[np.int32],
) -> int:
    """Draw counts with mean ``scales[i] * profiles[i, g]`` into CSR; return how many are positive.

    Parameters
    ----------
    profiles, scales
        Means up to a factor per cell, ``(n, n_genes)``, and the factor, ``(n,)``.
    theta, groups
        Inverse dispersion, ``(n_groups, n_genes)``, infinite for Poisson counts, and the row of it
        that a cell takes, ``(n,)``.
    states
        State of the cells' own random streams, ``(n, 4)``, not all zero; advanced.
    ceiling
        Larger counts are held at this value.
    columns, counts, ends
        Written: gene and count of every positive entry, with room for all entries, and where each
        row ends, ``(n,)``.
    """
    gaps = np.empty(_BUFFER + 1)  # to the first event, then to the one after each event noted
    events = np.empty(_BUFFER, np.int32)  # the gene of each event; ~gene for a mixture
    stop = 0
    for i in range(profiles.shape[0]):
        state, profile, scale, shapes = states[i], profiles[i], scales[i], theta[groups[i]]
        start, n_events, unit = stop, 0, 1.0 / scale
        limit = np.float32(_MIXTURE_MEAN * unit)
        # Events are noted first and settled in bulk: the processor then need not wait for a
        # logarithm before it knows which gene comes next.
        _fill(state, gaps, unit)
        left = gaps[0]
        for gene in range(profile.size):
            large = profile[gene] > limit
            if not large:
                left -= profile[gene]
                if not left < 0.0:  # nor where it is NaN
                    continue
            while True:
                if n_events == _BUFFER:
                    stop = _settle(
                        *(state, events, n_events, profile, scale, shapes, ceiling),
                        *(columns, counts, start, stop),
                    )
                    _fill(state, gaps, unit)
                    n_events = 0
                events[n_events] = ~gene if large else gene
                n_events += 1
                if large:
                    break
                left += gaps[n_events]
                if left >= 0.0:
                    break
        stop = _settle(
            *(state, events, n_events, profile, scale, shapes, ceiling),
            *(columns, counts, start, stop),
        )
        ends[i] = stop
    return stop
