"""Where a network's output lies over its input: channel axis and token grid, from what the network declares.

Nothing here guesses from a square root while a model says better: timm models tell their prefix tokens
(`num_prefix_tokens`) and their grid (`patch_embed.dynamic_feat_size`), others a patch size; and no axis of
channels is ever read as one of places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ssl_geo.errors import UserError

# Class and register tokens that a model may put before its patches without declaring their number.
MAX_UNDECLARED_PREFIX = 16
# Square inputs to try, in this order, on a model that declares no size of its own.
UNDECLARED_SIDES = (224, 256, 128, 120, 64, 96, 32, 512)
# Stages of a hierarchical transformer that halve the grid of the first.
MAX_HALVINGS = 5


def first_tensor(output: Any, layer: str) -> Tensor:
    """The tensor in a layer's output: itself, or the first of a tuple, list or mapping (as timm's hooks take it).

    Raises:
        UserError: The output holds no tensor there; the layer is named.
    """
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    if not isinstance(output, Tensor):
        raise UserError(
            f"layer {layer!r} puts out {type(output).__name__}, where a tensor is needed, or a tuple, list or mapping "
            "with one in front: name another with --layers"
        )
    return output


def _ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at a dotted path (of a graph node: as far as it names modules), then its parents up to the model."""
    chain, module = [model], model
    for part in path.split(".") if path else []:
        child = module._modules.get(part)
        if child is None:
            break
        chain.append(child)
        module = child
    yield from reversed(chain)


def declared(model: nn.Module, path: str, attribute: str) -> Any:
    """What the nearest module on the way from a layer up to the model declares, None where none does."""
    for module in _ancestors(model, path):
        for owner in (module, getattr(module, "config", None)):
            value = getattr(owner, attribute, None)
            if value is not None:
                return value
    return None


def pair(value: Any) -> tuple[int, int]:
    """One number for both sides, or (height, width)."""
    height, width = (value, value) if isinstance(value, int) else tuple(value)
    return int(height), int(width)


def channel_axis(
    shape: tuple[int, ...], size: tuple[int, int], output_format: Any = None, channels: int | None = None
) -> int | None:
    """The axis of a layer's four-dimensional output that holds its channels: 1 or 3.

    Args:
        shape: Shape of the output.
        size: Height and width of the input that gave it.
        output_format: The format the model declares (timm's `output_fmt`), None where it declares none.
        channels: The channels the model declares for this layer, None where it declares none.

    Returns:
        The declared axis where the other two then cover the input (an inner layer may depart from its model's
        format), else the axis for which they do; PyTorch's own, 1, comes before 3 where nothing is declared.
        None where neither does: no map of the input.
    """
    cover = {1: _covers((shape[2], shape[3]), size), 3: _covers((shape[1], shape[2]), size)}
    order = [3, 1] if str(getattr(output_format, "value", output_format)) == "NHWC" else [1, 3]
    if channels is not None and (shape[1] == channels) != (shape[3] == channels):
        order = [1, 3] if shape[1] == channels else [3, 1]
    axis = max(order, key=lambda axis: cover[axis])  # the first of equals
    return axis if cover[axis] else None


