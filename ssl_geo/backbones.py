"""Backbones: any timm model for any bands and view sizes; exported so that plain timm loads it, and restored.

A backbone made or restored here carries, as plain values, its attribute `timm` ({"architecture", "model_args"}: what
`timm.create_model` needs), and a restored one `description` (all that using it needs: bands in order, statistics ...).
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.xcit import ConvPatchEmbed
from torch import Tensor, nn

from ssl_geo.class_token import class_token_block
from ssl_geo.description import OURS, check_description, check_model_args
from ssl_geo.documents import read_json
from ssl_geo.errors import UserError, nearest
from ssl_geo.files import written_whole
from ssl_geo.schema import conform
from ssl_geo.weights import RGB, adapt_input_weights, named_tensors, read_tensors, read_torch

QUERIES = {"q", "qk", "qkv", "qkvs", "qkv_proj", "q_proj", "query", "to_query"}  # what attention asks with, in timm

Size = tuple[int, int]


def create_backbone(
    name: str,
    channels: int,
    view_sizes: Sequence[Size],
    /,
    *,
    weights: str | Path | None = None,
    bands: Sequence[str] = (),
    checkpointing: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Make a timm model that embeds views of several sizes: (B, channels, h, w) → (B, D).

    Vision transformers get position embeddings of the largest view's size, interpolated for the others; Swin takes any
    size, with windows no larger than the grid of the largest view, and pads smaller ones. Others are as they are.

    Args:
        name: In timm.
        channels: Number of bands.
        view_sizes: (h, w) of all views; each is tried once.
        weights: What to start from, of the same model, perhaps with another patch size or number of bands: a file of
            tensors (.safetensors, .pth, .pt) or a run, which tells its bands; where none are told, 3 channels are RGB.
        bands: Names of the bands, by which an input layer is adapted (`adapt_input_weights`).
        checkpointing: Compute the activations inside its blocks again in the backward pass instead of keeping them
            (Chen et al. 2016, arXiv 1604.06174): less memory, a third more time, the same gradients.
        **arguments: Of the timm model; they go first.

    Returns:
        The model, without classifier, in training mode.

    Raises:
        UserError: Unknown name or argument, a view size that the model cannot take, weights that do not fit.
    """
    for argument in OURS:
        if argument in arguments:
            raise UserError(f"--backbone.arguments: {argument} is not to be set; the bands say how many channels")
    check_model_args(arguments, "--backbone.arguments")
    model = _build(name, channels, view_sizes, arguments)
    for size in dict.fromkeys(view_sizes):
        _try_view(model, name, channels, size)
    if weights is not None:
        tensors, given_bands = _read_weights(Path(weights))
        model.load_state_dict(_fit(tensors, model, bands, given_bands, f"--backbone.weights {weights}"))
    if checkpointing:
        _checkpoint_activations(model, name)
    return model


def drop_unused_tokens(backbone: nn.Module) -> bool:
    """Let the last block of a vision transformer compute the class token alone, where that is the embedding.

    For training: embeddings and gradients stay as they are, features of patches are gone. Weights and names stay.

    Returns:
        Whether it is such a transformer; others are left alone.
    """
    model: Any = backbone
    if type(model) is not VisionTransformer or model.global_pool != "token" or model.attn_pool is not None:
        return False
    block = model.blocks[-1]
    if type(block) is not Block or type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
        return False
    block.forward = MethodType(class_token_block, block)
    return True


def _checkpoint_activations(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, TypeError) as error:
        raise UserError(
            f"--backbone.checkpointing: {name} cannot compute its activations again; leave it out, or save memory by "
            "--optim.accumulate or --dino.one_pass_per_view"
        ) from error


def outline(name: str, **arguments: Any) -> nn.Module:
    """The model without weights, which takes no memory: to ask what it is."""
    with torch.device("meta"):
        return _create("--backbone.name", name, {"num_classes": 0, **arguments})


