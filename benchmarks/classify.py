"""Classifiers that are trained with an arm's cells, and their scores on held-out cells.

Logistic regression is fitted by scikit-learn's Newton-CG rather than its default L-BFGS, because
thousands of correlated genes make the problem ill-conditioned and L-BFGS at its default
tolerance stops far from the optimum, which moves macro F1 by more than the gains under study. On
19,423 x 1,287 cells (one thread; macro F1 at the optimum .822):

==================================== ======= ========= ==================
solver, tolerance, values            seconds macro F1  cells as at optimum
==================================== ======= ========= ==================
L-BFGS, 1e-4, float64 CSR (default)  5.9     .837      99.3%
L-BFGS, 1e-5, float32 dense          8.8     .820      99.7%
Newton-CG, 1e-4, float32 CSR         6.4     .821      99.5%
Newton-CG, 1e-4, float32 dense       4.5     .822      99.5%
Newton-CG, 1e-7, float64 CSR         44      .822      100%
==================================== ======= ========= ==================

Starting from the coefficients fitted without new cells was quicker only where it also stopped
nearer to them, which would shrink every arm's gain, so all fits start from zero.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from sklearn.neighbors import NearestNeighbors

# Sparse training values become dense up to this size, where that is quicker.
_DENSE_BYTES = 2**28
_TOLERANCE = 1e-4
_MOST_STEPS = 5000
_BLOCK = 4096

Values: TypeAlias = NDArray | sparse.csr_matrix


def knn_predict(
    train: NDArray,
    labels: NDArray,
    weights: NDArray | None,
    test: NDArray,
    ks: Sequence[int] = (5, 10, 30),
) -> dict[int, NDArray]:
    """Predict by a weighted vote of the k nearest training cells.

    Parameters
    ----------
    train
        Embeddings of training cells, ``(n_train, width)``.
    labels
        Their types, ``(n_train,)``.
    weights
        Weight of every training cell's vote; None for one each.
    test
        Embeddings of the cells to predict, ``(n_test, width)``.
    ks
        Numbers of neighbours, all served by one search; capped at ``n_train``.

    Returns
    -------
    dict
        Predicted types by ``k``. A tie goes to the type that sorts first, as in
        `sklearn.neighbors.KNeighborsClassifier`.
    """
    _check(train, labels, weights)
    types, codes = np.unique(labels, return_inverse=True)
    most = min(max(ks), len(labels))
    search = NearestNeighbors(n_neighbors=most).fit(train)
    neighbours = search.kneighbors(test, return_distance=False)
    vote = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    votes = np.zeros((neighbours.shape[0], len(types)))
    rows = np.arange(neighbours.shape[0])
    predicted = {}
    for nearest in range(most):
        cells = neighbours[:, nearest]
        votes[rows, codes[cells]] += vote[cells]
        for k in ks:
            if min(k, most) == nearest + 1:
                predicted[k] = types[votes.argmax(axis=1)]
    return {k: predicted[k] for k in ks}


def logistic_predict(
    train: Values, labels: NDArray, weights: NDArray | None, test: Values
) -> NDArray:
    """Predict by multinomial logistic regression with an L2 penalty, ``C = 1``.

    Minimises ``sum_i w_i (-log p(label_i | x_i)) + ||W||^2 / 2`` over coefficients ``W`` and
    intercepts, which are not penalised.

    Parameters
    ----------
    train
        Embeddings, or log-normalised values as CSR, ``(n_train, width)``. CSR stays CSR unless
        its dense form in float32 takes less than 256 MiB.
    labels
        Types of the training cells.
    weights
        Weights ``w`` of the training cells; None for one each.
    test
        Cells to predict, ``(n_test, width)``.

    Returns
    -------
    ndarray
        Predicted types, ``(n_test,)``.
    """
    return _logistic(train, labels, weights, test, LogisticRegression.predict)


def logistic_probability(
    train: Values, labels: NDArray, test: Values, test_labels: NDArray
) -> NDArray:
    """How probable the regression of `logistic_predict` finds each cell's own label.

    Parameters
    ----------
    train, labels, test
        As there.
    test_labels
        Labels of the cells of `test`, all among those of `train`.

    Returns
    -------
    ndarray
        Probabilities, ``(n_test,)``.
    """
    of_types = _logistic(train, labels, None, test, LogisticRegression.predict_proba)
    columns = np.searchsorted(np.unique(labels), test_labels)
    return of_types[np.arange(len(test_labels)), columns]


def _logistic(
    train: Values,
    labels: NDArray,
    weights: NDArray | None,
    test: Values,
    ask: Callable[[LogisticRegression, Values], NDArray],
) -> NDArray:
    _check(train, labels, weights)
    values: Any = train.astype(np.float32)
    if sparse.issparse(values) and values.shape[0] * values.shape[1] * 4 <= _DENSE_BYTES:
        values = values.toarray()
    model = LogisticRegression(solver="newton-cg", tol=_TOLERANCE, max_iter=_MOST_STEPS)
    # What scikit-learn and scipy say when a line search fails, or does not come to an end.
    failures = (UserWarning, RuntimeWarning)
    with warnings.catch_warnings():
        for failure in failures:
            warnings.simplefilter("error", failure)
        try:
            model.fit(values, labels, sample_weight=weights)
            return ask(model, test.astype(np.float32))
        except failures:  # single precision is too coarse for these values
            pass
    model = LogisticRegression(tol=_TOLERANCE, max_iter=_MOST_STEPS)
    model.fit(train.astype(np.float64), labels, sample_weight=weights)
    return ask(model, test.astype(np.float64))


def celltypist_predict(
    train: sparse.csr_matrix,
    labels: NDArray,
    test: sparse.csr_matrix,
    genes: NDArray,
    *,
    seed: int = 0,
) -> NDArray:
    """Predict by CellTypist's logistic regression (an optional extra).

    The model is the one fitted by stochastic gradient descent, without centring so that the
    training values stay sparse: CellTypist 1.7 passes its other solver an argument
    (``multi_class``) that scikit-learn 1.8 no longer has.

    Parameters
    ----------
    train, test
        Log-normalised values to 10,000 counts per cell, ``(n_cells, n_genes)``.
    labels
        Types of the training cells.
    genes
        Gene symbols, ``(n_genes,)``.
    seed
        Of the gradient descent.

    References
    ----------
    Dominguez Conde et al., Science 376, eabl5197 (2022).
    """
    try:
        import celltypist
    except ImportError as error:
        raise ImportError(
            "expected CellTypist for --celltypist, but it is not installed: "
            "pip install 'cfgen-augment[celltypist]', or leave the option out"
        ) from error
    from anndata import AnnData

    celltypist.logger.set_level(logging.ERROR)
    # Both checks of totals are of no use here: they expect all genes, and these were chosen.
    model = celltypist.train(
        train,
        labels=labels,
        genes=genes,
        check_expression=False,
        with_mean=False,
        use_SGD=True,
        random_state=seed,
        n_jobs=1,
    )
    predicted = []
    for start in range(0, test.shape[0], _BLOCK):
        # Dense, because it cannot scale sparse cells.
        cells = AnnData(test[start : start + _BLOCK].toarray())
        cells.var_names = genes
        found = celltypist.annotate(cells, model=model).predicted_labels["predicted_labels"]
        predicted.append(found.astype(str).to_numpy())
    return np.concatenate(predicted) if predicted else np.array([], dtype=str)


def scores(true: NDArray, predicted: NDArray, types: Sequence[str]) -> pd.DataFrame:
    """Recall, precision and F1 of every type.

    Parameters
    ----------
    true, predicted
        Types of the test cells, ``(n_test,)``.
    types
        Types to report.

    Returns
    -------
    DataFrame
        ``n_test``, ``recall``, ``precision`` and ``f1``, indexed by ``type``. A type without
        test cells has NaN throughout; one with test cells that is never predicted has
        precision 0.
    """
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=list(types), average=None, zero_division=0.0
    )
    table = pd.DataFrame(
        {"n_test": support, "recall": recall, "precision": precision, "f1": f1},
        index=pd.Index(types, name="type"),
    )
    table.loc[table["n_test"] == 0, ["recall", "precision", "f1"]] = np.nan
    return table


def _check(train: Values, labels: NDArray, weights: NDArray | None) -> None:
    for name, given in (("labels", labels), ("weights", weights)):
        if given is not None and len(given) != train.shape[0]:
            raise ValueError(
                f"{name}: expected one per training cell, {train.shape[0]}; got {len(given)}"
            )
    if weights is not None and not (np.asarray(weights) > 0).all():
        raise ValueError(
            "weights: expected positive numbers; got some that are not. Leave out cells that "
            "should not count."
        )
