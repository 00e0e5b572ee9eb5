"""Gains are paired by split and type, and their intervals are the bootstrap's."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.bootstrap import interval, mean_of, ratio_of_means
from benchmarks.summary import frequency_correlation, gains, groups, oracle_share, paired_against

SIZES = {"big": 900, "mid": 80, "tiny": 20}


def table(values, sizes=SIZES, seeds=1, embedder="pca", classifier="lr"):
    """Scores: ``values[arm]`` is ``(splits, types)``, given to every measure and seed."""
    rows = []
    for arm, scores in values.items():
        scores = np.asarray(scores, dtype=float)
        for split, (i, name), seed in product(
            range(len(scores)), enumerate(sizes), range(1 if arm == "none" else seeds)
        ):
            rows.append(
                {
                    "split": f"s{split}",
                    "seed": seed,
                    "arm": arm,
                    "embedder": embedder,
                    "classifier": classifier,
                    "type": name,
                    "n_train": sizes[name],
                    "n_added": 10,
                    "n_test": 0 if np.isnan(scores[split, i]) else 30,
                    "f1": scores[split, i],
                    "recall": scores[split, i],
                    "precision": scores[split, i],
                }
            )
    return pd.DataFrame(rows)


def row(frame, group="all", measure="f1", arm="x"):
    found = frame[(frame["group"] == group) & (frame["measure"] == measure) & (frame["arm"] == arm)]
    assert len(found) == 1
    return found.iloc[0]


# ----------------------------------------------------------------- bootstrap


def test_interval_is_scipys():
    values = np.random.default_rng(0).gamma(1.0, size=12)
    low, high = interval(mean_of, values, 20_000, seed=0)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.02)
    assert high == pytest.approx(theirs.high, abs=0.02)


def test_interval_of_a_normal_mean_covers_it():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(400):
        low, high = interval(mean_of, rng.normal(3.0, 1.0, 30), 500, seed)
        inside += low < 3.0 < high
    assert 0.89 < inside / 400 < 0.98


def test_interval_needs_two_repeats_and_resamples_columns_together():
    assert np.isnan(interval(mean_of, np.array([1.0]), 100, 0)).all()
    assert np.isnan(interval(mean_of, np.array([]), 100, 0)).all()
    twice = np.array([[2.0, 1.0], [8.0, 4.0], [-6.0, -3.0], [4.0, 2.0]])
    np.testing.assert_allclose(interval(ratio_of_means, twice, 999, 0), 2.0)


# -------------------------------------------------------------------- groups


def test_rare_types_have_a_small_median_share():
    scores = table({"none": np.zeros((3, 3))})
    assert groups(scores) == {
        "all": ["big", "mid", "tiny"],
        "rare": ["tiny"],
        "common": ["big", "mid"],
    }
    assert groups(scores, rare_share=0.1)["rare"] == ["mid", "tiny"]
    assert groups(scores, thinned=["mid", "gone"])["thinned"] == ["mid"]
    assert "rare" not in groups(scores, rare_share=0.01)
    # One split out of three in which a type is common does not make it so.
    scores.loc[(scores["split"] == "s0") & (scores["type"] == "tiny"), "n_train"] = 2000
    assert groups(scores)["rare"] == ["tiny"]


# --------------------------------------------------------------------- gains


def test_gains_are_means_of_paired_differences():
    none = np.array([[0.9, 0.5, 0.1], [0.8, 0.6, 0.3], [0.7, 0.4, 0.2]])
    x = none + np.array([[0.0, 0.1, 0.3], [-0.1, 0.0, -0.1], [0.0, 0.2, 0.4]])
    frame = gains(table({"none": none, "x": x}), thinned=["mid"])
    every = row(frame)
    assert every["baseline"] == pytest.approx(none.mean())
    assert every["mean"] == pytest.approx(x.mean())
    assert every["gain"] == pytest.approx((x - none).mean())
    assert (every["wins"], every["splits"], every["kind"]) == (2, 3, "group")
    assert every["n_train"] == pytest.approx(1000 / 3)
    assert row(frame, "tiny")["gain"] == pytest.approx(0.2)
    assert row(frame, "tiny")["kind"] == "type"
    assert row(frame, "rare")["gain"] == row(frame, "tiny")["gain"]
    assert row(frame, "thinned")["gain"] == pytest.approx(0.1)
    assert row(frame, "common")["gain"] == pytest.approx((0.05 - 0.05 + 0.1) / 3)
    low, high = interval(mean_of, (x - none).mean(axis=1), 5000, 0)
    assert (every["low"], every["high"]) == pytest.approx((low, high))
    assert set(frame["arm"]) == {"x"}
    assert set(frame["measure"]) == {"f1", "recall", "precision"}


def test_pairing_takes_out_what_splits_have_in_common():
    """Splits differ by tens of points, the gain is the same in all: its interval is narrow."""
    none = np.random.default_rng(0).uniform(0.1, 0.8, size=(8, 3))
    every = row(gains(table({"none": none, "x": none + 0.05})))
    assert every["low"] == pytest.approx(0.05)
    assert every["high"] == pytest.approx(0.05)
    assert every["wins"] == 8


def test_seeds_are_no_more_splits():
    none = np.full((2, 3), 0.5)
    scores = table({"none": none, "x": none}, seeds=3)
    moved = scores["arm"] == "x"
    scores.loc[moved, "f1"] += scores.loc[moved, "seed"].map({0: 0.0, 1: 0.1, 2: 0.5})
    every = row(gains(scores))
    assert every["splits"] == 2
    assert every["gain"] == pytest.approx(0.2)
    assert every["high"] - every["low"] == pytest.approx(0.0, abs=1e-12)


def test_types_without_test_cells_leave_their_split():
    none = np.array([[0.9, 0.5, np.nan], [0.8, 0.6, 0.3], [0.7, np.nan, np.nan]])
    x = none + np.array([[0.1, 0.1, 0.1], [0.0, 0.0, 0.3], [0.2, 0.0, 0.0]])
    frame = gains(table({"none": none, "x": x}))
    assert row(frame, "tiny")["splits"] == 1
    assert row(frame, "tiny")["gain"] == pytest.approx(0.3)
    assert np.isnan(row(frame, "tiny")["low"])
    assert row(frame)["gain"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert row(frame)["splits"] == 3


def test_an_arm_that_is_not_finished_is_compared_on_its_own_splits():
    none = np.array([[0.9, 0.5, 0.1], [0.1, 0.1, 0.1], [0.7, 0.4, 0.2]])
    scores = table({"none": none, "x": none + 0.1})
    scores = scores[(scores["arm"] == "none") | (scores["split"] != "s1")]
    every = row(gains(scores))
    assert every["splits"] == 2
    assert every["baseline"] == pytest.approx(none[[0, 2]].mean())
    assert every["gain"] == pytest.approx(0.1)


def test_a_type_that_is_never_tested_is_undefined_and_nothing_breaks():
    none = np.array([[0.9, 0.5, np.nan], [0.8, 0.6, np.nan]])
    scores = table({"none": none, "x": none, "oracle": none})
    tiny = row(gains(scores), "tiny")
    assert tiny["splits"] == 0
    assert np.isnan(tiny[["baseline", "mean", "gain", "low", "high"]].astype(float)).all()
    assert np.isnan(row(oracle_share(scores), "rare")["share"])
    assert frequency_correlation(scores)["r"].isna().all()


def test_settings_are_kept_apart():
    none = np.full((2, 3), 0.5)
    parts = [
        table({"none": none, "x": none + gain}, embedder=embedder, classifier=classifier)
        for gain, embedder, classifier in ((0.1, "pca", "lr"), (0.2, "pca", "knn5"))
    ]
    frame = gains(pd.concat(parts)).set_index(["classifier", "measure", "group"])["gain"]
    assert frame["lr", "f1", "all"] == pytest.approx(0.1)
    assert frame["knn5", "f1", "all"] == pytest.approx(0.2)


@pytest.mark.parametrize("function", [gains, oracle_share, frequency_correlation])
def test_without_arms_there_are_columns_and_no_rows(function):
    frame = function(table({"none": np.zeros((2, 3))}))
    assert frame.empty
    assert {"arm", "embedder", "classifier", "low", "high"} <= set(frame.columns)


def test_one_arm_against_another():
    none = np.random.default_rng(0).uniform(0.1, 0.5, size=(4, 3))
    scores = table({"none": none, "x": none + 0.3, "y": none + 0.1})
    every = row(paired_against(scores, "x", "y"))
    assert every["gain"] == pytest.approx(0.2)
    assert every["baseline"] == pytest.approx(none.mean() + 0.1)
    assert row(paired_against(scores, "y", "x"), arm="y")["gain"] == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="got 'z'; there are none, x, y"):
        paired_against(scores, "x", "z")


# -------------------------------------------------------------------- oracle


def test_share_of_the_oracles_gain():
    none = np.full((4, 3), 0.3)
    steps = np.array([0.2, 0.4, 0.3, 0.3])[:, None] + np.zeros((4, 3))
    scores = table(
        {"none": none, "x": none + steps / 4, "loss": none - 0.15, "oracle": none + steps}
    )
    frame = oracle_share(scores)
    x, loss = row(frame), row(frame, arm="loss")
    assert x["share"] == pytest.approx(0.25)
    assert (x["low"], x["high"]) == pytest.approx((0.25, 0.25))
    assert x["oracle"] == pytest.approx(0.3)
    assert x["gain"] == pytest.approx(0.075)
    assert loss["share"] == pytest.approx(-0.5)
    assert loss["low"] < -0.5 < loss["high"] < 0
    assert "oracle" not in set(frame["arm"])
    assert set(frame["measure"]) == {"f1"}


def test_no_share_of_a_gain_that_may_be_none():
    none = np.full((4, 3), 0.3)
    unclear = np.array([0.2, -0.1, 0.1, -0.1])[:, None] + np.zeros((4, 3))
    frame = oracle_share(table({"none": none, "x": none + 0.1, "oracle": none + unclear}))
    assert not frame["defined"].any()
    assert frame[["share", "low", "high"]].isna().all().all()
    assert row(frame)["oracle"] == pytest.approx(0.025)
    harm = oracle_share(table({"none": none, "x": none + 0.1, "oracle": none - 0.1}))
    assert harm["share"].isna().all()


def test_share_uses_only_what_arm_and_oracle_both_have():
    none = np.full((3, 3), 0.3)
    oracle = none + np.array([[0.1, 0.2, np.nan], [0.1, 0.2, 0.9], [0.1, 0.2, np.nan]])
    x = none + np.array([[0.05, 0.1, 0.5], [0.05, 0.1, np.nan], [0.05, 0.1, 0.5]])
    frame = oracle_share(table({"none": none, "x": x, "oracle": oracle}))
    assert row(frame)["share"] == pytest.approx(0.5)
    assert row(frame, "tiny")["splits"] == 0


# ----------------------------------------------------------------- frequency


def test_correlation_is_scipys_over_types():
    rng = np.random.default_rng(0)
    sizes = {"a": 1000, "b": 300, "c": 90, "d": 20, "e": 5}
    none = rng.uniform(0.2, 0.5, size=(6, 5))
    gain = rng.normal(0.0, 0.1, size=(6, 5))
    frame = frequency_correlation(table({"none": none, "x": none + gain}, sizes))
    found = frame.iloc[0]
    shares = np.array(list(sizes.values())) / sum(sizes.values())
    for suffix, x in (("", shares), ("_log", np.log10(shares))):
        r, p = stats.pearsonr(x, gain.mean(axis=0))
        assert found["r" + suffix] == pytest.approx(r)
        assert found["p" + suffix] == pytest.approx(p)
        rows = np.random.default_rng(5).integers(6, size=(3000, 6))
        again = [stats.pearsonr(x, gain[i].mean(axis=0)).statistic for i in rows]
        ends = np.percentile(again, [2.5, 97.5])
        assert found["low" + suffix] == pytest.approx(ends[0], abs=0.05)
        assert found["high" + suffix] == pytest.approx(ends[1], abs=0.05)
    assert (found["types"], found["splits"], found["measure"]) == (5, 6, "recall")


def test_correlation_of_gains_that_fall_with_frequency_is_minus_one():
    sizes = {"a": 1000, "b": 100, "c": 10, "d": 1}
    none = np.full((3, 4), 0.3)
    gain = np.array([0.0, 0.1, 0.2, 0.3])
    found = frequency_correlation(table({"none": none, "x": none + gain}, sizes)).iloc[0]
    assert found[["r_log", "low_log", "high_log"]].tolist() == pytest.approx([-1.0] * 3)
    assert -1 < found["r"] < 0


def test_correlation_is_undefined_where_nothing_varies_or_too_little_is_there():
    none = np.random.default_rng(0).uniform(0.2, 0.5, size=(3, 3))
    constant = frequency_correlation(table({"none": none, "x": none + 0.1})).iloc[0]
    assert np.isnan(constant[["r", "low", "high", "p"]].astype(float)).all()
    two = frequency_correlation(
        table({"none": none[:, :2], "x": none[:, :2] ** 2}, {"a": 10, "b": 5})
    ).iloc[0]
    assert np.isnan(two["r"])
    single = frequency_correlation(table({"none": none[:1], "x": none[:1] ** 2})).iloc[0]
    assert np.isfinite(single["r"])
    assert np.isnan(single["low"])
