"""Cells on their way into the autoencoder: their non-zeros, made dense on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cfgen_augment.counts import CellMatrix, ValueKind, dense_rows, nonzeros

_RESIDENT_BYTES = 8  # of a stored value: its column and its count
_RESIDENT_SHARE = 0.5  # of the free memory that counts may take on a GPU

_SEEN_SHARE = (0.3, 0.9)  # of a cell's counts in the first part of a split, least and most


@dataclass(frozen=True)
class Minibatch:
    """Some cells, as their non-zeros: the rest of a count matrix needs no work per entry.

    Attributes
    ----------
    shape
        ``(n, n_features)``.
    values
        The non-zeros as float32, ``(n_nonzero,)``; where features are not counts all entries,
        ``(n, n_features)``.
    at
        Places of `values` in the flattened block, ascending, ``(n_nonzero,)``; None if `values`
        holds all entries.
    """

    shape: tuple[int, int]
    values: Tensor
    at: Tensor | None

    @classmethod
    def of(
        cls, X: CellMatrix, rows: NDArray[np.intp], kind: ValueKind, device: torch.device
    ) -> Minibatch:
        """Some rows of `X`, an ndarray or CSR with values of `kind`, on `device`."""
        shape = (len(rows), X.shape[1])
        if kind == "real":
            return cls(shape, torch.from_numpy(dense_rows(X, rows)).to(device), None)
        at, values = nonzeros(X, rows)
        return cls(shape, torch.from_numpy(values).to(device), torch.from_numpy(at).to(device))

    def dense(self, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """All entries, ``(n, n_features)``, through a `function` that leaves zero at zero."""
        values = self.values if function is None else function(self.values)
        return values if self.at is None else scatter(values, self.at, self.shape)

    def gather(self, entries: Tensor) -> Tensor:
        """Entries, which broadcast to `shape`, in the places and the shape of `values`."""
        if self.at is None:
            return entries.expand(self.shape)
        return gather(entries, self.at, self.shape)

    def split(self, generator: torch.Generator) -> tuple[Minibatch, Minibatch]:
        """Every cell's molecules dealt out at random into two cells of the same composition.

        A share is drawn for every cell, uniformly, and every molecule of the cell falls into the
        first part with that probability. Of Poisson counts the parts are independent given the
        mean; of overdispersed ones they share what is not counting noise (count splitting,
        A. Neufeld et al., doi:10.1093/biostatistics/kxac047).
        """
        if self.at is None:
            raise TypeError("only counts can be split")
        low, high = _SEEN_SHARE
        device = self.values.device
        share = torch.rand(self.shape[0], generator=generator, device=device)
        row = torch.div(self.at, self.shape[1], rounding_mode="floor")
        seen = torch.binomial(self.values, (low + (high - low) * share)[row], generator=generator)
        return (
            Minibatch(self.shape, seen, self.at),
            Minibatch(self.shape, self.values - seen, self.at),
        )

    def log_totals(self) -> Tensor:
        """Log total counts, ``(n, 1)``; of a cell without any, that of a single one."""
        assert self.at is not None
        row = torch.div(self.at, self.shape[1], rounding_mode="floor")
        totals = self.values.new_zeros(self.shape[0]).index_add_(0, row, self.values)
        return totals.clamp_min(1.0).log()[:, None]


class ResidentCells:
    """CSR counts that live on the device, so that a step moves row numbers and nothing else.

    Parameters
    ----------
    X
        CSR counts in memory, ``(n_cells, n_features)``.
    device
        Where to hold them.
    """

    def __init__(self, X: sparse.csr_matrix, device: torch.device) -> None:
        if not X.data.all():
            X = X.copy()
            X.eliminate_zeros()
        self._n_features = X.shape[1]
        self._ends = X.indptr.astype(np.int64)  # also here: sizes are known without asking a GPU
        self._indptr = torch.from_numpy(self._ends).to(device)
        self._indices = torch.from_numpy(X.indices).to(device)
        self._data = torch.from_numpy(X.data.astype(np.float32, copy=False)).to(device)

    def __call__(self, rows: NDArray[np.intp]) -> Minibatch:
        """Some rows, put together on the device."""
        device = self._data.device
        n_nonzero = int((self._ends[rows + 1] - self._ends[rows]).sum())
        at = torch.from_numpy(rows).to(device, non_blocking=True)
        starts = self._indptr[at]
        lengths = self._indptr[at + 1] - starts
        row = torch.repeat_interleave(
            torch.arange(len(rows), device=device), lengths, output_size=n_nonzero
        )
        before = lengths.cumsum(0) - lengths
        entries = torch.arange(n_nonzero, device=device) + (starts - before)[row]
        places = row * self._n_features + self._indices[entries]
        return Minibatch((len(rows), self._n_features), self._data[entries], places)


def supply(
    X: CellMatrix, kind: ValueKind, device: torch.device
) -> Callable[[NDArray[np.intp]], Minibatch]:
    """How minibatches of `X` are made: on the device where its counts fit there, else moved to it.

    Parameters
    ----------
    X
        Cells, ``(n_cells, n_features)``, with values of `kind`.
    kind
        What the values are; only counts are sparse enough to keep on the device.
    device
        Where minibatches are wanted.
    """
    if device.type == "cuda" and kind != "real" and sparse.issparse(X):
        free, _ = torch.cuda.mem_get_info(device)
        if X.nnz * _RESIDENT_BYTES < _RESIDENT_SHARE * free:
            return ResidentCells(X, device)
    return lambda rows: Minibatch.of(X, rows, kind, device)


def scatter(values: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    """`values` at their places in a flattened block of zeros of `shape`."""
    return values.new_zeros(shape[0] * shape[1]).scatter_(0, at, values).view(shape)


def gather(entries: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    """Entries at places of a flattened block; `entries` broadcast to its `shape`."""
    return entries.expand(shape).reshape(-1).index_select(0, at)
