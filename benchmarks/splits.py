"""Which donors are held out, and which cells of the others are trained on."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import Cells

logger = logging.getLogger(__name__)

_LEAVE_ONE_OUT = 5  # donors up to which each is held out once
_INNER_HELD_OUT = 0.3  # share of a split's training donors that its inner split holds out
_INNER_FOLDS = 3  # folds that stand in for them where cells have no donors
_INNER_SEED = 100  # added to the seed, so that no inner split deals as an outer one does


@dataclass(frozen=True)
class Split:
    """Rows of the cells that are trained on, tested on, and kept aside.

    Attributes
    ----------
    number
        Position among the splits, from 0.
    held_out
        Donors whose cells are tested on; empty where folds stand in for donors.
    train, test, pool
        Rows, ascending and disjoint. The pool are cells of the training donors (or folds) that
        are neither trained nor tested on.
    """

    number: int
    held_out: tuple[str, ...]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    pool: NDArray[np.int64]


def make_splits(
    cells: Cells,
    *,
    n_splits: int = 5,
    held_out_fraction: float = 0.2,
    thin: Mapping[str, int] | None = None,
    reserve: float = 0.1,
    seed: int = 0,
) -> list[Split]:
    """Hold donors out several times, then choose the training cells of the others.

    Every split holds out another set of donors, and every donor is held out about equally often.
    With five donors or fewer each is held out once, whatever `n_splits` says. Without donors,
    `n_splits` stratified folds stand in, and `held_out_fraction` does not apply.

    A split depends on `seed`, its number, and who the cells are, not on their counts, and not on
    how many splits there are (folds do). Cells that stay when a type is thinned to few also stay
    when it is thinned to more, and thinning one type does not touch the others.

    Parameters
    ----------
    cells
        All cells.
    n_splits
        How many splits.
    held_out_fraction
        Share of donors in each test set, rounded, at least one donor.
    thin
        Types made rare and how many of their cells to train on; the others go to the pool.
    reserve
        Share of every other type's training cells, rounded down, that goes to the pool: cells of
        the training donors that nothing was fitted on.
    seed
        Source of all randomness.

    Returns
    -------
    list of Split
        In the order of their numbers.

    Raises
    ------
    ValueError
        If there are too few donors or cells, if a type to thin does not exist or is absent from
        the training donors of a split, or if a number is out of range.
    """
    thin = dict(thin or {})
    _check(cells, n_splits, held_out_fraction, thin, reserve)
    splits = []
    for number, (held_out, tested) in enumerate(
        _folds(cells, n_splits, seed)
        if cells.donors is None
        else _by_donor(cells.donors, n_splits, held_out_fraction, seed)
    ):
        name = f"split {number}" + (f" (held out: {', '.join(held_out)})" if held_out else "")
        rest = np.flatnonzero(~tested)
        unseen = sorted(set(cells.labels[tested].tolist()) - set(cells.labels[rest].tolist()))
        absent = sorted(set(thin) - set(cells.labels[rest].tolist()))
        if absent:
            raise ValueError(
                f"thin: expected types that the training donors have; {name} has no training "
                f"cells of {', '.join(map(repr, absent))}. Do not thin them, or change the seed."
            )
        if unseen:
            logger.warning(
                "%s: types in the test set without training cells, which nothing can find there: "
                "%s.",
                name,
                ", ".join(map(repr, unseen)),
            )
        trained = _trained(cells, rest, thin, reserve, np.random.default_rng([seed, number]))
        splits.append(
            Split(
                number,
                held_out,
                np.flatnonzero(trained),
                np.flatnonzero(tested),
                np.flatnonzero(~tested & ~trained),
            )
        )
    return splits


def inner_splits(
    cells: Cells,
    *,
    n_splits: int = 5,
    held_out_fraction: float = 0.2,
    thin: Mapping[str, int] | None = None,
    reserve: float = 0.1,
    seed: int = 0,
) -> list[Split]:
    """One split within the training donors of each split of `make_splits`.

    What a default is chosen on: three in ten of a split's training donors are held out, and the
    donors that the split itself holds out are not in its inner split. They are in those of others.

    Parameters
    ----------
    cells, n_splits, held_out_fraction, seed
        As for `make_splits`, whose training donors are meant.
    thin, reserve
        As there, of the cells trained on inside.

    Returns
    -------
    list of Split
        In the order of the outer splits and with their numbers; rows are those of `cells`.

    Raises
    ------
    ValueError
        As `make_splits`, outside and inside.
    """
    outer = make_splits(
        cells,
        n_splits=n_splits,
        held_out_fraction=held_out_fraction,
        reserve=0.0,
        seed=seed,
    )
    found = []
    for split in outer:
        (inner, *_) = make_splits(
            cells.take(split.train),
            n_splits=_INNER_FOLDS,
            held_out_fraction=_INNER_HELD_OUT,
            thin=thin,
            reserve=reserve,
            seed=seed + _INNER_SEED + split.number,
        )
        train, test, pool = (split.train[rows] for rows in (inner.train, inner.test, inner.pool))
        found.append(Split(split.number, inner.held_out, train, test, pool))
    return found


def parse_thin(text: str) -> dict[str, int]:
    """Types and numbers of cells from ``"type:20,other type:40"``.

    A number follows the last colon of each part, so names may contain colons. They cannot contain
    commas.

    Raises
    ------
    ValueError
        If a part is not of that form, or a type comes twice.

    Examples
    --------
    >>> parse_thin("FCGR3A+ Monocytes:20, B cells:40")
    {'FCGR3A+ Monocytes': 20, 'B cells': 40}
    """
    thin: dict[str, int] = {}
    for part in text.split(",") if text.strip() else []:
        name, colon, number = (piece.strip() for piece in part.rpartition(":"))
        if not (colon and name and number.isascii() and number.isdigit() and int(number) > 0):
            raise ValueError(
                f"thin: expected 'type:cells' with one training cell or more, separated by commas, "
                f"such as 'B cells:40,NK cells:20'; got {part.strip()!r}."
            )
        if name in thin:
            raise ValueError(f"thin: expected every type once; got {name!r} twice.")
        thin[name] = int(number)
    return thin


def _check(
    cells: Cells, n_splits: int, held_out_fraction: float, thin: Mapping[str, int], reserve: float
) -> None:
    if n_splits < 1:
        raise ValueError(f"n_splits: expected 1 or more; got {n_splits}.")
    if not 0 < held_out_fraction < 1:
        raise ValueError(
            f"held_out_fraction: expected a share between 0 and 1; got {held_out_fraction}."
        )
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve: expected a share from 0 to below 1; got {reserve}.")
    sizes = cells.sizes()
    unknown = [name for name in thin if name not in sizes]
    if unknown:
        raise ValueError(
            f"thin: expected types among {', '.join(map(repr, sizes))}; got "
            f"{', '.join(map(repr, unknown))}."
        )
    for name, n in thin.items():
        if n < 1:
            raise ValueError(f"thin: expected 1 cell of {name!r} or more; got {n}.")
    if len(sizes) < 2:
        raise ValueError(
            f"labels: expected two types or more; got {', '.join(map(repr, sizes)) or 'no cells'}."
        )


def _by_donor(
    donors: NDArray, n_splits: int, fraction: float, seed: int
) -> list[tuple[tuple[str, ...], NDArray[np.bool_]]]:
    """Held-out donors of each split and a mask of their cells."""
    names = [str(name) for name in np.unique(donors)]
    if len(names) < 2:
        raise ValueError(
            f"donors: expected two or more, so that one can be held out; got "
            f"{', '.join(names) or 'none'}. Leave donors out to use stratified folds."
        )
    if len(names) <= _LEAVE_ONE_OUT:
        if n_splits != len(names):
            logger.warning(
                "%d donors: each is held out once, which makes %d splits instead of %d.",
                len(names),
                len(names),
                n_splits,
            )
        chosen: list[tuple[str, ...]] = [(name,) for name in names]
    else:
        chosen = _deal(names, n_splits, fraction, seed)
    return [(held_out, np.isin(donors, held_out)) for held_out in chosen]


def _deal(names: Sequence[str], n_splits: int, fraction: float, seed: int) -> list[tuple[str, ...]]:
    """A different set of donors for each split, those held out least often first."""
    n_out = max(1, min(round(fraction * len(names)), len(names) - 1))
    possible = math.comb(len(names), n_out)
    if n_splits > possible:
        raise ValueError(
            f"n_splits: expected at most the {possible} different ways to hold out {n_out} of "
            f"{len(names)} donors; got {n_splits}. Lower n_splits."
        )
    # Not the streams that choose cells, which are seeded with [seed, number].
    rng = np.random.default_rng([seed, 0, 1])
    times = np.zeros(len(names), dtype=int)
    sets: list[tuple[str, ...]] = []
    attempts = 0
    while len(sets) < n_splits:
        # After many repeats of sets already dealt, being new counts more than being even.
        order = np.lexsort((rng.random(len(names)), times if attempts < 100 else 0 * times))
        chosen = np.sort(order[:n_out])
        held_out = tuple(names[i] for i in chosen)
        attempts += 1
        if held_out not in sets:
            sets.append(held_out)
            times[chosen] += 1
            attempts = 0
    return sets


def _folds(
    cells: Cells, n_splits: int, seed: int
) -> list[tuple[tuple[str, ...], NDArray[np.bool_]]]:
    """No donors, and a mask of each stratified fold."""
    from sklearn.model_selection import StratifiedKFold

    largest = max(cells.sizes().values())
    if not 2 <= n_splits <= largest:
        raise ValueError(
            f"n_splits: expected from 2 to {largest} folds, the cells of the largest type, because "
            f"the cells have no donors; got {n_splits}."
        )
    folds = StratifiedKFold(n_splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Of types with fewer cells than folds, which some test sets then lack.
        warnings.simplefilter("ignore", UserWarning)
        rows = [test for _, test in folds.split(np.zeros(len(cells)), cells.labels)]
    return [((), np.isin(np.arange(len(cells)), test)) for test in rows]


def _trained(
    cells: Cells,
    rest: NDArray[np.int64],
    thin: Mapping[str, int],
    reserve: float,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """Mask of the cells among `rest` that are trained on."""
    # One number per cell, whatever is thinned, orders the cells of every type.
    rank = rng.random(len(cells))
    trained = np.zeros(len(cells), dtype=bool)
    labels = cells.labels[rest]
    for name in np.unique(labels):
        rows = rest[labels == name]
        n_kept = thin.get(str(name), rows.size - math.floor(reserve * rows.size))
        trained[rows[np.argsort(rank[rows], kind="stable")][:n_kept]] = True
    return trained
