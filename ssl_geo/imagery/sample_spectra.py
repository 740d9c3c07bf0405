"""What the sample scenes are made of: classes, materials with their Sentinel-2 spectra, and the seasons.

The spectra are approximations: surface reflectance set by hand within the range of the cited libraries and of
Sentinel-2 L2A pixels of such surfaces, not resampled from single measurements. They are good for testing software
and comparing features; nobody should take a physical quantity from them.

Sources:
    Vegetation, soils, sand, water, building materials: Kokaly et al. 2017, USGS Spectral Library Version 7,
    doi:10.3133/ds1035; Meerdink et al. 2019, The ECOSTRESS spectral library version 1.0,
    doi:10.1016/j.rse.2019.05.015.
    Roofs and pavements: Kotthaus et al. 2014, Spectral library of urban materials (LUMA),
    doi:10.1016/j.isprsjprs.2014.05.005.
    Overall level: band means of BigEarthNet (Sumbul et al. 2019, doi:10.1109/IGARSS.2019.8900532).
    Phenology: sowing, flowering and harvest dates as usual in central Europe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssl_geo.imagery.sensors import SENTINEL2_L2A

Float = npt.NDArray[np.float32]

BANDS = SENTINEL2_L2A.bands
"""The twelve bands of an L2A product (no B10), in the order of the sample's files."""

# fmt: off
MATERIALS: dict[str, tuple[float, ...]] = {
    #                 B01   B02   B03   B04   B05   B06   B07   B08   B8A   B09   B11   B12
    "clear water":   (.022, .026, .030, .018, .014, .011, .010, .009, .008, .007, .005, .004),
    "turbid water":  (.045, .055, .082, .070, .058, .034, .033, .029, .026, .020, .010, .007),
    "leaves":        (.018, .024, .050, .027, .082, .255, .335, .350, .372, .370, .170, .075),
    "bare branches": (.034, .044, .060, .068, .098, .142, .162, .178, .195, .200, .215, .140),
    "needles":       (.013, .018, .032, .021, .048, .128, .165, .178, .192, .192, .085, .040),
    "green grass":   (.025, .035, .070, .042, .108, .285, .355, .375, .398, .395, .215, .108),
    "dry grass":     (.045, .060, .095, .108, .158, .225, .258, .280, .302, .310, .320, .205),
    "cereal":        (.020, .029, .060, .030, .090, .315, .415, .435, .458, .450, .190, .085),
    "ripe cereal":   (.052, .070, .110, .138, .185, .235, .265, .290, .312, .320, .345, .228),
    "stubble":       (.060, .083, .122, .155, .195, .225, .248, .268, .292, .305, .375, .285),
    "maize":         (.020, .029, .057, .032, .094, .305, .400, .425, .448, .442, .208, .098),
    "flowering rape": (.032, .045, .125, .112, .178, .300, .360, .398, .410, .400, .200, .100),
    "vine leaves":   (.019, .027, .054, .032, .088, .250, .325, .340, .362, .360, .185, .085),
    "dark soil":     (.040, .052, .072, .088, .106, .122, .133, .145, .158, .165, .215, .185),
    "light soil":    (.068, .090, .126, .158, .182, .203, .218, .235, .252, .262, .325, .285),
    "sand":          (.098, .128, .174, .212, .238, .256, .268, .284, .298, .306, .365, .330),
    "gravel":        (.128, .152, .184, .206, .220, .230, .237, .248, .255, .260, .290, .262),
    "asphalt":       (.062, .072, .084, .092, .099, .104, .108, .114, .119, .123, .140, .134),
    "concrete":      (.125, .150, .182, .204, .218, .228, .234, .245, .250, .255, .280, .258),
    "clay tiles":    (.055, .065, .088, .148, .178, .196, .208, .225, .238, .247, .290, .258),
    "slate":         (.068, .077, .086, .092, .096, .100, .103, .108, .112, .115, .132, .130),
    "metal roof":    (.215, .255, .285, .300, .306, .312, .316, .325, .326, .328, .335, .305),
    "bitumen":       (.042, .047, .053, .058, .061, .064, .067, .070, .073, .075, .086, .084),
}
# fmt: on
"""Bottom-of-atmosphere reflectance of pure materials, in the order of `BANDS`."""


@dataclass(frozen=True)
class LandClass:
    """One class of the sample's label rasters.

    Attributes:
        name: As written in the labels' tags.
        color: RGB in 0…255, for colour tables and figures.
        share: Expected share of the land (0 for water, which rivers and lakes decide).
        meaning: What makes it up, and what a single pixel of it may be mistaken for.
    """

    name: str
    color: tuple[int, int, int]
    share: float
    meaning: str


