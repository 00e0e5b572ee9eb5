"""Guidance weights of type and donor, from unconditional to beyond the intersection."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.composition.space import Space, coverage, distances
from benchmarks.composition.world import World
from cfgen_augment import CFGen

Rows = list[dict[str, Any]]

#: Weights of type and donor in Eq. 10; a single number weighs both together.
WEIGHTS: tuple[tuple[float, float] | float, ...] = (
    *((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0)),
    *((0.0, 0.5), (0.0, 1.0), (0.0, 2.0)),
    *((0.5, 0.5), (1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0)),
    *(1.0, 2.0),
)

_CELLS = 1500  # generated with every choice of weights, and real ones they are read beside
_LEAST = 30  # cells of a combination, for distances


def sweep(world: World, model: CFGen, space: Space, seed: int) -> Rows:
    """Cells of every choice of weights, for types and donors as a sample of real cells has them.

    Returns
    -------
    list of dict
        One for each choice, one (``real``) of other real cells instead of generated ones. Of the
        ten nearest real cells, the shares that carry the wanted type and the wanted donor;
        coverage of the sample; distance of the proportions of types; W2 and MMD to the sample's
        cells of the same type and donor, mean over combinations of 30 cells or more.
    """
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(world.cells))
    n = min(_CELLS, len(order) // 2)
    sample, others = order[:n], order[n : 2 * n]
    labels, donors = world.cells.labels[sample], world.donors[sample]
    real = space.real[sample]

    combinations = np.char.add(np.char.add(labels.astype(str), "\t"), donors.astype(str))
    names, sizes = np.unique(combinations, return_counts=True)
    large = [combinations == name for name in names[sizes >= _LEAST]]

    def measured(places: np.ndarray) -> dict[str, float]:
        found = space.shares(places, labels, donors)
        found["coverage"] = coverage(real, places)
        found["types off"] = space.proportions_off(places)
        of_each = [distances(real[own], places[own]) for own in large]
        for name in ("W2", "MMD"):
            found[name] = float(np.mean([each[name] for each in of_each])) if of_each else np.nan
        return found

    # Real cells in place of generated ones: each its own type and donor.
    own = space.shares(
        space.real[others], world.cells.labels[others], world.donors[others], are_real=True
    )
    beside = {
        "coverage": coverage(real, space.real[others]),
        "types off": space.proportions_off(space.real[others], are_real=True),
    }
    of_each = []
    for rows in large:
        first = np.flatnonzero(rows)[0]
        same = (world.cells.labels[others] == labels[first]) & (
            world.donors[others] == donors[first]
        )
        of_each.append(distances(real[rows], space.real[others[same]]))
    for name in ("W2", "MMD"):
        beside[name] = float(np.nanmean([each[name] for each in of_each])) if of_each else np.nan
    rows_out: Rows = [{"weights": "real", **own, **beside}]
    for weights in WEIGHTS:
        if isinstance(weights, tuple):
            guidance: Any = {"label": weights[0], "donor": weights[1]}
            name = f"{weights[0]:g}, {weights[1]:g}"
        else:
            guidance, name = weights, f"together {weights:g}"
        new = model.generate(
            labels, covariates={"donor": donors}, guidance=guidance, random_state=seed
        )
        rows_out.append({"weights": name, **measured(space.place(new))})
    return rows_out
