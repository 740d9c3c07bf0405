"""Chips with their embeddings as GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_geo.errors import UserError
from ssl_geo.files import written_whole
from ssl_geo.imagery.coordinates import to_lonlat
from ssl_geo.imagery.scenes import Scene

# Well-known binary of a polygon with one ring of five points, little-endian (OGC 06-103r4, 8.2.4).
_POLYGON = np.dtype([("order", "u1"), ("type", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))])


def write_chips(
    path: Path,
    scene: Scene,
    row: npt.NDArray[np.integer],
    col: npt.NDArray[np.integer],
    size: int,
    valid_fraction: npt.NDArray[np.floating],
    embeddings: npt.NDArray[np.float32],
    tags: Mapping[str, str],
) -> None:
    """Write one row a chip: scene, date, row, col, valid_fraction, embedding (D numbers), geometry.

    The geometry is the chip's outline in longitude and latitude (OGC:CRS84), so that files of scenes in several CRSs go
    together; for a scene without CRS it is in the coordinates of its transform, and the file says so.

    Args:
        path: The file to write.
        scene: That the chips are of.
        row: (N,) first row of each.
        col: (N,) first column of each.
        size: Side in pixels; a chip ends where its scene does.
        valid_fraction: (N,) share of usable pixels.
        embeddings: (N, D).
        tags: Metadata of the file.

    Raises:
        UserError: If it cannot be written.
    """
    number, dimensions = embeddings.shape
    rings = _outlines(scene, row, col, size)
    polygons = np.zeros(number, _POLYGON)
    polygons["order"], polygons["type"], polygons["rings"], polygons["points"] = 1, 3, 1, 5
    polygons["xy"] = rings
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel(), pa.float32()), dimensions)
    table = pa.table(
        {
            "scene": pa.array([scene.path] * number, pa.string()),
            "date": pa.array([scene.date] * number, pa.string()),
            "row": pa.array(row, pa.int32()),
            "col": pa.array(col, pa.int32()),
            "valid_fraction": pa.array(valid_fraction, pa.float32()),
            "embedding": vectors,
            "geometry": pa.array([polygon.tobytes() for polygon in polygons], pa.binary()),
        }
    )
    geometry: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"], "orientation": "counterclockwise"}
    if number:
        geometry["bbox"] = [*rings.min(axis=(0, 1)).tolist(), *rings.max(axis=(0, 1)).tolist()]
    if scene.crs is None:
        geometry["crs"] = None  # unknown; without the key it would be OGC:CRS84
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    try:
        with written_whole(path) as partial:
            pq.write_table(table.replace_schema_metadata({**tags, "geo": json.dumps(geo)}), partial, compression="zstd")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} could not be written ({error}); make room, or name another --out") from error


def _outlines(
    scene: Scene, row: npt.NDArray[np.integer], col: npt.NDArray[np.integer], size: int
) -> npt.NDArray[np.float64]:
    """Closed rings (N, 5, 2), counterclockwise."""
    bottom, right = np.minimum(row + size, scene.height), np.minimum(col + size, scene.width)
    cols = np.stack([col, col, right, right], axis=1).astype(np.float64)
    rows = np.stack([row, bottom, bottom, row], axis=1).astype(np.float64)
    a, b, c, d, e, f = scene.transform
    points = np.stack([a * cols + b * rows + c, d * cols + e * rows + f], axis=-1)
    if scene.crs is not None and len(points):
        points = to_lonlat(scene.crs, points[..., 0].ravel(), points[..., 1].ravel()).reshape(-1, 4, 2)
        east = points[..., 0] - points[:, :1, 0]
        points[..., 0] = points[:, :1, 0] + (east + 180) % 360 - 180  # over the antimeridian in one piece
    x, y = points[..., 0], points[..., 1]
    area = (x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(axis=1)
    points[area < 0] = points[area < 0, ::-1]
    return np.concatenate([points, points[:, :1]], axis=1)
