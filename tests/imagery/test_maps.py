"""The ground that pixels cover, against known areas; values written over an image."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import rasterio

from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.maps import other_pixels, pixel_areas, pixel_size, value_map
from ssl_geo.imagery.rasters import Scene, open_scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    path = tmp_path / "scene.tif"
    grid = {"crs": "EPSG:32633", "transform": (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_300_000.0)}
    write_geotiff(path, np.ones((1, 50, 70), np.uint16), descriptions=["B04"], **grid)
    return open_scene(path)


def test_a_utm_pixel_on_the_central_meridian_is_larger_than_its_square(scene: Scene) -> None:
    areas = pixel_areas(scene)
    assert areas is not None
    assert areas.shape == (50,)
    np.testing.assert_allclose(areas, 100 / 0.9996**2, rtol=2e-5)  # the scale there is 0.9996


def test_pixels_of_another_size_than_pretrainings_are_said(scene: Scene) -> None:
    """Scenes of 20 m were once mapped with a head of 10 m without a word."""
    a, b, c, d, e, f = scene.transform
    coarse = dataclasses.replace(scene, transform=(2 * a, b, c, d, 2 * e, f))
    assert pixel_size(coarse) == pytest.approx(20 / 0.9996, rel=1e-4)
    line = other_pixels(coarse, 10.0)
    assert line is not None
    assert "has pixels of 20 m, the backbone was pretrained on 10 m: gdalwarp -tr" in line
    assert other_pixels(scene, 10.0) is other_pixels(coarse, None) is None
    assert other_pixels(dataclasses.replace(scene, crs=None), 20.0) is None


def test_a_local_grid_has_no_areas(scene: Scene) -> None:
    """Its error came after the map, which then stood without its JSON."""
    assert pixel_areas(dataclasses.replace(scene, crs='LOCAL_CS["site grid",UNIT["metre",1]]')) is None


def test_degrees_cover_the_whole_ellipsoid(scene: Scene) -> None:
    whole = dataclasses.replace(
        scene, crs="EPSG:4326", transform=(1.0, 0, -180.0, 0, -1.0, 90.0), height=180, width=360
    )
    areas = pixel_areas(whole)
    assert areas is not None
    assert math.isclose(areas.sum() * 360, 510_065_621.7e6, rel_tol=1e-6)  # surface of WGS 84
    np.testing.assert_allclose(areas, areas[::-1])
    # 1° of latitude by 1° of longitude at the equator: 110.574 km by 111.320 km
    assert math.isclose(areas[90], 110_574 * 111_320, rel_tol=1e-3)


@pytest.mark.parametrize("lon", [179.9999, -180.0, 13.0])
def test_the_projection_does_not_matter(scene: Scene, lon: float) -> None:
    mercator = dataclasses.replace(
        scene, crs="EPSG:3857", transform=(10.0, 0, lon * 111_319.49079327358, 0, -10.0, 8_399_737.9), width=2
    )
    areas = pixel_areas(mercator)
    assert areas is not None
    np.testing.assert_allclose(areas, 100 * math.cos(math.radians(60)) ** 2, rtol=0.01)  # sphere against ellipsoid


def test_without_crs_there_is_no_ground(scene: Scene) -> None:
    assert pixel_areas(dataclasses.replace(scene, crs=None)) is None


def test_values_on_a_coarser_grid_lie_over_their_pixels(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "values.tif"
    values = np.random.default_rng(0).normal(size=(2, 13, 18)).astype(np.float32)
    with value_map(
        path, scene, np.float32, nodata=math.nan, descriptions=["a", "b"], tags={"x": "y"}, reduction=4
    ) as write:
        write(0, values[:, :5])
        write(5, values[:, 5:])
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(), values)
        assert tuple(dataset.transform)[:6] == (40.0, 0.0, 500_000.0, 0.0, -40.0, 5_300_000.0)
        assert dataset.descriptions == ("a", "b")
        assert dataset.tags()["x"] == "y"
        assert math.isnan(dataset.nodata)
