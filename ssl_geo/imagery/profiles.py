"""What the pixels of a scene look like: extremes, fill, some spectra, a digest, a thumbnail; in one pass by block.

A profile holds a few hundred kilobytes whatever the size of the scene, so that checks need no second look.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo.imagery.rasters import read_counted
from ssl_geo.imagery.scan import BLOCK_PIXELS
from ssl_geo.imagery.scenes import Scene

THUMBNAIL = 32
"""Side of the thumbnail; smaller scenes have none."""
HIGH_DN = 28_000
"""From here on a 16-bit DN is counted as saturated: reflectance 2.8 and more. Level 2A ends at 32767 (ESA STEP forum
topic 44294: 15 bits of JPEG 2000), 65535 is the SATURATED value of the product metadata."""
MAX_VALUES = 64
"""Values up to which a raster of one band may hold labels."""
SPECTRA = 2048  # pixels of a scene that are kept for statistics
_QUICK_PIXELS = 256  # side of the windows of a quick look
_REPEATED = 16  # pixels at the maximum from which on it is asked how often a stored pixel comes
_HUGE = 1e30  # floating-point fill: -3.4e38, 3.4e38, -1.27e30; no physical value comes near

Bools = npt.NDArray[np.bool_]
Window = tuple[int, int, int, int]  # row, column, height, width


@dataclass
class Fill:
    """Where one value that files use as nodata occurs although it is not declared.

    Attributes:
        count: Pixels.
        solid: Pixels in the middle of 3×3 such pixels: areas, not specks.
        edge: Pixels on the scene's outermost rows and columns.
    """

    count: int = 0
    solid: int = 0
    edge: int = 0


@dataclass
class Profile:
    """What was seen of a scene's pixels.

    Attributes:
        scene: Which scene.
        read: Pixels seen.
        valid: Of them the valid ones (see `read_window`).
        minimum: (C,) least DN of valid pixels; inf where there is none.
        maximum: (C,) greatest; -inf where there is none.
        at_maximum: (C,) valid pixels that hold it.
        measured_at_maximum: (C,) of them as many as were measured: pixels that repeat a coarser one count once.
        high: (C,) valid pixels of `HIGH_DN` or more, in integers of more than 8 bits.
        fill: By value, see `Fill`; nan stands for NaN.
        spectra: (C, N) DN of some valid pixels, evenly spread.
        values: All values of a scene of one band that holds few (`MAX_VALUES`), as labels do; else None.
        digest: Of all pixels, shape and type; None after a quick look.
        unmeasured: Pixels, NaN apart, that hold what nothing measures and nothing declares (`read_counted`).
        unmeasured_value: One of these, infinite or far beyond any reflectance.
        thumbnail: (32, 32) mean over bands and area of the DN, NaN where nothing is valid; None after a quick look.
    """

    scene: Scene
    read: int
    valid: int
    minimum: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]
    at_maximum: npt.NDArray[np.int64]
    measured_at_maximum: npt.NDArray[np.float64]
    high: npt.NDArray[np.int64]
    fill: dict[float, Fill]
    spectra: npt.NDArray[Any]
    values: frozenset[float] | None = None
    digest: str | None = None
    thumbnail: npt.NDArray[np.float64] | None = None
    unmeasured: int = 0
    unmeasured_value: float = math.nan


@dataclass
class Part:
    """A profile of one window, to be put together by `join`."""

    window: Window
    profile: Profile
    digest: bytes
    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    counts: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


def windows(scene: Scene, *, quick: bool) -> Iterator[Window]:
    """The blocks that cover a scene, or for a quick look two corners and the middle."""
    side = _QUICK_PIXELS if quick else BLOCK_PIXELS
    if quick and min(scene.height, scene.width) > 2 * side:
        for share in (0.0, 0.5, 1.0):
            yield int(share * (scene.height - side)), int(share * (scene.width - side)), side, side
        return
    side = BLOCK_PIXELS
    for row in range(0, scene.height, side):
        for col in range(0, scene.width, side):
            yield row, col, min(side, scene.height - row), min(side, scene.width - col)


def profile_window(scene: Scene, window: Window, *, quick: bool = False) -> Part:
    """Read a window of all bands and describe its pixels.

    Raises:
        UnreadableError: If a file cannot be read; the message names file and window.
    """
    row, col, height, width = window
    dn, valid, dropped = read_counted(scene, scene.bands, row, col, height, width)
    bands = len(scene.bands)
    count = int(valid.sum())
    values = dn.reshape(bands, -1) if count == valid.size else dn[:, valid]
    low, high = np.full(bands, np.inf), np.full(bands, -np.inf)
    at_maximum = saturated = np.zeros(bands, np.int64)
    measured = np.zeros(bands)
    if count:
        low, top = values.min(axis=1), values.max(axis=1)
        at_maximum = (values == top[:, None]).sum(axis=1)
        measured = at_maximum / [
            _repeats(band, valid, most) if pixels >= _REPEATED else 1.0
            for band, most, pixels in zip(dn, top, at_maximum, strict=True)
        ]
        if dn.dtype.kind in "iu" and dn.dtype.itemsize > 1 and (top >= HIGH_DN).any():
            saturated = (values >= HIGH_DN).sum(axis=1)
        low, high = low.astype(np.float64), top.astype(np.float64)
    step = max(1, scene.height * scene.width // SPECTRA) if not quick else max(1, 4 * values.shape[1] // SPECTRA)
    while math.gcd(step, width) > 1:  # else all pixels would be of a few columns, such as a scene's damaged edge
        step += 1
    profile = Profile(
        scene,
        height * width,
        count,
        low,
        high,
        at_maximum,
        measured,
        saturated,
        _fills(scene, dn, window),
        values[:, ::step].copy(),
        _few_values(dn) if bands == 1 else None,
    )
    if dropped is not None and (held := dn[:, dropped & ~np.isnan(dn).any(axis=0)]).size:
        profile.unmeasured, profile.unmeasured_value = held.shape[1], float(held.flat[np.abs(held).argmax()])
    if quick:
        return Part(window, profile, b"")
    part = Part(window, profile, hashlib.blake2b(np.ascontiguousarray(dn).data, digest_size=16).digest())
    if min(scene.height, scene.width) >= THUMBNAIL:
        # one value a pixel, summed over the cells of the thumbnail that the window touches
        with np.errstate(over="ignore", invalid="ignore"):  # where not valid
            bright = np.where(valid, dn.sum(axis=0, dtype=np.float64) / bands, 0.0)
        part.sums, part.counts = (_cells(image, scene, window) for image in (bright, valid.astype(np.float64)))
    return part


def join(parts: list[Part]) -> Profile:
    """The profile of a scene from those of its windows, in their order."""
    profiles = [part.profile for part in parts]
    scene = profiles[0].scene
    maximum = np.max([profile.maximum for profile in profiles], axis=0)
    fill: dict[float, Fill] = {}
    for profile in profiles:
        for value, seen in profile.fill.items():
            total = fill.setdefault(value, Fill())
            total.count, total.solid, total.edge = (
                total.count + seen.count,
                total.solid + seen.solid,
                total.edge + seen.edge,
            )
    spectra = np.concatenate([profile.spectra for profile in profiles], axis=1)
    joined = Profile(
        scene,
        read=sum(profile.read for profile in profiles),
        valid=sum(profile.valid for profile in profiles),
        minimum=np.min([profile.minimum for profile in profiles], axis=0),
        maximum=maximum,
        at_maximum=np.sum([np.where(p.maximum == maximum, p.at_maximum, 0) for p in profiles], axis=0),
        measured_at_maximum=np.sum(
            [np.where(p.maximum == maximum, p.measured_at_maximum, 0) for p in profiles], axis=0
        ),
        high=np.sum([profile.high for profile in profiles], axis=0),
        fill=fill,
        spectra=spectra[:, :: max(1, spectra.shape[1] // SPECTRA)],
        unmeasured=sum(profile.unmeasured for profile in profiles),
        unmeasured_value=next((p.unmeasured_value for p in profiles if p.unmeasured), math.nan),
        values=_all_values([profile.values for profile in profiles]),
    )
    if all(part.digest for part in parts):
        head = f"{len(scene.bands)} {scene.height} {scene.width} {scene.dtype}".encode()
        joined.digest = hashlib.blake2b(b"".join([head, *(part.digest for part in parts)]), digest_size=16).hexdigest()
        if parts[0].sums.size:
            sums = np.sum([part.sums for part in parts], axis=0)
            counts = np.sum([part.counts for part in parts], axis=0)
            joined.thumbnail = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return joined


def _repeats(band: npt.NDArray[Any], valid: Bools, top: Any) -> float:
    """How many pixels of a band (H, W) come of one that was measured: 36 where 60 m were brought to 10 m, else near 1.

    By how often the value changes from a valid pixel to the next: along runs of n pixels at every n-th. Areas that
    hold the maximum `top`, which may be a clip, say nothing of it.
    """
    length = 1.0
    for one, other, known in (
        (band[1:], band[:-1], valid[1:] & valid[:-1]),
        (band[:, 1:], band[:, :-1], valid[:, 1:] & valid[:, :-1]),
    ):
        known = known & ((one != top) | (other != top))
        length *= max(1, int(known.sum())) / max(1, int((known & (one != other)).sum()))
    return max(1.0, length)


def _few_values(dn: npt.NDArray[Any]) -> frozenset[float] | None:
    """The finite values of an array that holds at most `MAX_VALUES`; else None."""
    few = np.unique(dn[..., ::17])  # most imagery tells by some columns
    if few.size <= MAX_VALUES:
        few = np.unique(dn)
    finite = few[np.isfinite(few)]
    return frozenset(finite.tolist()) if finite.size <= MAX_VALUES else None


def _all_values(parts: list[frozenset[float] | None]) -> frozenset[float] | None:
    known = [values for values in parts if values is not None]
    union = frozenset[float]().union(*known)
    return union if len(known) == len(parts) and len(union) <= MAX_VALUES else None


def _cells(image: npt.NDArray[np.float64], scene: Scene, window: Window) -> npt.NDArray[np.float64]:
    """Sums (32, 32) of an image over the thumbnail's cells of the whole scene."""
    row, col, height, width = window
    rows = np.arange(row, row + height) * THUMBNAIL // scene.height
    cols = np.arange(col, col + width) * THUMBNAIL // scene.width
    first_rows, first_cols = np.unique(rows, return_index=True)[1], np.unique(cols, return_index=True)[1]
    cells = np.zeros((THUMBNAIL, THUMBNAIL))
    summed = np.add.reduceat(np.add.reduceat(image, first_rows, axis=0), first_cols, axis=1)
    cells[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] = summed
    return cells


