"""Chips by number: from a row of the index to valid DN with everything that makes them physical, and their labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError, tell
from ssl_geo.imagery.archives import GEOTIFF_SUFFIXES
from ssl_geo.imagery.chips import ChipIndex, IndexSettings
from ssl_geo.imagery.pairing import grid_difference, scene_name
from ssl_geo.imagery.rasters import open_scene, read_labels, read_window
from ssl_geo.imagery.scenes import Scene, UnreadableError


@dataclass(frozen=True)
class Chip:
    """A window of a scene, as stored.

    Attributes:
        dn: (C, h, w) in the scene's dtype.
        valid: (h, w), True where the pixel is usable. Elsewhere `dn` is what the file holds, NaN included.
        bands: Canonical names of the channels.
        scale: Reflectance per DN.
        offset: In DN, added before scaling.
        nodata: The scene's nodata value, or None.
    """

    dn: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    bands: tuple[str, ...]
    scale: float
    offset: float
    nodata: float | None

    def reflectance(self) -> npt.NDArray[np.float32]:
        """(dn + offset) · scale as float32 (C, h, w); meaningless where not valid."""
        with np.errstate(over="ignore", invalid="ignore"):  # where not valid
            reflectance = self.dn.astype(np.float32)
            reflectance += np.float32(self.offset)
            reflectance *= np.float32(self.scale)
        return reflectance


class ChipDataset:
    """The chips of an index, read by number.

    Holds no open file: it may be pickled and forked; each process and thread opens its own.
    """

    def __init__(self, index: ChipIndex) -> None:
        self.bands = index.bands
        self.chip_size = index.chip_size
        self._settings = index.settings
        self._fingerprint = index.fingerprint
        scenes = index.table["scene"].chunk(0)
        self._paths = scenes.dictionary  # not as a list: an archive may have millions
        self._scene = scenes.indices.to_numpy()
        self._row = index.table["row"].chunk(0).to_numpy()
        self._col = index.table["col"].chunk(0).to_numpy()

    def __len__(self) -> int:
        return len(self._scene)

    def __getitem__(self, i: int) -> Chip:
        """Read chip `i`.

        Raises:
            IndexError: If there is no such chip.
            UnreadableError: If a file cannot be read; the message names file and window.
        """
        size = self.chip_size
        path = self._paths[int(self._scene[i])].as_py()
        scene = _described(self._fingerprint, path, self._settings)
        if int(self._row[i]) + size > scene.height or int(self._col[i]) + size > scene.width:
            raise UnreadableError(
                f"{path} has changed since it was indexed: it has {scene.height}×{scene.width} pixels"
            )
        dn, valid = read_window(scene, self.bands, int(self._row[i]), int(self._col[i]), size, size)
        return Chip(dn, valid, self.bands, scene.scale, scene.offset, scene.nodata)


@lru_cache(maxsize=256)
def _described(fingerprint: str, path: str, settings: IndexSettings) -> Scene:
    """A scene, described once a process for each state of its index (of which the fingerprint tells)."""
    return open_scene(path, **settings.scene_settings)


def dominant_labels(
    index: ChipIndex,
    positions: npt.NDArray[np.integer[Any]],
    folder: str | os.PathLike[str],
    say: Callable[[str], None] = tell,
) -> npt.NDArray[np.int64]:
    """The most frequent label of chips, the smallest of equals; values below 0 are none, and counted.

    Args:
        index: The chips.
        positions: (N,) their numbers.
        folder: Label GeoTIFFs on the scenes' grids, named like the scenes (of band files: like their folder or
            their common name).
        say: Takes a line about values below 0.

    Returns:
        (N,) class ids; -1 for a chip that has nothing but the declared nodata id and values below 0.

    Raises:
        UserError: If a scene has no label file or the two are not on one grid.
    """
    found = np.empty(len(positions), np.int64)
    size = index.chip_size
    scenes = index.table["scene"].chunk(0)
    rows, cols = index.table["row"].chunk(0).to_numpy(), index.table["col"].chunk(0).to_numpy()
    numbers = index.scene_numbers(positions)
    negative = 0
    for number in np.unique(numbers):
        path = scenes.dictionary[int(number)].as_py()
        labels, nodata = _scene_labels(open_scene(path, **index.settings.scene_settings), Path(folder))
        for i in np.flatnonzero(numbers == number):
            row, col = int(rows[positions[i]]), int(cols[positions[i]])
            ids, counts = np.unique(labels[row : row + size, col : col + size], return_counts=True)
            if nodata is not None:
                counts = np.where(ids == nodata, 0, counts)
            negative += int(counts[ids < 0].sum())
            counts = np.where(ids < 0, 0, counts)
            found[i] = ids[counts.argmax()] if counts.any() else -1
    if negative:
        say(f"{negative:,} pixels of the labels in {folder} hold values below 0, which are no class: ignored")
    return found


def _scene_labels(scene: Scene, folder: Path) -> tuple[npt.NDArray[np.integer[Any]], int | None]:
    """The label raster of a scene, and its nodata id."""
    stem = scene_name(Path(scene.path))
    file = next((f for suffix in GEOTIFF_SUFFIXES if (f := folder / f"{stem}{suffix}").is_file()), None)
    if file is None:
        raise UserError(f"no labels for {scene.path}: looked for {stem}.tif in {folder}, which --data.labels names")
    labels, crs, transform, nodata = read_labels(file)
    if differs := grid_difference(labels.shape, crs, transform, scene):
        raise UserError(
            f"{file} is not on the grid of {scene.path}: {differs}; warp it there, or leave out --data.labels"
        )
    return labels, nodata
