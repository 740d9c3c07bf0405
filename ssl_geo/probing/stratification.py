"""Whole blocks to train, val and test, so that each sees every class as far as the blocks allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError

SPLITS = ("train", "val", "test")
MOVES = 100  # most single moves after the first placing; few blocks need fewer, many are even without

Indices = npt.NDArray[np.int64]
Splits = npt.NDArray[np.int8]


def assign_blocks(
    class_pixels: npt.NDArray[np.integer], fractions: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> Splits:
    """Give every block to a split so that the splits hold their fractions of every class, as near as blocks allow.

    Iterative stratification (Sechidis et al. 2011, algorithm 1) over the pixels of each class: the class in fewest
    blocks first, each of its blocks to the split that lacks most of it; where only as many blocks are left as there are
    splits without that class, these have precedence. Then single blocks move, as long as that lowers the number of
    (split, class) pairs without a pixel, or else the distance from the fractions.

    Args:
        class_pixels: (n, C) valid pixels of each block and class; a block without any goes to train.
        fractions: Shares of train, val and test; 0 leaves a split empty.
        seed: Of the order in which blocks are placed.

    Returns:
        (n,) index into SPLITS of each block.

    Raises:
        UserError: Fractions that are none, or fewer blocks with labels than splits.
    """
    share = np.asarray(fractions, dtype=np.float64)
    if share.shape != (3,) or (share < 0).any() or not np.isclose(share.sum(), 1, atol=1e-3):
        raise UserError(
            f"fractions {tuple(fractions)} of {', '.join(SPLITS)}: three numbers >= 0 with sum 1, set --split.fractions"
        )
    pixels = np.asarray(class_pixels, dtype=np.float64)
    labelled = np.flatnonzero(pixels.sum(1) > 0)
    used = np.flatnonzero(share > 0)
    if len(labelled) < len(used):
        empty = ", ".join(SPLITS[i] for i in used[len(labelled) :])
        raise UserError(
            f"{len(labelled)} blocks with valid pixels for {len(used)} splits, so no valid pixel in {empty}: "
            "make --split.block smaller, or set a share of --split.fractions to 0"
        )
    result = np.zeros(len(pixels), dtype=np.int8)
    # Every class counts alike, however many pixels it has: columns sum to 1.
    totals = pixels.sum(0)
    weight = pixels[labelled][:, totals > 0] / totals[totals > 0]
    order = np.random.default_rng(seed).permutation(len(labelled))
    placed = _stratify(weight[order], share, used)
    result[labelled[order]] = used[_improve(weight[order], share[used], placed)]
    return result


def _stratify(weight: npt.NDArray[np.float64], share: npt.NDArray[np.float64], used: Indices) -> Indices:
    """Iterative stratification: (n, C) class shares of blocks -> position in `used` of each block."""
    lacking = np.repeat(share[used][:, None], weight.shape[1], axis=1)  # (splits, C) still to be given
    has = np.zeros(lacking.shape, dtype=bool)
    contains = weight > 0
    left = contains.sum(0)  # blocks of each class not yet placed
    waiting = [iter(np.flatnonzero(column).tolist()) for column in contains.T]
    placed = np.full(len(weight), -1, dtype=np.int64)
    for _ in range(len(weight)):
        rarest = int(np.where(left > 0, left, len(weight) + 1).argmin())
        block = next(number for number in waiting[rarest] if placed[number] < 0)
        without = np.flatnonzero(~has[:, rarest])
        candidates = without if len(without) > 0 and left[rarest] <= len(without) else np.arange(len(used))
        # Most of this class lacking, then most of all classes.
        wanted = lacking[candidates, rarest] + 1e-6 * lacking[candidates].sum(1)
        chosen = candidates[wanted.argmax()]
        placed[block] = chosen
        lacking[chosen] -= weight[block]
        has[chosen] |= contains[block]
        left -= contains[block]
    return placed


def _improve(weight: npt.NDArray[np.float64], share: npt.NDArray[np.float64], placed: Indices) -> Indices:
    """Best move of one block to another split, until none helps; `placed` indexes the rows of `share`."""
    splits, classes = len(share), weight.shape[1]
    placed = placed.copy()
    own = np.eye(splits)
    for _ in range(MOVES):
        # What the splits would hold, (n, target, split, C), and of how many blocks, (n, target, split).
        change = own[None] - own[placed][:, None]
        held = own[:, placed] @ weight + change[..., None] * weight[:, None, None]
        blocks = np.bincount(placed, minlength=splits) + change
        # Subtracting shares leaves rounding behind: nothing that small is a pixel.
        absent = (held < 1e-12).sum((-2, -1)) + 1000 * (blocks == 0).sum(-1)
        cost = 10.0 * absent + np.abs(held - share[:, None]).sum((-2, -1)) / classes
        block, target = np.unravel_index(cost.argmin(), cost.shape)
        if cost[block, target] >= cost[block, placed[block]] - 1e-9:
            break
        placed[block] = target
    return placed
