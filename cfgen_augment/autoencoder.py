"""The count autoencoder: cells to latents and back to the parameters of a noise model.

``x -> log1p -> MLP -> z -> mirrored MLP -> output -> likelihood(natural(output, log l))``,
deterministic and without a prior, as in Section 4.1 of the CFGen paper (arXiv 2407.11734): the
flow, not a KL term, learns how the latents are distributed.

Two things are not in the paper. With count splitting the encoder sees a random part of every
count and the likelihood is on the rest, so that latents do not carry the cell's own counting
noise, which the noise model then adds again. And a linear classifier of labels on the latents adds
its cross-entropy to the loss: what few cells of a rare label have in common is a small part of
the likelihood, but all of what tells them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cfgen_augment.likelihoods import Likelihood
from cfgen_augment.minibatch import Minibatch


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear, batch norm and ELU between the `widths`; the last layer is linear alone."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class Autoencoder(nn.Module):
    """Encoder, mirrored decoder and noise model of one block of features.

    Parameters
    ----------
    likelihood
        Noise model of the features.
    n_features
        Number of features, for example genes.
    n_latent
        Width of the latent space.
    hidden
        Widths of the encoder's hidden layers; the decoder has them in reverse.
    n_labels
        Number of labels that latents are to tell apart; 0 for none. Used in training alone.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        n_features: int,
        n_latent: int,
        hidden: Sequence[int],
        *,
        n_labels: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = _mlp([n_features, *hidden, n_latent])
        self.decoder = _mlp([n_latent, *reversed(hidden), n_features])
        self.label_head = nn.Linear(n_latent, n_labels) if n_labels else None
        self.likelihood = likelihood

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias of the decoder's last layer, shape ``(n_features,)``."""
        bias: nn.Parameter = self.decoder[-1].bias  # type: ignore[assignment]
        return bias

    def encode(self, x: Tensor) -> Tensor:
        """Counts ``(n, n_features)`` to latents ``(n, n_latent)``."""
        latent: Tensor = self.encoder(self.likelihood.encoder_input(x))
        return latent

    def decode(self, z: Tensor, log_size: Tensor | None) -> Tensor:
        """Latents and log size factors ``(n, 1)`` to the noise model's natural scale."""
        return self.likelihood.natural(self.decoder(z), log_size)

    def loss(
        self,
        x: Minibatch,
        log_size: Tensor | None,
        labels: Tensor,
        *,
        seen: Minibatch | None = None,
        label_weight: float = 0.0,
    ) -> Tensor:
        """Mean over cells and features of ``-log p(x | decode(encode(seen)), l)``, in nats.

        Parameters
        ----------
        x
            Cells, ``(n, n_features)``.
        log_size
            Log size factors, ``(n, 1)``.
        labels
            Codes of the labels, ``(n,)``, by which the dispersion may go.
        seen
            What the encoder sees; None for `x` itself.
        label_weight
            Weight of the mean cross-entropy of `label_head`, which is added.
        """
        seen = x if seen is None else seen
        z = self.encoder(seen.dense(self.likelihood.encoder_input))
        output = self.decoder(z)
        if not len(output):  # a process without a share, needed for the others' batch norm
            return output.sum()
        loss = self.likelihood.loss(x, output, log_size, labels)
        if self.label_head is not None:
            loss = loss + label_weight * F.cross_entropy(self.label_head(z), labels)
        return loss
