"""Which number format the forward pass computes in."""

from __future__ import annotations

import torch

from ssl_geo.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Turn `auto`, `fp32`, `bf16` or `fp16` into a dtype for autocast.

    `auto` takes bfloat16 where the hardware has units for it (CPUs with AVX-512 BF16 or AMX, GPUs from Ampere on),
    else float32: emulated bfloat16 is slower than float32.

    Raises:
        UserError: fp16 on a CPU, whose gradients would need scaling that torch offers on GPUs alone.
    """
    if precision == "auto":
        cuda = device.type == "cuda"
        native = torch.cuda.is_bf16_supported() if cuda else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--optim.precision fp16 needs a GPU; on a CPU take auto, bf16 or fp32")
    return _DTYPES[precision]
