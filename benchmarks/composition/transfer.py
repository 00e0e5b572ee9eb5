"""Cells of one donor translated to another, and simpler ways to get there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cells import Cells
from benchmarks.composition.space import Space, distances
from benchmarks.composition.world import World
from cfgen_augment import CFGen

Rows = list[dict[str, Any]]

_PAIRS = 4  # of donors
_PER_TYPE = 100


def transfer(world: World, model: CFGen, space: Space, seed: int) -> Rows:
    """Cells of some donors as they are, and carried to another donor in every way.

    Returns
    -------
    list of dict
        One per pair of donors and way: of the ten nearest real cells, the shares that carry the
        cell's type, the donor it is from and the donor it is to be; W2 to that donor's real cells
        of the type, mean over types. ``floor`` is between halves of those. All ways draw counts
        anew, to each cell's own total, but for ``untranslated``.
    """
    rng = np.random.default_rng([seed, 6])
    donors = np.unique(world.donors)
    rows: Rows = []
    for _ in range(_PAIRS):
        source, target = (str(donor) for donor in rng.choice(donors, 2, replace=False))
        there = {
            str(name): rng.permutation(
                np.flatnonzero((world.cells.labels == name) & (world.donors == target))
            )[: 2 * _PER_TYPE]
            for name in np.unique(world.cells.labels)
        }
        chosen = np.concatenate(
            [
                rng.permutation(
                    np.flatnonzero((world.cells.labels == name) & (world.donors == source))
                )[:_PER_TYPE]
                for name in there
            ]
        )
        cells = world.cells.take(chosen)
        pair = {"from": source, "to": target}
        floor = [
            distances(space.real[own[::2]], space.real[own[1::2]])["W2"] for own in there.values()
        ]
        rows.append({**pair, "way": "real cells of the target", "W2": float(np.nanmean(floor))})
        for way, counts in _ways(model, cells, target, seed):
            places = space.place(counts)
            near = space.neighbours(places, are_real=way == "untranslated")
            apart = [
                distances(space.real[own[::2]], places[cells.labels == name])["W2"]
                for name, own in there.items()
            ]
            rows.append(
                {
                    **pair,
                    "way": way,
                    "type": float((space.labels[near] == cells.labels[:, None]).mean()),
                    "source donor": float((space.donors[near] == source).mean()),
                    "target donor": float((space.donors[near] == target).mean()),
                    "W2": float(np.nanmean(apart)),
                }
            )
    return rows


def _ways(
    model: CFGen, cells: Cells, target: str, seed: int
) -> list[tuple[str, sparse.csr_matrix]]:
    donors = np.asarray(cells.donors)
    wanted = np.repeat(target, len(cells))
    totals = np.asarray(cells.counts.sum(axis=1), dtype=np.float64).ravel()
    same: dict[str, Any] = {"size_factors": np.maximum(totals, 1.0), "random_state": seed}
    there: dict[str, Any] = {
        "covariates": {"donor": donors},
        "to": {"donor": target},
        "random_state": seed,
    }
    latents = model.encode(cells.counts)
    shift = _centres(model, cells.labels, wanted) - _centres(model, cells.labels, donors)
    at_target = {"covariates": {"donor": wanted}, **same}
    return [
        ("untranslated", cells.counts),
        ("counts drawn anew", model.generate(cells.labels, latents=latents, **same)),
        (
            "shifted by the donors' centres",
            model.generate(cells.labels, latents=latents + shift, **at_target),
        ),
        ("translated", model.translate(cells.counts, cells.labels, **there)),
        (
            "translated, Eq. 10",
            model.translate(cells.counts, cells.labels, **there, guidance={"label": 1.0}),
        ),
        (
            "translated, donor weight 2",
            model.translate(cells.counts, cells.labels, **there, guidance={"donor": 2.0}),
        ),
        ("translated without labels", model.translate(cells.counts, **there)),
        ("generated for the target", model.generate(cells.labels, **at_target)),
    ]


def _centres(model: CFGen, labels: NDArray, donors: NDArray) -> NDArray[np.float32]:
    """The flow's centres for types and donors, in units of latents, ``(n_cells, n_latent)``."""
    codes = model.attributes_.encode({"label": labels, "donor": donors}, len(labels))
    network = model.network_
    with torch.no_grad():
        placed = network.field.centre(torch.as_tensor(codes + 1, device=network.device))
        return (placed * network.latent_scale).cpu().numpy()
