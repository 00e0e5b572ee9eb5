"""Rivals that train nothing: copies, weights, interpolation, simple count models, real cells.

Every arm is a function of the training side of a split. The number of new cells of each type is
exactly what was asked for, except in `none` and `reweight`, which add none, and in `oracle`,
which cannot add more real cells than there are. New cells come type by type, types sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cells import New, Training, log_normalise, nothing
from cfgen_augment.counts import feature_moments
from cfgen_augment.stages import block_rows

# Makes so many new cells from the cells of one type, block by block.
MakeType = Callable[[sparse.csr_matrix, int, np.random.Generator], Iterable[sparse.csr_matrix]]

_SMOTE_NEIGHBOURS = 5  # imbalanced-learn's default

# Defaults of the authors' package `loras`.
_LORAS_SIGMA = 0.005
_LORAS_NEIGHBOURS = (8, 30)  # below and from _LORAS_LARGE cells of the type, the cell included
_LORAS_LARGE = 100
_LORAS_MOST_COMBINED = 100  # sc-SynO ran on 20 to 100 genes, and the default is one per gene


def wanted(training: Training) -> list[tuple[str, NDArray[np.intp], int]]:
    """Types to add to, sorted: name, rows of its training cells, and number of new cells.

    Raises
    ------
    ValueError
        If cells are wanted of a type that has no training cell, or a number is negative.
    """
    types = []
    for name, n in sorted(training.to_add.items()):
        rows = np.flatnonzero(training.cells.labels == name)
        if n < 0 or (n and not len(rows)):
            raise ValueError(
                f"to_add: expected no negative numbers, and training cells of every type; got "
                f"{n:,} for {name!r}, which has {len(rows):,} cells. Leave it out of to_add."
            )
        if n:
            types.append((name, rows, n))
    return types


def none(training: Training) -> New:
    """Add nothing: the real training cells as they are."""
    return nothing(training.cells.counts.shape[1])


def reweight(training: Training) -> New:
    """Add nothing, but let each type weigh as much as if its new cells had been added.

    A cell of a type with `n` cells that would get `m` new ones weighs ``(n + m) / n``.
    """
    weights = np.ones(len(training.cells))
    for _, rows, n in wanted(training):
        weights[rows] = (len(rows) + n) / len(rows)
    empty = nothing(training.cells.counts.shape[1])
    return New(empty.values, empty.labels, weights=weights)


def random_oversampling(training: Training) -> New:
    """Copy real cells, each type's drawn with replacement; their embeddings come along."""
    from imblearn.over_sampling import RandomOverSampler

    cells, types = training.cells, wanted(training)
    if not types:
        return none(training)
    sampler = RandomOverSampler(
        sampling_strategy={name: len(rows) + n for name, rows, n in types},
        random_state=training.seed,
    )
    # Which rows it takes depends on labels alone; on a column of row numbers nothing is copied.
    sampler.fit_resample(np.arange(len(cells))[:, None], cells.labels)
    copied = cells.take(sampler.sample_indices_[len(cells) :])
    return New(copied.counts.astype(np.float32), copied.labels, obsm=copied.obsm)


def smote_log(training: Training) -> New:
    """SMOTE (Chawla et al. 2002, doi:10.1613/jair.953) on log-normalised values."""
    return _by_type(training, log_normalise(training.cells.counts), _smote, logged=True)


def smote_counts(training: Training) -> New:
    """SMOTE on raw counts, rounded to whole numbers."""

    def rounded(
        counts: sparse.csr_matrix, n: int, random: np.random.Generator
    ) -> Iterator[sparse.csr_matrix]:
        for block in _smote(counts, n, random):
            np.rint(block.data, out=block.data)
            block.eliminate_zeros()
            yield block

    return _by_type(training, training.cells.counts, rounded)


def negative_binomial(training: Training) -> New:
    r"""Draw every gene of a type independently from a negative binomial, fitted by moments.

    With the type's mean `m` and unbiased variance `v` of a gene,
    :math:`\theta = m^2 / (v - m)` and :math:`x \sim \mathrm{Poisson}(\lambda)`,
    :math:`\lambda \sim \mathrm{Gamma}(\theta, m / \theta)`, which has mean `m` and variance `v`.
    Genes with ``v <= m``, and types of one cell, are Poisson. Depth is not modelled: the variance
    that it causes is within `v`, its correlation between genes is lost.
    """
    return _by_type(training, training.cells.counts, _negative_binomial)


