"""`CFGenSampler` inside pipelines, searches and cross-validation."""

from __future__ import annotations

import pickle
import threading

import anndata
import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from imblearn.pipeline import Pipeline, make_pipeline
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedKFold,
    cross_val_score,
    cross_validate,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import FunctionTransformer

from cfgen_augment import CFGen, CFGenSampler

FOLDS = StratifiedKFold(3, shuffle=True, random_state=0)


def make(**parameters) -> CFGenSampler:
    quick = {"n_latent": 4, "max_epochs": 2, "n_steps": 2, "random_state": 0, "device": "cpu"}
    return CFGenSampler(**(quick | parameters))


class ToArray(TransformerMixin, BaseEstimator):
    """AnnData to log counts: the step that a classifier needs after the sampler."""

    def fit(self, X, y=None):
        self.n_cells_ = X.shape[0]
        return self

    def transform(self, X):
        counts = X.X.toarray() if isinstance(X, anndata.AnnData) else X
        return np.log1p(counts)


@pytest.fixture
def fits(monkeypatch):
    """Cells and donors of every training run of a generator."""
    seen = []
    lock = threading.Lock()
    fit = CFGen.fit

    def counting(self, X, labels, **annotation):
        with lock:
            seen.append((X.shape[0], dict(annotation.get("covariates") or {})))
        return fit(self, X, labels, **annotation)

    monkeypatch.setattr(CFGen, "fit", counting)
    return seen


@pytest.fixture
def adata(cells):
    obs = pd.DataFrame(
        {"type": cells.labels, "donor": cells.donors}, index=[f"cell{i}" for i in range(150)]
    )
    return anndata.AnnData(cells.X.copy(), obs=obs)


def test_only_training_folds_are_resampled(cells, fits):
    pipeline = make_pipeline(make(target_size=3.0), ToArray(), KNeighborsClassifier(3))
    result = cross_validate(
        pipeline, cells.X.toarray(), cells.labels, cv=FOLDS, return_estimator=True
    )
    assert [n for n, _ in fits] == [100, 100, 100]
    for fitted in result["estimator"]:
        assert fitted[1].n_cells_ == 300
        # Predicting skips the sampler: as many answers as cells asked about.
        assert fitted.predict(cells.X.toarray()[:7]).shape == (7,)
        assert fitted[0].is_synthetic_.sum() == 200
    assert result["test_score"].min() > 0.5