def _fills(scene: Scene, dn: npt.NDArray[Any], window: Window) -> dict[float, Fill]:
    """Undeclared fill: 0 and the type's maximum where all bands hold it, what no reflectance can be where any does."""
    masked = any(source.masked for source in scene.sources)
    kind, limits = dn.dtype.kind, np.iinfo(dn.dtype) if dn.dtype.kind in "iu" else None
    found: dict[float, Bools] = {}
    low, high = dn.min(axis=(1, 2)), dn.max(axis=(1, 2))
    if not masked and (low <= 0).all() and (high >= 0).all():
        found[0.0] = np.asarray(~dn.any(axis=0))
    if limits is not None:
        if not masked and (high == limits.max).all():
            found[float(limits.max)] = (dn == limits.max).all(axis=0)
        for value in (-9999, int(limits.min)):
            if value < 0 and low.min() <= value:
                found[float(value)] = (dn == value).any(axis=0)
    elif kind == "f":
        if not np.isfinite(low).all():
            found[math.nan] = np.isnan(dn).any(axis=0)
        with np.errstate(invalid="ignore"):
            found[-9999.0] = (dn == -9999).any(axis=0)
            huge = (np.abs(dn) > _HUGE) & np.isfinite(dn)
        if huge.any():
            found[float(dn[huge][0])] = huge.any(axis=0)
    declared = scene.nodata
    if declared is not None:
        found.pop(float(np.asarray(declared).astype(dn.dtype)) if kind == "f" else float(declared), None)
        if declared != declared:
            found = {value: mask for value, mask in found.items() if value == value}
    return {value: _fill(mask, scene, window) for value, mask in found.items() if mask.any()}


def _fill(mask: Bools, scene: Scene, window: Window) -> Fill:
    row, col, height, width = window
    rows = mask[2:] & mask[1:-1] & mask[:-2]
    solid = rows[:, 2:] & rows[:, 1:-1] & rows[:, :-2]
    edge = 0
    for is_border, line in (
        (row == 0, mask[0]),
        (row + height == scene.height, mask[-1]),
        (col == 0, mask[:, 0]),
        (col + width == scene.width, mask[:, -1]),
    ):
        edge += int(line.sum()) if is_border else 0
    return Fill(int(mask.sum()), int(solid.sum()), edge)
