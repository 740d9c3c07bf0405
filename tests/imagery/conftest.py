"""A small world of GeoTIFFs: stacks and band folders of random DN on UTM grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_geo.imagery.rasters import write_geotiff

CRS = "EPSG:32633"
ORIGIN = (400_000.0, 5_300_000.0)
RATIOS = {"B02": 1, "B03": 1, "B04": 1, "B08": 1, "B05": 2, "B8A": 2, "B11": 2, "B01": 6}


def transform(ratio: int = 1) -> tuple[float, ...]:
    return (10.0 * ratio, 0.0, ORIGIN[0], 0.0, -10.0 * ratio, ORIGIN[1])


WriteStack = Callable[..., np.ndarray]
WriteFolder = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def write_stack() -> WriteStack:
    """Write a stacked GeoTIFF of random DN (or a given array) and return its array."""

    def write(
        path: Path,
        bands: Sequence[str] | None = ("B02", "B03", "B04"),
        shape: tuple[int, int] = (32, 40),
        *,
        array: np.ndarray | None = None,
        count: int | None = None,
        dtype: str = "uint16",
        seed: int = 0,
        **options: Any,
    ) -> np.ndarray:
        if array is None:
            channels = count if bands is None else len(bands)
            assert channels is not None
            array = np.random.default_rng(seed).integers(1, 10_000, (channels, *shape)).astype(dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"crs": CRS, "transform": transform(), "descriptions": bands, **options}
        write_geotiff(path, array, **settings)
        return array

    return write


@pytest.fixture(scope="session")
def write_band_folder(write_stack: WriteStack) -> WriteFolder:
    """Write one GeoTIFF per band at its own resolution and return the stored arrays by band."""

    def write(
        folder: Path,
        prefix: str = "",
        size: int = 60,
        bands: Sequence[str] = tuple(RATIOS),
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        stored = {}
        for i, band in enumerate(bands):
            ratio = RATIOS[band]
            shape = (size // ratio, size // ratio)
            stored[band] = write_stack(
                folder / f"{prefix}{band}.tif",
                None,
                shape,
                count=1,
                seed=seed + i,
                transform=transform(ratio),
                descriptions=None,
            )[0]
        return stored

    return write
