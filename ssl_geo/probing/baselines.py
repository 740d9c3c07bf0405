"""What a backbone must beat: the majority class, pixels on their own, and random convolutions.

The fourth, the same architecture at random initialization, is made where the backbone is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ssl_geo.errors import UserError
from ssl_geo.probing.metrics import IGNORED

Floats32 = npt.NDArray[np.float32]

# --- majority class ------------------------------------------------------------------------------------------------


def majority_class(train_support: npt.NDArray[np.integer]) -> int:
    """The most frequent class of the training labels, given (C,) their pixels; of equals the first.

    Raises:
        UserError: No labelled pixel.
    """
    if train_support.sum() == 0:
        raise UserError("no valid pixel in train: change --split.block or --split.fractions")
    return int(train_support.argmax())


# --- pixels --------------------------------------------------------------------------------------------------------

# Normalized differences (a - b) / (a + b), each with its source, by the bands of Sentinel-2 in order of preference.
INDICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "NDVI": (("B08", "B8A"), ("B04",)),  # Rouse et al. 1974, vegetation
    "NDWI": (("B03",), ("B08", "B8A")),  # McFeeters 1996, open water
    "MNDWI": (("B03",), ("B11",)),  # Xu 2006, open water beside buildings
    "NDMI": (("B8A", "B08"), ("B11",)),  # Gao 1996, moisture; its negative is NDBI (Zha et al. 2003), built-up land
    "NBR": (("B8A", "B08"), ("B12",)),  # Key & Benson 2006, burns
}
# Least reflectance: below it, noise and over-corrected shadows (negative values too) make ratios and logs run away.
FLOOR = 1e-3


def _index_channels(bands: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Channels a and b of each index whose bands are there."""
    found = {}
    for name, pair in INDICES.items():
        sides = [next((bands.index(band) for band in choices if band in bands), None) for choices in pair]
        if sides[0] is not None and sides[1] is not None:
            found[name] = (sides[0], sides[1])
    return found


def feature_names(bands: Sequence[str]) -> list[str]:
    """Names of what `pixel_features` gives, in order: the bands, their logs, the indices whose bands are there."""
    return [*bands, *(f"log {band}" for band in bands), *_index_channels(bands)]


def pixel_features(reflectance: Floats32, bands: Sequence[str]) -> Floats32:
    """Bands, logs and normalized differences of every pixel.

    Args:
        reflectance: (C, ...) reflectance, 1 for a perfect white diffuser; any shape behind the bands.
        bands: Canonical name of each channel (B02 ... B12); of others only the bands and logs are taken.

    Returns:
        (F, ...) float32, named by `feature_names`. Not standardized: `fit_pixels` does that.

    Raises:
        ValueError: As many names as channels are needed.
    """
    bands = list(bands)
    if len(bands) != len(reflectance):
        raise ValueError(f"{len(bands)} band names for {len(reflectance)} channels")
    pairs = _index_channels(bands)
    features = np.empty((2 * len(bands) + len(pairs), *reflectance.shape[1:]), dtype=np.float32)
    features[: len(bands)] = reflectance
    positive = np.maximum(reflectance, np.float32(FLOOR))
    np.log(positive, out=features[len(bands) : 2 * len(bands)])
    for row, (a, b) in enumerate(pairs.values(), start=2 * len(bands)):
        features[row] = (positive[a] - positive[b]) / (positive[a] + positive[b])
    return features


@dataclass(frozen=True)
class PixelClassifier:
    """Logistic regression on single pixels; the one class where training holds no other."""

    model: Pipeline | DummyClassifier
    num_classes: int

    def predict(self, features: Floats32) -> npt.NDArray[np.uint8]:
        """(F, ...) features -> (...) class ids."""
        rows = features.reshape(len(features), -1).T
        classes: npt.NDArray[np.uint8] = self.model.predict(rows).astype(np.uint8).reshape(features.shape[1:])
        return classes

    def probabilities(self, features: Floats32) -> Floats32:
        """(F, ...) features -> (C, ...) probabilities; 0 for a class that training did not hold."""
        rows = features.reshape(len(features), -1).T
        result = np.zeros((self.num_classes, len(rows)), dtype=np.float32)
        result[self.model.classes_] = self.model.predict_proba(rows).T
        return result.reshape(self.num_classes, *features.shape[1:])


