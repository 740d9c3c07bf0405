"""Reading a chip: packed, against a stacked deflate GeoTIFF and a folder with a GeoTIFF a band.

    python benchmarks/read.py [--chips 200] [--rounds 3]

Every round reads all chips in a new random order, each way in turn; all files are in the page cache, so that what is
measured is the work and not the disk. The headline is packed against the stacked GeoTIFF, both read by this project;
plain rasterio, opening the file for each chip, stands beside them. Prints one JSON object.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from archive import BANDS, SIDE, write_folders, write_stacks
from paired import compare, finish

from ssl_geo.imagery.chips import build_index
from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.packed import open_chips, packed_index
from ssl_geo.imagery.packing import pack


def main() -> None:
    """Write the archive in all three forms, read it by turns and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
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


if __name__ == "__main__":
    main()
