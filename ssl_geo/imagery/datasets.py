"""Chips by number: from a row of the index to valid DN with everything that makes them physical, and their labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError
from ssl_geo.imagery.archives import BAND, GEOTIFF_SUFFIXES, RASTER_SUFFIXES
from ssl_geo.imagery.chips import ChipIndex, IndexSettings
from ssl_geo.imagery.rasters import open_scene, read_labels, read_window
from ssl_geo.imagery.scenes import Scene


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
        scenes = index.table["scene"].combine_chunks()
        self._paths: list[str] = scenes.dictionary.to_pylist()
        self._scene = scenes.indices.to_numpy()
        self._row = index.table["row"].to_numpy()
        self._col = index.table["col"].to_numpy()

    def __len__(self) -> int:
        return len(self._scene)

    def __getitem__(self, i: int) -> Chip:
        """Read chip `i`.

        Raises:
            IndexError: If there is no such chip.
            UnreadableError: If a file cannot be read; the message names file and window.
        """
        size = self.chip_size
        scene = _described(self._fingerprint, self._paths[self._scene[i]], self._settings)
        dn, valid = read_window(scene, self.bands, int(self._row[i]), int(self._col[i]), size, size)
        return Chip(dn, valid, self.bands, scene.scale, scene.offset, scene.nodata)


@lru_cache(maxsize=256)
def _described(fingerprint: str, path: str, settings: IndexSettings) -> Scene:
    """A scene, described once a process for each state of its index (of which the fingerprint tells)."""
    return open_scene(path, **settings.scene_settings)


def dominant_labels(
    index: ChipIndex, positions: npt.NDArray[np.integer[Any]], folder: str | os.PathLike[str]
) -> npt.NDArray[np.int64]:
    """The most frequent label of chips, the smallest of equals.

    Args:
        index: The chips.
        positions: (N,) their numbers.
        folder: Label GeoTIFFs on the scenes' grids, named like the scenes (of band files: like their folder or
            their common name).

    Returns:
        (N,) class ids; -1 for a chip that has nothing but the declared nodata id.

    Raises:
        UserError: If a scene has no label file or the two are not on one grid.
    """
    found = np.empty(len(positions), np.int64)
    size = index.chip_size
    scenes = index.table["scene"].combine_chunks()
    rows, cols = index.table["row"].to_numpy(), index.table["col"].to_numpy()
    numbers = index.scene_numbers(positions)
    for number in np.unique(numbers):
        path = scenes.dictionary[int(number)].as_py()
        labels, nodata = _scene_labels(open_scene(path, **index.settings.scene_settings), Path(folder))
        for i in np.flatnonzero(numbers == number):
            row, col = int(rows[positions[i]]), int(cols[positions[i]])
            ids, counts = np.unique(labels[row : row + size, col : col + size], return_counts=True)
            if nodata is not None:
                counts = np.where(ids == nodata, 0, counts)
            found[i] = ids[counts.argmax()] if counts.any() else -1
    return found


def _scene_labels(scene: Scene, folder: Path) -> tuple[npt.NDArray[np.integer[Any]], int | None]:
    """The label raster of a scene, and its nodata id."""
    name = Path(scene.path).name
    stem = Path(name).stem if name.lower().endswith(RASTER_SUFFIXES) else name.replace(BAND, "").rstrip("_-. ")
    file = next((f for suffix in GEOTIFF_SUFFIXES if (f := folder / f"{stem}{suffix}").is_file()), None)
    if file is None:
        raise UserError(f"no labels for {scene.path}: looked for {stem}.tif in {folder}, which --data.labels names")
    labels, crs, transform, nodata = read_labels(file)
    pixel = max(abs(value) for value in (*scene.transform[:2], *scene.transform[3:5]))
    reach = np.array([scene.width, scene.height, 1, scene.width, scene.height, 1])  # pixels that a term is times
    if labels.shape != (scene.height, scene.width):
        differs = f"{labels.shape[0]}×{labels.shape[1]} pixels against {scene.height}×{scene.width}"
    elif crs != scene.crs:
        differs = f"CRS {crs} against {scene.crs}"
    elif (np.abs(np.subtract(transform, scene.transform)) > 0.01 * pixel / reach).any():
        differs = f"transform {transform} against {scene.transform}"
    else:
        return labels, nodata
    raise UserError(f"{file} is not on the grid of {scene.path}: {differs}; warp it there, or leave out --data.labels")
