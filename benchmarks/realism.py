"""How much generated cells look like real ones, type by type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, stats
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score

from benchmarks.cells import log_normalise
from benchmarks.classify import knn_predict
from cfgen_augment.measures import (
    mean_correlation,
    mean_variance_slope,
    wasserstein,
    zero_fraction,
)

#: Widths of the Gaussian kernels whose sum is the kernel of `mmd_rbf`.
SIGMAS = (0.01, 0.1, 1.0, 10.0, 100.0)

_MEASURES = (
    *("m", "w2", "mmd_rbf", "mmd_linear", "knn_f1", "zeros", "zeros_real", "slope", "slope_real"),
    *("total", "total_real", "totals_ks", "mean_corr"),
)


def common_sizes(
    test_labels: NDArray,
    available_labels: NDArray,
    wanted: Mapping[str, int] | None = None,
    *,
    cap: int = 300,
    least: int = 10,
) -> dict[str, int]:
    """Cells per type on either side of every comparison, the same for all arms of a split.

    W2, MMD, slopes and Kolmogorov-Smirnov distances depend on the number of cells, so arms and
    the row of real cells are comparable only if they are measured on the same number.

    Parameters
    ----------
    test_labels
        Types of the real test cells.
    available_labels
        Types of the real cells of the training donors, that the row of real cells is made of.
    wanted
        New cells of every type that each arm makes, if that may be fewer; types left out count
        as unlimited.
    cap
        Most cells of a type.
    least
        Types with fewer are left out.

    Returns
    -------
    dict
        Cells by type: the smallest of the above.
    """
    sizes = {}
    for name in map(str, np.unique(test_labels)):
        both = (int((labels == name).sum()) for labels in (test_labels, available_labels))
        size = min(*both, cap, (wanted or {}).get(name, cap))
        if size >= least:
            sizes[name] = size
    return sizes


def realism(
    real_test: sparse.csr_matrix,
    real_labels: NDArray,
    new_values: sparse.csr_matrix,
    new_labels: NDArray,
    *,
    logged: bool,
    sample_sizes: Mapping[str, int],
    seed: int,
    n_pcs: int = 30,
    n_neighbours: int = 10,
) -> pd.DataFrame:
    r"""Distances between new cells and real cells of held-out donors.

    For a row of real cells to read them beside, call it with real cells of the training donors
    as new ones. Both sides are log-normalised and projected on the leading principal components
    of the centred real test cells. These hold some of the test cells' own noise, which widens
    all distances, but no other cells know of it: rows are fair to each other.

    Parameters
    ----------
    real_test
        Raw counts of real test cells, CSR, ``(n_real, n_genes)``.
    real_labels
        Their types.
    new_values
        New cells: raw counts, or log-normalised values where `logged`; CSR, ``(n_new, n_genes)``.
    new_labels
        Their types.
    logged
        Whether `new_values` are log-normalised. What only counts have is then NaN.
    sample_sizes
        Cells ``m`` to compare of every type, from `common_sizes`.
    seed
        Of the samples of ``m`` cells; real test cells are the same for all calls with it.
    n_pcs
        Number of principal components.
    n_neighbours
        Neighbours of the classifier.

    Returns
    -------
    DataFrame
        Indexed by ``type``, all types of the test cells.

        - ``m``: cells on either side. A type that is not in `sample_sizes`, or of which there
          are fewer new cells, has NaN here and in all that is measured on samples.
        - ``w2``: 2-Wasserstein distance, exact, `wasserstein`.
        - ``mmd_rbf``, ``mmd_linear``: squared maximum mean discrepancies.
        - ``knn_f1``: F1 of the sampled new cells when a nearest-neighbour classifier trained on
          all real test cells predicts their type.
        - ``slope``, ``slope_real``: `mean_variance_slope` of the sampled cells' counts.
        - ``totals_ks``: Kolmogorov-Smirnov distance of the sampled cells' total counts.
        - ``mean_corr``: Pearson correlation, over genes, of sampled cells' mean log values.
        - ``zeros``, ``zeros_real``: fraction of zeros among all cells of the type.
        - ``total``, ``total_real``: mean total count of all cells of the type.
    """
    real_logs = log_normalise(real_test)
    new_logs = new_values if logged else log_normalise(new_values)
    names = [str(name) for name in np.unique(real_labels)]
    real_all = {name: np.flatnonzero(real_labels == name) for name in names}
    new_all = {name: np.flatnonzero(new_labels == name) for name in names}
    chosen = {}
    for i, name in enumerate(names):
        m = sample_sizes.get(name)
        if m is not None and min(len(real_all[name]), len(new_all[name])) >= m:
            chosen[name] = tuple(
                np.random.default_rng([seed, side, i]).choice(cells[name], m, replace=False)
                for side, cells in enumerate((real_all, new_all))
            )
    rows = {
        name: _of_all_cells(real_test[real_all[name]], new_values[new_all[name]], logged)
        for name in names
    }
    if chosen:
        width = min(n_pcs, *(size - 1 for size in real_logs.shape))
        space = PCA(width, svd_solver="arpack", random_state=seed).fit(real_logs)
        real_places = space.transform(real_logs).astype(np.float64)
        new_places = {
            name: space.transform(new_logs[new]).astype(np.float64)
            for name, (_, new) in chosen.items()
        }
        f1 = _knn_f1(real_places, real_labels, new_places, n_neighbours)
    for name, (real, new) in chosen.items():
        rows[name] |= _of_places(real_places[real], new_places[name])
        rows[name] |= {"m": len(real), "knn_f1": f1[name]}
        rows[name]["mean_corr"] = mean_correlation(real_logs[real], new_logs[new])
        rows[name]["slope_real"] = mean_variance_slope(real_test[real])
        if not logged:
            rows[name]["slope"] = mean_variance_slope(new_values[new])
            rows[name]["totals_ks"] = stats.ks_2samp(
                _totals(real_test[real]), _totals(new_values[new])
            ).statistic
    table = pd.DataFrame.from_dict(rows, orient="index", columns=_MEASURES, dtype=np.float64)
    return table.rename_axis(index="type")


def mmd_rbf(a: NDArray, b: NDArray, sigmas: Sequence[float] = SIGMAS) -> float:
    r"""Squared maximum mean discrepancy of a sum of Gaussian kernels, unbiased.

    With ``k(x, y) = sum_sigma exp(-||x - y||^2 / (2 sigma^2))``: the mean of ``k`` over pairs of
    different cells of `a`, plus that of `b`, minus twice the mean over pairs across (Gretton et
    al., JMLR 13, 723 (2012), eq. 3). It is zero on average for samples of one distribution,
    whatever their size, hence also below zero.
    """

    def mean(x: NDArray, y: NDArray, same: bool) -> float:
        squares = cdist(x, y, "sqeuclidean")
        kernel = sum(np.exp(-squares / (2 * sigma**2)) for sigma in sigmas)
        if not same:
            return float(np.mean(kernel))
        return float((np.sum(kernel) - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def mmd_linear(a: NDArray, b: NDArray) -> float:
    """Squared maximum mean discrepancy of the kernel ``x . y``: ``||mean(a) - mean(b)||^2``.

    Biased upwards by ``(tr cov(a) + tr cov(b)) / m``, alike in all arms of one sample size.
    """
    return float(np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2))


def _of_all_cells(
    real: sparse.csr_matrix, new: sparse.csr_matrix, logged: bool
) -> dict[str, float]:
    """What does not depend on the number of cells."""
    found = {"zeros_real": zero_fraction(real), "total_real": float(_totals(real).mean())}
    if new.shape[0]:
        found["zeros"] = zero_fraction(new)
        if not logged:
            found["total"] = float(_totals(new).mean())
    return found


def _of_places(real: NDArray, new: NDArray) -> dict[str, float]:
    return {
        "w2": wasserstein(real, new),
        "mmd_rbf": mmd_rbf(real, new),
        "mmd_linear": mmd_linear(real, new),
    }


def _knn_f1(
    real: NDArray, real_labels: NDArray, new: Mapping[str, NDArray], k: int
) -> dict[str, float]:
    """F1 of every type of `new`, whose numbers of cells are the same for all arms."""
    names = list(new)
    true = np.repeat(names, [len(new[name]) for name in names])
    predicted = knn_predict(real, real_labels, None, np.concatenate(list(new.values())), ks=(k,))[k]
    found = f1_score(true, predicted, labels=names, average=None, zero_division=0.0)
    return dict(zip(names, map(float, found), strict=True))


def _totals(counts: sparse.csr_matrix) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def compare(
    real: sparse.csr_matrix, real_labels: NDArray, new: sparse.csr_matrix, new_labels: NDArray
) -> pd.DataFrame:
    """Real against generated cells of every type.

    Returns
    -------
    DataFrame
        One row per type, largest first: Pearson correlation of per-gene mean expression;
        zero fraction per cell and its difference; mean-variance slope and its difference; mean
        total count, and the Kolmogorov-Smirnov distance between the totals' distributions.
    """
    rows = []
    for name in np.unique(real_labels):
        if not (new_labels == name).any():
            continue
        a = real[real_labels == name].toarray().astype(np.float64)
        b = new[new_labels == name].toarray().astype(np.float64)
        rows.append(
            {
                "type": name,
                "real": len(a),
                "synthetic": len(b),
                "mean corr": np.corrcoef(a.mean(axis=0), b.mean(axis=0))[0, 1],
                "zeros real": (a == 0).mean(),
                "zeros diff": (b == 0).mean() - (a == 0).mean(),
                "slope real": mean_variance_slope(a),
                "slope diff": mean_variance_slope(b) - mean_variance_slope(a),
                "total real": a.sum(axis=1).mean(),
                "total synth": b.sum(axis=1).mean(),
                "totals KS": stats.ks_2samp(a.sum(axis=1), b.sum(axis=1)).statistic,
            }
        )
    return pd.DataFrame(rows).set_index("type").sort_values("real", ascending=False)


def to_markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """Plain markdown, so that docs can hold a table exactly as a command printed it."""
    frame = table.reset_index()
    shown = [
        [f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in row]
        for row in frame.itertuples(index=False)
    ]
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in shown])
