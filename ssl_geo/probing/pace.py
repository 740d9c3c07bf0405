"""How long a probe will take, from one small batch through everything, and how long it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geo.probing.baselines import RandomConvolutions, feature_names
from ssl_geo.probing.features import Extractor
from ssl_geo.probing.metrics import IGNORED

# L-BFGS passes until the linear probe has its penalty and is fitted with it: the mean of 219 to 348 on land cover.
LINEAR_PASSES = 265


@dataclass(frozen=True)
class Pace:
    """Measured seconds a chip.

    Attributes:
        features: One pass of the backbone.
        training: Forward, backward and update of all heads.
        prediction: Forward of all heads.
        linear: A pass of L-BFGS over 10,000 rows of all layers' channels; not a chip.
    """

    features: float
    training: float
    prediction: float
    linear: float

    def heads(self, *, train: int, validation: int, test: int, epochs: int) -> float:
        """Seconds to train, choose and test all heads once, with so many chips in each split."""
        return epochs * train * self.training + ((epochs + 1) * validation + test) * self.prediction

    def linear_probe(self, rows: int) -> float:
        """Seconds of one linear probe on so many rows."""
        return LINEAR_PASSES * self.linear * rows / 10_000


def measure_pace(
    extractor: Extractor,
    images: Tensor,
    labels: Tensor,
    heads: Mapping[str, tuple[nn.Module, Sequence[str]]],
    num_classes: int,
    device: torch.device,
) -> Pace:
    """Run a batch through backbone and heads, twice, and time the second.

    Args:
        extractor: Its model on the device, in eval mode.
        images: (B, C, H, W), standardized.
        labels: (B, H, W) int64, 255 = ignored.
        heads: By name, each with its layers; their weights are spoilt.
        num_classes: C.
        device: Where to compute.
    """
    images, labels = images.to(device), labels.to(device)
    modules = nn.ModuleList(head.to(device) for head, _ in heads.values())
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-6)

    kept: dict[str, Tensor] = {}

    def extract() -> None:
        with torch.no_grad():
            kept.update(zip(extractor.names, extractor.as_list(images), strict=True))

    def train() -> None:
        modules.train()
        optimizer.zero_grad(set_to_none=True)
        for head, layers in heads.values():
            logits = head([kept[layer] for layer in layers], *labels.shape[-2:])
            torch.autograd.backward(F.cross_entropy(logits, labels, ignore_index=IGNORED))
        optimizer.step()

    def predict() -> None:
        modules.eval()
        with torch.no_grad():
            for head, layers in heads.values():
                head([kept[layer] for layer in layers], *labels.shape[-2:]).softmax(dim=1).max(dim=1)

    seconds = [_seconds(part, device) for part in (extract, train, predict)]
    width = sum(feature.shape[1] for feature in kept.values())
    features, training, prediction = (each / len(images) for each in seconds)
    return Pace(features, training, prediction, _linear_pass(width, num_classes, device))


def baseline_seconds(images: Tensor, bands: Sequence[str], num_classes: int, *, rows: int, chips: int) -> float:
    """Seconds of the baselines: two classifiers of pixels, on the CPU, and random convolutions of so many chips.

    Args:
        images: (1, C, H, W), a chip.
        bands: Names of the channels.
        num_classes: Number of classes.
        rows: Training pixels.
        chips: How often a chip goes through the convolutions.
    """
    cpu, convolutions = torch.device("cpu"), RandomConvolutions(len(bands))
    widths = (convolutions.width, len(feature_names(bands)))
    passes = sum(_linear_pass(width, num_classes, cpu) for width in widths)
    return LINEAR_PASSES * passes * rows / 10_000 + chips * _seconds(lambda: convolutions(images), cpu)


def _linear_pass(width: int, num_classes: int, device: torch.device) -> float:
    """Seconds of a pass of L-BFGS over 10,000 rows."""
    rows, weight = torch.randn(10_000, width, device=device), torch.randn(width, num_classes, device=device)
    return _seconds(lambda: rows.T @ (rows @ weight).softmax(1), device)


def _seconds(part: Callable[[], object], device: torch.device) -> float:
    """The second run; of short parts the median of five."""
    part()
    _wait(device)
    seconds: list[float] = []
    while not seconds or (sum(seconds) < 0.2 and len(seconds) < 5):
        began = time.perf_counter()
        part()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Laps:
    """Seconds of each part of a run.

    Attributes:
        seconds: By name, in the order of the parts.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Put the time since the last call to a part's account."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
