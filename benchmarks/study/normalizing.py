"""What batch normalization alone is worth: random weights that have seen the imagery, and learned nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ssl_geo.imagery.chips import ChipIndex
from ssl_geo.imagery.packed import open_chips
from ssl_geo.views.photometry import standardize_chip

CHIPS = 512  # enough for means and variances
BATCH = 64


def pretraining_chips(run: Path, bands: Sequence[str]) -> Tensor:
    """Chips (N, C, H, W) that a run was pretrained on, whole, standardized as there; the bands that are asked for."""
    index = ChipIndex.load(run / "index.parquet", mend="name another run")
    chips = open_chips(index, yaml.safe_load((run / "config.yaml").read_text())["data"]["paths"])
    mean, std = (np.asarray(values, np.float32) for values in (index.statistics.mean, index.statistics.std))
    drawn = np.random.default_rng(0).permutation(len(index))[:CHIPS]
    images = [standardize_chip((chip := chips[int(k)]).reflectance(), chip.valid, mean, std) for k in drawn]
    return torch.from_numpy(np.stack(images)[:, [index.bands.index(band) for band in bands]])


@torch.no_grad()
def normalize(backbone: nn.Module, images: Tensor) -> nn.Module:
    """Give a backbone's batch normalization the mean and variance of images (N, C, H, W), and nothing else."""
    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over all batches
        layer.train()
    for batch in images.split(BATCH) if layers else ():
        backbone(batch)
    return backbone.eval()
