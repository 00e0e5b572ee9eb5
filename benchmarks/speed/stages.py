"""Every stage of fitting and generating, beside the work it cannot avoid."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.speed.timing import Work, interleaved, products, repeated
from cfgen_augment import CFGen
from cfgen_augment.generation import Wanted
from cfgen_augment.modalities import hidden_widths
from cfgen_augment.stages import block_rows, encode_cells

_BLOCK = 4096


def simulated_counts(
    n_cells: int, n_genes: int, *, seed: int, density: float = 0.07, n_types: int = 8
) -> tuple[sparse.csr_matrix, NDArray]:
    """Poisson counts of a few types at a given density, made block by block.

    Returns
    -------
    counts
        CSR, float32, ``(n_cells, n_genes)``.
    labels
        Types, ``(n_cells,)``.
    """
    random = np.random.default_rng(seed)
    profile = random.lognormal(0.0, 1.5, n_genes) * random.lognormal(0.0, 0.5, (n_types, n_genes))
    low, high = 1e-6, 1e3  # the scale at which the expected density is the wanted one
    for _ in range(60):
        scale = (low * high) ** 0.5
        dense = np.mean(1.0 - np.exp(-scale * profile)) > density
        low, high = (low, scale) if dense else (scale, high)
    codes = random.integers(n_types, size=n_cells)
    blocks = [
        sparse.csr_matrix(
            random.poisson(scale * profile[part] * random.lognormal(0.0, 0.3, (len(part), 1)))
        ).astype(np.float32)
        for part in np.array_split(codes, -(-n_cells // _BLOCK))
    ]
    return sparse.vstack(blocks, format="csr"), np.array([f"type {code}" for code in codes])


def stage_table(X: sparse.csr_matrix, labels: NDArray, repeats: int) -> pd.DataFrame:
    """CPU and wall seconds, floor, and their ratio, of every stage.

    Parameters
    ----------
    X, labels
        Cells to train on, ``(n_cells, n_features)``, and their types; as many are generated.
    repeats
        Rounds of every stage and its floor.
    """
    n, n_genes = X.shape
    model = CFGen(max_epochs=(2, 2), random_state=0, device="cpu").fit(X, labels)
    random = np.random.default_rng(0)
    codes = model.attributes_.encode({"label": labels}, n)
    totals = model.size_factor_.sample(codes[:, 0], random)
    cells = Wanted(codes, totals, model._pooled(codes[:, 0], random))
    terms = model.attributes_.terms(1.0, ["label"])
    latents = model.encode(X)
    (hidden,) = hidden_widths(model.hidden, model.modalities_)
    encoder = (n_genes, *hidden, model.n_latent)
    decoder = tuple(reversed(encoder))
    field = (model.n_latent, *(model.flow_width,) * (3 * model.flow_blocks + 1), model.n_latent)
    block = block_rows(n_genes)

    @torch.inference_mode()
    def solve() -> None:
        solver = model._solver(cells, terms, np.random.default_rng(0))
        generator = torch.Generator().manual_seed(0)
        for start in range(0, n, block):
            velocity, noise = model._start(cells[start : start + block], terms, generator)
            model.network_.latents(noise, velocity, solver)

    generated = sparse.csr_matrix(model.generate(labels, random_state=0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cells.h5ad"
        adata = anndata.AnnData(X, obs=pd.DataFrame({"cell_type": labels}, dtype="category"))
        adata.obs_names = [f"cell-{i}" for i in range(n)]
        adata.write_h5ad(file)
        blocks = -(-n // block)
        decode_floor = repeated(products(decoder, block), blocks)
        stages: dict[str, tuple[Work, Work]] = {
            "load (floor: read the bytes)": (lambda: anndata.read_h5ad(file), file.read_bytes),
            "encode": (
                lambda: encode_cells(model.network_.autoencoder, [X], torch.device("cpu")),
                repeated(products(encoder, block), blocks),
            ),
            "solve": (solve, repeated(products(field, block), blocks * model.n_steps)),
            "decode, draw, build CSR": (
                lambda: model.generate(labels, latents=latents, random_state=0),
                decode_floor,
            ),
            "generate (floor: decoder's products)": (
                lambda: model.generate(labels, random_state=0),
                decode_floor,
            ),
            "stack CSR (floor: copy the bytes)": (
                lambda: sparse.vstack([generated], format="csr"),
                lambda: (generated.data.copy(), generated.indices.copy()),
            ),
        }
        rows = {name: _row(*work, repeats) for name, work in stages.items()}
    return pd.DataFrame(rows).T.rename_axis("stage")


def import_seconds(repeats: int = 7) -> float:
    """Wall seconds that ``import cfgen_augment`` takes in a fresh process, median."""
    script = (
        "import time; t = time.perf_counter(); import cfgen_augment; print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", script]
    taken = [
        float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        for _ in range(repeats)
    ]
    return float(np.median(taken))


def _row(work: Work, floor: Work, repeats: int) -> dict[str, float]:
    taken = interleaved({"floor": floor, "stage": work}, repeats)
    return {
        "CPU s": taken["stage"].cpu,
        "wall s": taken["stage"].wall,
        "floor CPU s": taken["floor"].cpu,
        "ratio": taken["stage"].ratio,
    }
