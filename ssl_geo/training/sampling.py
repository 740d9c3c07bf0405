"""Which chips a step sees: a pure function of (seed, step, rank), so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, chips: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(chips)


@dataclass(frozen=True)
class StepBatches:
    """Batch sampler over an endless row of shuffled epochs; batch `step` is row[step·B : (step+1)·B].

    A batch may straddle two epochs, so that no chip is ever dropped and an archive smaller than a batch works.
    Each rank takes its contiguous share, so that all ranks together see what one process would.

    Attributes:
        chips: Number of chips in the index.
        batch_size: Chips of all ranks in one step; a multiple of `world`.
        start: First step.
        stop: Step after the last.
        seed: Of the order.
        rank: This process.
        world: Number of processes.
    """

    chips: int
    batch_size: int
    start: int
    stop: int
    seed: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield one list of (epoch, chip) a step."""
        share = self.batch_size // self.world
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * share
            yield [self._at(position) for position in range(first, first + share)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, within = divmod(position, self.chips)
        return epoch, int(_permutation(self.seed, epoch, self.chips)[within])
