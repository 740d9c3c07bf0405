"""Several processes as one: the only door to torch.distributed, and every call of it works in one process too."""

from __future__ import annotations

import datetime
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ssl_geo.errors import UserError

Batch = TypeVar("Batch")

# Other ranks wait this long while the main one indexes an archive.
_PATIENCE = datetime.timedelta(hours=3)
GRACE = 30.0  # seconds that torchrun gives a process to leave, and so does its loss


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that train together.

    Attributes:
        rank: Its number over all machines, 0 to world - 1.
        world: How many there are.
        local_rank: Its number on this machine.
        on_this_machine: How many there are on it.
        device: Where it computes.
    """

    rank: int
    world: int
    local_rank: int
    on_this_machine: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block while the others wait for it, and then those."""
        if not self.main:
            barrier()
        yield
        if self.main:
            barrier()


def setup(device: str = "auto") -> Ranks:
    """Join the processes that torchrun started (it sets RANK, WORLD_SIZE, LOCAL_RANK, ...); else be the only one.

    GPU tensors go by NCCL, CPU tensors by gloo.

    Args:
        device: `auto` (cuda where there is one), `cpu` or `cuda`.

    Raises:
        UserError: A GPU is asked for that is not there.
    """
    rank, world, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        place = torch.device("cpu")
    else:
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"process {local_rank + 1} of this machine wants a GPU of its own and there are {gpus}: "
                f"start at most {gpus} (torchrun --nproc-per-node), or give --device cpu"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if dist.is_torchelastic_launched():
        stop_without(os.getppid())
    if world > 1:
        store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
        # torchrun keeps its store when it restarts: without a name of its own a rank would call those that died.
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    return Ranks(rank, world, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world)), place)


def stop_without(agent: int) -> None:
    """Tell this process to stop (SIGTERM) when it has lost its parent, and kill it where it has not left in time.

    When torchrun is killed, nobody stops the processes that it started: they would go on, and write beside those that
    are started next.

    Args:
        agent: Process id of the parent.
    """

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def shutdown() -> None:
    """Leave the other processes."""
    if _several():
        dist.destroy_process_group()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average over all processes; without gradient.

    Args:
        tensor: Floating point, of one shape in all processes.

    Returns:
        A new tensor; in one process the tensor itself.
    """
    if not _several():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def any_rank(flag: bool) -> bool:
    """Whether any process says yes; each must ask. It waits for the processes, not for the GPU."""
    if not _several():
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def together(batches: Iterable[Batch], before_leaving: Callable[[], None]) -> Iterator[Batch]:
    """Pass batches on while every process has one; where one's loader has ended or failed, all of them end.

    Args:
        batches: Of this process.
        before_leaving: Called by each process then; no process goes on before all have.

    Raises:
        Exception: What this process's own loader raised.
    """
    iterator, failed = iter(batches), None
    while True:
        try:
            batch = next(iterator, None)
        except Exception as error:
            batch, failed = None, error
        if any_rank(batch is None) or batch is None:
            break
        yield batch
    before_leaving()
    barrier()
    if failed is not None:
        raise failed


def barrier() -> None:
    """Wait until every process has come here."""
    any_rank(False)


def broadcast(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if _several():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def wrap(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Average the gradients over all processes (DistributedDataParallel); in one process the module itself.

    Buffers are not broadcast at each pass: with `sync_batchnorm` they are equal everywhere anyhow, and changing them
    between the passes of accumulated micro-batches would break their backward.
    """
    if ranks.world == 1:
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters  # renamed between torch 2.8 and 2.14
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(module, device_ids=devices, **options)


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """Let every BatchNorm take its statistics over all processes.

    Unlike `nn.SyncBatchNorm.convert_sync_batchnorm`, it works on CPUs and keeps the activation and dropout that timm
    puts into its norm layers. Keys of the state dict, parameters and buffers stay the same.

    Args:
        module: Changed in place.

    Returns:
        The module, or its replacement where it is a BatchNorm itself.
    """
    if not _several():
        return module
    if isinstance(module, _BatchNorm):
        on_cpu = all(tensor.device.type == "cpu" for tensor in module.state_dict().values())
        return CPUSyncBatchNorm(module) if on_cpu else GPUSyncBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, sync_batchnorm(child))
    return module


def _take_over(module: _BatchNorm, original: _BatchNorm) -> None:
    """Make a new norm layer what another was: settings, parameters, buffers, children, mode."""
    for setting in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        setattr(module, setting, getattr(original, setting))
    module._parameters |= original._parameters
    module._buffers |= original._buffers
    module._modules |= original._modules
    module.train(original.training)


def _then(module: nn.Module, output: Tensor) -> Tensor:
    """Drop and activate, where the norm layer does that (timm's BatchNormAct2d)."""
    for child in module.children():
        output = child(output)
    return output


class GPUSyncBatchNorm(nn.SyncBatchNorm):
    """torch's own, followed by the dropout and activation of the layer that it takes over."""

    def __init__(self, original: _BatchNorm) -> None:
        super().__init__(original.num_features)
        _take_over(self, original)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, ...) over all but C."""
        return _then(self, super().forward(input))


class CPUSyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all processes on CPUs, where torch's own refuses to work.

    Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1, with both sums taken over all processes.
    """

    def __init__(self, original: _BatchNorm) -> None:
        super().__init__(original.num_features)
        _take_over(self, original)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, ...) over all but C."""
        return _then(self, self._over_ranks(input) if self.training else super().forward(input))

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def _over_ranks(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.float()
        count = values.new_tensor([values.numel() / self.num_features])
        sums = _sum_over_ranks(torch.cat([values.sum(dims), count]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centered = values - mean.view(shape)  # two passes: x² - mean² would lose digits
        variance = _sum_over_ranks(centered.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        output = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            output = output * self.weight.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SumOverRanks(torch.autograd.Function):
    """Sum over all processes; as every process's result depends on every input, so does the gradient sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(tensor)
    return total


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
