"""Spatial blocks, and which of them train, choose (val) and test: neighbours and repeated dates stay together.

Blocks are squares of ground (`split_chips`) or of an image's pixels (`split_pixels`). Whole blocks go to a split
(`assign_blocks`), spread so that every split sees every class as far as the blocks allow. A chip belongs to the block
of its centre; a chip of training that comes nearer than a stated gap to one of val or test is left out and counted,
and so is one of val near one of test. No two splits share ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ssl_geo.errors import UserError, nearest
from ssl_geo.probing.footprints import Footprints, near, nearest_distance
from ssl_geo.probing.stratification import SPLITS, Splits, assign_blocks

LEFT_OUT = -1
PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SplitReport:
    """What a split consists of, for the report.

    Attributes:
        unit: What is split, "chips" or "pixels".
        counts: Chips or pixels of each split.
        blocks: Blocks of each split.
        class_pixels: (3, C) valid pixels of each split and class.
        left_out: Chips or pixels in no split: too near to another split's.
        gap: Least distance asked for between chips of two splits, in `distance_unit`.
        shared: Chips of given splits whose ground a chip of a later split covers as well.
        distances: Least distance between two splits, where both hold something that can be compared.
        distance_unit: "metres" or "pixels".
    """

    unit: Literal["chips", "pixels"]
    counts: dict[str, int]
    blocks: dict[str, int]
    class_pixels: Indices
    left_out: int
    gap: float
    shared: int
    distances: dict[tuple[str, str], float]
    distance_unit: Literal["metres", "pixels"]

    def missing(self) -> dict[str, list[int]]:
        """Classes that the labels hold, but a split in use does not."""
        anywhere = self.class_pixels.sum(0) > 0
        absent = {
            name: np.flatnonzero(anywhere & (row == 0)).tolist()
            for name, row in zip(SPLITS, self.class_pixels, strict=True)
            if self.counts[name]
        }
        return {name: classes for name, classes in absent.items() if classes}

    def lines(self) -> list[str]:
        """The report in plain sentences."""
        said = [
            f"{name}: {self.counts[name]} {self.unit} in {self.blocks[name]} blocks, "
            f"{int(self.class_pixels[index].sum())} valid pixels"
            for index, name in enumerate(SPLITS)
        ]
        said += [
            f"least distance {a}-{b}: {distance:.0f} {self.distance_unit}"
            for (a, b), distance in self.distances.items()
        ]
        if self.left_out:
            said.append(
                f"{self.left_out} {self.unit} left out: they overlap another split's or lie nearer than "
                f"{self.gap:g} {self.distance_unit}"
            )
        if self.shared:
            said.append(
                f"{self.shared} {self.unit} of the given splits overlap a chip of a later one: scores are too high"
            )
        said += [f"{name} holds no pixel of class {', '.join(map(str, ids))}" for name, ids in self.missing().items()]
        return said


@dataclass(frozen=True)
class ChipSplit:
    """Split (index into SPLITS, LEFT_OUT for none) and block of each chip, (N,) each, with the report."""

    split: Splits
    block: Indices
    report: SplitReport

    def chips(self, name: str) -> Indices:
        """Indices of the chips of a split."""
        return np.flatnonzero(self.split == SPLITS.index(name))


@dataclass(frozen=True)
class PixelSplit:
    """Split (index into SPLITS, LEFT_OUT) and block of each pixel of each image, (H, W) each, with the report."""

    split: list[Splits]
    block: list[Indices]
    report: SplitReport


# --- chips ---------------------------------------------------------------------------------------------------------


def split_chips(
    chips: Footprints,
    class_pixels: npt.NDArray[np.integer],
    *,
    block: float,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    gap: float = 0.0,
    given: Sequence[str] | None = None,
) -> ChipSplit:
    """Split chips by blocks of ground, or take the splits they were given.

    Args:
        chips: Where they lie.
        class_pixels: (N, C) valid pixels of each chip and class.
        block: Side of a block, in the chips' unit.
        fractions: Shares of train, val and test.
        seed: Of the order in which blocks are placed.
        gap: Chips of train nearer than this to one of val or test are left out, of val near one of test likewise; with
            0, those that overlap. In the chips' unit.
        given: Split of each chip by name; nothing is left out then, but overlaps are counted in the report.

    Returns:
        Split, block and report.

    Raises:
        UserError: A split without a valid pixel, an unknown split name, fewer blocks than splits.
    """
    where = chips.blocks(block)
    totals = np.zeros((int(where.max()) + 1, class_pixels.shape[1]), dtype=np.int64)
    np.add.at(totals, where, class_pixels)
    shared = 0
    if given is None:
        split = assign_blocks(totals, fractions, seed)[where]
        wanted = [name for name, share in zip(SPLITS, fractions, strict=True) if share > 0]
        for lower, higher in ((0, (1, 2)), (1, (2,))):
            own = np.flatnonzero(split == lower)
            split[own[near(chips, own, np.flatnonzero(np.isin(split, higher)), gap)]] = LEFT_OUT
    else:
        split = _named(given, len(chips))
        wanted = [name for name in SPLITS if name != "val" or name in given]
        for lower, higher in ((0, (1, 2)), (1, (2,))):
            own = np.flatnonzero(split == lower)
            shared += int(near(chips, own, np.flatnonzero(np.isin(split, higher)), 0.0).sum())
    members = {name: np.flatnonzero(split == index) for index, name in enumerate(SPLITS)}
    distances = {(a, b): nearest_distance(chips, members[a], members[b]) for a, b in PAIRS}
    report = SplitReport(
        unit="chips",
        counts={name: len(own) for name, own in members.items()},
        blocks={name: len(np.unique(where[own])) for name, own in members.items()},
        class_pixels=np.stack([class_pixels[own].sum(0) for own in members.values()]).astype(np.int64),
        left_out=int((split == LEFT_OUT).sum()),
        gap=gap,
        shared=shared,
        distances={pair: distance for pair, distance in distances.items() if distance is not None},
        distance_unit=chips.unit,
    )
    _every_split_labelled(report, wanted)
    return ChipSplit(split, where, report)


def _named(given: Sequence[str], count: int) -> Splits:
    """Names of splits -> indices into SPLITS."""
    if len(given) != count:
        raise UserError(f"{len(given)} splits are given for {count} chips: one each is needed in --split.file")
    for name in given:
        if name not in SPLITS:
            raise UserError(f"split {name!r} in --split.file, {nearest(name, SPLITS)}")
    return np.array([SPLITS.index(name) for name in given], dtype=np.int8)


def _every_split_labelled(report: SplitReport, wanted: Sequence[str]) -> None:
    """Refuse a split that was asked for and has no valid pixel."""
    for name, row in zip(SPLITS, report.class_pixels, strict=True):
        if name in wanted and row.sum() == 0:
            cause = (
                f" ({report.left_out} {report.unit} left out by the gap of {report.gap:g})" if report.left_out else ""
            )
            raise UserError(
                f"no valid pixel in {name}{cause}: change --split.block, --split.gap or --split.fractions, "
                "or give other labels with --labels"
            )


# --- pixels of images ----------------------------------------------------------------------------------------------


def pixel_blocks(height: int, width: int, block: int, origin: tuple[int, int] = (0, 0)) -> Indices:
    """Number of the square block of each pixel, (height, width), counted along rows from 0.

    Args:
        height: Of the image.
        width: Of the image.
        block: Side of a block in pixels.
        origin: Row and column of the image's first pixel on the grid of blocks.
    """
    rows, columns = _block_lines(height, width, block, origin)
    across = int(columns[-1] - columns[0]) + 1
    blocks: Indices = (rows - rows[0])[:, None] * across + (columns - columns[0])
    return blocks


def checkerboard(height: int, width: int, block: int) -> Splits:
    """Two folds of an image by blocks as on a chess board, (height, width) of 0 and 1; the first block is 0."""
    rows, columns = _block_lines(height, width, block, (0, 0))
    return ((rows[:, None] + columns) % 2).astype(np.int8)


def _block_lines(height: int, width: int, block: int, origin: tuple[int, int]) -> tuple[Indices, Indices]:
    """Block row of each row, block column of each column."""
    if block < 1:
        raise UserError(f"blocks of {block} pixels: at least 1 is needed, set --split.block")
    return (np.arange(height) + origin[0]) // block, (np.arange(width) + origin[1]) // block


def split_pixels(
    labels: Sequence[npt.NDArray[np.integer]],
    num_classes: int,
    *,
    block: int,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    gap: int = 0,
    places: Sequence[str] | None = None,
    origins: Sequence[tuple[int, int]] | None = None,
    ignore: int = 255,
) -> PixelSplit:
    """Split the pixels of a few images by square blocks within them.

    Args:
        labels: (H, W) class ids of each image, `ignore` where there is none.
        num_classes: Number of classes C.
        block: Side of a block in pixels.
        fractions: Shares of train, val and test.
        seed: Of the order in which blocks are placed.
        gap: Pixels of train with fewer than this many pixels between them and val or test are left out, of val near
            test likewise.
        places: Name of the ground of each image: images of one place (repeated dates) share its blocks. Default: each
            image is a place.
        origins: Row and column of each image's first pixel on its place's grid; default (0, 0).
        ignore: The label that is left out.

    Returns:
        Split and block of every pixel, and the report.

    Raises:
        UserError: A split without a valid pixel, fewer blocks than splits.
    """
    places = [str(number) for number in range(len(labels))] if places is None else places
    origins = [(0, 0)] * len(labels) if origins is None else origins
    numbers: dict[tuple[str, int, int], int] = {}
    blocks: list[Indices] = []
    for label, place, origin in zip(labels, places, origins, strict=True):
        rows, columns = _block_lines(label.shape[0], label.shape[1], block, origin)
        row_ids, row_of = np.unique(rows, return_inverse=True)
        column_ids, column_of = np.unique(columns, return_inverse=True)
        keys = [[(place, int(r), int(c)) for c in column_ids] for r in row_ids]
        known = np.array([[numbers.setdefault(key, len(numbers)) for key in line] for line in keys], dtype=np.int64)
        blocks.append(known[row_of][:, column_of])
    totals = sum(_class_pixels(*pair, len(numbers), num_classes, ignore) for pair in zip(blocks, labels, strict=True))
    of_block = assign_blocks(np.asarray(totals), fractions, seed)
    splits = [_with_gap(of_block[where], gap) for where in blocks]
    held = sum(_class_pixels(s, label, 3, num_classes, ignore) for s, label in zip(splits, labels, strict=True))
    inside = {name: [split == index for split in splits] for index, name in enumerate(SPLITS)}
    distances = {(a, b): _pixels_between(inside[a], inside[b]) for a, b in PAIRS}
    report = SplitReport(
        unit="pixels",
        counts={name: sum(int(mask.sum()) for mask in masks) for name, masks in inside.items()},
        blocks={name: int((of_block == index).sum()) for index, name in enumerate(SPLITS)},
        class_pixels=np.asarray(held),
        left_out=sum(int((split == LEFT_OUT).sum()) for split in splits),
        gap=gap,
        shared=0,
        distances={pair: distance for pair, distance in distances.items() if distance is not None},
        distance_unit="pixels",
    )
    _every_split_labelled(report, [name for name, share in zip(SPLITS, fractions, strict=True) if share > 0])
    return PixelSplit(splits, blocks, report)


def _class_pixels(
    group: npt.NDArray[np.integer], label: npt.NDArray[np.integer], groups: int, num_classes: int, ignore: int
) -> Indices:
    """(groups, C) valid pixels of each group (negative: none) and class."""
    valid = (label != ignore) & (group >= 0)
    cells = group[valid].astype(np.int64) * num_classes + label[valid]
    counts: Indices = np.bincount(cells, minlength=groups * num_classes).reshape(groups, num_classes)
    return counts


def _with_gap(split: Splits, gap: int) -> Splits:
    """The split with pixels left out that have fewer than `gap` pixels between them and a later split."""
    kept = split.copy()
    for lower, higher in ((0, (1, 2)), (1, (2,))):
        far = ~np.isin(split, higher)
        if gap > 0 and not far.all():
            kept[(split == lower) & (ndimage.distance_transform_edt(far) - 1 < gap)] = LEFT_OUT
    return kept


def _pixels_between(a: list[npt.NDArray[np.bool_]], b: list[npt.NDArray[np.bool_]]) -> float | None:
    """Least number of pixels between two splits in one image; None where no image holds both."""
    distances = [
        float(ndimage.distance_transform_edt(~second)[first].min()) - 1
        for first, second in zip(a, b, strict=True)
        if first.any() and second.any()
    ]
    return min(distances, default=None)
