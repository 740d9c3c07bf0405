"""What a scene is, and what its files' headers say together: bands by name, one grid, units. Opens nothing."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError, nearest
from ssl_geo.imagery.products import ProductMetadata, offset_in_names
from ssl_geo.imagery.sensors import KNOWN_BANDS, canonical_band, likely_order

Transform = tuple[float, float, float, float, float, float]
OffsetSource = Literal["setting", "tags", "metadata", "name", "assumed"]
Value = TypeVar("Value")

LARGEST = 1e12
"""Of an offset, a scale, one over it, and a coordinate: beyond, products and squares overflow somewhere."""
SENTINEL2_SCALE = 1e-4
"""Reflectance per DN of Sentinel-2 integers: 1 / QUANTIFICATION_VALUE."""


MEASURABLE = 1e6
"""Reflectance from whose magnitude on nothing was measured. What scenes hold lies far below, in whatever unit a wrong
scale leaves it: clouds reach 2, DN 65535, metres 8848, radar backscatter in linear power some 10,000. What files write
into gaps without saying so begins far above: 1e20 (CF), 9.97e36 (netCDF), ±3.4e38 (the ends of float32), 1e30. One such
pixel overflows float32 within a network and takes its whole tile with it."""
UNMEASURED = f"what nothing measures (NaN, infinity, reflectance beyond ±{MEASURABLE:g})"
_MEASURABLE_DN = 1e30  # whatever the scale: half the digits of float32's exponent are left for the arithmetic
NO_BAND = "-"  # in band_names: a layer that is no band (QA, DEM, land cover)
_MAX_SAID = 4  # statements that a line lists


class UnreadableError(UserError):
    """A file that cannot be opened or read, so that an index may count it and go on."""


class HeaderError(UnreadableError):
    """A header whose numbers make no sense: an index counts its file as one that cannot be read."""


class SettingError(UserError):
    """A setting that makes sense for no scene."""


class NotImageryError(UserError):
    """A raster that holds no band values (a palette, a picture for display, complex numbers)."""


class UnnamedBandsError(UserError):
    """A stack that names no band, and no setting that does."""


class UnknownUnitError(UserError):
    """A floating-point or 8-bit file whose scale neither a tag nor a setting tells."""


@dataclass(frozen=True, slots=True)
class BandSource:
    """Where one band of a scene is stored.

    Attributes:
        file: The raster file.
        number: The band in it, counted from 1.
        ratio: How many pixels of the scene's grid a stored pixel covers, along each axis.
        masked: Whether the file carries a GDAL mask or an alpha band.
    """

    file: str
    number: int
    ratio: int
    masked: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """One raster product or file, described but not read.

    Attributes:
        path: A file, a folder, or a group of band files (see `ssl_geo.imagery.archives`).
        bands: Canonical names, in the order stored.
        sources: Where each band is.
        height: Rows of the grid.
        width: Columns of the grid.
        crs: ``EPSG:…`` or WKT; None for a file without one.
        transform: (a, b, c, d, e, f) with x = a·col + b·row + c and y = d·col + e·row + f.
        dtype: NumPy name of the type of `read_window`'s DN.
        nodata: A value that marks a band's pixel as unusable: the user's, or the one that the file declares.
        zero_fill: Whether a pixel that is 0 in all bands read is fill, although no file says so.
        scale: Reflectance per DN.
        offset: Added to the DN before scaling.
        offset_source: ``setting``, ``tags``, ``metadata``, ``name`` or ``assumed``.
        level: ``L1C``, ``L2A`` or None where nothing tells.
        date: ISO 8601, or None where nothing tells.
        overruled: What it states of itself and a setting replaces, ``offset -1000`` for example.
    """

    path: str
    bands: tuple[str, ...]
    sources: tuple[BandSource, ...]
    height: int
    width: int
    crs: str | None
    transform: Transform
    dtype: str
    nodata: float | None
    zero_fill: bool
    scale: float
    offset: float
    offset_source: OffsetSource
    level: str | None
    date: str | None
    overruled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one raster file tells.

    Attributes:
        file: The file.
        height: Rows.
        width: Columns.
        crs: ``EPSG:…`` or WKT; empty where there is none.
        transform: As in `Scene`; the identity where the file is not georeferenced.
        dtype: Of the stored values.
        numbers: Its bands counted from 1, without alpha.
        descriptions: One for each of them; empty where there is none.
        nodata: As declared.
        scaling: GDAL's (scale, offset) with value = stored · scale + offset; None where untagged.
        masked: Whether it carries a mask or an alpha band.
        datetime: TIFFTAG_DATETIME.
    """

    file: str
    height: int
    width: int
    crs: str
    transform: Transform
    dtype: np.dtype[Any]
    numbers: tuple[int, ...]
    descriptions: tuple[str, ...]
    nodata: float | None
    scaling: tuple[float, float] | None
    masked: bool
    datetime: str | None


