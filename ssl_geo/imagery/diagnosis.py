"""Look through an archive before a long run: every header and pixel, what scenes and labels are to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ssl_geo.errors import UserError
from ssl_geo.imagery import checks, pixelchecks
from ssl_geo.imagery.archives import BAND, walk_scenes
from ssl_geo.imagery.bandorder import OrderEvidence, check_band_order, order_evidence, suggested_orders
from ssl_geo.imagery.duplicates import Sighting, check_duplicates, check_near_duplicates, check_overlaps
from ssl_geo.imagery.findings import Finding, Group, counted, groups_of, merge, placed
from ssl_geo.imagery.inspection import Inspected, inspect, unreadable
from ssl_geo.imagery.labelchecks import examine_labels
from ssl_geo.imagery.labelrasters import are_ids, beside_images, check_label_rasters
from ssl_geo.imagery.pairing import check_ids, label_files, read_splits, scene_name
from ssl_geo.imagery.profiles import Part, Profile, Window, join, profile_window, windows
from ssl_geo.imagery.scenes import Scene, UnnamedBandsError, UnreadableError, name_stack
from ssl_geo.threads import in_order

_MAX_WORKERS = 8


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at and what was found.

    Attributes:
        scenes: Scenes looked at.
        labels: Label rasters looked at.
        pixels: Pixels read, of all bands at once.
        findings: Merged, the worst group first (`ssl_geo.imagery.findings.merge`).
        groups: All rasters by folder and product, in the order of their findings, those without any last.
        sound: The groups that no error or warning is of.
    """

    scenes: int
    labels: int
    pixels: int
    findings: list[Finding]
    groups: list[Group]
    sound: list[Group]


@dataclass
class _Seen:
    """What is kept of a scene, None where it is of no use, once its pixels are through.

    Attributes:
        names: Whether the file names its bands (``file``), a setting does, or nothing (``none``: the likely order).
    """

    path: str
    scene: Scene | None
    names: Literal["file", "setting", "none"] = "file"
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
        UserError: If a path does not exist, or holds no raster; ids of classes that cannot be.
    """
    workers = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    if classes is not None:
        check_ids(classes, ignore or ())
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
    beside = beside_images(inspected)
    labelled: dict[str, frozenset[float]] = {}
    stops = False
    for one, parts in _profiles(inspected, quick=quick, workers=workers, progress=progress):
        pixels += sum(profile.read for profile in parts)
        if one.path in beside and len(parts) == 1 and (values := parts[0].values) is not None and are_ids(values):
            labelled[one.path] = values
            stops |= any(finding.severity == "error" for finding in one.findings)
            continue
        findings += one.findings
        if one.scene is not None:
            for check in checks.SCENE_CHECKS:
                findings += check(one.scene)
        kept = _Seen(one.path, one.scene, _named_by(one))
        for profile in parts:
            findings += _check_profile(profile, one, kept)
        seen.append(kept)
    scenes = [scene.path for scene in found]
    findings += check_label_rasters(labelled, beside, "error" if stops else "warning", paths, scenes)
    findings = _with_suggestions(findings, seen)
    findings += _check_archive(seen, given)
    if files:
        images = [path for path in scenes if str(path) not in labelled]
        usable = {one.path: one.scene for one in seen if one.scene is not None}
        findings += examine_labels(images, usable, files, classes=classes, ignore=ignore, progress=progress)
    products = {one.path: _product(one) for one in inspected}
    products |= dict.fromkeys([*labelled, *map(str, files)], "labels")
    groups = groups_of(products)
    by_file = groups | {str(file): groups[str(scene.path)] for scene in found for file in scene.files}
    merged = merge(part for finding in findings for part in placed(finding, by_file))
    troubled = {by_file.get(path) for finding in findings if finding.severity != "info" for path in finding.paths}
    listed = dict.fromkeys([*(f.where for f in merged if f.where is not None), *groups.values()])
    sound = [group for group in listed if group not in troubled]
    return Diagnosis(len(found) - len(labelled), len(files) + len(labelled), pixels, merged, list(listed), sound)


def _product(one: Inspected) -> str:
    """What a scene is, in words: level, bands, type."""
    if one.scene is None:
        return "not read as imagery"
    level = "" if one.scene.level is None else f"{one.scene.level}, "
    return f"{level}{counted(len(one.scene.bands), 'band')} of {one.scene.dtype}"


def _named_by(one: Inspected) -> Literal["file", "setting", "none"]:
    """What names a scene's bands."""
    if any(finding.check == "band names missing" for finding in one.findings):
        return "none"
    try:
        for header in one.headers:
            name_stack(header, None)
    except UnnamedBandsError:
        return "setting"
    except UserError:
        pass  # it names bands, and something is wrong with it: a finding by itself
    return "file"


def _with_suggestions(findings: Sequence[Finding], seen: Sequence[_Seen]) -> list[Finding]:
    """Missing names with the order that the pixels suggest, where so many bands have a likely one."""
    orders = suggested_orders([(o.path, o.evidence) for o in seen if o.names == "none" and o.evidence is not None])
    suggested = []
    for finding in findings:
        if finding.check == "band names missing" and (proposal := orders.get(finding.paths[0])) is not None:
            order, why = " ".join(proposal[0]), proposal[1]
            finding = replace(
                finding,
                found=f"{finding.found}; {why}",
                expected=f"a description for each band, here {order}",
                fix=f"--data.band_names {order}",
            )
        suggested.append(finding)
    return suggested


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
    if kept.evidence is None or not kept.evidence.misplaces_cirrus:  # else B10, which tells, is another band
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
    named = [(one, one.evidence) for one, _ in usable if one.evidence is not None and one.names != "none"]
    described = {one.path for one, _ in named if one.names == "file" and Path(one.path).is_file()}
    findings += check_band_order([(one.path, evidence) for one, evidence in named], described=described)
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
        fix = "add them to the file of splits by name without suffix"
        found.append(
            Finding("split missing", "warning", missing, "no split", "a split for each scene", fix, len(missing))
        )
    if spare := sorted(splits.keys() - {scene_name(Path(one.path)) for one in sightings}):
        said = f"{spare[0]!r} and {len(spare) - 1} more" if len(spare) > 1 else repr(spare[0])
        fix = "name scenes without suffix, or give the imagery that is missing"
        found.append(Finding("split of no scene", "warning", (), said, "names of scenes", fix, len(spare)))
    return found
