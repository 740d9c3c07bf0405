"""The second pass of a chip index: every pixel read once, in blocks, by threads.

What the threads return is taken in the order of the scenes, so the result does not depend on their number.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ssl_geo.errors import UserError
from ssl_geo.imagery.rasters import open_scene, read_counted
from ssl_geo.imagery.scenes import UNMEASURED, Scene, UnreadableError
from ssl_geo.imagery.statistics import BandStatistics
from ssl_geo.imagery.survey import NAMED_SCENES, LeftOut, SceneRecord, refuse_unreadable, unreadable_record
from ssl_geo.threads import in_order

BLOCK_PIXELS = 1024  # side of what a thread reads at once: one tile of a product's JPEG 2000, 25 MB of 12 bands
_MeasuredChip = tuple[float, tuple[int, int, int], BandStatistics]  # random priority; scene, row, col; statistics


class Chips(NamedTuple):
    """The chips found, scene by scene, in each by blocks of about `BLOCK_PIXELS`, in each by row and column.

    Attributes:
        scene: (N,) positions in the list of records.
        row: (N,) first row in the scene's grid.
        col: (N,) first column.
        valid_fraction: (N,) share of valid pixels.
    """

    scene: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    col: npt.NDArray[np.int32]
    valid_fraction: npt.NDArray[np.float32]


def chip_starts(length: int, chip_size: int) -> npt.NDArray[np.int32]:
    """Where chips begin along an axis: side by side, the last one shifted inwards so that no pixel is lost.

    Args:
        length: Pixels of the axis.
        chip_size: Pixels of a chip.

    Returns:
        Ascending starts; none where the axis is shorter than a chip.
    """
    starts = np.arange(0, length - chip_size + 1, chip_size, dtype=np.int32)
    if len(starts) and starts[-1] + chip_size < length:
        starts = np.append(starts, np.int32(length - chip_size))
    return starts


def scan_pixels(
    scenes: Sequence[SceneRecord],
    *,
    bands: Sequence[str],
    chip_size: int,
    scene_settings: Mapping[str, Any],
    min_valid: float,
    max_unreadable: float,
    statistics_chips: int,
    seed: int,
    workers: int,
    progress: bool,
) -> tuple[Chips, BandStatistics, list[LeftOut]]:
    """Pass over the pixels once: each chip's valid fraction, and the statistics of the bands in reflectance.

    The statistics are those of the valid pixels of the chips in the index, or of a random `statistics_chips` of
    them where there are more. Of a chip that was shifted inwards only the pixels that the chips before it do not
    cover are counted, so that no pixel counts twice.

    Returns:
        The chips with at least `min_valid` valid pixels, the statistics, and what was left out.

    Raises:
        UserError: If no chip is left or too many scenes cannot be read.
    """
    describe = lru_cache(maxsize=64)(lambda path: open_scene(path, **scene_settings))
    sample = _ChipSample(statistics_chips)

    def scan(block: _Block) -> _Scanned | UnreadableError:
        try:
            return _scan_block(describe(scenes[block.scene].path), block, bands, chip_size, min_valid, seed, sample)
        except UnreadableError as error:
            return error

    # Columns that grow without a Python object per chip.
    scene_column, row_column, col_column, valid_column = array("i"), array("i"), array("i"), array("f")
    unreadable: dict[int, str] = {}
    unmeasured: dict[int, int] = {}
    under = 0
    under_scenes: dict[str, None] = {}
    total = sum(len(chip_starts(s.height, chip_size)) * len(chip_starts(s.width, chip_size)) for s in scenes)
    with tqdm(desc="indexing chips", total=total, unit=" chips", delay=2, disable=not progress) as bar:
        blocks, again = _blocks(scenes, chip_size), _blocks(scenes, chip_size)
        for block, scanned in zip(again, in_order(scan, blocks, workers), strict=True):
            bar.update(len(block.rows) * len(block.cols))
            if isinstance(scanned, UnreadableError):
                unreadable.setdefault(block.scene, str(scanned))
                continue
            scene_column.extend([block.scene] * len(scanned.rows))
            row_column.extend(scanned.rows)
            col_column.extend(scanned.cols)
            valid_column.extend(scanned.valid_fractions)
            sample.add(scanned.sampled)
            if scanned.unmeasured:
                unmeasured[block.scene] = unmeasured.get(block.scene, 0) + scanned.unmeasured
            if scanned.under:
                under += scanned.under
                if len(under_scenes) < NAMED_SCENES:
                    under_scenes[scenes[block.scene].path] = None
    by_path = {scenes[i].path: message for i, message in unreadable.items()}
    refuse_unreadable(by_path, len(scenes), max_unreadable)
    chip_scenes = np.array(scene_column, np.int32)
    readable = ~np.isin(chip_scenes, list(unreadable))  # one bad block leaves out the scene whole
    chips = Chips(
        chip_scenes[readable],
        np.array(row_column, np.int32)[readable],
        np.array(col_column, np.int32)[readable],
        np.array(valid_column, np.float32)[readable],
    )
    left_out = []
    if unreadable:
        left_out.append(unreadable_record(by_path))
    if under:
        reason = f"less than {min_valid:g} of the chip's pixels are valid"
        left_out.append(LeftOut(reason, "chip", under, tuple(under_scenes)))
    if held := {scenes[i].path: count for i, count in unmeasured.items() if i not in unreadable}:
        reason = f"they hold {UNMEASURED}, which no file declares as nodata; first in {next(iter(held))}"
        left_out.append(LeftOut(reason, "pixel", sum(held.values()), tuple(held)[:NAMED_SCENES]))
    if not len(chips.scene):
        raise UserError(
            f"none of {total} chips has {min_valid:g} of its pixels valid; lower --data.min_valid or --data.chip_size"
        )
    return chips, sample.statistics(len(bands), without=unreadable), left_out


class _Block(NamedTuple):
    """Neighbouring chips of one scene that are read at once.

    Attributes:
        scene: Position of the scene.
        number: Position of the block in the scene.
        rows: (start, first row that no chip before it covers) of each row of chips.
        cols: The same of each column.
    """

    scene: int
    number: int
    rows: list[tuple[int, int]]
    cols: list[tuple[int, int]]


class _Scanned(NamedTuple):
    """The chips of a block that are valid enough, how many are not, and those whose bands were measured.

    `unmeasured` counts the block's pixels that are not valid for what they hold, though undeclared (`read_counted`).
    """

    rows: list[int]
    cols: list[int]
    valid_fractions: list[float]
    under: int
    sampled: list[_MeasuredChip]
    unmeasured: int


def _blocks(scenes: Sequence[SceneRecord], chip_size: int) -> Iterator[_Block]:
    side = max(1, BLOCK_PIXELS // chip_size)
    for i, scene in enumerate(scenes):
        rows, cols = (
            [(int(start), n * chip_size) for n, start in enumerate(chip_starts(length, chip_size))]
            for length in (scene.height, scene.width)
        )
        number = 0
        for top in range(0, len(rows), side):
            for left in range(0, len(cols), side):
                yield _Block(i, number, rows[top : top + side], cols[left : left + side])
                number += 1


def _scan_block(
    scene: Scene, block: _Block, bands: Sequence[str], chip_size: int, min_valid: float, seed: int, sample: _ChipSample
) -> _Scanned:
    top, left = block.rows[0][0], block.cols[0][0]
    height, width = block.rows[-1][0] + chip_size - top, block.cols[-1][0] + chip_size - left
    dn, valid, dropped = read_counted(scene, bands, top, left, height, width)
    own_part = np.s_[block.rows[0][1] - top :, block.cols[0][1] - left :]  # what no block before this one covers
    unmeasured = 0 if dropped is None else int(dropped[own_part].sum())
    priorities = np.random.default_rng([seed, block.scene, block.number]).random((len(block.rows), len(block.cols)))
    rows: list[int] = []
    cols: list[int] = []
    fractions: list[float] = []
    sampled = []
    for i, (row, own_row) in enumerate(block.rows):
        for j, (col, own_col) in enumerate(block.cols):
            fraction = float(valid[row - top : row - top + chip_size, col - left : col - left + chip_size].mean())
            if fraction < min_valid:
                continue
            rows.append(row)
            cols.append(col)
            fractions.append(fraction)
            if priorities[i, j] < sample.threshold:
                own = np.s_[own_row - top : row - top + chip_size, own_col - left : col - left + chip_size]
                statistics = BandStatistics.of(dn[:, *own][:, valid[own]])
                statistics = statistics.to_reflectance(scene.scale, scene.offset)
                sampled.append((float(priorities[i, j]), (block.scene, row, col), statistics))
    return _Scanned(rows, cols, fractions, len(block.rows) * len(block.cols) - len(rows), sampled, unmeasured)


class _ChipSample:
    """The chips of least random priority: a uniform sample of a stream of unknown length, whatever its order.

    Attributes:
        threshold: Priority from which a chip can no longer be among them; falls as chips come.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.threshold = 1.0
        self._kept: list[_MeasuredChip] = []  # heap, the greatest first

    def add(self, chips: Iterable[_MeasuredChip]) -> None:
        for priority, key, statistics in chips:
            heapq.heappush(self._kept, (-priority, key, statistics))
            if len(self._kept) > self.size:
                heapq.heappop(self._kept)
                self.threshold = -self._kept[0][0]

    def statistics(self, channels: int, without: Iterable[int]) -> BandStatistics:
        """Merged in the order of the chips, but for the scenes `without`."""
        out = set(without)
        chips = sorted((key, statistics) for _, key, statistics in self._kept if key[0] not in out)
        return reduce(BandStatistics.merge, (statistics for _, statistics in chips), BandStatistics.empty(channels))
