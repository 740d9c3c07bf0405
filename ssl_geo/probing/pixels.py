"""Pixels as rows: what a linear probe, the per-pixel baseline and random convolutions are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geo.probing.baselines import feature_names, pixel_features
from ssl_geo.probing.features import Extractor
from ssl_geo.probing.fit import Fitted
from ssl_geo.probing.heads import resize
from ssl_geo.probing.linear import PENALTIES, LinearProbe, choose_penalty, fit_linear, strongest_of_best
from ssl_geo.probing.metrics import IGNORED
from ssl_geo.probing.store import FeatureStore

PIXELS = "pixels"  # the name of the layer that is none of the backbone's
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Folds = Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]  # chips to fit on, chips to validate on


def sample_rows(
    read: Callable[[int], tuple[Floats, Labels]], chips: npt.NDArray[np.int64], rows: int, seed: int
) -> tuple[Floats, Labels]:
    """Draw labelled pixels evenly from chips whose features are maps of full resolution.

    Args:
        read: Gives features (F, H, W) and labels (H, W) of a chip by its number.
        chips: Numbers.
        rows: Most pixels over all chips.
        seed: Of the draw; it depends on nothing but the chip's number besides.

    Returns:
        Features (N, F) and labels (N,).
    """
    features: list[Floats] = []
    classes: list[Labels] = []
    for number in chips.tolist():
        maps, labels = read(number)
        places = draw_places(labels, number, rows // len(chips), seed)
        features.append(maps.reshape(len(maps), -1)[:, places].T)
        classes.append(labels.ravel()[places])
    return np.concatenate(features), np.concatenate(classes)


def draw_places(labels: Labels, number: int, most: int, seed: int) -> npt.NDArray[np.int64]:
    """Places in labels.ravel() of at most so many labelled pixels (at least one, if there is one) of a chip."""
    places: npt.NDArray[np.int64] = np.flatnonzero(labels.ravel() != IGNORED)
    most = max(1, most)
    return places if len(places) <= most else np.random.default_rng((seed, number)).choice(places, most, replace=False)


def stored_rows(
    store: FeatureStore, layers: Sequence[str], chips: npt.NDArray[np.int64], rows: int, seed: int
) -> tuple[Floats, Labels]:
    """As `sample_rows`, of stored layers side by side, each interpolated bilinearly at the drawn pixels alone.

    Returns:
        Features (N, all layers' channels) and labels (N,).
    """
    features: list[Floats] = []
    classes: list[Labels] = []
    for number in chips.tolist():
        labels = store.labels[number]
        height, width = labels.shape
        places = draw_places(labels, number, rows // len(chips), seed)
        y, x = np.divmod(places, width)
        # Pixel centres in the coordinates of grid_sample, -1 ... 1 from edge to edge.
        points = torch.from_numpy(np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 1, dtype=np.float32))
        sampled = [
            F.grid_sample(
                torch.from_numpy(np.asarray(store.layers[name][number], np.float32))[None],
                points[None, None],
                mode="bilinear",
                padding_mode="border",
                align_corners=False,
            )[0, :, 0]
            for name in layers
        ]
        features.append(torch.cat(sampled).T.numpy())
        classes.append(labels.ravel()[places])
    return np.concatenate(features), np.concatenate(classes)


class BesidePixels(nn.Module):
    """An extractor with one more layer, at full resolution: the bands, logs and indices of each pixel.

    Layers of a stride of 2 and more blur what one pixel tells; a classifier that reads both loses to neither by much.

    Attributes:
        model, names, channels, reduction: As of the extractor, with `PIXELS` as the last layer.

    Args:
        extractor: Of a backbone's layers.
        mean: (C,) reflectance that images are standardized with.
        std: (C,).
        bands: Names of the channels.
    """

    def __init__(self, extractor: Extractor, mean: npt.ArrayLike, std: npt.ArrayLike, bands: Sequence[str]) -> None:
        super().__init__()
        self.model, self._extractor, self._bands = extractor.model, extractor, tuple(bands)
        self._mean, self._std = (np.asarray(values, np.float32)[:, None, None, None] for values in (mean, std))
        self.names = [*extractor.names, PIXELS]
        self.layers = [*extractor.layers, PIXELS]
        self.channels = [*extractor.channels, len(feature_names(bands))]
        self.reduction = [*extractor.reduction, 1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, D, h, w) of standardized images (B, C, H, W) by name; pixels without data have the mean."""
        reflectance = images.detach().float().cpu().numpy().swapaxes(0, 1) * self._std + self._mean
        pixels = torch.from_numpy(pixel_features(reflectance, self._bands)).transpose(0, 1)
        return dict(zip(self.names, [*self._extractor.as_list(images), pixels.to(images.device)], strict=True))

    def as_list(self, images: Tensor) -> list[Tensor]:
        """The features as a list, in the order of `names`."""
        return list(self(images).values())


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


def training_ground(folds: Folds) -> npt.NDArray[np.int64]:
    """All chips of folds, each once: validation trains too once it has chosen, or where there is nothing to choose."""
    return np.unique(np.concatenate([chips for fold in folds for chips in fold]))


def fit_linear_chosen(
    draw: Callable[[npt.NDArray[np.int64], int], tuple[Floats, Labels]],
    folds: Folds,
    num_classes: int,
    *,
    rows: int,
    penalties: Sequence[float] = PENALTIES,
    class_weights: npt.NDArray[np.float64] | None = None,
) -> tuple[LinearProbe, list[float]]:
    """Choose the penalty on validation, then fit on training and validation together, as CLIP's linear probe does.

    Labelled ground is dear: what has chosen the penalty is not left unused (Radford et al. 2021, appendix A.3).

    Args:
        draw: Gives features (N, D) and labels (N,) of at most so many pixels, evenly of chips.
        folds: Chips to fit on and chips to validate on; several choose more steadily than one.
        num_classes: C.
        rows: Most pixels to fit on, of each fold as of the last fit: fewer ask for a stronger penalty.
        penalties: λ to choose from; a single one is taken as it is.
        class_weights: (C,) in the loss.

    Returns:
        The probe, and the mIoU on validation of its penalty, before it was fitted there; none if nothing was chosen.
    """
    reached, (penalty, *others) = [], penalties
    if others:
        drawn = [(*draw(train, rows), *draw(validation, rows // 2)) for train, validation in folds]
        tried = choose_penalty(drawn, num_classes, penalties=penalties, class_weights=class_weights)
        penalty = strongest_of_best(tried)
        reached = [tried[penalty]]
    features, labels = draw(training_ground(folds), rows)
    return fit_linear(features, labels, num_classes, penalty, class_weights=class_weights), reached


def fit_linear_on_layers(
    store: FeatureStore,
    layers: Sequence[str],
    folds: Folds,
    num_classes: int,
    *,
    rows: int,
    penalties: Sequence[float] = PENALTIES,
    class_weights: npt.NDArray[np.float64] | None = None,
    seed: int = 0,
) -> Fitted:
    """Logistic regression by L-BFGS on pixels of stored features, all layers side by side.

    Args:
        store: Features and labels.
        layers: Names of the layers.
        folds: As of `fit_linear_chosen`.
        num_classes: C.
        rows: Most pixels to fit on.
        penalties: As of `fit_linear_chosen`.
        class_weights: (C,) in the loss.
        seed: Of the draw of pixels.
    """
    draw = partial(stored_rows, store, layers, seed=seed)
    probe, validation_miou = fit_linear_chosen(
        draw, folds, num_classes, rows=rows, penalties=penalties, class_weights=class_weights
    )
    head = LinearOnLayers(probe.weight, probe.bias, [store.layers[name].shape[1] for name in layers])
    return Fitted(head, list(layers), validation_miou=validation_miou, kind="linear probe")
