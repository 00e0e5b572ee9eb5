"""From scores of every split to gains with intervals: tidy frames in, tidy frames out.

`scores` has a row per split, seed, arm, embedder, classifier and type, with ``n_train``,
``recall``, ``precision`` and ``f1``. Seeds are averaged within a split first: they repeat a
split, they are not more donors. Arms are then paired by split and type, so that a type counts
only in splits whose held-out donors have it, and only where both arms of a comparison have a
score.

Intervals are percentiles (95%) of a bootstrap over splits. All comparisons use the same
resamples. With five splits they are rough and too narrow (the percentile bootstrap of five
values covers about 85%), and splits that share training donors are not independent, so they
belong beside the number of splits won.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from benchmarks.bootstrap import interval, mean_of, percentiles, ratio_of_means

MEASURES = ("f1", "recall", "precision")
RESAMPLES = 5000

_GAINS = (
    *("arm", "embedder", "classifier", "measure", "group", "kind", "n_train", "baseline"),
    *("mean", "gain", "low", "high", "wins", "splits"),
)
_SHARES = (
    *("arm", "embedder", "classifier", "measure", "group", "kind", "share", "low", "high"),
    *("gain", "oracle", "oracle_low", "oracle_high", "defined", "splits"),
)
_CORRELATIONS = (
    *("arm", "embedder", "classifier", "measure", "types", "splits"),
    *("r", "low", "high", "p", "r_log", "low_log", "high_log", "p_log"),
)

Array = NDArray[np.float64]


def groups(
    scores: pd.DataFrame, *, rare_share: float = 0.05, thinned: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Groups of types that macro scores are averaged over.

    Parameters
    ----------
    scores
        See the module.
    rare_share
        A type is rare if its median share of a split's training cells, over splits, is below.
    thinned
        Types that were made rare on purpose.

    Returns
    -------
    dict
        Types of ``all``, ``rare``, ``common`` (not rare) and ``thinned``; empty groups are
        left out.
    """
    sizes = scores.groupby(["split", "type"])["n_train"].mean().unstack()
    shares = sizes.div(sizes.sum(axis=1), axis=0).median()
    types = [str(name) for name in shares.index]
    rare = [name for name in types if shares[name] < rare_share]
    found = {
        "all": types,
        "rare": rare,
        "common": [name for name in types if name not in rare],
        "thinned": [name for name in types if name in set(thinned)],
    }
    return {name: members for name, members in found.items() if members}


