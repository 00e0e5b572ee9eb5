"""Classifiers agree with scikit-learn's, weights mean repeated cells, scores are the textbook's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_score, recall_score
from sklearn.neighbors import KNeighborsClassifier

from benchmarks import classify
from benchmarks.classify import (
    celltypist_predict,
    knn_predict,
    logistic_predict,
    logistic_probability,
    scores,
)


def overlapping(n=300, width=5, seed=0):
    """Three types that overlap, so that neighbours disagree and votes tie."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["b", "a", "c"], size=n, p=[0.6, 0.3, 0.1])
    centre = np.array([{"a": 0.0, "b": 0.8, "c": 1.6}[name] for name in labels])
    return rng.normal(size=(n, width)) + centre[:, None], labels


def sparse_logs(n=400, n_genes=60, seed=0):
    """Log values of counts of three types that overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["a", "b", "c"], size=n, p=[0.5, 0.4, 0.1])
    rate = np.full((n, n_genes), 0.3)
    for i, name in enumerate("abc"):
        rate[labels == name, 4 * i : 4 * i + 4] = 1.0
    return sparse.csr_matrix(np.log1p(rng.poisson(rate)).astype(np.float32)), labels


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("width", [5, 40])
def test_one_search_predicts_like_scikit_learn_for_every_k(width):
    train, labels = overlapping(width=width)
    test, _ = overlapping(200, width=width, seed=1)
    found = knn_predict(train, labels, None, test, ks=(5, 1, 4, 10, 30))
    assert list(found) == [5, 1, 4, 10, 30]
    for k, predicted in found.items():
        theirs = KNeighborsClassifier(k).fit(train, labels).predict(test)
        np.testing.assert_array_equal(predicted, theirs, err_msg=f"k = {k}")


def test_a_tie_goes_to_the_type_that_sorts_first():
    train = np.array([[0.0], [0.1], [5.0]])
    assert knn_predict(train, np.array(["z", "m", "z"]), None, np.array([[0.0]]), ks=(2,))[2] == "m"


def test_more_neighbours_than_cells_are_all_cells():
    train, labels = overlapping(8)
    test, _ = overlapping(5, seed=1)
    found = knn_predict(train, labels, None, test, ks=(5, 30, 100))
    theirs = KNeighborsClassifier(8).fit(train, labels).predict(test)
    np.testing.assert_array_equal(found[30], theirs)
    np.testing.assert_array_equal(found[100], theirs)


def test_a_vote_counts_as_often_as_its_weight():
    train = np.arange(5.0)[:, None]
    labels = np.array(["a", "a", "a", "b", "b"])
    at = np.array([[2.1]])
    assert knn_predict(train, labels, None, at, ks=(5,))[5] == "a"
    weights = np.array([1.0, 1.0, 1.0, 1.6, 1.6])
    assert knn_predict(train, labels, weights, at, ks=(5,))[5] == "b"


def test_a_weight_of_two_is_a_neighbour_twice():
    """The vote counted by hand, with rare cells entering it twice."""
    train, labels = overlapping()
    test, _ = overlapping(200, seed=1)
    twice = labels == "c"
    doubled = knn_predict(train, labels, 1.0 + twice, test, ks=(7,))[7]
    nearest = np.argsort(((test[:, None] - train[None]) ** 2).sum(axis=2), axis=1)[:, :7]
    for row, predicted in zip(nearest, doubled, strict=True):
        voters = labels[np.repeat(row, 1 + twice[row])]
        names, votes = np.unique(voters, return_counts=True)
        assert predicted == names[votes.argmax()]
    assert (doubled != knn_predict(train, labels, None, test, ks=(7,))[7]).any()


# ------------------------------------------------------------------ logistic


@pytest.mark.parametrize("dense_bytes", [0, 2**28], ids=["stays sparse", "made dense"])
def test_logistic_regression_is_scikit_learns(monkeypatch, dense_bytes):
    monkeypatch.setattr(classify, "_DENSE_BYTES", dense_bytes)
    train, labels = sparse_logs()
    test, _ = sparse_logs(1000, seed=1)
    predicted = logistic_predict(train, labels, None, test)
    exact = LogisticRegression(tol=1e-8, max_iter=5000).fit(train.toarray().astype(float), labels)
    odds = np.sort(exact.predict_proba(test.toarray()), axis=1)
    clear = odds[:, -1] - odds[:, -2] > 0.01
    assert clear.mean() > 0.9
    theirs = exact.predict(test.toarray())
    np.testing.assert_array_equal(predicted[clear], theirs[clear])


def test_a_probability_is_that_of_the_cells_own_label():
    values, labels = sparse_logs()
    test, own = sparse_logs(100, seed=1)
    found = logistic_probability(values, labels, test, own)
    model = LogisticRegression(solver="newton-cg", tol=1e-8).fit(values.toarray(), labels)
    of_types = model.predict_proba(test.toarray())
    expected = [p[list(model.classes_).index(name)] for p, name in zip(of_types, own, strict=True)]
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_sparse_and_dense_values_predict_alike():
    train, labels = sparse_logs()
    test, _ = sparse_logs(500, seed=1)
    ours = logistic_predict(train, labels, None, test)
    assert (ours == logistic_predict(train.toarray(), labels, None, test.toarray())).mean() > 0.99


def test_a_weight_of_two_is_a_cell_twice():
    train, labels = sparse_logs(150)
    test, _ = sparse_logs(500, seed=1)
    twice = labels == "c"
    rows = np.concatenate([np.arange(150), np.flatnonzero(twice)])
    weighed = logistic_predict(train, labels, 1.0 + twice, test)
    repeated = logistic_predict(train[rows], labels[rows], None, test)
    assert (weighed == repeated).mean() > 0.995
    assert (weighed == "c").sum() > (logistic_predict(train, labels, None, test) == "c").sum()


def test_values_too_coarse_for_single_precision_are_fitted_in_double():
    train, labels = overlapping(60)
    shifted = train * 10 + 3e4
    predicted = logistic_predict(shifted, labels, None, shifted)
    exact = LogisticRegression(max_iter=5000).fit(shifted, labels).predict(shifted)
    assert (predicted == exact).mean() > 0.9


@pytest.mark.parametrize("predict", [knn_predict, logistic_predict])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": np.array(["a", "b"])}, "labels: expected one per training cell, 10; got 2"),
        ({"weights": np.ones(3)}, "weights: expected one per training cell, 10; got 3"),
        ({"weights": np.arange(10)}, "expected positive"),
    ],
    ids=["labels", "too few weights", "weight of zero"],
)
def test_mistakes_are_named(predict, change, match):
    train, labels = overlapping(10)
    given = {"labels": labels, "weights": None} | change
    with pytest.raises(ValueError, match=match):
        predict(train, given["labels"], given["weights"], train)


def test_celltypist_tells_types_apart_or_says_what_it_lacks():
    train, labels = sparse_logs()
    test, truth = sparse_logs(300, seed=1)
    genes = np.array([f"g{i}" for i in range(train.shape[1])])
    try:
        import celltypist  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"cfgen-augment\[celltypist\]"):
            celltypist_predict(train, labels, test, genes)
        return
    predicted = celltypist_predict(train, labels, test, genes)
    assert (predicted == truth).mean() > 0.6


# -------------------------------------------------------------------- scores


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    types = ["a", "b", "c"]
    true, predicted = rng.choice(types, size=(2, 100), p=[0.6, 0.3, 0.1])
    table = scores(true, predicted, types)
    assert table.index.name == "type"
    assert table["n_test"].tolist() == [(true == t).sum() for t in types]
    for column, function in (
        ("recall", recall_score),
        ("precision", precision_score),
        ("f1", f1_score),
    ):
        theirs = function(true, predicted, labels=types, average=None)
        np.testing.assert_allclose(table[column], theirs, err_msg=column)


def test_types_without_test_cells_have_no_score_and_missed_ones_zero():
    table = scores(np.array(["a", "a", "b"]), np.array(["a", "c", "a"]), ["a", "b", "c"])
    assert table.loc["a", ["recall", "precision", "f1"]].tolist() == [0.5, 0.5, 0.5]
    assert table.loc["b", ["recall", "precision", "f1"]].tolist() == [0.0, 0.0, 0.0]
    assert table.loc["c", "n_test"] == 0
    assert table.loc["c", ["recall", "precision", "f1"]].isna().all()
