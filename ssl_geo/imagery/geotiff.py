"""GeoTIFFs, written: whole arrays, or Cloud-Optimized ones row by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
from rasterio.windows import Window

from ssl_geo.errors import UserError
from ssl_geo.files import partial_path, remove_stale, written_whole
from ssl_geo.imagery.gdal import BLOCK_CACHE, FAILURES, ungeoreferenced_allowed

COG_BLOCK = 256
"""Side of the blocks of a Cloud-Optimized GeoTIFF; smaller ones than a block get no overviews."""


def write_geotiff(
    path: str | os.PathLike[str],
    array: npt.NDArray[Any],
    *,
    crs: str | None,
    transform: Sequence[float] | None,
    nodata: float | None = None,
    descriptions: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    colormap: Mapping[int, tuple[int, int, int]] | None = None,
) -> None:
    """Write a tiled, deflated GeoTIFF; it appears under its name only when it is complete.

    Args:
        path: The file to write; an existing one is replaced. Its folder must exist.
        array: (C, H, W), any real type GDAL stores.
        crs: The coordinate reference system, for example ``"EPSG:32633"``; None leaves the file without one.
        transform: Six numbers (a, b, c, d, e, f) with x = a·col + b·row + c and y = d·col + e·row + f, or an
            `affine.Affine`; None leaves the file without georeferencing.
        nodata: The declared nodata value.
        descriptions: One description (band name) per channel.
        tags: Metadata of the file.
        colormap: Colours (red, green, blue) by value, for one-channel label rasters of 8 or 16 bit.

    Raises:
        ValueError: If `array` has not three axes or the descriptions do not fit it.
    """
    if array.ndim != 3:
        raise ValueError(f"array must be (C, H, W), got shape {array.shape}")
    if descriptions is not None and len(descriptions) != len(array):
        raise ValueError(f"{len(descriptions)} descriptions for {len(array)} channels")
    path = Path(path)
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": array.shape[0],
        "height": array.shape[1],
        "width": array.shape[2],
        "dtype": array.dtype,
        "crs": crs,
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 128,
        "blockysize": 128,
        "interleave": "band",
        "compress": "deflate",
        # 2: difference of integers, 3: of floating-point numbers (TIFF Technical Note 3)
        "predictor": 3 if array.dtype.kind == "f" else 2,
        "bigtiff": "if_safer",
    }
    if transform is not None:
        profile["transform"] = rasterio.Affine(*tuple(transform)[:6])
    with (
        written_whole(path) as partial,
        ungeoreferenced_allowed(),
        rasterio.open(partial, "w", **profile) as dataset,
    ):
        _describe(dataset, descriptions, tags, colormap)
        dataset.write(array)  # last, so that the directory stands before the pixels


@contextmanager
def cog_by_rows(
    path: Path,
    shape: tuple[int, int, int],
    dtype: npt.DTypeLike,
    *,
    crs: str | None,
    transform: Sequence[float] | None,
    nodata: float | None = None,
    scale: float | None = None,
    descriptions: Sequence[str] | None = None,
    tags: Mapping[str, str] | None = None,
    colormap: Mapping[int, tuple[int, int, int]] | None = None,
    averaged: bool = True,
) -> Iterator[Callable[[int, npt.NDArray[Any]], None]]:
    """Write a Cloud-Optimized GeoTIFF from top to bottom; it appears under its name only when it is complete.

    Rows go to an uncompressed file beside it; GDAL's COG driver then makes overviews, compresses and orders it
    (https://gdal.org/en/stable/drivers/raster/cog.html).

    Args:
        path: The file to write. Its folder must exist.
        shape: (C, H, W).
        dtype: Any real type GDAL stores.
        crs: As for `write_geotiff`, as the next two.
        transform: Six numbers.
        nodata: The declared nodata value.
        scale: Declared: value = stored · scale.
        descriptions: One description (band name) per channel.
        tags: Metadata of the file.
        colormap: Colours (red, green, blue) by value, for one channel of 8 or 16 bit.
        averaged: Overviews hold means; False: the most frequent value, for classes.

    Yields:
        A function that takes the first row and values (C, rows, W).

    Raises:
        UserError: If it cannot be written.
    """
    count, height, width = shape
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": np.dtype(dtype),
        "crs": crs,
        "nodata": nodata,
        "interleave": "band",
        "bigtiff": "if_safer",
    }
    if transform is not None:
        profile["transform"] = rasterio.Affine(*tuple(transform)[:6])
    remove_stale(path.parent)  # the rows of a map are as large as the map, uncompressed
    rows = partial_path(path.with_suffix(".rows"))
    creation = {
        "driver": "COG",
        "compress": "deflate",
        "predictor": "yes",
        "blocksize": COG_BLOCK,
        "bigtiff": "if_safer",
        "overview_resampling": "average" if averaged else "mode",
        "num_threads": "all_cpus",
    }
    try:
        with written_whole(path) as partial, ungeoreferenced_allowed(), rasterio.Env(**BLOCK_CACHE):
            with rasterio.open(rows, "w", **profile) as dataset:
                if scale is not None:
                    dataset.scales = (scale,) * count
                _describe(dataset, descriptions, tags, colormap)

                def write(row: int, values: npt.NDArray[Any]) -> None:
                    dataset.write(values, window=Window(0, row, width, values.shape[1]))

                yield write
            rasterio.shutil.copy(rows, partial, **creation)
    except FAILURES as error:
        raise UserError(f"{path} could not be written ({error}); make room, or name another --out") from error
    finally:
        rows.unlink(missing_ok=True)


def read_tags(path: Path) -> dict[str, str]:
    """Metadata of a GeoTIFF; none where the file is no readable one."""
    try:
        with (
            ungeoreferenced_allowed(),
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
            rasterio.open(path, driver="GTiff") as dataset,
        ):
            return dict(dataset.tags())
    except FAILURES:
        return {}


def _describe(
    dataset: rasterio.io.DatasetWriter,
    descriptions: Sequence[str] | None,
    tags: Mapping[str, str] | None,
    colormap: Mapping[int, tuple[int, int, int]] | None,
) -> None:
    if descriptions is not None:
        dataset.descriptions = tuple(descriptions)
    if tags:
        dataset.update_tags(**tags)
    if colormap is not None:
        dataset.write_colormap(1, {value: (*colour, 255) for value, colour in colormap.items()})
