"""A probe's best head in a folder that needs nothing else: the head, what using it takes, and its backbone.

FOLDER/backbone.safetensors, backbone.json   as `ssl_geo.backbones.export_backbone` leaves them
FOLDER/head.safetensors                      weights of the segmentation head
FOLDER/head.json                             all else, in format 1; written last, so a folder that has it is complete
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_geo.backbones import export_backbone, load_backbone
from ssl_geo.documents import read_json
from ssl_geo.errors import UserError
from ssl_geo.files import written_whole
from ssl_geo.probing.enlarging import dense_features
from ssl_geo.probing.features import Extractor
from ssl_geo.probing.heads import HEADS, build_head
from ssl_geo.probing.pixels import PIXELS, BesidePixels, LinearOnLayers
from ssl_geo.schema import conform
from ssl_geo.weights import read_tensors

FORMAT = 1
HEAD, DESCRIPTION = "head.safetensors", "head.json"
LINEAR_PROBE = "linear probe"  # the head that no step of training made; see `fit_linear_on_layers`

Colour = tuple[int, int, int]
_LARGEST_CHIP = 8192  # pixels along each axis; a tile of more fits no memory


class _ClassJson(TypedDict):
    id: int
    name: str
    colour: Colour


class _RequiredJson(TypedDict):
    format: int
    name: str
    kind: str
    layers: list[str]
    channels: list[int]
    reduction: list[int]
    chip_size: int
    bands: list[str]
    mean: list[float]
    std: list[float]
    checkpoint: str
    classes: list[_ClassJson]
    confusion: object  # as an array: it may hold millions of counts
    provenance: dict[str, Any]


class _HeadJson(_RequiredJson, total=False):
    enlarge: int


@dataclass(frozen=True)
class HeadDescription:
    """What using a head takes, and where it comes from.

    Attributes:
        name: For people, for example ``linear @ layer1, seed 0``.
        kind: One of `HEADS`, or ``linear probe``.
        layers: Layers of the backbone that it reads, coarse to fine.
        channels: D of each.
        reduction: Pixels per place of each.
        chip_size: Side in pixels of the chips that it was trained on, and of the tiles that it is to be shown.
        bands: Canonical names, in the order of the channels.
        mean: Reflectance of each band that standardizing subtracts.
        std: Reflectance of each band that standardizing divides by.
        class_ids: (C,) what the label rasters held.
        class_names: (C,).
        class_colours: (C,) red, green, blue.
        checkpoint: What the probe was given.
        confusion: (n, C, C) of the test split, one matrix a spatial block; rows = label, columns = prediction.
        enlarge: How many times as high and wide the backbone is shown its images.
        provenance: Whatever else tells where it comes from: version, validation score, units of the images.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    channels: tuple[int, ...]
    reduction: tuple[int, ...]
    chip_size: int
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    class_colours: tuple[Colour, ...]
    checkpoint: str
    confusion: npt.NDArray[np.int64]
    enlarge: int = 1
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As head.json holds it."""
        names = "name kind layers channels reduction chip_size enlarge bands mean std checkpoint"
        classes = zip(self.class_ids, self.class_names, self.class_colours, strict=True)
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in names.split()},
            "classes": [{"id": id, "name": name, "colour": colour} for id, name, colour in classes],
            "confusion": self.confusion.tolist(),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, content: Any) -> HeadDescription:
        """Read what head.json holds.

        Raises:
            ValueError: Something is missing, of another type, or does not fit the rest.
        """
        told = conform(content, _HeadJson, DESCRIPTION)
        confusion = _counts(told["confusion"])
        classes = told["classes"]
        found = cls(
            name=told["name"],
            kind=told["kind"],
            layers=tuple(told["layers"]),
            channels=tuple(told["channels"]),
            reduction=tuple(told["reduction"]),
            chip_size=told["chip_size"],
            enlarge=told.get("enlarge", 1),  # heads of earlier versions
            bands=tuple(told["bands"]),
            mean=tuple(told["mean"]),
            std=tuple(told["std"]),
            class_ids=tuple(item["id"] for item in classes),
            class_names=tuple(item["name"] for item in classes),
            class_colours=tuple(item["colour"] for item in classes),
            checkpoint=told["checkpoint"],
            confusion=confusion,
            provenance=told["provenance"],
        )
        if found.kind != LINEAR_PROBE and found.kind not in HEADS:
            raise ValueError(f"unknown kind {found.kind}")
        if not len(found.layers) == len(found.channels) == len(found.reduction) or not found.layers:
            raise ValueError("layers, channels and reduction differ in number")
        if not len(found.bands) == len(found.mean) == len(found.std) or not found.bands:
            raise ValueError("bands, mean and std differ in number")
        if not all(value > 0 for value in found.std):
            raise ValueError("std must be greater than 0")
        if not 1 <= found.chip_size <= _LARGEST_CHIP or not 1 <= found.enlarge <= _LARGEST_CHIP // found.chip_size:
            raise ValueError(f"chip_size times enlarge must be 1 to {_LARGEST_CHIP} pixels")
        count = len(classes)
        if not 1 <= count <= 255 or len(set(found.class_ids)) < count:
            raise ValueError(f"{count} classes, 1 to 255 with different ids expected")
        if any(not 0 <= part <= 255 for colour in found.class_colours for part in colour):
            raise ValueError("a colour is not of numbers from 0 to 255")
        if confusion.dtype.kind not in "iu" or confusion.ndim != 3 or confusion.shape[1:] != (count, count):
            raise ValueError(f"confusion is {confusion.shape}, (blocks, {count}, {count}) expected")
        if (confusion < 0).any():
            raise ValueError("confusion holds a negative count")
        if min(*found.channels, *found.reduction) < 1:
            raise ValueError("channels and reduction must be 1 or more")
        return found


@dataclass(frozen=True)
class SavedHead:
    """A head on its backbone, ready to use, in eval mode.

    Attributes:
        description: What head.json holds.
        backbone: Standardized images (B, bands, H, W) → embedding (B, D).
        extractor: Features of the layers that the head reads.
        head: Logits from these.
    """

    description: HeadDescription
    backbone: nn.Module
    extractor: Extractor
    head: nn.Module

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C, H, W) of standardized images (B, bands, H, W)."""
        logits: Tensor = self.head(self.extractor.as_list(images), images.shape[-2], images.shape[-1])
        return logits.softmax(dim=1)


