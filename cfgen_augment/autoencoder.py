"""The count autoencoder: cells to latents and back to the parameters of a noise model.

``x -> log1p -> MLP -> z -> mirrored MLP -> output -> likelihood(natural(output, log l))``,
deterministic and without a prior, as in Section 4.1 of the CFGen paper (arXiv 2407.11734): the
flow, not a KL term, learns how the latents are distributed.

Two things are not in the paper. With count splitting the encoder sees a random part of every
count and the likelihood is on the rest, so that latents do not carry the cell's own counting
noise, which the noise model then adds again. And a linear classifier of labels on the latents adds
its cross-entropy to the loss: what few cells of a rare label have in common is a small part of
the likelihood, but all of what tells them apart.

Modalities of the same cells have an encoder and a decoder each, and share the latent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cfgen_augment.likelihoods import Likelihood
from cfgen_augment.minibatch import Minibatch

Value = TypeVar("Value")

# Features, beyond which the label keeps its weight beside the likelihood of a whole cell. The mean
# over features thins out as features are added that tell little, as most of a genome or of all
# peaks do; a label beside that mean would come to outweigh the cell.
_FEATURES_OF_FULL_WEIGHT = 1_300


def _mlp(widths: Sequence[int], last: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Linear, batch norm and ELU between the `widths`; the last layer is linear alone."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ELU()]
    return nn.Sequential(*layers, last(widths[-2], widths[-1]))


class _Output(nn.Linear):
    """A decoder's last layer, whose features need not all be learned at the same speed.

    Adam's steps are as large for a gene with two counts in a minibatch as for one with two
    thousand, and the thousands of rare ones overfit while the others still have far to go. While
    there are `speeds`, the layer's weights are `weight` times them, and so its steps.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("speeds", None, persistent=False)
        self.speeds: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.speeds is None:
            return super().forward(hidden)
        return torch.addcmul(self.bias, F.linear(hidden, self.weight), self.speeds)

    @torch.no_grad()
    def start_at(self, output: Tensor, speeds: Tensor) -> None:
        """Say the same of all cells: weights begin at zero."""
        self.bias.copy_(output)
        self.weight.zero_()
        self.speeds = speeds

    @torch.no_grad()
    def finish(self) -> None:
        """Be a linear layer like any other."""
        if self.speeds is not None:
            self.weight.mul_(self.speeds[:, None])
            self.speeds = None