CLASSES = (
    LandClass("water", (38, 102, 178), 0.0, "rivers and lakes, clear to turbid"),
    LandClass("forest", (22, 92, 42), 0.16, "closed canopy, crowns in no order; broad leaves as in orchards"),
    LandClass("orchard", (146, 178, 58), 0.11, "trees in a grid over grass; each pixel is tree, grass or both"),
    LandClass("grassland", (150, 214, 130), 0.13, "mottled swards with single trees; spectra of green crops"),
    LandClass("cropland", (240, 214, 92), 0.22, "even fields from bare to ripe; bare ones have quarry spectra"),
    LandClass("vineyard", (156, 78, 160), 0.11, "rows of vines over soil; in the mean a half-grown crop"),
    LandClass("settlement", (216, 60, 50), 0.11, "houses, streets and gardens, changing every pixel or two"),
    LandClass("industry", (128, 128, 140), 0.08, "the same roofs and pavements in pieces of 50 to 150 m"),
    LandClass("quarry", (232, 166, 110), 0.08, "sand, gravel and soil in irregular faces and heaps"),
)
"""The label values 0…8, in order."""

WATER, FOREST, ORCHARD, GRASSLAND, CROPLAND, VINEYARD, SETTLEMENT, INDUSTRY, QUARRY = range(len(CLASSES))
IGNORE = 255
"""Label of pixels without a truth: nodata and thick cloud."""

# Day of year against canopy cover, per crop, with the canopy's material before and after each date.
_CALENDAR: dict[str, list[tuple[int, float, str]]] = {
    "winter cereal": [
        (80, 0.35, "cereal"), (120, 0.9, "cereal"), (160, 0.95, "cereal"), (185, 0.85, "ripe cereal"),
        (205, 0.85, "ripe cereal"), (215, 0.7, "stubble"), (245, 0.5, "stubble"), (258, 0.0, "stubble"),
        (275, 0.05, "cereal"), (300, 0.3, "cereal"),
    ],
    "maize": [
        (80, 0.0, "maize"), (130, 0.02, "maize"), (165, 0.35, "maize"), (190, 0.9, "maize"),
        (245, 0.92, "maize"), (270, 0.7, "ripe cereal"), (280, 0.35, "stubble"), (300, 0.3, "stubble"),
    ],
    "rape": [
        (80, 0.6, "cereal"), (108, 0.85, "cereal"), (118, 0.9, "flowering rape"), (138, 0.9, "flowering rape"),
        (152, 0.9, "cereal"), (185, 0.8, "ripe cereal"), (202, 0.6, "stubble"), (230, 0.1, "stubble"),
        (255, 0.15, "cereal"), (300, 0.5, "cereal"),
    ],
    "fallow": [(80, 0.1, "dry grass"), (150, 0.3, "green grass"), (220, 0.35, "dry grass"), (300, 0.2, "dry grass")],
}  # fmt: skip
CROPS = tuple(_CALENDAR)


def material(name: str) -> Float:
    """The spectrum of a material, reflectance, (12,) in the order of `BANDS`."""
    return np.array(MATERIALS[name], dtype=np.float32)


def mix(first: Float, second: Float, share: npt.ArrayLike) -> Float:
    """Linear mixture with `share` (0…1) of the second spectrum; shapes broadcast against (…, 12)."""
    return np.asarray(first + (second - first) * np.asarray(share, dtype=np.float32), dtype=np.float32)


def crop_spectrum(crop: str, day: float, soil: Float) -> Float:
    """Spectrum of a field, canopy over soil, (12,).

    Args:
        crop: One of `CROPS`.
        day: Day of the year; between the dates of the crop's calendar, canopies and covers run over linearly.
        soil: The field's own soil, (12,).
    """
    days, covers, names = zip(*_CALENDAR[crop], strict=True)
    canopies = np.stack([material(name) for name in names])
    canopy = np.array([np.interp(day, days, band) for band in canopies.T], dtype=np.float32)
    return mix(soil, canopy, float(np.interp(day, days, covers)))


def leaf_cover(day: float) -> float:
    """Share of a broad-leaved crown in leaf (0…1) on a day of the year: bud break in April, fall in October."""
    return float(np.interp(day, [95, 112, 135, 265, 290, 310], [0.05, 0.35, 1.0, 1.0, 0.6, 0.1]))


def vine_leaf_cover(day: float) -> float:
    """Share of a vine row in leaf (0…1): shoots in late April, closed by midsummer, yellow in October."""
    return float(np.interp(day, [100, 125, 165, 270, 300], [0.12, 0.35, 1.0, 0.95, 0.4]))


def grass_greenness(day: float, drought: float) -> float:
    """Share of green in a sward (0…1) on a day of the year; `drought` (0…1) takes the green from the summer."""
    usual = float(np.interp(day, [80, 110, 150, 200, 240, 300], [0.55, 0.9, 1.0, 0.85, 0.75, 0.85]))
    summer = float(np.interp(day, [150, 200, 245, 280], [0.0, 1.0, 1.0, 0.2]))
    return usual * (1.0 - 0.8 * drought * summer)
