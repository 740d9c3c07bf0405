"""Dense features of any backbone's layers, (B, D, h, w), whichever of three ways the layers are named.

- *info*: timm's own names (index or `feature_info` module name), through `forward_intermediates`, which stops
  after the deepest layer asked for; where a model lacks that, through hooks on the same modules.
- *module*: dotted module names, through forward or forward-pre hooks.
- *node*: graph node names, through torchvision's `create_feature_extractor`; a truncated name such as ``layer4``
  is the last node below it (https://pytorch.org/vision/stable/feature_extraction.html).

The three give the same tensor for the same layer: the layer's own output, before any final norm that the model
applies to it (timm's ``forward_intermediates(norm=False)``); name the norm itself where it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ssl_geo.errors import UserError
from ssl_geo.probing.geometry import channel_axis, declared, first_tensor, input_channels, input_sizes, token_grid
from ssl_geo.probing.layers import Layer, Way, auto_layers, feature_info, find_layers, list_layers

__all__ = ["Extractor", "FeatureExtractor", "Layer", "auto_layers", "list_layers", "node_names"]

_T = TypeVar("_T")


def node_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the graph nodes of a model in order of execution, in train mode and in eval mode.

    Raises:
        UserError: torch.fx cannot trace the model.
    """
    train, evaluation = _trace(model, get_graph_node_names)
    return list(train), list(evaluation)


class Extractor(Protocol):
    """What gives features of some layers: `FeatureExtractor`, or one with more layers beside a model's own."""

    model: nn.Module
    layers: list[str]
    names: list[str]
    channels: list[int]
    reduction: list[int]

    def as_list(self, images: Tensor) -> list[Tensor]:
        """Features (B, D, h, w) of images (B, C, H, W), in the order of `names`."""
        ...


