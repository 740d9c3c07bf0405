"""Sentinel-2-like sample scenes with labels, made by the program itself: something to run on where there is no imagery.

A folder of samples holds::

    images/S2A_MSIL2A_20180612T103021_N0208_R108_T32UPU_sample03.tif   12 bands, uint16, 10 m grid, UTM
    labels/S2A_MSIL2A_20180612T103021_N0208_R108_T32UPU_sample03.tif   uint8, 255 = ignore, colour table
    sample.json                                                        how it was made, classes, scenes and split

The images follow the conventions of Sentinel-2 L2A (ESA, Sentinel-2 Products Specification Document): DN =
reflectance · 10000, DN 0 is nodata, no offset as in every processing baseline before 04.00 (the N0208 of the name),
bands of 20 and 60 m no sharper than they are natively. The places are invented; tile, coordinates, date and orbit
are only such as a real product could have.

The classes are chosen so that a single pixel seldom tells them: an orchard consists of pixels of trees and of grass,
a settlement and an industrial site of the same roofs, a bare field and a quarry of the same soil. Season, haze and
soil move a class from scene to scene further than from its neighbour. What separates them is arrangement over 2 to 8
pixels. A multinomial logistic regression on single pixels (12 bands, three indices) reaches a mean IoU of about 0.45
on the held-out scenes, the same regression with local means, deviations and gradient coherence in windows of 5×5 and
9×9 pixels about 0.70. Scenes are held out whole: `sample.json` proposes a split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ssl_geo.errors import UserError
from ssl_geo.files import written_whole
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.sample_spectra import BANDS, CLASSES, IGNORE
from ssl_geo.threads import in_order

SAMPLE = Path("data/sample")
"""Where the commands keep it, below the working directory."""

VERSION = 1
"""Raised whenever the same seed gives other pixels; `ensure_sample` then makes the sample anew."""

SPLIT = ("train", "test", "val", "train", "train", "test")
"""The part of scene k is SPLIT[k % 6]: half the scenes for training, a third for testing."""

_CATALOGUE = "sample.json"
# Tile, EPSG code and upper left corner of the tile, sensing time and relative orbit of a pass over it.
_TILES = (
    ("T31UFT", "EPSG:32631", (600_000, 5_800_020), "T105031", "R051"),
    ("T32UPU", "EPSG:32632", (600_000, 5_400_000), "T103021", "R108"),
    ("T33UUU", "EPSG:32633", (300_000, 5_900_040), "T102021", "R065"),
)
_BASELINES = {2018: "N0208", 2019: "N0212", 2020: "N0214"}
_APART_M = 9_960  # between neighbouring scenes of a tile, a multiple of 60 m


@dataclass(frozen=True)
class _Plan:
    """What is settled about a scene before it is drawn."""

    number: int
    name: str
    split: str
    date: date
    crs: str
    corner: tuple[int, int]
    cloudy: bool
    swath_edge: bool


def _plans(scenes: int, size: int) -> Iterator[_Plan]:
    """Places and dates: tiles take turns, the golden ratio spreads any run of scenes evenly over April to October."""
    for k in range(scenes):
        tile, crs, (left, top), time, orbit = _TILES[k % len(_TILES)]
        year = (2018, 2019, 2020)[(k // len(_TILES)) % 3]
        day = date(year, 1, 1) + timedelta(days=int(95 + 190 * ((0.3 + 0.618034 * k) % 1)))
        step = max(_APART_M, 60 * (size // 6 + 10))
        place = k // len(_TILES)
        platform = "S2A" if k % 2 == 0 else "S2B"
        yield _Plan(
            number=k,
            name=f"{platform}_MSIL2A_{day:%Y%m%d}{time}_{_BASELINES[year]}_{orbit}_{tile}_sample{k:02d}",
            split=SPLIT[k % len(SPLIT)],
            date=day,
            crs=crs,
            corner=(left + step * (1 + place % 9), top - step * (1 + place // 9)),
            cloudy=k % 4 == 2,
            swath_edge=k % 5 == 1,
        )


def _make_scene(folder: Path, plan: _Plan, seed: int, size: int) -> None:
    """Render one scene and write its image and labels."""
    from ssl_geo.imagery.sample_scene import render_scene  # half a second that only a new sample takes

    dn, labels = render_scene(
        np.random.default_rng([seed, plan.number]),
        size,
        day=plan.date.timetuple().tm_yday,
        cloudy=plan.cloudy,
        swath_edge=plan.swath_edge,
    )
    transform = (10.0, 0.0, plan.corner[0], 0.0, -10.0, plan.corner[1])
    write_geotiff(
        folder / "images" / f"{plan.name}.tif",
        dn,
        crs=plan.crs,
        transform=transform,
        nodata=0,
        descriptions=[band.name for band in BANDS],
        tags={"origin": f"ssl_geo sample, version {VERSION}, seed {seed}, scene {plan.number}: not a real place"},
    )
    write_geotiff(
        folder / "labels" / f"{plan.name}.tif",
        labels[None],
        crs=plan.crs,
        transform=transform,
        nodata=IGNORE,
        descriptions=["land cover"],
        tags={f"class_{value}": land_class.name for value, land_class in enumerate(CLASSES)},
        colormap={value: land_class.color for value, land_class in enumerate(CLASSES)},
    )


def make_sample(folder: Path, *, seed: int = 0, scenes: int = 24, size: int = 360) -> Path:
    """Make sample scenes and labels, `images/*.tif` and `labels/*.tif` of the same names, and last `sample.json`.

    Scene k is a function of (seed, k, size) alone. Sample files of another making in the folder are removed, other
    files left alone. The default takes some 25 s on one core, less on several, and about 26 MB.

    Args:
        folder: Where to; made if need be.
        seed: Another seed gives other scenes.
        scenes: How many.
        size: Side in pixels of 10 m; a multiple of 6, as a pixel of 60 m covers 6.

    Returns:
        The folder.

    Raises:
        UserError: If the folder cannot be written, or a number is out of range.
    """
    if size < 48 or size % 6:
        raise UserError(f"size {size} of the sample scenes: must be a multiple of 6 (one 60 m pixel), 48 or more")
    if not 1 <= scenes <= 100:
        raise UserError(f"{scenes} sample scenes: must be 1 to 100")
    if seed < 0:
        raise UserError(f"seed {seed} of the sample scenes: must be 0 or more")
    folder = Path(folder)
    plans = list(_plans(scenes, size))
    names = {f"{plan.name}.tif" for plan in plans}
    catalogue = {
        "version": VERSION,
        "seed": seed,
        "size": size,
        "bands": [band.name for band in BANDS],
        "ignore": IGNORE,
        "classes": [
            {"value": value, "name": c.name, "color": c.color, "meaning": c.meaning} for value, c in enumerate(CLASSES)
        ],
        "scenes": [
            {
                "name": plan.name,
                "split": plan.split,
                "date": plan.date.isoformat(),
                "crs": plan.crs,
                "cloudy": plan.cloudy,
                "swath_edge": plan.swath_edge,
            }
            for plan in plans
        ],
    }
    try:
        (folder / _CATALOGUE).unlink(missing_ok=True)
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for stale in (folder / kind).glob("S2[AB]_MSIL2A_*_sample[0-9][0-9].tif"):
                if stale.name not in names:
                    stale.unlink()
        # NumPy and SciPy let other threads run while they compute.
        workers = min(scenes, os.cpu_count() or 1)
        done = in_order(lambda plan: _make_scene(folder, plan, seed, size), plans, workers)
        for _ in tqdm(done, total=scenes, desc="making sample scenes", unit="scene"):
            pass
        with written_whole(folder / _CATALOGUE) as partial:
            partial.write_text(json.dumps(catalogue, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the sample imagery to {folder}: {error.strerror or error}; "
            "free space there or choose a folder that can be written"
        ) from error
    return folder


def ensure_sample(folder: Path = SAMPLE) -> Path:
    """Make the default sample unless the folder holds it already, complete and of this version.

    Args:
        folder: Where it is or goes.

    Returns:
        The folder.

    Raises:
        UserError: If the folder cannot be written.
    """
    folder = Path(folder)
    return folder if _complete(folder) else make_sample(folder)


def _complete(folder: Path) -> bool:
    """Whether the folder's catalogue is there, of this version, and all files it lists too."""
    try:
        catalogue = json.loads((folder / _CATALOGUE).read_text(encoding="utf-8"))
        return catalogue["version"] == VERSION and all(
            (folder / kind / f"{scene['name']}.tif").is_file()
            for scene in catalogue["scenes"]
            for kind in ("images", "labels")
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False  # absent, or not a catalogue of ours
