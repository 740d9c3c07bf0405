"""Coordinate reference systems are told apart, and labels brought from one to another without an error."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import rasterio.warp

from ssl_geo.errors import UserError
from ssl_geo.imagery.coordinates import same_crs, to_lonlat, warp_labels

CRS = "EPSG:32633"
GRID = (10.0, 0.0, 400_000.0, 0.0, -10.0, 5_300_000.0)


def test_one_crs_written_in_two_ways_is_one() -> None:
    assert same_crs(CRS, rasterio.CRS.from_epsg(32633).to_wkt())
    assert not same_crs(CRS, rasterio.CRS.from_epsg(32634).to_wkt())
    assert not same_crs(CRS, None)
    assert same_crs(None, None)


def test_a_local_crs_is_one_line() -> None:
    local = rasterio.CRS.from_wkt('LOCAL_CS["site grid",UNIT["metre",1]]').to_wkt()
    with pytest.raises(UserError, match="no longitude and latitude in CRS"):
        to_lonlat(local, [0.0], [0.0])
    grid = {"transform": GRID, "to_crs": CRS, "to_transform": GRID, "to_shape": (4, 4)}
    with pytest.raises(UserError, match="cannot warp labels from CRS"):
        warp_labels(np.zeros((4, 4), np.uint8), crs=local, **grid)


def test_warping_is_exact_over_a_whole_scene() -> None:
    """Over 110 km, where an approximated transformation is up to an eighth of a pixel off."""
    size = 550
    labels = np.random.default_rng(0).integers(0, 9, (900, 900)).astype(np.uint8)
    x, y = rasterio.warp.transform(CRS, "EPSG:32632", [GRID[2] + 55_000], [GRID[5] - 55_000])
    transform = (200.0, 0.0, x[0] - 90_000, 0.0, -200.0, y[0] + 90_000)
    to_transform = (200.0, 0.0, GRID[2], 0.0, -200.0, GRID[5])
    warped, inside = warp_labels(
        labels, crs="EPSG:32632", transform=transform, to_crs=CRS, to_transform=to_transform, to_shape=(size, size)
    )
    rows, cols = np.mgrid[:size, :size] + 0.5
    xs, ys = rasterio.warp.transform(
        CRS, "EPSG:32632", (GRID[2] + 200 * cols).ravel().tolist(), (GRID[5] - 200 * rows).ravel().tolist()
    )
    col, row = (np.array(xs) - transform[2]) / 200, (transform[5] - np.array(ys)) / 200
    expected = labels[row.astype(int), col.astype(int)].reshape(size, size)
    assert inside.all()
    edge = np.abs(np.stack([col, row]) - np.round(np.stack([col, row]))).min(axis=0).reshape(size, size)
    assert (edge > 0.01).mean() > 0.9
    np.testing.assert_array_equal(warped[edge > 0.01], expected[edge > 0.01])  # pixels of 200 m: 20 times the error


@pytest.mark.parametrize("left", [-180.0, 179.0], ids=["the whole world", "a strip across"])
def test_labels_are_found_across_the_antimeridian(left: float) -> None:
    """Between +180 and -180 the lattice once went around the world: a sixth of the columns had labels from there."""
    width = 1440 if left == -180 else 8
    labels = np.tile(np.arange(width, dtype=np.int16), (720, 1))
    to_transform = (10.0, 0.0, 833_000.0, 0.0, -10.0, 100_000.0)  # UTM 60N, 180 degrees east lie at 833,978 m
    size = 400
    warped, inside = warp_labels(
        labels,
        crs="EPSG:4326",
        transform=(0.25, 0.0, left, 0.0, -0.25, 90.0),
        to_crs="EPSG:32660",
        to_transform=to_transform,
        to_shape=(size, size),
    )
    cols = np.arange(size) + 0.5
    lonlat = to_lonlat("EPSG:32660", 833_000 + 10 * cols, np.full(size, 100_000 - 2000.0))
    assert lonlat[0, 0] > 179
    assert lonlat[-1, 0] < -179
    expected = ((lonlat[:, 0] - left) % 360 / 0.25).astype(int)
    assert inside.all()
    np.testing.assert_array_equal(warped[200], expected)
    assert len(set(expected)) == 2
