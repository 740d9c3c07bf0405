"""Where the tensors of a step lie, and how they get to the device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let this process hand out freed memory again instead of giving it back to the system; for training on CPUs.

    A step allocates and frees the same gigabytes each time. By default glibc maps every large block afresh, and the
    kernel zeroes it page by page at the first touch: 270,000 page faults, about a fifth of the time, in a step of
    ViT-S/8 with 4 chips on 2 cores. The peak of the memory hardly changes, the valleys go.

    Returns:
        Whether the C library took it; others than glibc do not know it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def on_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Pass batches on, on the device.

    On a GPU a batch in pinned memory is copied on a stream of its own. The host runs ahead of the device, as nothing in
    a step waits for it: it asks for the next batch while the step before is being computed, and so the two overlap.

    Args:
        batches: Tensors of any shape.
        device: Where they are wanted.
    """
    stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
    copying = stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(copying):  # of None: the stream there is
            moved = [tensor.to(device, non_blocking=True) for tensor in batch]
        if copying is not None:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copying)
            for tensor in moved:
                tensor.record_stream(computing)  # so that its memory is not reused while a step still reads it
        yield moved
