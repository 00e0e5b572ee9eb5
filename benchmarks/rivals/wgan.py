r"""A conditional Wasserstein GAN on library-size-normalised counts: a compact cscGAN.

Marouf et al. (2020), Realistic in silico generation and augmentation of single-cell RNA-seq data
using generative adversarial networks, Nature Communications 11:166,
doi:10.1038/s41467-019-14018-z; their code is github.com/imsb-uke/scGAN.

As in the source: counts scaled to one library size per cell, not logged; a generator of Linear,
conditional batch norm (a scale and a shift per type, Dumoulin et al. 2017) and ReLU, ending in a
ReLU and the library-size-normalising layer (LSN); a critic of Linear and ReLU with projection of
the type (Miyato and Koyama 2018); the Wasserstein loss with a gradient penalty of weight 10
(Gulrajani et al. 2017), on the way from each real cell to a fake one of its type; five steps of
the critic to one of the generator; AMSGrad with betas .5 and .9, the learning rate falling
tenfold, exponentially; 128 noise variables.

Not as in the source, to fit minutes on one core instead of days on a GPU:

- Widths 128-256 up and 256-128 down (256-512-1024 and 1024-512-256), minibatches of 64 (128),
  some thousand steps of the critic (5 million), learning rate from 2e-3 (1e-4).
- Every type is drawn equally often in training, not as often as it is in the data: in so few
  steps types of 20 cells would hardly be seen. Tried as in `benchmarks.rivals.diffusion`, equally
  against as in the data: kNN .19 against .02 and .05 against .02, logistic regression .06 against
  -.06 and .04 against -.10. This and the learning rate were chosen on held-out donors, so if
  anything in its favour.
- The library size is the source's 20,000 for 17,789 genes, per gene: with fewer genes the same
  mean expression, which the weight of the penalty is tuned to.
- The bias of the generator's output starts at the mean training cell.
- One fake minibatch, of the real cells' types, serves both the loss and the penalty; the source
  draws other types for the loss, from the same frequencies.
- The decay of the moving averages of batch norm is .99 (.999), as there are fewer steps to follow.
- The projection is the published one, a shared output plus one per type; the source's file has it
  beside an output per type alone.

What comes out has the library size of training, so it is logged as everything else is,
``log(1 + 1e4 x / total)``.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cells import New, Training, log_normalise, nothing
from benchmarks.rivals.diffusion import draws
from benchmarks.rivals.oversampling import wanted
from cfgen_augment.counts import dense_rows, total_counts
from cfgen_augment.stages import block_rows
from cfgen_augment.training import seeded

_MEAN = 20_000 / 17_789  # of a gene in a scaled cell: the source's library size and genes
_N_NOISE = 128
_GENERATOR = (128, 256)
_CRITIC = (256, 128)
_CRITIC_STEPS = 5
_PENALTY = 10.0
_BATCH = 64


def library_size_normalise(x: Tensor, size: float) -> Tensor:
    """Scale every cell of `x` ``(n, n_genes)`` to a total of `size`; empty cells stay empty."""
    return size * x / x.sum(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def gradient_penalty(critic: nn.Module, x: Tensor, codes: Tensor) -> Tensor:
    r"""Mean over cells of :math:`(\lVert \nabla_x D(x, y) \rVert_2 - 1)^2`.

    Shapes: `x` ``(n, n_genes)``, types `codes` ``(n,)``.
    """
    at = x.detach().requires_grad_()
    slopes = torch.autograd.grad(critic(at, codes).sum(), at, create_graph=True)[0].norm(dim=1)
    return (slopes - 1.0).square().mean()


class _ConditionalBatchNorm(nn.Module):
    """Batch norm with a scale and a shift per type."""

    def __init__(self, width: int, n_types: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, momentum=0.01)
        self.scale = nn.Parameter(torch.ones(n_types, width))
        self.shift = nn.Parameter(torch.zeros(n_types, width))

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        return self.norm(x) * self.scale[codes] + self.shift[codes]


class Generator(nn.Module):
    """Noise ``(n, n_noise)`` and types ``(n,)`` to cells of one library size ``(n, n_genes)``.

    Parameters
    ----------
    profile
        Mean of the scaled training cells, ``(n_genes,)``: the output's bias at the start, and in
        total the library size.
    n_types
        Number of types.
    """

    def __init__(self, profile: Tensor, n_types: int) -> None:
        super().__init__()
        widths = (_N_NOISE, *_GENERATOR)
        self.linears = nn.ModuleList(
            _linear(a, b, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(_ConditionalBatchNorm(width, n_types) for width in _GENERATOR)
        self.out = _linear(widths[-1], len(profile))
        self.out.bias.data.copy_(profile)
        self.library_size = float(profile.sum())

    def forward(self, noise: Tensor, codes: Tensor) -> Tensor:
        """Make one cell of each of the types `codes` from each row of `noise`."""
        h = noise
        for linear, norm in zip(self.linears, self.norms, strict=True):
            h = F.relu(norm(linear(h), codes))
        return library_size_normalise(F.relu(self.out(h)), self.library_size)


class Critic(nn.Module):
    r"""Score :math:`D(x, y) = w \cdot \phi(x) + b + v_y \cdot \phi(x)` of cells, ``(n,)``."""

    def __init__(self, n_genes: int, n_types: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            _linear(a, b) for a, b in itertools.pairwise((n_genes, *_CRITIC))
        )
        self.out = _linear(_CRITIC[-1], 1)
        self.types = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_types, _CRITIC[-1])))

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Score the cells `x` as cells of the types `codes`."""
        for linear in self.linears:
            x = F.relu(linear(x))
        return self.out(x).squeeze(1) + (x * self.types[codes]).sum(dim=1)


