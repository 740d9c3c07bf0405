"""What is on disk, read: the scenes and labels of any raster file that GDAL opens.

A scene, whatever files it came in, is read by window on one grid: the finest among its files (10 m for Sentinel-2).
Coarser bands are brought to it by exact replication of their pixels, so that every DN stays as stored and nodata
never bleeds into its neighbours; whoever wants them smoother interpolates after masking.

    reflectance = (dn + offset) * scale
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

from ssl_geo.errors import UserError, nearest
from ssl_geo.imagery.archives import BAND, RASTER_SUFFIXES, band_files, find_scenes, other_kind
from ssl_geo.imagery.coordinates import crs_name
from ssl_geo.imagery.gdal import UNREADABLE, described, open_datasets
from ssl_geo.imagery.products import (
    LEVELS,
    date_in_names,
    date_in_tag,
    level_in_names,
    metadata_file,
    product_names,
    read_metadata,
)
from ssl_geo.imagery.scenes import (
    LARGEST,
    BandSource,
    Header,
    HeaderError,
    NotImageryError,
    Scene,
    Transform,
    UnreadableError,
    check_settings,
    finest,
    is_scale,
    measured,
    name_stack,
    one_value,
    overruled,
    radiometry,
    ratio_to_grid,
)

__all__ = [
    "NotImageryError",
    "Scene",
    "UnreadableError",
    "find_scenes",
    "open_scene",
    "read_counted",
    "read_header",
    "read_labels",
    "read_legend",
    "read_window",
]

_MAX_LABEL_BYTES = 1 << 30  # a label raster is read whole; a Sentinel-2 tile of 4-byte labels has half of it


def open_scene(
    path: str | os.PathLike[str],
    *,
    band_names: Sequence[str] | None = None,
    level: str | None = None,
    scale: float | None = None,
    offset: float | None = None,
    nodata: float | None = None,
) -> Scene:
    """Describe a scene: its bands by name, its grid, and how its DN become reflectance.

    Band names come from the descriptions, else from the file's name, else from `band_names`. The level comes from the
    setting, else from the product's metadata, else from the names, else from the presence of B10 (which only
    L1C has). The offset comes from the setting, else from the scale and offset tags of the GeoTIFF, else from the
    product's MTD_MSIL*.xml, else from the ``Nxxxx`` field of its name, else it is 0 and ``assumed``.

    Args:
        path: A file, a folder of band files, or a group (``folder/T33UUU_20170216T102101_{band}``).
        band_names: The bands of stacks that name none, in the file's order, ``-`` for a layer that is none. A stack
            that does name its bands keeps its own names; where as many names are given and they contradict it, it is
            refused.
        level: ``L1C`` or ``L2A``.
        scale: Reflectance per DN; required for floating-point and 8-bit files without a scale tag.
        offset: In DN, added before scaling.
        nodata: Replaces what the file declares, and the rule that all-zero pixels of integer scenes are fill.

    Raises:
        UserError: If bands have no name, settings contradict the file, or the files of one scene do not fit together.
        UnreadableError: If a file cannot be opened.
        NotImageryError: If it is a palette, a picture for display, or complex.
    """
    path = Path(path).absolute()
    if level is not None and level not in LEVELS:
        raise UserError(f"--data.level {level} is no product level; {nearest(level, LEVELS)}")
    check_settings(scale=scale, offset=offset)
    try:
        is_file = path.is_file()
    except OSError as error:  # a name too long for any file, from an index
        raise UnreadableError(f"cannot open {path}: {error.strerror}") from error
    if is_file:
        header = _header(str(path))
        parts = [(name, number, header) for name, number in name_stack(header, band_names)]
    elif path.suffix.lower() in RASTER_SUFFIXES and BAND not in path.name and not path.is_dir():
        raise UnreadableError(f"{path} does not exist, or is a link that leads nowhere")
    else:
        members = [(band, _header(str(file))) for band, file in band_files(path)]
        parts = [(name, header.numbers[0], header) for name, header in finest(members)]
    headers = list({header.file: header for _, _, header in parts}.values())
    grid = max(headers, key=lambda header: header.width)
    names = product_names(path, Path(headers[0].file))
    metadata_path = metadata_file(path)
    metadata = None if metadata_path is None else read_metadata(metadata_path, needs_offset=offset is None)

    dtype = np.result_type(*(header.dtype for header in headers))
    tags = one_value("scale tags", [(header.file, header.scaling) for header in headers], "them alike in the files")
    units = radiometry(str(path), dtype, scale=scale, offset=offset, tags=tags, metadata=metadata, names=names)
    if nodata is None:
        declared = one_value("nodata values", [(header.file, header.nodata) for header in headers], "--data.nodata")
    else:
        declared = nodata
    stated_level = metadata.level if metadata is not None else level_in_names([*names, path.parent.name])
    if stated_level is None and any(name == "B10" for name, _, _ in parts):
        stated_level = "L1C"
    # Integer zeros go on marking fill whatever is set, so no setting replaces them.
    stated_nodata = next(
        (h.nodata for h in headers if h.nodata is not None and (h.nodata or h.dtype.kind == "f")), None
    )
    return Scene(
        path=str(path),
        bands=tuple(name for name, _, _ in parts),
        sources=tuple(
            BandSource(header.file, number, ratio_to_grid(header, grid), header.masked) for _, number, header in parts
        ),
        height=grid.height,
        width=grid.width,
        crs=grid.crs or None,
        transform=grid.transform,
        dtype=dtype.name,
        nodata=declared,
        zero_fill=dtype.kind in "iu",
        scale=units.scale,
        offset=units.offset,
        offset_source=units.offset_source,
        level=level or stated_level,
        date=date_in_names(names) or date_in_tag(headers[0].datetime),
        overruled=(
            *units.overruled,
            *overruled({"nodata": stated_nodata, "level": stated_level}, {"nodata": nodata, "level": level}),
        ),
    )


READING = 4
"""Raised whenever the same files give other pixels or labels: what was computed from them is then computed anew."""


def read_header(path: str | os.PathLike[str]) -> Header:
    """What the header of one raster file tells, be it imagery, labels or a picture.

    Raises:
        UserError: If its bands declare different nodata values or scales.
        UnreadableError: If it cannot be opened.
        NotImageryError: If it holds complex numbers or nothing but an alpha band.
    """
    return _header(str(Path(path).absolute()), labels=True)


def read_window(
    scene: Scene, bands: Sequence[str], row: int, col: int, height: int, width: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Read a window of the scene's grid: of each file only the stored pixels that cover it, all bands at once.

    A pixel is valid unless
    - a requested band holds the scene's nodata value there, unless that is an integer 0;
    - a requested band holds there what nothing measures (`measured`): NaN, an infinity, reflectance beyond ±1e6;
    - the file's mask or alpha band excludes it;
    - it is 0 in all requested bands, where `Scene.zero_fill` holds or an integer 0 is nodata. (Not in any: Sentinel-2
      fill is 0 in all bands, while a single 0 is a dark surface, whatever a file declares: half the pixels of
      chips_coastal have a 0 in some of twelve bands, mostly B09, one in fifty in some of the default ten.)

    Args:
        scene: From `open_scene`.
        bands: Canonical names, in the order wanted.
        row: First row of the window.
        col: First column.
        height: Rows of the window, which must lie within the scene.
        width: Columns.

    Returns:
        DN as stored (C, height, width), in the scene's dtype, and valid (height, width).

    Raises:
        UserError: If the scene has not all the bands.
        UnreadableError: If a file cannot be read; the message names file and window.
        ValueError: If the window does not lie within the scene.
    """
    return read_counted(scene, bands, row, col, height, width)[:2]


