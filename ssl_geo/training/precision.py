"""Which number format a network computes in, and that its gradients are right in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def widen_narrow_inputs(network: nn.Module) -> None:
    """Give convolutions inputs that are no narrower than their stride, where that leaves their outputs as they are.

    For bfloat16 on a CPU: where an input is narrower than the stride, as the last stages' are in small views, oneDNN
    leaves those columns of the weights' gradient that meet nothing but padding as they were in memory: any number, or
    none. Seen with torch 2.14 and 2.15 on a processor with AVX-512 BF16 and no AMX; a fault of the forward pass in
    such shapes is pytorch/pytorch issue 169688. A column of zeros more is what padding puts there in any case.

    Args:
        network: Not compiled yet.
    """
    for module in network.modules():
        # Others may pad by themselves, by what their input's width is.
        if type(module) is nn.Conv2d and isinstance(module.padding, tuple) and module.padding_mode == "zeros":
            reach = module.dilation[1] * (module.kernel_size[1] - 1) + 1
            if reach > 2 * module.padding[1]:  # else wider by a stride would be one output more
                module.register_forward_pre_hook(_widen_to_stride)


def _widen_to_stride(convolution: Any, inputs: tuple[Tensor]) -> Tensor | None:
    lacking: int = convolution.stride[1] - inputs[0].shape[-1]
    return F.pad(inputs[0], (0, lacking)) if lacking > 0 else None
