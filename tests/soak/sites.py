"""Small clips around sites of bark-beetle damage, as people cut them: ``python tests/soak/sites.py FOLDER``.

FOLDER/images holds 20 GeoTIFFs of 33 to 260 pixels, ten bands, uint16 of reflectance · 10000 that no tag or name says;
every third names no band. Every second one lies in FOLDER/images/labelled and has its damage in FOLDER/labels.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from ssl_geo.imagery.geotiff import write_geotiff

BANDS = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
"""The order of all files, of those that name none too."""

# Reflectance of spruce, of what the beetle left of it, and of meadow.
_SPECTRA = np.array(
    [
        [0.020, 0.034, 0.024, 0.060, 0.155, 0.190, 0.205, 0.220, 0.105, 0.050],
        [0.045, 0.058, 0.070, 0.098, 0.135, 0.155, 0.165, 0.180, 0.200, 0.130],
        [0.035, 0.070, 0.045, 0.110, 0.270, 0.330, 0.350, 0.365, 0.220, 0.115],
    ]
)
_COARSE = [BANDS.index(band) for band in ("B05", "B06", "B07", "B8A", "B11", "B12")]  # pixels of 20 m
_COLOURS = {0: (40, 100, 60), 1: (200, 80, 60), 2: (190, 210, 120)}


def write_sites(folder: Path, count: int = 20, smallest: int = 33, largest: int = 260) -> None:
    """Write them to a folder that is made here."""
    for name in ("images/labelled", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sides = (smallest + (largest - smallest) * np.linspace(0, 1, count) ** 2).astype(int)  # most are small
    for number, side in enumerate(sides):
        random = np.random.default_rng(number)
        height, width = int(side), int(sides[-1 - number] + side) // 2 if number % 4 == 1 else int(side)
        patches = gaussian_filter(random.standard_normal((height, width)), 5, mode="wrap")
        classes = np.digitize(patches, np.quantile(patches, [0.55, 0.8]))
        light = random.gamma(12, 1 / 12, (height, width))  # crowns and their shadows
        image = np.moveaxis(_SPECTRA[classes], -1, 0) * light * random.gamma(150, 1 / 150, (len(BANDS), height, width))
        for band in _COARSE:
            image[band] = np.kron(image[band, ::2, ::2], np.ones((2, 2)))[:height, :width]
        place = {"crs": "EPSG:32633", "transform": (10.0, 0.0, 4e5 + 5000 * number, 0.0, -10.0, 5.5e6)}
        name = f"site_{number:03d}.tif"
        named = None if number % 3 == 0 else BANDS
        dn = np.rint(image * 10000).astype(np.uint16)
        images = folder / "images" / ("labelled" if number % 2 else ".")
        write_geotiff(images / name, dn, nodata=0, descriptions=named, **place)
        if number % 2:
            labels = classes[None].astype(np.uint8)
            write_geotiff(folder / "labels" / name, labels, nodata=255, colormap=_COLOURS, **place)


if __name__ == "__main__":
    write_sites(Path(sys.argv[1]))
