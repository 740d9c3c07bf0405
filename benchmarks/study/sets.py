"""The labelled sets of the study, and which ground of each trains, chooses and tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssl_geo.imagery.labelled import LabelledChips, pair_labels
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.probing.pixels import Folds

TWELVE = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
SIX = ("B02", "B03", "B04", "B08", "B11", "B12")  # of the cloud scene
BLOCK = 56  # pixels, of landcover's protocol
WINDOW = 224  # pixels that the backbone sees at once
DATES = 4  # of each site of the seasonal chips
FOLDS = 4  # of the sample's scenes, where defaults are compared
NONE = np.empty(0, np.int64)

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Numbers of the chips that train and that test, and the spatial block of each tested one."""

    train: Numbers
    test: Numbers
    block: Numbers

    @property
    def ground(self) -> Folds:
        """What heads are fitted on; nothing is held back to choose by."""
        return [(self.train, NONE)]


@dataclass(frozen=True)
class LabelledSet:
    """Labelled chips with their folds; over all folds, every tested block is tested once."""

    name: str
    chips: LabelledChips
    folds: Sequence[Fold]


def landcover(shared: Path) -> LabelledSet:
    """Five places; blocks of 56 pixels in a checkerboard within each, two folds."""
    folder = shared / "landcover"
    scenes = pair_labels([folder / "images_l2a"], folder / "labels", band_names=TWELVE, offset=0)
    return _checkerboard("landcover", LabelledChips(scenes, bands=DEFAULT_BANDS, **_blocks(BLOCK)))


def water(shared: Path) -> LabelledSet:
    """One hand-drawn image of a reservoir, whose other dates were pretrained on without labels."""
    image, label = shared / "water/images/labelled_image_1.tif", shared / "water/labels"
    scenes = pair_labels([image], label, band_names=TWELVE, offset=0)
    return _checkerboard("water", LabelledChips(scenes, bands=DEFAULT_BANDS, **_blocks(BLOCK)))


def seasonal(shared: Path) -> LabelledSet:
    """Land cover of two sites of 64 pixels, some dates of each; all dates of a block stay together."""
    labels = sorted((shared / "chips_seasonal_labels").glob("*_LC.tif"))
    images: list[Path] = []
    for label in labels:
        dates = sorted((shared / "chips_seasonal").glob(f"{label.stem.removesuffix('_LC')}_*.tif"))
        images += [dates[k] for k in np.linspace(0, len(dates) - 1, DATES).round().astype(int)]
    chips = LabelledChips(pair_labels(images, labels), bands=DEFAULT_BANDS, chip_size=16, context=24)
    return _checkerboard("seasonal land cover", chips)


def cloud(shared: Path) -> LabelledSet:
    """Clouds and shadows in one scene of six bands, without georeferencing."""
    folder = shared / "cloud"
    scenes = pair_labels([folder / "images"], folder / "labels", band_names=list(SIX), scale=1, offset=0)
    return _checkerboard("cloud, six bands", LabelledChips(scenes, bands=SIX, **_blocks(64)))


def sample(folder: Path) -> LabelledSet:
    """The embedded sample: its test scenes are tested, all others train."""
    chips, split = _sample(folder)
    train, test = np.flatnonzero(split != "test"), np.flatnonzero(split == "test")
    return LabelledSet("sample, held-out scenes", chips, [Fold(train, test, test)])


def sample_without_test(folder: Path) -> LabelledSet:
    """The sample's scenes but the test scenes: every fourth is tested by a head of the others; a scene is a block."""
    chips, split = _sample(folder)
    scenes = np.unique(chips.scene[split != "test"])
    folds = []
    for k in range(FOLDS):
        held_out = np.isin(chips.scene, scenes[k::FOLDS])
        train, test = np.flatnonzero(~held_out & (split != "test")), np.flatnonzero(held_out)
        folds.append(Fold(train, test, chips.scene[test]))
    return LabelledSet("sample, by scenes", chips, folds)


def _sample(folder: Path) -> tuple[LabelledChips, npt.NDArray[np.str_]]:
    """Its chips, and the split that each belongs to."""
    told = {scene["name"]: scene["split"] for scene in json.loads((folder / "sample.json").read_text())["scenes"]}
    chips = LabelledChips(
        pair_labels([folder / "images"], folder / "labels"), bands=DEFAULT_BANDS, chip_size=120, context=36
    )
    return chips, np.array(chips.given(told))


def _blocks(side: int) -> dict[str, int]:
    return {"chip_size": side, "context": (WINDOW - side) // 2}


def _checkerboard(name: str, chips: LabelledChips) -> LabelledSet:
    """Black blocks train and white ones test, then the other way round; a place is known by where it lies."""
    row, col = chips.row // chips.chip_size, chips.col // chips.chip_size
    place = chips.scene if chips.lonlat is None else chips.lonlat.round(6)
    _, block = np.unique(np.column_stack([place, row, col]), axis=0, return_inverse=True)
    white, folds = (row + col) % 2, []
    for tested in (1, 0):
        train, test = np.flatnonzero(white != tested), np.flatnonzero(white == tested)
        folds.append(Fold(train, test, block.ravel()[test]))
    return LabelledSet(name, chips, folds)
