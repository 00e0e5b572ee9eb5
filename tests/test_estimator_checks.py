"""The estimator checks of imbalanced-learn and scikit-learn, on the sampler as it is.

With the Gaussian likelihood they run unmodified. The default likelihood takes counts, which the
checks' data are not: there the data pass through `as_counts` where the checks make them, and
nothing else differs.
"""

from __future__ import annotations

import functools

import imblearn.utils.estimator_checks as imblearn_checks
import numpy as np
import pytest
import sklearn.utils.estimator_checks as sklearn_checks

from cfgen_augment import CFGenSampler

# scikit-learn's checks turn features into labels, which leaves classes of any size.
small_classes_warn = pytest.mark.filterwarnings("ignore:No cells are generated for types")


def sampler(strategy: str = "auto", **parameters) -> CFGenSampler:
    quick = {"n_latent": 4, "max_epochs": 2, "n_steps": 2, "random_state": 0, "device": "cpu"}
    return CFGenSampler(strategy, **quick, **parameters)


def checks_of(module, estimator: CFGenSampler, expected_failures: dict[str, str] | None = None):
    """`module.parametrize_with_checks`, with the cases in a list.

    pytest 9 deprecates the generator that both libraries pass to it.
    """
    mark = module.parametrize_with_checks(
        [estimator], expected_failed_checks=lambda _: expected_failures or {}
    )
    names, cases = mark.args
    return pytest.mark.parametrize(names, list(cases), **mark.kwargs)


def as_counts(X):
    """Poisson counts that grow with the features; the same for the same features."""
    X = np.asarray(X)
    rate = np.exp(np.clip(X, -3.0, 3.0))
    return np.random.default_rng(0).poisson(rate).astype(X.dtype)


@pytest.fixture
def count_data(monkeypatch):
    """Make the checks' data counts, where the checks make them."""

    def counted(make):
        @functools.wraps(make)
        def wrapped(*args, **kwargs):
            made = make(*args, **kwargs)
            return (as_counts(made[0]), *made[1:]) if isinstance(made, tuple) else as_counts(made)

        return wrapped

    for module in (imblearn_checks, sklearn_checks):
        # What the checks themselves call to fit data to an estimator's tags.
        enforce = counted(module._enforce_estimator_tags_X)
        monkeypatch.setattr(module, "_enforce_estimator_tags_X", enforce)
    generate = counted(imblearn_checks.sample_dataset_generator)
    monkeypatch.setattr(imblearn_checks, "sample_dataset_generator", generate)
    monkeypatch.setattr(np.random, "random", counted(np.random.random))


@checks_of(imblearn_checks, sampler(likelihood="gaussian"))
def test_imblearn(estimator, check):
    check(estimator)


@checks_of(sklearn_checks, sampler(likelihood="gaussian"))
def test_sklearn(estimator, check):
    check(estimator)


@checks_of(imblearn_checks, sampler())
def test_imblearn_on_counts(estimator, check, count_data):
    check(estimator)


@small_classes_warn
@checks_of(sklearn_checks, sampler())
def test_sklearn_on_counts(estimator, check, count_data):
    check(estimator)


@checks_of(
    imblearn_checks,
    sampler("inverse-sqrt", target_size=1.2),
    {
        "check_samplers_fit_resample": "asserts that every class reaches the largest one; "
        "inverse-sqrt fills a total and leaves some of the imbalance, on purpose"
    },
)
def test_imblearn_on_counts_with_own_strategy(estimator, check, count_data):
    check(estimator)


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
@pytest.mark.parametrize(
    "check",
    [
        # In imbalanced-learn's own test suite, but not among the checks it hands out.
        imblearn_checks.check_param_validation,
        imblearn_checks.check_dataframe_column_names_consistency,
    ],
)
def test_imblearn_not_handed_out(check, likelihood, request):
    if likelihood == "nb":
        request.getfixturevalue("count_data")
    check("CFGenSampler", sampler(likelihood=likelihood))
