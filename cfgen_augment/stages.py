"""The two stages of training: the autoencoder by likelihood, then the flow on its latents."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from cfgen_augment.autoencoder import Autoencoder
from cfgen_augment.counts import CellMatrix, dense_rows, feature_moments
from cfgen_augment.flow import VelocityField, drop_attributes, flow_matching_loss
from cfgen_augment.likelihoods import NegativeBinomial
from cfgen_augment.minibatch import supply
from cfgen_augment.processes import ALONE, Processes
from cfgen_augment.stored import buffers, in_order, keep
from cfgen_augment.training import History, Schedule, initialise, minibatches, seeded, train

_BLOCK_VALUES = 1 << 20  # dense entries that exist at a time outside of training
_FEWEST_ROWS = 128

_DISPERSION_SPEED = 50.0  # learning rate of the noise model's own parameters, relative
_POOLED_SHARE = (
    0.5  # of the cells the flow is trained on that see no more than their label's centre
)
_VALIDATION_DRAWS = 4096  # noise and times on which the flow's held-out loss is measured


def block_rows(n_features: int) -> int:
    """Cells that go through a network at a time outside of training, fewer if they are wide.

    Not so few that the decoder's weights, megabytes at whole-genome width, are read for nothing.
    """
    return min(max(_BLOCK_VALUES // n_features, _FEWEST_ROWS), 1024)


def autoencoder_optimizer(model: Autoencoder, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the network, and faster over the noise model's own parameters."""
    own = list(model.likelihood.parameters())
    network = [p for p in model.parameters() if all(p is not other for other in own)]
    parameters: list[dict[str, Any]] = [{"params": network, "lr": learning_rate}]
    if own:
        # At the network's rate the dispersion is still near its start when the mean has long
        # converged, and synthetic cells come out too variable.
        fast = learning_rate * _DISPERSION_SPEED
        parameters.append({"params": own, "lr": fast, "weight_decay": 0.0})
    return torch.optim.AdamW(parameters, weight_decay=1e-5, fused=True)


def train_autoencoder(
    model: Autoencoder,
    X: CellMatrix,
    labels: NDArray[np.int64],
    totals: NDArray[np.float64],
    *,
    count_splitting: bool,
    label_weight: float,
    rows: NDArray[np.intp],
    held_out: NDArray[np.intp],
    schedule: Schedule,
    device: torch.device,
    random: np.random.Generator,
    verbose: bool,
    processes: Processes = ALONE,
) -> History:
    """Train `model` from scratch by maximum likelihood and leave it on `device`.

    Parameters
    ----------
    model
        Laid out on the CPU, weights not yet set.
    X
        Cells, ``(n_cells, n_features)``.
    labels, totals
        Code of the label and total count of every cell, ``(n_cells,)``.
    count_splitting
        Whether counts are dealt out to encoder and likelihood, see `Minibatch.split`. Several
        processes split their own cells, so that they do not train quite as one would.
    label_weight
        Weight of telling labels apart, see `Autoencoder.loss`.
    rows, held_out
        Cells to train on, and to stop early by.
    schedule
        Learning rate, epochs, batch size and patience.
    device, random, verbose
        Where to train, the source of randomness, and whether to show progress.
    processes
        Those that train together: each minibatch is shared out among them.
    """
    initialise(model, seeded(random, torch.device("cpu")))
    mean, variance = feature_moments(X)
    bias = model.likelihood.initialise(mean, variance, totals)
    with torch.no_grad():
        model.output_bias.copy_(bias)
    model.to(device)
    held_here = held_out[processes.share(len(held_out))]
    X = keep(X, held_here)
    cells = supply(X, model.likelihood.values, device)
    log_totals = torch.as_tensor(np.log(totals), dtype=torch.float32, device=device)[:, None]
    label_codes = torch.as_tensor(labels, device=device)
    splits = count_splitting and model.likelihood.values == "count"
    # Cells of different processes are not split alike.
    training_seed, validation_seed = (int(seed) for seed in random.integers(2**62, size=2))
    draws = torch.Generator(device).manual_seed(training_seed + processes.rank)

    def mean_loss(rows: NDArray[np.intp], generator: torch.Generator) -> Tensor:
        at = torch.from_numpy(rows).to(device, non_blocking=True)
        x, size, seen = cells(rows), log_totals[at], None
        if splits:
            seen, x = x.split(generator)
            size = x.log_totals()
        return model.loss(x, size, label_codes[at], seen=seen, label_weight=label_weight)

    def loss(batch: NDArray[np.intp]) -> Tensor:
        here = batch[processes.share(len(batch))]
        return processes.part(mean_loss(here, draws), len(here), len(batch))

    def validate() -> float:
        # The same splits in every epoch.
        generator = torch.Generator(device).manual_seed(validation_seed + processes.rank)
        total = torch.zeros((), device=device)
        parts = minibatches(held_here, block_rows(X.shape[1])) if len(held_here) else ()
        for part in parts:
            total += mean_loss(part, generator) * len(part)
        return float(processes.sum(total)) / len(held_out)

    with processes.whole_minibatches(model):
        return train(
            model,
            loss,
            validate,
            rows=rows,
            optimizer=autoencoder_optimizer(model, schedule.learning_rate),
            schedule=schedule,
            random=random,
            description="autoencoder",
            verbose=verbose,
            groups=partial(buffers, X),
            processes=processes,
        )


