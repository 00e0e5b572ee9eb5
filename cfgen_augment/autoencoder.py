"""The count autoencoder: cells to latents and back to the parameters of a noise model.

``x -> log1p -> MLP -> z -> mirrored MLP -> output -> likelihood(natural(output, log l))``,
deterministic and without a prior, as in Section 4.1 of the CFGen paper (arXiv 2407.11734): the
flow, not a KL term, learns how the latents are distributed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

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
    """

    def __init__(
        self, likelihood: Likelihood, n_features: int, n_latent: int, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.encoder = _mlp([n_features, *hidden, n_latent])
        self.decoder = _mlp([n_latent, *reversed(hidden), n_features])
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

    def negative_log_likelihood(
        self, x: Minibatch, log_size: Tensor | None, group: Tensor | None
    ) -> Tensor:
        """Mean over cells and features of ``-log p(x | decode(encode(x)), l)``, in nats."""
        output = self.decoder(self.encoder(x.dense(self.likelihood.encoder_input)))
        if not len(output):  # a process without a share, needed for the others' batch norm
            return output.sum()
        return self.likelihood.loss(x, output, log_size, group)
