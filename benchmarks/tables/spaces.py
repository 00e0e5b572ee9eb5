"""Where generated and held-out cells are compared, and how far apart they are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score

from benchmarks.classify import knn_predict
from benchmarks.realism import mmd_rbf
from cfgen_augment.measures import log_normalise, wasserstein

#: What rows of all types together go by; the others are named after their type.
POOLED = "(pooled)"
#: Fewest held-out cells for a type to count in averages over types.
LEAST = 10
_MOST = 2000  # cells on a side of a comparison: exact transport takes their number cubed
_COMPONENTS = 30
_NEIGHBOURS = 10

Values: TypeAlias = sparse.csr_matrix
Transform: TypeAlias = Callable[[Values], Values]


def log_space(held_out: Values) -> Transform:
    """``log(1 + 1e4 x / total)``, whatever the held-out cells."""
    return log_normalise


def tf_idf_space(held_out: Values) -> Transform:
    r"""TF-IDF, its weights from the held-out cells.

    Of peak `j` in cell `i`, with `n` held-out cells, of which :math:`n_j` have the peak open,

    .. math::

        \log(1 + 10^4 x_{ij} / \textstyle\sum_j x_{ij}) \cdot \log(1 + n / n_j)

    and zero where no held-out cell has it open.
    """
    opened = np.bincount(held_out.indices[held_out.data > 0], minlength=held_out.shape[1])
    weights = np.log1p(held_out.shape[0] / np.maximum(opened, 1)) * (opened > 0)

    def tf_idf(counts: Values) -> Values:
        values = log_normalise(counts)
        values.data *= weights[values.indices].astype(np.float32)
        return values

    return tf_idf


class Space:
    """Leading principal components of the centred held-out cells, and these cells in it.

    The components hold some of the held-out cells' own noise, which widens all distances; no
    other cells know of it, real ones neither, so rows are fair to each other.

    Parameters
    ----------
    held_out
        Counts of the held-out cells, ``(n_cells, n_features)``.
    labels
        Their types.
    transform
        Makes the transformation of counts, `log_space` or `tf_idf_space`.
    seed
        Of samples of cells, and of where the search for components starts.
    """

    def __init__(
        self,
        held_out: Values,
        labels: NDArray,
        transform: Callable[[Values], Transform],
        seed: int,
    ) -> None:
        self.transform = transform(held_out)
        values = self.transform(held_out)
        width = min(_COMPONENTS, *(size - 1 for size in values.shape))
        self._pca = PCA(width, svd_solver="arpack", random_state=seed).fit(values)
        self._seed = seed
        self.labels = labels
        self.places = self._placed(values)

    def compare(
        self, made: Values, labels: NDArray | None, *, transformed: bool = False
    ) -> list[dict[str, Any]]:
        """Distances of made to held-out cells.

        Parameters
        ----------
        made
            Counts, or values as `transform` returns them where `transformed`.
        labels
            Types of the made cells; None if they have none.

        Returns
        -------
        list of dict
            A row of all types together, whose ``type`` is `POOLED`, and one per type, if made
            cells have types, with

            ``m``
                cells on either side;
            ``w2``
                2-Wasserstein distance, the root of the cost of the exact transport of squared
                distances;
            ``mmd``
                squared maximum mean discrepancy of a sum of Gaussian kernels, unbiased, see
                `benchmarks.realism.mmd_rbf`;
            ``f1``
                F1 of made cells when ten nearest held-out cells vote on their type; of all types
                together, the mean over types of at least `LEAST` held-out cells.

            Types of fewer than two cells on a side have no distances.
        """
        places = self._placed(made if transformed else self.transform(made))
        rows = [{"type": POOLED, **self._distances(self.places, places, 0), "f1": None}]
        if labels is None:
            return rows
        f1 = self._f1(places, labels)
        for i, (name, value) in enumerate(f1.items()):
            of_type = (self.places[self.labels == name], places[labels == name])
            rows.append({"type": name, **self._distances(*of_type, i + 1), "f1": value})
        counted = [value for name, value in f1.items() if (self.labels == name).sum() >= LEAST]
        rows[0]["f1"] = float(np.mean(counted)) if counted else None
        return rows

    def _placed(self, values: Values) -> NDArray[np.float64]:
        return self._pca.transform(values).astype(np.float64)

    def _distances(self, real: NDArray, made: NDArray, which: int) -> dict[str, Any]:
        m = min(len(real), len(made), _MOST)
        if m < 2:
            return {"m": m, "w2": None, "mmd": None}
        random = np.random.default_rng([self._seed, which])
        real, made = (side[np.sort(random.permutation(len(side))[:m])] for side in (real, made))
        return {"m": m, "w2": wasserstein(real, made), "mmd": mmd_rbf(real, made)}

    def _f1(self, places: NDArray, labels: NDArray) -> dict[str, float]:
        """F1 of every type."""
        names = [str(name) for name in np.unique(self.labels)]
        predicted = knn_predict(self.places, self.labels, None, places, ks=(_NEIGHBOURS,))
        found = f1_score(
            labels, predicted[_NEIGHBOURS], labels=names, average=None, zero_division=0.0
        )
        return dict(zip(names, map(float, found), strict=True))


def spaces(
    held_out: Mapping[str, Values],
    labels: NDArray,
    transforms: Mapping[str, Callable[[Values], Transform]],
    seed: int,
) -> dict[str, Space]:
    """The space of every modality."""
    return {
        name: Space(values, labels, transforms[name], seed) for name, values in held_out.items()
    }
