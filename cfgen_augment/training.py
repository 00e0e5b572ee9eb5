"""The training loop that the autoencoder and the flow share."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from cfgen_augment.processes import ALONE, Processes

logger = logging.getLogger(__name__)

_CLIP_NORM = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes
    ----------
    learning_rate
        Learning rate at the start; it is annealed to zero.
    max_epochs, batch_size
        Passes over the training rows, and the largest minibatch.
    patience
        Epochs without a better held-out loss before stopping, see `train`.
    """

    learning_rate: float
    max_epochs: int
    batch_size: int
    patience: int


@dataclass
class History:
    """What a training run did, one entry per epoch.

    Attributes
    ----------
    training, validation
        Mean loss over the epoch's minibatches, and the loss on held-out cells after it.
    best_epoch
        Epoch (from zero) whose weights were kept.
    """

    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = -1


def resolve_device(device: str) -> torch.device:
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"`` to a device that is there.

    Raises
    ------
    ValueError
        If the device is unknown or absent; only ``"auto"`` ever falls back.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N'; got {device!r}."
        ) from error
    if resolved.type not in ("cpu", "cuda") or (resolved.type == "cpu" and resolved.index):
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N'; got {device!r}.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one that is there; got {device!r}, and this machine offers "
            f"{torch.cuda.device_count()} CUDA device(s). Use device='auto' or 'cpu'."
        )
    return resolved


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw fresh weights for `module` from `generator`, PyTorch's own schemes.

    PyTorch's constructors draw from the global random state. Building on the ``meta`` device and
    initialising here leaves that state alone and makes a fit a function of its seed. `module`
    must be on the CPU, so that weights do not depend on the device either.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, generator=generator)
        elif isinstance(layer, nn.BatchNorm1d):
            layer.reset_parameters()


def seeded(random: np.random.Generator, device: torch.device) -> torch.Generator:
    """Make a torch generator on `device`, seeded by the next draw of `random`."""
    return torch.Generator(device).manual_seed(int(random.integers(2**63)))


def hold_out(
    groups: NDArray[np.integer], fraction: float, random: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split cells into training and held-out rows, group by group.

    Every group gives ``round(fraction * n)`` cells, so small groups give none. If nothing at all
    would be held out, the training rows serve as held-out rows too.
    """
    held = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        members = random.permutation(np.flatnonzero(groups == group))
        held[members[: round(fraction * len(members))]] = True
    if not held.any() or held.sum() > len(held) - 2:
        every = np.arange(len(groups))
        return every, every
    return np.flatnonzero(~held), np.flatnonzero(held)


def minibatches(
    rows: NDArray[np.intp], batch_size: int, random: np.random.Generator | None = None
) -> Iterator[NDArray[np.intp]]:
    """Cut `rows`, shuffled if `random` is given, into minibatches of nearly equal size.

    Equal sizes mean that no batch ever holds a single cell, which batch norm could not train on.
    In pairs, an odd number of cells would still leave one alone: one batch then takes three.
    """
    if random is not None:
        rows = random.permutation(rows)
    n_batches = min(math.ceil(len(rows) / batch_size), max(len(rows) // 2, 1))
    yield from np.array_split(rows, n_batches)


def annealed(epoch: int, max_epochs: int) -> float:
    """Learning rate of an epoch, relative: half a cosine from one to zero over `max_epochs`."""
    return 0.5 * (1.0 + math.cos(math.pi * epoch / max_epochs))


def descend(
    module: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    processes: Processes = ALONE,
) -> Tensor:
    """One optimiser step along the clipped gradient of `loss`; returns its value, on its device.

    Of several processes, each has its part of the loss, and all take the same step.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    processes.sum_gradients(module)
    nn.utils.clip_grad_norm_(module.parameters(), _CLIP_NORM, foreach=True)
    optimizer.step()
    return loss.detach()


def train(
    module: nn.Module,
    loss: Callable[[NDArray[np.intp]], Tensor],
    validate: Callable[[], float],
    *,
    rows: NDArray[np.intp],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    random: np.random.Generator,
    description: str,
    verbose: bool,
    groups: Callable[[NDArray[np.intp], np.random.Generator], Iterable[NDArray[np.intp]]]
    | None = None,
    processes: Processes = ALONE,
) -> History:
    """Minimise `loss` over minibatches, stop early, and restore the best weights.

    The learning rate follows `annealed`. To stop early is to go back to the best weights, and to
    anneal from there within as many epochs as were waited for better ones: at a rate that is still
    high, what was learned is hidden behind the noise of its steps.

    Parameters
    ----------
    module
        What is trained; left in evaluation mode with its best weights.
    loss
        Row numbers to a scalar loss, of which every process computes its part.
    validate
        Loss on held-out cells, called in evaluation mode without gradients; the same in all
        processes, which by it stop together.
    rows
        Rows to train on.
    optimizer
        Optimizer over the parameters of `module`.
    schedule
        Epochs, batch size and patience.
    random
        Shuffles the rows.
    description, verbose
        Name and switch of the progress bar.
    groups
        Cuts the rows into groups, anew for every epoch, each of which is shuffled and cut into
        minibatches in turn; None makes all rows one group. See `stored.buffers`.
    processes
        Those that train together.

    Returns
    -------
    History
        Losses per epoch.

    Raises
    ------
    FloatingPointError
        If the loss is not finite, naming the epoch.
    """
    max_epochs = schedule.max_epochs
    winding_up: range | None = None  # epochs after an early stop
    highest = 1.0  # rate that they start at, relative

    def rate(epoch: int) -> float:
        if winding_up is None:
            return annealed(epoch, max_epochs)
        return highest * annealed(epoch - winding_up.start, max(len(winding_up), 1))

    annealing = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    history = History()
    best = math.inf
    best_weights: dict[str, Tensor] = {}
    hidden = not (verbose and processes.is_first)
    progress = tqdm(range(max_epochs), desc=description, unit="epoch", disable=hidden)
    for epoch in progress:
        module.train()
        parts = [rows] if groups is None else groups(rows, random)
        batches = (minibatches(part, schedule.batch_size, random) for part in parts)
        # Losses are not read before the epoch's end: the host need not wait for a GPU.
        losses = [
            descend(module, loss(batch), optimizer, processes)
            for batch in itertools.chain.from_iterable(batches)
        ]
        module.eval()
        with torch.no_grad():
            validation = validate()
        training = processes.sum(torch.stack(losses).double())
        history.training.append(training.mean().item())
        history.validation.append(validation)
        if not (math.isfinite(history.training[-1]) and math.isfinite(validation)):
            raise FloatingPointError(
                f"{description}: expected a finite loss; got training {history.training[-1]} and "
                f"validation {validation} in epoch {epoch}. Lower learning_rate, and check the "
                "data for cells with extreme totals."
            )
        progress.set_postfix(validation=f"{validation:.4f}", refresh=False)
        if validation < best:
            best = validation
            history.best_epoch = epoch
            best_weights = {name: w.detach().clone() for name, w in module.state_dict().items()}
        elif winding_up is None and epoch - history.best_epoch >= schedule.patience:
            winding_up = range(epoch + 1, min(epoch + 1 + schedule.patience, max_epochs))
            highest = annealed(history.best_epoch, max_epochs)
            module.load_state_dict(best_weights)
        if winding_up is not None and epoch + 1 == winding_up.stop:
            break
        annealing.step()
    progress.close()
    module.load_state_dict(best_weights)
    logger.info(
        "%s: %d epochs, best %d, validation loss %.5f",
        description,
        len(history.training),
        history.best_epoch,
        best,
    )
    return history
