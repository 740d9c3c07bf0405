"""Dense features on a finer grid: the backbone is shown the image enlarged.

A layer of a stride of 4 pixels sees every second pixel's place once the image is shown at twice its size. Local views
are magnified as much in pretraining (0.05 to 0.4 of a chip's area shown at half its side), so a pretrained backbone
knows such images, while its single pixels no longer blur into each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geo.probing.features import FeatureExtractor
from ssl_geo.probing.heads import resize


def dense_features(
    backbone: nn.Module, layers: Sequence[int | str], *, side: int, enlarge: int = 1
) -> FeatureExtractor | Enlarged:
    """Features of a backbone's layers, on the grid of the image or on one that many times as fine.

    Args:
        backbone: Of timm.
        layers: Indices or names.
        side: Of the images in pixels.
        enlarge: How many times as high and wide they are shown to the backbone.
    """
    extractor = FeatureExtractor(backbone, layers, input_size=side * enlarge)
    return extractor if enlarge == 1 else Enlarged(extractor, enlarge)


class Enlarged(nn.Module):
    """An extractor that is shown its images enlarged, bilinearly; features stay on the grid of the image.

    Attributes:
        model, names, layers, channels: As of the extractor.
        reduction: Pixels of the image, as it was before, per place of each layer; at least 1, as layers finer than
            the image are averaged down to its pixels.

    Args:
        extractor: Of a backbone's layers.
        factor: How many times as high and wide.
    """

    def __init__(self, extractor: FeatureExtractor, factor: int) -> None:
        super().__init__()
        self.model, self._extractor, self._factor = extractor.model, extractor, factor
        self.names, self.layers, self.channels = extractor.names, extractor.layers, extractor.channels
        self.reduction = [max(1, round(pixels / factor)) for pixels in extractor.reduction]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, D, h, w) of images (B, C, H, W) by name, in the order of `names`."""
        height, width = images.shape[-2:]
        found = self._extractor(resize(images, (self._factor * height, self._factor * width)))
        return {
            name: F.adaptive_avg_pool2d(features, (height, width)) if features.shape[-2] > height else features
            for name, features in found.items()
        }

    def as_list(self, images: Tensor) -> list[Tensor]:
        """The features as a list, in the order of `names`."""
        return list(self(images).values())