def test_search_over_parameters_of_the_sampler(cells):
    pipeline = Pipeline([("augment", make()), ("log", ToArray()), ("knn", KNeighborsClassifier())])
    grid = {"augment__target_size": [150, 200], "augment__exponent": [0.0, 1.0]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise")
    # Every fold trains on 75 cells, which makes 150 and 200 totals it can reach.
    search.fit(cells.X.toarray(), cells.labels)
    assert len(search.cv_results_["mean_test_score"]) == 4
    best = search.best_estimator_["augment"]
    assert best.target_size == search.best_params_["augment__target_size"]
    assert len(best.is_synthetic_) == best.target_size


def test_search_with_memory_trains_once_per_fold(cells, tmp_path, fits):
    pipeline = Pipeline(
        [
            ("augment", make()),
            ("log", FunctionTransformer(np.log1p)),
            ("classify", KNeighborsClassifier()),
        ],
        memory=str(tmp_path),
    )
    search = GridSearchCV(pipeline, {"classify__n_neighbors": [1, 3, 5, 7]}, cv=FOLDS, refit=False)
    search.fit(cells.X.toarray(), cells.labels)
    assert [n for n, _ in fits] == [100, 100, 100]
    scores = search.cv_results_["mean_test_score"]

    search.fit(cells.X.toarray(), cells.labels)  # all from the cache
    assert len(fits) == 3

    pipeline.set_params(memory=None)
    search.fit(cells.X.toarray(), cells.labels)  # the cache pays: 4 values, 3 folds
    assert len(fits) == 3 + 12
    np.testing.assert_array_equal(search.cv_results_["mean_test_score"], scores)


def test_memory_returns_what_was_fitted(cells, tmp_path, fits):
    for _ in range(2):
        pipeline = Pipeline(
            [("augment", make()), ("log", ToArray()), ("knn", KNeighborsClassifier())],
            memory=str(tmp_path),
        ).fit(cells.X.toarray(), cells.labels)
        assert pipeline["augment"].is_synthetic_.sum() == 150
        assert pipeline["augment"].generator_.generate(["NK"], random_state=0).shape == (1, 40)
    assert len(fits) == 1


@pytest.mark.parametrize(
    "parameters",
    [
        {"sampling_strategy": {"NK": 40}, "guidance": {"label": 2.0}, "max_epochs": (2, 3)},
        {"random_state": np.random.RandomState(3)},
        {"generator": CFGen(n_latent=3, hidden=(8,), max_epochs=1, device="cpu"), "n_latent": 50},
    ],
    ids=["mappings", "RandomState", "template"],
)
def test_clone(cells, parameters):
    if "generator" in parameters:
        parameters = {**parameters, "max_epochs": "auto"}
    sampler = make(**parameters)
    copied = clone(sampler)
    expected, _ = sampler.fit_resample(cells.X, cells.labels)
    got, _ = copied.fit_resample(cells.X, cells.labels)
    assert (expected != got).nnz == 0
    assert not hasattr(clone(sampler), "generator_")


def test_clone_takes_a_fitted_generator_along(cells, trained, fits):
    sampler = CFGenSampler(generator=trained, random_state=0)
    expected, _ = sampler.fit_resample(cells.X, cells.labels)
    got, _ = clone(sampler).fit_resample(cells.X, cells.labels)
    assert (expected != got).nnz == 0
    assert fits == []


def through_joblib(value, folder):
    joblib.dump(value, folder / "sampler.joblib")
    return joblib.load(folder / "sampler.joblib")


@pytest.mark.parametrize(
    "travel",
    [lambda value, _: pickle.loads(pickle.dumps(value)), through_joblib],
    ids=["pickle", "joblib"],
)
def test_fitted_samplers_travel(cells, tmp_path, travel):
    sampler = make()
    expected, _ = sampler.fit_resample(cells.X, cells.labels, donor=cells.donors)
    copied = travel(sampler, tmp_path)
    assert copied.get_params() == sampler.get_params()
    assert copied.sampling_strategy_ == sampler.sampling_strategy_
    np.testing.assert_array_equal(copied.covariates_["donor"], sampler.covariates_["donor"])
    wanted = {"covariates": {"donor": ["d1", "d2"]}, "random_state": 1}
    drawn = sampler.generator_.generate(["NK", "B"], **wanted)
    assert (drawn != copied.generator_.generate(["NK", "B"], **wanted)).nnz == 0
    again, _ = copied.fit_resample(cells.X, cells.labels, donor=cells.donors)
    assert (expected != again).nnz == 0


def test_parallel_folds_agree_with_serial_ones(cells):
    pipeline = make_pipeline(make(), ToArray(), KNeighborsClassifier(3))
    X = cells.X.toarray()
    serial = cross_val_score(pipeline, X, cells.labels, cv=FOLDS)
    with joblib.parallel_config("threading", n_jobs=2):
        parallel = cross_val_score(pipeline, X, cells.labels, cv=FOLDS)
    np.testing.assert_array_equal(serial, parallel)


# -------------------------------------------------------------------- routing


def test_donors_are_routed_fold_by_fold(cells, fits):
    X = cells.X.toarray()
    with sklearn.config_context(enable_metadata_routing=True):
        sampler = make(size_factor="donor").set_fit_resample_request(donor=True)
        pipeline = make_pipeline(sampler, ToArray(), KNeighborsClassifier(3))
        result = cross_validate(
            pipeline,
            X,
            cells.labels,
            params={"donor": cells.donors},
            cv=FOLDS,
            return_estimator=True,
            return_indices=True,
        )
        assert clone(sampler).get_metadata_routing().fit_resample.requests["donor"] is True
    for (n, covariates), fitted, rows in zip(
        fits, result["estimator"], result["indices"]["train"], strict=True
    ):
        assert n == 100
        np.testing.assert_array_equal(covariates["donor"], cells.donors[rows])
        routed = fitted[0].covariates_["donor"]
        assert len(routed) == 200
        np.testing.assert_array_equal(routed[:100], cells.donors[rows])


def test_donors_that_nobody_asked_for_are_refused(cells, fits):
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(make(), ToArray(), KNeighborsClassifier(3))
        with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError, match="donor"):
            pipeline.fit(cells.X.toarray(), cells.labels, donor=cells.donors)
    assert fits == []


def test_donors_reach_a_pipeline_that_ends_with_the_sampler(cells, fits):
    with sklearn.config_context(enable_metadata_routing=True):
        sampler = make().set_fit_resample_request(donor=True, batch="plate")
        pipeline = make_pipeline(FunctionTransformer(), sampler)
        plates = np.where(cells.donors == "d1", "p1", "p2")
        pipeline.fit_resample(cells.X, cells.labels, donor=cells.donors, plate=plates)
    ((_, covariates),) = fits
    np.testing.assert_array_equal(covariates["donor"], cells.donors)
    np.testing.assert_array_equal(covariates["batch"], plates)


# -------------------------------------------------------------------- AnnData


def test_anndata_through_grouped_folds(adata, fits):
    pipeline = make_pipeline(make(), ToArray(), LogisticRegression(max_iter=500))
    folds = GroupKFold(3)
    donors, types = adata.obs["donor"], adata.obs["type"]
    scores = cross_val_score(pipeline, adata, types, groups=donors, cv=folds, error_score="raise")
    assert scores.shape == (3,)
    assert scores.min() > 0.5
    assert sorted(n for n, _ in fits) == sorted(150 - donors.value_counts())


def test_anndata_through_a_search(adata, tmp_path, fits):
    pipeline = Pipeline(
        [("augment", make()), ("log", ToArray()), ("knn", KNeighborsClassifier())],
        memory=str(tmp_path),
    )
    search = GridSearchCV(pipeline, {"knn__n_neighbors": [1, 5]}, cv=FOLDS, error_score="raise")
    search.fit(adata, adata.obs["type"].to_numpy())
    assert search.best_estimator_.predict(adata).shape == (150,)
    assert len(fits) == 4  # once per fold, and the refit
