"""Sensors as frozen tables: which bands there are, where in the spectrum, how sharp, and how they are spelled.

Sources:
    Sentinel-2: ESA, "Sentinel-2 MSI User Guide", Resolution and Swath, and "Sentinel-2 Spectral Response Functions
    (S2-SRF)", COPE-GSEG-EOPG-TN-15-0007: centre wavelengths and bandwidths of Sentinel-2A. Products and the
    quantification value 10000: ESA, "Sentinel-2 Products Specification Document" (S2-PDGS-TAS-DI-PSD).
    Sentinel-1: ESA, "Sentinel-1 SAR User Guide", C-band at 5.405 GHz; GRD IW high resolution, 10 m pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Band:
    """One physical band.

    Attributes:
        name: The canonical name, for example ``B8A``.
        wavelength_nm: Centre wavelength.
        bandwidth_nm: Width of the spectral response; None where it says nothing (radar).
        gsd_m: Native ground sampling distance.
    """

    name: str
    wavelength_nm: float
    bandwidth_nm: float | None
    gsd_m: int


@dataclass(frozen=True)
class Sensor:
    """One product of one instrument.

    Attributes:
        name: How settings and checkpoints name it, for example ``S2-L2A``.
        level: Processing level, as scenes carry it.
        bands: In the product's own order.
    """

    name: str
    level: str
    bands: tuple[Band, ...]

    def __getitem__(self, name: str) -> Band:
        """The band of that canonical name; KeyError where the product has none."""
        for band in self.bands:
            if band.name == name:
                return band
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The bands' canonical names, in the product's order."""
        return tuple(band.name for band in self.bands)


_SENTINEL2_BANDS = (
    Band("B01", 442.7, 21.0, 60),  # coastal aerosol
    Band("B02", 492.4, 66.0, 10),  # blue
    Band("B03", 559.8, 36.0, 10),  # green
    Band("B04", 664.6, 31.0, 10),  # red
    Band("B05", 704.1, 15.0, 20),  # red edge
    Band("B06", 740.5, 15.0, 20),  # red edge
    Band("B07", 782.8, 20.0, 20),  # red edge
    Band("B08", 832.8, 106.0, 10),  # near infrared
    Band("B8A", 864.7, 21.0, 20),  # narrow near infrared
    Band("B09", 945.1, 20.0, 60),  # water vapour
    Band("B10", 1373.5, 31.0, 60),  # cirrus
    Band("B11", 1613.7, 91.0, 20),  # short-wave infrared
    Band("B12", 2202.4, 175.0, 20),  # short-wave infrared
)
_C_BAND_NM = 299_792_458 / 5.405e9 * 1e9  # speed of light / carrier frequency

SENTINEL2_L1C = Sensor("S2-L1C", "L1C", _SENTINEL2_BANDS)
# The atmospheric correction uses the cirrus band up and does not deliver it.
SENTINEL2_L2A = Sensor("S2-L2A", "L2A", tuple(band for band in _SENTINEL2_BANDS if band.name != "B10"))
SENTINEL1_GRD = Sensor("S1-GRD", "GRD", (Band("VV", _C_BAND_NM, None, 10), Band("VH", _C_BAND_NM, None, 10)))

SENSORS: Mapping[str, Sensor] = MappingProxyType(
    {sensor.name: sensor for sensor in (SENTINEL2_L2A, SENTINEL2_L1C, SENTINEL1_GRD)}
)
KNOWN_BANDS = frozenset(band.name for sensor in SENSORS.values() for band in sensor.bands)

DEFAULT_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""The ten bands of 10 and 20 m: what nearly every archive holds and what shows the ground, not the air."""

LIKELY_ORDERS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {10: DEFAULT_BANDS, 12: SENTINEL2_L2A.names, 13: SENTINEL2_L1C.names}
)
"""The order in which a stack of so many bands without names most likely is; proposed, never assumed.

