"""What headers alone give away, scene by scene and over the archive. Each check names its evidence and threshold."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError
from ssl_geo.imagery.coordinates import to_lonlat
from ssl_geo.imagery.findings import Finding, copied, counted
from ssl_geo.imagery.scenes import Scene, listed_statements
from ssl_geo.imagery.sensors import DEFAULT_BANDS, KNOWN_BANDS

_EARTH_RADIUS = 6_371_008.8  # metres, mean radius of WGS 84 (IUGG)
_METRES_PER_DEGREE = np.pi * _EARTH_RADIUS / 180
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_SQUARE = 0.02  # by which the sides of a pixel may differ on the ground; the sphere is up to 0.01 off the ellipsoid
_GSD = 0.05  # by which a pixel may differ from 10 m


def pixel_metres(scene: Scene) -> tuple[float, float] | None:
    """Width and height of the pixel in the scene's middle, in metres on a sphere; None without a usable CRS."""
    if scene.crs is None:
        return None
    a, b, c, d, e, f = scene.transform
    cols, rows = scene.width / 2 + np.array([0.0, 1.0, 0.0]), scene.height / 2 + np.array([0.0, 0.0, 1.0])
    try:
        lonlat = to_lonlat(scene.crs, a * cols + b * rows + c, d * cols + e * rows + f)
    except UserError:  # a local CRS, or another planet's
        return None
    steps = (lonlat[1:] - lonlat[0]) * (np.cos(np.radians(lonlat[0, 1])), 1.0)
    width, height = np.hypot(*steps.T) * _METRES_PER_DEGREE
    return (float(width), float(height)) if np.isfinite(width * height) and width * height > 0 else None


def declare_nodata(scene: Scene, value: float) -> tuple[str, str]:
    """What to do about a fill that this program knows but no file declares, and the command line for a copy."""
    text = f"{value:g}"
    fix = f"none needed here: {'NaN' if math.isnan(value) else 'pixels that are 0 in all bands'} count as nodata"
    file = scene.sources[0].file
    if len({source.file for source in scene.sources}) > 1 or file.lower().endswith(".jp2") or len(scene.bands) == 1:
        return fix, ""
    command = f"{copied(file)} && rio edit-info --nodata {text} OUT.tif"
    return f"{fix}; for other software, a copy that declares it", command


