"""Linear heads on frozen features of the study's sets, against pixels and random convolutions."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.study.sets import Fold, LabelledSet
from ssl_geo.probing.features import FeatureExtractor, auto_layers
from ssl_geo.probing.pixels import BesidePixels, fit_linear_on_layers
from ssl_geo.probing.rivals import RivalChip, score_rivals
from ssl_geo.probing.scoring import TestChips, score_heads
from ssl_geo.probing.store import extract
from ssl_geo.views.photometry import standardize_chip

ROWS = 20_000  # training pixels, as of the probe
REACH = 16  # pixels of context that random convolutions can see
CPU = torch.device("cpu")

Blocks = npt.NDArray[np.int64]  # (n, C, C) confusion matrices of the tested blocks
Floats = npt.NDArray[np.float32]


def score_backbone(
    backbone: nn.Module, labelled: LabelledSet, mean: Floats, std: Floats, *, pixels: bool = True
) -> dict[str, Blocks]:
    """Test the linear probe on all layers, and on all layers beside pixels, over all folds.

    Args:
        backbone: Of timm.
        labelled: Where to test it.
        mean: (C,) reflectance that it was pretrained with.
        std: (C,).
        pixels: Whether pixels beside features are asked for, too.

    Returns:
        Counts by "features" and "features + pixels".
    """
    chips = labelled.chips
    extractor = FeatureExtractor(backbone.eval(), auto_layers(backbone), input_size=chips.side)
    beside = BesidePixels(extractor, mean, std, chips.bands)

    def read(number: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
        chip = chips[number]
        return standardize_chip(chip.reflectance, chip.valid, mean, std), chip.labels

    asked = {"features": extractor.names} | ({"features + pixels": beside.names} if pixels else {})
    counts: dict[str, list[Blocks]] = {name: [] for name in asked}
    with tempfile.TemporaryDirectory() as folder:
        source = beside if pixels else extractor
        store = extract(source, read, len(chips), Path(folder), memory=2**31, batch_size=8, say=lambda _: None)
        for fold in labelled.folds:
            test = tested(labelled, fold)
            for name, layers in asked.items():
                head = fit_linear_on_layers(store, layers, fold.train, fold.validation, len(chips.ids), rows=ROWS)
                (result,) = score_heads({name: head}, store, test, 16, CPU)
                counts[name].append(result.blocks)
    return {name: np.concatenate(parts) for name, parts in counts.items()}


def score_plain(labelled: LabelledSet, mean: Floats, std: Floats) -> dict[str, Blocks]:
    """Test what needs no backbone: "pixels", "random convolutions", "majority class"."""
    chips = labelled.chips

    def read(number: int) -> RivalChip:
        chip = chips[number]
        margin = max(0, chips.context - REACH)
        core = np.s_[..., margin : chips.side - margin, margin : chips.side - margin]
        filled = np.where(chip.valid, chip.reflectance, mean[:, None, None])
        standardized = standardize_chip(chip.reflectance, chip.valid, mean, std)
        return RivalChip(filled[core], standardized[core], chip.labels[core])

    counts: dict[str, list[Blocks]] = {}
    for fold in labelled.folds:
        test = tested(labelled, fold)
        for result in score_rivals(read, chips.bands, chips.class_pixels, fold.train, fold.validation, test, rows=ROWS):
            counts.setdefault(result.group, []).append(result.blocks)
    return {name: np.concatenate(parts) for name, parts in counts.items()}


def tested(labelled: LabelledSet, fold: Fold) -> TestChips:
    """The fold's test chips."""
    return TestChips(fold.test, fold.block, len(labelled.chips.ids))
