"""The chip index: which windows of which scenes are fit for use, and the statistics of their bands.

One row a chip, in columns: Parquet on disk; read again, Arrow in mapped scratch files, so that of millions of chips
only the columns in use take memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_geo.errors import UserError, nearest
from ssl_geo.files import remove_stale, written_whole
from ssl_geo.imagery.archives import FoundScene, walk_scenes
from ssl_geo.imagery.columns import ScratchError, mapped_columns, stored_once
from ssl_geo.imagery.coordinates import in_metres
from ssl_geo.imagery.gdal import side_files
from ssl_geo.imagery.index_schema import METADATA_KEY, SHARED, check_columns, read_metadata
from ssl_geo.imagery.products import LEVELS, metadata_file
from ssl_geo.imagery.rasters import READING
from ssl_geo.imagery.scan import Chips, scan_pixels
from ssl_geo.imagery.sensors import KNOWN_BANDS, canonical_band
from ssl_geo.imagery.statistics import BandStatistics
from ssl_geo.imagery.survey import LeftOut, SceneRecord, describe_scenes, refuse_mixed, unit_notes
from ssl_geo.schema import NonFinite, conform

FORMAT_VERSION = 2
_LARGEST_CHIP = 8192  # pixels along each axis; a batch of larger ones fits no memory
_MAX_WORKERS = 8  # threads that read; more wait for each other at Python's lock


@dataclass(frozen=True)
class IndexSettings:
    """What an index depends on besides the files; see `build_index`."""

    bands: tuple[str, ...]
    chip_size: int
    band_names: tuple[str, ...] | None = None
    level: str | None = None
    scale: float | None = None
    offset: float | None = None
    nodata: NonFinite | None = None
    min_valid: float = 0.9
    allow_mixed: bool = False
    max_unreadable: float = 0.01
    statistics_chips: int = 20000
    seed: int = 0

    @property
    def scene_settings(self) -> dict[str, Any]:
        """The keyword arguments of `ssl_geo.imagery.rasters.open_scene`."""
        return {name: getattr(self, name) for name in ("band_names", "level", "scale", "offset", "nodata")}


@dataclass(frozen=True)
class ChipIndex:
    """Chips of a fixed size on the scenes' grids.

    Attributes:
        table: One row a chip: ``scene`` (path), ``row``, ``col``, ``crs``, ``left``, ``bottom``, ``right``, ``top``
            (in units of the CRS), ``valid_fraction``, ``dtype``, ``level``, ``offset``, ``scale``, ``nodata``,
            ``date``. Each column is one chunk.
        settings: What it was built with, bands and chip size among it.
        statistics: Per band in reflectance, over valid pixels, in the order of the bands.
        scene_count: Scenes found, those left out among them.
        left_out: What was left out and why.
        notes: Lines worth printing.
        fingerprint: Changes with the files, the settings and the format.
    """

    table: pa.Table
    settings: IndexSettings
    statistics: BandStatistics
    scene_count: int
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def bands(self) -> tuple[str, ...]:
        """Canonical names, in the order of the channels."""
        return self.settings.bands

    @property
    def chip_size(self) -> int:
        """Pixels of a chip along each axis."""
        return self.settings.chip_size

    @property
    def scale(self) -> float | None:
        """Reflectance per DN where all chips share one, else None."""
        return _shared(self.table["scale"])

    @property
    def offset(self) -> float | None:
        """DN added before scaling where all chips share it, else None."""
        return _shared(self.table["offset"])

    @property
    def gsd(self) -> float | None:
        """Metres a pixel where all chips share it, to a hundredth, and have a CRS in metres; else None."""
        if not all(map(in_metres, self.table["crs"].unique().to_pylist())):
            return None
        across = (self.table["right"].to_numpy() - self.table["left"].to_numpy()) / self.chip_size
        gsd = round(float(across[0]), 2)
        return gsd if np.abs(across - gsd).max() < 0.01 else None

    def scene_numbers(self, positions: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """For chips by number, the numbers (N,) of their scenes: equal where they are of one scene."""
        codes = self.table["scene"].chunk(0).indices.to_numpy()
        return np.asarray(codes[positions], np.int64)

    def with_bands(self, bands: Sequence[str]) -> ChipIndex:
        """The same chips with some of the bands, by canonical name in the order wanted."""
        channels = [self.bands.index(band) for band in bands]
        part = BandStatistics(self.statistics.count, self.statistics.mean[channels], self.statistics.m2[channels])
        return replace(self, settings=replace(self.settings, bands=tuple(bands)), statistics=part)

    def report(self) -> list[str]:
        """What to print of the index: its size, what was left out, what was assumed."""
        scenes = len(np.unique(self.table["scene"].chunk(0).indices.to_numpy()))
        size = (
            f"{len(self)} chips of {self.chip_size}×{self.chip_size} pixels from {scenes} of {self.scene_count} scenes"
        )
        return [size, *(str(record) for record in self.left_out), *self.notes]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index as Parquet; it appears under its name only when it is complete."""
        path = Path(path)
        statistics = self.statistics
        metadata = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "statistics": {
                "count": statistics.count,
                "mean": statistics.mean.tolist(),
                "m2": statistics.m2.tolist(),
            },
            "scene_count": self.scene_count,
            "left_out": [asdict(record) for record in self.left_out],
            "notes": self.notes,
            "fingerprint": self.fingerprint,
        }
        table = self.table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})
        with written_whole(path) as partial:
            pq.write_table(table, partial, compression="zstd")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mend: str = "build it anew with build_index") -> ChipIndex:
        """Read an index.

        Args:
            path: The Parquet file.
            mend: What to do where it cannot be read; ends the message.

        Raises:
            UserError: If the file is missing, no chip index, damaged, or of another format version.
        """
        try:
            metadata = read_metadata(path)
            if (found := metadata["format_version"]) != FORMAT_VERSION:
                raise UserError(f"{path} is a chip index of format {found}, this version reads {FORMAT_VERSION}")
            settings = _checked_settings(conform(metadata["settings"], IndexSettings, f"{path}: settings"))
            table = mapped_columns(path, once=SHARED)
            check_columns(table, path)
        except ScratchError:
            raise
        except UserError as error:
            raise UserError(f"{error}: {mend}") from error
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a chip index ({error}): {mend}") from error
        statistics = metadata["statistics"]
        return cls(
            table=table,
            settings=settings,
            statistics=BandStatistics(
                statistics["count"], np.array(statistics["mean"], np.float64), np.array(statistics["m2"], np.float64)
            ),
            scene_count=metadata["scene_count"],
            left_out=metadata["left_out"],
            notes=metadata["notes"],
            fingerprint=metadata["fingerprint"],
        )


