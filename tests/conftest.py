"""Small data with known structure, and tiny trained models shared by the tests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cfgen_augment import CFGen

REAL_DATA = Path(
    os.environ.get("CFGEN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


@dataclass
class Cells:
    """Simulated cells: negative binomial counts around a profile per type, and their donors."""

    X: sparse.csr_matrix
    labels: np.ndarray
    donors: np.ndarray


def simulate(
    sizes: dict[str, int], n_genes: int = 40, depth: float = 200.0, seed: int = 0
) -> Cells:
    """Counts with a profile per type, a donor effect, and log-normal depth."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(list(sizes), list(sizes.values()))
    donors = rng.choice(["d1", "d2", "d3"], size=len(labels))
    profiles = {name: rng.normal(0.0, 1.0, n_genes) for name in sizes}
    shifts = {name: rng.normal(0.0, 0.2, n_genes) for name in ("d1", "d2", "d3")}
    log_rate = np.stack([profiles[t] + shifts[d] for t, d in zip(labels, donors, strict=True)])
    rate = np.exp(log_rate)
    rate *= (depth * rng.lognormal(0.0, 0.3, len(labels)) / rate.sum(axis=1))[:, None]
    counts = rng.poisson(rng.gamma(5.0, rate / 5.0))
    order = rng.permutation(len(labels))
    return Cells(sparse.csr_matrix(counts[order]), labels[order], donors[order])


@pytest.fixture(scope="session")
def cells() -> Cells:
    """Three types, one of them rare: 150 cells, 40 genes."""
    return simulate({"B": 80, "NK": 12, "T": 58})


@pytest.fixture(scope="session")
def trained(cells: Cells) -> CFGen:
    """A model of `cells` trained enough to tell the types apart, with donors."""
    # Epochs of one minibatch each.
    model = CFGen(n_latent=8, max_epochs=(60, 150), batch_size=256, random_state=0, device="cpu")
    return model.fit(
        cells.X,
        cells.labels,
        covariates={"donor": cells.donors},
        feature_names=[f"gene{i}" for i in range(cells.X.shape[1])],
    )


@pytest.fixture
def adata(cells):
    """Raw counts in X and in a layer, and something in every slot of AnnData."""
    n, n_vars = cells.X.shape
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(cells.labels, categories=["T", "unused", "NK", "B"]),
            "donor": cells.donors.astype(object),
            "integer": np.arange(n, dtype=np.int32),
            "unsigned": np.arange(n, dtype=np.uint8),
            "boolean": np.arange(n) % 2 == 0,
            "real": np.linspace(0, 1, n, dtype=np.float32),
            "text": [f"barcode {i}" for i in range(n)],
            "stage": pd.Categorical(["late"] * n, categories=["early", "late"], ordered=True),
            "nullable": pd.array([None, *range(1, n)], dtype="Int16"),
        },
        index=pd.Index([f"cell{i}" for i in range(n)], name="barcode"),
    )
    made = anndata.AnnData(
        X=cells.X.astype(np.float32),
        obs=obs,
        var=pd.DataFrame(
            {"highly_variable": np.arange(n_vars) % 2 == 0},
            index=pd.Index([f"gene{i}" for i in range(n_vars)], name="symbol"),
        ),
        uns={
            "cell_type_colors": ["#111111", "#222222", "#333333", "#444444"],
            "nested": {"values": np.arange(3)},
            "neighbors": {"connectivities_key": "connectivities", "params": {"k": 5}},
        },
    )
    made.raw = made
    made.layers["counts"] = made.X.copy()
    made.layers["scaled"] = made.X.toarray() * 0.5
    made.obsm["X_pca"] = np.ones((n, 2))
    made.obsp["connectivities"] = sparse.identity(n, format="csr")
    made.varm["PCs"] = np.arange(2.0 * n_vars).reshape(n_vars, 2)
    made.varp["correlation"] = sparse.identity(n_vars, format="csr")
    return made


@pytest.fixture
def real_data():
    """Folder of the real data sets; tests that need one skip where it is not there."""

    def path(name: str) -> Path:
        file = REAL_DATA / name
        if not file.is_file():
            pytest.skip(f"needs {name}: set CFGEN_DATA to the folder that holds it")
        return file

    return path
