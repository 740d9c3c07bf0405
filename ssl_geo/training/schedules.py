"""Schedules as plain functions of the step; every one of DINO's counts optimizer steps."""

from __future__ import annotations

import math


def cosine(step: int, *, steps: int, start: float, end: float) -> float:
    """Go from `start` to `end` along half a cosine.

    Args:
        step: Current step, 0 at the first update; beyond `steps` the value stays at `end`.
        steps: Length of the run in steps.
        start: Value at step 0.
        end: Value at step `steps`.
    """
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def linear(step: int, *, steps: int, start: float, end: float) -> float:
    """Go from `start` to `end` along a line, reached at step `steps`, and stay there."""
    if step >= steps:
        return end
    return start + (end - start) * step / steps


def warmup_cosine(step: int, *, steps: int, warmup_steps: int, peak: float, end: float) -> float:
    """Linear warm-up from 0 to `peak`, then cosine to `end` (the learning rate of DINO, arXiv 2104.14294, section 3.2).

    Raises:
        ValueError: `warmup_steps` is longer than the run.
    """
    if warmup_steps > steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps does not fit a run of {steps} steps")
    if step < warmup_steps:
        return linear(step, steps=warmup_steps, start=0.0, end=peak)
    return cosine(step - warmup_steps, steps=steps - warmup_steps, start=peak, end=end)
