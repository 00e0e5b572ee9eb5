"""Frozen embedders: what places real and synthetic cells before a classifier sees them.

PCA is fitted on real training cells only; scGPT is fixed before the benchmark begins; a
precomputed ``obsm`` is taken as it is. None of them ever sees a synthetic cell or a held-out
donor while it is being fitted.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA

from benchmarks.cells import Cells, New, log_normalise, log_values
from cfgen_augment.training import resolve_device

if TYPE_CHECKING:
    from benchmarks.scgpt.checkpoint import Checkpoint


class Embedder(Protocol):
    """Places cells in a space that was fixed beforehand."""

    def real(self, cells: Cells) -> NDArray[np.float32]:
        """Embedding of real cells, ``(n_cells, width)``."""
        ...

    def new(self, new: New) -> NDArray[np.float32] | None:
        """Embedding of an arm's cells; None if they cannot be embedded."""
        ...


class PCAEmbedder:
    """Principal components of log-normalised values of real training cells.

    Parameters
    ----------
    training
        Real training cells.
    n_components
        At most this many components.
    """

    def __init__(self, training: Cells, n_components: int = 50) -> None:
        width = min(n_components, len(training) - 1, len(training.genes))
        # By the covariance's eigenvectors: exact, deterministic, and never densifies the cells.
        self._pca = PCA(width, svd_solver="covariance_eigh").fit(log_normalise(training.counts))

    def real(self, cells: Cells) -> NDArray[np.float32]:
        """Embedding of real cells."""
        return self._place(log_normalise(cells.counts))

    def new(self, new: New) -> NDArray[np.float32]:
        """Embedding of an arm's cells."""
        return self._place(log_values(new))

    def _place(self, values: sparse.csr_matrix) -> NDArray[np.float32]:
        if not values.shape[0]:
            return np.zeros((0, self._pca.n_components_), dtype=np.float32)
        return self._pca.transform(values).astype(np.float32)


@dataclass(frozen=True)
class ObsmEmbedder:
    """A precomputed embedding of the real cells.

    Only arms whose new cells are copies of real cells have one.
    """

    key: str

    def real(self, cells: Cells) -> NDArray[np.float32]:
        """The stored embedding."""
        return np.asarray(cells.obsm[self.key], dtype=np.float32)

    def new(self, new: New) -> NDArray[np.float32] | None:
        """The stored embedding of the copied cells."""
        if not len(new):
            return np.zeros((0, 0), dtype=np.float32)
        found = new.obsm.get(self.key)
        return None if found is None else np.asarray(found, dtype=np.float32)


class ScGPTEmbedder:
    """scGPT from an official checkpoint directory, real cells cached by content.

    Parameters
    ----------
    directory
        Holds ``args.json``, ``best_model.pt`` and ``vocab.json``.
    genes
        Genes of the cells to come.
    cache
        Folder for the embeddings of real cells, which every arm and seed needs again.
    seed
        Seed of scGPT's two random steps: the choice of genes where there are too many, and ties
        in binning.
    """

    def __init__(self, directory: Path, genes: NDArray, cache: Path, *, seed: int) -> None:
        from benchmarks.scgpt.checkpoint import load

        self._checkpoint = load(directory)
        self._genes, self._cache, self._seed = genes, cache, seed

    def real(self, cells: Cells) -> NDArray[np.float32]:
        """Embedding of real cells, computed once for the same cells, genes and checkpoint."""
        digest = hashlib.sha256(self._checkpoint.digest.encode())
        for part in (cells.counts.indptr, cells.counts.indices, cells.counts.data):
            digest.update(np.ascontiguousarray(part).data)
        digest.update("\n".join(map(str, self._genes)).encode())
        digest.update(str(self._seed).encode())
        path = self._cache / f"{digest.hexdigest()[:32]}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
        places = self._embed(cells.counts)
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._cache, suffix=".tmp", delete=False) as file:
            np.save(file, places)
        os.replace(file.name, path)
        return places

    def new(self, new: New) -> NDArray[np.float32]:
        """Embedding of an arm's cells."""
        return self._embed(new.values)

    def _embed(self, values: sparse.csr_matrix) -> NDArray[np.float32]:
        return scgpt_embedding(self._checkpoint, values, self._genes, seed=self._seed)


def scgpt_embedding(
    checkpoint: Checkpoint, values: sparse.csr_matrix, genes: NDArray, *, seed: int
) -> NDArray[np.float32]:
    """Embed with scGPT on the best device there is, ``(n_cells, embsize)``."""
    from benchmarks.scgpt.embed import embed_cells

    if not values.shape[0]:
        return np.zeros((0, checkpoint.embsize), dtype=np.float32)
    return embed_cells(checkpoint, values, genes, seed=seed, device=str(resolve_device("auto")))


def make_embedder(
    name: str,
    training: Cells,
    *,
    scgpt_dir: Path | None,
    cache: Path,
    seed: int,
) -> Embedder:
    """The embedder called `name`, fitted on real training cells where it has to be.

    Parameters
    ----------
    name
        ``"pca"``, ``"scgpt"``, or ``"obsm:KEY"``.
    training
        Real training cells on the chosen genes.
    scgpt_dir, cache, seed
        As for `ScGPTEmbedder`.
    """
    if name == "pca":
        return PCAEmbedder(training)
    if name == "scgpt":
        if scgpt_dir is None:
            raise ValueError("--embedder scgpt: expected a checkpoint; pass --scgpt-dir.")
        return ScGPTEmbedder(scgpt_dir, training.genes, cache, seed=seed)
    key = name.removeprefix("obsm:")
    if key == name:
        raise ValueError(f"--embedder: expected pca, scgpt or obsm:KEY; got {name!r}.")
    if key not in training.obsm:
        raise ValueError(
            f"--embedder {name}: obsm has {sorted(training.obsm) or 'nothing'}; expected {key!r}."
        )
    return ObsmEmbedder(key)
