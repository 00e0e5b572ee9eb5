"""Cells to compose attributes on, and further cells of a combination where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import Cells
from benchmarks.data import load_cells
from benchmarks.simulated import Truth, simulate

#: Simulations by name, and the standard deviation of what a donor does to one type alone.
SIMULATIONS = {"additive": 0.0, "interaction": 0.2}

_RAREST = 0.04  # expected share of the rarest type, so that most combinations have cells
_DONOR_SD = 0.3
_DONOR_DEPTH_SD = 0.3


@dataclass(frozen=True)
class World:
    """What a part is measured on.

    Attributes
    ----------
    cells
        Cells with types and donors.
    truth
        What they were simulated from; None for real cells.
    """

    cells: Cells
    truth: Truth | None = None

    @property
    def donors(self) -> NDArray:
        """Donor of every cell."""
        assert self.cells.donors is not None  # checked by `load_world`
        return self.cells.donors

    def without(self, combinations: list[tuple[str, str]]) -> NDArray[np.bool_]:
        """Which cells are of none of the (type, donor) combinations."""
        kept = np.ones(len(self.cells), dtype=bool)
        for name, donor in combinations:
            kept &= ~((self.cells.labels == name) & (self.donors == donor))
        return kept


@lru_cache(maxsize=2)
def load_world(
    data: str,
    variant: str,
    label_key: str | None = None,
    donor_key: str | None = None,
    layer: str | None = None,
) -> World:
    """Cells of a data set, or one of the simulations.

    Parameters
    ----------
    data, label_key, donor_key, layer
        As for `load_cells`; ``"simulated"`` is made here, with donors that differ in depth.
    variant
        ``"real"``, or of the simulated data a name of `SIMULATIONS`.

    Raises
    ------
    ValueError
        If the cells have no donors.
    """
    if data == "simulated":
        cells, truth = simulate(
            rarest=_RAREST,
            donor_sd=_DONOR_SD,
            interaction_sd=SIMULATIONS[variant],
            donor_depth_sd=_DONOR_DEPTH_SD,
        )
        return World(cells, truth)
    cells = load_cells(data, label_key=label_key, donor_key=donor_key, layer=layer)
    if cells.donors is None:
        raise ValueError(
            f"--data {data}: expected cells of several donors, to compose with types; these have "
            "none. Pass --donor-key."
        )
    return World(cells)


def variants(data: str) -> tuple[str, ...]:
    """What there is of a data set: its cells, or the simulations."""
    return tuple(SIMULATIONS) if data == "simulated" else ("real",)