def name_stack(header: Header, band_names: Sequence[str] | None) -> list[tuple[str, int]]:
    """Name the bands of one file: by its descriptions, else its file name, else what the user says.

    Descriptions that only count (``Band 1`` … ``Band 12``) name nothing. Bands without a known name beside named ones
    (SCL, QA60) are no bands of the scene.

    Returns:
        Pairs of canonical name and band number.

    Raises:
        UserError: If nothing names the bands, `band_names` contradicts the file, or a band comes twice.
    """
    path, count = header.file, len(header.numbers)
    own = [canonical_band(text) for text in header.descriptions]
    if _only_counts(header.descriptions, own):
        own = [None] * count
    if count == 1 and own[0] is None:
        own = [canonical_band(Path(path).stem)]
    user: list[str | None] | None = None
    if band_names is not None:
        user = []
        for name in band_names:
            if (known := None if name == NO_BAND else canonical_band(name)) is None and name != NO_BAND:
                raise SettingError(
                    f"--data.band_names holds {name}, which is no band; {nearest(name, KNOWN_BANDS)} ({NO_BAND} stands "
                    "for a layer that is none)"
                )
            user.append(known)
        if not any(user):
            raise SettingError(f"--data.band_names {' '.join(band_names)} names no band; {nearest('', KNOWN_BANDS)}")
    if any(own):
        if user is not None and len(user) == count:
            if wrong := [(o, u) for o, u in zip(own, user, strict=True) if o is not None and o != u]:
                raise UserError(
                    f"{path} names its bands, {wrong[0][0]} where --data.band_names says {wrong[0][1] or NO_BAND}; "
                    "leave --data.band_names out or correct it"
                )
            own = list(user)
    elif user is None:
        raise UnnamedBandsError(
            f"{path} has {_bands(count)} and names none: --data.band_names is required, {likely_order(count)}"
            + (
                f" ({NO_BAND} stands for a layer that is no band)"
                if count > 1
                else "; or point --data at imagery alone"
            )
        )
    elif len(user) != count:
        raise UserError(
            f"{path} has {_bands(count)} where --data.band_names lists {len(user)}: {likely_order(count)} "
            f"({NO_BAND} stands for a layer that is no band); or point --data at the imagery alone"
        )
    else:
        own = list(user)
    named = [(name, number) for name, number in zip(own, header.numbers, strict=True) if name is not None]
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} names {' and '.join(twice)} more than once; set --data.band_names or split the file")
    return named


def _bands(count: int) -> str:
    return f"{count} band{'' if count == 1 else 's'}"


def _only_counts(descriptions: Sequence[str], names: Sequence[str | None]) -> bool:
    """Whether the descriptions number the bands by position, as software does that knows no names.

    ``Band 1``, ``Band 2``, … always count (a Sentinel-2 stack that begins so has B01 B02 B03 B04, which is also
    what ``Band`` might mean, but nothing tells the two apart), and so do ``b1``, ``b2``, …, which no product is
    written with. ``B1`` … ``B9`` and on count too: a sensor's own list has B8A before B9, or behind B12 as EuroSAT's.
    """
    if len(names) < 2 or any(names[12:]) or any(name != f"B{i:02d}" for i, name in enumerate(names[:12], start=1)):
        return False
    return len(names) >= 9 or all(re.match(r"(?i:band)|b[1-9]", text) for text in descriptions)


