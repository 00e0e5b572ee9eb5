"""Whether generated cells repeat the cells they were trained on, type by type.

The yardstick is always real cells that were not trained on, from the same donors: what they are
to the training cells, generated cells may be too.

Every distance is Euclidean, among cells of one type, between log-normalised values of all genes.
Principal components would mislead: those fitted to the training cells hold some of their noise, so
that training cells lie further out in them than other cells do. On the Kang data the membership
test then scored .11 to .45 over types for fresh real cells (50 components), and .49 to .52 in all
genes, where .50 is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import roc_auc_score

from cfgen_augment.measures import exact_copies, nearest

_FEWEST = 5
_MOST = 1000


def memorisation(
    training_values: sparse.csr_matrix,
    training_labels: NDArray,
    new_values: sparse.csr_matrix,
    new_labels: NDArray,
    non_member_values: sparse.csr_matrix,
    non_member_labels: NDArray,
    *,
    seed: int,
    counts: tuple[sparse.csr_matrix, sparse.csr_matrix] | None = None,
) -> pd.DataFrame:
    r"""Compare new cells with training cells and with real cells that were not trained on.

    With ``d1(x, S) <= d2(x, S)`` the distances of `x` to its two closest cells in `S`, and of
    the cells of one type ``T`` trained on, ``G`` generated and ``H`` not trained on:

    - closest-record ratio: ``median_G d1(g, T) / median_H d1(h, T)``. It is near 0 for copies,
      1 for new draws of the same cells. Both medians search the same ``T``, whose size they
      depend on, so that the size cancels.
    - nearest-neighbour ratio: ``median_G d1/d2(g, T) / median_H d1/d2(h, T)``. It is near 0
      where cells sit on one training cell, and 1 where they lie between training cells as new
      real cells do.
    - membership inference: area under the ROC curve of the score ``-d1(x, G)``, members ``T``
      against non-members ``H``; 0.5 if being trained on does not show.

    Parameters
    ----------
    training_values, new_values, non_member_values
        Log-normalised values, CSR, ``(n_cells, n_genes)``. Non-members are unused cells of the
        donors that were trained on.
    training_labels, new_labels, non_member_labels
        Their types.
    seed
        Of the samples of at most 1,000 cells of a type and kind whose neighbours are sought.
        The cells that are searched are always all of them, because distances depend on their
        number; medians and the AUC do not depend on how many cells seek.
    counts
        Raw counts of training and new cells, in which copies are then looked for.

    Returns
    -------
    DataFrame
        Indexed by ``type``, types of the new cells: ``n_training``, ``n_new``,
        ``n_non_member``; ``exact_copies``, the share of new cells equal to a training cell of
        the type; ``dcr_new``, ``dcr_real`` and ``dcr_ratio``, the medians above and their
        ratio; ``nn_new``, ``nn_real`` and ``nn_ratio``; ``mia_auc``. NaN where the type has
        fewer than 5 non-members, or nothing to compare with.
    """
    names = [str(name) for name in np.unique(new_labels)]
    compared = (training_values, new_values) if counts is None else counts
    rows = []
    for i, name in enumerate(names):
        training, new, others = (
            np.flatnonzero(labels == name)
            for labels in (training_labels, new_labels, non_member_labels)
        )
        row = {
            "type": name,
            "n_training": len(training),
            "n_new": len(new),
            "n_non_member": len(others),
            "exact_copies": exact_copies(compared[0][training], compared[1][new]),
        }
        if len(training) and len(others) >= _FEWEST:
            row |= _Compared(
                training_values[training],
                new_values[new],
                non_member_values[others],
                np.random.default_rng([seed, i]),
            ).measures()
        rows.append(row)
    return pd.DataFrame(rows, columns=_COLUMNS).set_index("type")


_COLUMNS = (
    *("type", "n_training", "n_new", "n_non_member", "exact_copies"),
    *("dcr_new", "dcr_real", "dcr_ratio", "nn_new", "nn_real", "nn_ratio", "mia_auc"),
)


@dataclass(frozen=True)
class _Compared:
    """Log-normalised values of the cells of one type."""

    training: sparse.csr_matrix
    new: sparse.csr_matrix
    others: sparse.csr_matrix
    random: np.random.Generator

    def measures(self) -> dict[str, float]:
        """All that is measured by distances."""
        others = self._sample(self.others)
        members = self._sample(self.training)
        new = self._sample(self.new)
        near = {"new": nearest(new, self.training), "real": nearest(others, self.training)}
        found: dict[str, float] = {}
        for name, distances in near.items():
            found[f"dcr_{name}"] = float(np.median(distances[:, 0]))
            found[f"nn_{name}"] = _ratio_of_two(distances)
        for name in ("dcr", "nn"):
            real = found[f"{name}_real"]
            found[f"{name}_ratio"] = found[f"{name}_new"] / real if real > 0 else float("nan")
        score = -np.concatenate([nearest(cells, self.new)[:, 0] for cells in (members, others)])
        truth = np.repeat([1, 0], [len(members), len(others)])
        return found | {"mia_auc": float(roc_auc_score(truth, score))}

    def _sample(self, cells: sparse.csr_matrix) -> NDArray[np.float32]:
        n = cells.shape[0]
        if n > _MOST:
            cells = cells[self.random.choice(n, _MOST, replace=False)]
        return cells.toarray().astype(np.float32, copy=False)


def _ratio_of_two(distances: NDArray) -> float:
    """Median of ``d1 / d2`` over cells whose second closest is not at their own place."""
    if distances.shape[1] < 2 or not (distances[:, 1] > 0).any():
        return float("nan")
    apart = distances[distances[:, 1] > 0]
    return float(np.median(apart[:, 0] / apart[:, 1]))