def mixup(training: Training) -> New:
    r"""Add up two different random cells of a type and keep each molecule with probability 1/2.

    .. math:: x \sim \mathrm{Binomial}(x_a + x_b, 1/2)

    With the type's mean `m`, variance `v` (``ddof=0``) and `n` cells, a gene of a new cell has
    mean `m` and variance ``m / 2 + v (n - 2) / (2 (n - 1))``; molecules stay whole. The only cell
    of a type is paired with itself.
    """
    return _by_type(training, training.cells.counts, _mixup)


def loras(training: Training) -> New:
    r"""LoRAS on log-normalised values, the algorithm of sc-SynO.

    The `k` nearest cells of a cell of the type, itself among them, are each replaced by many
    shadow samples, copies with Gaussian noise of standard deviation .005. A new cell is a convex
    combination of shadow samples drawn with replacement, its weights random whole numbers
    divided by their sum. The type's cells take turns as centres of the neighbourhood.

    Parameters are the defaults of the authors' package: ``k = 8``, from 100 cells of the type on
    30 (never more than there are), as many shadow samples combined as there are genes, and
    ``2 / k`` times as many made of each cell. Deviations:

    - At most 100 shadow samples are combined. The default of one per gene was made for the 20 to
      100 genes of sc-SynO; on thousands, every new cell would be its neighbourhood's mean.
    - Noise is added only where a cell has a value, and what falls below zero is set to zero, so
      that genes which no neighbour expresses stay at zero and the result stays sparse.
    - Every new cell has shadow samples of its own. The noise of a combination is then drawn at
      once: given the weights `u` of the shadow samples `s`, its variance is
      ``.005^2 sum(u_s^2)`` over those with a value.
    - Weights run from 1 to 99 instead of from 0, and cannot all be zero.
    - Neighbours are Euclidean in all genes, as in the package.

    A combination has a value wherever one of its neighbours has one, so it is far denser than a
    cell (89% of entries instead of 30% on Kang's cells), and its matrix far larger.

    References
    ----------
    .. [1] S. Bej et al., "LoRAS: an oversampling approach for imbalanced datasets", Machine
       Learning 110, 2021, doi:10.1007/s10994-020-05913-4.
    .. [2] S. Bej et al., "Automated annotation of rare-cell types from single-cell RNA-sequencing
       data through synthetic oversampling", BMC Bioinformatics 22, 2021,
       doi:10.1186/s12859-021-04469-x.
    """
    return _by_type(training, log_normalise(training.cells.counts), _loras, logged=True)


def oracle(training: Training) -> New:
    """Add unused real cells of the training donors, drawn without replacement.

    Of a type with fewer unused cells than wanted, all are added and no more.
    """
    random = np.random.default_rng(training.seed)
    pool = training.pool
    picked = [np.empty(0, dtype=np.intp)]
    for name, _, n in wanted(training):
        unused = np.flatnonzero(pool.labels == name)
        picked.append(np.sort(random.choice(unused, min(n, len(unused)), replace=False)))
    cells = pool.take(np.concatenate(picked))
    return New(cells.counts.astype(np.float32), cells.labels, obsm=cells.obsm)


def oracle_available(training: Training) -> bool:
    """Whether there is any unused real cell of a type that cells are wanted of."""
    return any(bool((training.pool.labels == name).any()) for name, _, _ in wanted(training))


# ------------------------------------------------------------------ one type


def _by_type(
    training: Training, values: sparse.csr_matrix, make: MakeType, *, logged: bool = False
) -> New:
    """New cells of every type, made by `make` from the type's rows of `values`."""
    types = wanted(training)
    if not types:
        return none(training)
    random = np.random.default_rng(training.seed)
    blocks = [block for _, rows, n in types for block in make(values[rows], n, random)]
    labels = np.repeat([name for name, _, _ in types], [n for _, _, n in types])
    return New(sparse.vstack(blocks, format="csr", dtype=np.float32), labels, logged=logged)


def _blocks(n: int, n_genes: int) -> Iterator[int]:
    """Sizes of the blocks that make up `n` cells."""
    size = block_rows(n_genes)
    yield from (min(size, n - start) for start in range(0, n, size))


