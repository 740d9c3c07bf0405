"""The cheap part of the doctor, for the start of a run: a random sample of chips, seconds at most."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ssl_geo.errors import UserError
from ssl_geo.imagery import pixelchecks
from ssl_geo.imagery.bandorder import check_band_order, order_evidence
from ssl_geo.imagery.chips import ChipIndex
from ssl_geo.imagery.findings import Finding, merge
from ssl_geo.imagery.labelled import LabelledChips
from ssl_geo.imagery.profiles import Part, join, profile_window
from ssl_geo.imagery.rasters import open_scene
from ssl_geo.imagery.scenes import Scene, UnreadableError

_CHIPS = 64  # looked at
_SECONDS = 3.0  # until no further one is read: chips of JPEG 2000 take half a second each
_TOLERATED = 0.1  # share of the scenes looked at that may have an error, which is then only said


def check_index(index: ChipIndex, *, seed: int = 0) -> list[str]:
    """Check a sample of the chips that a pretraining run will see.

    Args:
        index: The chips.
        seed: Of the sample.

    Returns:
        Lines to print.

    Raises:
        UserError: As `check_windows`.
    """
    positions = np.sort(np.random.default_rng(seed).permutation(len(index))[:_CHIPS])
    chosen = index.table.take(positions)
    paths, rows, cols = (chosen[name].to_pylist() for name in ("scene", "row", "col"))
    scenes = {path: open_scene(path, **index.settings.scene_settings) for path in dict.fromkeys(paths)}
    windows = [(scenes[path], row, col) for path, row, col in zip(paths, rows, cols, strict=True)]
    return check_windows(windows, bands=index.bands, size=index.chip_size)


def check_labelled(chips: LabelledChips, *, seed: int = 0) -> list[str]:
    """Check a sample of the chips of a probe, as `check_index` does."""
    positions = np.sort(np.random.default_rng(seed).permutation(len(chips))[:_CHIPS])
    windows = [(chips.scenes[chips.scene[k]].scene, int(chips.row[k]), int(chips.col[k])) for k in positions]
    return check_windows(windows, bands=chips.bands, size=chips.chip_size)


def check_windows(windows: Iterable[tuple[Scene, int, int]], *, bands: Sequence[str], size: int) -> list[str]:
    """Check windows of scenes by their pixels: fill, saturation, units, offsets, order of bands.

    Args:
        windows: Scene, first row and column, windows of one scene side by side.
        bands: That the run uses.
        size: Side in pixels; what reaches over the scene is left out.

    Returns:
        A line for each finding that is no mere information.

    Raises:
        UserError: If an error concerns more than a tenth of the scenes looked at; says what fixes it.
    """
    began = time.monotonic()
    parts: dict[str, list[Part]] = {}
    whole: dict[str, list[Part]] = {}  # with all bands, where B10, which tells their order best, is not in use
    for scene, row, col in windows:
        if time.monotonic() - began > _SECONDS:
            break
        sources = tuple(scene.sources[scene.bands.index(band)] for band in bands)
        used = replace(scene, bands=tuple(bands), sources=sources)
        window = (row, col, min(size, scene.height - row), min(size, scene.width - col))
        try:
            parts.setdefault(scene.path, []).append(profile_window(used, window, quick=True))
            if "B10" in scene.bands and "B10" not in bands:
                whole.setdefault(scene.path, []).append(profile_window(scene, window, quick=True))
        except UnreadableError:
            continue  # the index has read and counted it; if it broke since, training says so
    profiles = [join(of_scene) for of_scene in parts.values()]
    found: list[Finding] = []
    for profile in profiles:
        for check in pixelchecks.SCENE_CHECKS:
            found += check(profile)
    assumed = [profile for profile in profiles if profile.scene.offset_source == "assumed"]
    found += pixelchecks.check_shifts([p.scene for p in assumed], [pixelchecks.shift(p) for p in assumed])
    ordered = [join(whole.get(profile.scene.path, parts[profile.scene.path])) for profile in profiles]
    evidence = [(p.scene.path, order_evidence(p.spectra, p.scene.bands)) for p in ordered]
    found += check_band_order([(path, one) for path, one in evidence if one is not None])
    findings = [
        finding
        for finding in merge(found)
        # undeclared zeros of integers are a warning because other software takes them for ground; a run does not
        if finding.severity == "error" or (finding.severity == "warning" and finding.check != "undeclared nodata")
    ]
    for finding in findings:
        if finding.severity == "error" and finding.count > _TOLERATED * len(profiles):
            raise UserError(
                f"{finding.check} in {finding.count} of {len(profiles)} scenes looked at: {finding.found} "
                f"({finding.paths[0]}); {finding.fix}; python -m ssl_geo.doctor tells more"
            )
    lines = [finding.line() for finding in findings]
    return [*lines, "python -m ssl_geo.doctor looks through the whole archive"] if lines else []
