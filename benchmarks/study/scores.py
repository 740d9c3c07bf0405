"""Linear heads on frozen features of the study's sets, against pixels and random convolutions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.study.sets import Fold, LabelledSet
from ssl_geo.probing.enlarging import dense_features
from ssl_geo.probing.features import auto_layers
from ssl_geo.probing.pixels import PIXELS, BesidePixels, fit_linear_on_layers
from ssl_geo.probing.rivals import RivalChip, score_rivals
from ssl_geo.probing.scoring import TestChips, score_heads
from ssl_geo.probing.store import FeatureStore, extract
from ssl_geo.views.photometry import standardize_chip

ROWS = 20_000  # training pixels, as of the probe
PENALTY = 3e-3  # of all heads; by the sample's scenes that are not tested (benchmarks/study/penalty.py)
REACH = 16  # pixels of context that random convolutions can see
WAYS = {  # of dense features: times that the image is enlarged, and whether single pixels stand beside them
    "features": (1, False),
    "features + pixels": (1, True),
    "features at twice the size": (2, False),
    "features at twice the size + pixels": (2, True),
}
CPU = torch.device("cpu")

Blocks = npt.NDArray[np.int64]  # (n, C, C) confusion matrices of the tested blocks
Floats = npt.NDArray[np.float32]


def score_backbone(
    backbone: nn.Module, labelled: LabelledSet, mean: Floats, std: Floats, ways: Sequence[str] = tuple(WAYS)
) -> dict[str, Blocks]:
    """Test the linear probe on all layers, in one or several ways of getting dense features, over all folds.

    Args:
        backbone: Of timm.
        labelled: Where to test it.
        mean: (C,) reflectance that it was pretrained with.
        std: (C,).
        ways: Names out of `WAYS`.

    Returns:
        Counts by way.
    """
    counts: dict[str, Blocks] = {}
    for enlarge in sorted({WAYS[way][0] for way in ways}):
        asked = {way: WAYS[way][1] for way in ways if WAYS[way][0] == enlarge}
        with features_of(backbone, labelled, mean, std, enlarge, pixels=any(asked.values())) as store:
            for way, pixels in asked.items():
                names = [name for name in store.layers if pixels or name != PIXELS]
                counts[way] = score_linear(store, names, labelled, PENALTY)
    return counts


@contextmanager
def features_of(
    backbone: nn.Module, labelled: LabelledSet, mean: Floats, std: Floats, enlarge: int, *, pixels: bool
) -> Iterator[FeatureStore]:
    """Features of a set's chips, shown so many times enlarged, while the context lasts; with single pixels or not."""
    chips = labelled.chips

    def read(number: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
        chip = chips[number]
        return standardize_chip(chip.reflectance, chip.valid, mean, std), chip.labels

    layers = auto_layers(backbone.eval(), enlarge=enlarge)
    extractor = dense_features(backbone, layers, side=chips.side, enlarge=enlarge)
    source = BesidePixels(extractor, mean, std, chips.bands) if pixels else extractor
    with tempfile.TemporaryDirectory() as folder:
        yield extract(source, read, len(chips), Path(folder), memory=2**31, batch_size=8, say=lambda _: None)


def score_linear(store: FeatureStore, layers: Sequence[str], labelled: LabelledSet, penalty: float) -> Blocks:
    """Fit and test the linear probe on layers side by side, over all folds."""
    counts = []
    for fold in labelled.folds:
        head = fit_linear_on_layers(store, layers, fold.ground, len(labelled.chips.ids), rows=ROWS, penalties=[penalty])
        (result,) = score_heads({"linear probe": head}, store, tested(labelled, fold), 16, CPU)
        counts.append(result.blocks)
    return np.concatenate(counts)


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
        rivals = score_rivals(read, chips.bands, chips.class_pixels, fold.ground, test, rows=ROWS, penalties=[PENALTY])
        for result in rivals:
            counts.setdefault(result.group, []).append(result.blocks)
    return {name: np.concatenate(parts) for name, parts in counts.items()}


def tested(labelled: LabelledSet, fold: Fold) -> TestChips:
    """The fold's test chips."""
    return TestChips(fold.test, fold.block, len(labelled.chips.ids))
