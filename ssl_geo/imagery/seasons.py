"""Which chips of an index show the same ground at another date."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from ssl_geo.imagery.chips import ChipIndex

Numbers = npt.NDArray[np.integer[Any]]


class OtherDates:
    """The other dates of each chip of an index.

    Two chips are of one place if they have the same CRS and each side of one lies less than half a pixel from that of
    the other, directly or by way of chips between. Of one place, a chip's other dates are the chips whose date is known
    and differs: two products of one acquisition (L1C and L2A, a file and its copy) have the same date and are none.
    Where either date is unknown, each scene counts as a date of its own; at worst both show one date then, as two
    views of one chip do. A chip without georeferencing has none.

    Held are four numbers a chip at most: the chips in order of place and date, and where places and dates begin.

    Attributes:
        count: Chips that have another date.
    """

    def __init__(self, index: ChipIndex) -> None:
        place, self._georeferenced = _places(index)
        scene = _codes(index, "scene").astype(np.int64)
        date = _codes(index, "date").astype(np.int64)
        time = np.where(date >= 0, date, date.max(initial=-1) + 1 + scene)
        order = np.lexsort((time, place))
        is_place, is_time = (np.ones(len(index), np.bool_) for _ in range(2))
        is_place[1:] = place[order[1:]] != place[order[:-1]]
        is_time[1:] = is_place[1:] | (time[order[1:]] != time[order[:-1]])
        kind = np.int32 if len(index) < 2**31 else np.int64
        self._order = order.astype(kind)
        self._at = np.empty(len(index), kind)  # of each chip in the order
        self._at[order] = np.arange(len(index))
        self._places, self._times = (
            np.append(np.flatnonzero(begins), len(index)).astype(kind) for begins in (is_place, is_time)
        )

        times, scenes = np.diff(np.searchsorted(self._times, self._places)), _different(place, scene)
        has_other = np.repeat(times > 1, np.diff(self._places))
        self.count = int(has_other.sum())
        self._undated = int((has_other & (date[order] < 0)).sum())
        self._revisited = int((scenes[place] > 1).sum())

    def __getitem__(self, chip: int) -> Numbers:
        """The numbers (N,) of the chips that show the ground of chip `chip` at another date, ascending."""
        at = self._at[chip]
        (first, end), (own, own_end) = (
            starts[(after := int(np.searchsorted(starts, at, side="right"))) - 1 : after + 1]
            for starts in (self._places, self._times)
        )
        # Sorted: which number an index gives to a date depends on whether it was built or read.
        return np.sort(np.concatenate((self._order[first:own], self._order[own_end:end])))

    def report(self) -> str:
        """What to print: how many chips have another date, and how many of these have no date of their own."""
        undated = f"; {self._undated:,} of unknown date, taken for one of their own" if self._undated else ""
        return f"season: {self.count:,} of {len(self._at):,} chips have another date{undated}"

    def why_none(self) -> str:
        """Where no chip has another date, the reason."""
        if not self._georeferenced:
            return "none has georeferencing, so nothing tells which show the same place"
        if not self._revisited:
            return "no two scenes have one on the same ground"
        return "all that show the same place are of one date (by their names, else TIFFTAG_DATETIME)"


def _codes(index: ChipIndex, column: str) -> npt.NDArray[np.integer[Any]]:
    """A number for each value of a column whose values are stored once; -1 for none."""
    indices: pa.Array = index.table[column].chunk(0).indices
    codes: npt.NDArray[np.integer[Any]] = indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes


def _different(place: Numbers, scene: Numbers) -> Numbers:
    """How many scenes each place has."""
    pairs = np.unique(np.stack((place, scene)), axis=1)
    return np.bincount(pairs[0], minlength=1)


def _places(index: ChipIndex) -> tuple[Numbers, int]:
    """A number (N,) for the place of each chip, and how many chips are georeferenced; each other has its own place."""
    size = index.chip_size
    sides = np.stack([index.table[side].chunk(0).to_numpy() for side in ("left", "bottom", "right", "top")])
    row, col = (index.table[name].chunk(0).to_numpy() for name in ("row", "col"))
    crs = _codes(index, "crs").astype(np.int64)
    # A transform that is the identity says nothing, whatever the CRS beside it: boxes are windows then.
    crs[(sides == np.stack((col, row, col + size, row + size))).all(axis=0)] = -1
    pixel = (sides[2:] - sides[:2]).min(axis=0) / size
    crs[~(pixel > 0)] = -1
    known = np.flatnonzero(crs >= 0)
    # What differs by a millionth of a pixel differs by the last digits of a transform: dates of one footprint are one.
    step = np.exp2(np.floor(np.log2(pixel[known])) - 20)
    sides[:, known] = np.round(sides[:, known] / step) * step

    order = known[np.lexsort((*sides[:, known], crs[known]))]
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (crs[order[1:]] != crs[order[:-1]]) | (sides[:, order[1:]] != sides[:, order[:-1]]).any(axis=0)
    firsts = order[begins]  # one chip of each footprint
    pairs = _near(sides[:, firsts], crs[firsts], size)
    links = coo_matrix((np.ones(len(pairs), np.bool_), pairs.T), (len(firsts),) * 2)
    count, of_footprint = connected_components(links, directed=False)
    place = np.empty(len(index), np.int64)
    place[order] = of_footprint[np.cumsum(begins) - 1]
    place[crs < 0] = count + np.arange(len(index) - len(known))
    return place, len(known)


def _near(sides: npt.NDArray[np.float64], crs: Numbers, size: int) -> npt.NDArray[np.int64]:
    """Pairs (P, 2) of different footprints, sides (4, F), whose sides lie less than half a pixel apart."""
    pixel = np.stack((sides[2] - sides[0], sides[3] - sides[1])) / size  # (2, F)
    # Such footprints differ in width by less than a pixel: where the next pixel is larger by more, a class ends.
    order = np.lexsort((pixel[0], crs))
    ends = (np.diff(crs[order]) != 0) | (np.diff(pixel[0, order]) > pixel[0, order[:-1]] / size)
    found = [np.empty((0, 2), np.int64)]
    for members in np.split(order, np.flatnonzero(ends) + 1):
        if len(members) < 2:
            continue
        reach = pixel[:, members].max() / 2
        pairs = members[KDTree(sides[:, members].T).query_pairs(reach, p=np.inf, output_type="ndarray")]
        one, other = pairs.T
        apart = np.abs(sides[:, one] - sides[:, other]).reshape(2, 2, -1).max(axis=0)  # in x and y
        found.append(pairs[(apart < np.minimum(pixel[:, one], pixel[:, other]) / 2).all(axis=0)])
    return np.concatenate(found)
