"""Map whole scenes with the head that a probe chose: ``python -m ssl_geo.predict --help``."""

from __future__ import annotations

from ssl_geo.config import PREDICT_PROGRAM, PredictConfig, predict_config
from ssl_geo.errors import UserError, one_line_errors

if __name__ == "__main__":  # settings first: --help answers before torch is imported
    SETTINGS = predict_config()

import dataclasses
import json
import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

import ssl_geo
from ssl_geo.files import written_whole
from ssl_geo.imagery.geoparquet import write_chips
from ssl_geo.imagery.maps import class_map, other_pixels, pixel_areas, value_map
from ssl_geo.imagery.pairing import IGNORED, Classes, scene_name
from ssl_geo.imagery.rasters import Scene, find_scenes, open_scene, read_window
from ssl_geo.imagery.scenes import UnreadableError
from ssl_geo.probing.areas import class_areas
from ssl_geo.probing.embedding import EmptySceneError, principal_components, sampled_features
from ssl_geo.probing.enlarging import dense_features
from ssl_geo.probing.saved import SavedHead, load_head
from ssl_geo.probing.tiling import ReadRows, any_within, blended, lay_tiles
from ssl_geo.training import distributed
from ssl_geo.views.photometry import standardize_chip

Strip = TypeVar("Strip")

PROBABILITY_STEP = 1e-4  # declared as the scale of the stored integers
NO_PERCENT, NO_STEP = 255, 65535  # nodata of confidence and of probabilities


def main(config: PredictConfig) -> int:
    """Predict: scene → tiles → probabilities or features, blended → map."""
    check(config)
    head = load_head(Path(config.head))
    device = distributed.setup(config.device).device
    head.backbone.to(device)
    head.head.to(device)
    scenes = open_scenes(config, head)
    files = targets(config, scenes)
    for scene in scenes:
        for line in notes(head, scene):
            print(line)
    empty = unreadable = 0
    for scene, path in zip(scenes, files, strict=True):
        try:
            if config.embed is None:
                lines = map_scene(config, head, scene, path, device)
            elif config.embed == "chips":
                lines = embed_chips(config, head, scene, path, device)
            else:
                lines = embed_places(config, head, scene, path, device)
        except EmptySceneError as error:
            if len(scenes) == 1:
                raise EmptySceneError(f"{scene.path}: {error}") from error
            empty += 1
            print(f"left out {scene.path}: {error}")
            continue
        except UnreadableError as error:
            if len(scenes) == 1:
                raise
            unreadable += 1
            print(f"left out {error}")
            continue
        for line in [f"{scene.path} -> {path}", *lines]:
            print(line)
    if empty:
        print(f"left out {empty} of {len(scenes)} scenes: nothing to embed")
    if unreadable:
        raise UserError(
            f"left out {unreadable} of {len(scenes)} scenes that cannot be read, the others are done: mend them and "
            "give them alone to --scene"
        )
    return 0


def check(config: PredictConfig) -> None:
    """Refuse settings that cannot work, before anything is read."""
    if not 0 <= config.overlap <= 0.5:
        raise UserError(f"--overlap is {config.overlap}; it must lie between 0 and 0.5")
    if config.batch_size < 1:
        raise UserError(f"--batch_size is {config.batch_size}; it must be 1 or more")
    if config.components is not None and config.components < 1:
        raise UserError(f"--components is {config.components}; it must be 1 or more")
    if config.embed is not None and (config.confidence or config.probabilities):
        raise UserError(f"--embed {config.embed} writes no classes: leave --confidence and --probabilities out")
    for name in ("layer", "components"):
        if getattr(config, name) is not None and config.embed not in ("pca", "tokens"):
            raise UserError(f"--{name} is for --embed pca and --embed tokens alone")


