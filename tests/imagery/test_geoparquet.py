"""Chips as GeoParquet: metadata by the specification, geometry where the chips are."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ssl_geo.errors import UserError
from ssl_geo.imagery.coordinates import to_lonlat
from ssl_geo.imagery.geoparquet import write_chips
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.rasters import Scene, open_scene

GRID = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_300_000.0)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    path = tmp_path / "S2A_MSIL2A_20180611T103021_N0208_R108_T33UUP.tif"
    write_geotiff(path, np.ones((1, 50, 70), np.uint16), descriptions=["B04"], crs="EPSG:32633", transform=GRID)
    return open_scene(path)


def written(path: Path, scene: Scene) -> tuple[dict, list[dict], np.ndarray]:
    row, col = np.array([0, 0, 18]), np.array([0, 32, 38])
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    write_chips(path, scene, row, col, 32, np.array([1.0, 0.5, 1.0]), vectors, {"head": "x"})
    table = pq.read_table(path)
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), vectors)
    assert table.schema.metadata[b"head"] == b"x"
    return json.loads(table.schema.metadata[b"geo"]), table.to_pylist(), vectors


def ring(binary: bytes) -> np.ndarray:
    """Points (5, 2) of a polygon in well-known binary, read as the standard has it."""
    order, kind, rings, points = struct.unpack_from("<BIII", binary)
    assert (order, kind, rings, points, len(binary)) == (1, 3, 1, 5, 93)
    return np.array(struct.unpack_from("<10d", binary, 13)).reshape(5, 2)


def test_outlines_are_where_the_chips_are(scene: Scene, tmp_path: Path) -> None:
    geo, rows, _ = written(tmp_path / "chips.parquet", scene)
    assert geo["version"] == "1.1.0"
    column = geo["columns"][geo["primary_column"]]
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert "crs" not in column  # OGC:CRS84
    rings = np.stack([ring(row["geometry"]) for row in rows])
    corners = to_lonlat("EPSG:32633", [500_380.0, 500_700.0], [5_299_820.0, 5_299_500.0])
    np.testing.assert_allclose([rings[2, :, 0].min(), rings[2, :, 1].max()], corners[0], atol=1e-5)
    np.testing.assert_allclose([rings[2, :, 0].max(), rings[2, :, 1].min()], corners[1], atol=1e-5)
    np.testing.assert_array_equal(rings[:, 0], rings[:, 4])
    x, y = rings[:, :, 0], rings[:, :, 1]
    assert ((x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]).sum(axis=1) > 0).all()  # counterclockwise
    assert column["bbox"] == [x.min(), y.min(), x.max(), y.max()]
    assert [(row["row"], row["col"], row["date"]) for row in rows][2] == (18, 38, "2018-06-11")
    assert rows[1]["valid_fraction"] == 0.5


def test_a_scene_without_crs_says_so(scene: Scene, tmp_path: Path) -> None:
    plain = dataclasses.replace(scene, crs=None, transform=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    geo, _, _ = written(tmp_path / "chips.parquet", plain)
    assert geo["columns"]["geometry"]["crs"] is None
    assert geo["columns"]["geometry"]["bbox"] == [0, 0, 70, 50]


def test_a_chip_over_the_antimeridian_is_in_one_piece(scene: Scene, tmp_path: Path) -> None:
    far = dataclasses.replace(scene, crs="EPSG:4326", transform=(0.01, 0.0, 179.8, 0.0, -0.01, 10.0))
    _, rows, _ = written(tmp_path / "chips.parquet", far)
    for row in rows:
        assert np.ptp(ring(row["geometry"])[:, 0]) == pytest.approx(0.32)


def test_a_folder_that_is_not_there_is_one_line(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        written(tmp_path / "absent" / "chips.parquet", scene)
