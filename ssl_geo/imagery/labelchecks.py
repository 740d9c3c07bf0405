"""Images against their labels: pairs, grids, shifts, values and balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ssl_geo.errors import UserError
from ssl_geo.imagery.findings import MAX_PATHS, Finding, counted
from ssl_geo.imagery.labelshift import busiest_window, image_edges, label_boundary, measure_shift
from ssl_geo.imagery.pairing import grid_difference, match_labels
from ssl_geo.imagery.rasters import read_labels, read_window
from ssl_geo.imagery.scenes import Scene, UnreadableError

_IMAGES_COMPARED = 8  # dates of a place whose edges are summed
_RARE = 1e-3  # share of labelled pixels below which a class is rare
_FEW = 100  # labelled pixels below which it is, whatever its share
_DOMINANT = 0.95  # share of labelled pixels of one class
_MAX_VALUES = 255  # classes of a label raster; more are measurements
_MAX_SAID = 8  # values that a line lists

Labels = npt.NDArray[np.integer[Any]]


@dataclass
class _Tally:
    """Pixels and label rasters of each value."""

    pixels: Counter[int] = field(default_factory=Counter)
    rasters: Counter[int] = field(default_factory=Counter)
    files: dict[int, list[str]] = field(default_factory=dict)
    unlabelled: int = 0
    negative: Counter[int] = field(default_factory=Counter)
    negative_files: list[str] = field(default_factory=list)

    def holding(self, values: Iterable[int]) -> tuple[str, ...]:
        """Label rasters that hold one of the values, each once."""
        return tuple(dict.fromkeys(file for value in values for file in self.files[value]))


def examine_labels(
    images: Sequence[Path],
    scenes: Mapping[str, Scene],
    files: Sequence[Path],
    *,
    classes: Sequence[int] | None = None,
    ignore: Sequence[int] | None = None,
    progress: bool = True,
) -> list[Finding]:
    """Check label rasters against the images they belong to.

    Args:
        images: Paths of all scenes, also of those that are no use.
        scenes: The usable ones by path.
        files: Label rasters.
        classes: Ids that they may hold; by default any.
        ignore: Ids that count as no label.
        progress: Show a bar where it takes more than two seconds.
    """
    matches, unused = match_labels(images, files)
    findings = check_pairs(images, matches, unused, len(files))
    images_of: dict[Path, list[Scene]] = {}
    for image, fitting in zip(images, matches, strict=True):
        if (scene := scenes.get(str(image))) is not None:
            for file in fitting:
                images_of.setdefault(file, []).append(scene)
    tally = _Tally()
    for file in tqdm(files, "labels", unit=" rasters", delay=2, disable=not progress):
        try:
            labels, crs, transform, nodata = read_labels(file)
        except UserError as error:
            findings.append(_unusable(file, error))
            continue
        _count(tally, file, labels, {*(ignore or ()), nodata} - set(classes or ()))
        on_grid = []
        for scene in images_of.get(file, []):
            differs = grid_difference(labels.shape, crs, transform, scene)
            if differs is None:
                on_grid.append(scene)
            else:
                findings.append(_grid(file, scene, differs, is_warpable=crs is not None and scene.crs is not None))
        findings += check_shift(file, labels, on_grid)
    return findings + check_values(tally, files, classes) + check_negative_ids(tally) + check_balance(tally, files)


def check_pairs(
    images: Sequence[Path], matches: Sequence[Sequence[Path]], unused: Sequence[Path], labels: int
) -> list[Finding]:
    """Images without a label, with several, and labels without an image: the probe refuses each (`pair_labels`)."""
    alone = tuple(str(image) for image, fitting in zip(images, matches, strict=True) if not fitting)
    several = tuple(str(image) for image, fitting in zip(images, matches, strict=True) if len(fitting) > 1)
    findings = []
    for check, paths, found, fix in (
        (
            "image without label",
            alone,
            f"{len(alone)} of {len(images)} images have no label of their name",
            "name the labelled images alone, or add labels named like them",
        ),
        (
            "several labels",
            several,
            f"{len(several)} of {len(images)} images have several labels of their name",
            "name the labels of one kind with --labels",
        ),
        (
            "label without image",
            tuple(map(str, unused)),
            f"{len(unused)} of {labels} labels have no image of their name",
            "add the images, or name fewer labels with --labels",
        ),
    ):
        if paths:
            expected = "one label for each image, by name"
            findings.append(Finding(check, "error", paths, found, expected, fix, len(paths)))
    return findings


def _unusable(file: Path, error: UserError) -> Finding:
    is_torn = isinstance(error, UnreadableError)
    return Finding(
        "unreadable" if is_torn else "label values",
        "error",
        (str(file),),
        " ".join(str(error).split())[:300],
        "every block readable" if is_torn else "one band of whole numbers",
        "fetch the file again, or take it out of the archive" if is_torn else "write class ids as integers",
    )


def _grid(file: Path, scene: Scene, differs: str, *, is_warpable: bool) -> Finding:
    """CRS, shape or corners that differ by more than 0.01 pixel (`pairing`)."""
    return Finding(
        "label grid",
        "error",
        (str(file), scene.path),
        differs,
        "labels on the grid of their image",
        "--align true warps labels to the image's grid by nearest neighbour"
        if is_warpable
        else "georeference both, or crop one to the other",
    )


def check_shift(file: Path, labels: Labels, scenes: Sequence[Scene]) -> list[Finding]:
    """Labels on their image's grid that lie beside what they show (`labelshift`), by the image's edges."""
    boundary = label_boundary(labels)
    if not scenes or not boundary.any():
        return []
    row, col, height, width = busiest_window(boundary)
    edges = []
    chosen = np.linspace(0, len(scenes) - 1, min(len(scenes), _IMAGES_COMPARED)).astype(int)
    for k in np.unique(chosen):
        try:
            dn, valid = read_window(scenes[k], scenes[k].bands, row, col, height, width)
        except UnreadableError:
            continue  # said by the check that reads every block
        if valid.any():
            edges.append(image_edges(dn, valid))
    if not edges:
        return []
    shift = measure_shift(edges, boundary[row : row + height, col : col + width])
    if shift is None or not shift.is_shift:
        return []
    down, right = (f"{abs(value):.1f} pixels {way[value < 0]}" for value, way in _ways(shift.rows, shift.cols))
    return [
        Finding(
            "label shift",
            "warning",
            (str(file), scenes[0].path),
            f"labels fit best {down} and {right} of where they lie ({shift.significance:.1f} standard deviations above "
            f"chance, {shift.in_place:.1f} in place)",
            "labels whose borders lie on edges of the image",
            "look at both in a viewer; if it is so, make the labels again on the image's grid",
        )
    ]


def _ways(rows: float, cols: float) -> tuple[tuple[float, tuple[str, str]], ...]:
    return (rows, ("down", "up")), (cols, ("right", "left"))


def _count(tally: _Tally, file: Path, labels: Labels, ignored: set[int | None]) -> None:
    ids, pixels = np.unique(labels, return_counts=True)
    for value, count in zip(ids.tolist(), pixels.tolist(), strict=True):
        if value in ignored or value < 0:
            tally.unlabelled += count
            if value not in ignored:
                tally.negative[value] += count
                tally.negative_files.append(str(file))
        else:
            tally.pixels[value] += count
            tally.rasters[value] += 1
            if tally.rasters[value] <= MAX_PATHS:
                tally.files.setdefault(value, []).append(str(file))


def check_values(tally: _Tally, files: Sequence[Path], classes: Sequence[int] | None) -> list[Finding]:
    """Values that are no class: not among `classes`, or more than 255 different ones; no labelled pixel at all."""
    paths = tuple(map(str, files))
    if not tally.pixels:
        expected, fix = "labelled pixels", "see --ignore and the declared nodata"
        return [Finding("label values", "error", paths, "no labelled pixel", expected, fix, len(files))]
    if len(tally.pixels) > _MAX_VALUES:
        found = f"{len(tally.pixels)} different values, {min(tally.pixels)} to {max(tally.pixels)}"
        expected, fix = f"at most {_MAX_VALUES} classes", "name class ids with --classes and the others with --ignore"
        return [Finding("label values", "error", paths, found, expected, fix, len(files))]
    strange = sorted(set(tally.pixels) - set(classes)) if classes is not None else []
    if not strange:
        return []
    listed = ", ".join(f"{value} ({counted(tally.pixels[value], 'pixel')})" for value in strange[:_MAX_SAID])
    more = ", …" if len(strange) > _MAX_SAID else ""
    return [
        Finding(
            "label values",
            "error",
            tally.holding(strange),
            f"{counted(len(strange), 'value')} not among --classes: {listed}{more}",
            f"--classes {' '.join(map(str, classes or ()))}",
            f"add them to --classes, or --ignore {' '.join(map(str, strange[:_MAX_SAID]))}",
            sum(tally.rasters[value] for value in strange),
        )
    ]


def check_negative_ids(tally: _Tally) -> list[Finding]:
    """Negative values that nothing declares: by custom no label, and the probe ignores and reports them."""
    if not tally.negative:
        return []
    listed = ", ".join(f"{value} ({counted(n, 'pixel')})" for value, n in tally.negative.most_common(_MAX_SAID))
    paths = tuple(dict.fromkeys(tally.negative_files))
    ids = " ".join(map(str, sorted(tally.negative)[:_MAX_SAID]))
    return [
        Finding(
            "negative label values",
            "warning",
            paths,
            listed,
            "class ids from 0 on",
            f"none needed if they stand for no label: the probe ignores negative values, as with --ignore {ids}",
            len(paths),
        )
    ]


def check_balance(tally: _Tally, files: Sequence[Path]) -> list[Finding]:
    """One class with more than 95 % of the labelled pixels; classes with less than 0.1 % or 100 pixels; shares."""
    total = sum(tally.pixels.values())
    if not total or len(tally.pixels) > _MAX_VALUES:
        return []
    paths = tuple(map(str, files))
    order = tally.pixels.most_common()
    shares = ", ".join(f"{value}: {count / total:.2%}" for value, count in order[:_MAX_SAID])
    more = ", …" if len(order) > _MAX_SAID else ""
    share_without = tally.unlabelled / (total + tally.unlabelled)
    findings = [
        Finding(
            "class balance",
            "info",
            (),
            f"{counted(len(order), 'value')} in {counted(len(files), 'label raster')}, {shares}{more}; "
            f"{share_without:.1%} unlabelled",
            "every class with pixels enough to learn and to test it",
            "--class_weights true weighs rare classes in the probe's loss",
            len(files),
        )
    ]
    top, count = order[0]
    if count > _DOMINANT * total:
        findings.append(
            Finding(
                "dominant class",
                "warning",
                paths,
                f"value {top} holds {count / total:.2%} of the labelled pixels",
                f"at most {_DOMINANT:.0%} for one class",
                f"--ignore {top} if it stands for no label; else judge by the IoU of each class, not by accuracy",
            )
        )
    rare = [(value, n) for value, n in reversed(order) if n < max(_RARE * total, _FEW)]
    if rare:
        listed = ", ".join(
            f"{value} ({counted(n, 'pixel')} in {tally.rasters[value]})" for value, n in rare[:_MAX_SAID]
        )
        ids = " ".join(str(value) for value, _ in rare[:_MAX_SAID])
        findings.append(
            Finding(
                "rare classes",
                "warning",
                tally.holding(value for value, _ in rare),
                f"{counted(len(rare), 'value')} with hardly a pixel: {listed}{', …' if len(rare) > _MAX_SAID else ''}",
                f"{_RARE:.1%} of the labelled pixels and {_FEW} pixels for each class",
                f"--ignore {ids}, or more labels; a split may not hold them at all",
                len(rare),
            )
        )
    return findings
