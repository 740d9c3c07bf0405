"""Open whatever an archive holds, and say what the headers tell; nothing here gives up at the first mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_geo.errors import UserError
from ssl_geo.imagery.archives import FoundScene
from ssl_geo.imagery.findings import Finding
from ssl_geo.imagery.rasters import open_scene, read_header
from ssl_geo.imagery.scenes import (
    BandSource,
    Header,
    NotImageryError,
    Scene,
    UnknownUnitError,
    UnnamedBandsError,
    UnreadableError,
)
from ssl_geo.imagery.sensors import LIKELY_ORDERS

_MAX_RATIO = 2000  # of pixels to file in bytes; deflate reaches 1032:1 (zlib.net, "Technical Details")
_SMALL = 1 << 30  # bytes of pixels that are read in any case


@dataclass
class Inspected:
    """A scene as far as it could be opened.

    Attributes:
        path: As in `FoundScene`.
        headers: Of the files that could be opened.
        scene: As training would read it, but for what `assumed` lists; None where it is no use.
        readable: What to read pixels from: the scene, or each of its files with bands by number.
        assumed: ``bands`` where the likely order stands in for names, ``scale`` where 1 stands in for the unit.
        findings: What the headers told.
    """

    path: str
    headers: list[Header] = field(default_factory=list)
    scene: Scene | None = None
    readable: list[Scene] = field(default_factory=list)
    assumed: set[str] = field(default_factory=set)
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
        except UnreadableError as error:
            seen.findings.append(unreadable(str(file), error))
        except NotImageryError as error:
            seen.findings.append(_no_imagery(seen.path, error))
        except UserError as error:
            seen.findings.append(_refused(str(file), error))
        else:
            seen.headers.append(header)
            if (claim := _impossible(header)) is not None:
                seen.findings.append(claim)
                return seen
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
        except UnnamedBandsError as error:
            count = len(seen.headers[0].numbers)
            likely = LIKELY_ORDERS.get(count)
            seen.assumed.add("bands")
            names = " ".join(likely) if likely else "…"
            seen.findings.append(
                Finding(
                    "band names missing",
                    "error",
                    (seen.path,),
                    f"{count} band{'' if count == 1 else 's'} without a name",
                    "a description for each band, B02 for example",
                    f"--data.band_names {names}" + (" (the likely order)" if likely else " (in the file's order)"),
                )
            )
            if likely is None:
                return None
            settings["band_names"] = likely
        except UnknownUnitError:
            seen.assumed.add("scale")
            seen.findings.append(
                Finding(
                    "unit unknown",
                    "error",
                    (seen.path,),
                    f"{seen.headers[0].dtype} without a scale tag",
                    "16-bit DN, or a scale tag",
                    "--data.scale 1 for reflectance, 0.0001 for reflectance times 10000",
                )
            )
            settings["scale"] = 1.0
        except NotImageryError as error:
            seen.findings.append(_no_imagery(seen.path, error))
            return None
        except UnreadableError as error:  # a file that vanished since its header was read
            seen.findings.append(unreadable(seen.path, error))
            return None
        except UserError as error:
            seen.findings.append(_refused(seen.path, error))
            return None


def numbered(header: Header) -> Scene:
    """A file as a scene whose bands go by number, to read pixels of what has no place in training."""
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
        zero_fill=False,
        scale=1.0,
        offset=0.0,
        offset_source="assumed",
        level=None,
        date=None,
    )


def unreadable(path: str, error: Exception) -> Finding:
    """A file or a part of it that cannot be read, whatever GDAL said."""
    return Finding(
        "unreadable",
        "error",
        (path,),
        " ".join(str(error).split())[:300],
        "every block readable",
        "fetch the file again, or take it out of the archive (--data.max_unreadable is the share that may be left out)",
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


def _impossible(header: Header) -> Finding | None:
    """A header that claims more pixels than the file can hold, so that reading them would not end."""
    claimed = header.height * header.width * len(header.numbers) * header.dtype.itemsize
    stored = Path(header.file).stat().st_size
    if claimed <= max(_SMALL, _MAX_RATIO * stored):
        return None
    return Finding(
        "unreadable",
        "error",
        (header.file,),
        f"{header.height}×{header.width} pixels, {claimed / 1e9:.0f} GB, claimed by a file of {stored} bytes",
        "every block readable",
        "fetch the file again, or take it out of the archive",
    )
