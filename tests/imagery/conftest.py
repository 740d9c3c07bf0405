"""A small world of GeoTIFFs: stacks and band folders of random DN on UTM grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from ssl_geo.imagery.geotiff import write_geotiff

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


# Reflectance of water, leaves, soil and concrete in the twelve bands of L2A, of the usual magnitudes.
_LAND_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
_LAND = np.array(
    [
        (0.030, 0.032, 0.035, 0.022, 0.017, 0.013, 0.012, 0.011, 0.010, 0.008, 0.006, 0.005),
        (0.020, 0.026, 0.052, 0.029, 0.085, 0.260, 0.340, 0.355, 0.375, 0.370, 0.175, 0.080),
        (0.055, 0.072, 0.100, 0.125, 0.145, 0.165, 0.178, 0.192, 0.208, 0.215, 0.270, 0.235),
        (0.120, 0.145, 0.178, 0.200, 0.214, 0.225, 0.230, 0.242, 0.247, 0.252, 0.278, 0.255),
    ]
)

Land = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def land() -> Land:
    """DN (C, H, W) of land: patches of four surfaces, mixed at their borders, with noise."""

    def make(seed: int = 0, shape: tuple[int, int] = (96, 96), *, bands: Sequence[str] = _LAND_BANDS) -> np.ndarray:
        rng = np.random.default_rng(seed)
        heights = ndimage.gaussian_filter(rng.standard_normal((4, *shape)), (0, 6, 6))
        weights = np.exp(40 * heights)
        weights /= weights.sum(axis=0)
        spectra = _LAND[:, [_LAND_BANDS.index(band) for band in bands]]
        reflectance = np.einsum("khw,kc->chw", weights, spectra)
        reflectance *= 1 + 0.1 * ndimage.gaussian_filter(rng.standard_normal(shape), 1)
        reflectance += 0.002 * rng.standard_normal(reflectance.shape)
        return (10_000 * reflectance).clip(1, 20_000).astype(np.uint16)

    return make
