"""How much generated cells look like real ones, type by type."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, stats


def mean_variance_slope(counts: NDArray) -> float:
    """Slope of log variance on log mean over genes seen; `counts` is ``(n_cells, n_genes)``."""
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    seen = (mean > 0) & (variance > 0)
    return float(stats.linregress(np.log(mean[seen]), np.log(variance[seen])).slope)


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
