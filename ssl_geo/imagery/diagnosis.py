"""Look through an archive before a long run: every header and pixel, what scenes and labels are to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ssl_geo.errors import UserError
from ssl_geo.imagery import checks, pixelchecks
from ssl_geo.imagery.archives import BAND, walk_scenes
from ssl_geo.imagery.bandorder import OrderEvidence, check_band_order, order_evidence
from ssl_geo.imagery.duplicates import Sighting, check_duplicates, check_near_duplicates, check_overlaps
from ssl_geo.imagery.findings import Finding, merge
from ssl_geo.imagery.inspection import Inspected, inspect, unreadable
from ssl_geo.imagery.labelchecks import examine_labels
from ssl_geo.imagery.pairing import label_files, read_splits, scene_name
from ssl_geo.imagery.profiles import Part, Profile, Window, join, profile_window, windows
from ssl_geo.imagery.scenes import Scene, UnreadableError
from ssl_geo.threads import in_order

_MAX_WORKERS = 8


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at and what was found.

    Attributes:
        scenes: Scenes looked at.
        labels: Label rasters looked at.
        pixels: Pixels read, of all bands at once.
        findings: Merged, the gravest first.
    """

    scenes: int
    labels: int
    pixels: int
    findings: list[Finding]


@dataclass
class _Seen:
    """What is kept of a scene, None where it is of no use, once its pixels are through."""

    path: str
    scene: Scene | None
    evidence: OrderEvidence | None = None
    shift: bool | None = None
    digest: str | None = None
    thumbnail: npt.NDArray[np.float64] | None = None