def _covers(grid: tuple[int, int], size: tuple[int, int]) -> int:
    """How well a grid lies over an input: 2 if one whole reduction gives it, rounded up or down on either side.

    1 if it has the input's proportions up to the two places that unpadded convolutions may cost, else 0.
    """
    guess = max(round(size[0] / max(grid[0], 1)), 1)
    for r in (guess, guess - 1, guess + 1):
        if r > 0 and all(n in (side // r, math.ceil(side / r)) for n, side in zip(grid, size, strict=True)):
            return 2
    return int(abs(grid[0] * size[1] / size[0] - grid[1]) <= 2)


def token_grid(
    tokens: int,
    size: tuple[int, int],
    *,
    model: nn.Module,
    path: str = "",
    patch_size: int | tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> tuple[int, int, int]:
    """Lay the tokens of a layer over its input.

    Args:
        tokens: Number of tokens.
        size: Height and width of the input, pixels.
        model: The model that owns the layer.
        path: The layer's dotted name.
        patch_size: Pixels a token stands for, in place of what the model declares.
        prefix_tokens: Class and register tokens before the patches, in place of what the model declares.

    Returns:
        Tokens before the patches, and rows and columns of the grid. Where the model declares its grid or a patch
        size, nothing else counts; where it declares none, a grid in the proportions of the input, and only then
        a square.

    Raises:
        UserError: The tokens fit no grid.
    """
    if prefix_tokens is None:
        prefix_tokens = declared(model, path, "num_prefix_tokens")
    grids = _declared_grids(model, path, size, patch_size)
    for rows, columns in grids:
        # Before the class token joins (a patch embedding) a layer has patches alone.
        if tokens - rows * columns in (prefix_tokens or 0, 0):
            return tokens - rows * columns, rows, columns
    if grids and prefix_tokens is None and 0 < tokens - math.prod(grids[0]) <= MAX_UNDECLARED_PREFIX:
        return tokens - math.prod(grids[0]), *grids[0]
    if not grids:
        common = math.gcd(*size)
        proportions = (size[0] // common, size[1] // common)
        for height, width in (proportions, (1, 1)):
            for prefix in (0, 1) if prefix_tokens is None else (prefix_tokens, 0):
                scale = math.isqrt(max(tokens - prefix, 0) // (height * width))
                if scale and height * width * scale**2 == tokens - prefix:
                    return prefix, height * scale, width * scale
    expected = f"a grid of {' or '.join(f'{r}x{c}' for r, c in grids[:1])}" if grids else "no patch size declared"
    raise UserError(
        f"cannot lay the {tokens} tokens of layer {path or 'output'!r} over an input of {size[0]}x{size[1]} pixels "
        f"({expected}, {prefix_tokens if prefix_tokens is not None else 'undeclared'} prefix tokens): "
        "tell patch_size= and prefix_tokens=, or name another layer with --layers"
    )


def _declared_grids(
    model: nn.Module, path: str, size: tuple[int, int], patch_size: int | tuple[int, int] | None
) -> list[tuple[int, int]]:
    """The grids that a patch size or the model's own account allows, the finest first."""
    embed = declared(model, path, "patch_embed")
    if patch_size is None and hasattr(embed, "dynamic_feat_size"):
        first = pair(embed.dynamic_feat_size(size))
    else:
        # An overlapping embedding (PVT) steps by less than its patch: the stride of its convolution counts.
        stride = getattr(getattr(embed, "proj", None), "stride", None)
        patch = patch_size or stride or getattr(embed, "patch_size", None) or declared(model, path, "patch_size")
        if patch is None:
            return []
        first = (size[0] // pair(patch)[0], size[1] // pair(patch)[1])
    return [(math.ceil(first[0] / 2**k), math.ceil(first[1] / 2**k)) for k in range(MAX_HALVINGS + 1)]


def input_channels(model: nn.Module) -> int:
    """Channels a model takes: as it declares, else as its first convolution or linear layer has them, else 3."""
    for attribute in ("num_channels", "in_chans", "in_channels"):
        if isinstance(getattr(model, attribute, None), int):
            return int(getattr(model, attribute))
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return convolution.in_channels if convolution is not None else 3


def input_sizes(model: nn.Module, given: int | tuple[int, int] | None) -> list[tuple[int, int]]:
    """Input sizes to try: the one given, else those that the model or its parts declare, else common ones."""
    if given is not None:
        return [pair(given)]
    sizes: list[tuple[int, int]] = []
    for module in model.modules():
        embed, config = getattr(module, "patch_embed", None), getattr(module, "config", None)
        for owner, attribute in (
            (embed, "img_size"),
            (module, "img_size"),
            (module, "image_size"),
            (config, "image_size"),
        ):
            size = getattr(owner, attribute, None)
            if isinstance(size, int) or (isinstance(size, tuple | list) and len(size) == 2):
                sizes.append(pair(size))
        timm_config = getattr(module, "pretrained_cfg", None)
        if isinstance(timm_config, Mapping) and timm_config.get("input_size"):
            sizes.append(pair(timm_config["input_size"][1:]))
    return list(dict.fromkeys([*sizes, *((side, side) for side in UNDECLARED_SIDES)]))
