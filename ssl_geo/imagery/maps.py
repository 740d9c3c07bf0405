"""Maps over a scene as Cloud-Optimized GeoTIFF: classes, or other values per pixel; and the ground a pixel covers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError
from ssl_geo.imagery.coordinates import to_lonlat
from ssl_geo.imagery.geotiff import cog_by_rows
from ssl_geo.imagery.pairing import IGNORED, Classes, Colour
from ssl_geo.imagery.scenes import Scene, Transform

WriteRows = Callable[[int, npt.NDArray[Any]], None]

# WGS 84 (NIMA TR8350.2): semi-major axis in metres, first eccentricity.
_AXIS, _ECCENTRICITY = 6_378_137.0, 0.081_819_190_842_622


@contextmanager
def class_map(path: Path, scene: Scene, classes: Classes, tags: Mapping[str, str]) -> Iterator[WriteRows]:
    """Write classes from top to bottom as a GeoTIFF over their image, with the ids of the label rasters as values.

    Nodata is 255, or where that is an id the largest free value of the file's type: uint8, or uint16 or int32 (which
    has no colour table) where the ids need it. Tags ``class_<id>`` hold the names, so that the map is a label raster.

    Args:
        path: As for `cog_by_rows`.
        scene: The image.
        classes: What 0 … C-1 stand for.
        tags: Others to write, for example ``checkpoint``.

    Yields:
        A function that takes the first row and classes (rows, W), 0 … C-1; 255 becomes nodata.
    """
    ids = classes.ids
    dtype, nodata = _map_type(ids)
    values = np.full(IGNORED + 1, nodata, dtype)
    values[: len(ids)] = ids
    with cog_by_rows(
        path,
        (1, scene.height, scene.width),
        dtype,
        crs=scene.crs,
        transform=placed(scene),
        nodata=nodata,
        descriptions=["class"],
        tags={**tags, **{f"class_{value}": name for value, name in zip(ids, classes.names, strict=True)}},
        colormap=dict(zip(ids, classes.colours, strict=True)) if dtype.kind == "u" else None,
        averaged=False,
    ) as write:
        yield lambda row, part: write(row, values[part][None])


def value_map(
    path: Path,
    scene: Scene,
    dtype: npt.DTypeLike,
    *,
    nodata: float,
    descriptions: Sequence[str],
    tags: Mapping[str, str],
    scale: float | None = None,
    reduction: int = 1,
) -> AbstractContextManager[WriteRows]:
    """Write numbers from top to bottom as a GeoTIFF over their image, one channel a description.

    Args:
        path: As for `cog_by_rows`, as all but the next and the last.
        scene: The image.
        dtype: Of the numbers.
        nodata: The declared nodata value.
        descriptions: (C,) of the channels.
        tags: Metadata of the file.
        scale: Declared: value = stored · scale.
        reduction: Pixels of the image per pixel of the map, which may reach over the image's border.
    """
    transform = placed(scene)
    if transform is not None:
        a, b, c, d, e, f = transform
        transform = (a * reduction, b * reduction, c, d * reduction, e * reduction, f)
    return cog_by_rows(
        path,
        (len(descriptions), -(-scene.height // reduction), -(-scene.width // reduction)),
        dtype,
        crs=scene.crs,
        transform=transform,
        nodata=nodata,
        scale=scale,
        descriptions=descriptions,
        tags=tags,
    )


def write_class_map(
    path: str | os.PathLike[str],
    classes: npt.NDArray[np.uint8],
    scene: Scene,
    names: Sequence[str],
    ids: Sequence[int],
    colours: Sequence[Colour],
    tags: Mapping[str, str],
) -> None:
    """Write a whole `class_map`.

    Args:
        path: The file.
        classes: (H, W), 0 … C-1; 255 becomes nodata.
        scene: The image.
        names: (C,) of the classes.
        ids: (C,) values of the classes.
        colours: (C,) of the classes.
        tags: Others to write, for example ``checkpoint``.

    Raises:
        ValueError: If `classes` is not of the scene's shape or holds a value that is no class.
    """
    if classes.shape != (scene.height, scene.width):
        raise ValueError(f"classes {classes.shape} do not fit the image's {scene.height}×{scene.width} pixels")
    if ((classes >= len(ids)) & (classes != IGNORED)).any():
        raise ValueError(f"classes hold a value that is neither {IGNORED} nor below {len(ids)}")
    with class_map(Path(path), scene, Classes(tuple(ids), tuple(names), tuple(colours)), tags) as write:
        write(0, classes)


def placed(scene: Scene) -> Transform | None:
    """The scene's transform, None where it has no georeferencing."""
    return scene.transform if scene.crs is not None or scene.transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0) else None


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def pixel_areas(scene: Scene) -> npt.NDArray[np.float64] | None:
    """Ground that a pixel of each row covers, (H,) in m²; None for a scene without CRS, or with a local one.

    The corners of the pixel in the row's middle are laid into the equal-area cylindrical projection of the WGS 84
    ellipsoid (Snyder 1987, USGS Professional Paper 1395, eq. 3-12 and 10-17 with standard parallel 0), where a
    polygon's area is that on the ground, whatever the CRS. Along a row of a UTM scene 110 km wide the scale differs
    from that of its middle by less than a thousandth. A broken transform gives areas that are 0 or no number.
    """
    if scene.crs is None:
        return None
    rows = np.arange(scene.height + 1.0)
    cols = np.full((2, 1), scene.width // 2) + np.array([[0.0], [1.0]])
    a, b, c, d, e, f = scene.transform
    x, y = a * cols + b * rows + c, d * cols + e * rows + f  # (2, H + 1)
    try:
        points = to_lonlat(scene.crs, x.ravel(), y.ravel())
    except UserError:  # no way leads to the Earth: areas are told in pixels
        return None
    lon, lat = np.radians(points).T.reshape(2, 2, -1)
    sine = _ECCENTRICITY * np.sin(lat)
    q = (1 - _ECCENTRICITY**2) * (np.sin(lat) / (1 - sine**2) - np.log((1 - sine) / (1 + sine)) / (2 * _ECCENTRICITY))
    east, north = _AXIS * lon, _AXIS * q / 2
    corners_x = np.stack([east[0, :-1], east[1, :-1], east[1, 1:], east[0, 1:]])
    corners_y = np.stack([north[0, :-1], north[1, :-1], north[1, 1:], north[0, 1:]])
    corners_x = (corners_x - corners_x[0] + np.pi * _AXIS) % (2 * np.pi * _AXIS) - np.pi * _AXIS  # antimeridian
    corners_y = corners_y - corners_y[0]
    crossed = corners_x * np.roll(corners_y, -1, axis=0) - np.roll(corners_x, -1, axis=0) * corners_y
    areas: npt.NDArray[np.float64] = np.abs(crossed.sum(axis=0)) / 2
    return areas


def other_pixels(scene: Scene, gsd: float | None) -> str | None:
    """What to say of a scene whose pixels are of another size than those of pretraining, of `gsd` metres.

    A quarter is let pass: views of pretraining differ by more.
    """
    size = pixel_size(scene)
    if gsd is None or size is None or abs(size / gsd - 1) <= 0.25:
        return None
    return f"{scene.path} has pixels of {size:.3g} m, the backbone was pretrained on {gsd:.3g} m: gdalwarp -tr mends it"


def pixel_size(scene: Scene) -> float | None:
    """Side in metres of a square as large as the pixel in the scene's middle; None where there is no such."""
    a, b, c, d, e, f = scene.transform
    middle = scene.height // 2
    areas = pixel_areas(replace(scene, height=1, transform=(a, b, c + b * middle, d, e, f + e * middle)))
    return None if areas is None or not 0 < areas[0] < np.inf else float(np.sqrt(areas[0]))


def _map_type(ids: Sequence[int]) -> tuple[np.dtype[Any], int]:
    """The smallest type that holds the ids and a value beside them, and that value."""
    for dtype in (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int32), np.dtype(np.int64)):
        limits = np.iinfo(dtype)
        if min(ids) >= limits.min and max(ids) <= limits.max:
            free = next((value for value in range(int(limits.max), int(limits.min) - 1, -1) if value not in ids), None)
            if free is not None:
                return dtype, free
    raise ValueError(f"ids {min(ids)} to {max(ids)} fit no type")