def build_index(
    paths: Sequence[Path | str],
    *,
    bands: Sequence[str],
    chip_size: int,
    band_names: Sequence[str] | None = None,
    level: str | None = None,
    scale: float | None = None,
    offset: float | None = None,
    nodata: float | None = None,
    min_valid: float = 0.9,
    allow_mixed: bool = False,
    max_unreadable: float = 0.01,
    statistics_chips: int = 20000,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> ChipIndex:
    """Find the scenes, cut them into chips, keep those that are valid enough, and measure their bands.

    Chips lie side by side; the last of a row or column is shifted inwards, so that no pixel is lost.

    Args:
        paths: Folders and files.
        bands: Names of the bands that every chip shall have, in the order of its channels.
        chip_size: Pixels along each axis, on the finest grid of the scene.
        band_names: The bands of stacks that name none; this and the next four are those of
            `ssl_geo.imagery.rasters.open_scene`.
        level: ``L1C`` or ``L2A``.
        scale: Reflectance per DN.
        offset: In DN, added before scaling.
        nodata: Replaces what the files declare.
        min_valid: Least share of valid pixels of a chip.
        allow_mixed: Whether scenes of different products or offsets may stand in one index.
        max_unreadable: Largest share of the scenes that may be unreadable and left out.
        statistics_chips: Most chips that the statistics are taken from; a random subset of larger archives.
        seed: Of that subset.
        workers: Threads; by default the number of processors, at most 8. The result does not depend on it.
        progress: Show bars where it takes more than two seconds.

    Raises:
        UserError: If the paths hold no raster, settings or bands do not fit the scenes, products are mixed, too
            many scenes are unreadable, or no chip is left.
    """
    settings = _checked_settings(
        IndexSettings(
            bands=tuple(bands),
            chip_size=chip_size,
            band_names=None if band_names is None else tuple(band_names),
            level=level,
            scale=scale,
            offset=offset,
            nodata=nodata,
            min_valid=min_valid,
            allow_mixed=allow_mixed,
            max_unreadable=max_unreadable,
            statistics_chips=statistics_chips,
            seed=seed,
        )
    )
    return _build(walk_scenes(paths, progress=progress), settings, workers=workers, progress=progress)


def cached_index(
    cache_dir: str | os.PathLike[str],
    paths: Sequence[Path | str],
    *,
    bands: Sequence[str],
    chip_size: int,
    workers: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> ChipIndex:
    """Read the index of the paths from `cache_dir`, or build it and keep it there where files or settings changed.

    Several processes may call it at once: each reads a complete index or builds the same one.

    Args:
        cache_dir: Made where it is missing.
        paths: As for `build_index`, like all that follow.
        bands: In the order of the channels.
        chip_size: In pixels.
        workers: Threads.
        progress: Show bars.
        **settings: The other settings of `build_index`.

    Raises:
        UserError: As `build_index`.
    """
    band_names = settings.pop("band_names", None)
    checked = _checked_settings(
        IndexSettings(
            bands=tuple(bands),
            chip_size=chip_size,
            band_names=None if band_names is None else tuple(band_names),
            **settings,
        )
    )
    found = walk_scenes(paths, progress=progress)
    key = json.dumps([asdict(checked), sorted(str(Path(path).absolute()) for path in paths)])
    file = Path(cache_dir) / f"chips-{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"
    rebuilt: tuple[str, ...] = ()
    if file.exists():
        try:
            index = ChipIndex.load(file, mend="nothing needs doing")
            if index.fingerprint == _fingerprint(found, checked):
                return index
        except UserError as error:
            rebuilt = (f"rebuilt the chip index: {error}",)
    index = _build(found, checked, workers=workers, progress=progress)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(file.parent)
        index.save(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name another --data.cache") from error
    return replace(index, notes=index.notes + rebuilt)


def _checked_settings(settings: IndexSettings) -> IndexSettings:
    bands = []
    for name in settings.bands:
        if (band := canonical_band(name)) is None:
            raise UserError(f"--data.bands holds {name}, which is no band; {nearest(name, KNOWN_BANDS)}")
        bands.append(band)
    if not bands or len(set(bands)) < len(bands):
        raise UserError(f"--data.bands {' '.join(settings.bands)}: name one band or more, each once")
    if not 1 <= settings.chip_size <= _LARGEST_CHIP:
        raise UserError(f"--data.chip_size {settings.chip_size}: it must lie between 1 and {_LARGEST_CHIP}")
    if settings.statistics_chips < 1:
        raise UserError(f"--data.statistics_chips {settings.statistics_chips}: it must be 1 or more")
    if settings.seed < 0:
        raise UserError(f"--seed {settings.seed}: it must be 0 or more")
    if settings.level is not None and settings.level not in LEVELS:
        raise UserError(f"--data.level {settings.level} is no product level; {nearest(settings.level, LEVELS)}")
    for name in ("min_valid", "max_unreadable"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"--data.{name} {getattr(settings, name)}: a share, it must be from 0 to 1")
    return replace(settings, bands=tuple(bands))


def _build(found: Sequence[FoundScene], settings: IndexSettings, *, workers: int | None, progress: bool) -> ChipIndex:
    fingerprint = _fingerprint(found, settings)  # before the pixels are read: what changes meanwhile shows next time
    common: dict[str, Any] = {
        "bands": settings.bands,
        "chip_size": settings.chip_size,
        "scene_settings": settings.scene_settings,
        "max_unreadable": settings.max_unreadable,
        "workers": workers or min(_MAX_WORKERS, os.cpu_count() or 1),
        "progress": progress,
    }
    scenes, scenes_left_out = describe_scenes(found, **common)
    if not settings.allow_mixed:
        refuse_mixed(scenes)
    chips, statistics, chips_left_out = scan_pixels(
        scenes,
        min_valid=settings.min_valid,
        statistics_chips=settings.statistics_chips,
        seed=settings.seed,
        **common,
    )
    return ChipIndex(
        table=_table(scenes, chips, settings.chip_size),
        settings=settings,
        statistics=statistics,
        scene_count=len(found),
        left_out=(*scenes_left_out, *chips_left_out),
        notes=tuple(_notes(scenes)),
        fingerprint=fingerprint,
    )


def _shared(column: pa.ChunkedArray) -> float | None:
    values = column.unique().to_pylist()
    return float(values[0]) if len(values) == 1 else None


def _notes(scenes: Sequence[SceneRecord]) -> list[str]:
    notes = []
    levels = sorted({scene.level for scene in scenes if scene.level is not None})
    if len(levels) > 1:
        notes.append(f"mixes products {' and '.join(levels)}, as --data.allow_mixed allows")
    return [*notes, *unit_notes(scenes, "scenes")]


def _table(scenes: Sequence[SceneRecord], chips: Chips, chip_size: int) -> pa.Table:
    """The index's columns; what all chips of a scene share is stored once and referred to."""
    left, bottom, right, top = _bounds(scenes, chips, chip_size)

    def by_scene(values: Sequence[object], kind: pa.DataType) -> pa.DictionaryArray:
        return stored_once(pa.array(values, kind)).take(pa.array(chips.scene))

    return pa.table(
        {
            "scene": by_scene([scene.path for scene in scenes], pa.string()),
            "row": chips.row,
            "col": chips.col,
            "crs": by_scene([scene.crs for scene in scenes], pa.string()),
            "left": left,
            "bottom": bottom,
            "right": right,
            "top": top,
            "valid_fraction": chips.valid_fraction,
            "dtype": by_scene([scene.dtype for scene in scenes], pa.string()),
            "level": by_scene([scene.level for scene in scenes], pa.string()),
            "offset": by_scene([scene.offset for scene in scenes], pa.float64()),
            "scale": by_scene([scene.scale for scene in scenes], pa.float64()),
            "nodata": by_scene([scene.nodata for scene in scenes], pa.float64()),
            "date": by_scene([scene.date for scene in scenes], pa.string()),
        }
    )


def _bounds(scenes: Sequence[SceneRecord], chips: Chips, chip_size: int) -> tuple[npt.NDArray[np.float64], ...]:
    """Left, bottom, right, top of each chip: the box around its four corners, also on rotated grids."""
    a, b, c, d, e, f = np.array([scene.transform for scene in scenes])[chips.scene].T
    corners = [(chips.col + i, chips.row + j) for i in (0, chip_size) for j in (0, chip_size)]
    x = np.stack([a * col + b * row + c for col, row in corners])
    y = np.stack([d * col + e * row + f for col, row in corners])
    return x.min(axis=0), y.min(axis=0), x.max(axis=0), y.max(axis=0)


def _fingerprint(found: Sequence[FoundScene], settings: IndexSettings) -> str:
    """Of format, way of reading, settings, and path, size and time of change of every file that tells something."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, READING, asdict(settings)]).encode())
    metadata = (metadata_file(scene.path) for scene in found)
    rasters = [file for scene in found for file in scene.files]
    for file in (*rasters, *side_files(rasters), *(file for file in metadata if file is not None)):
        try:
            status = file.stat()
            line = f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:
            line = f"{file}\0unreadable\n"
        digest.update(os.fsencode(line))  # names need not be UTF-8
    return digest.hexdigest()
