"""The archive that benchmarks read: chips of ten bands and 120 pixels, as BigEarthNet's, a GeoTIFF or folder each."""

from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from ssl_geo.imagery.rasters import write_geotiff
from ssl_geo.imagery.sensors import DEFAULT_BANDS

BANDS, SIDE = tuple(DEFAULT_BANDS), 120
COARSE = {"B05", "B06", "B07", "B8A", "B11", "B12"}  # 20 m


def write_stacks(folder: Path, chips: int) -> Path:
    """One deflated GeoTIFF a chip: land of a few kinds with texture and sensor noise, uint16."""
    folder.mkdir(parents=True)
    for number in range(chips):
        write_geotiff(folder / f"{number:05}.tif", land(number), descriptions=BANDS, nodata=0, **grid(number, 10))
    return folder


def write_folders(folder: Path, chips: int) -> Path:
    """The same chips with a folder each, and in it a GeoTIFF a band at its own 10 or 20 m."""
    for number in range(chips):
        (folder / f"{number:05}").mkdir(parents=True)
        for band, dn in zip(BANDS, land(number), strict=True):
            step = 2 if band in COARSE else 1
            file = folder / f"{number:05}" / f"{number:05}_{band}.tif"
            write_geotiff(file, dn[None, ::step, ::step], nodata=0, **grid(number, 10 * step))
    return folder


def land(number: int) -> np.ndarray:
    """DN (10, 120, 120) of a chip; coarser bands are of pixels twice as wide."""
    rng = np.random.default_rng(number)
    kinds = gaussian_filter(rng.normal(size=(4, SIDE, SIDE)), (0, 6, 6)).argmax(axis=0)
    spectra = rng.gamma(4, 500, (len(BANDS), 4))
    texture = gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1.5) * 600
    dn = spectra[:, kinds] + texture + rng.normal(0, 25, (len(BANDS), SIDE, SIDE))
    for channel, band in enumerate(BANDS):
        if band in COARSE:
            dn[channel] = dn[channel, ::2, ::2].repeat(2, axis=0).repeat(2, axis=1)
    return dn.clip(1, 20_000).astype(np.uint16)


def grid(number: int, pixel: int) -> dict[str, object]:
    """UTM, next to each other."""
    return {"crs": "EPSG:32632", "transform": (pixel, 0, 4e5 + 1200 * number, 0, -pixel, 5.4e6)}
