"""What a scene's pixels give away: fill, saturation, constant bands, units, offsets. Thresholds: shares of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ssl_geo.imagery.checks import declare_nodata
from ssl_geo.imagery.findings import Finding, copied, counted
from ssl_geo.imagery.profiles import HIGH_DN, Fill, Profile
from ssl_geo.imagery.scenes import MEASURABLE, Scene
from ssl_geo.imagery.sensors import SENTINEL1_GRD

_SATURATED = 1e-3  # share of a band's pixels; single ones are glint, fires and roofs
_SPECIAL = (HIGH_DN, 32_767, 65_535)  # what products write for saturated
_CLIPPED = 5e-3  # share of a band's pixels that all hold its maximum
_BRIGHT = 0.4  # reflectance from which on a shared maximum is a clip and no dark, coarsely stored band
_NO_REFLECTANCE = 1.5  # median from which on values are in another unit; clouds reach 1.2
_CONSTANT = 64  # pixels from which on a single value is strange
_NEGATIVE = 0.05  # share of pixels below -0.01 in most bands
_SPECK = 16  # pixels of fill below which it is taken for chance
_SHIFTED = (950, 1300)  # DN where the darkest band's darkest pixels lie if 1000 was added
_SHIFTED_MOST = 1600  # DN below which half of the bands' darkest pixels lie then
_SHIFTED_CIRRUS = 900  # DN of B10, which is near 20 without the shift (docs/sentinel2.md)
_UNSHIFTED = 900  # DN below which the darkest pixels tell that nothing was added


def check_fill(profile: Profile) -> list[Finding]:
    """Undeclared fill: 0 or the type's maximum in all bands, -9999, ±3.4e38 or the type's minimum in any.

    No surface has reflectance 0 in all bands, so areas (3×3 pixels) or borders of it are fill. Integer zeros are
    read as fill by this program and by few others: a warning. NaN is never taken for a value: information. The rest
    would be taken for reflectance: an error. One band alone may well be 0, so there it takes a border and 1 %.
    """
    found, scene = [], profile.scene
    for value, fill in profile.fill.items():
        share = fill.count / profile.read
        if not _is_area(profile, fill):
            continue
        if len(scene.bands) == 1 and value in (0.0, 255.0) and (share < 0.01 or not fill.edge):
            continue
        text = "NaN" if math.isnan(value) else f"{value:g}"
        handled = math.isnan(value) or (value == 0 and scene.zero_fill)
        fix, command = declare_nodata(scene, value) if handled else (f"--data.nodata {text}", "")
        found.append(
            Finding(
                "undeclared nodata",
                "info" if math.isnan(value) else "warning" if handled else "error",
                (scene.path,),
                f"{text} in {share:.1%} of the pixels, in areas or along the border",
                f"{text} declared as nodata",
                fix,
                command=command,
            )
        )
    return found


def _is_area(profile: Profile, fill: Fill) -> bool:
    scene = profile.scene
    return fill.count >= _SPECK and (fill.solid > 0 or fill.edge >= min(scene.height, scene.width) / 2)


def check_measured(profile: Profile) -> list[Finding]:
    """A pixel that holds infinity or a reflectance beyond ±1e6, and is no part of the areas of `check_fill`.

    This program takes it for nodata, others compute with it; one is enough to spoil a mean.
    """
    areas = sum(
        fill.count for value, fill in profile.fill.items() if abs(value) > MEASURABLE and _is_area(profile, fill)
    )
    if profile.unmeasured <= areas:
        return []
    scene, value = profile.scene, profile.unmeasured_value
    return [
        Finding(
            "no measurement",
            "warning",
            (scene.path,),
            f"{counted(profile.unmeasured, 'pixel')} such as {value:g}, beyond ±{MEASURABLE:g} in reflectance: read as "
            "nodata",
            "reflectance, or what is declared as nodata",
            "none needed here; for other software, a copy that declares it",
            command=declare_nodata(scene, value)[1] if math.isfinite(value) else "",
        )
    ]


def check_saturation(profile: Profile) -> list[Finding]:
    """More than 0.1 % of a band's pixels at 28000 DN (reflectance 2.8) and above, 32767 and 65535 among them.

    Pixels that hold 32767 or 65535 in all bands are fill (`check_fill`) and not counted here.
    """
    if not profile.valid or _is_radar(profile):
        return []
    fill = max((seen.count for value, seen in profile.fill.items() if value >= HIGH_DN), default=0)
    shares = (profile.high - fill) / profile.valid
    bands = [k for k in np.argsort(-shares, kind="stable") if shares[k] > _SATURATED]
    if not bands:
        return []
    scene, worst = profile.scene, bands[0]
    return [
        Finding(
            "saturation",
            "warning",
            (scene.path,),
            f"{shares[worst]:.1%} of {_name(profile, worst)} at {HIGH_DN} and above, up to {profile.maximum[worst]:g}"
            + _more_bands(len(bands)),
            f"at most {_SATURATED:.1%} of a band at {HIGH_DN} DN and above",
            f"--data.nodata {profile.maximum[worst]:g}, or leave the scene out"
            if profile.maximum[worst] in _SPECIAL
            else "leave the scene out, or state its unit with --data.scale",
        )
    ]


def check_clipping(profile: Profile) -> list[Finding]:
    """More than 0.5 % of a band's pixels share its maximum, at reflectance 0.4 and above: cut off by an export.

    They must come of 16 pixels that were measured: one of 60 m is 36 and more of 10 m, by whomever it was repeated.
    """
    if not profile.valid:
        return []
    scene, shares = profile.scene, profile.at_maximum / profile.valid
    top = (profile.maximum + scene.offset) * scene.scale
    varies = profile.minimum < profile.maximum
    bands = [
        k
        for k in np.argsort(-shares, kind="stable")
        if shares[k] > _CLIPPED
        and profile.measured_at_maximum[k] >= _SPECK
        and top[k] >= _BRIGHT
        and varies[k]
        and profile.maximum[k] < HIGH_DN
    ]
    if not bands:
        return []
    worst = bands[0]
    return [
        Finding(
            "clipped values",
            "warning",
            (scene.path,),
            f"{shares[worst]:.1%} of {_name(profile, worst)} at its maximum {profile.maximum[worst]:g}"
            + _more_bands(len(bands)),
            f"at most {_CLIPPED:.1%} of a band at its maximum",
            "export the bands again without limits; clouds and snow lie above 10000 DN",
        )
    ]


def check_constant(profile: Profile) -> list[Finding]:
    """Bands of a single value, or no valid pixel at all; what nothing can be learnt from."""
    scene = profile.scene
    if profile.read < _CONSTANT:
        return []
    if not profile.valid:
        found = "no valid pixel"
    else:
        bands = [k for k in range(len(scene.bands)) if profile.minimum[k] == profile.maximum[k]]
        if not bands:
            return []
        found = f"{_name(profile, bands[0])} is {profile.minimum[bands[0]]:g} everywhere" + _more_bands(len(bands))
    return [
        Finding(
            "nothing in it" if not profile.valid else "constant band",
            "warning",
            (scene.path,),
            found,
            "values that vary",
            "leave the scene out" if not profile.valid else "fetch the band again, or leave it out with --data.bands",
        )
    ]


def check_unit(profile: Profile) -> list[Finding]:
    """Values that are no reflectance under the scale in use: percent, DN in floating point, 8-bit pictures in 16 bits.

    Over land, sea and clouds the median reflectance of a scene lies between 0.01 and 1.2 (above 1.5: wrong). A picture
    ends at 255 in most bands, which for DN is reflectance 0.0255.
    """
    scene = profile.scene
    if profile.valid < _CONSTANT or _is_radar(profile):
        return []
    typical = float(np.median((profile.spectra.astype(np.float64) + scene.offset) * scene.scale))
    dtype, top = np.dtype(scene.dtype), float(profile.maximum.max())
    is_integer = dtype.kind in "iu"
    expected = "a median reflectance of 0.01 to 1.2"
    ends_at_255 = float(((profile.maximum >= 240) & (profile.maximum <= 255)).mean()) > 0.5
    if typical > _NO_REFLECTANCE and abs(scene.offset * scene.scale) > 1:
        found = f"a median reflectance of {typical:.4g} with offset {scene.offset:g} ({scene.offset_source})"
        fix = "--data.offset 0, or the product's own"
    elif is_integer and (typical > _NO_REFLECTANCE if dtype.itemsize == 1 else scene.scale < 0.01 and ends_at_255):
        found = f"values up to {top:g} in {dtype}, as of an 8-bit picture"
        expected, fix = "DN, no picture", "export the DN instead of a picture for display"
    elif typical > _NO_REFLECTANCE:
        unit = "percent" if typical <= 100 else "DN"
        told = f", as of {unit}" if scene.scale == 1 and typical <= 65_535 else ""
        found = f"a median reflectance of {typical:.4g} at scale {scene.scale:g}{told}"
        fix = f"--data.scale {0.01 if unit == 'percent' else 0.0001:g}" if told else "--data.scale of the product"
    elif 0 < top * scene.scale < 1e-3:
        found = f"reflectance up to {top * scene.scale:.2g} at scale {scene.scale:g}"
        fix = "--data.scale of the product, 1 for reflectance as stored"
    else:
        return []
    return [Finding("wrong unit", "error", (scene.path,), found, expected, fix)]


def check_negative(profile: Profile) -> list[Finding]:
    """More than 5 % of the pixels below reflectance -0.01 in most bands: an offset where none was added."""
    scene = profile.scene
    if profile.valid < _CONSTANT or _is_radar(profile):
        return []
    reflectance = (profile.spectra.astype(np.float64) + scene.offset) * scene.scale
    share = float((np.median(reflectance, axis=0) < -0.01).mean())
    if share <= _NEGATIVE or float(np.median(reflectance)) > _NO_REFLECTANCE:  # the unit is wrong, not the offset
        return []
    return [
        Finding(
            "negative reflectance",
            "error",
            (scene.path,),
            f"{share:.0%} of the pixels below 0 in most bands, with offset {scene.offset:g} ({scene.offset_source})",
            f"at most {_NEGATIVE:.0%} of the pixels",
            "--data.offset 0, or --data.nodata where the values are fill",
        )
    ]


SCENE_CHECKS: tuple[Callable[[Profile], list[Finding]], ...] = (
    check_fill,
    check_measured,
    check_saturation,
    check_clipping,
    check_constant,
    check_unit,
    check_negative,
)


def shift(profile: Profile) -> bool | None:
    """Whether 1000 DN seem to have been added to all values; None where the pixels do not tell.

    B10 of Level 1C is near 20 DN without and near 1020 with the shift; high clouds alone reach 900 without it. Else the
    darkest half percent tells: without the shift, water, shadow, or vegetation in red is far below 950 DN in some band;
    with it the darkest band lies just above 1000 and half of the bands not much higher. Sand and clouds are as bright
    in few bands only.
    """
    scene = profile.scene
    if np.dtype(scene.dtype).kind not in "iu" or np.dtype(scene.dtype).itemsize < 2 or len(scene.bands) < 3:
        return None
    if profile.spectra.shape[1] < _CONSTANT:
        return None
    if "B10" in scene.bands:
        darkest, middle = np.percentile(profile.spectra[scene.bands.index("B10")], [0.5, 50])
        if middle < _SHIFTED_CIRRUS:
            return False
        return True if _SHIFTED[0] <= darkest and middle <= _SHIFTED[1] else None
    dark: npt.NDArray[np.float64] = np.percentile(profile.spectra, 0.5, axis=1)
    if dark.min() < _UNSHIFTED:
        return False
    low, high = _SHIFTED
    return True if low <= dark.min() <= high and np.median(dark) <= _SHIFTED_MOST else None


def check_shifts(scenes: Sequence[Scene], shifts: Sequence[bool | None]) -> list[Finding]:
    """Scenes whose offset was assumed to be 0 and whose pixels say -1000 (see `shift`).

    Where others say 0, the archive is mixed: an error if B10 says so, which leaves no doubt.
    """
    told = [(scene, is_shifted) for scene, is_shifted in zip(scenes, shifts, strict=True) if is_shifted is not None]
    shifted = [scene for scene, is_shifted in told if is_shifted]
    rest = len(told) - len(shifted)
    if not shifted:
        return []
    is_sure = all("B10" in scene.bands for scene in shifted)
    dark = "B10 lies" if is_sure else "the darkest pixels of all bands lie"
    return [
        Finding(
            "mixed offsets in the pixels" if rest else "offset not declared",
            "error" if rest and is_sure else "warning",
            tuple(scene.path for scene in shifted),
            f"{dark} at 1000 DN and above, as from processing baseline 04.00 on"
            + (f"; {counted(rest, 'other scene')} without this" if rest else ""),
            "one offset, or one that each file states" if rest else "dark pixels near 0 DN, or offset -1000 stated",
            "look up the processing baseline; give these apart from the others with --data.offset -1000, or copies "
            "that state scale and offset"
            if rest
            else "look up the processing baseline; if it is 04.00 or later, --data.offset -1000",
            len(shifted),
            command=_with_offset(shifted[0]) if rest else "",
        )
    ]


def _with_offset(scene: Scene) -> str:
    """The command line that writes a copy of a scene's first file with the offset -1000 stated in it."""
    script = (
        "import rasterio; f = rasterio.open('OUT.tif', 'r+'); f.scales = [1e-4] * f.count; "
        "f.offsets = [-0.1] * f.count; f.close()"
    )
    return f'{copied(scene.sources[0].file)} && python -c "{script}"'


def _is_radar(profile: Profile) -> bool:
    """Whether backscatter is among the bands, which is negative in dB and knows no reflectance."""
    return not set(SENTINEL1_GRD.names).isdisjoint(profile.scene.bands)


def _name(profile: Profile, band: int) -> str:
    name = profile.scene.bands[band]
    return f"band {name}" if name.isdecimal() else name


def _more_bands(count: int) -> str:
    return "" if count == 1 else f", {counted(count - 1, 'more band')} likewise"
