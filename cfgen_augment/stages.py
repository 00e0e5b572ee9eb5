"""The two stages of training: the autoencoder by likelihood, then the flow on its latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfgen_augment.autoencoder import Autoencoder
from cfgen_augment.counts import CellMatrix, dense_rows, feature_moments
from cfgen_augment.flow import VelocityField, drop_attributes, flow_matching_loss
from cfgen_augment.minibatch import supply
from cfgen_augment.processes import ALONE, Processes
from cfgen_augment.stored import buffers, keep, side_by_side
from cfgen_augment.training import History, Schedule, initialise, minibatches, seeded, train

_BLOCK_VALUES = 1 << 20  # dense entries that exist at a time outside of training
_FEWEST_ROWS = 128

_NOISE_RATE = 0.1  # learning rate of the noise models' own parameters
_NOISE_STEPS = 300  # minibatches they get to themselves
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
    """AdamW over the network, and faster over the noise models' own parameters."""
    own = [parameter for noise in model.likelihoods for parameter in noise.parameters()]
    network = [p for p in model.parameters() if all(p is not other for other in own)]
    parameters: list[dict[str, Any]] = [{"params": network, "lr": learning_rate}]
    if own:
        # At the network's rate the dispersion is still near its start when the mean has long
        # converged.
        parameters.append({"params": own, "lr": _NOISE_RATE, "weight_decay": 0.0})
    return torch.optim.AdamW(parameters, weight_decay=1e-5, fused=True)


def train_autoencoder(
    model: Autoencoder,
    X: Sequence[CellMatrix],
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
        Cells, per modality ``(n_cells, n_features)``.
    labels, totals
        Code of every cell's label, ``(n_cells,)``, and its total count in every modality that
        has a size factor, ``(n_cells, n_sizes)``.
    count_splitting
        Whether counts are dealt out to encoder and likelihood, see `Minibatch.split`, in every
        modality that holds counts. Several processes split their own cells, so that they do not
        train quite as one would.
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
    columns, none = iter(totals.T), np.ones(len(totals))
    depths = [next(columns) if own.uses_size_factor else none for own in model.likelihoods]
    model.start_at([feature_moments(matrix) for matrix in X], depths)
    model.to(device)
    held_here = held_out[processes.share(len(held_out))]
    X = [keep(matrix, held_here) for matrix in X]
    kinds = [likelihood.values for likelihood in model.likelihoods]
    supplies = [supply(matrix, kind, device) for matrix, kind in zip(X, kinds, strict=True)]
    log_totals = torch.as_tensor(np.log(totals), dtype=torch.float32, device=device)
    label_codes = torch.as_tensor(labels, device=device)
    split = [i for i, kind in enumerate(kinds) if count_splitting and kind != "real"]
    # Cells of different processes are not split alike.
    training_seed, validation_seed = (int(seed) for seed in random.integers(2**62, size=2))
    draws = torch.Generator(device).manual_seed(training_seed + processes.rank)

    def mean_loss(rows: NDArray[np.intp], generator: torch.Generator) -> Tensor:
        at = torch.from_numpy(rows).to(device, non_blocking=True)
        x = [cells(rows) for cells in supplies]
        seen, log_sizes = list(x), model.log_sizes(log_totals[at])
        for i in split:
            seen[i], x[i] = x[i].split(generator)
            log_sizes[i] = x[i].log_totals()
        return model.loss(x, log_sizes, label_codes[at], seen=seen, label_weight=label_weight)

    def loss(batch: NDArray[np.intp]) -> Tensor:
        here = batch[processes.share(len(batch))]
        return processes.part(mean_loss(here, draws), len(here), len(batch))

    def validate() -> float:
        # The same splits in every epoch.
        generator = torch.Generator(device).manual_seed(validation_seed + processes.rank)
        total = torch.zeros((), device=device)
        parts = minibatches(held_here, block_rows(model.n_features)) if len(held_here) else ()
        for part in parts:
            total += mean_loss(part, generator) * len(part)
        return float(processes.sum(total)) / len(held_out)

    go = partial(
        train,
        loss=loss,
        validate=validate,
        random=random,
        verbose=verbose,
        groups=partial(buffers, X[0], beside=X[1:]),
        processes=processes,
    )
    with processes.whole_minibatches(model):
        history = go(
            model,
            rows=rows,
            optimizer=autoencoder_optimizer(model, schedule.learning_rate),
            schedule=schedule,
            description="autoencoder",
        )
    _settle_noise(model, go, rows, schedule.batch_size, random)
    model.finish(np.bincount(labels))
    return history


def _settle_noise(
    model: Autoencoder,
    go: Callable[..., History],
    rows: NDArray[np.intp],
    batch_size: int,
    random: np.random.Generator,
) -> None:
    """Train the noise models' own parameters to their end, on what the network now says.

    The network stops where it is best on held-out cells, which may be long before a dispersion
    has come all the way from its start; synthetic cells would be too variable, or too little.
    """
    if not list(model.noise.parameters()):
        return
    model.requires_grad_(False)
    model.noise.requires_grad_(True)
    rows = np.sort(random.permutation(rows)[: _NOISE_STEPS * batch_size])
    epochs = math.ceil(_NOISE_STEPS / math.ceil(len(rows) / batch_size))
    go(
        model.noise,
        rows=rows,
        optimizer=torch.optim.Adam(model.noise.parameters(), lr=_NOISE_RATE),
        schedule=Schedule(_NOISE_RATE, epochs, batch_size, patience=epochs),
        description="dispersion",
    )


@torch.inference_mode()
def encode_cells(
    model: Autoencoder,
    X: Sequence[CellMatrix],
    device: torch.device,
    processes: Processes = ALONE,
) -> Tensor:
    """Latents of all cells, ``(n_cells, n_latent)``, block by block; each process its share."""
    n_cells = X[0].shape[0]
    latents = torch.zeros((n_cells, model.n_latent), device=device)
    for rows, blocks in side_by_side(X, block_rows(model.n_features), processes.share(n_cells)):
        x = [torch.from_numpy(dense_rows(block, slice(None))).to(device) for block in blocks]
        latents[rows] = model.encode(x)
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
        ``(n_cells, n_sizes)`` or None.
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
