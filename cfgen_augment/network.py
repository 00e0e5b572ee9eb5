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
from cfgen_augment.likelihoods import make_likelihoods
from cfgen_augment.modalities import Modality, n_sizes
from cfgen_augment.solver import Solver, Velocity


class Network(nn.Module):
    """Autoencoder, velocity field, and the moments its latents are standardised by.

    Parameters
    ----------
    modalities, n_groups
        What cells consist of, and number of groups with a dispersion of their own.
    n_latent, hidden
        Shape of the autoencoder; `hidden` has the layers of every modality.
    n_categories
        Number of categories of every attribute the flow is conditioned on, the label first.
    label_head
        Whether the autoencoder has a classifier of labels, see `Autoencoder`.
    flow_width, flow_blocks
        Shape of the velocity field.
    condition_on_size_factor
        Whether the flow sees the size factors.
    """

    def __init__(
        self,
        *,
        modalities: Sequence[Modality],
        n_groups: int,
        n_latent: int,
        hidden: Sequence[Sequence[int]],
        n_categories: Sequence[int],
        label_head: bool,
        flow_width: int,
        flow_blocks: int,
        condition_on_size_factor: bool,
    ) -> None:
        super().__init__()
        likelihoods = make_likelihoods(
            [(modality.likelihood, modality.n_features) for modality in modalities], n_groups
        )
        self.autoencoder = Autoencoder(
            likelihoods,
            [modality.n_features for modality in modalities],
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
            n_size_factors=n_sizes(modalities) if condition_on_size_factor else 0,
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
    ) -> list[sparse.csr_matrix | np.ndarray]:
        """Decode latents at log size factors ``(n, n_sizes)`` and draw from the noise models."""
        made = self.autoencoder
        parts = zip(made.decoders, made.likelihoods, made.log_sizes(log_size), strict=True)
        return [
            likelihood.sample(decoder(latents), own, groups, generator=generator)
            for decoder, likelihood, own in parts
        ]
