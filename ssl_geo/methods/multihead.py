"""One backbone, several named heads on several of its layers and inputs (after VISSL's multi-input-output model).

One pass per input serves every head: linear probes on all layers at once, several tasks on one image, an image and
its crops. VISSL: facebookresearch/vissl, vissl/models/base_ssl_model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn

from ssl_geo.errors import UserError, nearest

Part: TypeAlias = Literal["backbone", "heads", "all"]
# The layer that a backbone which puts out one tensor has.
OUTPUT = "output"
KEYS_SHOWN = 8

Features: TypeAlias = Mapping[str, Tensor]
Input: TypeAlias = Tensor | Sequence[Tensor] | Features


@dataclass(frozen=True)
class LoadReport:
    """What became of the keys of a saved state.

    Attributes:
        loaded: Keys whose values the model took.
        missing: Keys of the model that the state lacks.
        unexpected: Keys of the state that the model lacks.
        mismatched: Key, shape in the state and shape in the model, where the two differ.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether state and model agreed in every key."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        differing = [f"{key} {list(saved)} in place of {list(own)}" for key, saved, own in self.mismatched]
        lines = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.missing) + len(differing)} tensors"]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": differing}
        for kind, keys in kinds.items():
            if keys:
                more = f", and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
                lines.append(f"  {kind} ({len(keys)}): {', '.join(keys[:KEYS_SHOWN])}{more}")
        return "\n".join(lines)


