"""What the negative binomial's dispersion should depend on, by the likelihood of new donors' cells.

Every cell is dealt out to two halves, molecule by molecule: one is encoded, and the likelihood is
that of the other, given the decoded composition and the half's own total. A thinned negative
binomial has the inverse dispersion of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from benchmarks.cells import Cells
from benchmarks.choices import epochs
from benchmarks.composition.world import World
from benchmarks.splits import make_splits
from cfgen_augment import CFGen
from cfgen_augment.likelihoods import NegativeBinomial

Rows = list[dict[str, Any]]

_GRID = np.linspace(np.log(0.1), np.log(1e4), 24)  # log theta tried; the last is all but Poisson
_PRIOR_CELLS = 50.0  # all labels' cells count as this many of a label's own
_BLOCK = 500
_MOST_TRAINING = 4_000  # cells that dispersions are fitted to by likelihood


def dispersion(world: World, seed: int, n_splits: int) -> Rows:
    """Held-out log likelihood per cell of every structure of the dispersion.

    `CFGen` is trained on the training donors of one split for every seed, as it is with either
    value of its parameter `dispersion`. Structures are then fitted by maximum likelihood with the
    means of the first model.

    Returns
    -------
    list of dict
        One per structure: nats per cell, ``cells`` the mean over the held-out donors' cells,
        ``types`` the mean over their types.
    """
    split = make_splits(world.cells, n_splits=n_splits, reserve=0.0)[seed % n_splits]
    train, test = world.cells.take(split.train), world.cells.take(split.test)
    known = np.isin(test.labels, train.labels)
    test = test.take(known)
    rng = np.random.default_rng([seed, 5])
    models = {}
    for structure in ("gene", "gene-label"):
        with epochs(flow=0.0):  # one: only the autoencoder is looked at
            model = CFGen(dispersion=structure, random_state=seed)
            models[structure] = model.fit(train.counts, train.labels)
    some = train.take(rng.permutation(len(train))[:_MOST_TRAINING])
    split_seed = int(rng.integers(2**32))
    profiles = [_profile(models["gene"], cells, split_seed) for cells in (some, test)]
    codes = np.searchsorted(models["gene"].classes_, test.labels)
    cells = np.bincount(codes, minlength=len(models["gene"].classes_))
    rows = []
    for name, theta in _structures(profiles[0], some, models["gene"].classes_).items():
        of_labels = np.take_along_axis(profiles[1], theta[None], axis=0)[0].sum(axis=1)
        rows.append({"dispersion": name, "fitted by": "likelihood", **_means(of_labels, cells)})
    for name, model in models.items():
        of_labels = _as_fitted(model, test, split_seed)
        shown = {"gene": "per gene", "gene-label": "per gene and label"}[name]
        rows.append({"dispersion": shown, "fitted by": "CFGen", **_means(of_labels, cells)})
    return rows


def _means(of_labels: NDArray[np.float64], cells: NDArray[np.int64]) -> dict[str, float]:
    seen = cells > 0
    return {
        "cells": float(of_labels.sum() / cells.sum()),
        "types": float((of_labels[seen] / cells[seen]).mean()),
    }


def _structures(
    profile: NDArray[np.float64], cells: Cells, names: NDArray
) -> dict[str, NDArray[np.int64]]:
    """Most likely position in the grid, ``(n_labels, n_genes)``, by what it may depend on."""
    _, n_labels, n_genes = profile.shape
    sizes = np.array([(cells.labels == name).sum() for name in names])
    everyone = profile.sum(axis=1, keepdims=True)
    prior = everyone * (_PRIOR_CELLS / sizes.sum())

    def best(likelihood: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.broadcast_to(likelihood.argmax(axis=0), (n_labels, n_genes))

    return {
        "none (Poisson)": np.full((n_labels, n_genes), len(_GRID) - 1),
        "one for all": best(everyone.sum(axis=2, keepdims=True)),
        "per label": best((profile + prior).sum(axis=2, keepdims=True)),
        "per gene": best(everyone),
        "per gene and label": best(profile + prior),
    }


def _profile(model: CFGen, cells: Cells, seed: int) -> NDArray[np.float64]:
    """Log likelihood of all cells of a label for every gene and theta tried.

    Shape ``(n_tried, n_labels, n_genes)``.
    """
    noise = NegativeBinomial(cells.counts.shape[1])
    found = np.zeros((len(_GRID), len(model.classes_), cells.counts.shape[1]))
    for counts, log_mean, labels in _halves(model, cells, seed):
        for k, log_theta in enumerate(_GRID):
            with torch.no_grad():
                noise.log_theta.fill_(float(log_theta))
                log_prob = noise.log_prob(counts, log_mean).double().numpy()
            np.add.at(found[k], labels, log_prob)
    return found


def _as_fitted(model: CFGen, cells: Cells, seed: int) -> NDArray[np.float64]:
    """Log likelihood of all cells of every label with the dispersion that the model came with."""
    found = np.zeros(len(model.classes_))
    for counts, log_mean, labels in _halves(model, cells, seed):
        with torch.no_grad():
            (likelihood,) = model.network_.autoencoder.likelihoods
            log_prob = likelihood.log_prob(counts, log_mean, torch.from_numpy(labels))
        np.add.at(found, labels, log_prob.double().numpy().sum(axis=1))
    return found


def _halves(
    model: CFGen, cells: Cells, seed: int
) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
    """Blocks of cells: half the molecules, their log mean given the other half, label codes."""
    rng = np.random.default_rng(seed)
    autoencoder = model.network_.autoencoder
    codes = np.searchsorted(model.classes_, cells.labels)
    for start in range(0, len(cells), _BLOCK):
        whole = cells.counts[start : start + _BLOCK].tocsr()
        seen = whole.copy()
        seen.data = rng.binomial(np.rint(whole.data).astype(np.int64), 0.5).astype(np.float32)
        rest = sparse.csr_matrix(whole - seen)
        latents = torch.from_numpy(model.encode(seen))
        totals = np.maximum(np.asarray(rest.sum(axis=1)), 1.0)
        log_size = torch.as_tensor(np.log(totals), dtype=torch.float32)
        with torch.no_grad():
            (log_mean,) = autoencoder.decode(latents, log_size)
        counts = torch.from_numpy(rest.toarray().astype(np.float32))
        yield counts, log_mean, codes[start : start + _BLOCK]
