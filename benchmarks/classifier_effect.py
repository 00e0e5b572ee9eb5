"""How much of an augmentation gain is due to the fit of the logistic regression.

    python -m benchmarks.classifier_effect --data cells.h5ad --thin "type:20" --splits 3

Gains over `none` in macro F1 of rare types, one seed, the same cells for every fit: to the
optimum (as the benchmark does it), with scikit-learn's defaults (L-BFGS, at most 100 steps), and
with those on standardised values.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.arms import ARMS
from benchmarks.cells import log_values
from benchmarks.classify import logistic_predict, scores
from benchmarks.evaluation import Prepared, prepare
from benchmarks.hardware import hardware
from benchmarks.run import arm_seed, cells_of, splits_of
from benchmarks.settings import Settings
from benchmarks.splits import parse_thin

_ARMS = ("none", "reweight", "ros", "nb", "mixup", "oracle")


def default_fit(
    train: NDArray, labels: NDArray, weights: NDArray | None, test: NDArray, *, scaled: bool
) -> NDArray:
    """Types predicted by scikit-learn's `LogisticRegression` as it comes, converged or not."""
    if scaled:
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression().fit(train, labels, sample_weight=weights).predict(test)


def rare_f1(prepared: Prepared, arm: str, seed: int, rare_share: float) -> pd.Series:
    """Macro F1 of rare types by values and fit."""
    training = prepared.training_with(seed)
    new = ARMS[arm].make(training)
    labels = np.concatenate([training.cells.labels, new.labels])
    real, test = prepared.places["pca"]
    made = prepared.embedders["pca"].new(new)
    values = {
        "pca": (real if made is None or not len(new) else np.concatenate([real, made]), test),
        "genes": (
            sparse.vstack([prepared.logs[0], log_values(new)]).toarray()
            if len(new)
            else prepared.logs[0].toarray(),
            prepared.logs[1].toarray(),
        ),
    }
    sizes = training.cells.sizes()
    rare = [t for t, n in sizes.items() if n < rare_share * len(training.cells)]
    found = {}
    for name, (train, held_out) in values.items():
        fits = {
            "optimum": logistic_predict(train, labels, new.weights, held_out),
            "default": default_fit(train, labels, new.weights, held_out, scaled=False),
            "default, standardised": default_fit(train, labels, new.weights, held_out, scaled=True),
        }
        for fit, guess in fits.items():
            frame = scores(prepared.test.labels, guess, sorted(sizes))
            found[name, fit] = frame.loc[rare, "f1"].mean()
    return pd.Series(found).rename_axis(["values", "fit"])


def main() -> None:
    """Measure every split and print mean gains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--thin", default="")
    parser.add_argument("--splits", type=int, default=3)
    given = parser.parse_args()
    settings = Settings(
        data=given.data,
        n_splits=given.splits,
        thin=tuple(parse_thin(given.thin).items()) if given.thin else (),
    )
    gains: dict[str, list[pd.Series]] = {arm: [] for arm in _ARMS}
    for split in range(given.splits):
        # PCA writes nothing to the folder for embeddings.
        prepared = prepare(cells_of(settings), splits_of(settings)[split], settings, Path())
        seed = arm_seed(settings, split, 0)
        baseline = rare_f1(prepared, "none", seed, settings.rare_share)
        for arm in _ARMS:
            found = baseline if arm == "none" else rare_f1(prepared, arm, seed, settings.rare_share)
            gains[arm].append(found if arm == "none" else found - baseline)
    table = pd.DataFrame(
        {arm: pd.concat(found, axis=1).mean(axis=1) for arm, found in gains.items()}
    )
    print(table.round(3).T.rename(index={"none": "none (macro F1)"}).to_string())
    print(hardware())


if __name__ == "__main__":
    main()
