"""The table of `benchmarks.choices`, from the tidy tables of finished parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from benchmarks.summary import groups

#: Classifiers of the table: embedder and classifier as in ``scores``.
CLASSIFIERS = {"kNN": ("pca", "knn10"), "LR": ("pca", "lr"), "LR genes": ("genes", "lr")}
#: Whom a choice is to be ahead of, in what.
RIVALS = ("nb", "mixup")
#: The choice that every other is set against, split by split.
BASE = "defaults"
_PAIRED = ("kNN", "LR")
_GROUPS = ("rare", "common", "all")


def members(
    scores: pd.DataFrame, *, rare_share: float, thinned: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Types of ``rare``, ``common`` and ``all``; thinned types alone are rare if there are any."""
    found = groups(scores, rare_share=rare_share, thinned=thinned)
    found["rare"] = found.get("thinned", found.get("rare", []))
    return {name: found.get(name, []) for name in _GROUPS}


def split_gains(scores: pd.DataFrame, types: Sequence[str]) -> pd.DataFrame:
    """Macro F1 over `types` minus that of ``none``, a column per classifier.

    Seeds are averaged first, and a type counts in the splits that test it.

    Returns
    -------
    DataFrame
        Indexed by ``arm`` and ``split``.
    """
    columns = {}
    for name, (embedder, classifier) in CLASSIFIERS.items():
        own = scores[(scores["embedder"] == embedder) & (scores["classifier"] == classifier)]
        f1 = own.groupby(["arm", "split", "type"])["f1"].mean().unstack("type")
        f1 = f1.reindex(columns=list(types))
        none = f1.loc["none"].reindex(f1.index.get_level_values("split"))
        columns[name] = (f1 - none.to_numpy()).mean(axis=1)
    return pd.DataFrame(columns).drop(index="none", level="arm")


def table(
    tables: Mapping[str, pd.DataFrame],
    order: Sequence[str],
    *,
    rare_share: float,
    thinned: Sequence[str] = (),
) -> pd.DataFrame:
    """One row per choice; columns as `benchmarks.choices` says.

    Parameters
    ----------
    tables
        From `results.collect`.
    order
        Names of choices in the order of the rows; those without results are left out.
    rare_share, thinned
        Of the settings.

    Returns
    -------
    DataFrame
        Indexed by ``choice``, the first row being real cells of the training donors. What is
        not defined is NaN; ``splits`` are those that a choice has results of.

    Raises
    ------
    ValueError
        If there are no results of ``none``, which gains are measured from.
    """
    scores = tables["scores"]
    if not len(scores) or "none" not in set(scores["arm"]):
        raise ValueError(
            "choices: expected results of 'none', which gains are measured from; there are none. "
            "Run the command again."
        )
    types = members(scores, rare_share=rare_share, thinned=thinned)
    gains = {group: split_gains(scores, types[group]) for group in _GROUPS}
    found = {
        f"{group} {name}": gain[name].groupby("arm").mean()
        for group, gain in gains.items()
        for name in CLASSIFIERS
    }
    found |= _to_base(gains["rare"])
    found |= _likeness(tables, types["rare"])
    both = gains["rare"][list(_PAIRED)].sum(axis=1, min_count=len(_PAIRED)).unstack("split")
    for rival in (name for name in RIVALS if name in both.index):
        ahead = (both > both.loc[rival]).sum(axis=1).astype(float)
        found[f"ahead of {rival}"] = ahead.drop(index=rival)
    found["splits"] = both.notna().sum(axis=1).astype(float)
    rows = [name for name in ("real", *order) if name == "real" or name in both.index]
    return pd.DataFrame(found).reindex(rows).rename_axis(index="choice")


def _to_base(gains: pd.DataFrame) -> dict[str, pd.Series]:
    """Gain minus that of `BASE` in the same split: mean and standard deviation over splits."""
    found = {}
    for name in CLASSIFIERS:
        own = gains[name].unstack("split")
        if BASE not in own.index:
            return {}
        difference = own.drop(index=BASE) - own.loc[BASE]
        found[f"to {BASE} {name}"] = difference.mean(axis=1)
        found[f"to {BASE} {name} SD"] = difference.std(axis=1)
    return found


def _likeness(tables: Mapping[str, pd.DataFrame], rare: Sequence[str]) -> dict[str, pd.Series]:
    """How much new cells of rare types are like real ones, mean over seeds and splits."""

    def of_rare(name: str) -> pd.DataFrame:
        own = tables[name]
        own = own[own["type"].isin(rare)].set_index(["arm", "split", "seed"])
        return own.drop(columns="type").astype(float)

    realism, memorisation = of_rare("realism"), of_rare("memorisation")
    by_type = {
        "W2": (realism["w2"], "mean"),
        "MMD": (realism["mmd_rbf"], "mean"),
        "zeros": ((realism["zeros"] - realism["zeros_real"]).abs(), "max"),
        "slope": ((realism["slope"] - realism["slope_real"]).abs(), "max"),
        "DCR": (memorisation["dcr_ratio"], "mean"),
    }
    return {
        name: values.groupby(level=["arm", "split", "seed"])
        .agg(how)
        .groupby(level=["arm", "split"])
        .mean()
        .groupby(level="arm")
        .mean()
        for name, (values, how) in by_type.items()
    }


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as text: signed gains, and what is not defined left empty.

    A difference to `BASE` and its standard deviation share a column.
    """

    def text(name: str, value: float) -> str:
        if np.isnan(value):
            return ""
        if name == "splits" or name.startswith("ahead"):
            return f"{value:.0f}"
        signed = name.split()[0] in (*_GROUPS, "to") and not name.endswith(" SD")
        return f"{value:+.3f}" if signed else f"{value:.3f}"

    columns = {name: [text(name, value) for value in frame[name]] for name in frame}
    for spread in [name for name in columns if name.endswith(" SD")]:
        name = spread.removesuffix(" SD")
        columns[name] = [
            f"{mean} ± {sd}" if sd else mean
            for mean, sd in zip(columns[name], columns.pop(spread), strict=True)
        ]
    return pd.DataFrame(columns, index=frame.index)