def required_multiple(model: nn.Module) -> int:
    """Number of pixels that heights and widths of views must be multiples of: a transformer's patch size, else 1."""
    return math.lcm(*_patch(model))


def is_transformer(model: nn.Module) -> bool:
    """Whether the model attends, all of it or some of its stages."""
    return any(path.rpartition(".")[2] in QUERIES for path, _ in model.named_modules())


def _patch(model: nn.Module) -> Size:
    patches: Any = getattr(model, "patch_embed", None)  # other kinds have overlapping ones, of any number of pixels
    if not isinstance(patches, PatchEmbed | ConvPatchEmbed) or getattr(patches, "dynamic_img_pad", False):
        return 1, 1
    size: int | Size = patches.patch_size
    return (size, size) if isinstance(size, int) else size


def _build(name: str, channels: int, view_sizes: Sequence[Size], arguments: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):  # no memory, no time: only to see what the class takes
        sketch = _create("--backbone.name", name, arguments)
    known = inspect.signature(type(sketch).__init__).parameters
    size, memory = (
        sum(4 * p.numel() for p in sketch.parameters()),
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    if size > memory:
        raise UserError(
            f"--backbone.arguments make {name} {size >> 30} GB large, more than the memory of {memory >> 30}"
        )
    model_args: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if "img_size" in known and view_sizes:
        height, width = max(view_sizes, key=math.prod)
        model_args["img_size"] = height if height == width else [height, width]
    if "dynamic_img_size" in known:
        model_args["dynamic_img_size"] = True
    elif "strict_img_size" in known:  # Swin in older timm
        model_args["strict_img_size"] = False
    model_args |= arguments
    model: Any = _create("--backbone.name", name, model_args)
    model.timm = {"architecture": name, "model_args": model_args}
    backbone: nn.Module = model
    return backbone


def _create(origin: str, architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    """Make the model; `origin` is the setting or file that named it, for the error's sake."""
    if not timm.is_model(architecture):
        names = timm.list_models()
        longer = [name for name in names if name.startswith(architecture)][:3]
        close = longer or difflib.get_close_matches(architecture, names, n=3, cutoff=0.0)
        raise UserError(f"{origin} {architecture} is not a model of timm; nearest: {', '.join(close)}")
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=False, **model_args)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{origin} {architecture} with the arguments {dict(model_args)}: {_argument_hint(architecture, error)}"
        ) from error
    return model


def _argument_hint(name: str, error: Exception) -> str:
    """What timm says, and where it does not know an argument, the nearest that it knows."""
    reason = str(error).split("\n")[0]
    _, unknown, rest = reason.partition("unexpected keyword argument '")
    if not unknown:
        return reason or type(error).__name__
    with torch.device("meta"):
        known = inspect.signature(type(timm.create_model(name)).__init__).parameters
    argument = rest.rstrip("'")
    return f"--backbone.arguments has no {argument}; {nearest(argument, set(known) - {'self', 'kwargs', *OURS})}"


@torch.no_grad()
def _try_view(model: nn.Module, name: str, channels: int, size: Size) -> None:
    """Embed one empty view of a size, in eval mode."""
    for side, patch in zip(size, _patch(model), strict=True):
        if side % patch:
            below = side // patch * patch or patch
            raise UserError(
                f"views of {size[0]}×{size[1]} px: {name} takes multiples of its {patch}-pixel patch; set "
                f"--views.global_size or --views.local_size to {below} or {below + patch}"
            )
    mend = "change --views.global_size or --views.local_size, or take another --backbone.name"
    training = model.training
    model.eval()
    try:
        output = model(torch.zeros(1, channels, *size))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{name} cannot take views of {size[0]}×{size[1]} px ({reason}); {mend}") from error
    finally:
        model.train(training)
    output = output[0] if isinstance(output, tuple) else output
    if output.ndim != 2:
        raise UserError(
            f"{name} gives {tuple(output.shape)} for a view, not one vector; leave global_pool out of "
            "--backbone.arguments, or take another --backbone.name"
        )


