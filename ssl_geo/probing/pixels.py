"""Pixels as rows: what a linear probe, the per-pixel baseline and random convolutions are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geo.probing.heads import resize
from ssl_geo.probing.linear import LinearProbe, fit_linear
from ssl_geo.probing.store import FeatureStore

IGNORE = 255
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


def sample_rows(
    read: Callable[[int], tuple[Floats, Labels]], chips: npt.NDArray[np.int64], rows: int, seed: int
) -> tuple[Floats, Labels]:
    """Draw labelled pixels evenly from chips.

    Args:
        read: Gives features (F, H, W) and labels (H, W) of a chip by its number.
        chips: Numbers.
        rows: Most pixels over all chips.
        seed: Of the draw; it depends on nothing but the chip's number besides.

    Returns:
        Features (N, F) and labels (N,).
    """
    each = max(1, rows // max(len(chips), 1))
    features: list[Floats] = []
    classes: list[Labels] = []
    for number in chips.tolist():
        maps, labels = read(number)
        places = np.flatnonzero(labels.ravel() != IGNORE)
        if len(places) > each:
            places = np.random.default_rng((seed, number)).choice(places, each, replace=False)
        features.append(maps.reshape(len(maps), -1)[:, places].T)
        classes.append(labels.ravel()[places])
    return np.concatenate(features), np.concatenate(classes)


class LinearOnLayers(nn.Module):
    """A linear classifier of pixels on bilinearly upsampled layers side by side, computed before upsampling.

    The product with the weights and the interpolation are both linear, so each layer's share of the logits is taken
    on its own coarse grid: the same numbers for a fraction of the work.

    Args:
        weight: (C, D) over all layers' channels in order.
        bias: (C,).
        channels: Of each layer.
    """

    def __init__(self, weight: Tensor, bias: Tensor, channels: Sequence[int]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(part[:, :, None, None] for part in torch.split(weight, list(channels), dim=1))
        self.bias = nn.Parameter(bias)

    def forward(self, features: list[Tensor], height: int, width: int) -> Tensor:
        """Logits (B, C, height, width)."""
        shares = [
            resize(F.conv2d(part, weight), (height, width)) for part, weight in zip(features, self.weights, strict=True)
        ]
        return torch.stack(shares).sum(dim=0) + self.bias[None, :, None, None]


def fit_linear_on_layers(
    store: FeatureStore,
    layers: Sequence[str],
    train: npt.NDArray[np.int64],
    validation: npt.NDArray[np.int64],
    num_classes: int,
    *,
    rows: int = 60_000,
    seed: int = 0,
) -> tuple[LinearOnLayers, LinearProbe]:
    """Logistic regression by L-BFGS on the pixels of stored features, all layers side by side: answers in seconds.

    Args:
        store: Features and labels.
        layers: Names of the layers.
        train: Chips to fit on.
        validation: Chips to choose the penalty by.
        num_classes: C.
        rows: Most pixels to fit on.
        seed: Of their draw.
    """

    def read(number: int) -> tuple[Floats, Labels]:
        labels = store.labels[number]
        maps = [torch.from_numpy(np.asarray(store.layers[name][number], np.float32))[None] for name in layers]
        dense = torch.cat([resize(part, (labels.shape[0], labels.shape[1])) for part in maps], dim=1)
        return dense[0].numpy(), labels

    features, labels = sample_rows(read, train, rows, seed)
    probe = fit_linear(features, labels, num_classes, *sample_rows(read, validation, rows // 2, seed), seed=seed)
    channels = [store.layers[name].shape[1] for name in layers]
    return LinearOnLayers(probe.weight, probe.bias, channels), probe