class Autoencoder(nn.Module):
    """An encoder, a mirrored decoder and a noise model per modality, and one latent for all.

    The encoders' last layers are linear and their outputs are added up. That is one linear layer
    on the concatenation of their last hidden layers; a single modality is the sum of one.

    Parameters
    ----------
    likelihoods
        Noise model of every modality.
    widths
        Number of features of every modality, for example genes.
    n_latent
        Width of the latent space.
    hidden
        For every modality, widths of the encoder's hidden layers; the decoder has them in reverse.
    n_labels
        Number of labels that latents are to tell apart; 0 for none. Used in training alone.
    """

    def __init__(
        self,
        likelihoods: Sequence[Likelihood],
        widths: Sequence[int],
        n_latent: int,
        hidden: Sequence[Sequence[int]],
        *,
        n_labels: int = 0,
    ) -> None:
        super().__init__()
        shapes = [[width, *layers, n_latent] for width, layers in zip(widths, hidden, strict=True)]
        self.widths = tuple(widths)
        self.n_latent = n_latent
        self.encoders = nn.ModuleList(_mlp(shape) for shape in shapes)
        self.decoders = nn.ModuleList(_mlp(shape[::-1], _Output) for shape in shapes)
        self.label_head = nn.Linear(n_latent, n_labels) if n_labels else None
        self.noise = nn.ModuleList(likelihoods)

    @property
    def likelihoods(self) -> list[Likelihood]:
        """Noise model of every modality."""
        return list(self.noise)  # type: ignore[arg-type]

    @property
    def n_features(self) -> int:
        """Number of features of all modalities together."""
        return sum(self.widths)

    @property
    def outputs(self) -> list[_Output]:
        """Last layer of every decoder."""
        return [decoder[-1] for decoder in self.decoders]  # type: ignore[index]

    def start_at(
        self, moments: Sequence[tuple[NDArray, NDArray]], totals: Sequence[NDArray]
    ) -> None:
        """Start noise models and decoders from the data's moments, on the CPU.

        Parameters
        ----------
        moments
            Per modality, mean and variance of every feature.
        totals
            Per modality, total counts of the cells, ones where it has no size factor.
        """
        every = zip(self.likelihoods, self.outputs, moments, totals, strict=True)
        for likelihood, output, (mean, variance), own in every:
            start = likelihood.initialise(mean, variance, own)
            output.start_at(start, likelihood.speeds(mean))

    def finish(self, cells: NDArray[np.int64]) -> None:
        """End of training on labels with so many `cells` each, ``(n_labels,)``."""
        for likelihood, output in zip(self.likelihoods, self.outputs, strict=True):
            likelihood.pool(cells)
            output.finish()

    def log_sizes(self, log_size: Tensor | None) -> list[Tensor | None]:
        """Log size factors ``(n, n_sizes)`` as one column per modality; None where it has none."""
        scaled = [likelihood.uses_size_factor for likelihood in self.likelihoods]
        if log_size is None:
            return [None] * len(scaled)
        columns = iter(log_size.split(1, dim=1))
        return [next(columns) if uses else None for uses in scaled]

    def encode(self, x: Sequence[Tensor]) -> Tensor:
        """Cells, per modality ``(n, n_features)``, to latents ``(n, n_latent)``."""
        return self._encode(
            [likelihood.encoder_input(own) for likelihood, own in self._with(x)],
        )

    def decode(self, z: Tensor, log_size: Tensor | None) -> list[Tensor]:
        """Latents and log size factors ``(n, n_sizes)`` to the noise models' natural scales."""
        outputs = [decoder(z) for decoder in self.decoders]
        return [
            likelihood.natural(output, own)
            for (likelihood, output), own in zip(
                self._with(outputs), self.log_sizes(log_size), strict=True
            )
        ]

    def loss(
        self,
        x: Sequence[Minibatch],
        log_sizes: Sequence[Tensor | None],
        labels: Tensor,
        *,
        seen: Sequence[Minibatch] | None = None,
        label_weight: float = 0.0,
    ) -> Tensor:
        """Mean over cells and features of ``-log p(x | decode(encode(seen)), l)``, in nats.

        Given the latent modalities are independent, so that their log-likelihoods add up: the
        mean is over the features of all of them together, and each weighs as much as its
        features tell.

        Parameters
        ----------
        x
            Cells, per modality ``(n, n_features)``.
        log_sizes
            Log size factors, per modality ``(n, 1)`` or None.
        labels
            Codes of the labels, ``(n,)``, by which the dispersion may go.
        seen
            What the encoders see; None for `x` itself.
        label_weight
            Weight of the mean cross-entropy of `label_head`, which is added; with more than
            1,300 features, it is less in proportion.
        """
        seen = x if seen is None else seen
        z = self._encode(
            [own.dense(likelihood.encoder_input) for likelihood, own in self._with(seen)]
        )
        outputs = [decoder(z) for decoder in self.decoders]
        if not len(z):  # a process without a share: its zero has what the others' losses have
            held = [*outputs, *self.noise.parameters()]
            return reduce(torch.add, [0.0 * tensor.sum() for tensor in held])
        parts = [
            likelihood.loss(own, output, log_size, labels) * (width / self.n_features)
            for (likelihood, own), output, log_size, width in zip(
                self._with(x), outputs, log_sizes, self.widths, strict=True
            )
        ]
        loss = reduce(torch.add, parts)
        if self.label_head is not None:
            weight = label_weight * min(1.0, _FEATURES_OF_FULL_WEIGHT / self.n_features)
            loss = loss + weight * F.cross_entropy(self.label_head(z), labels)
        return loss

    def _encode(self, inputs: Sequence[Tensor]) -> Tensor:
        parts = [encoder(own) for encoder, own in zip(self.encoders, inputs, strict=True)]
        return reduce(torch.add, parts)

    def _with(self, values: Sequence[Value]) -> list[tuple[Likelihood, Value]]:
        """Noise models beside one value per modality."""
        return list(zip(self.likelihoods, values, strict=True))