def fit_pixels(
    features: Floats32,
    labels: npt.NDArray[np.integer],
    num_classes: int,
    *,
    penalty: float = 1e-5,
    class_weights: npt.NDArray[np.float64] | None = None,
) -> PixelClassifier:
    """Multinomial logistic regression (scikit-learn) on standardized features of single pixels.

    Args:
        features: (F, ...) of `pixel_features`.
        labels: (...) class ids, `IGNORED` where there is none.
        num_classes: Number of classes C.
        penalty: λ of mean cross entropy + λ/2 ‖W‖²; scikit-learn's C = 1 / (λ N).
        class_weights: (C,) in the loss, a mean weighted by them.

    Returns:
        The classifier; it predicts the one class everywhere where training holds only one.

    Raises:
        UserError: No labelled pixel.
    """
    chosen = np.flatnonzero(labels.reshape(-1) != IGNORED)
    if not len(chosen):
        raise UserError("no valid pixel in train: change --split.block or --split.fractions")
    rows, target = features.reshape(len(features), -1)[:, chosen].T, labels.reshape(-1)[chosen].astype(np.int64)
    if len(np.unique(target)) == 1:
        return PixelClassifier(DummyClassifier(strategy="most_frequent").fit(rows, target), num_classes)
    # Bands, logs and indices are nearly collinear: stopped at 1e-3 the baseline would be weaker than it is.
    weights = np.ones(len(target)) if class_weights is None else class_weights[target]
    logistic = LogisticRegression(C=1 / (penalty * weights.sum()), max_iter=3000, tol=1e-4)
    pipeline = make_pipeline(StandardScaler(), logistic)
    return PixelClassifier(pipeline.fit(rows, target, logisticregression__sample_weight=weights), num_classes)


# --- random convolutions -------------------------------------------------------------------------------------------


class RandomConvolutions(nn.Module):
    """Features of fixed random filters, what convolution and pooling give without any training.

    One layer of random 3×3 filters with random biases and ReLU (Saxe et al. 2011; Rolf et al. 2021, whose filters are
    patches of the imagery) at several scales: the image averaged over s×s pixels, filtered, averaged over 3×3, and
    brought back to full resolution. A filter answers both ways (ReLU of it and of its negative), and the standardized
    bands themselves are kept. Nothing is trained, and no state moves.

    Args:
        channels: Channels C of the input.
        filters: Filters at each scale.
        scales: Factors s of averaging.
        seed: Of the filters.
    """

    filters: Tensor
    biases: Tensor

    def __init__(self, channels: int, filters: int = 32, scales: Sequence[int] = (1, 2, 4, 8), seed: int = 0) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.width = channels + 2 * filters * len(self.scales)
        generator = torch.Generator().manual_seed(seed)
        # Standardized input gives answers of variance 1 (uncorrelated pixels).
        scale = (9 * channels) ** -0.5
        filter_shape = (len(self.scales), filters, channels, 3, 3)
        self.register_buffer("filters", torch.randn(filter_shape, generator=generator) * scale)
        self.register_buffer("biases", torch.rand(len(self.scales), filters, generator=generator) * 2 - 1)

    @torch.no_grad()
    def forward(self, standardized: Tensor) -> Tensor:
        """(B, C, H, W) standardized bands -> (B, `width`, H, W) features."""
        size = standardized.shape[-2:]
        features = [standardized]
        for scale, filters, bias in zip(self.scales, self.filters, self.biases, strict=True):
            # ceil_mode keeps the last, partial cells of sizes that the scale does not divide.
            coarse = F.avg_pool2d(standardized, scale, ceil_mode=True) if scale > 1 else standardized
            answer = F.conv2d(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), filters)
            rectified = torch.cat([F.relu(answer + bias[:, None, None]), F.relu(bias[:, None, None] - answer)], 1)
            smooth = F.avg_pool2d(rectified, 3, stride=1, padding=1, count_include_pad=False)
            features.append(
                F.interpolate(smooth, size=size, mode="bilinear", align_corners=False) if scale > 1 else smooth
            )
        return torch.cat(features, 1)