class FeatureExtractor(nn.Module):
    """Features of some layers of a model, always (B, D, h, w), by name.

    Hooks live only during a pass and nothing is kept from one pass to the next. Whether gradients are recorded
    and whether the model is in eval mode is the caller's to say.

    Attributes:
        model: The model, unchanged.
        layers: The layers' own names, in the order asked for.
        names: The names under which their features come, in the same order.
        way: How they were found: info, module or node.
        channels: D of each, known before the first pass.
        reduction: Pixels of the input per place of each; the height of the input where a layer is pooled.

    Args:
        model: Any module that takes images (B, C, H, W).
        layers: Indices (timm's, negative ones from the end) or names; a mapping gives each a name of the
            caller's choice. A leading ``backbone.`` may be left out or put in.
        by: The way in which they are named; `auto` takes the first of info, module and node that knows them all.
        hook: Whether a module's output (`forward`) or its input (`forward_pre`) is taken; modules alone.
        input_size: Height and width for the one pass on noise that tells channels and reduction, where the
            model works on no size that it declares.
        patch_size: Pixels per token of a model that does not declare it.
        prefix_tokens: Class and register tokens before the patches of a model that does not declare them.

    Raises:
        UserError: A layer is unknown, untraceable, never run, or puts out what lies on no grid.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int | str] | Mapping[int | str, str],
        *,
        by: Literal["auto"] | Way = "auto",
        hook: Literal["forward", "forward_pre"] = "forward",
        input_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise UserError("no layers asked for: name one or more with --layers (--layers list prints them)")
        self.model = model
        self._patch_size, self._prefix_tokens = patch_size, prefix_tokens
        if hook == "forward_pre" and by in ("info", "node"):
            raise UserError(f"the input of a layer is taken from modules alone, not by={by!r}: use by='module'")
        ways: Sequence[Way] = ("info", "module", "node") if by == "auto" else (by,)
        ways = ("module",) if hook == "forward_pre" else ways
        self.way, self.layers = find_layers(
            model, list(layers), ways, partial(_nodes_of_both_modes, model, by == "auto")
        )
        self.names = list(layers.values()) if isinstance(layers, Mapping) else list(self.layers)
        if len(set(self.names)) < len(self.names) or len(set(self.layers)) < len(self.layers):
            raise UserError(f"a layer or its name is given twice: {', '.join(self.names)}")
        # In a tuple, so that the graph, whose weights are the model's, is not saved a second time.
        self._graph: tuple[nn.Module, ...] = (_build_graph(model, self.layers),) if self.way == "node" else ()
        self._closed = False
        infos = {info["module"]: info for info in feature_info(model)}
        described = [infos.get(layer, {}) for layer in self.layers]
        self._hooks = [str(info.get("hook_type", hook)) if self.way == "info" else hook for info in described]
        self._intermediates = self.way == "info" and hasattr(model, "forward_intermediates")
        if self._intermediates:
            self.channels = [int(info["num_chs"]) for info in described]
            self.reduction = [int(info["reduction"]) for info in described]
        else:
            self._dry_run(input_sizes(model, input_size), described)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, D, h, w) of images (B, C, H, W) by name, in the order asked for."""
        size = (images.shape[-2], images.shape[-1])
        raw = self._raw(images)
        if self._intermediates:
            return dict(zip(self.names, raw, strict=True))
        return {
            name: self._dense(tensor, layer, axis, images.shape[0], size)
            for name, tensor, layer, axis in zip(self.names, raw, self.layers, self._axes, strict=True)
        }

    def as_list(self, images: Tensor) -> list[Tensor]:
        """The features as a list, in the order asked for."""
        return list(self(images).values())

    def close(self) -> None:
        """Let the traced graph go; a pass after that is an error. No hook is left after a pass in any case."""
        self._graph, self._closed = (), True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _raw(self, images: Tensor) -> list[Tensor]:
        """What the layers put out, in the order asked for."""
        if self._closed:
            raise RuntimeError("this FeatureExtractor is closed")
        if self._intermediates:
            stages = [info["module"] for info in feature_info(self.model)]
            indices = [stages.index(layer) for layer in self.layers]
            forward: Any = self.model.forward_intermediates
            taken = forward(images, indices=sorted(indices), intermediates_only=True, stop_early=True)
            by_index = dict(zip(sorted(indices), taken, strict=True))
            return [by_index[index] for index in indices]
        outputs = self._graph_outputs(images) if self.way == "node" else self._hook_outputs(images)
        unused = [layer for layer in self.layers if layer not in outputs]
        if unused:
            raise UserError(f"layer {unused[0]!r} takes no part in the model's forward: name another with --layers")
        return [outputs[layer] for layer in self.layers]

    def _hook_outputs(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}

        # Copies: an in-place activation that follows would otherwise change what was taken.
        def take_output(layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[layer] = _copy_of_first(output, layer)

        def take_input(layer: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outputs[layer] = _copy_of_first(args or kwargs, layer)

        with ExitStack() as hooks:
            for layer, kind in zip(self.layers, self._hooks, strict=True):
                module = self.model.get_submodule(layer)
                if kind == "forward":
                    handle = module.register_forward_hook(partial(take_output, layer))
                else:
                    handle = module.register_forward_pre_hook(partial(take_input, layer), with_kwargs=True)
                hooks.callback(handle.remove)
            self.model(images)
        return outputs

    def _graph_outputs(self, images: Tensor) -> dict[str, Tensor]:
        graph = self._graph[0]
        # The graph shares parameters and leaf modules with the model, not its own buffers and its mode.
        graph.to(images.device)
        if graph.training != self.model.training:
            with _modes_kept(self.model):
                graph.train(self.model.training)
        outputs: dict[str, Tensor] = graph(images)
        return outputs

    def _dense(self, tensor: Tensor, layer: str, axis: int | None, batch: int, size: tuple[int, int]) -> Tensor:
        """Lay what a layer puts out on the grid (B, D, h, w)."""
        if tensor.shape[0] != batch or tensor.ndim not in (2, 3, 4) or axis is None:
            raise UserError(
                f"layer {layer!r} puts out {tuple(tensor.shape)} for a batch of {batch}, which is no map of the "
                "image (the inside of an attention?): name another with --layers"
            )
        if tensor.ndim == 2:
            return tensor[:, :, None, None]
        if tensor.ndim == 4:
            return tensor if axis == 1 else tensor.permute(0, 3, 1, 2).contiguous()
        if declared(self.model, layer, "reroll") is not None:  # Hiera keeps its tokens in order of windows
            raise UserError(f"layer {layer!r} does not keep its tokens row by row: name it by index (by='info')")
        prefix, rows, columns = token_grid(
            tensor.shape[1],
            size,
            model=self.model,
            path=layer,
            patch_size=self._patch_size,
            prefix_tokens=self._prefix_tokens,
        )
        return tensor[:, prefix:].transpose(1, 2).reshape(batch, -1, rows, columns).contiguous()

    def _dry_run(self, sizes: Sequence[tuple[int, int]], infos: Sequence[Mapping[str, Any]]) -> None:
        """Learn channel axes, channels and reductions from one pass on noise, in eval mode."""
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        noise = torch.Generator().manual_seed(0)  # of its own: the caller's random state stays as it was
        refusals: list[str] = []
        for size in sizes:
            images = torch.randn((2, input_channels(self.model), *size), generator=noise).to(weight)
            try:
                with _modes_kept(self.model), torch.no_grad():
                    self.model.eval()
                    raw = self._raw(images)
            except UserError:
                raise
            except Exception as error:  # another size may do; all are told when none does
                refusals.append(f"{size[0]}x{size[1]}: {' '.join(str(error).split())[:120]}")
                continue
            self._axes = [
                channel_axis(tuple(t.shape), size, declared(self.model, layer, "output_fmt"), info.get("num_chs"))
                if t.ndim == 4
                else 1
                for t, layer, info in zip(raw, self.layers, infos, strict=True)
            ]
            maps = [
                self._dense(tensor, layer, axis, 2, size)
                for tensor, layer, axis in zip(raw, self.layers, self._axes, strict=True)
            ]
            self.channels = [features.shape[1] for features in maps]
            self.reduction = [max(round(size[0] / features.shape[2]), 1) for features in maps]
            return
        raise UserError(f"the model runs on no image tried ({refusals[0]}): tell input_size=(height, width)")


def _nodes_of_both_modes(model: nn.Module, if_traceable: bool) -> list[str]:
    """Graph nodes that a model has in train and in eval mode; none of an untraceable one, if that is no error."""
    try:
        train, evaluation = node_names(model)
    except UserError:
        if if_traceable:
            return []
        raise
    both = set(train)
    return [node for node in evaluation if node in both]


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own train or eval mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _trace(model: nn.Module, function: Callable[..., _T], *arguments: Any) -> _T:
    """Call one of torchvision's tracing functions with what timm declares untraceable left whole."""
    # A Swin made for any input size builds its attention mask in a way that no symbol can go; its blocks stay whole.
    whole = {type(module) for module in model.modules() if getattr(module, "dynamic_mask", False)}
    kwargs = {
        "leaf_modules": [*get_notrace_modules(), *whole],
        "autowrap_functions": list(get_notrace_functions()),
    }
    with _modes_kept(model):
        try:
            return function(model, *arguments, tracer_kwargs=kwargs, suppress_diff_warning=True)
        except Exception as error:
            raise UserError(
                f"{type(model).__name__} cannot be traced into graph nodes "
                f"({' '.join(str(error).split())[:160]}): name its layers by module"
            ) from error


def _copy_of_first(output: Any, layer: str) -> Tensor:
    return first_tensor(output, layer).clone()


def _build_graph(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Trace a model into one that gives the named nodes, each copied before an in-place activation changes it."""
    module: Any = _trace(model, create_feature_extractor, {layer: layer for layer in layers})
    for graph in (module.train_graph, module.eval_graph):
        output = next(node for node in graph.nodes if node.op == "output")
        copies = {}
        for name, node in output.args[0].items():
            with graph.inserting_after(node):
                copies[name] = graph.call_function(_copy_of_first, (node, name))
        output.args = (copies,)
    module.recompile()
    built: nn.Module = module
    return built
