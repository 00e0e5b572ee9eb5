"""The networks of a fitted model as one module: autoencoder, flow, and what joins them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from cfgen_augment.autoencoder import Autoencoder
from cfgen_augment.flow import VelocityField, guided, noise_scale
from cfgen_augment.likelihoods import make_likelihood
from cfgen_augment.solver import Solver, Velocity


class Network(nn.Module):
    """Autoencoder, velocity field, and the moments its latents are standardised by.

    Parameters
    ----------
    likelihood, n_groups
        Name of the noise model, and number of groups with a dispersion of their own.
    n_features, n_latent, hidden
        Shape of the autoencoder.
    n_categories
        Number of categories of every attribute the flow is conditioned on, the label first.
    label_head
        Whether the autoencoder has a classifier of labels, see `Autoencoder`.
    flow_width, flow_blocks
        Shape of the velocity field.
    size_factor
        Whether the flow sees the size factor.
    """

    def __init__(
        self,
        *,
        likelihood: str,
        n_groups: int,
        n_features: int,
        n_latent: int,
        hidden: Sequence[int],
        n_categories: Sequence[int],
        label_head: bool,
        flow_width: int,
        flow_blocks: int,
        size_factor: bool,
    ) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(
            make_likelihood(likelihood, n_features, n_groups),
            n_features,
            n_latent,
            hidden,
            n_labels=n_categories[0] if label_head else 0,
        )
        self.field = VelocityField(
            n_latent,
            n_categories,
            width=flow_width,
            n_blocks=flow_blocks,
            n_embedding=flow_width,
            size_factor=size_factor,
        )
        self.latent_mean: Tensor
        self.latent_scale: Tensor
        self.register_buffer("latent_mean", torch.zeros(n_latent))
        self.register_buffer("latent_scale", torch.ones(n_latent))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.latent_mean.device

    def standardise(self, latents: Tensor) -> Tensor:
        """Fix the moments to those of `latents` ``(n_cells, n_latent)``; return them scaled."""
        self.latent_mean = latents.mean(dim=0)
        self.latent_scale = latents.std(dim=0, correction=0).clamp_min(1e-6)
        return (latents - self.latent_mean) / self.latent_scale

    def velocity(
        self,
        attributes: Tensor,
        terms: Sequence[tuple[float, NDArray[np.bool_]]],
        flow_size: Tensor | None,
        pooled: Tensor | None = None,
    ) -> Velocity:
        """The guided field of cells with the given attributes, see `flow.guided`."""
        return guided(self.field, attributes, terms, flow_size, pooled)

    def noise_scale(
        self, attributes: Tensor, terms: Sequence[tuple[float, NDArray[np.bool_]]]
    ) -> Tensor:
        """Standard deviation ``(n, 1)`` of the noise that cells start from."""
        return noise_scale(self.field, attributes, terms)

    def latents(self, noise: Tensor, velocity: Velocity, solver: Solver) -> Tensor:
        """Carry noise ``(n, n_latent)`` to latents along the field."""
        return self.latent_mean + self.latent_scale * solver(velocity, noise)

    def draw(
        self, latents: Tensor, log_size: Tensor, groups: Tensor, generator: torch.Generator
    ) -> sparse.csr_matrix | np.ndarray:
        """Decode latents at log size factors ``(n, 1)`` and draw from the noise model."""
        output = self.autoencoder.decoder(latents)
        return self.autoencoder.likelihood.sample(output, log_size, groups, generator=generator)
