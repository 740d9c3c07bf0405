"""Label rasters among the imagery: recognised, not judged as imagery, and named with the call that fits."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
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


def beside_images(inspected: Sequence[Inspected]) -> dict[str, str]:
    """Rasters of one band whose name is no band's and that lie beside imagery of several bands.

    Returns:
        By path, how they belong to an image: ``name`` (`match_labels`, folder by folder) or ``grid``.
    """
    images: list[Path] = []
    single: dict[Path, list[Path]] = {}
    headers: dict[str, Header] = {}
    grids = set()
    for one in inspected:
        if sum(len(header.numbers) for header in one.headers) > 1:
            images.append(Path(one.path))
            grids |= {_grid(header) for header in one.headers if header.crs}
        elif one.headers and canonical_band(Path(one.path).stem) is None:
            single.setdefault(Path(one.path).parent, []).append(Path(one.path))
            headers[one.path] = one.headers[0]
    found = {}
    for files in single.values():
        unused = set(match_labels(images, files)[1]) if images else set(files)
        for file in files:
            if file not in unused:
                found[str(file)] = "name"
            elif _grid(headers[str(file)]) in grids:
                found[str(file)] = "grid"
    return found


def _grid(header: Header) -> tuple[object, ...]:
    return header.crs, header.height, header.width, *(round(value, 6) for value in header.transform)


def are_ids(values: frozenset[float] | None) -> bool:
    """Whether the values of a raster may be class ids: few (`ssl_geo.imagery.profiles.MAX_VALUES`), all whole."""
    return values is not None and all(value == int(value) for value in values)


def check_label_rasters(
    labels: Mapping[str, frozenset[float]],
    beside: Mapping[str, str],
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
    """
    if not labels:
        return []
    first, values = next(iter(labels.items()))
    said = " ".join(f"{value:g}" for value in sorted(values)[:_MAX_SAID]) + (" …" if len(values) > _MAX_SAID else "")
    arguments = label_arguments([Path(path) for path in labels], paths, scenes)
    kept = [str(path) for path in paths if _holds(Path(path), [scene for scene in scenes if str(scene) not in labels])]
    fix = "if they are labels, name them with --labels; a run takes images alone"
    if arguments is None:
        fix = "if they are labels, put them into a folder of their own and name it with --labels"
    return [
        Finding(
            "labels among the images",
            severity,
            tuple(labels),
            f"one band of {counted(len(values), 'whole value')} ({said}) beside an image of the same {beside[first]}",
            "imagery alone; labels are named by --labels",
            fix,
            len(labels),
            command=""
            if arguments is None
            else " ".join(["python -m ssl_geo.doctor", *map(shlex.quote, kept), "--labels", *arguments]),
        )
    ]


def label_arguments(labels: Sequence[Path], paths: Sequence[Path | str], scenes: Sequence[Path]) -> list[str] | None:
    """What to write behind ``--labels`` for a shell: folders of labels alone, else patterns or files.

    Returns:
        None where a folder mixes both in so many files of such names that no pattern tells them apart.
    """
    known, tops = set(labels), set(map(straight_path, paths))
    images = {folder for scene in scenes if scene not in known for folder in scene.parents}  # or above images
    arguments: dict[str, None] = {}
    by_folder: dict[Path, list[Path]] = {}
    for label in labels:
        by_folder.setdefault(label.parent, []).append(label)
    for folder, files in by_folder.items():
        if folder not in images:
            while folder not in tops and folder.parent not in images:
                folder = folder.parent
            arguments[shlex.quote(str(folder))] = None
        elif (pattern := _pattern(folder, files, known)) is not None:
            arguments[pattern] = None
        elif len(files) <= _MAX_LISTED:
            arguments |= {shlex.quote(str(file)): None for file in files}
        else:
            return None
    return list(arguments)


def _pattern(folder: Path, files: Sequence[Path], known: set[Path]) -> str | None:
    """A shell's pattern for files of one folder and no others there; None where their names tell too little."""
    if len(files) < 2:
        return None
    names = [file.name for file in files]
    others = [entry.name for entry in folder.iterdir() if entry not in known]
    first, end = _shared_start(names), _shared_start([name[::-1] for name in names])[::-1]
    for start in ("", first):
        tells = not any(name.startswith(start) and name.endswith(end) for name in others)
        if tells and all(len(name) >= len(start) + len(end) for name in names):
            return f"{shlex.quote(f'{folder}/{start}')}*{shlex.quote(end)}"
    return None


def _shared_start(names: Sequence[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda c: len(set(c)) == 1, zip(*names, strict=False)))


def _holds(path: Path, scenes: Sequence[Path]) -> bool:
    """Whether one of the scenes is at a path or below it."""
    top = straight_path(path)
    return any(top == scene or top in scene.parents for scene in scenes)
