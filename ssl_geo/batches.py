"""Chips to batches of views: datasets whose items are whole batches, by (epoch, chip). Used by the entries alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_geo.imagery.datasets import Chip, ChipDataset
from ssl_geo.imagery.packed import PackedChips
from ssl_geo.imagery.seasons import OtherDates
from ssl_geo.views.batched import ChipBatch, draw_table
from ssl_geo.views.multicrop import MultiCrop

Chips: TypeAlias = ChipDataset | PackedChips
Keys: TypeAlias = Sequence[tuple[int, int]]  # (epoch, chip) of a batch: every draw is a function of them and the seed
Batch = TypeVar("Batch")

_SEASON = (1,)  # its generators' spawn key, which keeps them apart from those of the views, of the same seeds


@dataclass(frozen=True)
class Season:
    """Whether every second view of a chip shows its place at another date, and at which.

    Attributes:
        dates: The other dates of each chip.
        probability: That it does, where there is one.
    """

    dates: OtherDates
    probability: float

    def draw(self, *, seed: int, epoch: int, chip: int) -> int | None:
        """Draw the number of the other chip, each alike; None: no other. A function of the arguments alone."""
        generator = np.random.default_rng(np.random.SeedSequence((seed, epoch, chip), spawn_key=_SEASON))
        happens, which = generator.random(2).tolist()
        if happens >= self.probability or not len(others := self.dates[chip]):
            return None
        return int(others[int(which * len(others))])


class Batches(Dataset[Batch], Generic[Batch]):
    """What both kinds of batches are made of.

    Args:
        chips: As stored.
        crops: The views.
        seed: Of the run.
        season: Another date in every second view; None: all views of a chip are of one date.
    """

    def __init__(self, chips: Chips, crops: MultiCrop, seed: int, season: Season | None = None) -> None:
        self.chips, self.crops, self.seed, self.season = chips, crops, seed, season

    def numbers(self, key: tuple[int, int]) -> list[int]:
        """What the views of a chip show: its number, and that of another date of it where one was drawn."""
        epoch, chip = key
        other = None if self.season is None else self.season.draw(seed=self.seed, epoch=epoch, chip=chip)
        return [chip] if other is None else [chip, other]

    def read(self, key: tuple[int, int]) -> list[Chip]:
        """Read the chips of `numbers`."""
        return [self.chips[number] for number in self.numbers(key)]


class ViewBatches(Batches[list[Tensor]]):
    """Batches of views, each written once: where the training step takes it, in a tensor (B, C, h, w) a view."""

    def __getitem__(self, keys: Keys) -> list[Tensor]:
        crops = self.crops
        batch = [torch.empty((len(keys), *recipe.size, crops.mean.size)) for recipe in crops.recipes]
        memory = [views.numpy() for views in batch]
        for i, (epoch, position) in enumerate(keys):
            chips, out = self.read((epoch, position)), [views[i] for views in memory]
            draws = crops.draw(*chips[0].valid.shape, seed=self.seed, epoch=epoch, chip=position)
            for of_second, chip in enumerate(chips):
                shown = [
                    draw if len(chips) == 1 or is_second == of_second else None
                    for draw, is_second in zip(draws, crops.seconds, strict=True)
                ]
                crops.make(chip.dn, chip.valid, chip.scale, chip.offset, shown, out)
        return [views.permute(0, 3, 1, 2) for views in batch]


class ChipBatches(Batches[ChipBatch]):
    """Batches of chips as stored, with the draws of their views, which the device makes of them."""

    def __getitem__(self, keys: Keys) -> ChipBatch:
        read = [self.read(key) for key in keys]
        others = [each[1] for each in read if len(each) > 1]
        chips = [each[0] for each in read] + others
        kinds = {chip.dn.dtype for chip in chips}
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        draws = [
            self.crops.draw(*own.valid.shape, seed=self.seed, epoch=epoch, chip=position)
            for (own, *_), (epoch, position) in zip(read, keys, strict=True)
        ]
        second = None
        if others:
            has_other = np.array([len(each) > 1 for each in read])
            second = np.where(has_other, len(keys) + np.cumsum(has_other) - 1, np.arange(len(keys)))
        return ChipBatch(
            torch.from_numpy(np.stack([chip.dn for chip in chips], dtype=kind, casting="same_kind")),
            torch.from_numpy(np.stack([chip.valid for chip in chips])),
            torch.tensor([chip.scale for chip in chips]),
            torch.tensor([chip.offset for chip in chips]),
            torch.from_numpy(np.stack([draw_table(views) for views in draws])),
            None if second is None else torch.from_numpy(second),
        )
