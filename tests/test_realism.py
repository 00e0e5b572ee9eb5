"""Distances between cells are their closed forms, and every arm is measured on as many cells."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.cells import log_normalise
from benchmarks.realism import (
    SIGMAS,
    common_sizes,
    compare,
    mmd_linear,
    mmd_rbf,
    realism,
    to_markdown,
)
from cfgen_augment.measures import mean_variance_slope, wasserstein

SAMPLED = ["m", "w2", "mmd_rbf", "mmd_linear", "knn_f1", "slope", "totals_ks", "mean_corr"]


def draws(n, seed, n_genes=60, depth=1.0, theta=2.0):
    """Negative binomial counts of two types, the same two whatever the seed."""
    rng = np.random.default_rng(seed)
    rates = np.random.default_rng(99).gamma(0.5, 2.0, size=(2, n_genes)) * depth
    counts = [rng.poisson(rate * rng.gamma(theta, 1 / theta, (n, n_genes))) for rate in rates]
    return sparse.csr_matrix(np.concatenate(counts).astype(np.float32)), np.repeat(["A", "B"], n)


def measured(new, new_labels, *, n_test=200, logged=False, m=150, **options):
    """New cells against test cells of seed 0."""
    real, labels = draws(n_test, 0)
    sizes = {"A": m, "B": m}
    given = {"logged": logged, "sample_sizes": sizes, "seed": 0, "n_pcs": 10} | options
    return realism(real, labels, new, new_labels, **given)


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 3)), rng.normal(1.0, 2.0, size=(60, 3))


# ----------------------------------------------------------------- distances


def test_wasserstein_of_a_cloud_and_its_shift_is_the_length_of_the_shift(clouds):
    shift = np.array([3.0, -4.0, 12.0])
    rows = np.random.default_rng(1).permutation(60)
    assert wasserstein(clouds[0], clouds[0][rows] + shift) == pytest.approx(13.0)
    assert wasserstein(clouds[0], clouds[0][rows]) == pytest.approx(0.0, abs=1e-6)


def test_wasserstein_in_one_dimension_pairs_what_is_sorted(clouds):
    a, b = (cloud[:, :1] for cloud in clouds)
    expected = np.sqrt(np.mean((np.sort(a, axis=0) - np.sort(b, axis=0)) ** 2))
    assert wasserstein(a, b) == pytest.approx(expected)


def test_wasserstein_of_gaussians_nears_its_closed_form():
    """In one dimension sqrt((mu1 - mu2)^2 + (s1 - s2)^2) = sqrt(9 + 1)."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (1500, 1)), rng.normal(3, 2, (1500, 1))
    assert wasserstein(a, b) == pytest.approx(np.sqrt(10), rel=0.05)


def test_rbf_mmd_is_the_double_loop(clouds):
    a, b = clouds[0][:15], clouds[1][:12]

    def kernel(x, y):
        return sum(np.exp(-np.sum((x - y) ** 2) / (2 * s**2)) for s in SIGMAS)

    def pairs(x, y, same):
        values = [
            kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not same or i != j
        ]
        return np.mean(values)

    expected = pairs(a, a, True) + pairs(b, b, True) - 2 * pairs(a, b, False)
    assert mmd_rbf(a, b) == pytest.approx(expected, rel=1e-10)


def test_rbf_mmd_is_zero_on_average_for_one_distribution_whatever_the_sample():
    rng = np.random.default_rng(0)
    for m in (10, 50):
        values = [mmd_rbf(*rng.normal(size=(2, m, 3))) for _ in range(300)]
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
        assert np.min(values) < 0


def test_linear_mmd_is_the_distance_of_means(clouds):
    a = np.array([[0.0, 0.0], [2.0, 4.0]])
    b = np.array([[4.0, 2.0], [4.0, 10.0], [4.0, 6.0]])
    assert mmd_linear(a, b) == pytest.approx(9 + 16)
    n = 60
    a, b = clouds
    gram = (a @ a.T).sum() / n**2 + (b @ b.T).sum() / n**2 - 2 * (a @ b.T).sum() / n**2
    assert mmd_linear(a, b) == pytest.approx(gram)


