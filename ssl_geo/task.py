"""What a probe is asked: labelled chips, split by place, standardized as pretrained. Used by the entries alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo.config import ProbeConfig
from ssl_geo.errors import UserError, tell
from ssl_geo.imagery.labelled import LabelledChips, pair_labels
from ssl_geo.imagery.maps import other_pixels
from ssl_geo.imagery.pairing import read_splits
from ssl_geo.imagery.quickcheck import check_labelled
from ssl_geo.imagery.sample import SAMPLE, ensure_sample
from ssl_geo.probing.footprints import Footprints
from ssl_geo.probing.intervals import MIN_BLOCKS
from ssl_geo.probing.rivals import RivalChip
from ssl_geo.probing.splits import ChipSplit, smaller_block, split_chips
from ssl_geo.views.photometry import standardize_chip

SMALLEST = 16  # pixels; of chips that are proposed
SAMPLE_CHIP = 120  # pixels; nine chips a scene, large enough for features to see what surrounds a pixel


@dataclass(frozen=True)
class Task:
    """The labelled chips, their split, how pixels are standardized, what was warned of, and how to split better."""

    chips: LabelledChips
    split: ChipSplit
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    warnings: list[str]
    advice: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.chips.ids)

    def standardized(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Image (C, H, W) as the backbone takes it, and labels (H, W)."""
        chip = self.chips[number]
        return standardize_chip(chip.reflectance, chip.valid, self.mean, self.std), chip.labels

    def image(self, number: int) -> npt.NDArray[np.float32]:
        """Image (C, H, W) as the backbone takes it."""
        return self.standardized(number)[0]

    def rival_chip(self, number: int) -> RivalChip:
        """A chip as the baselines take it."""
        chip = self.chips[number]
        filled = np.where(chip.valid, chip.reflectance, self.mean[:, None, None])
        return RivalChip(filled, standardize_chip(chip.reflectance, chip.valid, self.mean, self.std), chip.labels)


def labelled_task(config: ProbeConfig, description: Mapping[str, Any], *, multiple: int = 1) -> Task:
    """Pair images with labels, cut them into chips and split these by place.

    Args:
        config: Of the probe.
        description: Of the backbone.
        multiple: What the backbone wants heights and widths of images to be multiples of.

    Raises:
        UserError: What was given does not make a task.
    """
    images, labels = [Path(path) for path in config.images], [Path(path) for path in config.labels]
    given = read_splits(Path(config.split.file), "--split.file") if config.split.file else None
    if not images:
        ensure_sample()
        images, labels = [SAMPLE / "images"], [SAMPLE / "labels"]
        given = given or {s["name"]: s["split"] for s in json.loads((SAMPLE / "sample.json").read_text())["scenes"]}
    scenes = pair_labels(
        images,
        labels,
        align=config.align,
        classes=config.classes,
        ignore=config.ignore,
        **dataclasses.asdict(config.data),
    )
    if len(ids := scenes[0].classes.ids) < 2:
        raise UserError(
            f"the labels hold one class, {', '.join(map(str, ids))}, which leaves nothing to tell apart; an id that is "
            "declared as nodata is no class, unless --classes lists it"
        )
    size = chip_size(config, description, multiple)
    chips = LabelledChips(scenes, bands=description["bands"], chip_size=size, context=config.context)
    other = [line for labelled in scenes if (line := other_pixels(labelled.scene, description.get("gsd")))]
    if other:
        other = [f"{len(other)} of {len(scenes)} images have pixels of another size; the first, {other[0]}"]
    strange = []
    if given is not None and (spare := chips.unknown(given)):
        strange = [f"{len(spare)} of {len(given)} names in --split.file are no image's, the first is {spare[0]}"]
    warnings = [*other, *strange, *check_labelled(chips)]
    for line in [*chips.report(), *warnings]:
        tell(line)
    pixel = 1.0 if chips.size_m is None else float(chips.size_m.mean() / size)
    where, block = footprints(chips), 2 * size * pixel if config.split.block is None else config.split.block
    how: dict[str, Any] = {"fractions": config.split.fractions, "gap": config.split.gap}
    smallest = size * pixel
    try:
        split = split_chips(
            where, chips.class_pixels, block=block, given=None if given is None else chips.given(given), **how
        )
    except UserError as error:
        if given is None and (found := smaller_block(where, chips.class_pixels, block=block, least=smallest, **how)):
            raise UserError(f"{error}; --split.block {found[0]:.4g} gives {found[1]} blocks of test") from error
        raise
    if not len(split.chips("val")):
        raise UserError("no chip in val, which chooses between models: give it a share, --split.fractions or .file")
    if not len(split.chips("test")):
        raise UserError("no chip in test, which all is told of: give it a share, --split.fractions or .file")
    mean, std = description.get("mean"), description.get("std")
    if mean is None or std is None:  # a timm model: standardize with the training chips
        mean, std = chips.statistics(split.chips("train"))
    advice: list[str] = []
    if given is None and (few := split.report.blocks["test"]) < MIN_BLOCKS:
        advice = [f"the test split has {few} of the {MIN_BLOCKS} blocks that an interval needs"]
        if found := smaller_block(where, chips.class_pixels, block=block, least=smallest, **how):
            advice[0] += f": --split.block {found[0]:.4g} gives {found[1]}"
        elif (side := smaller_chips(len(chips), size, config.split.fractions[2], multiple)) < size:
            advice[0] += f": --chip_size {side} --split.block {side * pixel:.4g} gives enough, of smaller chips"
        else:
            advice[0] += ": label more ground"
    return Task(chips, split, np.asarray(mean, np.float32), np.asarray(std, np.float32), warnings, tuple(advice))


def smaller_chips(chips: int, size: int, test: float, multiple: int) -> int:
    """Side of chips of which the test split gets enough for an interval, where each is a block of its own.

    Args:
        chips: That there are.
        size: Their side.
        test: Share of the test split.
        multiple: What sides must be multiples of.

    Returns:
        The largest such side, at most `size`; `size` where it is none that is of use.
    """
    step = multiple * max(1, 8 // multiple)
    side = int(size * math.sqrt(chips * test / (MIN_BLOCKS + 1))) // step * step
    return side if SMALLEST <= side < size else size


def chip_size(config: ProbeConfig, description: Mapping[str, Any], multiple: int) -> int:
    """Side of a chip in pixels, such that with its context, enlarged, it is what the backbone takes.

    Raises:
        UserError: --chip_size is none that it takes.
    """
    multiple //= math.gcd(multiple, config.enlarge)
    size: int = config.chip_size or (description.get("chip_size", 64) if config.images else SAMPLE_CHIP)
    over = (size + 2 * config.context) % multiple
    if (over and config.chip_size) or size <= over:
        sides = [side for side in (size - over, size - over + multiple) if side > 0]
        raise UserError(
            f"--chip_size {size}{f' with --context {config.context}' if config.context else ''}: the backbone takes "
            f"sides that are multiples of {multiple}; give --chip_size {' or '.join(map(str, sides))}"
        )
    return size - over


def footprints(chips: LabelledChips) -> Footprints:
    """Where the chips lie on the ground, or in their image where that has no georeferencing."""
    if chips.lonlat is not None and chips.size_m is not None:
        return Footprints.on_earth(chips.lonlat, chips.size_m)
    size = chips.chip_size
    bounds = np.stack([chips.col, chips.row, chips.col + size, chips.row + size], axis=1)
    return Footprints.in_plane([str(number) for number in chips.scene], bounds, unit="pixels")
