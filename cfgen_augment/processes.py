"""Several processes as one: shares of the work, and sums over them.

Every process runs the same program on the same input with the same seeds, so that all reach the
same decisions without asking each other; only sums over cells are exchanged. A process by itself
has everything as its share, and exchanges nothing.

`torchrun` or `srun` start the processes, Lightning Fabric reads what they say of them and
connects them.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cfgen_augment.notices import notify

Value = TypeVar("Value")

# Others wait while the first one writes a file, for longer than the usual half an hour if it is
# large. A process that dies is noticed by the launcher, which ends the rest.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """The processes that work together, seen from one of them.

    Attributes
    ----------
    rank
        Number of this process, from zero.
    size
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    # ------------------------------------------------------------------ shares

    def share(self, n: int) -> slice:
        """Own part of `n` things; the parts are nearly equal, in order of rank."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def part(self, mean: Tensor, n_own: int, n: int) -> Tensor:
        """The mean of `n_own` of `n` things, as what it adds to the mean of all `n`."""
        return mean if n_own == n else mean * (n_own / n)

    def own_device(self, device: str) -> str:
        """Where this process is to compute: ``"auto"`` and ``"cuda"`` mean a GPU of its own.

        Raises
        ------
        ValueError
            If several processes are told to use one and the same GPU.
        """
        if self.size == 1 or device == "cpu":
            return device
        if device not in ("auto", "cuda"):
            raise ValueError(
                f"device: expected 'auto', 'cpu' or 'cuda' with distributed=True, where every "
                f"process takes a GPU of its own; got {device!r}."
            )
        return "cpu" if _accelerator(device) == "cpu" else f"cuda:{_local_rank()}"

    # ------------------------------------------------------------- exchange

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same in all of them; `tensor` may be overwritten."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, module: nn.Module) -> None:
        """Sum the gradients of the processes' parts of a loss, in place."""
        if self.size == 1:
            return
        # A parameter without a gradient here may have one elsewhere: all exchange all of them.
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        summed = self.sum(torch.cat([g.reshape(-1) for g in gradients]))
        for p, g in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)

    def agree(self, value: Value) -> Value:
        """What the first process holds, in all of them; it must be possible to pickle it."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather(self, value: Value) -> list[Value]:
        """What every process holds, by rank; it must be possible to pickle it."""
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        return held

    # ------------------------------------------------------- errors and warnings

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Wait for all processes, and fail in all of them if one failed.

        For what can fail in one process alone, such as writing a file. Nothing may be exchanged
        inside.

        Raises
        ------
        RuntimeError
            Where another process failed; where it failed, its own error comes through.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = None if failure is None else str(failure) or type(failure).__name__
        failures = self.gather(told)
        if failure is not None:
            raise failure
        for rank, other in enumerate(failures):
            if other is not None:
                raise RuntimeError(f"process {rank} of {self.size} failed: {other}")

    @contextlib.contextmanager
    def first_speaks(self) -> Iterator[None]:
        """Silence the warnings of the other processes, which are those of the first."""
        with contextlib.ExitStack() as stack:
            if not self.is_first:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            yield

    @contextlib.contextmanager
    def first_repeats(self) -> Iterator[None]:
        """Let the first process give everyone's warnings, where every process has its own."""
        if self.size == 1:
            yield
            return
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield
        told = self.gather([(str(w.message), w.category) for w in heard])
        if self.is_first:
            for message, category in dict.fromkeys(w for each in told for w in each):
                notify(message, category)

    # ------------------------------------------------------------- batch norm

    @contextlib.contextmanager
    def whole_minibatches(self, module: nn.Module) -> Iterator[None]:
        """Let the batch norms of `module` see the whole minibatch, not this process's share.

        `module` must be on its device. Afterwards it is what it was, with what was learned.
        """
        replaced = []
        if self.size > 1:
            for parent in list(module.modules()):
                for name, layer in list(parent.named_children()):
                    if type(layer) is nn.BatchNorm1d:
                        setattr(parent, name, SharedBatchNorm(layer, self))
                        replaced.append((parent, name, layer))
        try:
            yield
        finally:
            for parent, name, layer in replaced:
                layer.train(getattr(parent, name).training)
                setattr(parent, name, layer)


