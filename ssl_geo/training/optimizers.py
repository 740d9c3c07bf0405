"""AdamW as DINO uses it: two parameter groups, values set by step, gradients clipped one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class AdamW(torch.optim.AdamW):
    """AdamW in one kernel, which does nothing where `found_inf` is 1: decided on the device.

    Attributes:
        found_inf: Scalar on the device, to be set before each step: 1 where the gradients are not finite, else 0 (the
            name is that of torch.amp.GradScaler, which skips steps in the same way).
    """

    found_inf: Tensor | None = None


def adamw(module: nn.Module) -> AdamW:
    """Make AdamW with one decayed and one undecayed group.

    Biases and one-dimensional parameters (norms) are not decayed, as in the reference
    (facebookresearch/dino, utils.get_params_groups). Learning rate and decay are placeholders until `set_step_values`.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(".bias")]
    undecayed = [p for name, p in trained if p.ndim <= 1 or name.endswith(".bias")]
    groups = [{"params": decayed, "decayed": True}, {"params": undecayed, "decayed": False}]
    return AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def set_step_values(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Give the next update its learning rate, and its weight decay to the decayed group alone."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip each parameter's gradient to `max_norm` by itself, as the reference does (not the norm of all together).

    The factor is min(1, max_norm / (norm + 1e-6)) per parameter; nothing is copied to the host.

    Args:
        parameters: Parameters whose `grad` is changed in place; those without one are passed over.
        max_norm: Largest norm of one parameter's gradient; 0 leaves the gradients as they are.

    Returns:
        The norm over all gradients before clipping, a scalar tensor; not finite if any gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients)).float()
    if max_norm > 0:
        factors = torch.clamp(max_norm / (norms + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factors.unbind())
    total: Tensor = torch.linalg.vector_norm(norms)
    return total