@pytest.mark.parametrize("distance", [wasserstein, mmd_rbf, mmd_linear])
def test_the_order_of_rows_does_not_matter(clouds, distance):
    a, b = clouds
    rows = np.random.default_rng(2).permutation(60)
    assert distance(a[rows], b[rows[::-1]]) == pytest.approx(distance(a, b), rel=1e-9)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)


def test_slope_is_one_for_poisson_and_two_for_gamma_noise():
    rng = np.random.default_rng(0)
    rates = np.exp(np.linspace(0, 4, 200))
    assert mean_variance_slope(rng.poisson(rates, (3000, 200))) == pytest.approx(1, abs=0.02)
    gamma = rng.gamma(4.0, rates / 4.0, (3000, 200))
    assert mean_variance_slope(gamma) == pytest.approx(2, abs=0.02)


def test_slope_of_sparse_counts_is_that_of_dense_ones():
    counts, _ = draws(50, 0)
    dense = mean_variance_slope(counts.toarray().astype(np.float64))
    assert mean_variance_slope(counts) == pytest.approx(dense, rel=1e-9)
    assert np.isnan(mean_variance_slope(sparse.csr_matrix((5, 4), dtype=np.float32)))


# ------------------------------------------------------------------ by type


def test_real_cells_beat_wrong_ones_everywhere():
    right = measured(*draws(200, 1))
    swapped, labels = draws(200, 2)
    wrong = measured(swapped, np.where(labels == "A", "B", "A"))
    assert (right["m"] == 150).all()
    for column in ("w2", "mmd_rbf", "mmd_linear"):
        assert (right[column] < wrong[column] / 2).all(), column
    assert (right["knn_f1"] > 0.95).all()
    assert (wrong["knn_f1"] < 0.05).all()
    assert (right["mean_corr"] > wrong["mean_corr"] + 0.2).all()
    assert (right["mmd_rbf"].abs() < 0.02).all()


def test_a_type_is_measured_on_the_same_cells_by_a_plain_computation():
    """All cells are sampled, so nothing is random: every column by another way."""
    real, labels = draws(40, 0)
    new, new_labels = draws(40, 1)
    row = measured(new, new_labels, n_test=40, m=40).loc["A"]
    pca = PCA(10, svd_solver="full").fit(log_normalise(real).toarray().astype(np.float64))
    a = pca.transform(log_normalise(real).toarray())
    b = pca.transform(log_normalise(new).toarray())
    here, there = labels == "A", new_labels == "A"
    assert row["w2"] == pytest.approx(wasserstein(a[here], b[there]), rel=1e-3)
    assert row["mmd_rbf"] == pytest.approx(mmd_rbf(a[here], b[there]), rel=1e-2, abs=1e-4)
    assert row["mmd_linear"] == pytest.approx(mmd_linear(a[here], b[there]), rel=1e-3)
    predicted = KNeighborsClassifier(10).fit(a, labels).predict(b)
    expected = f1_score(new_labels, predicted, labels=["A"], average=None)[0]
    assert row["knn_f1"] == pytest.approx(expected)
    x, y = real.toarray()[here], new.toarray()[there]
    assert row["zeros_real"] == pytest.approx((x == 0).mean())
    assert row["zeros"] == pytest.approx((y == 0).mean())
    assert row["total_real"] == pytest.approx(x.sum(axis=1).mean())
    assert row["total"] == pytest.approx(y.sum(axis=1).mean())
    ks = stats.ks_2samp(x.sum(axis=1), y.sum(axis=1)).statistic
    assert row["totals_ks"] == pytest.approx(ks)
    assert row["slope"] == pytest.approx(mean_variance_slope(y.astype(np.float64)), rel=1e-4)
    logs = (log_normalise(v).toarray().mean(axis=0) for v in (real[here], new[there]))
    assert row["mean_corr"] == pytest.approx(np.corrcoef(*logs)[0, 1], rel=1e-4)


