"""CFGen beside what else could be run on the same cells: the reference's way, SMOTE, scVI."""

from __future__ import annotations

import copy
import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from imblearn.over_sampling import SMOTE
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA

from benchmarks.cells import log_normalise
from benchmarks.speed.reference import Reference
from benchmarks.speed.timing import interleaved
from cfgen_augment import CFGen
from cfgen_augment.measures import wasserstein

_GENERATED = 10_000
_COMPARED = 2_000  # cells on either side of a W2
_SEEDS = 3


def against_rivals(X: sparse.csr_matrix, labels: NDArray, repeats: int) -> pd.DataFrame:
    """Seconds to train and to generate 10,000 cells, and W2 to the real cells with its spread.

    W2 is that of `cfgen_augment.measures` in 30 principal components of the real cells, over all
    types together; the mean over generation seeds and their standard deviation.

    Parameters
    ----------
    X, labels
        Cells to train on, ``(n_cells, n_features)``, and their types.
    repeats
        Rounds in which ways to generate take turns.
    """
    start = time.process_time(), time.perf_counter()
    model = CFGen(random_state=0, device="cpu").fit(X, labels)
    ours = time.process_time() - start[0], time.perf_counter() - start[1]
    reference = Reference(X, labels)
    wanted = np.random.default_rng(0).choice(labels, _GENERATED)
    adaptive = copy.copy(model)
    adaptive.solver = "dopri5"
    ways: dict[str, Callable[[int], sparse.csr_matrix]] = {
        "CFGen": lambda seed: model.generate(wanted, random_state=seed),
        "CFGen, solver='dopri5'": lambda seed: adaptive.generate(wanted, random_state=seed),
        "reference, batches of 10,000": lambda seed: reference.generate(wanted, seed=seed),
    }
    taken = interleaved({name: partial(way, 0) for name, way in ways.items()}, repeats)
    rows: dict[str, dict[str, float]] = {}
    distance = _Distance(X)
    for name, way in ways.items():
        found = [distance.to(way(seed)) for seed in range(_SEEDS)]
        rows[name] = {
            "generate: CPU s": taken[name].cpu,
            "wall s": taken[name].wall,
            "over CFGen": taken[name].ratio,
            "W2": float(np.mean(found)),
            "W2 SD": float(np.std(found, ddof=1)),
        }
    rows["reference, batches of 100"] = _once(
        lambda: reference.generate(wanted, batch=100), over=taken["CFGen"].cpu
    )
    rows["CFGen"] |= {"train: CPU s": ours[0], "train: wall s": ours[1]}
    rows["SMOTE, log values"] = _smote(X, labels)
    if importlib.util.find_spec("scvi") is not None:
        rows["scVI, to its own stopping"] = _scvi(X, labels)
    return pd.DataFrame(rows).T.rename_axis("way")


class _Distance:
    """W2 to a fixed sample of the real cells, in their principal components."""

    def __init__(self, X: sparse.csr_matrix) -> None:
        logs = log_normalise(X)
        self._pca = PCA(30, svd_solver="arpack", random_state=0).fit(logs)
        rows = np.random.default_rng(0).choice(X.shape[0], min(_COMPARED, X.shape[0]), False)
        self._real = self._pca.transform(logs[rows])

    def to(self, new: sparse.csr_matrix) -> float:
        places = self._pca.transform(log_normalise(new[: len(self._real)]))
        return wasserstein(self._real, places)


def _once(work: Callable[[], object], over: float) -> dict[str, float]:
    """A single run of what takes too long to repeat, its CPU also as a multiple of `over`."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"generate: CPU s": cpu, "wall s": wall, "over CFGen": cpu / over}


def _smote(X: sparse.csr_matrix, labels: NDArray) -> dict[str, float]:
    sizes = pd.Series(labels).value_counts()
    missing = _GENERATED // len(sizes)
    sampler = SMOTE(
        sampling_strategy={name: int(n) + missing for name, n in sizes.items()},
        k_neighbors=min(5, int(sizes.min()) - 1),
        random_state=0,
    )
    logs = log_normalise(X)
    return _once(lambda: sampler.fit_resample(logs, labels), over=math.nan)


def _scvi(X: sparse.csr_matrix, labels: NDArray) -> dict[str, float]:
    import anndata
    import scvi

    scvi.settings.seed = 0
    adata = anndata.AnnData(X.copy(), obs=pd.DataFrame({"label": labels}))
    scvi.model.SCVI.setup_anndata(adata, labels_key="label")
    model = scvi.model.SCVI(adata)
    cpu, wall = time.process_time(), time.perf_counter()
    model.train(accelerator="cpu", early_stopping=True, enable_progress_bar=False)
    return {
        "train: CPU s": time.process_time() - cpu,
        "train: wall s": time.perf_counter() - wall,
        "epochs": float(model.trainer.current_epoch),
    }
