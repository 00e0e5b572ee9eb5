"""``make demo``: what augmenting does for cells that the generator never saw.

Three stratified folds of real PBMC counts. In each, CFGen is trained on the training cells only,
doubles them with rare types first, and two classifiers are fitted with and without the synthetic
cells and scored on the fold that was held out. The data have no donors, so folds stand in for
them; and a type with a dozen cells has four in a fold, so read single types with care.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from benchmarks.data import demo_counts
from benchmarks.hardware import hardware
from cfgen_augment import CFGenSampler


def log_normalise(counts: sparse.csr_matrix, depth: float = 1e4) -> NDArray[np.float32]:
    """``log(1 + depth * x / total)``, dense."""
    totals = np.maximum(np.asarray(counts.sum(axis=1)), 1.0)
    dense = counts.toarray() * (depth / totals)
    return np.log1p(dense).astype(np.float32)


def classifiers(seed: int) -> dict[str, Any]:
    """The two classifiers of the table."""
    return {
        "kNN": make_pipeline(PCA(30, random_state=seed), KNeighborsClassifier(10)),
        "LR": LogisticRegression(max_iter=300),
    }


def run(output: Path, folds: int, seed: int) -> pd.DataFrame:
    """Cross-validate, draw the figure, and return the table."""
    adata = demo_counts()
    X, y = adata.X, adata.obs["cell_type"].astype(str).to_numpy()
    types, sizes = np.unique(y, return_counts=True)
    names = list(classifiers(seed))
    predicted = {(name, arm): np.empty_like(y) for name in names for arm in ("before", "after")}
    for number, (train, test) in enumerate(
        StratifiedKFold(folds, shuffle=True, random_state=seed).split(X, y), start=1
    ):
        start = time.perf_counter()
        sampler = CFGenSampler(target_size=2.0, random_state=seed)
        X_res, y_res = sampler.fit_resample(X[train], y[train])
        print(
            f"fold {number} of {folds}: {len(train)} real cells -> {len(y_res)} cells in "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for arm, (counts, labels) in {
            "before": (X[train], y[train]),
            "after": (X_res, y_res),
        }.items():
            for name, classifier in classifiers(seed).items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    classifier.fit(log_normalise(counts), labels)
                predicted[name, arm][test] = classifier.predict(log_normalise(X[test]))
    table = pd.DataFrame({"cells": sizes}, index=pd.Index(types, name="type"))
    for name in names:
        for arm in ("before", "after"):
            table[f"{name} {arm}"] = f1_score(
                y, predicted[name, arm], average=None, labels=types, zero_division=0
            )
        table[f"{name} gain"] = table[f"{name} after"] - table[f"{name} before"]
    table = table.sort_values("cells")
    table.loc["mean of types"] = table.mean()
    table.loc["mean of types", "cells"] = table["cells"].iloc[:-1].sum()
    table["cells"] = table["cells"].astype(int)
    draw(output, X[train], y[train], X_res, y_res, sampler.is_synthetic_, table)
    return table


def draw(
    output: Path,
    X: sparse.csr_matrix,
    y: NDArray,
    X_res: sparse.csr_matrix,
    y_res: NDArray,
    synthetic: NDArray[np.bool_],
    table: pd.DataFrame,
) -> None:
    """Real and synthetic cells of the last fold on the real cells' first two PCs, and gains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pca = PCA(2, random_state=0).fit(log_normalise(X))
    places = pca.transform(log_normalise(X_res))
    figure, axes = pyplot.subplots(
        1, 3, figsize=(17, 5.6), width_ratios=[1, 1, 1.1], layout="constrained"
    )
    colours = pyplot.get_cmap("tab10")
    for axis, mask, title in (
        (axes[0], ~synthetic, "real training cells"),
        (axes[1], synthetic, "synthetic cells"),
    ):
        for i, name in enumerate(np.unique(y)):
            shown = mask & (y_res == name)
            axis.scatter(*places[shown].T, s=9, color=colours(i), label=name, alpha=0.7, lw=0)
        axis.set(title=f"{title} ({mask.sum()})", xlabel="PC 1", ylabel="PC 2")
        axis.set(xlim=_margins(places[:, 0]), ylim=_margins(places[:, 1]))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=5, fontsize=8, frameon=False)
    gains = table.iloc[:-1]
    at = np.arange(len(gains))
    axes[2].barh(at - 0.2, gains["kNN gain"], 0.4, label="kNN on PCA")
    axes[2].barh(at + 0.2, gains["LR gain"], 0.4, label="logistic regression")
    axes[2].axvline(0, color="black", lw=0.8)
    axes[2].set_yticks(at, [f"{n} ({c})" for n, c in zip(gains.index, gains["cells"], strict=True)])
    axes[2].set(
        title="change in F1 on held-out folds, rarest type lowest", xlabel="F1 after - before"
    )
    axes[2].legend(frameon=False)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "demo.png", dpi=110)
    pyplot.close(figure)


def _margins(values: NDArray) -> tuple[float, float]:
    low, high = values.min(), values.max()
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    table = run(given.output, given.folds, given.seed)
    table.to_csv(given.output / "demo.csv")
    print(f"\nF1 per type on {given.folds} held-out folds, without and with CFGen's cells")
    print(table.round(3).to_string())
    print(
        f"\nfigure and table in {given.output}/; {time.perf_counter() - start:.0f} s, {hardware()}"
    )


if __name__ == "__main__":
    main()
