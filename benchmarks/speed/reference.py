"""The reference's way to generate, written with our parts, to time against.

What differs from CFGen's defaults: the encoder sees whole counts, and labels only through the
dispersion; latents are not standardised, and labels have no centres; time enters as ``1000 t``; the
field is 64 wide with three blocks and does not see the size factor; conditions are dropped per
batch; dopri5 at 1e-5 integrates it; the unconditional field is called even at weight 1; counts are
drawn densely, gamma first. Settings are those of the public implementation (theislab/CFGen, commit
e347d1a), lengths of training ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cfgen_augment import CFGen, flow, network, stages
from cfgen_augment.counts import CellMatrix
from cfgen_augment.flow import guided
from cfgen_augment.likelihoods import NegativeBinomial
from cfgen_augment.solver import make_solver


def thousandfold(embedding: flow._ScalarEmbedding, s: Tensor) -> Tensor:
    """Embed a number in [0, 1] as the reference does: sinusoids of 1000 times it."""
    exponent = torch.arange(embedding.n_frequencies) / embedding.n_frequencies
    angle = 1000.0 * s * torch.exp(-math.log(1e4) * exponent)
    out: Tensor = embedding.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))
    return out


def _drop_whole_batch(attributes: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand((), generator=generator) >= dropout
    return attributes if kept else torch.zeros_like(attributes)


def _as_they_are(self: network.Network, latents: Tensor) -> Tensor:
    self.latent_mean = torch.zeros(latents.shape[1])
    self.latent_scale = torch.ones(latents.shape[1])
    return latents


def _no_centres(self: flow.VelocityField, latents: Tensor, *_: object) -> None:
    self.start_without_centres(latents.device)


@contextmanager
def _recipe() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(flow.VelocityField, "centre_on", _no_centres))
        for owner, name, other in (
            (flow._ScalarEmbedding, "forward", thousandfold),
            (stages, "drop_attributes", _drop_whole_batch),
            (network.Network, "standardise", _as_they_are),
        ):
            stack.enter_context(mock.patch.object(owner, name, other))
        yield


class Reference:
    """A model trained and sampled the reference's way.

    Parameters
    ----------
    X, labels
        Cells, ``(n_cells, n_features)``, and their types.
    max_epochs
        Of autoencoder and flow.
    """

    def __init__(self, X: CellMatrix, labels: NDArray, max_epochs: int | str = "auto") -> None:
        self.model = CFGen(
            flow_width=64,
            flow_blocks=3,
            condition_on_size_factor=False,
            count_splitting=False,
            label_weight=0.0,
            pooling=0.0,
            max_epochs=max_epochs,
            random_state=0,
            device="cpu",
        )
        with _recipe():
            self.model.fit(X, labels)

    @torch.inference_mode()
    def generate(self, labels: NDArray, *, batch: int = 10_000, seed: int = 0) -> sparse.csr_matrix:
        """Cells of the given types, drawn densely batch by batch; its notebooks take 100."""
        model = self.model
        terms = [(0.0, np.array([False])), (1.0, np.array([True]))]
        solver = make_solver("dopri5", 1, lambda: (_ for _ in ()).throw(RuntimeError))
        generator = torch.Generator().manual_seed(seed)
        codes = model.attributes_.encode({"label": labels}, len(labels))
        random = np.random.default_rng(seed)
        made = []
        with _recipe():
            for start in range(0, len(labels), batch):
                part = codes[start : start + batch]
                velocity = guided(model.network_.field, torch.as_tensor(part + 1), terms, None)
                noise = torch.randn((len(part), model.n_latent), generator=generator)
                totals = model.size_factor_.sample(part[:, 0], random)
                log_size = torch.as_tensor(np.log(totals), dtype=torch.float32)
                autoencoder = model.network_.autoencoder
                (log_mean,) = autoencoder.decode(solver(velocity, noise), log_size)
                (noise_model,) = autoencoder.likelihoods
                theta = cast(NegativeBinomial, noise_model).log_theta.exp()
                rate = torch._standard_gamma(theta.expand_as(log_mean), generator=generator) / theta
                counts = torch.poisson(rate * log_mean.exp(), generator=generator)
                made.append(sparse.csr_matrix(counts.numpy()))
        return sparse.vstack(made, format="csr")
