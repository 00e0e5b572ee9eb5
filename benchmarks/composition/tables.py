"""Tables of all finished parts, as markdown with spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.realism import to_markdown

_DIGITS = {"W2": 2, "cells": 1, "types": 1}


def sections(tables: dict[str, pd.DataFrame], data: str) -> dict[str, str]:
    """Markdown of every kind of measurement that is there, under headings that name the data."""
    return {
        name: "\n\n".join(
            f"### {data}: {title}\n\n{to_markdown(table)}" for title, table in make(tables[name])
        )
        for name, make in _MADE.items()
        if name in tables
    }


def _spread(
    table: pd.DataFrame,
    by: str | list[str],
    measures: Sequence[str],
    per: Sequence[str] = ("seed",),
) -> pd.DataFrame:
    """Mean and standard deviation over seeds (of the mean over what else there is of a seed)."""
    keys = [by] if isinstance(by, str) else by
    order = table[keys].drop_duplicates()
    values = table.groupby([*keys, *per], sort=False)[list(measures)].mean().astype(float)
    grouped = values.groupby(level=keys, sort=False)
    mean, sd = grouped.mean(), grouped.std()
    made = pd.DataFrame(index=mean.index)
    for name in measures:
        digits = 0 if name.startswith("size_factor=") else _DIGITS.get(name, 3)
        made[name] = [
            "" if np.isnan(m) else f"{m:.{digits}f}" + ("" if np.isnan(s) else f" ± {s:.{digits}f}")
            for m, s in zip(mean[name], sd[name], strict=True)
        ]
    index = pd.MultiIndex.from_frame(order) if len(keys) > 1 else pd.Index(order[by], name=by)
    return made.loc[index]


def _by_variant(title: str, table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for variant, own in table.groupby("variant", sort=False):
        yield (title if variant == "real" else f"{title}, {variant} simulation"), own


def _guidance(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    columns = ("type", "donor", "coverage", "types off", "W2", "MMD")
    for title, own in _by_variant("Guidance weights of type and donor", table):
        yield title, _spread(own, "weights", columns)


def _unseen(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    columns = ("W2", "MMD", "corr", "slope", "type", "donor")
    for title, own in _by_variant("Unseen combinations", table):
        per = own.groupby(["seed", "combination", "way"], sort=False, as_index=False)[
            list(columns)
        ].mean()
        made = _spread(per, "way", columns, per=("seed", "combination"))
        made["better than type only"] = _wins(per)
        n = per[["seed", "combination"]].drop_duplicates().shape[0]
        yield f"{title} ({n})", made


def _wins(per: pd.DataFrame) -> list[str]:
    """In how many combinations a way is closer in W2, and correlates more, than the type alone."""
    wins = []
    for way in per["way"].drop_duplicates():
        wide = per.pivot(index=["seed", "combination"], columns="way")
        closer = (wide["W2"][way] < wide["W2"]["type only"]).sum()
        along = (wide["corr"][way] > wide["corr"]["type only"]).sum()
        told = f"corr {along}" if wide["W2"][way].isna().all() else f"W2 {closer}, corr {along}"
        wins.append("" if way == "type only" else told)
    return wins


def _totals(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for title, own in _by_variant("Median totals of donors", table):
        medians = own[own["attribute"] == "donor"].pivot_table(
            index=["of", "seed"], columns="size_factor", values="synthetic"
        )
        wide = medians.add_prefix("size_factor=").reset_index().rename(columns={"of": "donor"})
        names = [str(name) for name in wide.columns if str(name).startswith("size_factor=")]
        made = _spread(wide, "donor", names)
        real = own[own["attribute"] == "donor"].groupby("of")["real"].first()
        made.insert(0, "real", [f"{real[name]:.0f}" for name in made.index])
        yield title, made
    for title, own in _by_variant("Rank correlation of real and synthetic median totals", table):
        ranks = (
            own.groupby(["size_factor", "attribute", "seed"], sort=False)[["real", "synthetic"]]
            .apply(lambda t: float(stats.spearmanr(t["real"], t["synthetic"]).statistic))
            .unstack("attribute")
            .rename(columns={"donor": "over donors", "type": "over types"})
            .reset_index()
        )
        yield title, _spread(ranks, "size_factor", ("over donors", "over types"))


def _biology(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for title, own in _by_variant("Cells of a type at several depths, thinned to one", table):
        yield title, _spread(own, ["way", "depth"], ("type", "donor", "corr"))


def _dispersion(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    columns = ("cells", "types")
    for title, own in _by_variant("Dispersion: nats per held-out cell above one per gene", table):
        own = own.copy()
        keys = ["fitted by", "dispersion"]
        for seed, rows in own.groupby("seed"):
            for way, same in rows.groupby("fitted by"):
                base = same[same["dispersion"] == "per gene"][list(columns)].iloc[0]
                where = (own["seed"] == seed) & (own["fitted by"] == way)
                own.loc[where, list(columns)] -= base
        yield title, _spread(own, keys, columns)


def _transfer(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    columns = ("type", "source donor", "target donor", "W2")
    for title, own in _by_variant("Cells of one donor carried to another", table):
        own = own.assign(pair=own["from"] + " to " + own["to"])
        yield title, _spread(own, "way", columns, per=("seed", "pair"))


_MADE = {
    "guidance": _guidance,
    "unseen": _unseen,
    "totals": _totals,
    "biology": _biology,
    "dispersion": _dispersion,
    "transfer": _transfer,
}