def diagnose(
    paths: Sequence[Path | str],
    labels: Sequence[Path | str] = (),
    *,
    classes: Sequence[int] | None = None,
    ignore: Sequence[int] | None = None,
    splits: Path | None = None,
    quick: bool = False,
    workers: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Diagnosis:
    """Look through scenes, and their labels if there are any.

    Args:
        paths: Folders and files of scenes, as for `walk_scenes`.
        labels: Folders and files of label rasters; those below `paths` are no scenes then.
        classes: Ids that labels may hold; by default any.
        ignore: Ids that count as no label.
        splits: JSON of splits by scene, {"image name without suffix": "train" | "val" | "test"}.
        quick: Headers and a few windows of each scene only: no truncated file and no duplicate is found.
        workers: Threads; by default the number of processors, at most 8. The result does not depend on it.
        progress: Show bars where it takes more than two seconds.
        **settings: Of `open_scene`.

    Raises:
        UserError: If a path does not exist, or holds no raster; less than one worker.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    workers = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    for path in map(Path, paths):
        if not path.exists() and BAND not in path.name:
            raise UserError(f"{path} does not exist; PATH takes folders and GeoTIFF files")
    files = label_files(labels) if labels else []
    given = None if splits is None else read_splits(splits, "--split")
    known = set(files)
    found = [scene for scene in walk_scenes(paths, progress=progress) if scene.path not in known]
    if not found:
        raise UserError("all rasters under PATH are label rasters of --labels; name the images")
    findings: list[Finding] = []
    seen: list[_Seen] = []
    pixels = 0
    headers = in_order(lambda scene: inspect(scene, settings), found, workers)
    inspected = list(tqdm(headers, "headers", len(found), unit=" scenes", delay=2, disable=not progress))
    for one, parts in _profiles(inspected, quick=quick, workers=workers, progress=progress):
        findings += one.findings
        if one.scene is not None:
            for check in checks.SCENE_CHECKS:
                findings += check(one.scene)
        kept = _Seen(one.path, one.scene)
        for profile in parts:
            pixels += profile.read
            findings += _check_profile(profile, one, kept)
        seen.append(kept)
    findings += _check_archive(seen, given)
    if files:
        usable = [one.scene for one in inspected if one.scene is not None]
        findings += examine_labels(
            [scene.path for scene in found],
            {scene.path: scene for scene in usable},
            files,
            classes=classes,
            ignore=ignore,
            progress=progress,
        )
    return Diagnosis(len(found), len(files), pixels, merge(findings))


def _profiles(
    inspected: Sequence[Inspected], *, quick: bool, workers: int, progress: bool
) -> Iterator[tuple[Inspected, list[Profile]]]:
    """Each scene with the profiles of what could be read of it, in order; what could not becomes a finding."""

    def tasks() -> Iterator[tuple[int, int, Scene, Window]]:
        for number, one in enumerate(inspected):
            for file, scene in enumerate(one.readable):
                for window in windows(scene, quick=quick):
                    yield number, file, scene, window

    def read(task: tuple[int, int, Scene, Window]) -> Part | UnreadableError:
        try:
            return profile_window(task[2], task[3], quick=quick)
        except UnreadableError as error:
            return error

    total = sum(scene.height * scene.width for one in inspected for scene in one.readable)
    results: dict[int, list[Profile]] = {}
    done = 0
    with tqdm(desc="pixels", total=total, unit=" px", unit_scale=True, delay=2, disable=not progress) as bar:
        read_parts = zip(tasks(), in_order(read, tasks(), workers), strict=True)
        for (number, _), group in groupby(read_parts, key=lambda item: item[0][:2]):
            for k in range(done, number):  # all before are complete
                yield inspected[k], results.pop(k, [])
            done = number
            parts = []
            for (_, _, scene, window), part in group:
                bar.update(window[2] * window[3])
                if isinstance(part, UnreadableError):
                    if not any(finding.check == "unreadable" for finding in inspected[number].findings):
                        inspected[number].findings.append(unreadable(scene.path, part))
                else:
                    parts.append(part)
            if parts and not any(finding.check == "unreadable" for finding in inspected[number].findings):
                results.setdefault(number, []).append(join(parts))
    for k in range(done, len(inspected)):
        yield inspected[k], results.pop(k, [])


def _check_profile(profile: Profile, one: Inspected, kept: _Seen) -> list[Finding]:
    """The checks of a scene's pixels; what the archive's checks need goes to `kept`."""
    if one.scene is None:  # read for its own sake only: whether it can be
        return []
    findings = [finding for check in pixelchecks.SCENE_CHECKS for finding in check(profile)]
    kept.evidence = order_evidence(profile.spectra, profile.scene.bands)
    kept.shift = pixelchecks.shift(profile)
    if profile.valid:  # scenes without a pixel are no duplicates of each other
        kept.digest, kept.thumbnail = profile.digest, profile.thumbnail
    return findings


def _check_archive(seen: Sequence[_Seen], splits: Mapping[str, str] | None) -> list[Finding]:
    """What scenes are to each other."""
    usable = [(one, one.scene) for one in seen if one.scene is not None]
    scenes = [scene for _, scene in usable]
    if not scenes:
        return []
    findings = [
        *checks.check_bands(scenes),
        *checks.check_products(scenes),
        *checks.check_assumed_offset(scenes),
        *checks.check_overruled(scenes),
    ]
    assumed = [(one, scene) for one, scene in usable if scene.offset_source == "assumed"]
    findings += pixelchecks.check_shifts([scene for _, scene in assumed], [one.shift for one, _ in assumed])
    findings += check_band_order([(one.path, one.evidence) for one, _ in usable if one.evidence is not None])
    sightings = [
        Sighting(
            one.path,
            scene.date,
            None if splits is None else splits.get(scene_name(Path(one.path))),
            one.digest,
            one.thumbnail,
        )
        for one, scene in usable
    ]
    findings += check_duplicates(sightings)
    findings += check_near_duplicates(sightings)
    findings += check_overlaps(sightings, checks.corners_lonlat(scenes))
    if splits is not None:
        findings += _check_split_names(sightings, splits)
    return findings


def _check_split_names(sightings: Sequence[Sighting], splits: Mapping[str, str]) -> list[Finding]:
    """Scenes that the table of splits does not name, and names in it that are no scene's."""
    found = []
    if missing := tuple(one.path for one in sightings if one.split is None):
        mend = "add them to the file of splits by name without suffix"
        found.append(
            Finding("split missing", "warning", missing, "no split", "a split for each scene", mend, len(missing))
        )
    if spare := sorted(splits.keys() - {scene_name(Path(one.path)) for one in sightings}):
        said = f"{spare[0]!r} and {len(spare) - 1} more" if len(spare) > 1 else repr(spare[0])
        mend = "name scenes without suffix, or give the imagery that is missing"
        found.append(Finding("split of no scene", "warning", (), said, "names of scenes", mend, len(spare)))
    return found
