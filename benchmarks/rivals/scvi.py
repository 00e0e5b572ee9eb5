r"""scVI and scANVI as generators of chosen cell types, with scvi-tools.

Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics, Nature Methods
15:1053, doi:10.1038/s41592-018-0229-2; Xu et al. (2021), Probabilistic harmonization and
annotation of single-cell transcriptomics data with deep generative models, Molecular Systems
Biology 17:e9620, doi:10.15252/msb.20209620. Training and networks are those of scvi-tools.

Latents `z` of new cells come from the aggregate posterior of the type: a training cell of it is
drawn with replacement, then ``z ~ q(z | x)`` of that cell, whose total `l` is taken too. Sampling
from the prior, the way the CFGen paper (arXiv 2407.11734) ran scVI, can be chosen instead. Tried
as in `benchmarks.rivals.diffusion`, posterior against prior: scVI on two splits kNN .40 against
.32 and .24 against .13, logistic regression .19 against .15 and .11 against .13; scANVI on one
split kNN .19 against -.01, logistic regression .11 against -.07. So the posterior is the
default, though for scVI logistic regression does not decide; it was chosen on held-out donors.

- scVI has no label of its own, so the type is its batch key: the decoder sees it.
  :math:`x \sim NB(l f(z, y), \theta)`, prior :math:`z \sim N(0, I)`.
- scANVI has the type in the prior of its latent: :math:`x \sim NB(l f(z), \theta)`, prior
  :math:`u \sim N(0, I), z \sim N(m(u, y), v(u, y))`.

Two layers, 30 latents and the negative binomial are what the tutorials of scvi-tools take for UMI
counts. The weight of the KL term reaches one after a quarter of the epochs; scvi-tools' default
is 400 epochs, more than there are. Both train on the CPU, so that their seconds compare.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random as python_random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from benchmarks.cells import New, Training, nothing
from benchmarks.rivals.oversampling import wanted
from cfgen_augment.counts import dense_rows, total_counts
from cfgen_augment.stages import block_rows

Latents: TypeAlias = Literal["posterior", "prior"]

_UNKNOWN = "not labelled"  # scANVI wants a name for cells without a type; there are none
_TYPE = "type"
WARM_UP = 0.25  # share of the epochs over which the weight of the KL term grows to one
_STEPS = 8000  # minibatches of 128 that the epochs amount to, about, in large data


def scvi(
    training: Training, *, max_epochs: int | None = None, latents: Latents = "posterior"
) -> New:
    """Generate raw counts of the types wanted with scVI, its decoder conditioned on type.

    Parameters
    ----------
    training
        The training side of a split.
    max_epochs
        Passes over the training cells; by default 100, fewer above 10,240 cells.
    latents
        Where latents are drawn from: the posterior of the type's cells, or the prior.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    """
    return _generate(training, max_epochs, latents, _fit_scvi, _scvi_prior, batch_is_type=True)


def scanvi(
    training: Training, *, max_epochs: int | None = None, latents: Latents = "posterior"
) -> New:
    """Generate raw counts of the types wanted with scANVI, every training cell labelled.

    Parameters
    ----------
    training
        The training side of a split.
    max_epochs
        Passes over the training cells, two thirds of them scVI's, which scANVI starts from; by
        default 100, fewer above 10,240 cells.
    latents
        Where latents are drawn from: the posterior of the type's cells, or the prior.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    """
    return _generate(training, max_epochs, latents, _fit_scanvi, _scanvi_prior, batch_is_type=False)


def epochs(n_cells: int, batch_size: int = 128) -> int:
    """Default number of epochs: 100, and in large data what makes some 8,000 steps."""
    return max(1, min(100, round(_STEPS / math.ceil(n_cells / batch_size))))


def batch_size(n_cells: int, wanted_size: int = 128) -> int:
    """Minibatch size near `wanted_size` that leaves no single cell, which batch norm refuses."""
    size = wanted_size
    while n_cells > 1 and n_cells % size == 1:
        size += 1
    return size


def fit(training: Training, max_epochs: int | None = None) -> Any:
    """Train scVI, the type its batch key, for `draw`; parameters as of `scvi`.

    Returns
    -------
    Module
        The trained networks.
    """
    with isolated(training.seed):
        return _train(training, max_epochs, _fit_scvi)


def draw(training: Training, module: Any, latents: str = "posterior") -> New:
    """Raw counts of the types wanted from what `fit` trained; parameters as of `scvi`."""
    check_latents(latents)
    # A stream of its own: not the one that training began with.
    with isolated(int(np.random.SeedSequence([training.seed, 1]).generate_state(1)[0])):
        return _draw(training, module, latents, _scvi_prior, batch_is_type=True)


