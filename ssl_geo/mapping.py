"""A scene becomes a map with its areas, or an embedding: rows are read, standardized, shown, written. For predict."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

import ssl_geo
from ssl_geo.config import PredictConfig
from ssl_geo.errors import UserError, printable
from ssl_geo.files import written_whole
from ssl_geo.imagery.geoparquet import write_chips
from ssl_geo.imagery.maps import class_map, pixel_areas, value_map
from ssl_geo.imagery.origin import MADE_FROM
from ssl_geo.imagery.pairing import IGNORED, Classes, scene_name
from ssl_geo.imagery.rasters import Scene, read_counted
from ssl_geo.imagery.scenes import UNMEASURED, UnreadableError
from ssl_geo.probing.areas import class_areas
from ssl_geo.probing.embedding import (
    SAMPLED_TILES,
    EmptySceneError,
    PrincipalComponents,
    principal_components,
    sampled_features,
)
from ssl_geo.probing.enlarging import dense_features
from ssl_geo.probing.saved import SavedHead
from ssl_geo.probing.tiling import Axis, Model, NotFiniteError, any_within, blended, lay_tiles
from ssl_geo.views.photometry import standardize_chip

Strip = TypeVar("Strip")

PROBABILITY_STEP = 1e-4  # declared as the scale of the stored integers
NO_PERCENT, NO_STEP = 255, 65535  # nodata of confidence and of probabilities


def tags_of(head: SavedHead, scene: Scene, made_from: str) -> dict[str, str]:
    """Where a file comes from, for its metadata."""
    described = head.description
    return {
        MADE_FROM: made_from,
        "software": f"ssl_geo {ssl_geo.__version__}",
        "checkpoint": described.checkpoint,
        "head": described.name,
        "scene": scene.path,
        "bands": " ".join(described.bands),
    }


class RowsReader:
    """Reads some standardized rows of a scene at a time, padded below and to the right with what is not valid.

    Attributes:
        dropped: Pixels of the rows read so far that are not valid for nothing but that they hold no measurement.

    Args:
        head: Whose bands and statistics to take.
        scene: To read.
        side: Rows at a time.
        width: To which they are padded.
    """

    def __init__(self, head: SavedHead, scene: Scene, side: int, width: int) -> None:
        self.dropped = 0
        self._described, self._scene, self._side, self._width = head.description, scene, side, width
        self._counted = 0  # rows: tiles overlap

    def __call__(self, top: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Rows from `top` on (bands, side, width), 0 where not valid, and valid (side, width)."""
        scene, described = self._scene, self._described
        height = min(self._side, scene.height - top)
        dn, valid, dropped = read_counted(scene, described.bands, top, 0, height, scene.width)
        if dropped is not None:
            self.dropped += int(dropped[max(0, self._counted - top) :].sum())
        self._counted = max(self._counted, top + height)
        with np.errstate(over="ignore", invalid="ignore"):  # where not valid
            reflectance = dn.astype(np.float32)
            reflectance += np.float32(scene.offset)
            reflectance *= np.float32(scene.scale)
        standardized = standardize_chip(reflectance, valid, described.mean, described.std)
        below, beside = self._side - height, self._width - scene.width
        if below or beside:
            standardized = np.pad(standardized, ((0, 0), (0, below), (0, beside)))
            valid = np.pad(valid, ((0, below), (0, beside)))
        return standardized, valid

    def report(self) -> list[str]:
        """What to print of what was read."""
        if not self.dropped:
            return []
        return [f"  {self.dropped:,} pixels hold {UNMEASURED} and are taken as nodata, which no file declares"]


def progress(strips: Iterable[Strip], total: int, name: str) -> Iterator[Strip]:
    """Pass rows of tiles on under a progress bar."""
    return iter(tqdm(strips, total=total, desc=printable(name), delay=2, dynamic_ncols=True))


