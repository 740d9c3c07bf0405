"""Open whatever an archive holds, and say what the headers tell; nothing here gives up at the first mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_geo.errors import UserError
from ssl_geo.imagery.archives import FoundScene
from ssl_geo.imagery.findings import Finding
from ssl_geo.imagery.rasters import open_scene, read_header
from ssl_geo.imagery.scenes import (
    SENTINEL2_SCALE,
    BandSource,
    Header,
    HeaderError,
    NotImageryError,
    Scene,
    SettingError,
    UnknownUnitError,
    UnnamedBandsError,
    UnreadableError,
)
from ssl_geo.imagery.sensors import LIKELY_ORDERS


@dataclass
class Inspected:
    """A scene as far as it could be opened.

    Attributes:
        path: As in `FoundScene`.
        headers: Of the files that could be opened.
        scene: As training would read it; where it does not say, with the likely order of bands (or bands by number) and
            scale 1; None where it is no use.
        readable: What to read pixels from: the scene, or each of its files with bands by number.
        findings: What the headers told.
    """

    path: str
    headers: list[Header] = field(default_factory=list)
    scene: Scene | None = None
    readable: list[Scene] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def inspect(found: FoundScene, settings: Mapping[str, Any]) -> Inspected:
    """Open a scene leniently.

    Args:
        found: From `walk_scenes`.
        settings: Of `open_scene`; None for what is not set.
    """
    seen = Inspected(str(found.path))
    for file in found.files:
        try:
            header = read_header(file)
        except HeaderError as error:
            seen.findings.append(_refused(str(file), error))
        except UnreadableError as error:
            seen.findings.append(unreadable(str(file), error))
        except NotImageryError as error:
            seen.findings.append(_no_imagery(seen.path, error))
        except UserError as error:
            seen.findings.append(_refused(str(file), error))
        else:
            seen.headers.append(header)
    if len(seen.headers) < len(found.files):
        seen.readable = [numbered(header) for header in seen.headers]
        return seen
    seen.scene = _open(seen, dict(settings))
    seen.readable = [seen.scene] if seen.scene is not None else [numbered(header) for header in seen.headers]
    return seen


def _open(seen: Inspected, settings: dict[str, Any]) -> Scene | None:
    """`open_scene`, with what is missing assumed and said."""
    while True:
        try:
            return open_scene(seen.path, **settings)
        except UnnamedBandsError:
            header = seen.headers[0]
            likely = LIKELY_ORDERS.get(len(header.numbers))
            seen.findings.append(_unnamed(seen.path, len(header.numbers), likely))
            if likely is None:
                is_wide = header.dtype.kind in "iu" and header.dtype.itemsize > 1
                if not is_wide and header.scaling is None and settings.get("scale") is None:
                    seen.findings.append(_unit_unknown(seen.path, header))
                return numbered(header, settings.get("scale"))
            settings["band_names"] = likely
        except UnknownUnitError:
            seen.findings.append(_unit_unknown(seen.path, seen.headers[0]))
            settings["scale"] = 1.0
        except SettingError:
            raise
        except NotImageryError as error:
            seen.findings.append(_no_imagery(seen.path, error))
            return None
        except HeaderError as error:
            seen.findings.append(_refused(seen.path, error))
            return None
        except UnreadableError as error:  # a file that vanished since its header was read
            seen.findings.append(unreadable(seen.path, error))
            return None
        except UserError as error:
            seen.findings.append(_refused(seen.path, error))
            return None


def numbered(header: Header, scale: float | None = None) -> Scene:
    """A file as a scene whose bands go by number."""
    is_integer = header.dtype.kind in "iu"
    if scale is None:
        default = SENTINEL2_SCALE if is_integer and header.dtype.itemsize > 1 else 1.0
        scale = default if header.scaling is None else header.scaling[0]
    return Scene(
        path=header.file,
        bands=tuple(str(number) for number in header.numbers),
        sources=tuple(BandSource(header.file, number, 1, header.masked) for number in header.numbers),
        height=header.height,
        width=header.width,
        crs=header.crs or None,
        transform=header.transform,
        dtype=header.dtype.name,
        nodata=header.nodata,
        zero_fill=is_integer,
        scale=scale,
        offset=0.0 if header.scaling is None else header.scaling[1] / header.scaling[0],
        offset_source="assumed" if header.scaling is None else "tags",
        level=None,
        date=None,
        overruled=(),
    )


def _unnamed(path: str, count: int, likely: Sequence[str] | None) -> Finding:
    names = f"{' '.join(likely)} (the likely order)" if likely else "… (in the file's order)"
    return Finding(
        "band names missing",
        "error",
        (path,),
        f"{count} band{'' if count == 1 else 's'} without a name",
        "a description for each band, B02 for example",
        f"--data.band_names {names}",
    )


def _unit_unknown(path: str, header: Header) -> Finding:
    return Finding(
        "unit unknown",
        "error",
        (path,),
        f"{header.dtype} without a scale tag",
        "16-bit DN, or a scale tag",
        "--data.scale 1 for reflectance, 0.0001 for reflectance times 10000",
    )


def unreadable(path: str, error: BaseException) -> Finding:
    """A file or a part of it that cannot be read, with what GDAL said, or why it is not tried and what to do."""
    said, mend = str(error), "fetch the file again"
    if said.startswith("cannot "):
        while (cause := error.__cause__) is not None:  # "Read failed. See previous exception for details."
            error = cause
        said += "" if str(error) in said else f" ({error})"
    elif "; " in said:
        said, _, mend = said.rpartition("; ")
    return Finding(
        "unreadable",
        "error",
        (path,),
        " ".join(said.split())[:400],
        "every block readable",
        f"{mend}, or take it out of the archive (--data.max_unreadable is the share that may be left out)",
    )


def _no_imagery(path: str, error: Exception) -> Finding:
    kind = str(error).split(" holds ")[-1].split(" is ")[-1].partition(";")[0]
    return Finding(
        "no imagery",
        "warning",
        (path,),
        kind,
        "band values, as integers or floating-point numbers",
        "leave it out of the archive, or export the bands themselves instead of a picture",
    )


def _refused(path: str, error: Exception) -> Finding:
    told, _, mend = str(error).rpartition("; ") if "; " in str(error) else str(error).rpartition(": ")
    return Finding("header contradicts itself", "error", (path,), told, "one product on one grid", mend)