def _generate(
    training: Training,
    max_epochs: int | None,
    latents: Latents,
    fit: Callable[[Any, int], Any],
    prior: Callable[[Any, Tensor], Tensor],
    *,
    batch_is_type: bool,
) -> New:
    """Train, then draw."""
    check_latents(latents)
    if not wanted(training):
        return nothing(training.cells.counts.shape[1])
    with isolated(training.seed):
        module = _train(training, max_epochs, fit)
        return _draw(training, module, latents, prior, batch_is_type=batch_is_type)


def check_latents(latents: str) -> None:
    """Raise ValueError unless `latents` says where to draw them from."""
    if latents not in ("posterior", "prior"):
        raise ValueError(f"latents: expected 'posterior' or 'prior'; got {latents!r}.")


def _train(training: Training, max_epochs: int | None, fit: Callable[[Any, int], Any]) -> Any:
    return fit(_annotated(training), max_epochs or epochs(len(training.cells))).module.eval()


def _draw(
    training: Training,
    module: Any,
    latents: str,
    prior: Callable[[Any, Tensor], Tensor],
    *,
    batch_is_type: bool,
) -> New:
    """Draw latents, totals and counts, type by type."""
    types = wanted(training)
    counts = training.cells.counts
    codes = {name: i for i, name in enumerate(training.cells.sizes())}
    random = np.random.default_rng(training.seed)
    totals = total_counts(counts)
    made = []
    for name, rows, n in types:
        drawn = random.choice(rows, n)
        size = block_rows(counts.shape[1])
        for picked in (drawn[start : start + size] for start in range(0, n, size)):
            code = torch.full((len(picked), 1), codes[name])
            batch = code if batch_is_type else torch.zeros_like(code)
            depth = torch.from_numpy(totals[picked]).float().log()[:, None]
            with torch.no_grad():
                if latents == "prior":
                    z = prior(module, code)
                else:
                    x = torch.from_numpy(dense_rows(counts, picked))
                    z = module.inference(x=x, batch_index=batch)["z"]
                cells = module.generative(z=z, library=depth, batch_index=batch)["px"]
                made.append(sparse.csr_matrix(cells.sample().numpy().astype(np.float32)))
    labels = np.repeat(np.array([name for name, _, _ in types]), [n for _, _, n in types])
    return New(sparse.vstack(made, format="csr", dtype=np.float32), labels)


def _annotated(training: Training) -> Any:
    """Counts and types of the training cells as AnnData, and nothing else."""
    import anndata
    import pandas as pd

    adata = anndata.AnnData(sparse.csr_matrix(training.cells.counts, dtype=np.float32))
    adata.obs[_TYPE] = pd.Categorical(training.cells.labels)
    return adata


def _fit_scvi(adata: Any, max_epochs: int) -> Any:
    from scvi.model import SCVI

    SCVI.setup_anndata(adata, batch_key=_TYPE)
    return _trained(SCVI(adata, n_layers=2, n_latent=30, gene_likelihood="nb"), max_epochs)


def _fit_scanvi(adata: Any, max_epochs: int) -> Any:
    from scvi.model import SCANVI, SCVI

    SCVI.setup_anndata(adata)
    first = max(round(max_epochs * 2 / 3), 1)
    start = _trained(SCVI(adata, n_layers=2, n_latent=30, gene_likelihood="nb"), first)
    model = SCANVI.from_scvi_model(start, unlabeled_category=_UNKNOWN, labels_key=_TYPE)
    return _trained(model, max(max_epochs - first, 1))


def _scvi_prior(module: Any, codes: Tensor) -> Tensor:
    """Latents from the prior, whatever the type; the decoder is told it."""
    return torch.randn((len(codes), module.n_latent))


def _scanvi_prior(module: Any, codes: Tensor) -> Tensor:
    """Latents from the prior of the types `codes` ``(n, 1)``."""
    u = torch.randn((len(codes), module.n_latent))
    mean, variance = module.decoder_z1_z2(u, codes)
    return mean + variance.sqrt() * torch.randn(mean.shape)


def _trained(model: Any, max_epochs: int) -> Any:
    """Train on all cells, on the CPU, the KL warm-up finished after a share of the epochs."""
    model.train(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        train_size=1.0,
        shuffle_set_split=False,  # there is no split, and shuffling reads a global seed
        batch_size=batch_size(model.adata.n_obs),
        plan_kwargs={"n_epochs_kl_warmup": max(int(WARM_UP * max_epochs), 1)},
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return model


@contextlib.contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global states that scvi-tools draws from and put them back; keep it quiet.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    """
    # Before the states are saved and the levels set: importing changes both.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import scvi
        except ImportError as error:
            raise ImportError(
                "scVI and scANVI need scvi-tools, which is not installed. Install it with "
                "pip install 'scvi-tools>=1.4.2', or leave out these arms."
            ) from error
    verbosity = scvi.settings.verbosity
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "scvi")]
    levels = [logger.level for logger in loggers]
    python_state, numpy_state = python_random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scvi.settings.verbosity = logging.ERROR
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            python_random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        python_random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        scvi.settings.verbosity = verbosity
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