def map_scene(
    config: PredictConfig, head: SavedHead, scene: Scene, path: Path, made_from: str, device: torch.device
) -> list[str]:
    """Write class map, areas and what else was asked for; lines that tell the areas."""
    described = head.description
    ground = pixel_areas(scene)
    if scene.crs is not None and ground is not None and not (np.isfinite(ground) & (ground > 0)).all():
        raise UnreadableError(
            f"{scene.path}: no ground area can be told of its pixels, some lie beyond what {scene.crs[:40]} reaches: "
            "set its transform and CRS right (gdal_edit.py), or cut it to the Earth"
        )
    classes = Classes(described.class_ids, described.class_names, described.class_colours)
    count, size = len(classes.ids), described.chip_size
    rows, columns = (lay_tiles(length, size, config.overlap) for length in (scene.height, scene.width))
    tags = tags_of(head, scene, made_from)
    pixels = np.zeros((scene.height, count), np.int64)
    read = RowsReader(head, scene, size, columns.length)
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
        for top, values, valid in progress(strips, len(rows.starts), scene_name(Path(scene.path))):
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
    lines = write_areas(path.with_name(f"{path.stem}.json"), head, ground, pixels, scene.width, read.dropped, tags)
    return [*lines, *read.report()]


def write_areas(
    path: Path,
    head: SavedHead,
    ground: npt.NDArray[np.float64] | None,
    pixels: npt.NDArray[np.int64],
    width: int,
    dropped: int,
    tags: dict[str, str],
) -> list[str]:
    """Write the area of each class beside the map; lines that tell it.

    Args:
        path: The file to write.
        head: That made the map.
        ground: (H,) m² of a pixel of each row; None where it is not known.
        pixels: (H, C) mapped in each row.
        width: Of the scene in pixels.
        dropped: Pixels that are nodata because they hold no measurement, though undeclared.
        tags: Where the map comes from.
    """
    described = head.description
    height = len(pixels)
    unit, per_row = ("pixels", np.ones(height)) if ground is None else ("ha", ground / 1e4)
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
        "nodata_pixels": height * width - int(pixels.sum()),
        "unmeasured_pixels": dropped,  # of these; not declared
        "test_blocks": int((described.confusion.sum(axis=(1, 2)) > 0).sum()),
        "method": "error-adjusted area (Olofsson et al. 2014, eq. 9), 95 % interval by bootstrap over test blocks; "
        "holds as far as the map errs here as on the probe's test split",
        "provenance": tags,
    }
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return lines


