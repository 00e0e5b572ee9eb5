"""Cells to scGPT's tokens: match genes, bin values, keep a random subset, ``<cls>`` first.

Both random steps take their uniforms from the caller, so they can be repeated, and a test can
hand the original code the same ones. Binning is defined on all of a cell's expressed genes; only
then is the subset drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from benchmarks.scgpt.checkpoint import CLS
from benchmarks.scgpt.transformer import Config


class Expressed(NamedTuple):
    """The matched genes that each cell expresses, cells laid end to end.

    Attributes
    ----------
    genes, values
        Token ids, int64, and values, float32, ``(n_entries,)``.
    lengths
        Entries of every cell, int64, ``(n_cells,)``.
    """

    genes: NDArray
    values: NDArray
    lengths: NDArray


class Draws(NamedTuple):
    """Uniforms in ``[0, 1)`` for the two random steps, one per expressed gene, ``(n_entries,)``.

    Attributes
    ----------
    ties
        Which of several bins a value goes to when their edges coincide with it.
    order
        Genes are kept in increasing order of it in cells that have too many.
    """

    ties: NDArray
    order: NDArray


class Tokens(NamedTuple):
    """A padded batch.

    Attributes
    ----------
    genes
        Token ids, int64, ``(n_cells, length)``, ``<cls>`` first.
    values
        Bins, float32, ``(n_cells, length)``; `pad_value` at ``<cls>`` and padding.
    padding
        True at padding, ``(n_cells, length)``; None where no cell is padded.
    """

    genes: Tensor
    values: Tensor
    padding: Tensor | None

    def to(self, device: torch.device) -> Tokens:
        """The same batch on `device`."""
        padding = None if self.padding is None else self.padding.to(device)
        return Tokens(self.genes.to(device), self.values.to(device), padding)


@dataclass(frozen=True)
class Rules:
    """How expressed genes become tokens.

    Attributes
    ----------
    cls, pad
        Ids of ``<cls>`` and of the padding token.
    pad_value, n_bins
        As in the checkpoint's settings.
    max_length
        Most tokens of a cell, ``<cls>`` included.
    """

    cls: int
    pad: int
    pad_value: int
    n_bins: int
    max_length: int

    @classmethod
    def of(cls, config: Config, vocabulary: Mapping[str, int], max_length: int) -> Rules:
        """The rules of a checkpoint, for cells of at most `max_length` tokens."""
        if max_length < 2:
            raise ValueError(f"max_length: expected <cls> and a gene, 2 or more; got {max_length}.")
        pad = vocabulary[config.pad_token]
        return cls(vocabulary[CLS], pad, config.pad_value, config.n_bins, max_length)


def match(vocabulary: Mapping[str, int], genes: Sequence[str] | NDArray) -> NDArray:
    """Token id of every gene by its exact symbol, -1 where the vocabulary lacks it."""
    return np.array([vocabulary.get(str(gene), -1) for gene in genes], dtype=np.int64)


def expressed(values: sparse.csr_matrix, ids: NDArray) -> Expressed:
    """The non-zero values of matched genes.

    Parameters
    ----------
    values
        Cells, CSR, ``(n_cells, n_genes)``; used as given, neither normalised nor logged.
    ids
        Token of every gene, -1 for none, ``(n_genes,)``.
    """
    if not values.has_canonical_format:
        values = values.copy()
        values.sum_duplicates()
    genes = ids[values.indices]
    keep = (genes >= 0) & (values.data != 0)
    data = values.data.astype(np.float32, copy=False)
    if keep.all():
        return Expressed(genes, data, np.diff(values.indptr).astype(np.int64))
    before = np.concatenate([[0], np.cumsum(keep)])
    return Expressed(genes[keep], data[keep], np.diff(before[values.indptr]))


def draw(seed: int, cells: NDArray, lengths: NDArray, max_length: int) -> Draws:
    """Uniforms that depend on the seed and the cell alone, not on the cells beside it.

    Parameters
    ----------
    seed
        Seed, non-negative.
    cells
        Number of every cell, ``(n_cells,)``.
    lengths
        Expressed genes of every cell, ``(n_cells,)``.
    max_length
        Cells with fewer expressed genes than this keep all and draw no order.
    """
    ends = np.cumsum(lengths)
    ties = np.empty(int(lengths.sum()))
    order = np.zeros_like(ties)
    for cell, length, end in zip(cells, lengths, ends, strict=True):
        # Philox is a counter-based generator: a key is a stream, at no cost for seeking it.
        random = np.random.Generator(np.random.Philox(key=[seed, int(cell)]))
        random.random(out=ties[end - length : end])
        if length >= max_length:
            random.random(out=order[end - length : end])
    return Draws(ties, order)


def tokenise(cells: Expressed, draws: Draws, rules: Rules) -> Tokens:
    """A padded batch of tokens.

    Parameters
    ----------
    cells
        The batch's expressed genes.
    draws
        Uniforms for both random steps.
    rules
        Special tokens and lengths.
    """
    lengths = torch.from_numpy(cells.lengths)
    n_cells, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    filled = torch.arange(longest) < lengths[:, None]

    def padded(entries: NDArray, fill: float) -> Tensor:
        flat = torch.from_numpy(entries)
        return torch.full((n_cells, longest), fill, dtype=flat.dtype).masked_scatter_(filled, flat)

    genes = padded(cells.genes, rules.pad)
    values = padded(cells.values, torch.inf)
    bins = bin_values(values, lengths, padded(draws.ties, 0.0), rules.n_bins)
    bins.masked_fill_(~filled, rules.pad_value)
    kept = rules.max_length - 1
    if longest > kept:
        # Cells that fit keep their genes' order, and padding stays last.
        in_place = torch.arange(longest, dtype=torch.float64).expand(n_cells, -1)
        order = torch.where(lengths[:, None] > kept, padded(draws.order, torch.inf), in_place)
        columns = order.argsort(dim=1, stable=True)[:, :kept]
        genes, bins, filled = (part.gather(1, columns) for part in (genes, bins, filled))
    first = torch.ones(n_cells, 1, dtype=torch.int64)
    padding = torch.cat([torch.zeros_like(first, dtype=torch.bool), ~filled], dim=1)
    return Tokens(
        torch.cat([rules.cls * first, genes], dim=1),
        torch.cat([rules.pad_value * first.float(), bins], dim=1),
        padding if bool(padding.any()) else None,
    )


def bin_values(values: Tensor, lengths: Tensor, ties: Tensor, n_bins: int) -> Tensor:
    r"""Bin every cell's values by its own quantiles.

    With the ``n_bins - 1`` edges :math:`e_1 \le \dots` at equally spaced quantiles of the cell's
    values (linear interpolation), a value :math:`x` lies at or above
    :math:`l = \#\{e \le x\}` edges and above :math:`r = \#\{e < x\}` of them. Its bin is
    :math:`\lceil r' \rceil` with :math:`r' = u (r - l) + l` and `u` uniform: `l`, unless edges
    coincide with `x`, when it is one of :math:`r + 1, \dots, l` at random.

    Parameters
    ----------
    values
        Values, float32, padded with infinity, ``(n_cells, longest)``.
    lengths
        Values of every cell, ``(n_cells,)``.
    ties
        The uniforms `u`, float64, like `values`.
    n_bins
        Bins, that of zero included.

    Returns
    -------
    Tensor
        Bins from 1 to ``n_bins - 1``, float32, like `values`; at padding they mean nothing.
    """
    if values.numel() == 0:
        return torch.zeros_like(values)
    ranked = values.sort(dim=1).values
    # The same floating-point operations as numpy's quantile: an edge that ties with a value
    # must tie with it here too.
    last = (lengths - 1).clamp(min=0)[:, None]
    position = last * torch.from_numpy(np.linspace(0, 1, n_bins - 1))
    below = position.floor().long().clamp(max=last)
    low, high = ranked.gather(1, below), ranked.gather(1, (below + 1).minimum(last))
    share, step = position - below, (high - low).double()
    edges = torch.where(share < 0.5, low + step * share, high - step * (1 - share))
    exact = values.double()
    edges = edges.nan_to_num(nan=torch.inf)  # cells without any value
    at_or_below = torch.searchsorted(edges, exact, right=True)
    below_it = torch.searchsorted(edges, exact)
    return (ties * (below_it - at_or_below) + at_or_below).ceil().float()