def read_counted(
    scene: Scene, bands: Sequence[str], row: int, col: int, height: int, width: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]:
    """As `read_window`, with the pixels to be counted (height, width): not `measured`, yet not declared as nodata.

    The last is None where there is none, which for the integers of a product needs no look at the pixels.
    """
    if row < 0 or col < 0 or height < 1 or width < 1 or row + height > scene.height or col + width > scene.width:
        raise ValueError(
            f"window {(row, col, height, width)} is not within {scene.height}×{scene.width} of {scene.path}"
        )
    channels: dict[str, list[tuple[int, BandSource]]] = {}
    for channel, band in enumerate(bands):
        if band not in scene.bands:
            raise UserError(f"{scene.path} has no band {band}; it has {' '.join(scene.bands)}: set --data.bands")
        source = scene.sources[scene.bands.index(band)]
        channels.setdefault(source.file, []).append((channel, source))
    dn = np.empty((len(bands), height, width), scene.dtype)
    valid = np.ones((height, width), np.bool_)
    for file, parts in channels.items():
        ratio = parts[0][1].ratio
        top, left = row // ratio, col // ratio
        window = Window(left, top, -(-(col + width) // ratio) - left, -(-(row + height) // ratio) - top)
        numbers = [source.number for _, source in parts]
        stored, mask = _read(file, numbers, window, masked=parts[0][1].masked)
        inside = (
            ...,
            slice(row - top * ratio, row - top * ratio + height),
            slice(col - left * ratio, col - left * ratio + width),
        )
        dn[[channel for channel, _ in parts]] = _replicate(stored, ratio)[inside]
        if mask is not None:
            valid &= _replicate(mask != 0, ratio)[inside]
    marker = None if scene.nodata is None else _as_dtype(scene.nodata, dn.dtype)
    zero = dn.dtype.kind in "iu" and marker == 0
    if marker is not None and not zero:
        valid &= (dn != marker).all(axis=0)
    if scene.zero_fill or zero:
        valid &= dn.any(axis=0)
    known = measured(dn, scene.scale, scene.offset)
    if known is None:
        return dn, valid, None
    dropped = valid & ~known
    if scene.nodata is not None and math.isnan(scene.nodata):
        dropped &= ~np.isnan(dn).any(axis=0)
    valid &= known
    return dn, valid, dropped if dropped.any() else None


def read_labels(
    path: str | os.PathLike[str],
) -> tuple[npt.NDArray[np.integer[Any]], str | None, Transform, int | None]:
    """Read a label raster whole.

    Args:
        path: A raster with one band of class ids; floating-point files are taken where all values are whole.

    Returns:
        labels (H, W) in an integer type, crs, transform as in `Scene`, and the id of what has no label or None: the
        declared one; where a mask or an alpha band excludes pixels, an id below all others, which those have then.

    Raises:
        UserError: If it has more than one band or values that are no whole numbers.
        UnreadableError: If it cannot be opened or read.
    """
    header = _header(str(Path(path).absolute()), labels=True)
    if len(header.numbers) != 1:
        raise UserError(f"{path} has {len(header.numbers)} bands; a label raster has one band of class ids")
    if header.height * header.width * header.dtype.itemsize > _MAX_LABEL_BYTES:
        raise UserError(
            f"{path} has {header.height}×{header.width} labels of {header.dtype}, more than "
            f"{_MAX_LABEL_BYTES >> 20} MB: cut it into parts, as its images are"
        )
    stored, mask = _read(header.file, header.numbers, Window(0, 0, header.width, header.height), masked=header.masked)
    labels = stored[0]
    nodata = header.nodata
    if labels.dtype.kind == "f":
        missing = np.isnan(labels)
        if nodata is not None:
            missing |= labels == nodata
        if missing.any():
            fits = nodata is not None and math.isfinite(nodata) and abs(nodata) < 2**53
            nodata = nodata if fits else -1
            labels = np.where(missing, nodata, labels)
        whole = labels.astype(np.int64)
        if not np.array_equal(whole, labels):
            value = labels[whole != labels][0]
            raise UserError(f"{path} holds {value}, which is no class id; a label raster holds whole numbers")
        labels = whole
    elif labels.dtype.kind not in "iu":
        raise UserError(f"{path} holds {labels.dtype}; a label raster holds whole numbers")
    if nodata is not None and not (math.isfinite(nodata) and nodata == int(nodata)):
        nodata = None
    if mask is not None and not mask.all():
        without = mask == 0
        if nodata is not None:
            without |= labels == nodata
        nodata = min(-1, int(labels.min()) - 1)  # no id: one that is declared may be listed as a class
        labels = np.where(without, nodata, labels.astype(np.int64))
    return labels, header.crs or None, header.transform, None if nodata is None else int(nodata)


def read_legend(path: str | os.PathLike[str]) -> tuple[dict[int, str], dict[int, tuple[int, int, int]]]:
    """Read what a label raster tells of its classes.

    Args:
        path: A label raster.

    Returns:
        Class names by id, from the tags ``class_<id>``, and colours (red, green, blue) by id, from its colour table.

    Raises:
        UnreadableError: If it cannot be opened.
    """
    file = str(Path(path).absolute())
    try:
        with described(file) as dataset, rasterio.Env():
            tags = dataset.tags()
            palette = dataset.colormap(1) if ColorInterp.palette in dataset.colorinterp else {}
    except UNREADABLE as error:
        raise UnreadableError(f"cannot open {file}: {error}") from error
    ids = {key: key.removeprefix("class_") for key in tags if key.startswith("class_")}
    names = {int(text): tags[key] for key, text in ids.items() if text.removeprefix("-").isdecimal()}
    return names, {value: (colour[0], colour[1], colour[2]) for value, colour in palette.items()}


def _header(file: str, *, labels: bool = False) -> Header:
    """Open a file again and read its header.

    Raises:
        UnreadableError: If it cannot be opened.
        HeaderError: If it lies nowhere, or is scaled to nothing.
        NotImageryError: If it is a palette (but for labels), a picture for display, or complex.
    """
    try:
        # A double's lowest is often declared nodata of singles: rasterio overflows where it compares them. The
        # environment sends GDAL's messages to logging instead of stderr.
        with np.errstate(over="ignore"), rasterio.Env(), described(file, fresh=True) as dataset:
            interpretation = dataset.colorinterp
            numbers = tuple(i for i, c in enumerate(interpretation, start=1) if c != ColorInterp.alpha)
            # Each of these is made again by rasterio when it is asked for: once a file, not once a band.
            all_dtypes, all_nodata, all_descriptions = dataset.dtypes, dataset.nodatavals, dataset.descriptions
            scales, offsets = dataset.scales, dataset.offsets
            dtypes = {all_dtypes[i - 1] for i in numbers}
            nodata = {all_nodata[i - 1] for i in numbers}
            scaling = {(scales[i - 1], offsets[i - 1]) for i in numbers}
            descriptions = tuple(all_descriptions[i - 1] or "" for i in numbers)
            masked = any(MaskFlags.per_dataset in flags for flags in dataset.mask_flag_enums)
            crs_wkt = dataset.crs.wkt if dataset.crs else ""
            datetime = dataset.tags().get("TIFFTAG_DATETIME")
            transform = tuple(dataset.transform)[:6]
            height, width = dataset.height, dataset.width
            masked = masked or open_datasets.mask(file, fresh=True) is not None
    except UNREADABLE as error:
        kind = other_kind(Path(file))
        raise UnreadableError(f"cannot open {file}: {error}" if kind is None else f"{file} {kind}") from error
    if not numbers:
        raise NotImageryError(f"{file} holds nothing but an alpha band; leave it out of --data")
    if any(dtype.startswith("complex") for dtype in dtypes):
        raise NotImageryError(f"{file} holds complex numbers; --data takes integer or floating-point rasters")
    if not labels:
        if ColorInterp.palette in interpretation:
            raise NotImageryError(f"{file} holds a palette's colour numbers, no band values; leave it out of --data")
        rgb = {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= set(interpretation)
        if rgb and dtypes == {"uint8"} and not any(descriptions):
            raise NotImageryError(
                f"{file} is a picture for display (8-bit RGB), no band values; leave it out of --data"
            )
    if len(nodata) > 1 and not all(value != value for value in nodata):
        raise UserError(
            f"{file} declares different nodata values by band: {sorted(map(str, nodata))}; set --data.nodata"
        )
    if wrong := [pair for pair in scaling if not (is_scale(pair[0]) and math.isfinite(pair[1]))]:
        scale, offset = wrong[0]
        raise HeaderError(f"{file} tags a scale of {scale:g} and an offset of {offset:g}; fix or remove the tags")
    if len(scaling) > 1:
        raise UserError(
            f"{file} tags different scales or offsets by band: {sorted(scaling)}; set them alike in the file"
        )
    a, b, c, d, e, f = transform
    area = a * e - b * d
    reach = max(abs(c) + (abs(a) + abs(b)) * max(width, height), abs(f) + (abs(d) + abs(e)) * max(width, height))
    if not (abs(area) > 1 / LARGEST**2 and reach <= LARGEST and math.isfinite(c + f)):
        raise HeaderError(f"{file} lies nowhere, its transform is {transform}; fix its georeferencing")
    return Header(
        file=file,
        height=height,
        width=width,
        crs=crs_name(crs_wkt),
        transform=(a, b, c, d, e, f),
        dtype=np.result_type(*dtypes),
        numbers=numbers,
        descriptions=descriptions,
        nodata=next(iter(nodata)),
        scaling=None if scaling == {(1.0, 0.0)} else next(iter(scaling)),
        masked=masked,
        datetime=datetime,
    )


def _read(
    file: str, numbers: Sequence[int], window: Window, *, masked: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
    """Stored values (C, h, w) of a window and, where `masked`, the file's mask (h, w), 0 where excluded."""
    try:
        dataset = open_datasets.get(file)
        with rasterio.Env():
            stored = dataset.read(list(numbers), window=window)
            mask = None
            if masked:
                beside = open_datasets.mask(file)
                mask = (
                    dataset.read_masks(numbers[0], window=window) if beside is None else beside.read(1, window=window)
                )
    except UNREADABLE as error:
        open_datasets.drop(file)
        raise UnreadableError(
            f"cannot read {file}, rows {window.row_off} to {window.row_off + window.height}, "
            f"columns {window.col_off} to {window.col_off + window.width}: {error}"
        ) from error
    return stored, mask


def _replicate(stored: npt.NDArray[Any], ratio: int) -> npt.NDArray[Any]:
    """Each pixel `ratio` times along the last two axes."""
    return stored if ratio == 1 else stored.repeat(ratio, axis=-2).repeat(ratio, axis=-1)


def _as_dtype(value: float, dtype: np.dtype[Any]) -> np.generic | None:
    """A nodata value in the type of the DN, or None where no DN can equal it."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # a double's lowest, declared of singles: -inf, which is no value either
            return None if math.isnan(value) else dtype.type(value)
    limits = np.iinfo(dtype)
    return (
        dtype.type(value)
        if math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max
        else None
    )