def test_too_dispersed_and_too_deep_cells_show():
    good = measured(*draws(200, 1))
    noisy = measured(*draws(200, 1, theta=0.2))
    deep = measured(*draws(200, 1, depth=2.0))
    assert (noisy["slope"] - noisy["slope_real"] > good["slope"] - good["slope_real"] + 0.1).all()
    assert (noisy["zeros"] > good["zeros"] + 0.1).all()
    np.testing.assert_allclose(deep["total"] / deep["total_real"], 2.0, atol=0.1)
    assert (deep["totals_ks"] > 0.8).all()
    assert (good["totals_ks"] < 0.2).all()


def test_the_same_seed_samples_the_same_cells_and_order_is_free():
    new, labels = draws(200, 1)
    first = measured(new, labels)
    assert first.equals(measured(new, labels))
    assert not first["w2"].equals(measured(new, labels, seed=1)["w2"])
    # With every cell in the sample, the order of the rows is all that could matter.
    rows = np.random.default_rng(0).permutation(400)
    ordered, shuffled = measured(new, labels, m=200), measured(new[rows], labels[rows], m=200)
    np.testing.assert_allclose(ordered.to_numpy(), shuffled.to_numpy(), rtol=1e-4, atol=1e-6)


def test_log_values_measure_alike_and_leave_out_what_only_counts_have():
    new, labels = draws(200, 1)
    counts, logs = measured(new, labels), measured(log_normalise(new), labels, logged=True)
    for column in ("w2", "mmd_rbf", "mmd_linear", "knn_f1", "zeros", "mean_corr", "slope_real"):
        np.testing.assert_allclose(counts[column], logs[column], rtol=1e-6, err_msg=column)
    assert logs[["slope", "total", "totals_ks"]].isna().all().all()
    assert counts.notna().all().all()


def test_a_type_with_too_few_new_cells_is_not_measured_on_fewer():
    new, labels = draws(200, 1)
    kept = np.concatenate([np.arange(200), 200 + np.arange(149)])
    table = measured(new[kept], labels[kept])
    assert table.loc["B", SAMPLED].isna().all()
    assert np.isfinite(table.loc["B", ["zeros", "total", "zeros_real"]].astype(float)).all()
    assert table.loc["A", SAMPLED].notna().all()
    left_out = measured(new, labels, sample_sizes={"A": 10})
    assert left_out.loc["B", SAMPLED].isna().all()


def test_no_new_cells_leave_only_what_is_real():
    new, labels = draws(20, 1)
    table = measured(new[:0], labels[:0])
    assert table.index.tolist() == ["A", "B"]
    assert table.index.name == "type"
    assert table[["zeros_real", "total_real"]].notna().all().all()
    assert table[[*SAMPLED, "zeros", "total"]].isna().all().all()


def test_common_sizes_are_the_smallest_of_all_sides():
    test = np.repeat(["a", "b", "c", "d", "e"], [500, 50, 9, 40, 40])
    available = np.repeat(["a", "b", "c", "d"], [1000, 20, 100, 40])
    assert common_sizes(test, available) == {"a": 300, "b": 20, "d": 40}
    assert common_sizes(test, available, cap=30) == {"a": 30, "b": 20, "d": 30}
    assert common_sizes(test, available, {"a": 100, "d": 5}) == {"a": 100, "b": 20}


def test_compare_and_markdown_still_serve_the_other_benchmarks():
    real, labels = draws(30, 0)
    table = compare(real, labels, *draws(25, 1))
    assert table.loc["A", ["real", "synthetic"]].tolist() == [30, 25]
    assert (table["mean corr"] > 0.9).all()
    assert to_markdown(table).startswith("| type | real | synthetic | mean corr |")
