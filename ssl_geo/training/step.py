"""One step of training: forward, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ssl_geo.errors import UserError
from ssl_geo.training import distributed
from ssl_geo.training.optimizers import AdamW, clip_gradients


class Method(Protocol):
    """What a step asks of a method."""

    @property
    def student(self) -> nn.Module:
        """What is trained."""

    def loss(self, views: Sequence[Tensor], step: int) -> Tensor:
        """Scalar loss of a micro-batch."""

    def freeze_last_layer(self, step: int) -> None:
        """Drop gradients that this step is not to follow."""

    def after_step(self, step: int, finite: Tensor) -> None:
        """Move what follows the student; where `finite` is False, forget the step."""


def train_step(
    method: Method,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    views: Sequence[Tensor],
    step: int,
    *,
    dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Do one update, or none at all where loss or gradients are not finite: the device decides, the host never asks.

    Args:
        method: On its device.
        optimizer: Of `method.student`.
        scaler: Of the loss; enabled for float16 alone.
        views: Of this rank's chips, each (B, C, h, w) on the device of the method.
        step: Optimizer steps done so far.
        dtype: Of the forward pass.
        accumulate: Micro-batches that the views are split into.
        clip: Largest norm of a single parameter's gradient; 0: no clipping.

    Returns:
        The mean loss over micro-batches and ranks, and whether it and the gradients were finite: scalars on the device.
    """
    device = views[0].device.type
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]  # what convolutions are fastest on
    optimizer.zero_grad(set_to_none=True)
    terms = []
    for part in zip(*(view.chunk(accumulate) for view in views), strict=True):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            term = method.loss(part, step) / accumulate
        torch.autograd.backward(scaler.scale(term))
        terms.append(term.detach())
    loss = distributed.mean_over_ranks(torch.stack(terms).sum())
    scaler.unscale_(optimizer)
    norm = clip_gradients(method.student.parameters(), clip)
    finite = torch.isfinite(norm + loss)
    method.freeze_last_layer(step)
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    method.after_step(step, finite)
    scaler.update()
    return loss, finite


class Skips:
    """Counts the steps that were not finite, on the device: only reading the counts waits for it.

    Args:
        device: Where the steps are done.
        total: Of an earlier part of the run.
    """

    def __init__(self, device: torch.device, total: int = 0) -> None:
        self._total, self._in_a_row = torch.tensor([total, 0], device=device).unbind()
        self._unread: list[Tensor] = []

    def note(self, finite: Tensor) -> None:
        """Take in what `train_step` said."""
        self._unread.append(finite)
        self._total += ~finite
        self._in_a_row += 1
        self._in_a_row *= ~finite

    @property
    def total(self) -> int:
        """Of the whole run."""
        return int(self._total)

    def last(self) -> list[int]:
        """Which of the steps since the last call were skipped, counted from the end: 1 is the last step."""
        finite, self._unread = torch.stack(self._unread).tolist() if self._unread else [], []
        return [back for back in range(len(finite), 0, -1) if not finite[-back]]

    @property
    def in_a_row(self) -> int:
        """Up to the last step."""
        return int(self._in_a_row)


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Let torch.compile translate networks, at their first pass and for each size of views; names and state stay.

    Raises:
        UserError: There is no compiler that works.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and seldom wanted

    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        reason = " ".join(" ".join(str(error).split("\n")[:2]).split())  # who failed, and with what
        raise UserError(f"--optim.compile: no compiler works here ({reason}); install one, or leave it out") from error
    for network in networks:
        network.compile(dynamic=False)
