"""Chips to batches of views: datasets whose items are whole batches, by (epoch, chip). Used by the entries alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.packed import PackedChips
from ssl_geo.views.batched import ChipBatch, draw_table
from ssl_geo.views.multicrop import MultiCrop

Chips: TypeAlias = ChipDataset | PackedChips
Keys: TypeAlias = Sequence[tuple[int, int]]  # (epoch, chip) of a batch: every draw is a function of them and the seed


class ViewBatches(Dataset[list[Tensor]]):
    """Batches of views, each written once: where the training step takes it, in a tensor (B, C, h, w) a view."""

    def __init__(self, chips: Chips, crops: MultiCrop, seed: int) -> None:
        self.chips, self.crops, self.seed = chips, crops, seed

    def __getitem__(self, keys: Keys) -> list[Tensor]:
        batch = [torch.empty((len(keys), *recipe.size, self.crops.mean.size)) for recipe in self.crops.recipes]
        memory = [views.numpy() for views in batch]
        for i, (epoch, position) in enumerate(keys):
            chip, out = self.chips[position], [views[i] for views in memory]
            self.crops(
                chip.dn, chip.valid, chip.scale, chip.offset, seed=self.seed, epoch=epoch, chip=position, out=out
            )
        return [views.permute(0, 3, 1, 2) for views in batch]


class ChipBatches(Dataset[ChipBatch]):
    """Batches of chips as stored, with the draws of their views, which the device makes of them."""

    def __init__(self, chips: Chips, crops: MultiCrop, seed: int) -> None:
        self.chips, self.crops, self.seed = chips, crops, seed

    def __getitem__(self, keys: Keys) -> ChipBatch:
        chips = [self.chips[position] for _, position in keys]
        kinds = {chip.dn.dtype for chip in chips}
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        draws = [
            self.crops.draw(*chip.valid.shape, seed=self.seed, epoch=epoch, chip=position)
            for chip, (epoch, position) in zip(chips, keys, strict=True)
        ]
        return ChipBatch(
            torch.from_numpy(np.stack([chip.dn for chip in chips], dtype=kind, casting="same_kind")),
            torch.from_numpy(np.stack([chip.valid for chip in chips])),
            torch.tensor([chip.scale for chip in chips]),
            torch.tensor([chip.offset for chip in chips]),
            torch.from_numpy(np.stack([draw_table(views) for views in draws])),
        )
