"""One split's frozen parts, and what becomes of it when an arm adds its cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cells import Cells, New, Training, log_normalise, log_values
from benchmarks.classify import knn_predict, logistic_predict, scores
from benchmarks.embedders import Embedder, make_embedder
from benchmarks.genes import allocation, choose_genes
from benchmarks.memorisation import memorisation
from benchmarks.realism import common_sizes, realism
from benchmarks.settings import Settings
from benchmarks.splits import Split

NEIGHBOURS = (5, 10, 30)


@dataclass(frozen=True)
class Prepared:
    """A split with everything that is fitted once, on real training cells only.

    Attributes
    ----------
    training
        What arms may see; its seed is set per arm.
    test
        Cells of held-out donors on the same genes.
    logs
        Log-normalised training and test values.
    embedders
        Frozen embedders by name.
    places
        Embeddings of training and test cells by embedder.
    """

    training: Training
    test: Cells
    logs: tuple[sparse.csr_matrix, sparse.csr_matrix]
    embedders: dict[str, Embedder]
    places: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]

    def training_with(self, seed: int) -> Training:
        """The training side with an arm's seed."""
        return replace(self.training, seed=seed)


def prepare(cells: Cells, split: Split, settings: Settings, cache: Path) -> Prepared:
    """Choose genes, embed, and allocate; held-out donors are only ever transformed.

    Parameters
    ----------
    cells
        All cells on all genes.
    split
        Which of them train and which test.
    settings
        Of the run.
    cache
        Folder for embeddings of real cells.
    """
    train = cells.take(split.train)
    genes = choose_genes(train.counts, settings.n_genes)
    train = train.with_genes(genes)
    test, pool = (cells.take(rows).with_genes(genes) for rows in (split.test, split.pool))
    embedders = {
        name: make_embedder(
            name,
            train,
            scgpt_dir=None if settings.scgpt_dir is None else Path(settings.scgpt_dir),
            cache=cache,
            seed=settings.seed,
        )
        for name in settings.embedders
    }
    return Prepared(
        Training(train, pool, allocation(train, settings.target_size), seed=0),
        test,
        (log_normalise(train.counts), log_normalise(test.counts)),
        embedders,
        {name: (e.real(train), e.real(test)) for name, e in embedders.items()},
    )


def evaluate(prepared: Prepared, new: New, settings: Settings) -> dict[str, pd.DataFrame]:
    """Fit every classifier with the arm's cells and measure the cells themselves.

    Returns
    -------
    dict of DataFrame
        ``scores`` (a row per embedder, classifier and type), ``realism`` and ``memorisation``
        (a row per type), empty where there is nothing to measure.
    """
    logs = log_values(new)
    return {
        "scores": _classified(prepared, new, logs, settings),
        "realism": _realism(prepared, new.values, new.labels, new.logged, settings),
        "memorisation": _memorised(prepared, new, logs, settings),
    }


def _classified(
    prepared: Prepared, new: New, logs: sparse.csr_matrix, settings: Settings
) -> pd.DataFrame:
    cells, test = prepared.training.cells, prepared.test
    labels = np.concatenate([cells.labels, new.labels]) if len(new) else cells.labels
    predicted: dict[tuple[str, str], NDArray] = {}
    for name, embedder in prepared.embedders.items():
        train_places, test_places = prepared.places[name]
        if len(new):
            new_places = embedder.new(new)
            if new_places is None:
                continue  # a precomputed embedding knows nothing of cells that were made
            train_places = np.concatenate([train_places, new_places])
        for k, guess in knn_predict(
            train_places, labels, new.weights, test_places, ks=NEIGHBOURS
        ).items():
            predicted[name, f"knn{k}"] = guess
        predicted[name, "lr"] = logistic_predict(train_places, labels, new.weights, test_places)
    train_logs = (
        sparse.vstack([prepared.logs[0], logs], format="csr") if len(new) else prepared.logs[0]
    )
    predicted["genes", "lr"] = logistic_predict(train_logs, labels, new.weights, prepared.logs[1])
    if settings.celltypist:
        from benchmarks.classify import celltypist_predict

        predicted["genes", "celltypist"] = celltypist_predict(
            train_logs, labels, prepared.logs[1], cells.genes
        )
    types = sorted(cells.sizes())
    added = {t: int((new.labels == t).sum()) for t in types}
    frames = []
    for (embedder_name, classifier), guess in predicted.items():
        frame = scores(test.labels, guess, types).reset_index()
        frame.insert(0, "embedder", embedder_name)
        frame.insert(1, "classifier", classifier)
        frame["n_train"] = frame["type"].map(cells.sizes())
        frame["n_added"] = frame["type"].map(added)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def real_reference(prepared: Prepared, settings: Settings) -> pd.DataFrame:
    """Realism of real cells of the training donors: the row that arms are read beside."""
    training = prepared.training
    real = sparse.vstack([training.cells.counts, training.pool.counts], format="csr")
    labels = np.concatenate([training.cells.labels, training.pool.labels])
    return _realism(prepared, real, labels, False, settings)


def _realism(
    prepared: Prepared,
    values: sparse.csr_matrix,
    labels: NDArray,
    logged: bool,
    settings: Settings,
) -> pd.DataFrame:
    if not len(labels):
        return pd.DataFrame()
    training, test = prepared.training, prepared.test
    available = np.concatenate([training.cells.labels, training.pool.labels])
    return realism(
        test.counts,
        test.labels,
        values,
        labels,
        logged=logged,
        sample_sizes=common_sizes(test.labels, available, training.to_add),
        seed=settings.seed,
    ).reset_index()


def _memorised(
    prepared: Prepared, new: New, logs: sparse.csr_matrix, settings: Settings
) -> pd.DataFrame:
    if not len(new):
        return pd.DataFrame()
    training = prepared.training
    return memorisation(
        prepared.logs[0],
        training.cells.labels,
        logs,
        new.labels,
        log_normalise(training.pool.counts),
        training.pool.labels,
        seed=settings.seed,
        counts=None if new.logged else (training.cells.counts, new.values),
    ).reset_index()


def as_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for a JSON file, NaN as null."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
