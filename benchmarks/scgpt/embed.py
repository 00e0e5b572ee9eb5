"""Embed cells with a frozen scGPT: the normalised last-layer output at ``<cls>``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.scgpt.checkpoint import Checkpoint
from benchmarks.scgpt.tokens import Rules, draw, expressed, match, tokenise
from cfgen_augment.training import resolve_device

# Rows whose lengths are counted at a time.
_BLOCK = 16_384
# Below this share of known genes an embedding says little, and the symbols are likely wrong.
_FEW = 0.5


@torch.inference_mode()
def embed_cells(
    checkpoint: Checkpoint,
    values: sparse.csr_matrix,
    genes: Sequence[str] | NDArray,
    *,
    seed: int,
    device: str = "cpu",
    batch_tokens: int = 16_384,
    max_length: int = 1_200,
    verbose: bool = False,
) -> NDArray:
    """Embed cells.

    Cells are embedded in batches of about equal length, so there is little padding; a cell's
    embedding does not depend on the cells it shares a batch with beyond rounding.

    Parameters
    ----------
    checkpoint
        A loaded checkpoint.
    values
        Cells, CSR, ``(n_cells, n_genes)``, used as given; scGPT bins them by rank per cell.
    genes
        Gene symbols, ``(n_genes,)``, matched to the vocabulary exactly.
    seed
        Source of both random steps, ties between bins and the subset of genes of cells with too
        many. What a cell draws depends on the seed and its row alone.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    batch_tokens
        Tokens in a batch, about.
    max_length
        Most tokens of a cell, ``<cls>`` included.
    verbose
        Show a progress bar with the time left.

    Returns
    -------
    ndarray
        Float32, ``(n_cells, embsize)``, rows of length 1.

    Raises
    ------
    ValueError
        If no gene is in the vocabulary, or `values` and `genes` do not fit.
    """
    ids = known_genes(checkpoint, values, genes)
    rules = Rules.of(checkpoint.config, checkpoint.vocabulary, max_length)
    where = resolve_device(device)
    # The checkpoint itself stays on the CPU.
    model = checkpoint.model if where.type == "cpu" else deepcopy(checkpoint.model).to(where)
    gene_table, value_table = model.tables()
    lengths = token_lengths(values, ids, max_length)
    embedding = np.empty((values.shape[0], checkpoint.config.embsize), dtype=np.float32)
    # Counted in tokens, of which every batch has about as many, so the time left is honest.
    with tqdm(
        total=int(lengths.sum()), desc="scGPT", unit="token", unit_scale=True, disable=not verbose
    ) as bar:
        for rows in batches(lengths, batch_tokens):
            cells = expressed(values[rows], ids)
            draws = draw(seed, rows, cells.lengths, max_length)
            tokens = tokenise(cells, draws, rules).to(where)
            bins = tokens.values.clamp(min=0).long()
            x = F.embedding(tokens.genes, gene_table) + F.embedding(bins, value_table)
            first = model.encode(x, tokens.padding, first_only=True)[:, 0]
            embedding[rows] = F.normalize(first, dim=1).cpu().numpy()
            bar.update(int(lengths[rows].sum()))
    return embedding


def known_genes(
    checkpoint: Checkpoint, values: sparse.csr_matrix, genes: Sequence[str] | NDArray
) -> NDArray:
    """Token of every gene, -1 for none; checks that enough of them are known."""
    if values.shape[1] != len(genes):
        raise ValueError(
            f"genes: expected {values.shape[1]} symbols, one per column; got {len(genes)}."
        )
    if not np.isfinite(values.data).all():
        raise ValueError("values: expected finite values; got NaN or infinity.")
    ids = match(checkpoint.vocabulary, genes)
    known = int((ids >= 0).sum())
    shown = ", ".join(str(gene) for gene in list(genes)[:5])
    advice = (
        f"the vocabulary holds symbols such as {', '.join(list(checkpoint.vocabulary)[:5])}; the "
        f"data have {shown}. Genes match by exact symbol: check spelling, case and species"
    )
    if known == 0:
        raise ValueError(f"genes: expected symbols of the checkpoint; none matches: {advice}.")
    if known < _FEW * len(ids):
        warnings.warn(f"only {known} of {len(ids)} genes are known: {advice}.", stacklevel=3)
    return ids


def token_lengths(values: sparse.csr_matrix, ids: NDArray, max_length: int) -> NDArray:
    """Tokens of every cell, ``<cls>`` included, ``(n_cells,)``."""
    parts = []
    for start in range(0, values.shape[0], _BLOCK):
        indptr = values.indptr[start : start + _BLOCK + 1]
        entries = slice(indptr[0], indptr[-1])
        keep = (ids[values.indices[entries]] >= 0) & (values.data[entries] != 0)
        before = np.concatenate([[0], np.cumsum(keep)])
        parts.append(np.diff(before[indptr - indptr[0]]))
    found = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return np.minimum(found + 1, max_length)


def batches(lengths: NDArray, batch_tokens: int) -> Iterator[NDArray]:
    """Rows in batches of similar length, the longest first: what memory they need shows early."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size