def _smote(
    values: sparse.csr_matrix, n: int, random: np.random.Generator
) -> Iterator[sparse.csr_matrix]:
    from imblearn.over_sampling import SMOTE

    n_cells, n_genes = values.shape
    if n_cells == 1:
        yield values[np.zeros(n, dtype=np.intp)]
        return
    # imbalanced-learn has one k for all types, and too large a one for the smallest is an error.
    # So each type goes by itself, beside a single empty cell because two classes are required.
    sampler = SMOTE(
        sampling_strategy={1: n_cells + n},
        k_neighbors=min(_SMOTE_NEIGHBOURS, n_cells - 1),
        random_state=int(random.integers(2**32)),
    )
    beside = sparse.csr_matrix((1, n_genes), dtype=values.dtype)
    resampled, _ = sampler.fit_resample(
        sparse.vstack([values, beside], format="csr"), np.repeat([1, 0], [n_cells, 1])
    )
    new = resampled[n_cells + 1 :].tocsr()
    np.maximum(new.data, 0.0, out=new.data)  # rounding errors of x + step * (y - x)
    new.eliminate_zeros()
    yield new


def _negative_binomial(
    counts: sparse.csr_matrix, n: int, random: np.random.Generator
) -> Iterator[sparse.csr_matrix]:
    n_cells, n_genes = counts.shape
    mean, variance = feature_moments(counts)
    variance *= n_cells / max(n_cells - 1, 1)
    excess = variance - mean
    dispersed = excess > 1e-9 * mean  # at 1e-9 the two distributions cannot be told apart
    theta = np.divide(mean**2, excess, out=np.ones(n_genes), where=dispersed)
    shape, scale = theta[dispersed], mean[dispersed] / theta[dispersed]
    for size in _blocks(n, n_genes):
        rate = np.tile(mean, (size, 1))
        rate[:, dispersed] = random.gamma(shape, scale, (size, len(shape)))
        yield sparse.csr_matrix(random.poisson(rate).astype(np.float32))


def _mixup(
    counts: sparse.csr_matrix, n: int, random: np.random.Generator
) -> Iterator[sparse.csr_matrix]:
    n_cells, n_genes = counts.shape
    for size in _blocks(n, n_genes):
        first, second = pairs(n_cells, size, random)
        added = counts[first] + counts[second]
        molecules = np.rint(added.data).astype(np.int64)
        added.data = random.binomial(molecules, 0.5).astype(np.float32)
        added.eliminate_zeros()
        yield added


def pairs(
    n_cells: int, n: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two different rows below `n_cells` for each of `n` new cells; twice the same if only one."""
    first = random.integers(n_cells, size=n)
    if n_cells == 1:
        return first, first
    return first, (first + random.integers(1, n_cells, size=n)) % n_cells


def _loras(
    values: sparse.csr_matrix, n: int, random: np.random.Generator
) -> Iterator[sparse.csr_matrix]:
    from sklearn.neighbors import NearestNeighbors

    n_cells, n_genes = values.shape
    k = min(_LORAS_NEIGHBOURS[n_cells >= _LORAS_LARGE], n_cells)
    combined = min(n_genes, _LORAS_MOST_COMBINED)
    shadows = math.ceil(2 * combined / k)
    turns = np.resize(random.permutation(n_cells), n)
    centres, turns = np.unique(turns, return_inverse=True)
    search = NearestNeighbors(n_neighbors=k).fit(values)
    neighbours = search.kneighbors(values[centres], return_distance=False)
    has_value = values.copy()
    has_value.data[:] = 1.0

    start = 0
    for size in _blocks(n, n_genes):
        drawn = random.integers(k * shadows, size=(size, combined))
        weights = random.integers(1, 100, size=(size, combined)).astype(np.float64)
        weights /= weights.sum(axis=1, keepdims=True)
        rows = np.repeat(np.arange(size), combined)
        # A shadow sample that is drawn twice brings the same noise twice: weights add up first.
        by_shadow = sparse.csr_matrix(
            (weights.ravel(), (rows, drawn.ravel())), shape=(size, k * shadows)
        )
        rows = np.repeat(np.arange(size), np.diff(by_shadow.indptr))
        parents = neighbours[turns[start : start + size][rows], by_shadow.indices // shadows]
        shape = (size, n_cells)
        new = sparse.csr_matrix((by_shadow.data, (rows, parents)), shape=shape) @ values
        squares = sparse.csr_matrix((by_shadow.data**2, (rows, parents)), shape=shape) @ has_value
        new.sort_indices()
        squares.sort_indices()  # the same entries in the same order
        new.data += _LORAS_SIGMA * np.sqrt(squares.data) * random.standard_normal(new.nnz)
        np.maximum(new.data, 0.0, out=new.data)
        new.eliminate_zeros()
        yield new.astype(np.float32)
        start += size
