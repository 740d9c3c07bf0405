"""The imagery that a run was pretrained on, as its backbone saw it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from torch import nn

from ssl_geo.imagery.chips import ChipIndex
from ssl_geo.imagery.packed import open_chips
from ssl_geo.probing.normalizing import CHIPS, normalize
from ssl_geo.views.photometry import standardize_chip


def normalized_by(run: Path, network: nn.Module, bands: Sequence[str]) -> nn.Module:
    """The network with batch normalization that has seen some of the run's imagery."""
    images = _pretraining_chips(run, bands)
    return normalize(network, images.__getitem__, np.arange(len(images)))


def _pretraining_chips(run: Path, bands: Sequence[str]) -> npt.NDArray[np.float32]:
    """Some chips (N, C, H, W) of a run, whole, standardized as there; the bands that are asked for."""
    index = ChipIndex.load(run / "index.parquet", mend="name another run")
    chips = open_chips(index, yaml.safe_load((run / "config.yaml").read_text())["data"]["paths"])
    mean, std = (np.asarray(values, np.float32) for values in (index.statistics.mean, index.statistics.std))
    drawn = np.random.default_rng(0).permutation(len(index))[:CHIPS]
    images = [standardize_chip((chip := chips[int(k)]).reflectance(), chip.valid, mean, std) for k in drawn]
    return np.stack(images)[:, [index.bands.index(band) for band in bands]]
