"""`diagnose`: what of the generated cells differs from the real ones, type by type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA

from cfgen_augment.counts import total_counts
from cfgen_augment.measures import (
    exact_copies,
    log_normalise,
    mean_correlation,
    mean_variance_slope,
    nearest,
    separability,
    wasserstein,
    zero_fraction,
)
from cfgen_augment.pairs import Pairs, paired
from cfgen_augment.parameters import RandomState

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Fewest cells on a side for a type to be judged: it takes twice as many real cells.
MIN_CELLS = 20


class Limit(NamedTuple):
    """The largest excess over real cells that is still ok: ``tolerated + factor * noise``.

    Attributes
    ----------
    tolerated
        What is accepted however many cells there are.
    factor
        How many times the noise is accepted beside it.
    noise
        What says how much real cells differ among themselves: columns of the table, or ``m`` or
        ``n``, cells on a side.
    """

    tolerated: float
    factor: float
    noise: str


#: Limits by column; what the excess of each is, `diagnose` says.
LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "mean_corr": Limit(0.02, 0.5, "1 - mean_corr_floor"),
        "zeros_diff": Limit(0.02, 3.0, "zeros_floor"),
        "slope_diff": Limit(0.05, 3.0, "slope_floor"),
        "w2": Limit(0.10, 0.5, "1 / sqrt(m)"),
        "auc": Limit(0.20, 0.5, "1 / sqrt(m)"),
        "closest_ratio": Limit(0.10, 0.25, "1 / sqrt(n)"),
        "near_copies": Limit(0.02, 0.25, "1 / sqrt(n)"),
    }
)
TOO_FEW = "too few cells"

_COLUMNS = (
    *("n_real", "n_synthetic", "n_compared", "mean_corr", "mean_corr_floor"),
    *("zeros_real", "zeros_synthetic", "zeros_diff", "zeros_floor"),
    *("slope_real", "slope_diff", "slope_floor"),
    *("w2", "w2_floor", "auc", "auc_floor"),
    *("closest_ratio", "near_copies", "near_copies_floor", "exact_copies", "verdict"),
)
_WHOLE = ("n_real", "n_synthetic", "n_compared")
_SPLITS = 5  # of the real cells into halves
_COMPONENTS = 30
_SEEKING = 500  # cells whose nearest neighbours are sought
_FEWEST_NEIGHBOURS = 5  # real cells for distances among them to have a median


def diagnose(
    real: AnnData | Pairs,
    synthetic: AnnData | None = None,
    label_key: str | None = None,
    *,
    layer: str | None = None,
    key_added: str | None = None,
    max_cells: int = 1000,
    random_state: RandomState = 0,
) -> pd.DataFrame:
    r"""Compare generated with real cells of every type, beside real with real cells.

    Distances and classifiers depend on how many cells they see, and real cells differ among
    themselves. So the real cells are split into halves at random, five times; generated cells are
    measured against one half, the other half is measured against it in the same way, which is the
    floor, and all have ``m`` cells. Means over the splits are given.

    Parameters
    ----------
    real
        Real cells with raw counts, ``(n_obs, n_vars)``, in memory or backed; or what `augment`
        returned, which holds generated cells too.
    synthetic
        Generated cells with the same genes; None if `real` holds them. If their obs marks
        generated cells, only these are taken.
    label_key
        Column of obs with the types.
    layer
        Layer with the raw counts; None uses ``X``.
    key_added
        Column of obs that marks generated cells; None uses what `augment` noted in uns, or
        ``"is_synthetic"``.
    max_cells
        Most real and most generated cells of a type that are read; larger types are sampled.
        Copies of real cells that are not in the sample go unseen, so raise it to be sure of
        large types.
    random_state
        Seed of samples and splits.

    Returns
    -------
    DataFrame
        Indexed by ``type``, fewest real cells first. NaN where a type has too few cells.

        ``n_real``, ``n_synthetic``, ``n_compared``
            Cells there are, and cells ``m`` on a side of what is measured against a floor: the
            least of half the real cells, the generated cells, and half of `max_cells`.
        ``mean_corr``, ``mean_corr_floor``
            Pearson correlation, over genes, of mean log-normalised values.
        ``zeros_real``, ``zeros_synthetic``, ``zeros_diff``, ``zeros_floor``
            Fraction of zeros among all counts read; synthetic minus real; and the absolute
            difference of real halves.
        ``slope_real``, ``slope_diff``, ``slope_floor``
            Slope of the log variance of counts on their log mean; synthetic minus real; and the
            absolute difference of real halves.
        ``w2``, ``w2_floor``
            2-Wasserstein distance, exact, in up to 30 principal components of the log-normalised
            cells of the type, real and generated.
        ``auc``, ``auc_floor``
            Classifier two-sample test: area under the ROC curve of a cross-validated logistic
            regression of real against generated, on these components, the log total count, and
            their squares. 0.5 is ideal.
        ``closest_ratio``
            Median distance of a generated cell to the closest real one, over that of a real cell
            to the closest other real one, between log-normalised values of all genes. It is 0
            for copies and 1 for new cells.
        ``near_copies``, ``near_copies_floor``
            Share of generated cells less than half the real cells' median distance from a real
            cell; and of real cells.
        ``exact_copies``
            Share of generated cells whose counts are those of a real cell.
        ``verdict``
            ``"ok"``, or the columns that fail, or ``"too few cells"`` below `MIN_CELLS` on a side
            (twice as many real cells). Copies are looked for in small types too.

        A column fails if the measure exceeds what real cells have by more than `LIMITS` says,
        where ``n`` is the fewer of real and generated cells read:

        =================  ===================================  ====================================
        column             excess                               limit
        =================  ===================================  ====================================
        ``mean_corr``      ``mean_corr_floor - mean_corr``      ``.02 + .5 (1 - mean_corr_floor)``
        ``zeros_diff``     ``abs(zeros_diff)``                  ``.02 + 3 zeros_floor``
        ``slope_diff``     ``abs(slope_diff)``                  ``.05 + 3 slope_floor``
        ``w2``             ``w2 / w2_floor - 1``                ``.1 + .5 / sqrt(m)``
        ``auc``            ``auc - .5``                         ``.2 + .5 / sqrt(m)``
        ``closest_ratio``  ``1 - closest_ratio``                ``.1 + .25 / sqrt(n)``
        ``near_copies``    ``near_copies - near_copies_floor``  ``.02 + .25 / sqrt(n)``
        =================  ===================================  ====================================

    Raises
    ------
    TypeError
        If `real` or `synthetic` are not AnnData, or `label_key` is not given.
    KeyError
        If a column of obs or a layer is not there.
    ValueError
        If the cells that are read are not counts, there are no real or no generated cells, genes
        differ, or `max_cells` is too small.

    See Also
    --------
    cfgen_augment.plot : Figures of the same cells.

    Examples
    --------
    >>> import anndata, numpy as np
    >>> from cfgen_augment import diagnose
    >>> rng = np.random.default_rng(0)
    >>> def cells(rate):
    ...     counts = rng.poisson(rate, size=(100, 30))
    ...     return anndata.AnnData(counts, obs={"cell_type": ["T"] * 60 + ["B"] * 40})
    >>> diagnose(cells(2.0), cells(2.0), "cell_type")["verdict"].to_dict()
    {'B': 'ok', 'T': 'ok'}
    >>> "zeros_diff" in diagnose(cells(2.0), cells(1.0), "cell_type").loc["T", "verdict"]
    True
    """
    import pandas as pd

    if not isinstance(max_cells, Integral) or max_cells < 2 * MIN_CELLS:
        raise ValueError(
            f"max_cells: expected a whole number of at least {2 * MIN_CELLS}, twice the fewest "
            f"cells that are compared; got {max_cells!r}."
        )
    pairs = paired(
        real,
        synthetic,
        label_key,
        layer=layer,
        key_added=key_added,
        random_state=random_state,
    )
    rows = {}
    for i, label in enumerate(pairs.types):
        cells = pairs.sample(label, int(max_cells))
        row = {"n_real": pairs.real.number(label), "n_synthetic": pairs.synthetic.number(label)}
        row |= _measures(*cells, np.random.default_rng([pairs.seed, i, 2]))
        rows[label] = row | {"verdict": _verdict(row, min(c.shape[0] for c in cells))}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(_COLUMNS))
    numbers = dict.fromkeys(_COLUMNS[:-1], np.float64) | dict.fromkeys(_WHOLE, np.int64)
    return table.astype(numbers).rename_axis(index="type")


def _measures(
    real: sparse.csr_matrix, synthetic: sparse.csr_matrix, random: np.random.Generator
) -> dict[str, Any]:
    """All columns but the numbers of cells there are and the verdict."""
    m = min(real.shape[0] // 2, synthetic.shape[0])
    found: dict[str, Any] = {"n_compared": m}
    if not (real.shape[0] and synthetic.shape[0]):
        return found
    found["zeros_real"], found["zeros_synthetic"] = zero_fraction(real), zero_fraction(synthetic)
    found["zeros_diff"] = found["zeros_synthetic"] - found["zeros_real"]
    # Cells come in the order of the data: both, so that samples of them are of all.
    real, synthetic = (cells[random.permutation(cells.shape[0])] for cells in (real, synthetic))
    logs = log_normalise(real), log_normalise(synthetic)
    found |= _copies(real, synthetic, *logs)
    if m >= MIN_CELLS:
        found |= _against_halves(real[: 2 * m], synthetic[:m], *logs, random)
    return found


def _against_halves(
    real: sparse.csr_matrix,
    synthetic: sparse.csr_matrix,
    real_logs: sparse.csr_matrix,
    synthetic_logs: sparse.csr_matrix,
    random: np.random.Generator,
) -> dict[str, float]:
    """Measures of ``m`` generated cells against half of ``2 m`` real ones, and of halves."""
    m = synthetic.shape[0]
    counts = sparse.vstack([real, synthetic], format="csr")
    logs = sparse.vstack([real_logs[: 2 * m], synthetic_logs[:m]], format="csr")
    seed = int(random.integers(2**31))
    # Components hold some of the noise of the cells they are fitted to, who then lie further out
    # than others. Here each of the three samples has as large a part in them.
    places = _components(logs, min(_COMPONENTS, m // 2), seed)
    features = np.column_stack([places, np.log(total_counts(counts))])
    new = np.arange(2 * m, 3 * m)
    splits = []
    for i in range(_SPLITS):
        half, other = np.split(random.permutation(2 * m), 2)
        slope, zeros = mean_variance_slope(counts[half]), zero_fraction(counts[half])
        splits.append(
            {
                "mean_corr": mean_correlation(logs[half], logs[new]),
                "mean_corr_floor": mean_correlation(logs[half], logs[other]),
                "zeros_floor": abs(zero_fraction(counts[other]) - zeros),
                "slope_real": slope,
                "slope_diff": mean_variance_slope(counts[new]) - slope,
                "slope_floor": abs(mean_variance_slope(counts[other]) - slope),
                "w2": wasserstein(places[half], places[new]),
                "w2_floor": wasserstein(places[half], places[other]),
                "auc": separability(features[half], features[new], seed=seed + i),
                "auc_floor": separability(features[half], features[other], seed=seed + i),
            }
        )
    return {name: float(np.mean([split[name] for split in splits])) for name in splits[0]}


def _components(logs: sparse.csr_matrix, width: int, seed: int) -> NDArray[np.float64]:
    """Principal components of cells, ``(n_cells, width)``.

    All genes instead where there are too few of them, or none that varies.
    """
    if width >= logs.shape[1] or (logs.max(axis=0) != logs.min(axis=0)).nnz == 0:
        return logs.toarray().astype(np.float64)
    space = PCA(width, svd_solver="arpack", random_state=seed)
    return space.fit_transform(logs).astype(np.float64)


def _copies(
    real: sparse.csr_matrix,
    synthetic: sparse.csr_matrix,
    real_logs: sparse.csr_matrix,
    synthetic_logs: sparse.csr_matrix,
) -> dict[str, float]:
    """Whether generated cells sit on real ones, by all genes."""
    if real.shape[0] < _FEWEST_NEIGHBOURS:
        return {"exact_copies": exact_copies(real, synthetic)}
    to_real = nearest(_dense(synthetic_logs[:_SEEKING]), real_logs)[:, 0]
    # The closest cell of a real cell is itself.
    among_real = nearest(_dense(real_logs[:_SEEKING]), real_logs)[:, 1]
    typical = float(np.median(among_real))
    return {
        "closest_ratio": float(np.median(to_real)) / typical if typical > 0 else math.nan,
        "near_copies": float(np.mean(to_real < typical / 2)),
        "near_copies_floor": float(np.mean(among_real < typical / 2)),
        "exact_copies": exact_copies(real, synthetic),
    }


def _dense(cells: sparse.csr_matrix) -> NDArray[np.float32]:
    return cells.toarray().astype(np.float32, copy=False)


def _verdict(row: Mapping[str, Any], n: int) -> str:
    """What fails in a row, of whose cells the fewer side has `n`."""
    m = row["n_compared"]
    names = [*LIMITS] if m >= MIN_CELLS else ["closest_ratio", "near_copies"] if n else []
    failing = [name for name in names if _fails(row, name, m, n)]
    return ", ".join(failing + [TOO_FEW] * (m < MIN_CELLS)) or "ok"


def _fails(row: Mapping[str, Any], name: str, m: int, n: int) -> bool:
    """Whether a measure exceeds its limit.

    One that generated cells do not have though real ones do, as when all their genes have one
    mean, does; what real cells do not have either, no.
    """
    value, floor = row.get(name, math.nan), row.get(f"{name.removesuffix('_diff')}_floor", 0.0)
    if math.isnan(value):
        return name in ("mean_corr", "slope_diff") and not math.isnan(floor)
    excess = {
        "mean_corr": floor - value,
        "zeros_diff": abs(value),
        "slope_diff": abs(value),
        "w2": value - floor,
        "auc": value - 0.5,
        "closest_ratio": 1.0 - value,
        "near_copies": value - floor,
    }
    noise = {
        "mean_corr": 1.0 - floor,
        "zeros_diff": floor,
        "slope_diff": floor,
        "w2": 1.0 / math.sqrt(max(m, 1)),
        "auc": 1.0 / math.sqrt(max(m, 1)),
    }
    limit = LIMITS[name]
    most = limit.tolerated + limit.factor * noise.get(name, 1.0 / math.sqrt(n))
    # A floor of zero, of cells that are all alike, cannot be divided by.
    return excess[name] > most * (floor if name == "w2" else 1.0)
