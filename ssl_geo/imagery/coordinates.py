"""Coordinate reference systems: their names, longitude and latitude, and labels brought from one grid to another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import CRSError
from rasterio.warp import transform as transform_points

from ssl_geo.errors import UserError
from ssl_geo.imagery.gdal import FAILURES

_CRS_NAME = re.compile(r"[A-Za-z]+:\w+$|[A-Za-z_]+\s*\[")


@lru_cache(maxsize=256)
def crs_name(wkt: str) -> str:
    """``EPSG:…`` where the registry knows the CRS, else its WKT; empty for none."""
    return rasterio.CRS.from_wkt(wkt).to_string() if wkt else ""


def crs_of(name: str) -> rasterio.CRS:
    """The CRS of a name that `crs_name` gave.

    An index or a head may have been changed: rasterio alone would open what is an address or a file.

    Raises:
        UserError: If it is no code of a registry and no WKT.
    """
    if not _CRS_NAME.match(name):
        raise UserError(f"CRS {name[:40]!r} is neither a code such as EPSG:32633 nor WKT; fix the georeferencing")
    try:
        return rasterio.CRS.from_user_input(name)
    except CRSError as error:
        raise UserError(f"CRS {name[:40]!r} is not known ({error}); fix the georeferencing") from error


def same_crs(one: str | None, other: str | None) -> bool:
    """Whether two coordinate reference systems are the same, however they are written; None equals only None."""
    if one is None or other is None or one == other:
        return one == other
    return bool(crs_of(one) == crs_of(other))


def in_metres(name: str | None) -> bool:
    """Whether coordinates are metres on a projection."""
    crs = crs_of(name) if name else None
    return crs is not None and crs.is_projected and crs.linear_units_factor[1] == 1.0


def to_lonlat(crs: str, x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Longitude and latitude (WGS 84) of points, in degrees.

    Args:
        crs: Of the points.
        x: (N,) in the unit of `crs`.
        y: (N,).

    Returns:
        (N, 2).

    Raises:
        UserError: If the CRS has no way to longitude and latitude (a local one).
    """
    try:
        with rasterio.Env():
            lon, lat = transform_points(crs_of(crs), "EPSG:4326", np.asarray(x).tolist(), np.asarray(y).tolist())
    except (*FAILURES, CRSError) as error:
        raise UserError(f"no longitude and latitude in CRS {crs[:40]} ({error}); mend the image's CRS") from error
    return np.stack([lon, lat], axis=1).astype(np.float64)


def warp_labels(
    labels: npt.NDArray[np.integer[Any]],
    *,
    crs: str,
    transform: Sequence[float],
    to_crs: str,
    to_transform: Sequence[float],
    to_shape: tuple[int, int],
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.bool_]]:
    """Bring labels to another grid: each of its pixels takes the label in which its centre lies (nearest neighbour).

    Coordinates are transformed on a lattice of 16 pixels and interpolated between: over 160 m the curvature of a
    projection is below 0.001 m, while the approximation in rasterio's `reproject` is an eighth of a pixel off.

    Args:
        labels: (h, w) ids.
        crs: Of the labels, as the next.
        transform: As in `Scene`.
        to_crs: Of the grid to fill, as the next two.
        to_transform: As in `Scene`.
        to_shape: (H, W).

    Returns:
        labels (H, W), and inside (H, W): False where the given ones do not reach; the labels are 0 there.

    Raises:
        UserError: If no way leads from one CRS to the other.
    """
    height, width = to_shape
    step = 16
    cols, rows = np.meshgrid(np.arange(0.0, width + step, step), np.arange(0.0, height + step, step))
    a, b, c, d, e, f = to_transform
    x, y = a * cols + b * rows + c, d * cols + e * rows + f
    try:
        with rasterio.Env():
            xs, ys = transform_points(crs_of(to_crs), crs_of(crs), x.ravel().tolist(), y.ravel().tolist())
    except (*FAILURES, CRSError) as error:
        raise UserError(f"cannot warp labels from CRS {crs[:40]} to {to_crs[:40]}: {error}") from error
    a, b, c, d, e, f = transform
    around = b == d == 0 and crs_of(crs).is_geographic
    if around:  # across the antimeridian longitudes go on beyond 180 degrees
        xs = np.unwrap(np.unwrap(np.reshape(xs, x.shape), period=360, axis=0), period=360, axis=1).ravel()
    pixels = np.linalg.solve([[a, b], [d, e]], np.stack([np.array(xs) - c, np.array(ys) - f]))
    lattice = pixels.reshape(2, *x.shape)  # columns and rows of the given labels
    part, position = np.modf((np.arange(width) + 0.5) / step)
    left = position.astype(np.intp)
    across = lattice[..., left] * (1 - part) + lattice[..., left + 1] * part  # (2, knots, width)
    warped = np.zeros(to_shape, labels.dtype)
    inside = np.zeros(to_shape, np.bool_)
    for knot, top in enumerate(range(0, height, step)):
        bottom = min(top + step, height)
        down = ((np.arange(bottom - top) + 0.5) / step)[:, None]
        col, row = across[:, knot, None] * (1 - down) + across[:, knot + 1, None] * down
        if around:
            col %= 360 / abs(a)
        inside[top:bottom] = within = (col >= 0) & (col < labels.shape[1]) & (row >= 0) & (row < labels.shape[0])
        warped[top:bottom][within] = labels[row[within].astype(np.intp), col[within].astype(np.intp)]
    return warped, inside
