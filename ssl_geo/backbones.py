"""Backbones: any timm model for any bands and view sizes; exported so that plain timm loads it, and restored."""

from __future__ import annotations

import inspect
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ssl_geo.errors import UserError, nearest

RGB = {"B04": 0, "B03": 1, "B02": 2}  # which of an RGB network's input filters suits a Sentinel-2 band


def create_backbone(
    name: str,
    channels: int,
    view_sizes: Sequence[tuple[int, int]],
    *,
    weights: str | Path | None = None,
    bands: Sequence[str] = (),
    **arguments: Any,
) -> nn.Module:
    """Make a timm model that embeds views of several sizes: (B, channels, h, w) → (B, num_features).

    Vision transformers get position embeddings of the largest view's size, interpolated for smaller ones
    (`dynamic_img_size`); Swin accepts sizes other than its own (`strict_img_size` off).

    Args:
        name: In timm.
        channels: Number of bands.
        view_sizes: (h, w) of all views; each is tried once.
        weights: File to start from (.safetensors, .pth, .pt of tensors), of the same model in timm.
        bands: Their names, for spreading the weights of an RGB input layer (`spread_rgb`).
        **arguments: Of the timm model; they go first.

    Returns:
        The model; its attribute `timm` holds {"architecture", "model_args"}, all that `timm.create_model` needs.

    Raises:
        UserError: Unknown name or argument, a view size that the model cannot take, weights that do not fit.
    """
    model_args: dict[str, Any] = {
        "num_classes": 0,
        "in_chans": channels,
        **_size_arguments(name, view_sizes, arguments),
    }
    model: Any = _create(name, {**model_args, **arguments})
    model.timm = {"architecture": name, "model_args": {**model_args, **arguments}}
    _try_views(model, name, channels, view_sizes)
    if weights is not None:
        _start_from(model, Path(weights), bands)
    backbone: nn.Module = model
    return backbone


def required_multiple(name: str, **arguments: Any) -> int:
    """Number of pixels that heights and widths of views must be a multiple of: a transformer's patch size, else 1."""
    with torch.device("meta"):
        patches: Any = getattr(_create(name, {"num_classes": 0, **arguments}), "patch_embed", None)
    size: Any = getattr(patches, "patch_size", 1)
    return int(size if isinstance(size, int) else max(size))


