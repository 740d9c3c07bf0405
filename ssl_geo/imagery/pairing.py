"""Images and their label rasters: paired by name, checked by georeferencing, their values listed as classes.

A label raster holds class ids. In the project a class is its place in the list of ids, 0 … C-1 as uint8, and 255 is
ignored: nodata, pixels of the image that are not valid, padding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ssl_geo.documents import read_json
from ssl_geo.errors import UserError
from ssl_geo.imagery.archives import BAND, GEOTIFF_SUFFIXES, RASTER_SUFFIXES, straight_path
from ssl_geo.imagery.coordinates import same_crs, warp_labels
from ssl_geo.imagery.rasters import find_scenes, open_scene, read_labels, read_legend
from ssl_geo.imagery.scenes import Scene, Transform

IGNORED = 255
"""The label of a pixel that counts for nothing."""

Colour = tuple[int, int, int]

_TOLERANCE = 0.01  # of a pixel, by which grids may differ
_MAX_SAID = 6  # values or classes that a line lists

# M. Okabe, K. Ito, "Color Universal Design", 2008, without black; then P. Tol, "Colour Schemes", 2021, muted.
_PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (51, 34, 136), (136, 204, 238), (68, 170, 153), (17, 119, 51), (153, 153, 51), (221, 204, 119), (204, 102, 119),
    (136, 34, 85), (170, 68, 153),
)  # fmt: skip

# What tells the kind of a raster and not its place, where it is the last word of a name.
_KIND = re.compile(
    "annotations?|class(?:es)?|ct|gt|images?|img|label(?:s|l?ed)?|landcover|lc|lulc|masks?|reference|scene|"
    "seg(?:mentation)?|stack|target|truth",
    re.IGNORECASE,
)
_LAST_WORD = re.compile(r"[_\-. ]([A-Za-z]+)$")
_LAST_DATE = re.compile(r"[_\-. ](?:19|20)\d\d(-?)[01]\d\1[0-3]\d(?:T\d{4,6})?$")


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a set of labels; class k is the k-th.

    Attributes:
        ids: What the label rasters hold for each.
        names: For people.
        colours: (red, green, blue), 0 to 255.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    colours: tuple[Colour, ...]


@dataclass(frozen=True, slots=True)
class LabelledScene:
    """An image and its label raster.

    Attributes:
        scene: The image.
        labels: The label raster's file.
        classes: Of all scenes of the set.
        nodata: Id that stands for no label in this file, or None.
        warped: How the label raster's grid differs from the image's, so that labels are warped; None where it does not.
        negative: Pixels on the image's grid whose value is below 0 and neither nodata nor ignored: no label either.
    """

    scene: Scene
    labels: str
    classes: Classes
    nodata: int | None
    warped: str | None
    negative: int = 0


def check_ids(classes: Sequence[int], ignored: Collection[int]) -> None:
    """Refuse ids of classes that cannot be: none, one twice, one below 0, one that is ignored too.

    Raises:
        UserError: Naming it.
    """
    if not classes or len(set(classes)) < len(classes):
        raise UserError(f"--classes {' '.join(map(str, classes))}: name one id or more, each once")
    if min(classes) < 0:
        raise UserError(f"--classes {min(classes)}: ids of classes must be 0 or more; values below 0 are no label")
    if both := sorted(set(ignored).intersection(classes)):
        raise UserError(f"--classes and --ignore both hold {both[0]}: leave it out of one")


def pair_labels(
    images: Sequence[Path | str],
    labels: Path | str | Sequence[Path | str],
    *,
    align: bool = False,
    classes: Sequence[int] | None = None,
    ignore: Sequence[int] | None = None,
    **settings: Any,
) -> list[LabelledScene]:
    """Pair images with label rasters by name, check that they lie on one grid, and list the classes.

    Names pair by the first of these rules under which any two do, never by their order:
    1. they are the same (``a.tif`` and ``a.tif``; of a folder or group of band files, its name counts);
    2. they are the same without a last word that all images, or all labels, share or that names a kind of raster
       (``a_image.tif`` and ``a_label.tif``, ``a.tif`` and ``a_mask.tif``); several dates of a place, ``a_20180419.tif``
       and ``a_20180426.tif``, share ``a_LC.tif``.
    Of several labels of one name the one counts whose folders are called like the image's (``images/north/a.tif`` and
    ``labels/north/a.tif``, ``north/images/a.tif`` and ``north/labels/a.tif``).

    Grids are one if CRS and shape are the same and no corner lies more than 0.01 pixel from its place. Images and
    labels that are both without georeferencing need the same shape.

    Args:
        images: Folders and files, as for `find_scenes`; label rasters among them are no images.
        labels: A folder (with those below it) or files.
        align: Warp labels that lie on another grid to the image's, by nearest neighbour.
        classes: Ids in the order wanted; a value that is neither here nor ignored is refused. By default, all ids that
            the labels hold on the images' grids, in ascending order. What is listed here is a class even if a label
            raster declares it as nodata.
        ignore: Ids that count as no label, beside all below 0, which are none in any case and counted.
        **settings: Of `open_scene`.

    Returns:
        The pairs, sorted by image.

    Raises:
        UserError: If an image has no label or several, a label has no image, grids differ, or values do not fit.
    """
    ignored = frozenset(ignore or ())
    if classes is not None:
        check_ids(classes, ignored)
    files = label_files(labels)
    known = set(files)
    paths = [path for path in find_scenes(images) if path not in known]
    found: list[tuple[Scene, Path, int | None, str | None, int]] = []
    counts: dict[tuple[object, ...], tuple[Path, Counter[int], int]] = {}  # a label may serve many images of one grid
    for path, file in tqdm(_pairs(paths, files), desc="pairing labels", unit="image", delay=2):
        scene = open_scene(path, **settings)
        values, inside, nodata, warped = _on_grid(scene, file, align=align)
        if classes is not None and nodata in classes:
            nodata = None
        grid = (file, scene.crs, scene.transform, scene.height, scene.width)
        if grid not in counts:
            ids, pixels = np.unique(values if inside is None else values[inside], return_counts=True)
            unlabelled = ignored | {nodata}
            held = {i: n for i, n in zip(ids.tolist(), pixels.tolist(), strict=True) if i not in unlabelled}
            classified = Counter({i: n for i, n in held.items() if i >= 0})
            counts[grid] = file, classified, sum(held.values()) - classified.total()
        found.append((scene, file, nodata, warped, counts[grid][2]))
    ids = _class_ids([(file, classified) for file, classified, _ in counts.values()], classes)
    listed = _described_classes(ids, files)
    return [
        LabelledScene(scene, str(file), listed, nodata, warped, negative)
        for scene, file, nodata, warped, negative in found
    ]


def label_files(labels: Path | str | Sequence[Path | str]) -> list[Path]:
    """The label rasters, sorted; hidden files (those in the making among them) are none."""
    files: set[Path] = set()
    for path in [labels] if isinstance(labels, str | Path) else labels:
        path = straight_path(path)
        if path.is_dir():
            below = {f for f in path.rglob("[!.]*") if f.suffix.lower() in GEOTIFF_SUFFIXES and f.is_file()}
            if not below:
                raise UserError(f"no label raster under {path}: looked for .tif and .tiff; --labels takes GeoTIFFs")
            files |= below
        elif path.is_file():
            files.add(path)
        else:
            raise UserError(f"{path} does not exist; --labels takes a folder of label GeoTIFFs")
    if not files:
        raise UserError("no label raster given; --labels takes a folder of label GeoTIFFs")
    return sorted(files)


def scene_name(path: Path) -> str:
    """What a scene is called: without suffix, or without the band's place in a group's name."""
    name = path.name
    return path.stem if name.lower().endswith(RASTER_SUFFIXES) else name.replace(BAND, "").strip("_-. ")


def read_splits(file: Path, option: str) -> dict[str, str]:
    """Split of each scene by its name, from JSON.

    Args:
        file: {"scene name": "train" | "val" | "test", ...}.
        option: That named it.

    Raises:
        UserError: It is no such file, or names another split.
    """
    given = read_json(file, fix=f"name another {option}")
    if not isinstance(given, dict):
        raise UserError(f'{option} {file} must hold {{"image name": "train", "val" or "test"}}')
    if strange := [(name, split) for name, split in given.items() if split not in ("train", "val", "test")]:
        name, split = strange[0]
        raise UserError(f"{option} {file} puts {name} into {split!r}; the splits are train, val and test")
    return given


def match_labels(images: Sequence[Path], files: Sequence[Path]) -> tuple[list[list[Path]], list[Path]]:
    """The label rasters that fit each image by name (none, one or several), and those that fit none.

    Args:
        images: Scenes.
        files: Label rasters.
    """
    image_names, label_names = [scene_name(path) for path in images], [path.stem for path in files]
    if set(image_names).isdisjoint(label_names):
        image_names, label_names = _without_kind(image_names), _without_kind(label_names)
        known = set(label_names)
        image_names = [name if name in known else _LAST_DATE.sub("", name) for name in image_names]
    named: dict[str, list[Path]] = {}
    for name, file in zip(label_names, files, strict=True):
        named.setdefault(name, []).append(file)
    fitting = [_nearest_folders(path, named.get(name, [])) for path, name in zip(images, image_names, strict=True)]
    used = {file for those in fitting for file in those}
    return fitting, [file for file in files if file not in used]


def _nearest_folders(image: Path, files: list[Path]) -> list[Path]:
    """Of several files the one whose folders have most names in common with the image's, from either end; else all."""
    if len(files) < 2:
        return files

    def shared(file: Path) -> int:
        ours, theirs = image.parent.parts, file.parent.parts
        ends = (zip(ours, theirs, strict=False), zip(ours[::-1], theirs[::-1], strict=False))
        return sum(1 for pairs in ends for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    counts = [shared(file) for file in files]
    most = max(counts)
    return [files[counts.index(most)]] if counts.count(most) == 1 else files


def _pairs(images: Sequence[Path], files: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Each image with its label raster, by the rules of `pair_labels`."""
    if not images:
        raise UserError("all rasters that --images names are label rasters of --labels; name the images")
    matches, unused = match_labels(images, files)
    alone = [image for image, fitting in zip(images, matches, strict=True) if not fitting]
    if alone:
        raise UserError(
            f"{len(alone)} of {len(images)} images have no label, the first is {alone[0]}: looked for "
            f"{scene_name(alone[0])}.tif among {len(files)} in --labels; name the labelled images alone with --images"
        )
    for image, fitting in zip(images, matches, strict=True):
        if len(fitting) > 1:
            raise UserError(
                f"{len(fitting)} labels fit the image {scene_name(image)}, {fitting[0]} and {fitting[1]}: "
                "name those of one kind with --labels"
            )
    if unused:
        raise UserError(
            f"{len(unused)} of {len(files)} labels have no image, the first is {unused[0]}: looked for "
            f"{unused[0].name} among {len(images)} in --images; add their images or name fewer labels with --labels"
        )
    return [(image, fitting[0]) for image, fitting in zip(images, matches, strict=True)]


def _without_kind(names: Sequence[str]) -> list[str]:
    """Names without their last word, where all have the same or the words are names of kinds."""
    words = [match[1] if (match := _LAST_WORD.search(name)) else "" for name in names]
    shared = len(words) > 1 and len(set(words)) == 1 and words[0] != ""
    return [_LAST_WORD.sub("", name) for name in names] if shared or all(map(_KIND.fullmatch, words)) else list(names)


def _on_grid(
    scene: Scene, file: Path | str, *, align: bool
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.bool_] | None, int | None, str | None]:
    """Label ids (H, W) on the scene's grid, where the label raster reaches (None: everywhere), nodata, `warped`.

    Raises:
        UserError: If the grids differ and labels shall not or cannot be warped.
    """
    values, crs, transform, nodata = read_labels(file)
    differs = grid_difference(values.shape, crs, transform, scene)
    if differs is None:
        return values, None, nodata, None
    told = f"{file} is not on the grid of {scene.path}: {differs}"
    if crs is None or scene.crs is None:
        raise UserError(f"{told}; without a CRS on both sides it cannot be warped: mend the georeferencing")
    if not align:
        raise UserError(f"{told}; --align true warps labels to the image's grid by nearest neighbour")
    values, inside = warp_labels(
        values,
        crs=crs,
        transform=transform,
        to_crs=scene.crs,
        to_transform=scene.transform,
        to_shape=(scene.height, scene.width),
    )
    return values, inside, nodata, differs


def grid_difference(shape: tuple[int, ...], crs: str | None, transform: Transform, scene: Scene) -> str | None:
    """How a label raster's grid differs from the scene's, in numbers; None where it does not."""
    said = []
    if not same_crs(crs, scene.crs):
        said.append(f"CRS {(crs or 'none')[:40]} against {(scene.crs or 'none')[:40]}")
    if shape != (scene.height, scene.width):
        said.append(f"shape {shape[0]}×{shape[1]} against {scene.height}×{scene.width}")
    if same_crs(crs, scene.crs):
        (a, b, c, d, e, f), (ia, ib, ic, id_, ie, if_) = transform, scene.transform
        axes, image_axes = np.array([[a, b], [d, e]]), np.array([[ia, ib], [id_, ie]])
        to_pixels = np.linalg.inv(image_axes)
        # of the upper left corner; how far the others lie from where they would then be
        shift = to_pixels @ (c - ic, f - if_)
        stretch = np.abs((to_pixels @ axes - np.eye(2)) * (shape[1], shape[0])).sum(axis=1)
        if (stretch > _TOLERANCE).any():
            size, image_size = np.hypot(*axes), np.hypot(*image_axes)
            if np.allclose(size, image_size, rtol=1e-6):
                said.append("axes turned or mirrored against the image's")
            else:
                said.append(f"pixels of {size[0]:.6g}×{size[1]:.6g} against {image_size[0]:.6g}×{image_size[1]:.6g}")
        elif (np.abs(shift) > _TOLERANCE).any():
            said.append(f"shifted by {round(shift[0], 2) + 0.0}, {round(shift[1], 2) + 0.0} pixels")
    return ", ".join(said) or None


def _class_ids(counts: Sequence[tuple[Path, Counter[int]]], classes: Sequence[int] | None) -> tuple[int, ...]:
    """The ids of the classes: those asked for, or all that there are.

    Args:
        counts: Label files and the pixels of each id in them, without nodata and what is ignored.
        classes: As in `pair_labels`.

    Raises:
        UserError: If there is a value that was not asked for, no class, or more than 255.
    """
    pixels = sum((held for _, held in counts), Counter[int]())
    ids = tuple(sorted(pixels)) if classes is None else tuple(classes)
    if strange := sorted(set(pixels) - set(ids)):
        holders = [file for file, held in counts if not held.keys() <= set(ids)]
        values = ", ".join(f"{value} ({pixels[value]} pixels)" for value in strange[:_MAX_SAID])
        raise UserError(
            f"{len(holders)} of {len(counts)} label rasters, the first is {holders[0]}, hold {len(strange)} values not "
            f"among --classes {' '.join(map(str, ids))}: {values}{', …' if len(strange) > _MAX_SAID else ''}; "
            "add them to --classes or to --ignore"
        )
    if not pixels:
        raise UserError(f"no labelled pixel in {len(counts)} label rasters, the first is {counts[0][0]}: see --ignore")
    if len(ids) > IGNORED:
        raise UserError(
            f"{len(ids)} classes, {ids[0]} to {ids[-1]}, in the label rasters, at most {IGNORED} are allowed: name the "
            "ids of the classes with --classes and the others with --ignore"
        )
    return ids


def _described_classes(ids: tuple[int, ...], files: Sequence[Path]) -> Classes:
    """Names and colours of the classes from the first label raster that tells them."""
    names: dict[int, str] = {}
    colours: dict[int, Colour] = {}
    for file in files:
        file_names, file_colours = read_legend(file)
        names, colours = {**file_names, **names}, colours or file_colours
    own = [colours.get(value) for value in ids]
    if None in own or len(set(own)) < len(own):  # a colour table has all values, those of no class mostly black
        own = [_palette_colour(k) for k in range(len(ids))]
    return Classes(
        ids, tuple(names.get(value, f"class {value}") for value in ids), tuple(c for c in own if c is not None)
    )


def _palette_colour(k: int) -> Colour:
    """The palette, then the palette darker, and so on."""
    shade = 0.75 ** (k // len(_PALETTE))
    red, green, blue = _PALETTE[k % len(_PALETTE)]
    return round(red * shade), round(green * shade), round(blue * shade)


@lru_cache(maxsize=8)
def scene_labels(labelled: LabelledScene, changed_ns: int) -> npt.NDArray[np.uint8]:
    """Classes (H, W) of a scene, read once for each state of the label file; 255 where there is none."""
    values, inside, _, _ = _on_grid(labelled.scene, labelled.labels, align=labelled.warped is not None)
    labels = np.full(values.shape, IGNORED, np.uint8)
    for k, value in enumerate(labelled.classes.ids):
        if value != labelled.nodata:
            labels[values == value] = k
    if inside is not None:
        labels[~inside] = IGNORED
    labels.flags.writeable = False  # it is shared
    return labels