def _fit(
    given: dict[str, Tensor], model: nn.Module, bands: Sequence[str], given_bands: Sequence[str] | None, origin: str
) -> dict[str, Tensor]:
    """Make a state of the model from tensors of one with other bands, patches or image size, or a classifier."""
    config: Any = getattr(model, "pretrained_cfg", {})
    heads = tuple(f"{layer}." for layer in _names(config.get("classifier")))
    given = {key: value for key, value in given.items() if not key.startswith(heads)}
    for key, value in given.items():
        if value.layout != torch.strided or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise UserError(f"{origin}: {key} claims {list(value.shape)}, more values than the file holds")
    own = model.state_dict()
    for key in (f"{layer}.weight" for layer in _names(config.get("first_conv"))):
        if key not in given or key not in own or given[key].ndim != own[key].ndim:
            continue
        found, wanted = given[key].shape[1], own[key].shape[1]
        source = given_bands or (RGB if found == len(RGB) else None)
        if source and bands and found == len(source):
            given[key] = adapt_input_weights(given[key], bands, source)
        elif found != wanted:
            raise UserError(f"{origin} has {found} channels of unknown bands, wanted are {wanted}: {' '.join(bands)}")
    # timm's own conversion for this kind of model: resamples patch and position embeddings to another size.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert:
        with warnings.catch_warnings():  # about timm's way to index when it resizes Swin's position tables; tested
            warnings.filterwarnings("ignore", message="torch.searchsorted|Using a non-tuple sequence")
            try:
                given = convert(given, model)
            except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{origin} is of another model, timm cannot convert it ({reason})") from error
    for key in [*own, *given]:
        theirs, ours = (list(state[key].shape) if key in state else "absent" for state in (given, own))
        if theirs != ours:
            architecture: Any = model.timm
            raise UserError(
                f"{origin} is not of a {architecture['architecture']} with these --backbone.arguments: "
                f"{key} is {theirs}, wanted {ours}"
            )
    return given


def _names(layers: str | Sequence[str] | None) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else tuple(layers or ())