def _create(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        raise UserError(f"--backbone.name {name} is not a timm model; {nearest(name, timm.list_models())}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"--backbone.arguments do not fit {name}: {error}") from error
    return model


def _size_arguments(name: str, view_sizes: Sequence[tuple[int, int]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    with torch.device("meta"):
        known = inspect.signature(type(_create(name, {"num_classes": 0, **arguments})).__init__).parameters
    largest = list(max(view_sizes, key=lambda size: size[0] * size[1]))
    if "dynamic_img_size" in known:
        return {"img_size": largest, "dynamic_img_size": True}
    if "strict_img_size" in known:
        return {"img_size": largest, "strict_img_size": False}
    return {"img_size": largest} if "img_size" in known else {}


@torch.no_grad()
def _try_views(model: nn.Module, name: str, channels: int, view_sizes: Sequence[tuple[int, int]]) -> None:
    patches: Any = getattr(model, "patch_embed", None)
    size: Any = getattr(patches, "patch_size", 1)
    patch_height, patch_width = (size, size) if isinstance(size, int) else size
    training = model.training
    model.eval()
    for height, width in dict.fromkeys(view_sizes):
        if height % patch_height or width % patch_width:
            below = height // patch_height * patch_height or patch_height
            raise UserError(
                f"{name} takes views in multiples of its {patch_height}-pixel patch, not {height}×{width}; set "
                f"--views.global_size or --views.local_size to {below} or {below + patch_height}"
            )
        try:
            model(torch.zeros(1, channels, height, width))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{name} cannot take views of {height}×{width} pixels ({reason}); change --views.global_size or "
                "--views.local_size, or take another --backbone.name"
            ) from error
    model.train(training)


def spread_rgb(weight: Tensor, bands: Sequence[str]) -> Tensor:
    """Spread the filters of an RGB input layer over named bands.

    B04, B03 and B02 get the filters of red, green and blue, every other band their mean; all are scaled by 3 / C, so
    that a gray image has the response it had (as in timm's adapt_input_conv).

    Args:
        weight: (O, 3, k, k), in the order red, green, blue.
        bands: C names.

    Returns:
        (O, C, k, k).
    """
    mean = weight.mean(dim=1)
    filters = [weight[:, RGB[band]] if band in RGB else mean for band in bands]
    return torch.stack(filters, dim=1) * (3 / len(bands))


def _start_from(model: nn.Module, path: Path, bands: Sequence[str]) -> None:
    given = read_tensors(path)
    config: Any = getattr(model, "pretrained_cfg", {})
    first = config.get("first_conv")
    for layer in [first] if isinstance(first, str) else list(first or ()):
        key = f"{layer}.weight"
        wanted = model.get_parameter(key).shape[1]
        if key in given and given[key].shape[1] == 3 and wanted != 3:
            given[key] = spread_rgb(given[key], bands)
    own = model.state_dict()
    if "pos_embed" in given and "pos_embed" in own and given["pos_embed"].shape != own["pos_embed"].shape:
        patches: Any = model.patch_embed
        prefix: Any = model.num_prefix_tokens
        given["pos_embed"] = resample_abs_pos_embed(given["pos_embed"], patches.grid_size, num_prefix_tokens=prefix)
    classifier = config.get("classifier")
    heads = tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier or ()))
    given = {key: value for key, value in given.items() if not key.startswith(heads or "\0")}
    for key, value in own.items():
        if key not in given or given[key].shape != value.shape:
            found = list(given[key].shape) if key in given else "nothing"
            raise UserError(f"--backbone.weights {path} does not fit: {key} is {found}, wanted {list(value.shape)}")
    model.load_state_dict({key: given[key] for key in own})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from .safetensors or from torch's own file of tensors; nothing is unpickled.

    Raises:
        UserError: No such file, or it is torn, or holds other than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .safetensors file, a checkpoint or a run folder")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    content = _read_torch(path)
    for key in ("state_dict", "model", "backbone"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _read_torch(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a readable file of tensors (not torch's zip container, or torn)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path} holds other than tensors and plain values, or is torn ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where named tensors were expected")
    return content


def describe_backbone(backbone: nn.Module, **facts: Any) -> dict[str, Any]:
    """What using the backbone needs, as plain values: timm name and arguments, and the facts given."""
    recipe: Any = backbone.timm
    return {**recipe, "num_features": backbone.num_features, **facts}


def export_backbone(folder: Path, backbone: nn.Module, description: Mapping[str, Any]) -> None:
    """Write backbone.safetensors and backbone.json, which plain timm loads, each whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    partial = folder / ".backbone.safetensors"
    partial.write_bytes(safetensors.torch.save(tensors))
    partial.replace(folder / "backbone.safetensors")
    partial = folder / ".backbone.json"
    partial.write_text(json.dumps(description, indent=2) + "\n")
    partial.replace(folder / "backbone.json")


def load_backbone(path: str | Path) -> nn.Module:
    """Restore a backbone, in eval mode.

    Args:
        path: A run folder, a checkpoint file of a run, or a folder with backbone.safetensors and backbone.json.

    Returns:
        A timm model; its attribute `description` says what using it needs: bands in order, mean and std in
        reflectance, scale, offset, chip size, ground sampling distance.

    Raises:
        UserError: Nothing there, torn, or from elsewhere.
    """
    path = Path(path)
    if path.is_dir():
        described = path / "backbone.json"
        if not described.is_file():
            raise UserError(
                f"{path} holds no backbone.json; name a run folder of ssl_geo.pretrain or a checkpoint of it"
            )
        try:
            description = json.loads(described.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{described} is not readable JSON ({error})") from error
        tensors = read_tensors(path / "backbone.safetensors")
    elif path.suffix == ".safetensors":
        return load_backbone(path.parent)
    else:
        if not path.is_file():
            raise UserError(f"{path} does not exist; name a run folder or a checkpoint file")
        content = _read_torch(path)
        if "backbone_description" not in content or "backbone" not in content:
            raise UserError(f"{path} is not a checkpoint of ssl_geo.pretrain (no 'backbone_description')")
        description, tensors = content["backbone_description"], content["backbone"]
    model: Any = _create(description["architecture"], description["model_args"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path}: weights and description do not fit each other ({str(error).splitlines()[1]})"
        ) from error
    model.timm = {key: description[key] for key in ("architecture", "model_args")}
    model.description = description
    backbone: nn.Module = model.eval()
    return backbone