def open_scenes(config: PredictConfig, head: SavedHead) -> list[Scene]:
    """Find the scenes and read their headers; each must have the head's bands."""
    paths: list[str] = []
    for path in config.scene:
        pattern = Path(path)
        if pattern.exists() or not set("*?[") & set(path):
            paths.append(path)
            continue
        found = sorted(str(match) for match in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
        if not found:
            raise UserError(f"--scene {path} matches nothing; name files, folders or another pattern")
        paths += found
    scenes = [open_scene(path, **dataclasses.asdict(config.data)) for path in find_scenes(paths)]
    for scene in scenes:
        if missing := [band for band in head.description.bands if band not in scene.bands]:
            raise UserError(
                f"{scene.path} has no band {missing[0]}, only {' '.join(scene.bands)}, where the head takes "
                f"{' '.join(head.description.bands)}: give scenes that have them (--data.band_names names the bands of "
                "files that name none)"
            )
    return scenes


def targets(config: PredictConfig, scenes: list[Scene]) -> list[Path]:
    """The main file of each scene; nothing there is written over."""
    out, suffixes = Path(config.out), [".parquet"] if config.embed == "chips" else [".tif", ".tiff"]
    suffix = suffixes[0]
    if out.suffix.lower() in suffixes:
        if len(scenes) > 1:
            raise UserError(f"--out {out} is one file for {len(scenes)} scenes; name a folder")
        files = [out]
    elif out.suffix.lower() in (".tif", ".tiff", ".parquet", ".json"):
        raise UserError(f"--out {out}: what is written is {suffix}; name such a file or a folder")
    else:
        files = [out / f"{scene_name(Path(scene.path)) or 'scene'}{suffix}" for scene in scenes]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise UserError(f"two scenes would be written to {twice}; predict them into folders of their own")
    extra = [".json"] * (config.embed is None) + [".confidence.tif"] * config.confidence
    extra += [".probabilities.tif"] * config.probabilities
    for file in files:
        for path in (file, *(file.with_name(file.stem + more) for more in extra)):
            if path.exists():
                raise UserError(f"--out: {path} exists; name another place or remove it")
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({error.strerror}); name a folder that can") from error
    return files


def notes(head: SavedHead, scene: Scene) -> Iterator[str]:
    """What a reader of the map should know of how it was read."""
    levels = head.description.provenance.get("levels")
    if levels and scene.level is not None and scene.level not in levels:
        yield f"{scene.path} is {scene.level}, the head was trained on {' '.join(levels)}: its classes may be off"
    if scene.offset_source == "assumed" and np.dtype(scene.dtype).kind in "iu":
        yield f"{scene.path}: offset 0 assumed, nothing states it; --data.offset sets it"
    if scene.crs is None:
        yield f"{scene.path} has no CRS: nor has what is made of it, and areas are in pixels"
    if scene.overruled:
        yield f"{scene.path} states {', '.join(scene.overruled)}: settings say otherwise, and are followed"
    backbone: Any = head.backbone
    if line := other_pixels(scene, backbone.description.get("gsd")):
        yield line


def tags_of(head: SavedHead, scene: Scene) -> dict[str, str]:
    """Where a file comes from, for its metadata."""
    described = head.description
    return {
        "software": f"ssl_geo {ssl_geo.__version__}",
        "checkpoint": described.checkpoint,
        "head": described.name,
        "scene": scene.path,
        "bands": " ".join(described.bands),
    }


def rows_reader(head: SavedHead, scene: Scene, side: int, width: int) -> ReadRows:
    """Read `side` standardized rows at a time, padded below and to the right to `width` with what is not valid."""
    described = head.description
    mean, std = np.asarray(described.mean, np.float32), np.asarray(described.std, np.float32)

    def read(top: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        height = min(side, scene.height - top)
        dn, valid = read_window(scene, described.bands, top, 0, height, scene.width)
        reflectance = dn.astype(np.float32)
        reflectance += np.float32(scene.offset)
        reflectance *= np.float32(scene.scale)
        standardized = standardize_chip(reflectance, valid, mean, std)
        below, beside = side - height, width - scene.width
        if below or beside:
            standardized = np.pad(standardized, ((0, 0), (0, below), (0, beside)))
            valid = np.pad(valid, ((0, below), (0, beside)))
        return standardized, valid

    return read


def progress(strips: Iterable[Strip], total: int, scene: Scene) -> Iterator[Strip]:
    """Pass rows of tiles on under a progress bar."""
    return iter(tqdm(strips, total=total, desc=scene_name(Path(scene.path)), unit="row", delay=2, dynamic_ncols=True))


def map_scene(config: PredictConfig, head: SavedHead, scene: Scene, path: Path, device: torch.device) -> list[str]:
    """Write class map, areas and what else was asked for; lines that tell the areas."""
    described = head.description
    classes = Classes(described.class_ids, described.class_names, described.class_colours)
    count, size = len(classes.ids), described.chip_size
    rows, columns = (lay_tiles(length, size, config.overlap) for length in (scene.height, scene.width))
    tags = tags_of(head, scene)
    pixels = np.zeros((scene.height, count), np.int64)
    read = rows_reader(head, scene, size, columns.length)
    with ExitStack() as files:
        write_classes = files.enter_context(class_map(path, scene, classes, tags))
        write_confidence = write_probabilities = None
        if config.confidence:
            file = path.with_name(f"{path.stem}.confidence.tif")
            told = ["probability of the class, percent"]
            opened = value_map(file, scene, np.uint8, nodata=NO_PERCENT, descriptions=told, tags=tags)
            write_confidence = files.enter_context(opened)
        if config.probabilities:
            file = path.with_name(f"{path.stem}.probabilities.tif")
            opened = value_map(
                file, scene, np.uint16, nodata=NO_STEP, descriptions=classes.names, tags=tags, scale=PROBABILITY_STEP
            )
            write_probabilities = files.enter_context(opened)
        strips = blended(read, head.probabilities, rows, columns, count, batch_size=config.batch_size, device=device)
        for top, values, valid in progress(strips, len(rows.starts), scene):
            height = min(len(valid), scene.height - top)
            inside = valid[:height, : scene.width]
            confidence, best = values[:, :height, : scene.width].max(dim=0)
            found = np.where(inside, best.to(torch.uint8).cpu().numpy(), np.uint8(IGNORED))
            write_classes(top, found)
            for number in range(count):
                pixels[top : top + height, number] = (found == number).sum(axis=1)
            if write_confidence is not None:
                percent = (confidence * 100).round().clamp(0, 100).to(torch.uint8).cpu().numpy()
                write_confidence(top, np.where(inside, percent, np.uint8(NO_PERCENT))[None])
            if write_probabilities is not None:
                steps = (values[:, :height, : scene.width] / PROBABILITY_STEP).round().cpu().numpy().astype(np.uint16)
                write_probabilities(top, np.where(inside, steps, np.uint16(NO_STEP)))
    return write_areas(path.with_name(f"{path.stem}.json"), head, scene, pixels, tags)


def write_areas(
    path: Path, head: SavedHead, scene: Scene, pixels: npt.NDArray[np.int64], tags: dict[str, str]
) -> list[str]:
    """Write the area of each class beside the map; lines that tell it.

    Args:
        path: The file to write.
        head: That made the map.
        scene: Under it.
        pixels: (H, C) mapped in each row.
        tags: Where the map comes from.
    """
    described = head.description
    ground = pixel_areas(scene)
    unit, per_row = ("pixels", np.ones(scene.height)) if ground is None else ("ha", ground / 1e4)
    mapped = per_row @ pixels
    areas = class_areas(described.confusion, mapped)
    tested = described.confusion.sum(axis=(0, 1))
    rows, lines = [], []
    for number, area in enumerate(areas):
        name = described.class_names[number]
        known = area.reliable and not math.isnan(area.low)
        rows.append(
            {
                "id": described.class_ids[number],
                "name": name,
                "pixels": int(pixels[:, number].sum()),
                "mapped": float(mapped[number]),
                "adjusted": area.value,
                "low": area.low if known else None,
                "high": area.high if known else None,
                "tested_pixels": int(tested[number]),
            }
        )
        interval = f"[{area.low:,.1f}, {area.high:,.1f}]" if known else "(no interval: too few test blocks)"
        lines.append(f"  {name}: {mapped[number]:,.1f} {unit} mapped, adjusted for errors {area.value:,.1f} {interval}")
    content = {
        "format": 1,
        "unit": unit,
        "classes": rows,
        "nodata_pixels": scene.height * scene.width - int(pixels.sum()),
        "test_blocks": int((described.confusion.sum(axis=(1, 2)) > 0).sum()),
        "method": "error-adjusted area (Olofsson et al. 2014, eq. 9), 95 % interval by bootstrap over test blocks; "
        "holds as far as the map errs here as on the probe's test split",
        "provenance": tags,
    }
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
    return lines


def embed_places(config: PredictConfig, head: SavedHead, scene: Scene, path: Path, device: torch.device) -> list[str]:
    """Write features of one layer, or their principal components, on the layer's grid."""
    described = head.description
    layer = config.layer or described.layers[0]
    extractor = dense_features(head.backbone, [layer], side=described.chip_size, enlarge=described.enlarge)
    channels, reduction = extractor.channels[0], extractor.reduction[0]
    cells = max(described.chip_size // reduction, 1)  # of a tile, along each axis
    side = cells * reduction
    height, width = -(-scene.height // reduction), -(-scene.width // reduction)
    rows, columns = (lay_tiles(length, cells, config.overlap) for length in (height, width))
    read = rows_reader(head, scene, side, columns.length * reduction)

    def features(tiles: Tensor) -> Tensor:
        found = extractor.as_list(tiles)[0]
        if found.shape[-2:] != (cells, cells):
            raise UserError(
                f"--layer {layer} gives {found.shape[-2]}×{found.shape[-1]} places for tiles of {side} pixels, no grid "
                f"of 1/{reduction}: name another (ssl_geo.probe --layers list prints them)"
            )
        return found

    model, kept, names, lines = features, channels, "feature", []
    if config.embed == "pca":
        with torch.inference_mode():
            components = principal_components(
                sampled_features(read, features, rows, columns, reduction, config.batch_size, device),
                config.components or 3,
            )
        kept, names = len(components.axes), "principal component"
        lines = ["  explained: " + " ".join(f"{share:.1%}" for share in components.explained)]

        def model(tiles: Tensor) -> Tensor:
            return components.project(features(tiles))

    elif config.components is not None:
        kept = min(config.components, channels)

        def model(tiles: Tensor) -> Tensor:
            return features(tiles)[:, :kept]

    told = [f"{names} {number + 1}" for number in range(kept)]
    tags = {**tags_of(head, scene), "layer": layer}
    with value_map(
        path, scene, np.float32, nodata=math.nan, descriptions=told, tags=tags, reduction=reduction
    ) as write:
        strips = blended(
            read, model, rows, columns, kept, reduction=reduction, batch_size=config.batch_size, device=device
        )
        for top, values, valid in progress(strips, len(rows.starts), scene):
            count = min(values.shape[1], height - top)
            inside = any_within(valid, reduction)[:count, :width]
            write(top, np.where(inside, values[:, :count, :width].cpu().numpy(), np.float32(np.nan)))
    return lines


def embed_chips(config: PredictConfig, head: SavedHead, scene: Scene, path: Path, device: torch.device) -> list[str]:
    """Write one embedding a chip: a regular grid without overlap, its last row and column moved inwards."""
    size = head.description.chip_size
    rows, columns = (lay_tiles(length, size, 0.0) for length in (scene.height, scene.width))
    read = rows_reader(head, scene, size, columns.length)
    places: list[tuple[int, int, float]] = []
    embeddings: list[npt.NDArray[np.float32]] = []
    for top in progress(rows.starts, len(rows.starts), scene):
        image, valid = read(top)
        chips = [left for left in columns.starts if valid[:, left : left + size].any()]
        places += [(top, left, float(valid[:, left : left + size].mean())) for left in chips]
        for first in range(0, len(chips), config.batch_size):
            tiles = np.stack([image[:, :, left : left + size] for left in chips[first : first + config.batch_size]])
            with torch.inference_mode():
                embeddings.append(head.backbone(torch.from_numpy(tiles).to(device)).cpu().numpy())
    if not places:
        raise EmptySceneError("no pixel is valid (--data.nodata)")
    row, col, fraction = np.array(places).T
    write_chips(
        path,
        scene,
        row.astype(np.int64),
        col.astype(np.int64),
        size,
        fraction,
        np.concatenate(embeddings),
        tags_of(head, scene),
    )
    left_out = len(rows.starts) * len(columns.starts) - len(places)
    return [f"  {len(places)} chips of {size}×{size} pixels; left out {left_out} without a valid pixel"]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half written is cleared away
    with one_line_errors(PREDICT_PROGRAM):
        raise SystemExit(main(SETTINGS))
