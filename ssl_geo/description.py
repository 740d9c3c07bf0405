"""What stands beside a backbone's weights (backbone.json, a checkpoint's `backbone_description`), and its schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from ssl_geo.errors import UserError
from ssl_geo.schema import conform

OURS = ("num_classes", "in_chans")
"""Arguments of timm.create_model that the bands decide."""
_ELSEWHERE = ("pretrained", "checkpoint", "cache_dir", "features_only", "hf_")  # beginnings: ways to other files
_LARGEST = 1 << 14  # pixels, channels, heads of a timm model's arguments: 8 times those of the largest
_DEEPEST = 256  # layers of a stage
_DEPTHS = ("depth", "depths", "layers", "num_layers", "num_blocks")


class _Required(TypedDict):
    architecture: str
    model_args: dict[str, Any]


class Description(_Required, total=False):
    """What using a backbone takes, and where it comes from; more may stand beside."""

    num_features: int
    bands: list[str]
    mean: list[float]
    std: list[float]
    scale: float | None
    offset: float | None
    chip_size: int
    gsd: float | None
    method: str
    seed: int
    step: int
    weights: str


def check_description(content: Any, where: str) -> dict[str, Any]:
    """Hold a description against its schema.

    Args:
        content: What the file holds.
        where: The file, for the message.

    Raises:
        UserError: Something is missing, of another type or size, or would reach for other files.
    """
    found: dict[str, Any] = conform(content, Description, where)
    check_model_args(found["model_args"], f"{where}: model_args")
    bands = found.get("bands", [])
    for name in ("mean", "std"):
        if name in found and len(found[name]) != len(bands):
            raise UserError(f"{where}: {name} has {len(found[name])} values for {len(bands)} bands")
    if len(set(bands)) < len(bands):
        raise UserError(f"{where}: bands {' '.join(bands)} name one twice")
    if not all(value > 0 for value in found.get("std", [])):
        raise UserError(f"{where}: std holds {min(found['std']):g}; each must be greater than 0")
    for name in ("scale", "gsd", "chip_size", "num_features"):
        if (value := found.get(name)) is not None and value <= 0:
            raise UserError(f"{where}: {name} is {value:g}; it must be greater than 0")
    if not 0 <= found.get("seed", 0) < 2**32:
        raise UserError(f"{where}: seed is {found['seed']}; it must lie between 0 and 2**32 - 1")
    return found


def check_model_args(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of `timm.create_model` that lead to other files, or to a network that no memory holds.

    Raises:
        UserError: Naming the argument.
    """
    for name, value in conform(arguments, dict[str, Any], where).items():
        if name.startswith(_ELSEWHERE):
            raise UserError(f"{where}: {name} is not to be set; --backbone.weights names weights to start from")
        most = _DEEPEST if name in _DEPTHS else _LARGEST
        for number in _numbers(value):
            if not abs(number) <= most:
                raise UserError(f"{where}: {name} is {number}; it must be at most {most}")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a plain value, however nested."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
