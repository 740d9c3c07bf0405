"""Labelled images cut into chips of classes 0 … C-1. Images and labels are paired in `ssl_geo.imagery.pairing`."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ssl_geo.errors import UserError, nearest
from ssl_geo.imagery.coordinates import to_lonlat
from ssl_geo.imagery.gdal import side_files
from ssl_geo.imagery.pairing import IGNORED, Classes, Colour, LabelledScene, pair_labels, scene_labels, scene_name
from ssl_geo.imagery.rasters import READING, read_counted, read_window
from ssl_geo.imagery.scenes import UNMEASURED
from ssl_geo.imagery.statistics import BandStatistics
from ssl_geo.imagery.survey import unit_notes
from ssl_geo.threads import in_order

__all__ = [
    "IGNORED",
    "Classes",
    "LabelledChip",
    "LabelledChips",
    "LabelledScene",
    "pair_labels",
]

_EARTH_RADIUS = 6_371_008.8  # metres, mean radius of WGS 84 (IUGG)
_METRES_PER_DEGREE = np.pi * _EARTH_RADIUS / 180
_MAX_WORKERS = 8
_MAX_SAID = 6  # classes that a line lists


@dataclass(frozen=True, slots=True)
class LabelledChip:
    """A window of a labelled scene.

    Attributes:
        reflectance: (C, s, s) float32; 0 where not valid.
        valid: (s, s), True where the pixel is usable; False in padding.
        labels: (s, s) uint8, classes 0 … C-1; 255 in the context and where there is no label or no valid pixel.
    """

    reflectance: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.uint8]


class LabelledChips:
    """Labelled scenes cut into chips side by side from the upper left, padded where they reach over the border.

    With a context, a chip's image goes so many pixels beyond its labels on every side, over its neighbours: a backbone
    then sees what surrounds each labelled pixel, and every labelled pixel still belongs to one chip. Chips without a
    pixel that is both valid and labelled are left out. Holds no open file: it may be pickled and forked.

    Attributes:
        scenes: As given.
        bands: Names of the channels.
        chip_size: Labelled pixels of a chip along each axis.
        context: Pixels around them.
        side: Pixels of a chip's image along each axis, chip_size + 2 context.
        scene: (N,) number of each chip's scene.
        row: (N,) first labelled row of each chip in its scene.
        col: (N,) first labelled column.
        class_pixels: (N, C) valid pixels of each chip and class.
        lonlat: (N, 2) longitude and latitude in degrees of the middle of each chip's part within the image; None where
            an image has no CRS.
        size_m: (N, 2) width and height of that part in metres, along the image's axes on a sphere; None likewise.
        left_out: Number of chips left out.
        unmeasured: Pixels beside labels that are not valid for what they hold, though undeclared (`read_counted`).
        fingerprint: Changes with the files (path, size, time of change), how they are read, classes, bands, chip size.
    """

    def __init__(
        self, scenes: Sequence[LabelledScene], *, bands: Sequence[str], chip_size: int, context: int = 0
    ) -> None:
        """Cut the scenes, reading each once.

        Args:
            scenes: Of one call of `pair_labels`.
            bands: Canonical names, in the order of the channels.
            chip_size: In pixels.
            context: In pixels.

        Raises:
            UserError: If a scene has not all the bands, a file cannot be read, or no chip is left.
        """
        if chip_size < 1:
            raise UserError(f"--chip_size {chip_size}: it must be 1 or more")
        if context < 0:
            raise UserError(f"--context {context}: it must be 0 or more")
        if not scenes or len({labelled.classes for labelled in scenes}) > 1:
            raise ValueError("scenes must be those of one call of pair_labels")
        for labelled in scenes:
            for band in bands:
                if band not in labelled.scene.bands:
                    raise UserError(
                        f"{labelled.scene.path} has no band {band}, only {' '.join(labelled.scene.bands)}, where "
                        f"{' '.join(bands)} are needed: give images that have them (--data.band_names names the bands "
                        "of files that name none)"
                    )
        self.scenes = tuple(scenes)
        self.bands = tuple(bands)
        self.chip_size, self.context, self.side = chip_size, context, chip_size + 2 * context
        self.fingerprint = self._of_files()  # before the pixels are read: what changes meanwhile shows next time
        windows: list[tuple[int, int, int]] = []
        counted: list[npt.NDArray[np.int64]] = []
        for number, labelled in enumerate(tqdm(scenes, desc="reading labels", unit="image", delay=2)):
            self._labels(number, 0, 0)  # once, before the threads share it
            height, width = labelled.scene.height, labelled.scene.width
            of_scene = [(number, r, c) for r in range(0, height, chip_size) for c in range(0, width, chip_size)]
            workers = min(_MAX_WORKERS, os.cpu_count() or 1, len(of_scene))
            counted += in_order(lambda window: self._count(*window), of_scene, workers)
            windows += of_scene
        pixels = np.stack(counted)
        counts, self.unmeasured = pixels[:, :-1], int(pixels[:, -1].sum())
        kept = counts.any(axis=1)
        if not kept.any():
            raise UserError(
                f"no pixel of {len(scenes)} images is valid and labelled, the first is {scenes[0].scene.path}: check "
                "--data.nodata, --classes and --ignore, and that images and labels cover the same ground"
            )
        self.scene, self.row, self.col = np.array(windows, np.int64)[kept].T.copy()
        self.class_pixels = counts[kept]
        self.left_out = int((~kept).sum())
        self.lonlat: npt.NDArray[np.float64] | None = None
        self.size_m: npt.NDArray[np.float64] | None = None
        if all(labelled.scene.crs is not None for labelled in scenes):
            self.lonlat, self.size_m = self._on_earth()

    def __len__(self) -> int:
        return len(self.scene)

    def __getitem__(self, i: int) -> LabelledChip:
        """Read chip `i`.

        Raises:
            IndexError: If there is no such chip.
            UnreadableError: If a file cannot be read; the message names file and window.
        """
        number, row, col = int(self.scene[i]), int(self.row[i]), int(self.col[i])
        scene, side, context = self.scenes[number].scene, self.side, self.context
        top, left = row - context, col - context  # of the image; less than 0 where it reaches over the scene's border
        above, before = max(0, -top), max(0, -left)
        height, width = min(side, scene.height - top) - above, min(side, scene.width - left) - before
        dn, inside = read_window(scene, self.bands, top + above, left + before, height, width)
        place = np.s_[above : above + height, before : before + width]
        reflectance = np.zeros((len(self.bands), side, side), np.float32)
        part = reflectance[:, *place]
        np.copyto(part, dn, where=inside, casting="unsafe")
        np.add(part, np.float32(scene.offset), out=part, where=inside)
        part *= np.float32(scene.scale)
        valid = np.zeros((side, side), np.bool_)
        valid[place] = inside
        known = self._labels(number, row, col)
        labels = np.full((side, side), IGNORED, np.uint8)
        core = np.s_[context : context + known.shape[0], context : context + known.shape[1]]
        np.copyto(labels[core], known, where=valid[core])
        return LabelledChip(reflectance, valid, labels)

    @property
    def ids(self) -> tuple[int, ...]:
        """(C,) what the label rasters hold for each class."""
        return self.scenes[0].classes.ids

    @property
    def names(self) -> tuple[str, ...]:
        """(C,) names of the classes."""
        return self.scenes[0].classes.names

    @property
    def colours(self) -> tuple[Colour, ...]:
        """(C,) colours of the classes."""
        return self.scenes[0].classes.colours

    def report(self) -> list[str]:
        """What to print: size and classes, what was left out, warped or assumed."""
        scenes, size = [labelled.scene for labelled in self.scenes], self.chip_size
        pixels = self.class_pixels.sum(axis=0)
        order = np.argsort(-pixels, kind="stable")
        shares = ", ".join(f"{self.names[k]} {pixels[k] / pixels.sum():.1%}" for k in order[:_MAX_SAID])
        more = ", …" if len(order) > _MAX_SAID else ""
        around = f" and {self.context} around them" if self.context else ""
        said = [
            f"{len(self)} chips of {size}×{size} pixels{around} from {len(scenes)} images, {len(order)} classes: "
            f"{shares}{more}"
        ]
        if self.unmeasured:
            said.append(f"left out {self.unmeasured} pixels that hold {UNMEASURED}, which no file declares as nodata")
        if self.left_out:
            said.append(f"left out {self.left_out} chips without a pixel that is valid and labelled")
        height, width = np.array([(scene.height, scene.width) for scene in scenes])[self.scene].T
        if padded := int(((self.row + size > height) | (self.col + size > width)).sum()):
            said.append(f"{padded} chips reach over an image's border: padded, the padding ignored")
        if warped := [labelled for labelled in self.scenes if labelled.warped is not None]:
            said.append(
                f"labels of {len(warped)} of {len(scenes)} images warped to the image's grid by nearest neighbour; the "
                f"first, {warped[0].labels}: {warped[0].warped}"
            )
        if self.lonlat is None:
            without = sum(scene.crs is None for scene in scenes)
            said.append(
                f"{without} of {len(scenes)} images have no CRS: chips lie in their image's pixels, and two images of "
                "one place are not known as such"
            )
        levels = Counter(scene.level for scene in scenes if scene.level is not None)
        if len(levels) > 1:
            counts = " and ".join(f"{level} in {count}" for level, count in sorted(levels.items()))
            said.append(f"mixes products, {counts} of {len(scenes)} images: their reflectance differs, probe one kind")
        if both := [labelled for labelled in self.scenes if labelled.nodata in self.ids]:
            said.append(
                f"{both[0].nodata} is a class, and {len(both)} of {len(scenes)} label rasters declare it as nodata, "
                f"the first {both[0].labels}: ignored there; --classes lists what is a class everywhere, --ignore "
                "what is none anywhere"
            )
        if below := {labelled.labels: labelled.negative for labelled in self.scenes if labelled.negative}:
            said.append(
                f"{sum(below.values()):,} pixels in {len(below)} label rasters hold values below 0, which are no "
                f"class: ignored; the first {next(iter(below))}"
            )
        return [*said, *unit_notes(scenes, "images")]

    def unknown(self, splits: Mapping[str, str]) -> list[str]:
        """Names in a table of splits that are no image's."""
        return sorted(splits.keys() - {scene_name(Path(labelled.scene.path)) for labelled in self.scenes})

    def given(self, splits: Mapping[str, str]) -> list[str]:
        """The split of each chip, (N,), from that of each image by name (file name without suffix).

        Raises:
            UserError: If an image has none.
        """
        names = [scene_name(Path(labelled.scene.path)) for labelled in self.scenes]
        if missing := [name for name in names if name not in splits]:
            raise UserError(
                f"{len(missing)} of {len(names)} images have no split, the first is {missing[0]}; "
                f"{nearest(missing[0], splits)}"
            )
        return [splits[names[number]] for number in self.scene]

    def statistics(
        self, chips: npt.NDArray[np.integer[Any]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and standard deviation (C,) of the reflectance of some chips' valid pixels, by their numbers."""
        total = BandStatistics.empty(len(self.bands))
        for number in chips:
            chip = self[int(number)]
            total = total.merge(BandStatistics.of(chip.reflectance[:, chip.valid]))
        return total.mean.astype(np.float32), total.std.astype(np.float32)

    def _labels(self, number: int, row: int, col: int) -> npt.NDArray[np.uint8]:
        """Classes of the part of a chip within its image."""
        labelled = self.scenes[number]
        try:
            changed = Path(labelled.labels).stat().st_mtime_ns
        except OSError as error:
            raise UserError(f"cannot read {labelled.labels}: {error.strerror}") from error
        return scene_labels(labelled, changed)[row : row + self.chip_size, col : col + self.chip_size]

    def _count(self, number: int, row: int, col: int) -> npt.NDArray[np.int64]:
        """Valid pixels of each class in a chip, then those to be counted by `read_counted`: (C + 1,).

        The image is read only where there are labels.
        """
        labels = self._labels(number, row, col)
        if (labels == IGNORED).all():
            return np.zeros(len(self.ids) + 1, np.int64)
        _, valid, dropped = read_counted(self.scenes[number].scene, self.bands, row, col, *labels.shape)
        pixels = np.bincount(labels[valid], minlength=IGNORED + 1)[: len(self.ids)]
        return np.append(pixels, 0 if dropped is None else dropped.sum()).astype(np.int64)

    def _on_earth(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """`lonlat` and `size_m`."""
        lonlat, size_m = np.empty((len(self), 2)), np.empty((len(self), 2))
        for number in np.unique(self.scene):
            scene, chips = self.scenes[number].scene, np.flatnonzero(self.scene == number)
            assert scene.crs is not None
            top, left = self.row[chips], self.col[chips]
            bottom = np.minimum(top + self.chip_size, scene.height)
            right = np.minimum(left + self.chip_size, scene.width)
            row, col = (top + bottom) / 2, (left + right) / 2
            # the middle of the chip and of its left, right, upper and lower side
            cols, rows = np.stack([col, left, right, col, col]), np.stack([row, row, row, top, bottom])
            a, b, c, d, e, f = scene.transform
            points = to_lonlat(scene.crs, (a * cols + b * rows + c).ravel(), (d * cols + e * rows + f).ravel())
            middle, west, east, north, south = points.reshape(5, len(chips), 2)
            lonlat[chips] = middle
            around = np.cos(np.radians(middle[:, 1]))
            for axis, (one, other) in enumerate([(west, east), (north, south)]):
                across = (other[:, 0] - one[:, 0] + 180) % 360 - 180  # over the antimeridian too
                along = other[:, 1] - one[:, 1]
                size_m[chips, axis] = np.hypot(across * around, along) * _METRES_PER_DEGREE
        return lonlat, size_m

    def _of_files(self) -> str:
        digest = hashlib.sha256(json.dumps([READING, self.bands, self.chip_size, self.context]).encode())
        rasters: set[Path] = set()
        for labelled in self.scenes:
            digest.update(json.dumps({k: v for k, v in asdict(labelled).items() if k != "negative"}).encode())
            rasters |= {Path(file) for file in (labelled.labels, *(source.file for source in labelled.scene.sources))}
        for file in (*sorted(rasters), *side_files(sorted(rasters))):
            try:
                status = file.stat()
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}") from error
            digest.update(os.fsencode(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n"))
        return digest.hexdigest()
