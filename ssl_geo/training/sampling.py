"""Which chips a step sees: a pure function of (seed, step, rank), so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

ROUNDS = 8


class Shuffle:
    """A permutation of 0 … n-1 that is computed where it is asked for, so that it takes no memory of size n.

    A Feistel network with random round functions permutes the numbers below the next power of four; what falls beyond
    n goes through it again until it does not (J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002,
    cycle-walking). The round function is the finalizer of splitmix64 (S. Vigna, public domain).
    """

    def __init__(self, n: int, seed: tuple[int, ...]) -> None:
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of each half
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.default_rng(seed).integers(0, 2**64, ROUNDS, dtype=np.uint64)

    def __call__(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """What stands at the positions (B,), each from 0 to n-1."""
        values = self._permute(positions.astype(np.uint64))
        while (beyond := values >= self.n).any():
            values[beyond] = self._permute(values[beyond])
        return values.astype(np.int64)

    def _permute(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return (left << self._half) | right


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Every bit of the result depends on every bit of x; arithmetic is modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=2)
def _shuffle(seed: int, epoch: int, chips: int) -> Shuffle:
    return Shuffle(chips, (seed, epoch))


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
            epochs, within = np.divmod(np.arange(first, first + share), self.chips)
            keys: list[tuple[int, int]] = []
            for epoch in np.unique(epochs).tolist():
                chips = _shuffle(self.seed, epoch, self.chips)(within[epochs == epoch])
                keys += [(epoch, chip) for chip in chips.tolist()]
            yield keys