ALONE = Processes()


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch norm over minibatches ``(n, n_features)`` of which every process has a share.

    It has the very parameters and moments of the layer it stands for, and in evaluation mode
    does what that does. PyTorch's own `SyncBatchNorm` runs on GPUs alone.
    """

    def __init__(self, layer: nn.BatchNorm1d, processes: Processes) -> None:
        super().__init__(layer.num_features, layer.eps, device="meta")
        self.momentum: float = layer.momentum  # type: ignore[assignment]
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.weight, self.bias = layer.weight, layer.bias
        for name, moments in layer.named_buffers():
            setattr(self, name, moments)
        self.processes = processes
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise by the moments of the whole minibatch; a share may be empty."""
        if not self.training:
            return super().forward(x)
        # One exchange: sums of x and of its square, the latter by way of one's own mean. In
        # double precision their difference loses nothing that single precision would show.
        own_mean = x.sum(dim=0) / max(len(x), 1)
        own_squares = (x - own_mean).square().sum(dim=0).double()
        own_mean = own_mean.double()
        own = [len(x) * own_mean, own_squares + len(x) * own_mean.square()]
        sums = _Sum.apply(torch.cat([*own, own_mean.new_full((1,), len(x))]), self.processes)
        n = sums[-1].detach()
        first, second = (sums[:-1] / n).chunk(2)
        mean, variance = first.float(), (second - first.square()).clamp_min(0.0).float()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1.0)).float(), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias, x - mean, scale)


class _Sum(torch.autograd.Function):
    """Sum over processes. Each one's loss depends on it, so gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.sum(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.sum(gradients[0].contiguous().clone()), None


# -------------------------------------------------------------------- launching


def launched(distributed: bool, device: str) -> Processes:
    """The processes that were started together, connected; or this one alone.

    The first call connects them; a process group that is there already is used.

    Parameters
    ----------
    distributed
        Whether several processes were started to work as one.
    device
        Where they will compute: decides how they talk to each other.

    Raises
    ------
    ValueError
        If no launcher started this process.
    ImportError
        If Lightning Fabric is not installed.
    """
    if not distributed:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        _connect(device)
    if not dist.is_initialized():  # a launcher that was asked for one process
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size())


def _connect(device: str) -> None:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise ImportError(
            "distributed=True: expected Lightning Fabric to be installed; it is not. Run: pip "
            "install 'cfgen-augment[distributed]'"
        ) from error
    environment: TorchElasticEnvironment | SLURMEnvironment
    if TorchElasticEnvironment.detect():
        n_local = int(os.environ["LOCAL_WORLD_SIZE"])
        environment = TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        n_nodes = int(os.environ.get("SLURM_NNODES", "1"))
        each = math.ceil(int(os.environ["SLURM_NTASKS"]) / n_nodes)
        n_local = int(os.environ.get("SLURM_NTASKS_PER_NODE", each))
        environment = SLURMEnvironment()
    else:
        raise ValueError(
            "distributed=True: expected processes started by torchrun or srun; got one that was "
            "not. Start them with `torchrun --nproc-per-node 2 ...` or `srun --ntasks-per-node "
            "2 ...`, or leave distributed at False."
        )
    size = environment.world_size()
    if size == 1:
        return
    if _accelerator(device) == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected one that is there; got {device!r}, and this machine offers no CUDA "
            "device. Use device='auto' or 'cpu'."
        )
    Fabric(
        accelerator=_accelerator(device),
        devices=n_local,
        num_nodes=size // n_local,
        strategy=DDPStrategy(cluster_environment=environment, timeout=_PATIENCE),
    ).launch()


def _accelerator(device: str) -> str:
    wants_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "cuda" if wants_gpu else "cpu"


def _local_rank() -> int:
    """Number of this process on its node."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in os.environ:
            return int(os.environ[name])
    return dist.get_rank() % max(torch.cuda.device_count(), 1)
