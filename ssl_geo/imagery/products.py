"""What names and metadata files say of a product: processing level, radiometric offset, date.

Naming conventions: ESA, "Sentinel-2 Products Specification Document" (S2-PDGS-TAS-DI-PSD), compact naming
``S2A_MSIL2A_20230101T101031_N0509_R022_T33UUU_20230101T140000.SAFE``; N0509 is processing baseline 05.09.
Offset: "Sentinel-2 Processing Baseline 04.00", valid from 25 January 2022 and in reprocessed older products.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from ssl_geo.errors import UserError

LEVELS = ("L1C", "L2A")
BASELINE_OFFSET = -1000
"""BOA_ADD_OFFSET and RADIO_ADD_OFFSET of processing baseline 04.00 and later, in DN."""

_LEVEL = re.compile(r"(?<![A-Z0-9])(?:(?:S2)?MSI|MSIL|L)(1C|2A)(?![A-Z0-9])", re.IGNORECASE)
_BASELINE = re.compile(r"MSIL(?:1C|2A)_\d{8}T\d{6}_N(\d{4})(?=[_.]|$)")
_PRODUCT = re.compile(r"^S2[ABCD]_|^L(?:1C|2A)_T\d\d|\.SAFE$")
_DATE = re.compile(r"(?<!\d)(20\d\d)(-?)(\d\d)\2(\d\d)(?=T\d{6}|T\d{4}|\D|$)")
_TAG_DATE = re.compile(r"(20\d\d):(\d\d):(\d\d)")
_METADATA_DEPTH = 3  # X.SAFE / GRANULE / L2A_T33UUU_A… / IMG_DATA


def product_names(path: Path, file: Path) -> list[str]:
    """The names that tell of a scene: its file's, its own, and those of the product folders above.

    Args:
        path: The scene's path.
        file: Its file, or the first of its band files.
    """
    above = list(path.parents)[: _METADATA_DEPTH + 1]
    names = [file.stem, path.name, *(folder.name for folder in above if _PRODUCT.search(folder.name))]
    return list(dict.fromkeys(names))


def level_in_names(names: Sequence[str]) -> str | None:
    """The level of the first name that states just one: ``L1C``, ``L2A`` or None."""
    for name in names:
        found = {"L" + match[1].upper() for match in _LEVEL.finditer(name)}
        if len(found) == 1:
            return found.pop()
    return None


def offset_in_names(names: Sequence[str]) -> int | None:
    """The offset in DN that the baseline field of a product's name implies, or None.

    ``N0400`` and later carry -1000, earlier ones 0. ``N9999`` marks reprocessing whose baseline the name
    does not tell.
    """
    for name in names:
        match = _BASELINE.search(name)
        if match is not None and match[1] != "9999":
            return BASELINE_OFFSET if int(match[1]) >= 400 else 0
    return None


def date_in_names(names: Sequence[str]) -> str | None:
    """The first plausible date in the names, as ISO 8601, or None."""
    for name in names:
        for match in _DATE.finditer(name):
            if (found := _iso_date(match[1], match[3], match[4])) is not None:
                return found
    return None


def date_in_tag(text: str | None) -> str | None:
    """The date of a TIFFTAG_DATETIME (``YYYY:MM:DD HH:MM:SS``) as ISO 8601, or None."""
    match = _TAG_DATE.match(text or "")
    return _iso_date(*match.groups()) if match is not None else None


def _iso_date(year: str, month: str, day: str) -> str | None:
    try:
        found = date(int(year), int(month), int(day))
    except ValueError:
        return None
    return found.isoformat() if found.year >= 2014 else None  # Sentinel-1A flies since April 2014


@dataclass(frozen=True)
class ProductMetadata:
    """What the product's own metadata file states.

    Attributes:
        level: ``L1C`` or ``L2A``.
        offset: In DN; 0 where the file lists none (baselines before 04.00), None where nothing can be read.
        scale: 1 / quantification value; None where the file states none.
    """

    level: str
    offset: float | None
    scale: float | None


def metadata_file(path: Path) -> Path | None:
    """The MTD_MSIL2A.xml or MTD_MSIL1C.xml beside the scene or in the folders of its product above, or None."""
    for folder in [path, *list(path.parents)[: _METADATA_DEPTH + 1]]:
        for level in LEVELS:
            candidate = folder / f"MTD_MSI{level}.xml"
            if candidate.is_file():
                return candidate
        if folder.name.endswith(".SAFE"):
            return None
    return None


def read_metadata(file: Path, *, needs_offset: bool = True) -> ProductMetadata:
    """Read a product's MTD_MSIL*.xml.

    Args:
        file: Its name tells the level.
        needs_offset: Whether its offset is wanted; where the user sets one, a file that tells none is no error.

    Raises:
        UserError: If it is not XML, or its bands carry different offsets.
    """
    level = "L2A" if "L2A" in file.name else "L1C"
    offsets: set[float] = set()
    quantification: float | None = None
    try:
        for element in ElementTree.parse(file).iter():
            tag, text = element.tag.rpartition("}")[2], (element.text or "").strip()
            if tag in ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"):
                offsets.add(float(text))
            elif tag in ("BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE") and text:
                quantification = float(text)
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        if not needs_offset:
            return ProductMetadata(level, None, None)
        raise UserError(f"cannot read the product metadata {file}: {error}; mend it or set --data.offset") from error
    if needs_offset and len(offsets) > 1:
        raise UserError(f"{file} states different offsets by band: {sorted(offsets)}; set --data.offset")
    return ProductMetadata(
        level,
        offset=None if len(offsets) > 1 else next(iter(offsets), 0.0),
        scale=1 / quantification if quantification else None,
    )
