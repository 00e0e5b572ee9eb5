"""Pretrain a small scGPT on any counts: predict hidden values from context and from ``<cls>``."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.scgpt.checkpoint import refuse_existing, save, with_specials
from benchmarks.scgpt.decoders import PretrainedTransformer
from benchmarks.scgpt.embed import token_lengths
from benchmarks.scgpt.masking import Batch, GeneMeans, Masker
from benchmarks.scgpt.tokens import Rules, match
from benchmarks.scgpt.transformer import Config, n_parameters
from cfgen_augment.training import resolve_device

_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 512
_WARM_UP, _WEIGHT_DECAY, _CLIP_NORM = 0.1, 0.01, 1.0
_LAST_LAYER = 10.0


@dataclass(frozen=True)
class Pretraining:
    """What a pretraining run reached, on cells it did not train on.

    Mean squared errors are in bins squared.

    Attributes
    ----------
    masked_mse, masked_mean_mse, masked_gene_mse
        Error of hidden values predicted from their tokens' own output; and, for comparison, of
        the mean bin of the training cells and of each gene's mean bin in them.
    cls_mse, cls_mean_mse, cls_gene_mse
        The same for hidden values and unexpressed genes predicted from ``<cls>`` alone.
    best_epoch
        Epoch, from 1, whose weights were kept: the one with the lowest sum of both errors.
    n_parameters, seconds
        Trainable parameters, and time taken.
    """

    masked_mse: float
    masked_mean_mse: float
    masked_gene_mse: float
    cls_mse: float
    cls_mean_mse: float
    cls_gene_mse: float
    best_epoch: int
    n_parameters: int
    seconds: float


def pretrain(
    values: sparse.csr_matrix,
    genes: Sequence[str] | NDArray,
    out_dir: str | os.PathLike[str],
    *,
    embsize: int = 64,
    n_layers: int = 3,
    n_heads: int = 4,
    d_hid: int = 128,
    dropout: float = 0.0,
    epochs: int = 8,
    mask_ratio: float = 0.4,
    max_length: int = 128,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: str = "auto",
    verbose: bool = False,
) -> Pretraining:
    """Pretrain scGPT and write a checkpoint in the official format.

    A cell's tokens are a random subset of the genes it expresses with their values in quantile
    bins. A share of the values is hidden; the loss is the mean squared error of predicting them
    from each token's own output, plus that of predicting them, and as many random genes that the
    cell does not express as 0, from ``<cls>`` (GEPC). Without the unexpressed genes ``<cls>``
    hardly learns to tell cells apart: most expressed genes have one count, so which genes are
    expressed says more than their bins. AdamW; the learning rate rises linearly, then falls as a
    half cosine.

    Parameters
    ----------
    values
        Counts, CSR, ``(n_cells, n_genes)``.
    genes
        Gene symbols, ``(n_genes,)``; they and the special tokens become the vocabulary.
    out_dir
        New directory for the checkpoint, written at the end.
    embsize, n_layers, n_heads, d_hid, dropout
        Sizes of the model.
    epochs, batch_size, learning_rate
        Length and pace of training.
    mask_ratio
        Share of values hidden.
    max_length
        Most tokens of a cell in training, ``<cls>`` included. Embedding may use more.
    seed
        Source of all randomness.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    verbose
        Show a progress bar with the time left and the held-out errors.

    Raises
    ------
    FileExistsError
        If `out_dir` exists and is not empty.
    ValueError
        If the data or the settings cannot be trained on, or training diverged.
    """
    started = time.perf_counter()
    refuse_existing(out_dir)
    _check(values, genes, epochs, batch_size, mask_ratio)
    where = resolve_device(device)
    config = Config(embsize, n_heads, n_layers, d_hid, dropout)
    vocabulary = with_specials({gene: i for i, gene in enumerate(dict.fromkeys(map(str, genes)))})
    ids = match(vocabulary, genes)
    random = np.random.default_rng(seed)
    masker = Masker(values, ids, Rules.of(config, vocabulary, max_length), mask_ratio)
    train, held_out = _split(token_lengths(values, ids, max_length), random)

    # Modules draw their first weights, and dropout its masks, from torch's global generator.
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(int(random.integers(2**62)))
        model = PretrainedTransformer(config, len(vocabulary)).to(where)
        # Hidden once, so that epochs are compared on the same values.
        check = [masker.batch(rows, random) for rows in _chunks(held_out, batch_size)]
        schedule = _Schedule(train, epochs, batch_size, learning_rate)
        errors, baselines, epoch = _fit(model, masker, schedule, check, random, where, verbose)
    result = Pretraining(
        errors[0],
        *baselines[0],
        errors[1],
        *baselines[1],
        best_epoch=epoch,
        n_parameters=n_parameters(model),
        seconds=time.perf_counter() - started,
    )
    settings = {
        "max_seq_len": max_length,
        "mask_ratio": mask_ratio,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": learning_rate,
        "seed": seed,
        "n_cells": len(train),
        "held_out": asdict(result),
    }
    save(out_dir, model, vocabulary, settings)
    return result


@dataclass(frozen=True)
class _Schedule:
    rows: NDArray
    epochs: int
    batch_size: int
    learning_rate: float


def _fit(
    model: PretrainedTransformer,
    masker: Masker,
    schedule: _Schedule,
    check: list[Batch],
    random: np.random.Generator,
    where: torch.device,
    verbose: bool,
) -> tuple[tuple[float, float], list[tuple[float, float]], int]:
    """Train, and leave the best epoch's weights in `model`.

    Returns
    -------
    tuple
        The best epoch's held-out errors, the two baselines of each, and the epoch.
    """
    n_tokens = model.encoder.embedding.num_embeddings
    n_steps = schedule.epochs * math.ceil(len(schedule.rows) / schedule.batch_size)
    optimiser = _optimiser(model, schedule.learning_rate)
    pace = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_up_then_cosine(n_steps))
    token_means, cls_means = GeneMeans(n_tokens), GeneMeans(n_tokens)
    # In units of the bins' variance, were they uniform: clipping at one norm then means something.
    scale = 12 / model.config.n_bins**2
    best, epoch_of_best, kept = (math.inf, math.inf), 0, dict[str, Tensor]()
    with tqdm(total=n_steps, desc="pretraining scGPT", disable=not verbose) as bar:
        for epoch in range(1, schedule.epochs + 1):
            for rows in _chunks(random.permutation(schedule.rows), schedule.batch_size):
                batch = masker.batch(rows, random)
                token_means.add(*_hidden(batch))
                cls_means.add(*_asked(batch))
                optimiser.zero_grad(set_to_none=True)
                own, from_cls = _squares(model, batch.to(where))
                (scale * (own.sum() / max(len(own), 1) + from_cls.mean())).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
                optimiser.step()
                pace.step()
                bar.update()
            errors = _held_out(model, check, where)
            bar.set_postfix(masked=f"{errors[0]:.1f}", cls=f"{errors[1]:.1f}")
            if sum(errors) < sum(best):
                best, epoch_of_best = errors, epoch
                kept = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if not kept:
        raise ValueError(
            "pretraining: expected finite held-out errors; no epoch's were. Lower the learning "
            f"rate, {schedule.learning_rate}."
        )
    model.load_state_dict(kept)
    hidden = [torch.cat(part) for part in zip(*map(_hidden, check), strict=True)]
    asked = [torch.cat(part) for part in zip(*map(_asked, check), strict=True)]
    return best, [token_means.errors(*hidden), cls_means.errors(*asked)], epoch_of_best


def _check(
    values: sparse.csr_matrix, genes: Sequence[str] | NDArray, epochs: int, batch: int, ratio: float
) -> None:
    if values.shape[1] != len(genes):
        raise ValueError(
            f"genes: expected {values.shape[1]} symbols, one per column; got {len(genes)}."
        )
    if epochs < 1 or batch < 1 or not 0 < ratio < 1:
        raise ValueError(
            "pretraining: expected at least one epoch, batches of at least one cell and a mask "
            f"ratio between 0 and 1; got epochs={epochs}, batch_size={batch}, mask_ratio={ratio}."
        )
    if not np.isfinite(values.data).all():
        raise ValueError("values: expected finite counts; got NaN or infinity.")


def _split(lengths: NDArray, random: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Cells to train on and to hold out, of those with at least two tokens besides ``<cls>``."""
    usable = random.permutation(np.flatnonzero(lengths > 2))
    if len(usable) < 10:
        raise ValueError(
            f"pretraining: expected at least 10 cells that express two genes; got {len(usable)}."
        )
    n_held_out = min(_MOST_HELD_OUT, math.ceil(_HELD_OUT_SHARE * len(usable)))
    return usable[n_held_out:], usable[:n_held_out]


