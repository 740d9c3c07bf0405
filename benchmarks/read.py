"""Reading a chip: packed, against a stacked deflate GeoTIFF and a folder with a GeoTIFF a band.

    python benchmarks/read.py [--chips 200] [--rounds 3]

Chips are of ten bands and 120 pixels, as BigEarthNet's, in a file or folder each. Every round reads all of them in a
new random order, each way in turn; all files are in the page cache, so that what is measured is the work and not the
disk. The headline is packed against the stacked GeoTIFF, both read by this project; plain rasterio, opening the file
for each chip, stands beside them. Prints one JSON object.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from paired import compare, finish, numbers
from scipy.ndimage import gaussian_filter

from ssl_geo.imagery.chips import build_index
from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.packed import open_chips, packed_index
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.sensors import DEFAULT_BANDS

BANDS, SIDE = tuple(DEFAULT_BANDS), 120
COARSE = {"B05", "B06", "B07", "B8A", "B11", "B12"}  # 20 m


def main() -> None:
    """Write the archive in all three forms, read it by turns and print the figures."""
    settings = numbers(__doc__, chips=200, rounds=3)
    with tempfile.TemporaryDirectory() as scratch:
        stacks = write_stacks(Path(scratch) / "stacks", settings.chips)
        folders = write_folders(Path(scratch) / "folders", settings.chips)
        index = build_index([stacks], bands=BANDS, chip_size=SIDE, progress=False)
        packed = Path(scratch) / "packed"
        pack(index, packed, workers=len(os.sched_getaffinity(0)), progress=False)
        stacked = ChipDataset(index)
        by_band = ChipDataset(build_index([folders], bands=BANDS, chip_size=SIDE, progress=False))
        mapped = open_chips(packed_index(packed), [packed])
        files = sorted(stacks.iterdir())

        def plain(number: int) -> np.ndarray:
            with rasterio.open(files[number]) as dataset:
                return dataset.read()

        for number in range(settings.chips):  # all ways give the same pixels
            chip = stacked[number]
            for other in (by_band[number].dn, mapped[number].dn, plain(number)):
                np.testing.assert_array_equal(chip.dn, other)

        def all_of(read: Callable[[int], object]) -> Callable[[int], None]:
            def run(number: int) -> None:
                for chip in np.random.default_rng(number).permutation(settings.chips).tolist():
                    read(chip)

            return run

        ways = {"stacked": stacked.__getitem__, "folder": by_band.__getitem__, "rasterio, opened anew": plain}
        pairs = {
            name: compare(all_of(mapped.__getitem__), all_of(way), settings.rounds, warm=1)
            for name, way in ways.items()
        }
    ours = pairs["stacked"].ours
    finish(
        "read",
        pairs["stacked"].ratio,
        10,
        ms_a_chip={
            "packed": round(1e3 * ours / settings.chips, 4),
            **{name: round(1e3 * pair.peer / settings.chips, 4) for name, pair in pairs.items()},
        },
        packed_against={name: round(pair.ratio, 1) for name, pair in pairs.items()},
        packed_mb_a_s=round(settings.chips * len(BANDS) * SIDE**2 * 2 / ours / 1e6),
        chips=settings.chips,
    )


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


if __name__ == "__main__":
    main()
