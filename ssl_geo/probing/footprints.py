"""Where chips lie on the ground: blocks, distances, overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from ssl_geo.errors import UserError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

EARTH_RADIUS = 6_371_008.8  # metres, mean radius of WGS 84 (IUGG)
METRES_PER_DEGREE = np.pi * EARTH_RADIUS / 180  # along a meridian

# Sides of neighbours on a reprojected grid meet within this share of a chip; deeper than it they overlap.
TOLERANCE = 0.01
# Places that cannot be compared are this far apart along an axis of their own.
ELSEWHERE = 1e9


@dataclass(frozen=True)
class Footprints:
    """Upright rectangles of ground, one a chip. Made by one of `on_earth`, `in_degrees`, `in_plane`.

    Attributes:
        place: (N,) number of the plane that a chip lies in; chips of different planes are never near each other.
        x: (N,) centre, in degrees of longitude if `geographic`, else in the plane's unit.
        y: (N,) centre, in degrees of latitude if `geographic`.
        width: (N,) in metres if `geographic`, else in the plane's unit.
        height: (N,) as `width`.
        geographic: Whether x and y are longitude and latitude.
        unit: Of widths and distances.
    """

    place: Indices
    x: Floats
    y: Floats
    width: Floats
    height: Floats
    geographic: bool
    unit: Literal["metres", "pixels"]

    def __post_init__(self) -> None:
        numbers = np.stack([self.x, self.y, self.width, self.height])
        wrong = np.flatnonzero(~np.isfinite(numbers).all(0) | (self.width <= 0) | (self.height <= 0))
        if len(wrong):
            raise UserError(
                f"{len(wrong)} chips have no extent on the ground, the first is number {wrong[0]} (centre "
                f"{self.x[wrong[0]]}, {self.y[wrong[0]]}; size {self.width[wrong[0]]} × {self.height[wrong[0]]}): "
                "left < right and bottom < top are needed, mend the georeferencing or give splits with --split.file"
            )
        if self.geographic and (np.abs(self.y) > 90).any():
            raise UserError(f"latitude {self.y[np.abs(self.y).argmax()]}: -90 ... 90 are allowed, mend the image's CRS")

    @classmethod
    def on_earth(cls, lonlat: npt.ArrayLike, size: npt.ArrayLike) -> Footprints:
        """Chips of any CRS, all comparable with each other.

        Args:
            lonlat: (N, 2) centre of each chip in degrees of longitude and latitude (WGS 84).
            size: (N, 2) width and height of each in metres.
        """
        centre, side = np.asarray(lonlat, dtype=np.float64), np.asarray(size, dtype=np.float64)
        place = np.zeros(len(centre), dtype=np.int64)
        return cls(place, centre[:, 0], centre[:, 1], side[:, 0], side[:, 1], geographic=True, unit="metres")

    @classmethod
    def in_degrees(cls, bounds: npt.ArrayLike) -> Footprints:
        """Chips of a geographic CRS; widths become metres at the latitude of each.

        Args:
            bounds: (N, 4) left, bottom, right, top of each chip in degrees.
        """
        left, bottom, right, top = np.asarray(bounds, dtype=np.float64).T
        latitude = (bottom + top) / 2
        width = (right - left) * METRES_PER_DEGREE * np.cos(np.radians(latitude))
        size = np.stack([width, (top - bottom) * METRES_PER_DEGREE], axis=1)
        return cls.on_earth(np.stack([(left + right) / 2, latitude], axis=1), size)

    @classmethod
    def in_plane(
        cls, place: Sequence[str], bounds: npt.ArrayLike, unit: Literal["metres", "pixels"] = "metres"
    ) -> Footprints:
        """Chips of one projected CRS, or windows of images without georeferencing.

        Args:
            place: Name of each chip's plane: its CRS (several projected CRS in one table: use `on_earth`, or overlaps
                between them are not seen), its image for pixels.
            bounds: (N, 4) left, bottom, right, top in metres or pixels.
            unit: Of the bounds.
        """
        left, bottom, right, top = np.asarray(bounds, dtype=np.float64).T
        number = np.unique(np.asarray(place), return_inverse=True)[1].astype(np.int64)
        x, y, width, height = (left + right) / 2, (bottom + top) / 2, right - left, top - bottom
        return cls(number, x, y, width, height, geographic=False, unit=unit)

    def __len__(self) -> int:
        return len(self.x)

    def points(self) -> Floats:
        """(N, 3) centres between which straight lines measure distance: on a sphere, or in planes far apart."""
        if not self.geographic:
            return np.stack([self.x, self.y, self.place * ELSEWHERE], axis=1)
        longitude, latitude = np.radians(self.x), np.radians(self.y)
        around = np.cos(latitude)
        unit = np.stack([around * np.cos(longitude), around * np.sin(longitude), np.sin(latitude)], axis=1)
        return EARTH_RADIUS * unit

    def blocks(self, side: float) -> Indices:
        """Square block that each chip belongs to: that of its site's centre.

        Chips of one site (repeated dates, the same ground in another CRS) share a block: a site is its first chip, in
        order of place, y, x, and all whose centres are nearer than half its shorter side. The grid is fixed to the
        ground, so chips added later do not move it: in degrees, rows of latitude `side` metres high, cut into columns
        `side` metres wide at the row's middle.

        Args:
            side: Of a block, in `unit`.

        Returns:
            (N,) numbers from 0 on.
        """
        if not side > 0:
            raise UserError(f"blocks of {side:g} {self.unit}: more than 0 is needed, set --split.block")
        first = self._sites()
        x, y = self.x[first], self.y[first]
        if self.geographic:
            y = y * METRES_PER_DEGREE
            middle = (np.floor(y / side) + 0.5) * side / METRES_PER_DEGREE
            x = x * METRES_PER_DEGREE * np.cos(np.radians(np.clip(middle, -90, 90)))
        keys = np.stack([self.place[first], np.floor(y / side), np.floor(x / side)], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def _sites(self) -> Indices:
        """The first chip of each chip's site."""
        points = self.points()
        radius = 0.499 * np.minimum(self.width, self.height)
        near = cKDTree(points).query_ball_point(points, radius)
        first = np.full(len(self), -1, dtype=np.int64)
        for chip in np.lexsort((self.x, self.y, self.place)):
            if first[chip] < 0:
                around = np.asarray(near[chip])
                first[around[first[around] < 0]] = chip
        return first

    def gaps(self, a: Indices, b: Indices) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Distance between the rectangles a[k] and b[k] in `unit` (0 where they touch), and whether they overlap."""
        across, along = np.abs(self.x[a] - self.x[b]), np.abs(self.y[a] - self.y[b])
        bend = np.ones(len(a))
        if self.geographic:
            across = np.minimum(across, 360 - across) * METRES_PER_DEGREE
            across *= np.cos(np.radians((self.y[a] + self.y[b]) / 2))
            along = along * METRES_PER_DEGREE
            # Far apart the flat map is wrong: scale to the great circle between the centres.
            points, flat = self.points(), np.hypot(across, along)
            chord = np.linalg.norm(points[a] - points[b], axis=1)
            arc = 2 * EARTH_RADIUS * np.arcsin(np.clip(chord / (2 * EARTH_RADIUS), 0, 1))
            bend = np.divide(arc, flat, out=bend, where=flat > 1)
        across = across - (self.width[a] + self.width[b]) / 2
        along = along - (self.height[a] + self.height[b]) / 2
        distance = np.hypot(np.maximum(across, 0), np.maximum(along, 0)) * bend
        overlap = (across < -TOLERANCE * np.minimum(self.width[a], self.width[b])) & (
            along < -TOLERANCE * np.minimum(self.height[a], self.height[b])
        )
        return distance, overlap


def _pairs(chips: Footprints, a: Indices, b: Indices, radius: float) -> tuple[Indices, Indices]:
    """All pairs of a chip of a and one of b with centres no farther apart than `radius`."""
    points = chips.points()
    near = cKDTree(points[b]).query_ball_point(points[a], radius)
    counts = np.fromiter(map(len, near), dtype=np.int64, count=len(near))
    flat = np.fromiter((j for row in near for j in row), dtype=np.int64, count=int(counts.sum()))
    return np.repeat(a, counts), b[flat]


def _reach(chips: Footprints) -> float:
    """Farthest that the edges of two chips can be nearer to each other than their centres."""
    return float(np.hypot(chips.width, chips.height).max())


def nearest_distance(chips: Footprints, a: Indices, b: Indices) -> float | None:
    """Least distance between a chip of a and one of b, in the chips' unit; None where none can be compared."""
    if not len(a) or not len(b):
        return None
    points = chips.points()
    centres = float(cKDTree(points[b]).query(points[a])[0].min())
    if not chips.geographic and centres >= ELSEWHERE:
        return None
    return float(chips.gaps(*_pairs(chips, a, b, 1.001 * centres + _reach(chips)))[0].min())


def near(chips: Footprints, a: Indices, b: Indices, gap: float) -> npt.NDArray[np.bool_]:
    """Which chips of a overlap a chip of b or lie nearer to it than `gap`, (len(a),)."""
    if not len(a) or not len(b):
        return np.zeros(len(a), dtype=bool)
    first, second = _pairs(chips, a, b, 1.001 * gap + _reach(chips))
    distance, overlap = chips.gaps(first, second)
    hit = first[(distance < gap * (1 - 1e-9)) | overlap]
    return np.isin(a, hit)


def box_on_earth(lonlat: npt.ArrayLike, size: npt.ArrayLike) -> Floats:
    """Left, bottom, right, top (N, 4) in degrees of chips with centres (N, 2) in degrees and sides (N, 2) in metres."""
    centre, side = np.asarray(lonlat, np.float64), np.asarray(size, np.float64)
    half = side / 2 / METRES_PER_DEGREE
    half[:, 0] /= np.maximum(np.cos(np.radians(centre[:, 1])), 1e-6)
    box: Floats = np.concatenate([centre - half, centre + half], axis=1)
    return box
