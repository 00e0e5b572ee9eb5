"""Cells on their way into the autoencoder: what is stored of them, made dense on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfgen_augment.counts import CellMatrix, ValueKind, dense_rows, nonzeros


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


def scatter(values: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    """`values` at their places in a flattened block of zeros of `shape`."""
    return values.new_zeros(shape[0] * shape[1]).scatter_(0, at, values).view(shape)


def gather(entries: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    """Entries at places of a flattened block; `entries` broadcast to its `shape`."""
    return entries.expand(shape).reshape(-1).index_select(0, at)