def finest(members: Sequence[tuple[str, Header]]) -> list[tuple[str, Header]]:
    """Of the files of each band keep the sharpest, in the order of the members.

    Raises:
        UserError: If a file has more bands than the one that its name states.
    """
    best: dict[str, Header] = {}
    for band, header in members:
        if len(header.numbers) != 1:
            raise UserError(
                f"{header.file} is named as the file of band {band} and has {len(header.numbers)} bands; "
                "rename it, or point --data at the imagery alone"
            )
        if band not in best or header.width > best[band].width:
            best[band] = header
    return list(best.items())


def ratio_to_grid(header: Header, grid: Header) -> int:
    """How many pixels of `grid` one pixel of `header` covers along each axis.

    Raises:
        UserError: If CRS or extent differ, or the ratio is no whole number.
    """
    ratio = max(1, round(grid.width / header.width))
    differs = None
    if header.crs != grid.crs:
        differs = f"CRS {header.crs[:40] or 'none'} against {grid.crs[:40] or 'none'}"
    elif (header.height * ratio, header.width * ratio) != (grid.height, grid.width):
        differs = f"{header.height}×{header.width} pixels do not divide {grid.height}×{grid.width}"
    elif header.crs or header.transform != grid.transform:  # else neither is georeferenced
        # Both grids' upper left and lower right corner, in pixels of the finer one.
        (a, b, c, d, e, f), (ga, gb, gc, gd, ge, gf) = header.transform, grid.transform
        corner = (a * header.width + b * header.height + c, d * header.width + e * header.height + f)
        other = (ga * grid.width + gb * grid.height + gc, gd * grid.width + ge * grid.height + gf)
        pixel = max(abs(ga), abs(gb), abs(gd), abs(ge))
        apart = max(abs(c - gc), abs(f - gf), abs(corner[0] - other[0]), abs(corner[1] - other[1])) / pixel
        if apart > 0.5:
            differs = f"their corners lie {apart:.1f} pixels apart"
    if differs is not None:
        raise UserError(
            f"{header.file} and {grid.file} are not on one grid: {differs}; "
            "the files of one scene must share CRS and extent, with whole ratios of pixel size"
        )
    return ratio


def one_value(what: str, values: Sequence[tuple[str, Value]], setting: str) -> Value:
    """The value that all files of a scene share.

    Args:
        what: What it is, for the message.
        values: Pairs of file and value.
        setting: What mends a difference.

    Raises:
        UserError: If they differ.
    """
    first_file, first = values[0]
    for file, value in values[1:]:
        if value != first and not (value != value and first != first):  # NaN equals NaN here
            raise UserError(f"{first_file} and {file} have different {what}: {first} and {value}; set {setting}")
    return first


def overruled(stated: Mapping[str, float | str | None], settings: Mapping[str, float | str | None]) -> tuple[str, ...]:
    """What a scene states and a setting says otherwise; both by the setting's name, None where one says nothing."""
    return tuple(
        f"{name} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in stated.items()
        if value is not None and (setting := settings[name]) is not None and not _alike(value, setting)
    )


def check_settings(*, scale: float | None, offset: float | None) -> None:
    """Refuse numbers that make reflectance of no scene.

    Raises:
        SettingError: Naming the value, what is allowed, and the setting.
    """
    if scale is not None and not is_scale(scale):
        raise SettingError(
            f"--data.scale is {scale}; it takes {1 / LARGEST:g} to {LARGEST:g}: Sentinel-2 integers 1e-4, "
            "reflectance as stored 1"
        )
    if offset is not None and not abs(offset) <= LARGEST:
        raise SettingError(f"--data.offset is {offset}; it takes up to {LARGEST:g} DN, usually 0 or -1000")


def is_scale(value: float) -> bool:
    """Whether a number can be reflectance per DN."""
    return 1 / LARGEST <= abs(value) <= LARGEST


