"""What is written is read back, whole or as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssl_geo.imagery.geotiff import write_geotiff

UTM = "EPSG:32633"
GRID = (10.0, 0.0, 400_000.0, 0.0, -10.0, 5_300_000.0)


@settings(max_examples=20)
@given(
    st.sampled_from(["uint8", "uint16", "int16", "int32", "float32", "float64"]),
    st.integers(1, 4),
    st.integers(1, 140),
    st.integers(1, 140),
)
@example("uint8", 1, 1, 128)
def test_what_is_written_is_read_back(dtype: str, channels: int, height: int, width: int) -> None:
    array = np.random.default_rng(height).integers(0, 100, (channels, height, width)).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tif"
        write_geotiff(path, array, crs=UTM, transform=GRID, nodata=3, tags={"MADE_BY": "test"})
        with rasterio.open(path) as dataset:
            np.testing.assert_array_equal(dataset.read(), array)
            assert (dataset.crs.to_string(), tuple(dataset.transform)[:6], dataset.nodata) == (UTM, GRID, 3)
            assert dataset.tags()["MADE_BY"] == "test"
            # rasterio's profile calls a file that is as wide as its tiles not tiled.
            assert dataset.block_shapes == [(128, 128)] * channels
            assert dataset.profile["compress"] == "deflate"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(1, 100, (3, 20, 30)).astype(np.uint16)
    write_geotiff(tmp_path / "x.tif", array, crs=UTM, transform=GRID)
    with pytest.raises(rasterio.errors.CRSError):
        write_geotiff(tmp_path / "x.tif", array, crs="EPSG:99999999", transform=GRID)
    with pytest.raises(ValueError, match="descriptions"):
        write_geotiff(tmp_path / "x.tif", array, crs=UTM, transform=GRID, descriptions=["B02"])
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        write_geotiff(tmp_path / "x.tif", array[0], crs=UTM, transform=GRID)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tif"]
    with rasterio.open(tmp_path / "x.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(), array)