def _warp(scene: Scene) -> str:
    """The command that brings a scene to square pixels of 10 m in its UTM zone."""
    lonlat = corners_lonlat([scene])[0].mean(axis=0)
    file = shlex.quote(scene.sources[0].file)
    if not np.isfinite(lonlat).all():
        return f"rio warp {file} OUT.tif --dst-crs EPSG:326ZZ --res 10"
    code = (32600 if lonlat[1] >= 0 else 32700) + int((lonlat[0] + 180) % 360 // 6) + 1
    return f"rio warp {file} OUT.tif --dst-crs EPSG:{code} --res 10"


def check_georeferencing(scene: Scene) -> list[Finding]:
    """No CRS or no transform: neither overlaps nor splits by place are known then."""
    lacks = [
        what
        for what, is_missing in (("CRS", scene.crs is None), ("transform", scene.transform == _IDENTITY))
        if is_missing
    ]
    if not lacks:
        return []
    return [
        Finding(
            "georeferencing missing",
            "warning",
            (scene.path,),
            f"no {' and no '.join(lacks)}",
            "a CRS and a transform",
            "fetch them with their georeferencing, or write it into copies; without, splits know images, not places",
            command=f"{copied(scene.sources[0].file)} && rio edit-info --crs EPSG:CODE --transform "
            "'[10, 0, LEFT, 0, -10, TOP]' OUT.tif",
        )
    ]


def check_pixel_shape(scene: Scene) -> list[Finding]:
    """Pixels whose sides differ by more than 1 % in the file's units; a warning if by more than 2 % on the ground.

    Degrees are shorter along a parallel, so that non-square degrees can be square ground. Rotations by 90 degrees and
    local views assume square pixels.
    """
    if scene.transform == _IDENTITY:
        return []
    a, b, _, d, e, _ = scene.transform
    sides = float(np.hypot(a, d)), float(np.hypot(b, e))
    if min(sides) <= 0 or max(sides) / min(sides) < 1.01:
        return []
    metres = pixel_metres(scene)
    is_square = metres is not None and abs(np.log(metres[0] / metres[1])) < _SQUARE
    ground = "size on the ground unknown" if metres is None else f"{metres[0]:.2f} × {metres[1]:.2f} m on the ground"
    return [
        Finding(
            "non-square pixels",
            "info" if is_square else "warning",
            (scene.path,),
            f"{sides[0]:.3g} × {sides[1]:.3g} in the units of {(scene.crs or 'no CRS')[:20]}, {ground}",
            "square pixels" + (", at least on the ground" if not is_square else " in a projected CRS"),
            "warp them to square pixels, or keep them: geometry is distorted by the ratio",
            command=_warp(scene),
        )
    ]


def check_ground_sampling(scene: Scene) -> list[Finding]:
    """A finest grid that is not of 10 m (5 %): chips then show more or less ground than the names of bands promise."""
    metres = pixel_metres(scene)
    if metres is None or not any(band in KNOWN_BANDS for band in scene.bands):
        return []
    size = float(np.sqrt(metres[0] * metres[1]))
    if abs(size / 10 - 1) < _GSD:
        return []
    return [
        Finding(
            "ground sampling distance",
            "info",
            (scene.path,),
            f"pixels of {size:.1f} m",
            "10 m",
            "warp them to 10 m, or pretrain and probe on imagery of one distance",
            command=_warp(scene),
        )
    ]


def check_resolutions(scene: Scene) -> list[Finding]:
    """Band files at several resolutions; they are brought to the finest by exact replication (docs/design.md)."""
    ratios = sorted({source.ratio for source in scene.sources})
    if len(ratios) < 2:
        return []
    size = float(np.hypot(scene.transform[0], scene.transform[3]))
    counts = Counter(source.ratio for source in scene.sources)
    return [
        Finding(
            "mixed resolutions",
            "info",
            (scene.path,),
            ", ".join(f"{counted(counts[ratio], 'band')} of {size * ratio:g}" for ratio in ratios)
            + " units of the CRS",
            "one resolution",
            "none needed: coarser bands are replicated to the finest grid",
        )
    ]


def check_orientation(scene: Scene) -> list[Finding]:
    """A grid that is turned against its CRS, or upside down; read as stored."""
    _, b, _, d, e, _ = scene.transform
    if scene.transform == _IDENTITY or (b == 0 and d == 0 and e < 0):
        return []
    found = "rows run from south to north" if b == 0 and d == 0 else "rows and columns turned against the CRS"
    fix = "none needed, unless labels or maps are north-up: then warp copies"
    crs = scene.crs or ""
    command = (
        f"rio warp {shlex.quote(scene.sources[0].file)} OUT.tif --dst-crs {crs}" if crs.startswith("EPSG:") else ""
    )
    return [
        Finding("grid not north-up", "info", (scene.path,), found, "rows from north to south", fix, command=command)
    ]


def check_nodata(scene: Scene) -> list[Finding]:
    """Neither nodata value nor mask declared; other software then takes the fill for ground."""
    if scene.nodata is not None or any(source.masked for source in scene.sources):
        return []
    fix, command = "none needed for NaN, else --data.nodata with the value that stands for fill", ""
    if scene.zero_fill:
        fix, command = declare_nodata(scene, 0)
    return [
        Finding(
            "nodata not declared",
            "info",
            (scene.path,),
            f"{scene.dtype} without nodata value or mask",
            "a nodata value, 0 for Sentinel-2 integers",
            fix,
            command=command,
        )
    ]


SCENE_CHECKS: tuple[Callable[[Scene], list[Finding]], ...] = (
    check_georeferencing,
    check_pixel_shape,
    check_orientation,
    check_ground_sampling,
    check_resolutions,
    check_nodata,
)


def check_bands(scenes: Sequence[Scene]) -> list[Finding]:
    """Scenes that miss bands of the default ten, which pretraining leaves out; proposes the bands that all have."""
    scenes = [scene for scene in scenes if KNOWN_BANDS.issuperset(scene.bands)]
    missing = [
        (scene, lacks) for scene in scenes if (lacks := [band for band in DEFAULT_BANDS if band not in scene.bands])
    ]
    if not missing:
        return []
    shared = reduce(lambda one, other: one & other, (frozenset(scene.bands) for scene in scenes))
    common = [band for band in scenes[0].bands if band in shared]
    fix = f"--data.bands {' '.join(common)}" if common else "give scenes of one sensor"
    expected = "the default bands of pretraining in every scene"
    return [
        Finding("bands missing", "warning", (scene.path,), f"no {' '.join(lacks)}", expected, fix)
        for scene, lacks in missing
    ]


def check_products(scenes: Sequence[Scene]) -> list[Finding]:
    """Levels or radiometric offsets that differ between scenes, as far as headers, metadata and names tell.

    L1C and L2A differ by the atmosphere, baselines before and from 04.00 by 1000 DN; `refuse_mixed` stops a run.
    """
    found = []
    for what, known in (
        ("products", [(scene.level, scene.path) for scene in scenes if scene.level is not None]),
        ("offsets", [(f"{s.offset:g}", s.path) for s in scenes if s.offset_source != "assumed"]),
    ):
        counts = Counter(value for value, _ in known)
        if len(counts) < 2:
            continue
        rare = counts.most_common()[-1][0]
        paths = tuple(path for value, path in known if value == rare)
        said = ", ".join(f"{value} in {count}" for value, count in counts.most_common())
        fix = f"give one of the {what} alone, or --data.allow_mixed true (each is read with its own offset)"
        found.append(Finding(f"mixed {what}", "error", paths, said, "one for all scenes", fix, len(paths)))
    return found


def check_assumed_offset(scenes: Sequence[Scene]) -> list[Finding]:
    """Integer scenes whose offset nothing tells, so that 0 is taken; products since January 2022 carry -1000."""
    wide = [scene for scene in scenes if np.dtype(scene.dtype).kind in "iu" and np.dtype(scene.dtype).itemsize > 1]
    assumed = [scene for scene in wide if scene.offset_source == "assumed"]
    if not assumed:
        return []
    return [
        Finding(
            "offset assumed",
            "info",
            tuple(scene.path for scene in assumed),
            "no tag, metadata or product name states the offset, 0 is taken",
            "an offset that tag, metadata or name states",
            "--data.offset -1000 for products of processing baseline 04.00 and later, else --data.offset 0",
            len(assumed),
        )
    ]


def check_overruled(scenes: Sequence[Scene]) -> list[Finding]:
    """Scenes that state a level, scale, offset or nodata of which the settings given say otherwise."""
    replaced = [scene for scene in scenes if scene.overruled]
    if not replaced:
        return []
    return [
        Finding(
            "settings against files",
            "warning",
            tuple(scene.path for scene in replaced),
            listed_statements(scene.overruled for scene in replaced),
            "settings that say what the files say, or files that say nothing",
            "leave the setting out where the files are right",
            len(replaced),
        )
    ]


def corners_lonlat(scenes: Sequence[Scene]) -> npt.NDArray[np.float64]:
    """Longitude and latitude (N, 4, 2) of the scenes' corners, in turn around; NaN where a scene has no usable CRS."""
    corners = np.full((len(scenes), 4, 2), np.nan)
    by_crs: dict[str, list[int]] = {}
    for k, scene in enumerate(scenes):
        if scene.crs is not None:
            by_crs.setdefault(scene.crs, []).append(k)
    for crs, members in by_crs.items():
        points = []
        for k in members:
            a, b, c, d, e, f = scenes[k].transform
            height, width = scenes[k].height, scenes[k].width
            for col, row in ((0, 0), (width, 0), (width, height), (0, height)):
                points.append((a * col + b * row + c, d * col + e * row + f))
        xy = np.array(points)
        try:
            corners[members] = to_lonlat(crs, xy[:, 0], xy[:, 1]).reshape(-1, 4, 2)
        except UserError:
            continue  # a local CRS: no place on earth is known
    corners[~np.isfinite(corners).all(axis=(1, 2))] = np.nan
    return corners
