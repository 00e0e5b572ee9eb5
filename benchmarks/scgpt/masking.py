"""What pretraining predicts: batches with hidden values, and the means a model has to beat."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from benchmarks.scgpt.tokens import Draws, Rules, Tokens, expressed, tokenise


class Batch(NamedTuple):
    """Cells with hidden values.

    Attributes
    ----------
    tokens
        The cells' tokens with their true values, ``(n_cells, length)``.
    masked
        True where a token's value is hidden, to be predicted from its own output.
    asked, answers
        Genes to predict from ``<cls>``, and their values, ``(n_cells, n_asked)``: the tokens'
        genes, then random ones at 0.
    counted
        True where an answer counts: at masked genes, and at random ones that the cell lacks.
    """

    tokens: Tokens
    masked: Tensor
    asked: Tensor
    answers: Tensor
    counted: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tokens, *rest = self
        return Batch(tokens.to(device), *(part.to(device) for part in rest))


class Masker:
    """Turns rows of a count matrix into batches with hidden values.

    Parameters
    ----------
    values
        Counts, CSR, ``(n_cells, n_genes)``.
    ids
        Token of every gene, ``(n_genes,)``.
    rules
        How cells become tokens.
    mask_ratio
        Share of the tokens' values hidden; as many random genes are asked of ``<cls>``.
    """

    def __init__(
        self, values: sparse.csr_matrix, ids: NDArray, rules: Rules, mask_ratio: float
    ) -> None:
        self._values = values
        self._ids = ids
        self._rules = rules
        self._mask_ratio = mask_ratio

    def batch(self, rows: NDArray, random: np.random.Generator) -> Batch:
        """The cells at `rows`, with fresh draws for ties, subset, mask and random genes."""
        cells = expressed(self._values[rows], self._ids)
        tokens = tokenise(cells, Draws(*random.random((2, len(cells.values)))), self._rules)
        masked = torch.from_numpy(random.random(tokens.genes.shape) < self._mask_ratio)
        masked[:, 0] = False
        if tokens.padding is not None:
            masked &= ~tokens.padding
        n_others = max(1, round(self._mask_ratio * masked.shape[1]))
        others = torch.from_numpy(random.choice(self._ids, (len(rows), n_others)))
        found = torch.zeros(len(rows), int(self._ids.max()) + 1, dtype=torch.bool)
        cell = np.repeat(np.arange(len(rows)), cells.lengths)
        found[torch.from_numpy(cell), torch.from_numpy(cells.genes)] = True
        return Batch(
            tokens,
            masked,
            asked=torch.cat([tokens.genes, others], dim=1),
            answers=torch.cat([tokens.values, torch.zeros(others.shape)], dim=1),
            counted=torch.cat([masked, ~found.gather(1, others)], dim=1),
        )


class GeneMeans:
    """Each gene's mean, from training cells: the baseline that needs no model.

    Parameters
    ----------
    n_tokens
        Length of the vocabulary.
    """

    def __init__(self, n_tokens: int) -> None:
        self._sums = np.zeros(n_tokens)
        self._seen = np.zeros(n_tokens)

    def add(self, genes: Tensor, values: Tensor) -> None:
        """Take in values of genes, both flat."""
        n_tokens = len(self._seen)
        self._sums += np.bincount(genes.numpy(), values.numpy(), n_tokens)
        self._seen += np.bincount(genes.numpy(), minlength=n_tokens)

    def errors(self, genes: Tensor, values: Tensor) -> tuple[float, float]:
        """Mean squared errors of predicting the overall mean, and each gene's mean."""
        mean = self._sums.sum() / max(self._seen.sum(), 1)
        means = np.full(len(self._sums), mean)
        np.divide(self._sums, self._seen, out=means, where=self._seen > 0)
        truth = values.numpy()
        return (
            float(np.mean((truth - mean) ** 2)),
            float(np.mean((truth - means[genes.numpy()]) ** 2)),
        )
