"""How alike two sets of cells are: numbers on matrices, for diagnoses and for the benchmark."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.sparsefuncs import mean_variance_axis

_BLOCK_VALUES = 1 << 24  # values of cells that are searched made dense at a time


def log_normalise(counts: sparse.csr_matrix, depth: float = 1e4) -> sparse.csr_matrix:
    """``log(1 + depth * x / total)`` per cell, as sparse as `counts`."""
    totals = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    scaled = counts.astype(np.float32, copy=True)
    scaled.data *= np.repeat(depth / totals, np.diff(scaled.indptr)).astype(np.float32)
    np.log1p(scaled.data, out=scaled.data)
    return scaled


def zero_fraction(values: sparse.csr_matrix) -> float:
    """Share of entries that are zero, stored or not."""
    return 1.0 - values.count_nonzero() / (values.shape[0] * values.shape[1])


def mean_correlation(a: sparse.csr_matrix, b: sparse.csr_matrix) -> float:
    """Pearson correlation, over genes, of two sets' mean values; NaN where a set's are all one."""
    means = [np.asarray(side.mean(axis=0), dtype=np.float64).ravel() for side in (a, b)]
    if any(np.ptp(mean) == 0 for mean in means):
        return float("nan")
    return float(np.corrcoef(means[0], means[1])[0, 1])


def mean_variance_slope(counts: NDArray | sparse.csr_matrix) -> float:
    """Slope of log variance on log mean over genes seen; `counts` is ``(n_cells, n_genes)``."""
    if sparse.issparse(counts):
        mean, variance = mean_variance_axis(counts.astype(np.float64), axis=0)
    else:
        mean, variance = counts.mean(axis=0), counts.var(axis=0)
    seen = (mean > 0) & (variance > 0)
    if len(np.unique(mean[seen])) < 2:
        return float("nan")
    return float(stats.linregress(np.log(mean[seen]), np.log(variance[seen])).slope)


def wasserstein(a: NDArray, b: NDArray) -> float:
    """2-Wasserstein distance of two samples of one size, ``(m, width)`` each.

    ``W2^2 = min_P sum_ij P_ij ||a_i - b_j||^2`` over couplings of uniform weights, exactly: with
    as many points on either side one of the best couplings pairs them off (Birkhoff).

    Raises
    ------
    ValueError
        If the samples differ in size, on which the distance depends.
    """
    if len(a) != len(b):
        raise ValueError(
            f"wasserstein: expected two samples of one size; got {len(a)} and {len(b)} cells. "
            "Draw as many of the larger one as the smaller one has."
        )
    cost = cdist(a, b, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def separability(a: NDArray, b: NDArray, *, seed: int, folds: int = 5) -> float:
    """How well a classifier tells two samples apart: area under the ROC curve, 0.5 if it cannot.

    Logistic regression on all features and their squares, standardised, so that it sees
    differences of means and of spreads. Its curve is drawn for cells it was not trained on, in
    each fold of a cross-validation, and the areas are averaged.

    Parameters
    ----------
    a, b
        ``(n_cells, width)`` each; at least as many cells as `folds`.
    seed
        Of the folds.
    folds
        Number of folds.
    """
    values = np.concatenate([a, b])
    truth = np.repeat([0, 1], [len(a), len(b)])
    areas = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(values, truth):
        classifier = make_pipeline(
            StandardScaler(),
            FunctionTransformer(_with_squares),
            StandardScaler(),
            LogisticRegression(C=0.1, max_iter=1000),
        ).fit(values[train], truth[train])
        areas.append(roc_auc_score(truth[test], classifier.decision_function(values[test])))
    return float(np.mean(areas))


def _with_squares(places: NDArray) -> NDArray:
    return np.hstack([places, places**2])


def exact_copies(training: sparse.csr_matrix, new: sparse.csr_matrix) -> float:
    """Share of rows of `new` that are a row of `training`, to the last bit."""
    if not new.shape[0]:
        return float("nan")
    known = set(_row_bytes(training))
    return float(np.mean([row in known for row in _row_bytes(new)]))


def _row_bytes(values: sparse.csr_matrix) -> list[bytes]:
    """Every row as bytes; equal rows have equal bytes however they are stored."""
    values = values.astype(np.float32, copy=True)
    values.sum_duplicates()
    values.eliminate_zeros()
    columns, ends = values.indices.astype(np.int64), values.indptr
    return [columns[a:b].tobytes() + values.data[a:b].tobytes() for a, b in pairwise(ends)]


def nearest(cells: NDArray, among: sparse.csr_matrix) -> NDArray:
    """Euclidean distances to the two closest, or the one there is, ``(n_cells, 2)`` or ``(.., 1)``.

    Exact, with a block of `among` made dense at a time.
    """
    closest = np.empty((len(cells), 0))
    step = max(_BLOCK_VALUES // among.shape[1], 1)
    for start in range(0, among.shape[0], step):
        block = among[start : start + step].toarray().astype(np.float32, copy=False)
        search = NearestNeighbors(n_neighbors=min(2, len(block)), algorithm="brute").fit(block)
        closest = np.hstack([closest, search.kneighbors(cells)[0]])
        closest = np.sort(closest, axis=1)[:, :2]
    return closest
