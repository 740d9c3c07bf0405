"""How far a score would differ on other land: 95 % intervals by bootstrap over spatial blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ssl_geo.probing.metrics import Counted, Counts, Floats, Marginals, class_f1, class_iou, macro_f1, marginals, miou

# Fewer blocks than this say nothing about how a score varies from place to place.
MIN_BLOCKS = 5

Statistic = Callable[[Counted], Floats]

# Means over classes, and what they average. A draw that happens to miss a class keeps this class's score of all blocks:
# were it dropped, each rare and poor class that a draw misses would lift the mean, and the interval with it.
AVERAGED: dict[Statistic, Statistic] = {miou: class_iou, macro_f1: class_f1}


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval; `low` and `high` are NaN where there are too few blocks for one."""

    value: float
    low: float
    high: float
    blocks: int

    @property
    def reliable(self) -> bool:
        """Whether there were enough blocks for an interval."""
        return self.blocks >= MIN_BLOCKS

    def __str__(self) -> str:
        if not self.reliable:
            return f"{self.value:.3f} (no interval: {self.blocks} blocks, {MIN_BLOCKS} needed)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference(Interval):
    """Score of one model less that of another on the same blocks; `p` is two-sided, for no difference."""

    p: float


def bootstrap(
    blocks: Counts, statistic: Statistic = miou, draws: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Expanded percentile bootstrap over spatial blocks (Efron & Tibshirani 1993, ch. 13; Hesterberg 2015).

    Pixels of one block resemble each other, so blocks are what is drawn. A draw is a weight of each block, and all
    draws are one matrix product: weights (draws, n) @ marginals (n, C). Blocks without a valid pixel are left out.
    Plain percentiles of few blocks are too narrow (five cover 83 % where 95 % are asked for), so those of a Student
    interval are taken: five then cover 91 %, eight and more 94 % and above.

    Args:
        blocks: (n, C, C) confusion matrices, one a block.
        statistic: Score of (..., C, C) counts or their `Marginals` -> (...,): `miou` or another of `metrics`.
        draws: Number of resamples.
        seed: Of the resampling.
        confidence: Coverage of the interval.

    Returns:
        The score of all blocks together, with its interval; NaN bounds with fewer than MIN_BLOCKS blocks.
    """
    used = blocks[blocks.sum((1, 2)) > 0]
    drawn = _drawn(used, statistic, resamples(len(used), draws, seed)) if len(used) >= MIN_BLOCKS else np.empty(0)
    return interval(float(statistic(blocks.sum(0))), drawn, len(used), confidence)


def interval(value: float, drawn: Floats, blocks: int, confidence: float = 0.95) -> Interval:
    """The interval of a value by its draws (draws,), see `bootstrap`; NaN bounds with fewer than MIN_BLOCKS blocks."""
    if blocks < MIN_BLOCKS:
        return Interval(value, float("nan"), float("nan"), blocks)
    low, high = np.nanquantile(drawn, _tails(blocks, confidence)).tolist()
    return Interval(value, low, high, blocks)


def paired_difference(
    blocks_a: Counts,
    blocks_b: Counts,
    statistic: Statistic = miou,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Expanded percentile bootstrap of score(a) - score(b), both models on the same draws of the same blocks.

    Args:
        blocks_a: (n, C, C) confusion matrices of one model.
        blocks_b: (n, C, C) of the other, of the same blocks in the same order.
        statistic: Score of (..., C, C) counts or their `Marginals` -> (...,).
        draws: Number of resamples.
        seed: Of the resampling.
        confidence: Coverage of the interval.

    Returns:
        The difference, its interval and p: 2 · min(P(d ≤ 0), P(d ≥ 0)), each counted as (1 + k) / (draws + 1) (Davison
        & Hinkley 1997, eq. 4.11), expanded as the interval is, so that of five blocks with 1000 draws it is 0.051 at
        least, of six 0.025; NaN for these with fewer than MIN_BLOCKS blocks.

    Raises:
        ValueError: The two were not scored on the same labels.
    """
    if blocks_a.shape != blocks_b.shape or not np.array_equal(blocks_a.sum(2), blocks_b.sum(2)):
        raise ValueError("the two models were not scored on the same labels of the same blocks")
    used = blocks_a.sum((1, 2)) > 0
    count = int(used.sum())
    value = float(statistic(blocks_a.sum(0)) - statistic(blocks_b.sum(0)))
    if count < MIN_BLOCKS:
        return Difference(value, float("nan"), float("nan"), count, float("nan"))
    weights = resamples(count, draws, seed)
    drawn = _drawn(blocks_a[used], statistic, weights) - _drawn(blocks_b[used], statistic, weights)
    low, high = np.nanquantile(drawn, _tails(count, confidence)).tolist()
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    plain = min(1.0, 2 * (1 + tail) / (draws + 1))
    p = 2 * stats.t.sf(stats.norm.isf(plain / 2) / _expansion(count), count - 1)
    return Difference(value, low, high, count, float(p))


def class_intervals(blocks: Counts, draws: int = 1000, seed: int = 0, confidence: float = 0.95) -> Floats:
    """The interval of each class's IoU, from the same draws as `bootstrap`.

    Args:
        blocks: (n, C, C) confusion matrices, one a block.
        draws: Number of resamples.
        seed: Of the resampling.
        confidence: Coverage of the intervals.

    Returns:
        (2, C) lower and upper ends, over the draws that hold the class; NaN for a class that the labels do not hold,
        and with fewer than MIN_BLOCKS blocks.
    """
    used = blocks[blocks.sum((1, 2)) > 0]
    ends: Floats = np.full((2, blocks.shape[1]), np.nan)
    if len(used) >= MIN_BLOCKS:
        drawn = _drawn(used, class_iou, resamples(len(used), draws, seed))
        there = ~np.isnan(drawn).all(axis=0)
        ends[:, there] = np.nanquantile(drawn[:, there], _tails(len(used), confidence), axis=0)
    return ends


def resamples(count: int, draws: int = 1000, seed: int = 0) -> Floats:
    """How often each of `count` blocks is in each of `draws` resamples, (draws, count)."""
    if count == 0:
        return np.zeros((draws, 0))
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return drawn.astype(np.float64)


def _drawn(blocks: Counts, statistic: Statistic, weights: Floats) -> Floats:
    """(draws,) the statistic of each resample."""
    drawn = Marginals(*(weights @ part for part in marginals(blocks)))  # sums of whole numbers: exact
    if statistic not in AVERAGED:
        return statistic(drawn)
    per_class = AVERAGED[statistic]
    whole = per_class(blocks.sum(0))
    mean: Floats = np.nanmean(np.where(np.isnan(scores := per_class(drawn)), whole, scores), axis=-1)
    return mean


def _expansion(blocks: int) -> float:
    """By how much a bootstrap of few blocks is too narrow: the variance of its draws is divided by n, not n - 1."""
    return math.sqrt(blocks / (blocks - 1))


def _tails(blocks: int, confidence: float) -> list[float]:
    """The quantiles of the draws that bound the interval (Hesterberg 2015, doi 10.1080/00031305.2015.1089789)."""
    tail: float = stats.norm.sf(stats.t.ppf((1 + confidence) / 2, blocks - 1) * _expansion(blocks))
    return [tail, 1 - tail]