def save_head(
    folder: Path,
    head: nn.Module,
    description: HeadDescription,
    backbone: nn.Module,
    backbone_description: Mapping[str, Any],
) -> None:
    """Write a head with its backbone into a folder made here.

    Args:
        folder: Its parent must exist.
        head: The segmentation head.
        description: Of the head.
        backbone: That the head was trained on.
        backbone_description: As backbone.json is to hold it.

    Raises:
        UserError: The folder cannot be written.
    """
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in head.state_dict().items()
    }
    try:
        folder.mkdir(exist_ok=True)
        export_backbone(folder, backbone, backbone_description)
        with written_whole(folder / HEAD) as partial:
            save_file(tensors, partial)
        with written_whole(folder / DESCRIPTION) as partial:
            partial.write_text(json.dumps(description.to_json()) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written ({error}); make room, or name a folder that can be") from error


def read_description(folder: Path) -> HeadDescription:
    """Read head.json.

    Raises:
        UserError: Not there, torn, of another format or from elsewhere.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"--head {folder} holds no {DESCRIPTION}; name the best_head folder that ssl_geo.probe leaves")
    content = read_json(path, fix="run ssl_geo.probe again")
    told = content.get("format") if isinstance(content, dict) else None
    if told != FORMAT:
        raise UserError(f"{path} has format {told}, read is {FORMAT}: it is not a head of this version's ssl_geo.probe")
    try:
        return HeadDescription.from_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not as ssl_geo.probe writes it ({error}); run it again") from error


def load_head(folder: Path) -> SavedHead:
    """Read a head and its backbone. Nothing is unpickled.

    Raises:
        UserError: Something is not there, torn, from elsewhere, or does not fit the rest.
    """
    description = read_description(folder)
    backbone = load_backbone(folder).eval()
    layers = [layer for layer in description.layers if layer != PIXELS]
    extractor: Extractor = dense_features(backbone, layers, side=description.chip_size, enlarge=description.enlarge)
    if len(layers) < len(description.layers):
        extractor = BesidePixels(extractor, description.mean, description.std, description.bands)
    found = (tuple(extractor.channels), tuple(extractor.reduction))
    if found != (description.channels, description.reduction):
        raise UserError(
            f"{folder}: layers {' '.join(description.layers)} of the backbone have {found[0]} channels at 1/{found[1]}"
            f", {DESCRIPTION} says {description.channels} at 1/{description.reduction}: the files are not of one probe"
        )
    head = _empty_head(description)
    tensors = read_tensors(folder / HEAD)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / HEAD} does not fit {DESCRIPTION} ({reason}): not of one probe") from error
    return SavedHead(description, backbone, extractor, head.eval())


def _counts(blocks: Any) -> npt.NDArray[Any]:
    """The array that nested lists of whole numbers make; one long text among many would take terabytes as an array."""
    try:
        kinds = {type(count) for block in blocks for row in block for count in row}
    except TypeError:
        kinds = {type(None)}
    if kinds - {int}:
        raise ValueError("confusion holds other than lists of lists of whole numbers")
    return np.asarray(blocks)


def _empty_head(description: HeadDescription) -> nn.Module:
    classes = len(description.class_ids)
    if description.kind == LINEAR_PROBE:
        weight = torch.zeros(classes, sum(description.channels))
        return LinearOnLayers(weight, torch.zeros(classes), description.channels)
    return build_head(description.kind, description.channels, classes, reduction=description.reduction)
