"""Log-normal size factors: maximum likelihood where there are cells, shrinkage where not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from cfgen_augment.size_factors import LogNormalSizeFactor, SizeFactors

# Mean and spread of log totals, and cells, of groups that differ: 2 and 3 are rare, 4 is empty.
MEAN = np.array([6.0, 8.0, 9.0, 6.5])
SCALE = np.array([0.2, 0.5, 0.3, 0.3])
SIZES = np.array([4000, 3000, 3, 1, 0])


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(5), SIZES))
    return np.exp(rng.normal(MEAN[groups], SCALE[groups])), groups


def drawn_from(fit, groups, random):
    """Totals of cells whose only size factor this is."""
    return SizeFactors((fit,), np.eye(1)).sample(groups, random)[:, 0]


@pytest.fixture(scope="module")
def fitted(data):
    return LogNormalSizeFactor.fit(*data, n_groups=5)


def own_values(data, group):
    totals, groups = data
    return np.log(totals[groups == group])


def test_one_small_group_is_plain_maximum_likelihood(data):
    totals = data[0][:40]
    fit = LogNormalSizeFactor.fit(totals, np.zeros(len(totals), dtype=int), n_groups=1)
    np.testing.assert_allclose(fit.mean, np.log(totals).mean(), rtol=1e-12)
    np.testing.assert_allclose(fit.scale, np.log(totals).std(), rtol=1e-12)
    assert (np.exp(fit.lowest), np.exp(fit.highest)) == pytest.approx((totals.min(), totals.max()))
    assert fit.shift.tolist() == [0.0]
    assert fit.share.tolist() == [1.0]


@pytest.mark.parametrize("group", [0, 1])
def test_large_groups_are_maximum_likelihood_given_their_shift_and_range(data, fitted, group):
    totals = data[0][data[1] == group]
    shifted = np.log(totals + fitted.shift[group])

    def log_likelihood(mean, scale):
        ends = (np.array([shifted.min(), shifted.max()]) - mean) / scale
        return stats.truncnorm.logpdf(shifted, *ends, loc=mean, scale=scale).sum()

    mean, scale = fitted.mean[group], fitted.scale[group]
    best = log_likelihood(mean, scale)
    for step in (-0.02, 0.02):
        assert best > log_likelihood(mean + step * scale, scale)
        assert best > log_likelihood(mean, scale * (1.0 + step))
    assert scale == pytest.approx(shifted.std(), rel=0.03)  # nothing was cut off
    assert abs(fitted.shift[group]) < 0.5 * totals.mean()  # the truth is no shift
    own = np.log(totals)
    assert fitted.lowest[group] == pytest.approx(own.min(), abs=0.01)
    assert fitted.highest[group] == pytest.approx(own.max(), abs=0.01)


@pytest.mark.parametrize("cut", [(0.1, 1.0), (0.1, 0.9)], ids=["below", "both"])
def test_depths_of_filtered_cells_spread_as_far_as_the_cells(cut):
    rng = np.random.default_rng(4)
    log_totals = rng.normal(7.0, 0.6, 4_000)
    low, high = np.quantile(log_totals, cut)
    kept = log_totals[(log_totals >= low) & (log_totals <= high)]
    fit = LogNormalSizeFactor.fit(np.exp(kept), np.zeros(len(kept), dtype=int), n_groups=1)
    drawn = np.log(drawn_from(fit, np.zeros(50_000, dtype=int), np.random.default_rng(0)))
    assert drawn.mean() == pytest.approx(kept.mean(), abs=0.02)
    assert drawn.std() == pytest.approx(kept.std(), rel=0.04)
    # The plain fit, cut off once more, would fall short by more than that.
    ends = (np.array([low, high]) - kept.mean()) / kept.std()
    assert stats.truncnorm.std(*ends, scale=kept.std()) < 0.95 * kept.std()


@pytest.mark.parametrize("spread", ["even", "two ends"])
def test_depths_flatter_than_any_normal_still_give_a_fit(spread):
    even = np.linspace(5.0, 8.0, 400)
    log_totals = even if spread == "even" else np.where(even < 6.5, 5.0, 8.0)
    fit = LogNormalSizeFactor.fit(np.exp(log_totals), np.zeros(400, dtype=int), n_groups=1)
    drawn = np.log(drawn_from(fit, np.zeros(20_000, dtype=int), np.random.default_rng(0)))
    assert drawn.std() > 0.9 * even.std()
    assert drawn.min() >= 5.0 - 1e-9
    assert drawn.max() <= 8.0 + 1e-9


@pytest.mark.parametrize("shift", [-300.0, 2_000.0], ids=["right-skewed", "left-skewed"])
def test_skewed_depths_are_followed(shift):
    rng = np.random.default_rng(2)
    base = rng.lognormal(0.0, 0.4, 2_000)
    totals = 1_000.0 * base + 330.0 if shift < 0 else np.maximum(3_000.0 * base**0.4 - shift, 50.0)
    none = np.zeros(len(totals), dtype=int)
    fit = LogNormalSizeFactor.fit(totals, none, n_groups=1)
    assert np.sign(fit.shift[0]) == np.sign(shift)
    drawn = drawn_from(fit, np.zeros(20_000, dtype=int), np.random.default_rng(0))
    plain = np.exp(rng.normal(np.log(totals).mean(), np.log(totals).std(), 20_000))
    distance = stats.ks_2samp(drawn, totals).statistic
    assert distance < 0.03
    assert distance < stats.ks_2samp(plain, totals).statistic


@pytest.mark.parametrize("group", [2, 3])
def test_small_groups_are_shrunk_towards_the_shared_fit(data, fitted, group):
    own, everyone = own_values(data, group), np.log(data[0])
    low, high = sorted([own.mean(), everyone.mean()])
    assert low < fitted.mean[group] < high
    assert 0.2 < fitted.scale[group] < 0.5  # a single cell's own spread is zero
    assert everyone.min() <= fitted.lowest[group] <= fitted.mean[group] - fitted.scale[group]
    assert fitted.mean[group] + fitted.scale[group] <= fitted.highest[group] <= everyone.max()


def test_a_singleton_is_shrunk_more_than_the_same_value_seen_often():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2, 3], [200, 200, 40, 1])
    log_total = rng.normal(np.array([5.0, 6.0, 8.0, 8.0])[groups], 0.4)
    log_total[groups == 2] += 8.0 - log_total[groups == 2].mean()
    log_total[groups == 3] = 8.0
    fit = LogNormalSizeFactor.fit(np.exp(log_total), groups, n_groups=4)
    assert log_total.mean() < fit.mean[3] < fit.mean[2] < 8.0


def test_groups_that_do_not_differ_are_pooled():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 5)
    log_total = rng.normal(7.0, 0.3, len(groups))
    fit = LogNormalSizeFactor.fit(np.exp(log_total), groups, n_groups=40)
    raw = log_total.reshape(40, 5).mean(axis=1)
    assert fit.mean.std() < 0.4 * raw.std()


def test_a_few_cells_of_a_deep_group_stay_deep():
    # Three types near each other, with nearly all cells, do not say that types are alike.
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(4), [3_000, 1_500, 1_500, 20])
    log_total = rng.normal(np.array([6.2, 6.3, 6.65, 7.0])[groups], 0.5)
    log_total[groups == 3] += 7.0 - log_total[groups == 3].mean()
    fit = LogNormalSizeFactor.fit(np.exp(log_total), groups, n_groups=4)
    assert 6.9 < fit.mean[3] < 7.0


def test_a_category_without_cells_is_the_mean_category(data, fitted):
    everyone = np.log(data[0])
    means = [own_values(data, group).mean() for group in range(4)]
    # Two of them are known from three cells and from one, and weigh a little less.
    assert fitted.mean[4] == pytest.approx(np.mean(means), abs=0.05)
    assert (fitted.lowest[4], fitted.highest[4]) == (everyone.min(), everyone.max())
    assert fitted.share[4] == 0.0
    np.testing.assert_allclose(fitted.share, SIZES / SIZES.sum())


@pytest.mark.parametrize("group", range(5))
def test_draws_stay_within_the_range_seen(data, fitted, group):
    drawn = np.log(drawn_from(fitted, np.full(5000, group), np.random.default_rng(0)))
    assert np.isfinite(drawn).all()
    assert fitted.lowest[group] - 1e-9 <= drawn.min()
    assert drawn.max() <= fitted.highest[group] + 1e-9
    assert np.log(data[0]).min() - 1e-9 <= drawn.min()
    assert drawn.max() <= np.log(data[0]).max() + 1e-9
    assert drawn.std() > 0.1


@pytest.mark.parametrize("group", [0, 1])
def test_draws_follow_the_truncated_normal(fitted, group):
    shift = fitted.shift[group]
    totals = drawn_from(fitted, np.full(5000, group), np.random.default_rng(0))
    mean, scale = fitted.mean[group], fitted.scale[group]
    ends = np.exp([fitted.lowest[group], fitted.highest[group]])
    bounds = (np.log(ends + shift) - mean) / scale
    law = stats.truncnorm(*bounds, loc=mean, scale=scale)
    assert stats.kstest(np.log(totals + shift), law.cdf).pvalue > 1e-3


def test_an_unknown_group_gets_one_as_common_as_in_training(data, fitted):
    codes = np.full(20_000, -1)
    drawn = np.log(drawn_from(fitted, codes, np.random.default_rng(0)))
    assert (codes == -1).all()  # the caller's array is left alone
    assert (drawn < 7.1).mean() == pytest.approx(4000 / 7004, abs=0.02)
    assert stats.ks_2samp(drawn, np.log(data[0])).statistic < 0.03


def test_draws_follow_the_generator(fitted):
    groups = np.array([0, -1, 3, 1])
    first, again, other = (
        drawn_from(fitted, groups, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("totals", "groups", "n_groups"),
    [
        pytest.param([50.0], [0], 1, id="one-cell"),
        pytest.param([50.0, 50.0, 50.0], [0, 0, 0], 1, id="one-total"),
        pytest.param([50.0, 50.0, 50.0], [0, 0, 1], 2, id="one-total-two-groups"),
        pytest.param([10.0, 20.0, 40.0], [0, 1, 2], 3, id="every-group-of-one"),
        pytest.param([10.0, 20.0, 1e9, 1.0], [0, 0, 0, 1], 3, id="extreme-totals"),
    ],
)
def test_degenerate_data_still_give_totals_within_range(totals, groups, n_groups):
    fit = LogNormalSizeFactor.fit(np.array(totals), np.array(groups), n_groups)
    asked = np.tile(np.arange(-1, n_groups), 50)
    drawn = drawn_from(fit, asked, np.random.default_rng(0))
    assert (drawn >= min(totals) * (1 - 1e-9)).all()
    assert (drawn <= max(totals) * (1 + 1e-9)).all()
    assert np.isfinite(fit.scaled(np.array(totals))).all()


def test_scaled_maps_the_range_seen_to_the_unit_interval(data, fitted):
    totals = data[0]
    scaled = fitted.scaled(totals)
    assert scaled.min() == pytest.approx(0.0, abs=1e-9)
    assert scaled.max() == pytest.approx(1.0, abs=1e-9)
    assert fitted.scaled(np.array([np.sqrt(totals.min() * totals.max())]))[0] == pytest.approx(0.5)


def test_json_round_trip_draws_the_same(fitted):
    again = LogNormalSizeFactor.from_json(json.loads(json.dumps(fitted.to_json())))
    groups = np.array([0, 1, 2, 3, 4, -1] * 20)
    np.testing.assert_array_equal(
        drawn_from(again, groups, np.random.default_rng(3)),
        drawn_from(fitted, groups, np.random.default_rng(3)),
    )
