"""Which layers of a model can be named, and finding the ones asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ssl_geo.errors import UserError, nearest

Way = Literal["info", "module", "node"]

COARSEST = 16  # pixels of the image a place; what is coarser does not tell where (docs/learning.md)


@dataclass(frozen=True)
class Layer:
    """A layer that can be named, with what timm tells about it (None where it tells nothing).

    Attributes:
        name: Dotted module name.
        index: Position in timm's `feature_info`.
        channels: D of its features.
        reduction: Pixels of the input per place of its features.
    """

    name: str
    index: int | None = None
    channels: int | None = None
    reduction: int | None = None

    def __str__(self) -> str:
        if self.index is None:
            return self.name
        return f"{self.name}  (index {self.index}, {self.channels} channels, 1/{self.reduction})"


def list_layers(model: nn.Module) -> list[Layer]:
    """Every layer of a model that can be named without tracing it: timm's own first, then all other modules."""
    own = [
        Layer(info["module"], index, info.get("num_chs"), info.get("reduction"))
        for index, info in enumerate(feature_info(model))
    ]
    listed = {layer.name for layer in own}
    return own + [Layer(name) for name, _ in model.named_modules() if name and name not in listed]


def auto_layers(model: nn.Module, count: int = 4, enlarge: int = 1) -> list[str]:
    """Layers to probe where the user names none, coarse to fine.

    Args:
        model: A timm model.
        count: How many of the image as it is.
        enlarge: How many times as high and wide the model is shown its images, which makes its places as much smaller.

    Returns:
        The last `count` stages of a pyramid, without those coarser than `COARSEST` where there are enough others; and
        such as are no longer coarser once the image is enlarged. Of a plain transformer `count` blocks, evenly spaced,
        the last among them (2, 5, 8, 11 of twelve, as DPT takes them, arXiv 2103.13413).

    Raises:
        UserError: The model has no `feature_info`.
    """
    layers = [layer for layer in list_layers(model) if layer.index is not None]
    if not layers:
        raise UserError(f"{type(model).__name__} does not list its stages: name layers with --layers")
    count = min(count, len(layers))
    if len({layer.reduction for layer in layers}) == 1:
        return [layers[(k + 1) * len(layers) // count - 1].name for k in reversed(range(count))]
    fine = [layer for layer in layers if layer.reduction is not None and layer.reduction <= COARSEST]
    if len(fine) < count:
        return [layer.name for layer in reversed(layers[-count:])]
    narrow = [layer for layer in layers if layer.reduction is not None and layer.reduction <= COARSEST * enlarge]
    return [layer.name for layer in reversed(narrow[narrow.index(fine[-count]) :])]


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """What timm tells about a model's stages: module, num_chs, reduction; empty for other models."""
    info: Any = getattr(model, "feature_info", None) or []
    return list(getattr(info, "info", info))


def find_layers(
    model: nn.Module, wanted: Sequence[int | str], ways: Sequence[Way], nodes: Callable[[], Sequence[str]]
) -> tuple[Way, list[str]]:
    """Find the first way of naming that knows all layers asked for.

    Args:
        model: The model.
        wanted: Indices of timm's `feature_info` or names.
        ways: The ways to try, in this order.
        nodes: Gives the names of the model's graph nodes; called last, as it traces the model.

    Returns:
        The way and the layers' own names in the model.

    Raises:
        UserError: No way knows them all.
    """
    own = [str(info["module"]) for info in feature_info(model)]
    modules = [name for name, _ in model.named_modules()]
    names = [_name_of(layer, own, modules) for layer in wanted]
    known: dict[str, str] = {}
    for way in ways:
        table = _known_names(way, own, modules, nodes)
        if all(name in table for name in names):
            return way, [table[name] for name in names]
        known |= table
    missing = next((name for name in names if name not in known), names[0])
    close = difflib.get_close_matches(missing, known, n=3, cutoff=0.5)
    top = [name for name in known if name and "." not in name]
    raise UserError(
        f"layer {missing!r} is not among the {' and '.join(f'{way} names' for way in ways)} of "
        f"{type(model).__name__}; {nearest(missing, close or own or top)} (--layers list prints all)"
    )


def _name_of(layer: int | str, own: Sequence[str], modules: Sequence[str]) -> str:
    """A layer's name, given a name or timm's index (in letters too, where no module is so called)."""
    if isinstance(layer, str) and (layer in modules or not layer.removeprefix("-").isdigit()):
        return layer
    if not -len(own) <= int(layer) < len(own):
        raise UserError(f"layer index {layer} is not among the model's {len(own)} stages (--layers list prints them)")
    return own[int(layer)]


def _known_names(
    way: Way, own: Sequence[str], modules: Sequence[str], nodes: Callable[[], Sequence[str]]
) -> dict[str, str]:
    """Names that a way understands, and what each stands for."""
    if way == "info":
        return {name: name for name in own if name in modules}
    if way == "module":
        # A wrapper keeps its network under `backbone`: both sides may leave the prefix out or put it in.
        with_prefix = {f"backbone.{name}": name for name in modules}
        without_prefix = {name.removeprefix("backbone."): name for name in modules}
        return with_prefix | without_prefix | {name: name for name in modules}
    # A truncated name is the last node below it, as torchvision has it.
    return {
        ".".join(parts[: k + 1]): ".".join(parts[: k + 1])
        for parts in (node.split(".") for node in nodes())
        for k in range(len(parts))
    }
