"""What a run takes where its settings are left open: presets by the number of chips. Used by the entries alone.

A transformer takes the paper's learning rate whatever the archive: at a convolutional net's it unlearns
(docs/learning.md, "A transformer's learning rate").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssl_geo.config import PretrainConfig
from ssl_geo.errors import UserError


@dataclass(frozen=True)
class Preset:
    """Settings that depend on how much there is to learn from; warm-up and freeze are shares of the run."""

    name: str
    below: float  # chips
    reason: str
    out_dim: int
    teacher_momentum: float
    peak_lr: float | None  # of a convolutional net, whatever the batch; None: the paper's
    teacher_temp: float = 0.04
    warmup: float = 0.1
    freeze: float = 0.01


# A small archive wants a faster teacher, fewer prototypes, a high learning rate and warm-ups in proportion to a short
# run, else the loss stays at ln K: facebookresearch/dino issues 43 and 246, dinov2 issue 407.
PRESETS = (
    Preset("small", 10_000, "few prototypes, a fast teacher", 1024, 0.99, 1e-3),
    Preset("medium", 200_000, "fewer prototypes and a faster teacher than the paper's", 8192, 0.99, 1e-3),
    Preset("large", math.inf, "the paper's values", 65_536, 0.996, None),
)
SAMPLE_STEPS = 100
PAPER_LR = 5e-4  # for a batch of 256, others in proportion (arXiv 2104.14294, section 3.2)


def resolve(config: PretrainConfig, chips: int, world: int = 1, patch_size: int = 1) -> list[str]:
    """Fill in what was left open, from the number of chips, and check what was given.

    Args:
        config: Changed in place; `views` sizes are left to the recipe, which knows the patch size.
        chips: Number of chips in the index.
        world: Number of processes.
        patch_size: A transformer's, in pixels; 1 of a convolutional net.

    Returns:
        Lines to print: what was chosen and why.

    Raises:
        UserError: A value that cannot work, with what is allowed.
    """
    lines = []
    preset = next(p for p in PRESETS if chips < p.below)
    if config.steps is None:
        config.steps = 100 * math.ceil(chips / config.optim.batch_size) if config.data.paths else SAMPLE_STEPS
        lines.append(
            f"steps {config.steps}: {config.steps * config.optim.batch_size / chips:.0f} epochs of {chips} chips"
        )
    if config.steps < 1:
        raise UserError(f"--steps is {config.steps}; it must be at least 1")
    lr, reason = PAPER_LR, preset.reason
    if preset.peak_lr is not None and patch_size == 1:
        lr, reason = preset.peak_lr * 256 / config.optim.batch_size, f"{reason}, a high learning rate"
    elif preset.peak_lr is not None:
        reason += ", a transformer's learning rate"
    chosen = {
        "dino.out_dim": preset.out_dim,
        "dino.teacher_momentum": preset.teacher_momentum,
        "dino.teacher_temp": preset.teacher_temp,
        "optim.lr": lr,
        "optim.warmup_steps": round(preset.warmup * config.steps),
        "dino.freeze_last_layer_steps": round(preset.freeze * config.steps),
    }
    filled = []
    momentum = config.dino.teacher_momentum
    if momentum is not None and not 0 <= momentum < 1:
        raise UserError(
            f"--dino.teacher_momentum is {momentum:g}; it must be at least 0 and less than 1, where the teacher would "
            "never move"
        )
    for name, value in chosen.items():
        group, key = name.split(".")
        if getattr(getattr(config, group), key) is None:
            setattr(getattr(config, group), key, value)
            filled.append(f"{name} {value}")
    if filled:
        lines.append(f"preset {preset.name} for {chips} chips ({reason}): {', '.join(filled)}")
    if config.dino.warmup_teacher_temp is None:
        config.dino.warmup_teacher_temp = config.dino.teacher_temp
    for name in ("optim.warmup_steps", "dino.warmup_teacher_temp_steps", "dino.freeze_last_layer_steps"):
        group, key = name.split(".")
        length = getattr(getattr(config, group), key)
        if not 0 <= length <= config.steps:
            raise UserError(f"--{name} is {length}; it must lie between 0 and the run's {config.steps} steps (--steps)")
    parts = world * config.optim.accumulate
    if config.optim.batch_size < 1 or parts < 1 or config.optim.batch_size % parts:
        raise UserError(
            f"--optim.batch_size is {config.optim.batch_size}; give a multiple of {parts}: the chips of a step are "
            f"shared by {world} processes with {config.optim.accumulate} micro-batches each (--optim.accumulate)"
        )
    if config.log.every < 1 or config.log.health_every < 1 or config.log.checkpoint_every < 1 or config.log.keep < 1:
        raise UserError("--log.every, --log.health_every, --log.checkpoint_every and --log.keep must be at least 1")
    return lines
