"""Depth as a technical effect: totals drawn per donor, with the flow conditioned on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.composition.space import Space, log_profile
from benchmarks.composition.world import World
from cfgen_augment import CFGen

Rows = list[dict[str, Any]]

_PER_DONOR = 400
_PER_TYPE = 300
_FACTORS = (0.5, 1.0, 2.0)


def totals_of_donors(world: World, model: CFGen, seed: int) -> Rows:
    """Median totals of real cells of every donor, and of cells generated for as many of each type.

    Returns
    -------
    list of dict
        One per donor, ``of`` its name, and one per type.
    """
    rng = np.random.default_rng([seed, 3])
    donors = world.donors
    chosen = np.concatenate(
        [rng.choice(np.flatnonzero(donors == donor), _PER_DONOR) for donor in np.unique(donors)]
    )
    labels = world.cells.labels[chosen]
    new = model.generate(labels, covariates={"donor": donors[chosen]}, random_state=seed)
    real_totals, totals = _totals(world.cells.counts), _totals(new)
    rows: Rows = []
    for attribute, all_values, values in (
        ("donor", donors, donors[chosen]),
        ("type", world.cells.labels, labels),
    ):
        rows += [
            {
                "attribute": attribute,
                "of": str(value),
                "size_factor": model.size_factor,
                "real": float(np.median(real_totals[all_values == value])),
                "synthetic": float(np.median(totals[values == value])),
            }
            for value in np.unique(values)
        ]
    return rows


def biology_at_depths(world: World, model: CFGen, seed: int) -> Rows:
    """Cells of a type and donor at half, once and twice the type's median total.

    All are thinned, molecule by molecule, to the expected total of the shallow ones, so that what
    differs is not how much was counted.

    Returns
    -------
    list of dict
        One per type and depth: the share of the ten nearest real cells, likewise thinned, that
        carry the type; and the correlation over genes of the type's difference from all types, in
        log mean expression, with that of real cells. ``way`` is ``real`` for the real cells that
        are shallowest, in the middle and deepest of their type, the thirds of it.
    """
    rng = np.random.default_rng([seed, 4])
    real_totals = _totals(world.cells.counts)
    shallow = np.zeros(len(world.cells))
    types = [str(name) for name in np.unique(world.cells.labels)]
    median = {name: float(np.median(real_totals[world.cells.labels == name])) for name in types}
    for name in types:
        shallow[world.cells.labels == name] = _FACTORS[0] * median[name]
    real = _thinned(world.cells.counts, shallow, rng)
    thinned = Space(replace(world.cells, counts=real))
    everywhere = np.mean([log_profile(real[world.cells.labels == name]) for name in types], axis=0)
    rows: Rows = []
    for name in types:
        own = np.flatnonzero(world.cells.labels == name)
        wanted = log_profile(real[own]) - everywhere
        by_depth = own[np.argsort(real_totals[own], kind="stable")]
        thirds = zip(_FACTORS, np.array_split(by_depth, len(_FACTORS)), strict=True)
        made = [("real", factor, real[third], True, third) for factor, third in thirds]
        sources = rng.choice(own, _PER_TYPE)
        for factor in _FACTORS:
            new = model.generate(
                np.repeat(name, _PER_TYPE),
                covariates={"donor": world.donors[sources]},
                size_factors=np.full(_PER_TYPE, factor * median[name]),
                random_state=seed,
            )
            kept = _thinned(new, np.full(_PER_TYPE, _FACTORS[0] * median[name]), rng)
            made.append(("synthetic", factor, kept, False, sources))
        for way, factor, counts, are_real, cells in made:
            places = thinned.place(counts)
            shares = thinned.shares(
                places, np.repeat(name, len(places)), world.donors[cells], are_real=are_real
            )
            difference = log_profile(counts) - everywhere
            rows.append(
                {
                    "way": way,
                    "depth": factor,
                    "type name": name,
                    **shares,
                    "corr": float(np.corrcoef(difference, wanted)[0, 1]),
                }
            )
    return rows


def _thinned(
    counts: sparse.csr_matrix, totals: NDArray[np.float64], rng: np.random.Generator
) -> sparse.csr_matrix:
    """Cells that keep each molecule with one chance per cell, so as to expect these totals."""
    share = np.minimum(totals / np.maximum(_totals(counts), 1.0), 1.0)
    kept = counts.astype(np.float32).tocsr(copy=True)
    kept.data = rng.binomial(
        np.rint(kept.data).astype(np.int64), np.repeat(share, np.diff(kept.indptr))
    ).astype(np.float32)
    kept.eliminate_zeros()
    return kept


def _totals(counts: sparse.csr_matrix) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
