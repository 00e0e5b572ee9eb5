"""Where cells lie among real ones, in principal components of their log-normalised counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from benchmarks.cells import Cells, log_normalise
from benchmarks.realism import mmd_rbf
from cfgen_augment.measures import wasserstein

N_NEIGHBOURS = 10
_N_PCS = 30
_LEAST_CELLS = 20  # on either side of a distance between distributions


class Space:
    """Principal components of real cells, and the real cells in it.

    Parameters
    ----------
    cells
        Real cells with donors; the components are fitted to their log-normalised counts.
    """

    def __init__(self, cells: Cells) -> None:
        logs = log_normalise(cells.counts)
        width = min(_N_PCS, *(size - 1 for size in logs.shape))
        self._pca = PCA(width, svd_solver="arpack", random_state=0).fit(logs)
        self.labels, self.donors = cells.labels, np.asarray(cells.donors)
        self.real: NDArray[np.float64] = self._pca.transform(logs).astype(np.float64)
        self._search = NearestNeighbors(n_neighbors=N_NEIGHBOURS + 1).fit(self.real)

    def place(self, counts: sparse.csr_matrix) -> NDArray[np.float64]:
        """Places of cells, ``(n_cells, width)``."""
        placed: NDArray[np.float64] = self._pca.transform(log_normalise(counts)).astype(np.float64)
        return placed

    def neighbours(
        self, places: NDArray[np.float64], *, are_real: bool = False
    ) -> NDArray[np.int64]:
        """Rows of the nearest real cells, ``(n_cells, 10)``, the cell itself left out if real."""
        found: NDArray[np.int64] = self._search.kneighbors(places, return_distance=False)
        return found[:, 1:] if are_real else found[:, :N_NEIGHBOURS]

    def shares(
        self, places: NDArray, labels: NDArray, donors: NDArray, *, are_real: bool = False
    ) -> dict[str, float]:
        """Share of the nearest real cells that have the cell's type, and that have its donor."""
        near = self.neighbours(places, are_real=are_real)
        return {
            "type": float((self.labels[near] == labels[:, None]).mean()),
            "donor": float((self.donors[near] == donors[:, None]).mean()),
        }

    def proportions_off(self, places: NDArray, *, are_real: bool = False) -> float:
        """Total variation between the types of nearest real cells and those of all real cells."""
        near = self.labels[self.neighbours(places, are_real=are_real)]
        names = np.unique(self.labels)
        off = [abs((near == name).mean() - (self.labels == name).mean()) for name in names]
        return float(np.sum(off) / 2)


def coverage(real: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    """Share of real cells with a new one closer than their tenth nearest real one.

    The coverage of Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models"
    (ICML 2020); it depends on the numbers of cells, which should be alike in what is compared.
    """
    own = NearestNeighbors(n_neighbors=N_NEIGHBOURS + 1).fit(real)
    radius = own.kneighbors(real)[0][:, N_NEIGHBOURS]
    closest = NearestNeighbors(n_neighbors=1).fit(new).kneighbors(real)[0][:, 0]
    return float((closest <= radius).mean())


def distances(real: NDArray[np.float64], new: NDArray[np.float64]) -> dict[str, float]:
    """W2 and squared RBF MMD of equally many cells; NaN for fewer than 20."""
    m = min(len(real), len(new))
    if m < _LEAST_CELLS:
        return {"W2": float("nan"), "MMD": float("nan")}
    return {"W2": wasserstein(real[:m], new[:m]), "MMD": mmd_rbf(real[:m], new[:m])}


def log_profile(counts: sparse.csr_matrix) -> NDArray[np.float64]:
    """Log mean expression ``log(1 + mean of 1e4 x / total)``, ``(n_genes,)``.

    The log of a mean, not the mean of logs, which grows with depth.
    """
    expm1 = log_normalise(counts)
    np.expm1(expm1.data, out=expm1.data)
    return np.log1p(np.asarray(expm1.mean(axis=0), dtype=np.float64).ravel())
