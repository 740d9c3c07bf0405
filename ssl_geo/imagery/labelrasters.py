"""Label rasters among the imagery: recognised, not judged as imagery, and named with the call that fits."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ssl_geo.imagery.archives import straight_path
from ssl_geo.imagery.findings import Finding, Severity, counted
from ssl_geo.imagery.inspection import Inspected
from ssl_geo.imagery.pairing import match_labels
from ssl_geo.imagery.scenes import Header
from ssl_geo.imagery.sensors import canonical_band

_MAX_LISTED = 20  # files that a command line names one by one
_MAX_SAID = 8  # values that a line lists


@dataclass(frozen=True, slots=True)
class Beside:
    """What tells that a raster of one band belongs to images.

    Attributes:
        by: ``name`` (`match_labels`) or ``grid``.
        images: Those images.
    """

    by: str
    images: list[Path]


def beside_images(inspected: Sequence[Inspected]) -> dict[str, Beside]:
    """Rasters of one band whose name is no band's and that lie beside imagery of several bands, by path.

    Names are compared within a folder that holds both, else among all that are not so mixed.
    """
    images: list[Path] = []
    single: list[Path] = []
    grids: dict[str, tuple[object, ...]] = {}
    on_grid: dict[tuple[object, ...], list[Path]] = {}
    for one in inspected:
        path = Path(one.path)
        if sum(len(header.numbers) for header in one.headers) > 1:
            images.append(path)
            for grid in {_grid(header) for header in one.headers if header.crs}:
                on_grid.setdefault(grid, []).append(path)
        elif one.headers and canonical_band(path.stem) is None:
            single.append(path)
            grids[one.path] = _grid(one.headers[0])
    mixed = {file.parent for file in single} & {image.parent for image in images}
    sides: dict[Path | None, tuple[list[Path], list[Path]]] = {None: (images, [])}
    for k, paths in enumerate((images, single)):
        for path in paths:
            if path.parent in mixed:
                sides.setdefault(path.parent, ([], []))[k].append(path)
            elif paths is single:
                sides[None][1].append(path)
    named: dict[Path, list[Path]] = {}
    for ours, theirs in sides.values():
        for image, fitting in zip(ours, match_labels(ours, theirs)[0], strict=True):
            for file in fitting:
                named.setdefault(file, []).append(image)
    found = {}
    for file in single:
        there = on_grid.get(grids[str(file)], [])
        if file in named:
            found[str(file)] = Beside("name", sorted({*named[file]} & {*there}) or named[file])
        elif there:
            found[str(file)] = Beside("grid", there)
    return found


def _grid(header: Header) -> tuple[object, ...]:
    return header.crs, header.height, header.width, *(round(value, 6) for value in header.transform)


def are_ids(values: frozenset[float]) -> bool:
    """Whether the few values of a raster may be class ids: all whole."""
    return all(value == int(value) for value in values)


def check_label_rasters(
    labels: Mapping[str, frozenset[float]],
    beside: Mapping[str, Beside],
    severity: Severity,
    paths: Sequence[Path | str],
    scenes: Sequence[Path],
) -> list[Finding]:
    """Rasters that look like labels: one band of few whole values, beside an image of the same name or grid.

    Args:
        labels: Their values by path.
        beside: Of `beside_images`.
        severity: Whether a run that takes the imagery would stop at them.
        paths: That the user gave.
        scenes: All that were found there, with these.

    Returns:
        One finding for each folder of labels.
    """
    tops = set(map(straight_path, paths))
    images = [scene for scene in scenes if str(scene) not in labels]
    findings = []
    for group in _by_folder([Path(path) for path in labels], images, tops).values():
        first = str(group[0])
        values = sorted(labels[first])
        said = " ".join(f"{value:g}" for value in values[:_MAX_SAID]) + (" …" if len(values) > _MAX_SAID else "")
        theirs = list(dict.fromkeys(image for file in group for image in beside[str(file)].images))
        imagery = _arguments(theirs, set(scenes) - {*theirs, *group}, tops)
        named = _arguments(group, set(scenes) - set(group), tops)
        command = f"python -m ssl_geo.doctor {' '.join(imagery)} --labels {' '.join(named)}"
        findings.append(
            Finding(
                "labels among the images",
                severity,
                tuple(map(str, group)),
                f"one band of {counted(len(values), 'whole value')} ({said}) beside an image of the same "
                f"{beside[first].by}",
                "imagery alone; labels are named by --labels",
                "if they are labels, name them with --labels, and give a run the images alone"
                if imagery and named
                else "if they are labels, put them into a folder of their own, named with --labels",
                len(group),
                command=command if imagery and named else "",
            )
        )
    return findings


def _by_folder(labels: Sequence[Path], images: Iterable[Path], tops: set[Path]) -> dict[Path, list[Path]]:
    """Labels by the uppermost folder without images; where both share one, by it or, if many do, the one above."""
    above = {folder for image in images for folder in image.parents}
    mixed = Counter(folder.parent for folder in {label.parent for label in labels} & above - tops)
    groups: dict[Path, list[Path]] = {}
    for label in labels:
        folder = label.parent
        if folder in above:
            folder = folder.parent if folder not in tops and mixed[folder.parent] > 1 else folder
        else:
            folder = _uppermost(folder, above, tops)
        groups.setdefault(folder, []).append(label)
    return groups


def _uppermost(folder: Path, above: set[Path], tops: set[Path]) -> Path:
    """The uppermost folder at or above one, within what the user named, that is above none of certain rasters."""
    while folder not in tops and folder.parent not in above and any(top in folder.parents for top in tops):
        folder = folder.parent
    return folder


def _arguments(files: Sequence[Path], others: set[Path], tops: set[Path]) -> list[str]:
    """What a shell takes for these rasters and no others: their folders, else patterns, else they themselves.

    Returns:
        Empty where these are too many of names that tell too little.
    """
    above = {folder for other in others for folder in other.parents}
    folders = [_uppermost(file.parent, above, tops) for file in files if file.parent not in above]
    arguments = dict.fromkeys(shlex.quote(str(folder)) for folder in folders)
    rest = [file for file in files if file.parent in above]
    parents = {file.parent for file in rest}
    beside = [other for other in others if other.parent in parents]
    if len({parent.parent for parent in parents}) == 1 and (pattern := _pattern(parents, rest, beside)) is not None:
        return [*arguments, pattern]
    return [*arguments, *(shlex.quote(str(file)) for file in rest)] if len(rest) <= _MAX_LISTED else []


def _pattern(folders: set[Path], files: Sequence[Path], others: Sequence[Path]) -> str | None:
    """A shell's pattern for files of folders side by side and no others; None where their names tell too little."""
    if len(files) < 2:
        return None
    base, *more = folders
    place = f"{shlex.quote(str(base.parent))}/*/" if more else shlex.quote(f"{base}/")
    names = [file.name for file in files]
    first, end = _shared_start(names), _shared_start([name[::-1] for name in names])[::-1]
    for start in ("", first):
        tells = not any(other.name.startswith(start) and other.name.endswith(end) for other in others)
        if tells and all(len(name) >= len(start) + len(end) for name in names):
            return f"{place}{shlex.quote(start) if start else ''}*{shlex.quote(end)}"
    return None


def _shared_start(names: Sequence[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda c: len(set(c)) == 1, zip(*names, strict=False)))
