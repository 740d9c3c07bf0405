"""Three small scenes of five bands with texture, in UTM: ``python tests/soak/imagery.py FOLDER``."""

import sys
from pathlib import Path

import numpy as np

from ssl_geo.imagery.geotiff import write_geotiff


def write_scenes(folder: Path) -> None:
    """Write them to a folder that is made here."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        noise = np.random.default_rng(number).gamma(4, 300, (5, 100, 90))
        dn = (noise * np.linspace(0.5, 1.5, 5)[:, None, None] + 200 * number).astype(np.uint16) + 1
        write_geotiff(
            folder / f"S2A_MSIL2A_2018061{number}T103021_N0208_R108_T32UPU.tif",
            dn,
            crs="EPSG:32632",
            transform=(10.0, 0.0, 6e5 + 1000 * number, 0.0, -10.0, 5.4e6),
            nodata=0,
            descriptions=["B02", "B03", "B04", "B08", "B11"],
        )


if __name__ == "__main__":
    write_scenes(Path(sys.argv[1]))