def gains(
    scores: pd.DataFrame,
    *,
    rare_share: float = 0.05,
    thinned: Sequence[str] = (),
    baseline: str = "none",
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """What every arm changes over `baseline`, by type and by group of types.

    Returns
    -------
    DataFrame
        A row per ``arm``, ``embedder``, ``classifier``, ``measure`` and ``group``, where
        ``kind`` says whether that is a ``group`` (its macro score: the mean over its types
        present in a split) or a ``type``. ``n_train``: training cells of a type, mean over
        splits and types; ``baseline``, ``mean`` and ``gain``: scores of the baseline and the
        arm, and their difference, mean over splits; ``low`` and ``high``: interval of the gain,
        NaN with fewer than two splits; ``wins``: splits with a gain above zero; ``splits``:
        splits compared.
    """
    members = groups(scores, rare_share=rare_share, thinned=thinned)
    rows = []
    for setting in _settings(scores):
        for arm, measure, difference in setting.differences(baseline, MEASURES):
            before = np.where(np.isnan(difference), np.nan, setting.tables[baseline, measure])
            for group, kind, columns in _targets(members, setting.types):
                gain = _macro(difference[:, columns])
                low, high = interval(mean_of, gain, n_resamples, seed)
                base = _mean(_macro(before[:, columns]))
                rows.append(
                    setting.key(arm, measure, group, kind)
                    | {
                        "n_train": _mean(setting.sizes[:, columns]),
                        "baseline": base,
                        "mean": base + _mean(gain),
                        "gain": _mean(gain),
                        "low": low,
                        "high": high,
                        "wins": int((gain > 0).sum()),
                        "splits": len(gain),
                    }
                )
    return pd.DataFrame(rows, columns=_GAINS)


def paired_against(
    scores: pd.DataFrame,
    arm: str,
    rival: str,
    *,
    rare_share: float = 0.05,
    thinned: Sequence[str] = (),
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """What `arm` gains over `rival` instead of the baseline; columns as in `gains`."""
    for name in (arm, rival):
        if name not in set(scores["arm"]):
            raise ValueError(
                f"expected an arm with scores, got {name!r}; there are "
                f"{', '.join(sorted(set(scores['arm'])))}"
            )
    return gains(
        scores[scores["arm"].isin([arm, rival])],
        rare_share=rare_share,
        thinned=thinned,
        baseline=rival,
        n_resamples=n_resamples,
        seed=seed,
    )


def oracle_share(
    scores: pd.DataFrame,
    *,
    rare_share: float = 0.05,
    thinned: Sequence[str] = (),
    measures: Sequence[str] = ("f1",),
    baseline: str = "none",
    oracle: str = "oracle",
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the gain from as many unused real cells that every arm recovers.

    ``share = mean over splits of the arm's gain / mean over splits of the oracle's``, over the
    splits and types that both have; its interval resamples splits for both at once.

    Returns
    -------
    DataFrame
        Keys as in `gains`; ``share``, ``low`` and ``high``; ``gain`` and ``oracle``, the means
        that the share is made of, with the oracle's interval; ``defined``: whether the oracle's
        interval lies above zero. Where it does not, there is no gain to share, and the share
        and its interval are NaN.
    """
    members = groups(scores, rare_share=rare_share, thinned=thinned)
    rows = []
    for setting in _settings(scores):
        every = list(setting.differences(baseline, measures))
        best = {measure: table for arm, measure, table in every if arm == oracle}
        for arm, measure, own in every:
            if arm == oracle or measure not in best:
                continue
            paired = np.stack([own, best[measure]], axis=2)
            paired[np.isnan(paired).any(axis=2)] = np.nan
            for group, kind, columns in _targets(members, setting.types):
                both = np.stack([_macro(paired[:, columns, side]) for side in (0, 1)], axis=1)
                low, high = interval(mean_of, both[:, 1], n_resamples, seed)
                gain, most = _mean(both[:, 0]), _mean(both[:, 1])
                row = setting.key(arm, measure, group, kind)
                row |= {"gain": gain, "oracle": most, "oracle_low": low, "oracle_high": high}
                row |= {"share": np.nan, "low": np.nan, "high": np.nan}
                row |= {"defined": bool(low > 0), "splits": len(both)}
                if low > 0:
                    ends = interval(ratio_of_means, both, n_resamples, seed)
                    row |= {"share": gain / most, "low": ends[0], "high": ends[1]}
                rows.append(row)
    return pd.DataFrame(rows, columns=_SHARES)


def frequency_correlation(
    scores: pd.DataFrame,
    *,
    measure: str = "recall",
    baseline: str = "none",
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Pearson correlation over types of the gain and the frequency in training, as in Fig. 5.

    A point is a type: its gain in `measure` and its share of the training cells, each averaged
    over the splits that test it. The paper's measure is recall per type, which it calls
    accuracy.

    Returns
    -------
    DataFrame
        A row per ``arm``, ``embedder`` and ``classifier``: ``r`` with the frequency itself, its
        interval ``low`` to ``high`` over resampled splits (types stay the same, so it says
        nothing of other types), and ``p`` of a test over types, as if those were independent;
        the same with log10 of the frequency in ``r_log``, ``low_log``, ``high_log``, ``p_log``.
        NaN with fewer than three types or where either side is constant.
    """
    rows = []
    for setting in _settings(scores):
        totals = np.nansum(setting.sizes, axis=1, keepdims=True)
        shares = setting.sizes / np.where(totals > 0, totals, np.nan)
        for arm, _, gain in setting.differences(baseline, [measure]):
            known = ~np.isnan(gain + shares)
            n_splits = int(known.any(axis=1).sum())
            row = setting.key(arm, measure)
            row |= {"types": int(known.any(axis=0).sum()), "splits": n_splits}
            random = np.random.default_rng(seed)
            even = np.full(len(known), 1 / len(known))
            drawn = random.multinomial(len(known), even, n_resamples).astype(np.float64)
            for suffix, logarithm in (("", False), ("_log", True)):
                x, y = (_weighted(np.ones((1, len(known))), v, known) for v in (shares, gain))
                again = [_weighted(drawn, v, known) for v in (shares, gain)]
                if logarithm:
                    x, again[0] = _log10(x), _log10(again[0])
                r = float(_pearson(x, y)[0])
                low, high = percentiles(_pearson(*again)) if n_splits > 1 else (np.nan, np.nan)
                some = ~np.isnan(x[0] + y[0])
                p = stats.pearsonr(x[0, some], y[0, some]).pvalue if np.isfinite(r) else np.nan
                values = {"r": r, "low": low, "high": high, "p": float(p)}
                row |= {name + suffix: value for name, value in values.items()}
            rows.append(row)
    return pd.DataFrame(rows, columns=_CORRELATIONS)


@dataclass(frozen=True)
class _Setting:
    """Scores of one embedder and classifier, averaged over seeds.

    `sizes` and each of `tables`, by arm and measure, are ``(n_splits, n_types)``, NaN where
    there is no score.
    """

    embedder: str
    classifier: str
    types: list[str]
    sizes: Array
    tables: Mapping[tuple[str, str], Array]

    def differences(
        self, baseline: str, measures: Sequence[str]
    ) -> Iterator[tuple[str, str, Array]]:
        """Arm, measure, and its scores minus the baseline's."""
        for (arm, measure), table in self.tables.items():
            if arm != baseline and measure in measures and (baseline, measure) in self.tables:
                yield arm, measure, table - self.tables[baseline, measure]

    def key(self, arm: str, measure: str, group: str = "", kind: str = "") -> dict[str, object]:
        """What a row says it is about."""
        return {
            "arm": arm,
            "embedder": self.embedder,
            "classifier": self.classifier,
            "measure": measure,
            "group": group,
            "kind": kind,
        }


def _settings(scores: pd.DataFrame) -> Iterator[_Setting]:
    for (embedder, classifier), own in scores.groupby(["embedder", "classifier"], dropna=False):
        within = own.groupby(["arm", "split", "type"])[["n_train", *MEASURES]].mean()
        axes = [np.unique(within.index.get_level_values(name)) for name in ("split", "type")]
        every = pd.MultiIndex.from_product(axes)
        shape = tuple(map(len, axes))
        sizes = within["n_train"].groupby(level=["split", "type"]).mean().reindex(every)
        tables = {}
        for arm in within.index.unique("arm"):
            table = within.loc[arm].reindex(every)
            for measure in MEASURES:
                tables[str(arm), measure] = table[measure].to_numpy(float).reshape(shape)
        yield _Setting(
            embedder, classifier, list(axes[1]), sizes.to_numpy(float).reshape(shape), tables
        )


def _targets(
    members: Mapping[str, Sequence[str]], types: Sequence[str]
) -> Iterator[tuple[str, str, list[int]]]:
    """Groups, then types, and their columns."""
    for group, names in members.items():
        yield group, "group", [i for i, name in enumerate(types) if name in set(names)]
    for i, name in enumerate(types):
        yield name, "type", [i]


def _macro(table: Array) -> Array:
    """Mean over the types present in each split; splits without any are left out."""
    known = ~np.isnan(table)
    some = known.any(axis=1)
    return np.nansum(table[some], axis=1) / known[some].sum(axis=1)


def _mean(values: Array) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _weighted(weights: Array, table: Array, known: NDArray[np.bool_]) -> Array:
    """Mean of every type over splits drawn `weights` times, NaN where none of them has it."""
    sums = weights @ np.where(known, table, 0.0)
    drawn = weights @ known.astype(np.float64)
    return np.divide(sums, drawn, out=np.full_like(sums, np.nan), where=drawn > 0)


def _log10(values: Array) -> Array:
    return np.log10(values, out=np.full_like(values, np.nan), where=values > 0)


def _pearson(x: Array, y: Array) -> Array:
    """Correlation along the rows, over what both have."""
    known = ~np.isnan(x + y)
    n = known.sum(axis=1)
    sides = []
    for values in (x, y):
        values = np.where(known, values, 0.0)
        mean = values.sum(axis=1) / np.maximum(n, 1)
        sides.append(np.where(known, values - mean[:, None], 0.0))
    a, b = sides
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    # Means of equal numbers are off by rounding, which is no variation.
    enough = (n >= 3) & (np.ptp(a, axis=1) > 1e-12) & (np.ptp(b, axis=1) > 1e-12)
    product = (a * b).sum(axis=1)
    return np.divide(product, scale, out=np.full_like(scale, np.nan), where=enough)