def _linear(n_in: int, n_out: int, *, bias: bool = True) -> nn.Linear:
    """Linear layer, Xavier weights and no bias at the start."""
    linear = nn.Linear(n_in, n_out, bias=bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def conditional_wgan(
    training: Training,
    *,
    steps: int = 2500,
    learning_rates: tuple[float, float] = (2e-3, 2e-4),
) -> New:
    """Generate cells of the types wanted with a compact cscGAN.

    Parameters
    ----------
    training
        The training side of a split.
    steps
        Steps of the generator; the critic takes five times as many, on 64 cells each.
    learning_rates
        Learning rate of both networks at the start and at the end.

    Returns
    -------
    New
        Log-normalised values.
    """
    types = wanted(training)
    if not types:
        return nothing(training.cells.counts.shape[1])
    cells = scaled(training.cells.counts)
    profile = np.asarray(cells.mean(axis=0), dtype=np.float32).ravel()
    random = np.random.default_rng(training.seed)
    noise_source = seeded(random, torch.device("cpu"))
    names, codes = np.unique(training.cells.labels, return_inverse=True)
    with torch.random.fork_rng(devices=[]):  # initial weights draw from the global state
        torch.default_generator.manual_seed(int(random.integers(2**63)))
        generator = Generator(torch.from_numpy(profile), len(names))
        critic = Critic(training.cells.counts.shape[1], len(names))
    _train(
        generator,
        critic,
        cells,
        codes,
        steps=steps,
        learning_rates=learning_rates,
        random=random,
        noise_source=noise_source,
    )
    generator.eval()
    drawn = np.repeat(np.array([name for name, _, _ in types]), [n for _, _, n in types])
    wanted_codes = torch.from_numpy(np.searchsorted(names, drawn))
    made = []
    with torch.no_grad():
        for part in wanted_codes.split(block_rows(training.cells.counts.shape[1])):
            noise = torch.randn((len(part), _N_NOISE), generator=noise_source)
            made.append(log_normalise(sparse.csr_matrix(generator(noise, part).numpy())))
    return New(sparse.vstack(made, format="csr", dtype=np.float32), drawn, logged=True)


def scaled(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """`counts` with the same library size for every cell, empty cells as they are."""
    factors = _MEAN * counts.shape[1] / total_counts(counts)
    return sparse.csr_matrix(sparse.diags_array(factors.astype(np.float32)) @ counts)


def _train(
    generator: Generator,
    critic: Critic,
    cells: sparse.csr_matrix,
    codes: NDArray[np.integer],
    *,
    steps: int,
    learning_rates: tuple[float, float],
    random: np.random.Generator,
    noise_source: torch.Generator,
) -> None:
    """Train both in turns, the critic five times as often."""
    first, last = learning_rates
    of_generator, of_critic = (
        torch.optim.Adam(module.parameters(), first, betas=(0.5, 0.9), amsgrad=True, fused=True)
        for module in (generator, critic)
    )
    decay = (last / first) ** (1.0 / steps)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(o, decay) for o in (of_generator, of_critic)
    ]
    batches = draws(codes, _BATCH, random)
    types = torch.from_numpy(codes)
    for _ in range(steps):
        for batch in itertools.islice(batches, _CRITIC_STEPS):
            real = torch.from_numpy(dense_rows(cells, batch))
            y = types[torch.from_numpy(batch)]
            with torch.no_grad():
                fake = generator(_noise(_BATCH, noise_source), y)
            share = torch.rand((_BATCH, 1), generator=noise_source)
            scores = critic(torch.cat([fake, real]), y.repeat(2))
            loss = scores[:_BATCH].mean() - scores[_BATCH:].mean()
            loss = loss + _PENALTY * gradient_penalty(critic, real.lerp(fake, share), y)
            of_critic.zero_grad(set_to_none=True)
            loss.backward()
            of_critic.step()
        y = types[torch.from_numpy(next(batches))]
        critic.requires_grad_(False)
        of_generator.zero_grad(set_to_none=True)
        (-critic(generator(_noise(_BATCH, noise_source), y), y).mean()).backward()
        of_generator.step()
        critic.requires_grad_(True)
        for scheduler in schedulers:
            scheduler.step()


def _noise(n: int, source: torch.Generator) -> Tensor:
    """Standard normal noise, ``(n, n_noise)``."""
    return torch.randn((n, _N_NOISE), generator=source)