def _chunks(rows: NDArray, size: int) -> list[NDArray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _hidden(batch: Batch) -> tuple[Tensor, Tensor]:
    """Genes and values to be predicted from tokens."""
    return batch.tokens.genes[batch.masked], batch.tokens.values[batch.masked]


def _asked(batch: Batch) -> tuple[Tensor, Tensor]:
    """Genes and values to be predicted from ``<cls>``."""
    return batch.asked[batch.counted], batch.answers[batch.counted]


def _squares(model: PretrainedTransformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Squared errors of what is predicted from tokens and from ``<cls>``, flat."""
    tokens = batch.tokens
    values = tokens.values.masked_fill(batch.masked, model.config.mask_value)
    own, from_cls = model.predict(tokens.genes, values, tokens.padding, batch.asked)
    return (
        (own - tokens.values)[batch.masked] ** 2,
        (from_cls - batch.answers)[batch.counted] ** 2,
    )


@torch.no_grad()
def _held_out(
    model: PretrainedTransformer, check: list[Batch], where: torch.device
) -> tuple[float, float]:
    """Mean squared errors of held-out values from tokens and from ``<cls>``."""
    model.eval()
    squares = [_squares(model, batch.to(where)) for batch in check]
    model.train()
    own, from_cls = (float(torch.cat(part).mean()) for part in zip(*squares, strict=True))
    return own, from_cls


def _optimiser(model: PretrainedTransformer, learning_rate: float) -> torch.optim.AdamW:
    """AdamW, with faster steps for the two layers whose output is in bins.

    Their targets run to 50 where every other quantity is of order one, and Adam moves a weight by
    about the learning rate per step whatever its gradient.
    """
    output = model.decoder.output
    torch.nn.init.constant_(output.bias, model.config.n_bins / 2)
    last: list[Tensor] = [output.weight, output.bias, model.mvc_decoder.W.weight]
    apart = {id(p) for p in last}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": rest},
        {"params": last, "lr": _LAST_LAYER * learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=_WEIGHT_DECAY)


def _warm_up_then_cosine(n_steps: int) -> Callable[[int], float]:
    """Learning rate at a step, as a share of its highest."""
    rising = max(1, round(_WARM_UP * n_steps))

    def share(step: int) -> float:
        fallen = min(max((step - rising) / max(1, n_steps - rising), 0), 1)
        return min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * fallen)))

    return share
