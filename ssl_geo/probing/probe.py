"""The segmentation probe: a head on the features of a backbone, frozen or not, live or from a cache.

Constructor, methods and batches are those of torchgeo-bench's `segmentation_probe`, so that code written for it
runs unchanged; its silent mistakes are errors here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from ssl_geo.errors import UserError
from ssl_geo.probing.features import FeatureExtractor
from ssl_geo.probing.heads import build_head
from ssl_geo.probing.layers import Way
from ssl_geo.probing.metrics import IGNORED

# Share of the memory now free that a cache may take unless told otherwise.
MEMORY_SHARE = 0.8


class CachedFeaturesDataset(Dataset[tuple[list[Tensor], Tensor]]):
    """Features and labels of a data set, in memory.

    Args:
        layer_tensors: One (N, D, h, w) per layer, float16, or float32 where float16 would overflow.
        masks: Labels (N, H, W), uint8 as long as classes allow.
    """

    def __init__(self, layer_tensors: list[Tensor], masks: Tensor) -> None:
        if any(len(tensor) != len(masks) for tensor in layer_tensors):
            lengths = ", ".join(str(len(tensor)) for tensor in layer_tensors)
            raise UserError(f"layers hold features of {lengths} images, labels of {len(masks)}: the numbers must agree")
        self.layer_tensors = layer_tensors
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        """Features of one image, one (D, h, w) per layer, as stored, and its labels (H, W), int64 as losses want."""
        return [tensor[index] for tensor in self.layer_tensors], self.masks[index].long()

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in [*self.layer_tensors, self.masks])


class GPUTensorCache:
    """A cache moved whole to one device, read in batches without a data loader.

    Features come as stored on a GPU (float16 for autocast; float32 where that overflows) and as float32 on the
    CPU; labels come as int64. Both are converted batch by batch, so that the device holds the small form.

    Args:
        layer_tensors: One (N, D, h, w) per layer, on the device.
        masks: Labels (N, H, W), on the device.
        device: The device.
    """

    def __init__(self, layer_tensors: list[Tensor], masks: Tensor, device: torch.device | str) -> None:
        self.layer_tensors = layer_tensors
        self.masks = masks
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.masks)

    @classmethod
    def from_cached(cls, cache: CachedFeaturesDataset, device: torch.device | str) -> Self:
        """Move a cache to a device; nothing is copied that lies there already."""
        return cls([tensor.to(device) for tensor in cache.layer_tensors], cache.masks.to(device), device)

    def shuffled_batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Batches of features and labels in random order, each image once.

        Args:
            batch_size: Images a batch; the last may have fewer.
            generator: Random source on the CPU, so that a seed means one order on every device; torch's own
                where None.
        """
        order = torch.randperm(len(self), generator=generator).to(self.device)
        for chosen in torch.split(order, batch_size):
            yield self._batch(chosen)

    def ordered_batches(self, batch_size: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Batches of features and labels in the order of the cache."""
        for start in range(0, len(self), batch_size):
            yield self._batch(slice(start, start + batch_size))

    def _batch(self, chosen: Tensor | slice) -> tuple[list[Tensor], Tensor]:
        features = [tensor[chosen] for tensor in self.layer_tensors]
        if self.device.type == "cpu":
            features = [tensor.float() for tensor in features]
        return features, self.masks[chosen].long()


class SegmentationProbe(nn.Module):
    """A segmentation head on some layers of a backbone.

    A frozen backbone is in eval mode whatever mode the probe is in, and its pass records no gradients: neither
    its weights nor its BatchNorm statistics move.

    Attributes:
        backbone: The backbone, unchanged.
        layer_names: The layers, coarse to fine.
        channels_list: D of each layer's features.
        effective_classes: Number of classes.
        head: The head; all there is to train over a frozen backbone.
        hooks: Empty: hooks live only during a pass. For code that removes them.

    Args:
        backbone: Any module that takes images (B, C, H, W); a wrapper's ``backbone.`` may be left out of names.
        layer_names: Layers, coarse to fine (``layer4, layer3, layer2, layer1``); none means the backbone's output.
        num_classes: Number of classes; labels are 0 ... num_classes - 1, or 255 for pixels to leave out.
        freeze_backbone: Train the head alone; False trains the backbone with it.
        head_type: linear, patch_linear, conv_block, fpn or dpt.
        hidden_dim: Width of conv_block, fpn and dpt, 256 where None; the other two have no hidden layer.
        by: How layers are named, as in `FeatureExtractor`.
        input_size: Size of the images, for a backbone that works on no size that it declares.
        patch_size: Pixels per token of a backbone that does not declare it.
        prefix_tokens: Class and register tokens of a backbone that does not declare them.

    Raises:
        UserError: Unknown layer or head, a layer that lies on no grid, a number of classes outside 1 ... 255.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layer_names: Sequence[str],
        num_classes: int,
        freeze_backbone: bool = True,
        head_type: str = "linear",
        hidden_dim: int | None = None,
        *,
        by: Literal["auto"] | Way = "module",
        input_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_classes <= IGNORED:
            raise UserError(f"{num_classes} classes: 1 to {IGNORED} allowed, {IGNORED} marks ignored pixels")
        self.backbone = backbone
        self.freeze_backbone = freeze_backbone
        self.head_type = head_type
        self.effective_classes = num_classes
        self.hooks: list[RemovableHandle] = []
        layers: Mapping[int | str, str] = {name: name for name in layer_names} or {"": "backbone_output"}
        # In a tuple, so that the backbone's weights are not saved a second time under the extractor's name.
        self._extractor = (
            FeatureExtractor(
                backbone,
                layers,
                by=by,
                input_size=input_size,
                patch_size=patch_size,
                prefix_tokens=prefix_tokens,
            ),
        )
        self.layer_names = self._extractor[0].names
        self.channels_list = self._extractor[0].channels
        self.head = build_head(
            head_type,
            self.channels_list,
            num_classes,
            reduction=self._extractor[0].reduction,
            hidden_dim=hidden_dim,
        ).to(self._backbone_device())
        if freeze_backbone:
            backbone.requires_grad_(False)
            backbone.eval()
        elif not any(p.requires_grad for p in backbone.parameters()):
            backbone.requires_grad_(True)  # frozen by an earlier probe

    def train(self, mode: bool = True) -> Self:
        """Put the head in train or eval mode, and the backbone with it unless it is frozen."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def extract_features(self, images: Tensor) -> list[Tensor]:
        """Features of images (B, C, H, W), one (B, D, h, w) per layer."""
        if not self.freeze_backbone:
            return self._extractor[0].as_list(images)
        self.backbone.eval()
        with torch.no_grad():
            return self._extractor[0].as_list(images)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, C, H, W)."""
        dtype = next(self.head.parameters()).dtype
        features = [f.to(dtype) for f in self.extract_features(x)]
        logits: Tensor = self.head(features, x.shape[-2], x.shape[-1])
        return logits

    @torch.no_grad()
    def extract_segmentation_features(
        self,
        dataloader: Iterable[Any],
        cache_dtype: torch.dtype = torch.float16,
        max_bytes: int | None = None,
    ) -> CachedFeaturesDataset:
        """Pass a data set through the backbone once, in eval mode, and keep features and labels.

        Args:
            dataloader: Batches ``{"image": (B, C, H, W), "mask": ...}`` or ``(images, masks)``, masks (B, H, W)
                or (B, 1, H, W).
            cache_dtype: How features are kept. A layer that overflows it is kept in float32.
            max_bytes: What the cache may take; most of the memory now free where None.

        Returns:
            One entry per image, in the order of the loader.

        Raises:
            UserError: No batch; labels outside the classes; more bytes than allowed, predicted from the first
                batch where the loader tells its data set's length; images of several sizes.
        """
        self.backbone.eval()
        allowed = max_bytes if max_bytes is not None else int(MEMORY_SHARE * _free_memory())
        layers: list[list[Tensor]] = [[] for _ in self.layer_names]
        masks: list[Tensor] = []
        expected, found = _length(dataloader), 0
        for batch in dataloader:
            images, labels = (batch["image"], batch["mask"]) if isinstance(batch, Mapping) else (batch[0], batch[1])
            masks.append(compact_labels(labels, self.effective_classes))
            features = self._extractor[0].as_list(images.to(self._backbone_device()))
            for kept, feature in zip(layers, features, strict=True):
                _keep(kept, feature, cache_dtype)
            found += len(masks[-1])
            per_image = sum(kept[-1].nbytes for kept in (*layers, masks)) // max(len(masks[-1]), 1)
            predicted = per_image * max(expected, found)
            if predicted > allowed:
                raise UserError(
                    f"the features of {max(expected, found)} images take {predicted / 2**30:.2f} GiB in memory, "
                    f"{allowed / 2**30:.2f} GiB are allowed: raise max_bytes, cache fewer layers, or keep them on disk"
                )
        if not masks:
            raise UserError("the data loader gave no batch: no features to keep")
        sizes = {tuple(mask.shape[-2:]) for mask in masks}
        if len(sizes) > 1:
            raise UserError(f"one cache holds images of one size, found {sorted(sizes)}: tile or pad them alike")
        tensors: list[Tensor] = []
        for kept in layers:
            tensors.append(torch.cat(kept))
            kept.clear()  # one layer at a time is held twice
        return CachedFeaturesDataset(tensors, torch.cat(masks))

    def _backbone_device(self) -> torch.device:
        held = next(self.backbone.parameters(), next(self.backbone.buffers(), None))
        return held.device if held is not None else torch.device("cpu")


def compact_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Check labels and make them small.

    Args:
        labels: (B, H, W) or (B, 1, H, W), whole numbers of any type.
        num_classes: Labels are 0 ... num_classes - 1, or 255 for pixels to leave out.

    Returns:
        The labels (B, H, W) as uint8, an eighth of int64's bytes, on the CPU.

    Raises:
        UserError: Another shape, a fraction, or a label that is no class; it tells which and how many pixels.
    """
    if labels.ndim == 4 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 3:
        raise UserError(f"labels of shape {tuple(labels.shape)}: (B, H, W) or (B, 1, H, W) wanted")
    labels = labels.detach().cpu()
    whole = labels.to(torch.int64)
    strange = (whole < 0) | ((whole >= num_classes) & (whole != IGNORED))
    if labels.is_floating_point():
        strange |= labels != whole
    if strange.any():
        values = torch.unique(labels[strange])
        found = ", ".join(f"{value:g}" for value in values[:8].tolist()) + (", ..." if len(values) > 8 else "")
        raise UserError(
            f"labels {found} in {int(strange.sum())} of {labels.numel()} pixels are outside 0 ... {num_classes - 1} "
            f"and not {IGNORED} (ignored): map them to classes or raise the number of classes"
        )
    return labels.to(torch.uint8)


def _keep(kept: list[Tensor], feature: Tensor, dtype: torch.dtype) -> None:
    """Append features to their layer's batches in `dtype`, or all in float32 from the first that overflows."""
    if not dtype.is_floating_point:
        raise UserError(f"features cannot be kept as {dtype}: take torch.float16 or torch.float32")
    small = feature.to(device="cpu", dtype=kept[-1].dtype if kept else dtype)
    if not bool(small.isfinite().all()) and bool(feature.isfinite().all()):
        kept[:] = [earlier.float() for earlier in kept]
        small = feature.to(device="cpu", dtype=torch.float32)
    kept.append(small)


def _length(dataloader: Iterable[Any]) -> int:
    """Images that a loader will give, 0 where it cannot tell."""
    dataset = getattr(dataloader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else 0


def _free_memory() -> int:
    """Bytes of memory that can be had now; where the system does not tell (macOS), all that the machine has."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
