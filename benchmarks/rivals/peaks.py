r"""PeakVI and MultiVI as generators of chosen cell types, with scvi-tools.

Ashuach et al. (2022), PeakVI: a deep generative model for single-cell chromatin accessibility
analysis, Cell Reports Methods 2:100182, doi:10.1016/j.crmeth.2022.100182; Ashuach et al. (2023),
MultiVI: deep generative model for the integration of multimodal data, Nature Methods 20:1222,
doi:10.1038/s41592-023-01909-9. Networks and training are those of scvi-tools.

As for scVI in `benchmarks.rivals.scvi`, the type is the batch key, so that decoders see it, and
latents of new cells come from the posterior of random training cells of the type, or from the
prior. Depths are those of the same training cells, as the models' own encoders see them: the
expected library size :math:`l` and the depth factor :math:`d` of accessibility.

.. math::

    x_g \sim NB(l f(z, y)_g, \theta_g), \qquad
    a_j \sim \mathrm{Bernoulli}(d \, p(z, y)_j \, r_j)

with a factor :math:`r_j` per region. MultiVI's counts are negative binomial here, not
zero-inflated, as scVI's are. The learning rate is scVI's 1e-3, ten times the two models' default,
because they get some 3,000 minibatches, and no more than the 500 epochs of their default; tried on
cells of mouse kidney, 100 epochs of four minibatches left them far from converged at either rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from benchmarks.rivals.scvi import WARM_UP, batch_size, check_latents, isolated
from cfgen_augment.counts import dense_rows
from cfgen_augment.stages import block_rows

RNA, ATAC, TYPE = "rna", "atac", "type"
_RATE = 1e-3
_STEPS = 3000  # minibatches of 128 that the epochs amount to, about
_MOST_EPOCHS = 500


@dataclass(frozen=True)
class Fitted:
    """A trained model with the cells it was trained on.

    Attributes
    ----------
    module
        The networks.
    genes
        Number of genes; 0 for PeakVI.
    counts
        Genes, then peaks, of the training cells.
    labels
        Their types.
    """

    module: Any
    genes: int
    counts: sparse.csr_matrix
    labels: NDArray


def epochs(n_cells: int) -> int:
    """Default number of epochs: what makes some 3,000 steps, at most 500."""
    return max(1, min(_MOST_EPOCHS, round(_STEPS / math.ceil(n_cells / 128))))


def fit_peakvi(
    peaks: sparse.csr_matrix, labels: NDArray, seed: int, max_epochs: int | None = None
) -> Fitted:
    """Train PeakVI.

    Parameters
    ----------
    peaks
        Which peaks are open, ``(n_cells, n_peaks)``.
    labels
        Types of the cells.
    seed
        Of the training.
    max_epochs
        Passes over the cells; None as `epochs`.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    """
    with isolated(seed):
        from scvi.model import PEAKVI

        adata = _annotated(peaks, labels)
        PEAKVI.setup_anndata(adata, batch_key=TYPE)
        module = _trained(PEAKVI(adata), len(labels), max_epochs)
    return Fitted(module, 0, peaks, labels)


def fit_multivi(
    genes: sparse.csr_matrix,
    peaks: sparse.csr_matrix,
    labels: NDArray,
    seed: int,
    max_epochs: int | None = None,
) -> Fitted:
    """Train MultiVI on cells that all have both modalities.

    Parameters
    ----------
    genes
        Raw counts, ``(n_cells, n_genes)``.
    peaks, labels, seed, max_epochs
        As for `fit_peakvi`.

    Raises
    ------
    ImportError
        If scvi-tools or mudata are not installed.
    """
    with isolated(seed):
        from scvi.model import MULTIVI

        try:
            import mudata
        except ImportError as error:
            raise ImportError(
                "MultiVI takes both modalities as MuData, and mudata is not installed. Install it "
                "with pip install mudata, or leave out multivi."
            ) from error

        held = mudata.MuData({RNA: _annotated(genes, labels), ATAC: _annotated(peaks, labels)})
        MULTIVI.setup_mudata(
            held,
            batch_key=TYPE,
            modalities={"rna_layer": RNA, "atac_layer": ATAC, "batch_key": RNA},
        )
        model = MULTIVI(held, gene_likelihood="nb", fully_paired=True)
        module = _trained(model, len(labels), max_epochs, adversarial_mixing=False)
    both = sparse.hstack([genes, peaks], format="csr", dtype=np.float32)
    return Fitted(module, genes.shape[1], both, labels)


def draw(
    fitted: Fitted, wanted: Mapping[str, int], latents: str, seed: int
) -> dict[str, sparse.csr_matrix]:
    """Cells of the types wanted, in their order, by modality.

    Parameters
    ----------
    fitted
        From `fit_peakvi` or `fit_multivi`.
    wanted
        Cells of each type.
    latents
        ``"posterior"`` or ``"prior"``.
    seed
        Of everything drawn.
    """
    check_latents(latents)
    types = np.unique(fitted.labels)
    made: dict[str, list[sparse.csr_matrix]] = {RNA: [], ATAC: []} if fitted.genes else {ATAC: []}
    with isolated(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])), torch.no_grad():
        random = np.random.default_rng(seed)
        for name, n in wanted.items():
            drawn = random.choice(np.flatnonzero(fitted.labels == name), n)
            size = block_rows(fitted.counts.shape[1])
            for picked in (drawn[start : start + size] for start in range(0, n, size)):
                x = torch.from_numpy(dense_rows(fitted.counts, picked))
                code = torch.full((len(picked), 1), int(np.searchsorted(types, name)))
                for modality, values in _decoded(fitted, x, code, latents == "prior").items():
                    counts = values.numpy().astype(np.float32)
                    made[modality].append(sparse.csr_matrix(counts))
    return {name: sparse.vstack(blocks, format="csr") for name, blocks in made.items()}


def _decoded(fitted: Fitted, x: Tensor, code: Tensor, prior: bool) -> dict[str, Tensor]:
    """Counts and open peaks of new cells with the depths of `x`, and its latents unless `prior`."""
    module = fitted.module
    given: dict[str, Any] = {"batch_index": code, "cont_covs": None, "cat_covs": None}
    if fitted.genes:
        # Proteins, of which there are none, and what only weights per cell would read.
        given |= {"y": torch.zeros(len(x), 1), "label": None, "size_factor": None}
        given["cell_idx"] = torch.arange(len(x))
    found = module.inference(x=x, **given)
    z = torch.randn_like(found["z"]) if prior else found["z"]
    regions = torch.sigmoid(module.region_factors)
    if not fitted.genes:
        share = module.generative(z=z, qz_m=z, batch_index=code)["px"] * found["d"] * regions
        return {ATAC: torch.bernoulli(share)}
    from scvi.distributions import NegativeBinomial

    decoded = module.generative(
        z=z, qz_m=z, batch_index=code, libsize_expr=found["libsize_expr"], label=code
    )
    share = decoded["p"] * found["libsize_acc"] * regions
    counts = NegativeBinomial(mu=decoded["px_rate"], theta=decoded["px_r"]).sample()
    return {RNA: counts, ATAC: torch.bernoulli(share)}


def _annotated(counts: sparse.csr_matrix, labels: NDArray) -> Any:
    import anndata
    import pandas as pd

    names = [f"cell{i}" for i in range(len(labels))]
    obs = pd.DataFrame({TYPE: pd.Categorical(labels)}, index=names)
    return anndata.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=obs)


def _trained(model: Any, n_cells: int, max_epochs: int | None, **others: Any) -> Any:
    """Networks trained on all cells, on the CPU, the KL warm-up finished early on."""
    most = max_epochs or epochs(n_cells)
    model.train(
        max_epochs=most,
        lr=_RATE,
        accelerator="cpu",
        devices=1,
        train_size=1.0,
        shuffle_set_split=False,  # there is no split, and shuffling reads a global seed
        early_stopping=False,
        batch_size=batch_size(n_cells),
        n_epochs_kl_warmup=max(int(WARM_UP * most), 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **others,
    )
    return model.module.eval()