def listed_statements(overruled: Iterable[tuple[str, ...]]) -> str:
    """What scenes state and settings replace, with how many state it, the most frequent first: ``level L2A in 3``."""
    counts = Counter(statement for of_scene in overruled for statement in of_scene)
    said = [f"{statement} in {count}" for statement, count in counts.most_common(_MAX_SAID)]
    return ", ".join(said) + (", …" if len(counts) > _MAX_SAID else "")


def _alike(value: float | str, setting: float | str) -> bool:
    if isinstance(value, str) or isinstance(setting, str):
        return value == setting
    return math.isclose(value, setting, rel_tol=1e-6) or (math.isnan(value) and math.isnan(setting))


@dataclass(frozen=True, slots=True)
class Radiometry:
    """How DN become reflectance; see `Scene`."""

    scale: float
    offset: float
    offset_source: OffsetSource
    overruled: tuple[str, ...]


def radiometry(
    path: str,
    dtype: np.dtype[Any],
    *,
    scale: float | None,
    offset: float | None,
    tags: tuple[float, float] | None,
    metadata: ProductMetadata | None,
    names: Sequence[str],
) -> Radiometry:
    """Find scale and offset, by the order of trust in `ssl_geo.imagery.rasters.open_scene`.

    A product's metadata and name speak of its integer DN, so they say nothing of floating-point files.

    Args:
        path: The scene, for the message.
        dtype: Of its DN.
        scale: The user's setting.
        offset: The user's setting.
        tags: `Header.scaling`.
        metadata: Of the product.
        names: `ssl_geo.imagery.products.product_names`.

    Raises:
        UserError: If the unit is unknown: a floating-point or 8-bit file, no scale tag and no setting.
        HeaderError: If what the files state makes no reflectance.
    """
    is_product = dtype.kind in "iu" and dtype.itemsize > 1
    stated: dict[str, float | None] = {"scale": None, "offset": None}
    source: OffsetSource = "assumed"
    if tags is not None:
        stated, source = {"scale": tags[0], "offset": tags[1] / tags[0]}, "tags"
    elif is_product and metadata is not None:
        stated, source = {"scale": metadata.scale, "offset": metadata.offset}, "metadata"
    elif is_product and (named := offset_in_names(names)) is not None:
        stated, source = {"scale": None, "offset": float(named)}, "name"
    replaced = overruled(stated, {"scale": scale, "offset": offset})
    if scale is None:
        scale = stated["scale"]
    if scale is None and not is_product:
        raise UnknownUnitError(
            f"{path} holds {dtype} and no scale tag, so its unit is unknown: set --data.scale, "
            "1 for reflectance, 0.0001 for reflectance times 10000"
        )
    if offset is not None:
        source = "setting"
    else:
        offset = stated["offset"]
    scale = SENTINEL2_SCALE if scale is None else scale
    offset = 0.0 if offset is None else offset
    if not (is_scale(scale) and abs(offset) <= LARGEST):
        raise HeaderError(
            f"{path} states scale {scale:g} and offset {offset:g}, which make no reflectance; fix its {source} or set "
            "--data.scale and --data.offset"
        )
    return Radiometry(
        scale=scale,
        offset=offset,
        offset_source=source,
        overruled=replaced,
    )


def measured(dn: npt.NDArray[Any], scale: float, offset: float) -> npt.NDArray[np.bool_] | None:
    """Where all bands hold what can be a measurement: a number whose reflectance is within ±`MEASURABLE`.

    Args:
        dn: (C, H, W) as stored.
        scale: Reflectance per DN.
        offset: In DN, added before scaling.

    Returns:
        (H, W); None where all of them are, which for integers is mostly known from their type.
    """
    reach = min(MEASURABLE / abs(scale), _MEASURABLE_DN) if scale else _MEASURABLE_DN
    least, most = np.float64(-reach - offset), np.float64(reach - offset)
    if dn.dtype.kind in "iu":
        limits = np.iinfo(dn.dtype)
        if least <= limits.min and limits.max <= most:
            return None
    if not dn.size or (least <= dn.min() and dn.max() <= most):  # false for NaN
        return None
    return np.asarray(((dn >= least) & (dn <= most)).all(axis=0))
