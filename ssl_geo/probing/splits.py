"""Spatial blocks, and which of them train, choose (val) and test: neighbours and repeated dates stay together.

Blocks are squares of ground, or of an image's pixels where it has no georeferencing. Whole blocks go to a split
(`assign_blocks`), spread so that every split sees every class as far as the blocks allow. A chip belongs to the block
of its centre; a chip of training that comes nearer than a stated gap to one of val or test is left out and counted,
and so is one of val near one of test. No two splits share ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError, nearest
from ssl_geo.probing.footprints import Footprints, near, nearest_distance
from ssl_geo.probing.intervals import MIN_BLOCKS
from ssl_geo.probing.stratification import SPLITS, Splits, assign_blocks

LEFT_OUT = -1
PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SplitReport:
    """What a split consists of, for the report.

    Attributes:
        counts: Chips of each split.
        blocks: Blocks of each split.
        class_pixels: (3, C) valid pixels of each split and class.
        left_out: Chips in no split: too near to another split's.
        gap: Least distance asked for between chips of two splits, in `distance_unit`.
        shared: Chips of given splits whose ground a chip of a later split covers as well.
        distances: Least distance between two splits, where both hold something that can be compared.
        distance_unit: "metres" or "pixels".
    """

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

    def lines(self, class_names: Sequence[str]) -> list[str]:
        """The report in plain sentences, with the names (C,) of the classes."""
        said = [
            f"{name}: {self.counts[name]:,} chips in {self.blocks[name]:,} blocks, "
            f"{int(self.class_pixels[index].sum()):,} valid pixels"
            for index, name in enumerate(SPLITS)
        ]
        said += [
            f"least distance {a}-{b}: {distance:,.0f} {self.distance_unit}"
            for (a, b), distance in self.distances.items()
        ]
        if self.left_out:
            said.append(
                f"{self.left_out:,} chips left out: they overlap another split's or lie nearer than "
                f"{self.gap:g} {self.distance_unit}"
            )
        if self.shared:
            said.append(f"{self.shared:,} chips of the given splits overlap a chip of a later one: scores are too high")
        said += [
            f"{name} holds no pixel of {', '.join(class_names[number] for number in classes)}"
            for name, classes in self.missing().items()
        ]
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
        UserError: A split without a valid pixel, an unknown split name, fewer blocks than splits, a gap below 0.
    """
    if not gap >= 0:
        raise UserError(f"--split.gap {gap:g}: a distance, it must be 0 or more")
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


def smaller_block(
    chips: Footprints, class_pixels: npt.NDArray[np.integer], *, block: float, least: float, **settings: Any
) -> tuple[float, int] | None:
    """The largest block, of a half, a third … of the one given, whose test split has enough blocks for an interval.

    Args:
        chips: As of `split_chips`.
        class_pixels: As of `split_chips`.
        block: Side that gives too few.
        least: Side of the smallest to try.
        settings: Further arguments of `split_chips`.

    Returns:
        Side and number of blocks of the test split, None where no such side is enough.
    """
    for parts in range(2, int(block / least) + 1):
        try:
            blocks = split_chips(chips, class_pixels, block=block / parts, **settings).report.blocks["test"]
        except UserError:  # a split without a labelled pixel: no side to propose
            continue
        if blocks >= MIN_BLOCKS:
            return block / parts, blocks
    return None


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
            cause = f" ({report.left_out} chips left out by the gap of {report.gap:g})" if report.left_out else ""
            raise UserError(
                f"no valid pixel in {name}{cause}: change --split.block, --split.gap or --split.fractions, "
                "or give other labels with --labels"
            )
