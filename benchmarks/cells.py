"""What the benchmark passes around: cells, a split's training side, and what an arm adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

# The benchmark's own modules take it from here, beside the cells it is for.
from cfgen_augment.measures import log_normalise as log_normalise


@dataclass(frozen=True)
class Cells:
    """Real cells with raw counts.

    Attributes
    ----------
    counts
        Raw counts, CSR of float32, ``(n_cells, n_genes)``.
    labels
        Cell type of every cell, strings, ``(n_cells,)``.
    genes
        Gene symbols, ``(n_genes,)``.
    donors
        Donor of every cell, strings; None if the data have none.
    obsm
        Precomputed embeddings, each ``(n_cells, width)``.
    """

    counts: sparse.csr_matrix
    labels: NDArray
    genes: NDArray
    donors: NDArray | None = None
    obsm: Mapping[str, NDArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.counts.shape[0]

    def take(self, rows: NDArray) -> Cells:
        """The cells at `rows`, indices or a mask, in that order."""
        return replace(
            self,
            counts=self.counts[rows],
            labels=self.labels[rows],
            donors=None if self.donors is None else self.donors[rows],
            obsm={key: value[rows] for key, value in self.obsm.items()},
        )

    def with_genes(self, columns: NDArray) -> Cells:
        """The same cells on the genes at `columns`."""
        return replace(self, counts=self.counts[:, columns].tocsr(), genes=self.genes[columns])

    def sizes(self) -> dict[str, int]:
        """Cells of every type, types sorted by name."""
        names, counts = np.unique(self.labels, return_counts=True)
        return {str(n): int(c) for n, c in zip(names, counts, strict=True)}


@dataclass(frozen=True)
class Training:
    """All that an arm may see of a split: nothing here comes from a held-out donor.

    Attributes
    ----------
    cells
        Training cells on the genes chosen from them.
    pool
        Real cells of the same donors that are not trained on. Only the oracle may add them; they
        are also the non-members in tests of memorisation.
    to_add
        New cells wanted of each type; types that get none are left out.
    seed
        Source of all randomness of the arm.
    """

    cells: Cells
    pool: Cells
    to_add: Mapping[str, int]
    seed: int


@dataclass(frozen=True)
class New:
    """What an arm adds to the training cells.

    Attributes
    ----------
    values
        New cells on the training genes, CSR of float32: raw counts, or log-normalised values
        where `logged`.
    labels
        Their types, strings.
    logged
        Whether `values` are ``log(1 + 1e4 x / total)`` instead of counts.
    weights
        Weight of every *training* cell in the classifiers, for arms that add nothing but
        reweight; None for one each.
    obsm
        Embeddings of the new cells, only where they are copies of real cells.
    """

    values: sparse.csr_matrix
    labels: NDArray
    logged: bool = False
    weights: NDArray | None = None
    obsm: Mapping[str, NDArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.values.shape[0]


def nothing(n_genes: int) -> New:
    """No new cells."""
    return New(sparse.csr_matrix((0, n_genes), dtype=np.float32), np.array([], dtype=str))


def log_values(new: New) -> sparse.csr_matrix:
    """The new cells' log-normalised values, whichever form they were made in."""
    return new.values if new.logged else log_normalise(new.values)