@torch.inference_mode()
def match_dispersion(
    model: Autoencoder,
    X: CellMatrix,
    labels: NDArray[np.int64],
    totals: NDArray[np.float64],
    device: torch.device,
    processes: Processes = ALONE,
) -> None:
    """Set the noise model's dispersion by the second moments of cells within labels.

    See `NegativeBinomial.match_variance`; accumulates block by block. Other noise models have no
    dispersion to set.
    """
    if not isinstance(model.likelihood, NegativeBinomial):
        return
    n_labels = int(labels.max()) + 1
    sums = np.zeros((4, n_labels, X.shape[1]))  # of x, x^2, mu, mu^2
    for rows, block in in_order(X, block_rows(X.shape[1]), processes.share(X.shape[0])):
        x = dense_rows(block, slice(None))
        log_size = torch.as_tensor(np.log(totals[rows]), dtype=torch.float32, device=device)
        latents = model.encode(torch.from_numpy(x).to(device))
        mu = model.decode(latents, log_size[:, None]).exp().cpu().numpy()
        membership = sparse.csr_matrix(
            (np.ones(len(x)), (labels[rows], np.arange(len(x)))), shape=(n_labels, len(x))
        )
        for total, values in zip(sums, (x, np.square(x), mu, np.square(mu)), strict=True):
            total += membership @ values
    sums = processes.sum(torch.from_numpy(sums).to(device)).cpu().numpy()
    cells = np.bincount(labels, minlength=n_labels).astype(np.float64)
    x, x_square, mu, mu_square = sums
    within_x = x_square - x**2 / cells[:, None]
    within_mu = mu_square - mu**2 / cells[:, None]
    model.likelihood.match_variance(cells, within_x - within_mu - mu, mu_square)


@torch.inference_mode()
def encode_cells(
    model: Autoencoder, X: CellMatrix, device: torch.device, processes: Processes = ALONE
) -> Tensor:
    """Latents of all cells, ``(n_cells, n_latent)``, block by block; each process its share."""
    n_latent: int = model.encoder[-1].out_features  # type: ignore[assignment]
    latents = torch.zeros((X.shape[0], n_latent), device=device)
    for rows, block in in_order(X, block_rows(X.shape[1]), processes.share(X.shape[0])):
        latents[rows] = model.encode(torch.from_numpy(dense_rows(block, slice(None))).to(device))
    return processes.sum(latents)  # what others encoded is zero here


def train_flow(
    field: VelocityField,
    latents: Tensor,
    attributes: Tensor,
    log_size: Tensor | None,
    *,
    dropout: float,
    rows: NDArray[np.intp],
    held_out: NDArray[np.intp],
    schedule: Schedule,
    random: np.random.Generator,
    verbose: bool,
    processes: Processes = ALONE,
) -> History:
    """Train `field` from scratch by Flow Matching and leave it where the latents are.

    Parameters
    ----------
    field
        Laid out on the CPU, weights not yet set.
    latents, attributes, log_size
        Standardised latents ``(n_cells, n_latent)``, category codes
        ``(n_cells, n_attributes)``, the label first, and scaled log size factors
        ``(n_cells, 1)`` or None.
    dropout
        Share of cells that see no attribute.
    rows, held_out, schedule, random, verbose, processes
        As in `train_autoencoder`.
    """
    device = latents.device
    initialise(field, seeded(random, torch.device("cpu")))
    field.start_at_zero()
    field.to(device)
    field.centre_on(latents, attributes, log_size)
    draws = seeded(random, device)
    validation_seed = int(random.integers(2**63))

    def loss_with(batch: NDArray[np.intp], generator: torch.Generator) -> Tensor:
        # Every process draws for the whole minibatch, so that its own cells get what they would
        # get if it were alone.
        share = processes.share(len(batch))
        at = torch.from_numpy(batch).to(device)
        given = drop_attributes(attributes[at], dropout, generator)
        size = None if log_size is None else log_size[at]
        pooled = torch.rand(len(at), generator=generator, device=device) < _POOLED_SHARE
        own = None if processes.size == 1 else share
        mean = flow_matching_loss(field, latents[at], given, size, generator, own, pooled)
        return processes.part(mean, share.stop - share.start, len(batch))

    def validate() -> float:
        # The same noise, times and dropped attributes in every epoch, and enough of them that a
        # small held-out part does not stop training by chance.
        generator = torch.Generator(device).manual_seed(validation_seed)
        repeated = np.tile(held_out, -(-_VALIDATION_DRAWS // len(held_out)))
        total = torch.zeros((), device=device)
        for part in minibatches(repeated, _VALIDATION_DRAWS):
            total += loss_with(part, generator) * len(part)
        return float(processes.sum(total)) / len(repeated)

    return train(
        field,
        lambda batch: loss_with(batch, draws),
        validate,
        rows=rows,
        optimizer=torch.optim.AdamW(
            field.parameters(), lr=schedule.learning_rate, weight_decay=1e-6, fused=True
        ),
        schedule=schedule,
        random=random,
        description="flow",
        verbose=verbose,
        processes=processes,
    )
