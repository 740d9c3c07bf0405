"""What a run takes where its settings are left open: presets by the number of chips. Used by the entries alone.

A transformer takes the paper's learning rate whatever the archive: at a convolutional net's it unlearns
(docs/learning.md, "A transformer's learning rate").
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ssl_geo.config import DINOConfig, PretrainConfig
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


TINY = 1e-3  # a temperature that single precision bears
# Least and largest values of the settings that a number alone can make senseless.
LIMITS = {
    "seed": (0, 2**32 - 1),
    "steps": (1, math.inf),
    "data.workers": (0, math.inf),
    "optim.batch_size": (1, math.inf),
    "optim.accumulate": (1, math.inf),
    "dino.out_dim": (1, math.inf),
    "dino.hidden_dim": (1, math.inf),
    "dino.bottleneck_dim": (1, math.inf),
    "dino.student_temp": (TINY, math.inf),
    "dino.teacher_temp": (TINY, math.inf),
    "dino.warmup_teacher_temp": (TINY, math.inf),
    "dino.center_momentum": (0, 1),
    "optim.lr": (0, math.inf),
    "optim.min_lr": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.clip": (0, math.inf),
    "optim.max_skipped": (0, math.inf),
    "log.every": (1, math.inf),
    "log.health_every": (1, math.inf),
    "log.checkpoint_every": (1, math.inf),
    "log.keep": (1, math.inf),
}
GENTLE_TEMP = 0.04  # where a warm-up of the teacher's temperature starts (arXiv 2104.14294, section 3.2)


def resolve(config: PretrainConfig, chips: int, world: int = 1, *, transformer: bool = False) -> list[str]:
    """Fill in what was left open, from the number of chips, and check what was given.

    Args:
        config: Changed in place; `views` sizes are left to the recipe, which knows the patch size.
        chips: Number of chips in the index.
        world: Number of processes.
        transformer: Whether the network is one.

    Returns:
        Lines to print: what was chosen and why.

    Raises:
        UserError: A value that cannot work, with what is allowed.
    """
    _check_limits(config)
    lines = []
    preset = next(p for p in PRESETS if chips < p.below)
    if config.steps is None:
        config.steps = 100 * math.ceil(chips / config.optim.batch_size) if config.data.paths else SAMPLE_STEPS
        lines.append(
            f"steps {config.steps}: {config.steps * config.optim.batch_size / chips:.0f} epochs of {chips} chips"
        )
    lr, reason = PAPER_LR, preset.reason
    if preset.peak_lr is not None and not transformer:
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
    lines += _warm_up_of_the_temperature(config.dino)
    for name in ("optim.warmup_steps", "dino.warmup_teacher_temp_steps", "dino.freeze_last_layer_steps"):
        group, key = name.split(".")
        length = getattr(getattr(config, group), key)
        if not 0 <= length <= config.steps:
            raise UserError(f"--{name} is {length}; it must lie between 0 and the run's {config.steps} steps (--steps)")
    parts = world * config.optim.accumulate
    if config.optim.batch_size % parts:
        raise UserError(
            f"--optim.batch_size is {config.optim.batch_size}; give a multiple of {parts}: the chips of a step are "
            f"shared by {world} processes with {config.optim.accumulate} micro-batches each (--optim.accumulate)"
        )
    return lines


def _check_limits(config: PretrainConfig) -> None:
    for name, (least, most) in LIMITS.items():
        value = operator.attrgetter(name)(config)
        for number in value if isinstance(value, Sequence) else [value]:
            if number is not None and not least <= number <= most:
                allowed = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:.10g}"
                raise UserError(f"--{name} is {number:g}; it must be {allowed}")


def _warm_up_of_the_temperature(dino: DINOConfig) -> list[str]:
    """Fill in where the teacher's temperature starts; say so of a start that no step will see."""
    assert dino.teacher_temp is not None
    if dino.warmup_teacher_temp is None:
        warms_up = dino.warmup_teacher_temp_steps > 0
        dino.warmup_teacher_temp = min(GENTLE_TEMP, dino.teacher_temp) if warms_up else dino.teacher_temp
    if dino.warmup_teacher_temp_steps == 0 and dino.warmup_teacher_temp != dino.teacher_temp:
        return [
            f"dino.warmup_teacher_temp {dino.warmup_teacher_temp:g} is idle: no step warms up from it to "
            f"{dino.teacher_temp:g} (--dino.warmup_teacher_temp_steps)"
        ]
    return []