EuroSAT and what was made like it have all 13 bands with B8A last; `ssl_geo.imagery.bandorder` tells by the pixels.
"""

_SEPARATORS = re.compile(r"[\s_\-.,:;/()\[\]]+")
_BAND_TOKEN = re.compile(r"(?:band|b)0*(8a|[1-9]|1[0-2])", re.IGNORECASE)
# What may follow a band in a name without changing what it is: its resolution, colour or wavelength.
_HARMLESS = re.compile(
    r"\d*(?:10|20|60)m|\d+|nm|um|µm|central|centre|center|wavelength|reflectance|boa|toa|dn|coastal|aerosol|ultra|blue|"
    r"green|red|vegetation|edge|rededge|re|near|nir|narrow|infrared|water|vapou?r|cirrus|swir|short|wave|[1-4]",
    re.IGNORECASE,
)
# What makes of a band something derived from it.
_DERIVED = re.compile(r"msk|mask|std\w*|var|variance|count|qa\w*|quality|qualit|cloud|error|uncertainty", re.IGNORECASE)
# Landsat's B5 is near infrared: its product names must not pass for Sentinel-2 (HLS mixes both under one roof).
_FOREIGN = re.compile(r"l[cotem]0[4-9]|l30|landsat\w*|hls[ln]30", re.IGNORECASE)
_FOREIGN_START = re.compile(r"(?:sr|st|sur_refl)_b\d", re.IGNORECASE)  # layers of Landsat's Collection 2, of MODIS
# The bands that a colour behind a number may mean; PlanetScope's B4 is near infrared, WorldView's B2 blue.
_COLOURS = {"blue": ("B02",), "green": ("B03",), "red": ("B04",), "nir": ("B08", "B8A")}
_SHADES = {"ultra", "coastal", "aerosol", "edge"}  # of a colour: ultra blue, red edge


def band_token(text: str) -> str | None:
    """The band that one word spells (``B2``, ``b08a``, ``band4``, ``vv``), or None."""
    if text.upper() in SENTINEL1_GRD.names:
        return text.upper()
    match = _BAND_TOKEN.fullmatch(text)
    if match is None:
        return None
    number = match[1].upper()
    return "B8A" if number == "8A" else f"B{int(number):02d}"


def canonical_band(text: str) -> str | None:
    """The canonical name of the band that a description or a part of a file name spells.

    Recognised are a band's number in any of its spellings with anything before it (``B2``, ``B02``, ``b8a``,
    ``B08A``, ``Band 4``, ``T33UUU_20170216T102101_B04``) and its resolution, colour or wavelength behind it
    (``B04_10m``, ``B04 - Red``, ``B4, central wavelength 665 nm``). A colour alone (``red``) is not: it means
    other bands in other archives. Nor is what only derives from a band (``B04_std``, ``MSK_QUALIT_B01``), nor
    another sensor's product, whose numbers mean other bands (``LC08_…_B5``, ``SR_B5``, ``B4 - NIR``).

    Args:
        text: A band description or the stem of a file name.

    Returns:
        For example ``B8A``; None where the text names no band, or more than one.
    """
    words = [word for word in _SEPARATORS.split(text.strip()) if word]
    # "Band 4" is two words
    for i in range(len(words) - 1, 0, -1):
        if words[i - 1].lower() in ("band", "b") and band_token("b" + words[i]) is not None:
            words[i - 1 : i + 1] = ["b" + words[i]]
    if _FOREIGN_START.match(text.strip()) or any(
        _FOREIGN.fullmatch(word) or _DERIVED.fullmatch(word) for word in words
    ):
        return None
    found = [(i, band) for i, word in enumerate(words) if (band := band_token(word)) is not None]
    if len(found) != 1:
        return None
    position, band = found[0]
    behind = {word.lower() for word in words[position + 1 :]}
    if not behind & _SHADES and any(band not in _COLOURS[colour] for colour in behind & _COLOURS.keys()):
        return None
    return band if all(_HARMLESS.fullmatch(word) for word in words[position + 1 :]) else None


def likely_order(count: int) -> str:
    """What to propose for a stack of `count` unnamed bands, as a clause to end an error message with."""
    if count == len(SENTINEL2_L1C.bands):
        last = sorted(LIKELY_ORDERS[count], key=lambda band: band == "B8A")
        return (
            f"likely {' '.join(LIKELY_ORDERS[count])}, as EuroSAT has them {' '.join(last)}; python -m ssl_geo.doctor "
            "tells by the pixels"
        )
    if count in LIKELY_ORDERS:
        return f"likely {' '.join(LIKELY_ORDERS[count])}"
    return "in the file's order, for example B02 B03 B04 B08"