def _read_weights(path: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Weights to start from, and their bands where an exported backbone or a checkpoint tells them."""
    if path.is_dir() or (path.name == "backbone.safetensors" and path.with_suffix(".json").is_file()):
        description, tensors = _read_exported(path)
        return tensors, description.get("bands")
    if path.suffix == ".safetensors":
        return read_tensors(path), None
    content = read_torch(path)
    told: Any = content.get("backbone_description", {})
    return named_tensors(content, path), told.get("bands") if isinstance(told, dict) else None


def untrained(backbone: nn.Module, seed: int) -> nn.Module:
    """Make the same architecture at random initialization, in eval mode.

    Args:
        backbone: Made or restored here.
        seed: Of the weights; that of a run gives the weights which the run started from.
    """
    recipe: Any = backbone.timm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = _create("--ckpt", recipe["architecture"], recipe["model_args"])
    model.timm = recipe
    fresh: nn.Module = model.eval()
    return fresh


def describe_backbone(backbone: nn.Module, **facts: Any) -> dict[str, Any]:
    """Say what using the backbone needs, as plain values.

    Args:
        backbone: Made or restored here.
        **facts: Bands in order, mean, std, scale, offset, chip_size, gsd ...

    Returns:
        `architecture` and `model_args` for timm, `num_features`, and the facts.
    """
    recipe: Any = backbone.timm
    return {**recipe, "num_features": backbone.num_features, **facts}


def export_backbone(folder: Path, backbone: nn.Module, description: Mapping[str, Any]) -> None:
    """Write backbone.safetensors and backbone.json, each whole or not at all.

    Plain timm loads them: ``timm.create_model(j["architecture"], **j["model_args"])`` and then ``load_state_dict`` of
    what safetensors reads.

    Raises:
        UserError: The folder cannot be written.
    """
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in backbone.state_dict().items()
    }
    text = json.dumps(description, indent=2) + "\n"
    _write_whole(folder / "backbone.safetensors", lambda path: save_file(tensors, path))
    _write_whole(folder / "backbone.json", lambda path: path.write_text(text))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    try:
        with written_whole(path) as partial:
            write(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be written ({error}); make room, or name a folder that can be") from error


def load_backbone(path: str | Path, bands: Sequence[str] = RGB) -> nn.Module:
    """Restore a backbone, in eval mode. Nothing is unpickled.

    Args:
        path: A run folder, or any with backbone.safetensors and backbone.json; a checkpoint file of a run;
            ``timm:NAME`` for a timm model with its published weights (fetched), ``random:NAME`` for an untrained one.
        bands: For ``timm:`` and ``random:`` alone, the bands that it is to take, in order; the input layer is adapted
            (`adapt_input_weights`). Of a checkpoint, the bands are those it was trained on.

    Returns:
        A timm model without classifier. Its attribute `description` is the dictionary of backbone.json: `architecture`,
        `model_args`, `bands` ...; those of ``timm:`` and ``random:`` hold no statistics: use those of the data.

    Raises:
        UserError: Nothing there, torn, or from elsewhere.
    """
    source, _, name = str(path).partition(":")
    if source in ("timm", "random") and name:
        return _load_from_timm(name, bands, published=source == "timm")
    if timm.is_model(str(path)) and not Path(path).exists():
        raise UserError(
            f"--ckpt {path} is no run; timm:{path} has its published weights, random:{path} is it untrained"
        )
    description, tensors = _read_exported(Path(path))
    recipe = {key: description[key] for key in ("architecture", "model_args")}
    with torch.device("meta"):  # no memory: the description may be of any size
        wanted = _create(f"{path}:", **recipe).state_dict()
    for key in [*wanted, *tensors]:
        theirs, ours = (list(state[key].shape) if key in state else "absent" for state in (tensors, wanted))
        if theirs != ours:
            raise UserError(f"{path}: weights and description do not fit each other: {key} is {theirs}, not {ours}")
    model: Any = _create(f"{path}:", **recipe)
    model.load_state_dict(tensors)
    model.timm, model.description = recipe, description
    backbone: nn.Module = model.eval()
    return backbone


def _read_exported(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of a run folder, an exported backbone or a checkpoint."""
    description: Any
    tensors: Any
    if path.is_dir() or path.name in ("backbone.safetensors", "backbone.json"):
        folder = path if path.is_dir() else path.parent
        description = _read_description(folder / "backbone.json")
        tensors = read_tensors(folder / "backbone.safetensors")
    else:
        content = read_torch(path)
        description, tensors = content.get("backbone_description"), content.get("backbone")
    if not isinstance(description, dict) or "architecture" not in description:
        raise UserError(f"{path} is not from ssl_geo.pretrain: it does not say which timm model it holds")
    return check_description(description, str(path)), conform(tensors, dict[str, Tensor], f"{path}: backbone")


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder of ssl_geo.pretrain, or a checkpoint file of one")
    description: dict[str, Any] = conform(read_json(path, fix="export it again"), dict[str, Any], str(path))
    return description


def _load_from_timm(name: str, bands: Sequence[str], published: bool) -> nn.Module:
    model: Any = _build(name, len(bands), (), {})
    if published:
        try:
            weights = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except (OSError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"timm:{name}: no published weights within reach ({reason}); random:{name} is the untrained model"
            ) from error
        model.load_state_dict(_fit(weights, model, bands, RGB, f"timm:{name}"))
    model.description = describe_backbone(model, bands=list(bands), weights="published" if published else "random")
    backbone: nn.Module = model.eval()
    return backbone