@dataclass(frozen=True)
class Layer:
    """A layer of the backbone whose features are written down.

    Attributes:
        name: Of the layer.
        channels: D.
        reduction: Pixels per place.
        cells: Places of a tile along each axis.
        features: Tiles → (B, D, cells, cells).
    """

    name: str
    channels: int
    reduction: int
    cells: int
    features: Model

    def tiles(self, scene: Scene, overlap: float) -> tuple[Axis, Axis]:
        """Tiles along a scene's rows and columns, in places."""
        rows, columns = (
            lay_tiles(-(-length // self.reduction), self.cells, overlap) for length in (scene.height, scene.width)
        )
        return rows, columns

    def reader(self, head: SavedHead, scene: Scene, columns: Axis) -> RowsReader:
        """Of the rows of one row of tiles."""
        return RowsReader(head, scene, self.cells * self.reduction, columns.length * self.reduction)


def open_layer(head: SavedHead, name: str | None) -> Layer:
    """The layer asked for; None: the deepest that the head reads.

    Raises:
        UserError: There is none of that name, or it lies on no grid of the tiles.
    """
    described = head.description
    name = name or described.layers[0]
    extractor = dense_features(head.backbone, [name], side=described.chip_size, enlarge=described.enlarge)
    channels, reduction = extractor.channels[0], extractor.reduction[0]
    cells = max(described.chip_size // reduction, 1)

    def features(tiles: Tensor) -> Tensor:
        found = extractor.as_list(tiles)[0]
        if found.shape[-2:] != (cells, cells):
            raise UserError(
                f"--layer {name} gives {found.shape[-2]}×{found.shape[-1]} places for tiles of {cells * reduction} "
                f"pixels, no grid of 1/{reduction}: name another (ssl_geo.probe --layers list prints them)"
            )
        return found

    return Layer(name, channels, reduction, cells, features)


@torch.inference_mode()
def fit_basis(
    config: PredictConfig, head: SavedHead, scenes: Sequence[Scene], layer: Layer, device: torch.device
) -> PrincipalComponents:
    """Principal components of a layer's features over all scenes, from about `SAMPLED_TILES` tiles of them together.

    Raises:
        EmptySceneError: There is no valid pixel in them.
        UserError: The layer has fewer channels than components are asked for.
    """
    sampled = scenes[:: -(-len(scenes) // SAMPLED_TILES)]

    def samples() -> Iterator[npt.NDArray[np.float32]]:
        for scene in progress(sampled, len(sampled), "fitting the basis"):
            rows, columns = layer.tiles(scene, config.overlap)
            read, share = layer.reader(head, scene, columns), SAMPLED_TILES // len(sampled)
            try:
                yield from sampled_features(
                    read, layer.features, rows, columns, layer.reduction, config.batch_size, device, share
                )
            except NotFiniteError as error:
                raise UserError(f"{scene.path}: {error}") from error
            except UnreadableError:
                if len(scenes) == 1:
                    raise
                continue  # counted and reported where it is to be written

    try:
        return principal_components(samples(), config.components or 3)
    except EmptySceneError as error:
        raise EmptySceneError(f"{scenes[0].path}{' and the others' * (len(scenes) > 1)}: {error}") from error


def embed_places(
    config: PredictConfig,
    head: SavedHead,
    scene: Scene,
    path: Path,
    made_from: str,
    device: torch.device,
    layer: Layer,
    components: PrincipalComponents | None,
) -> list[str]:
    """Write features of one layer, or their principal components, on the layer's grid."""
    rows, columns = layer.tiles(scene, config.overlap)
    reduction, height, width = layer.reduction, -(-scene.height // layer.reduction), -(-scene.width // layer.reduction)
    read = layer.reader(head, scene, columns)
    tags = {**tags_of(head, scene, made_from), "layer": layer.name}
    if components is None:
        kept, noun = min(config.components or layer.channels, layer.channels), "feature"
    else:
        kept, noun = len(components.axes), "principal component"
        for end in ("low", "high"):
            tags[f"display_{end}"] = " ".join(f"{value:.6g}" for value in getattr(components, end).tolist())

    def model(tiles: Tensor) -> Tensor:
        features = layer.features(tiles)
        return features[:, :kept] if components is None else components.project(features)

    empty = True
    told = [f"{noun} {number + 1}" for number in range(kept)]
    with value_map(
        path, scene, np.float32, nodata=math.nan, descriptions=told, tags=tags, reduction=reduction
    ) as write:
        strips = blended(
            read, model, rows, columns, kept, reduction=reduction, batch_size=config.batch_size, device=device
        )
        for top, values, valid in progress(strips, len(rows.starts), scene_name(Path(scene.path))):
            count = min(values.shape[1], height - top)
            inside = any_within(valid, reduction)[:count, :width]
            empty = empty and not inside.any()
            write(top, np.where(inside, values[:, :count, :width].cpu().numpy(), np.float32(np.nan)))
        if empty and components is not None:
            raise EmptySceneError("no pixel is valid (--data.nodata)")
    return read.report()


def embed_chips(
    config: PredictConfig, head: SavedHead, scene: Scene, path: Path, made_from: str, device: torch.device
) -> list[str]:
    """Write one embedding a chip: a regular grid without overlap, its last row and column moved inwards."""
    size = head.description.chip_size
    rows, columns = (lay_tiles(length, size, 0.0) for length in (scene.height, scene.width))
    read = RowsReader(head, scene, size, columns.length)
    places: list[tuple[int, int, float]] = []
    embeddings: list[npt.NDArray[np.float32]] = []
    for top in progress(rows.starts, len(rows.starts), scene_name(Path(scene.path))):
        image, valid = read(top)
        chips = [left for left in columns.starts if valid[:, left : left + size].any()]
        places += [(top, left, float(valid[:, left : left + size].mean())) for left in chips]
        for first in range(0, len(chips), config.batch_size):
            tiles = np.stack([image[:, :, left : left + size] for left in chips[first : first + config.batch_size]])
            with torch.inference_mode():
                embeddings.append(head.backbone(torch.from_numpy(tiles).to(device)).cpu().numpy())
            if not np.isfinite(embeddings[-1]).all():
                raise NotFiniteError(f", first in rows {top} to {top + size}")
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
        tags_of(head, scene, made_from),
    )
    left_out = len(rows.starts) * len(columns.starts) - len(places)
    said = f"  {len(places)} chips of {size}×{size} pixels; left out {left_out} without a valid pixel"
    return [said, *read.report()]
