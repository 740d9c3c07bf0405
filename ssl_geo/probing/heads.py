"""Five segmentation heads, from one convolution to a small decoder, that turn features into logits per pixel.

The definitions are those of torchgeo-bench's segmentation probe (torchgeo/torchgeo-bench,
models/segmentation_heads.py, read at 0660813), so that figures compare. Features come coarse to fine (the deepest
layer first: ``layer3, layer2, layer1, act1``), each (B, D, h, w); every head ends in a bilinear resize to the
input's height and width, ``align_corners=False``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geo.errors import UserError, nearest

HIDDEN_DIM = 256


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, D, h, w) to a height and width; untouched where they are so already."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _finest(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of the map with the most places."""
    height, width = max((m.shape[-2:] for m in maps), key=lambda size: size[0] * size[1])
    return height, width


def classify_together(classify: nn.Conv2d, maps: Sequence[Tensor]) -> Tensor:
    """What a 1×1 convolution makes of maps (B, D, h, w) brought to the finest one's size and concatenated.

    Both are linear, so that each map is turned into logits on its own grid and only these are resized: D / C times
    less memory.
    """
    weights = torch.split(classify.weight, [m.shape[1] for m in maps], dim=1)
    biases = [classify.bias, *[None] * (len(maps) - 1)]  # once
    parts = zip(maps, weights, biases, strict=True)
    return torch.stack([resize(F.conv2d(m, weight, bias), _finest(maps)) for m, weight, bias in parts]).sum(dim=0)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that normalizes one value a channel (one chip, 1×1), which has no variance, by what it has seen."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, D, h, w)."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        normed: Tensor = super().forward(input)
        return normed


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, D, h, w), each place for itself, as inside a transformer block."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each place's D values."""
        normed: Tensor = super().forward(input.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class SegmentationHead(nn.Module, ABC):
    """What the heads have in common.

    Args:
        channels: D of each layer's features, coarse to fine.
        num_classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if not channels:
            raise UserError("a segmentation head needs features of one layer at least: name some with --layers")
        self.channels = list(channels)
        self.num_classes = num_classes

    def forward(self, features: list[Tensor], height: int, width: int) -> Tensor:
        """Logits (B, classes, height, width) from one (B, D, h, w) per layer, coarse to fine."""
        return resize(self.decode(features, (height, width)), (height, width))

    @abstractmethod
    def decode(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, h, w) at whatever resolution the head works on; `size` is the input's."""


class LinearHead(SegmentationHead):
    """BatchNorm and a 1×1 convolution per layer; logits of several layers are summed at the input's size.

    The sum's weights are learned and start at 1.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.layers = nn.ModuleList(nn.Sequential(BatchNorm(d), nn.Conv2d(d, num_classes, 1)) for d in channels)
        self.layer_weights = nn.Parameter(torch.ones(len(channels))) if len(channels) > 1 else None

    def decode(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits of the one layer, or the weighted sum over layers."""
        logits: list[Tensor] = [layer(f) for layer, f in zip(self.layers, features, strict=True)]
        if self.layer_weights is None:
            return logits[0]
        total = torch.zeros((), device=logits[0].device, dtype=logits[0].dtype)
        for weight, one in zip(self.layer_weights, logits, strict=True):
            total = total + weight * resize(one, size)
        return total


class PatchLinearHead(SegmentationHead):
    """Each token of the first layer tells the logits of its p × p pixels: LayerNorm, 1×1 to classes·p², shuffle.

    Args:
        channels: D of each layer's features; the first counts.
        num_classes: Number of classes.
        patch_size: p, the reduction of the first layer (`FeatureExtractor.reduction`).
    """

    def __init__(self, channels: Sequence[int], num_classes: int, patch_size: int) -> None:
        super().__init__(channels, num_classes)
        self.norm = ChannelLayerNorm(channels[0])
        self.to_pixels = nn.Conv2d(channels[0], num_classes * patch_size**2, 1)
        self.shuffle = nn.PixelShuffle(patch_size)

    def decode(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits of the first layer's tokens, p times as many along each side."""
        logits: Tensor = self.shuffle(self.to_pixels(self.norm(features[0])))
        return logits


class ConvBlockHead(SegmentationHead):
    """Per layer 1×1, BatchNorm, SiLU; brought to the finest layer's size, concatenated, 1×1."""

    def __init__(self, channels: Sequence[int], num_classes: int, hidden_dim: int = HIDDEN_DIM) -> None:
        super().__init__(channels, num_classes)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(d, hidden_dim, 1, bias=False), BatchNorm(hidden_dim), nn.SiLU()) for d in channels
        )
        self.classify = nn.Conv2d(hidden_dim * len(channels), num_classes, 1)

    def decode(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits at the finest layer's size."""
        maps = [project(f) for project, f in zip(self.projections, features, strict=True)]
        return classify_together(self.classify, maps)


class FPNHead(SegmentationHead):
    """Feature pyramid (arXiv 1612.03144): lateral 1×1, top-down sum, 3×3 with BatchNorm and ReLU, concatenated, 1×1."""

    def __init__(self, channels: Sequence[int], num_classes: int, hidden_dim: int = HIDDEN_DIM) -> None:
        super().__init__(channels, num_classes)
        self.laterals = nn.ModuleList(
            nn.Sequential(BatchNorm(d), nn.Conv2d(d, hidden_dim, 1, bias=False)) for d in channels
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False),
                BatchNorm(hidden_dim),
                nn.ReLU(),
            )
            for _ in channels
        )
        self.classify = nn.Conv2d(hidden_dim * len(channels), num_classes, 1)

    def decode(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits at the finest layer's size."""
        pyramid: list[Tensor] = []
        for lateral, f in zip(self.laterals, features, strict=True):
            level = lateral(f)
            if pyramid:
                level = level + resize(pyramid[-1], (level.shape[-2], level.shape[-1]))
            pyramid.append(level)
        maps = [smooth(level) for smooth, level in zip(self.smooth, pyramid, strict=True)]
        return classify_together(self.classify, maps)


class ResidualConvUnit(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))), 3×3 (RefineNet, arXiv 1611.06612, figure 3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(dim, dim, 3, padding=1)
        self.second = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Refine (B, D, h, w)."""
        refined: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return refined


class FusionBlock(nn.Module):
    """Adds a refined finer map to the running one and refines the sum; the first has no finer map to add."""

    def __init__(self, dim: int, first: bool) -> None:
        super().__init__()
        self.refine_skip = None if first else ResidualConvUnit(dim)
        self.refine = ResidualConvUnit(dim)

    def forward(self, running: Tensor, skip: Tensor | None) -> Tensor:
        """The running map at the size of the skip, where there is one."""
        if self.refine_skip is not None and skip is not None:
            running = resize(running, (skip.shape[-2], skip.shape[-1])) + self.refine_skip(skip)
        refined: Tensor = self.refine(running)
        return refined


class DPTHead(SegmentationHead):
    """Dense prediction transformer's decoder (arXiv 2103.13413) on four layers.

    Per layer LayerNorm, 1×1 and ×2; four fusion blocks; ×4; 3×3, ReLU, 3×3. For a patch of 16 that is half the
    input's size. Neither enlargement goes beyond the input, where the last resize would only take it back
    (a pyramid's finest stage).

    Raises:
        UserError: Not four layers.
    """

    LAYERS = 4

    def __init__(self, channels: Sequence[int], num_classes: int, hidden_dim: int = HIDDEN_DIM) -> None:
        super().__init__(channels, num_classes)
        if len(channels) != self.LAYERS:
            raise UserError(
                f"the dpt head takes {self.LAYERS} layers, coarse to fine, not {len(channels)}: "
                "name four with --layers or leave dpt out of --heads"
            )
        self.projections = nn.ModuleList(
            nn.Sequential(ChannelLayerNorm(d), nn.Conv2d(d, hidden_dim, 1)) for d in channels
        )
        self.fusions = nn.ModuleList(FusionBlock(hidden_dim, first=k == 0) for k in range(self.LAYERS))
        self.classify = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, num_classes, 3, padding=1),
        )

    def decode(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits at eight times the finest layer's size, at most the input's."""
        running: Tensor | None = None
        for project, fuse, f in zip(self.projections, self.fusions, features, strict=True):
            level = _enlarge(project(f), 2, size)
            running = fuse(level, None) if running is None else fuse(running, level)
        assert running is not None
        logits: Tensor = self.classify(_enlarge(running, 4, size))
        return logits


def _enlarge(maps: Tensor, factor: int, limit: tuple[int, int]) -> Tensor:
    """Resize by a factor, but neither beyond the limit nor below what there is."""
    height, width = (max(min(factor * n, most), n) for n, most in zip(maps.shape[-2:], limit, strict=True))
    return resize(maps, (height, width))


HEADS: Mapping[str, type[SegmentationHead]] = {
    "linear": LinearHead,
    "patch_linear": PatchLinearHead,
    "conv_block": ConvBlockHead,
    "fpn": FPNHead,
    "dpt": DPTHead,
}


def build_head(
    name: str,
    channels: Sequence[int],
    num_classes: int,
    *,
    reduction: Sequence[int],
    hidden_dim: int | None = None,
) -> SegmentationHead:
    """Make a head by name for the layers of an extractor.

    Args:
        name: One of `HEADS`.
        channels: D of each layer's features, coarse to fine.
        num_classes: Number of classes.
        reduction: Pixels of the input per place of each layer's features.
        hidden_dim: Width of conv_block, fpn and dpt, 256 where None; the other two have no hidden layer.

    Raises:
        UserError: No head is called so, or it does not take these layers.
    """
    if name not in HEADS:
        raise UserError(f"no segmentation head is called {name!r} (--heads); {nearest(name, HEADS)}")
    if name == "linear":
        return LinearHead(channels, num_classes)
    if name == "patch_linear":
        return PatchLinearHead(channels, num_classes, patch_size=reduction[0])
    wide: Mapping[str, type[ConvBlockHead | FPNHead | DPTHead]]
    wide = {"conv_block": ConvBlockHead, "fpn": FPNHead, "dpt": DPTHead}
    return wide[name](channels, num_classes, hidden_dim or HIDDEN_DIM)