class MultiHeadModel(nn.Module):
    """A backbone and named heads, each on its own input and layers.

    Attributes:
        backbone: The backbone.
        heads: The heads by name.
        routes: Input and layers of each head.

    Args:
        backbone: Gives features by layer, or one tensor, which is then the layer ``output``. ``nn.Identity()``
            lets features from a cache stand as the input.
        heads: A module each, or several to run one after the other.
        routes: For each head the input's name and its layers: one name hands the head that tensor, a list of
            names a list of tensors.
        one_pass_per_view: Pass every view through the backbone by itself: less memory, more time.

    Raises:
        UserError: Heads and routes differ in their names, or a name cannot be one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module | Sequence[nn.Module]],
        routes: Mapping[str, tuple[str, str | Sequence[str]]],
        *,
        one_pass_per_view: bool = False,
    ) -> None:
        super().__init__()
        for name in [*heads, *routes]:
            if name not in routes or name not in heads:
                lacking, known = ("route", routes) if name in heads else ("head", heads)
                raise UserError(f"no {lacking} for {name!r}; {nearest(name, known)}")
        for name in heads:
            if not name or "." in name or name in ("backbone", "heads") or hasattr(nn.ModuleDict(), name):
                raise UserError(f"a head cannot be called {name!r}: names are part of saved keys, without dots")
        self.backbone = backbone
        self.heads = nn.ModuleDict(
            {n: head if isinstance(head, nn.Module) else nn.Sequential(*head) for n, head in heads.items()}
        )
        self.routes = {
            name: (source, layers if isinstance(layers, str) else list(layers))
            for name, (source, layers) in routes.items()
        }
        self.one_pass_per_view = one_pass_per_view
        self._frozen: set[str] = set()

    def forward(self, inputs: Input | Mapping[str, Input], *arguments: Any) -> dict[str, Tensor]:
        """Run every head on the features of its input, each input through the backbone once.

        Args:
            inputs: The inputs by name, or the one input where all routes name the same. An input is a batch
                (B, C, H, W); a list of such, views of several sizes; or what else the backbone takes.
            arguments: Handed to each head after its features (a segmentation head wants height and width).

        Returns:
            Each head's output by its name. For a list of views it holds the views' outputs one after the other
            in the order of the list, whatever their sizes.

        Raises:
            UserError: An input or layer that a route names is absent, or views give features of unlike sizes.
        """
        named = self._named(inputs)
        features = {source: self._features(source, named[source]) for source in self._sources()}
        return {
            name: _run_head(self.heads[name], _routed(features[source], layers, name), arguments)
            for name, (source, layers) in self.routes.items()
        }

    def freeze(self, part: Part = "all") -> Self:
        """Freeze the backbone, the heads or both: no gradients, and eval mode from now on.

        In eval mode whatever `train` says, so that BatchNorm statistics do not move either.

        Raises:
            UserError: No such part.
        """
        for name in _parts(part):
            self._frozen.add(name)
            self._part(name).requires_grad_(False)
        return self.train(self.training)

    def is_frozen(self, part: Part = "all") -> bool:
        """Whether no parameter of the backbone, the heads or both can be trained."""
        return not any(p.requires_grad for name in _parts(part) for p in self._part(name).parameters())

    def train(self, mode: bool = True) -> Self:
        """Put what is not frozen in train or eval mode."""
        super().train(mode)
        for name in self._frozen:
            self._part(name).eval()
        return self

    def parts_state(self) -> dict[str, dict[str, Any]]:
        """The state by part, for saving: ``{"backbone": state, "heads": {name: state}}``, tensors and names alone."""
        return {
            "backbone": dict(self.backbone.state_dict()),
            "heads": {name: dict(head.state_dict()) for name, head in self.heads.items()},
        }

    def load_parts(
        self, state: Mapping[str, Any], parts: Iterable[str] = ("backbone", "heads"), strict: bool = False
    ) -> LoadReport:
        """Restore some parts from what `parts_state` gave, of this model or of one that shares parts with it.

        Args:
            state: The saved state.
            parts: ``backbone``, ``heads`` for all heads, or names of single heads.
            strict: Refuse a state that does not agree in every key of these parts; nothing is loaded then.

        Returns:
            What was loaded, what was not and why; a key counts once.

        Raises:
            UserError: No such part, a state of another make, or with `strict` one that differs.
        """
        saved, own, covered = _flat(state), self.state_dict(), self._prefixes(parts)
        wanted = {key for key in own if key.startswith(covered)}
        given = {key for key in saved if key.startswith(covered)}
        shapes = {key: (_shape(saved[key]), _shape(own[key])) for key in sorted(wanted & given)}
        report = LoadReport(
            loaded=[key for key, (theirs, ours) in shapes.items() if theirs == ours],
            missing=sorted(wanted - given),
            unexpected=sorted(given - wanted),
            mismatched=[(key, theirs, ours) for key, (theirs, ours) in shapes.items() if theirs != ours],
        )
        if strict and not report.complete:
            raise UserError(f"the saved state differs from the model: {' '.join(str(report).split())}")
        self.load_state_dict({key: saved[key] for key in report.loaded}, strict=False)
        return report

    def _sources(self) -> list[str]:
        return list(dict.fromkeys(source for source, _ in self.routes.values()))

    def _named(self, inputs: Input | Mapping[str, Input]) -> Mapping[str, Any]:
        """The inputs by name; where routes name one input alone, what is given without a name is that one."""
        sources = self._sources()
        if len(sources) == 1 and not (isinstance(inputs, Mapping) and sources[0] in inputs):
            return {sources[0]: inputs}
        if not isinstance(inputs, Mapping):
            raise UserError(f"the routes name {len(sources)} inputs: give a mapping with {', '.join(sources)}")
        for source in sources:
            if source not in inputs:
                raise UserError(f"no input is called {source!r}; {nearest(source, inputs)}")
        return inputs

    def _features(self, source: str, given: Any) -> Features:
        """Features of one input by layer: one backbone pass, or one per size of a list of views."""
        if not isinstance(given, list | tuple):
            found = self.backbone(given)
            return found if isinstance(found, Mapping) else {OUTPUT: found}
        # Order of views does not matter to the grouping; the backbone sees each size once.
        groups: dict[Any, list[int]] = {}
        for position, view in enumerate(given):
            key = position if self.one_pass_per_view else tuple(view.shape[-2:])
            groups.setdefault(key, []).append(position)
        wanted = {
            layer
            for name, layers in self.routes.values()
            if name == source
            for layer in ([layers] if isinstance(layers, str) else layers)
        }
        by_layer: dict[str, dict[int, Tensor]] = {}
        for positions in groups.values():
            together = self._features(source, torch.cat([given[k] for k in positions]))
            for layer, maps in together.items():
                if layer not in wanted:
                    continue
                split = torch.split(maps, [len(given[k]) for k in positions])
                by_layer.setdefault(layer, {}).update(zip(positions, split, strict=True))
        return {layer: _joined(layer, views) for layer, views in by_layer.items()}

    def _part(self, name: str) -> nn.Module:
        return self.backbone if name == "backbone" else self.heads

    def _prefixes(self, parts: Iterable[str]) -> tuple[str, ...]:
        """What the keys of these parts begin with."""
        known = ["backbone", "heads", *self.heads]
        prefixes = []
        for part in parts:
            if part not in known:
                raise UserError(f"the model has no part {part!r}; {nearest(part, known)}")
            prefixes.append(f"{part}." if part in ("backbone", "heads") else f"heads.{part}.")
        return tuple(prefixes)


def _parts(part: str) -> tuple[str, ...]:
    if part not in ("backbone", "heads", "all"):
        raise UserError(f"the model has no part {part!r}; {nearest(part, ('backbone', 'heads', 'all'))}")
    return ("backbone", "heads") if part == "all" else (part,)


def _run_head(head: nn.Module, features: Tensor | list[Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """A head, or the modules of a sequence one after the other; the arguments go to the first."""
    first, *rest = head if isinstance(head, nn.Sequential) else [head]
    output: Tensor = first(features, *arguments)
    for module in rest:
        output = module(output)
    return output


def _routed(features: Features, layers: str | list[str], head: str) -> Tensor | list[Tensor]:
    """The features that a route names: one tensor for one name, a list for a list."""
    for layer in [layers] if isinstance(layers, str) else layers:
        if layer not in features:
            raise UserError(f"the backbone gives no layer {layer!r} for head {head!r}; {nearest(layer, features)}")
    return features[layers] if isinstance(layers, str) else [features[layer] for layer in layers]


def _joined(layer: str, views: Mapping[int, Tensor]) -> Tensor:
    """The views' features one after the other, in the order of the views."""
    ordered = [views[k] for k in sorted(views)]
    shapes = {tuple(view.shape[1:]) for view in ordered}
    if len(shapes) > 1:
        raise UserError(
            f"layer {layer!r} gives features of {len(shapes)} sizes {sorted(shapes)} for views of several sizes, "
            "which no head takes together: pool them in the backbone"
        )
    return torch.cat(ordered)


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state as one mapping, keys as in the model's `state_dict`."""
    backbone, heads = state.get("backbone", {}), state.get("heads", {})
    if not ({"backbone", "heads"} & set(state)) or not all(isinstance(s, Mapping) for s in (backbone, heads)):
        raise UserError(
            f"not a state saved by parts (backbone, heads): it holds {', '.join(map(str, state)) or 'nothing'}"
        )
    flat = {f"backbone.{key}": value for key, value in backbone.items()}
    for name, head in heads.items():
        flat |= {f"heads.{name}.{key}": value for key, value in head.items()}
    return flat


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
