"""Counts of models over the test chips, by spatial block: what every score and interval is made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ssl_geo.probing.fit import Fitted, predict
from ssl_geo.probing.metrics import boundary_counts, calibration_counts, confusion
from ssl_geo.probing.report import Kind, ModelResult
from ssl_geo.probing.store import FeatureStore

BINS = 15  # of confidence, for the calibration error


class TestChips:
    """The chips that every model of a probe is tested on, once.

    Attributes:
        numbers: (n,) of the chips.
        blocks: Number of spatial blocks that they lie in.
        num_classes: C.
    """

    __test__ = False  # no test, whatever its name

    def __init__(self, numbers: npt.NDArray[np.int64], block: npt.NDArray[np.int64], num_classes: int) -> None:
        """Take the chips' numbers (n,) and the spatial block (n,) of each."""
        different, position = np.unique(block, return_inverse=True)
        self.numbers, self.blocks, self.num_classes = numbers, len(different), num_classes
        self._position: dict[int, int] = dict(zip(numbers.tolist(), position.tolist(), strict=True))

    def block_of(self, number: int) -> int:
        """Position, below `blocks`, of the block that a chip lies in."""
        return self._position[number]


class Tally:
    """Counts of one model over test chips."""

    def __init__(self, test: TestChips) -> None:
        classes = test.num_classes
        self._test = test
        self._confusion = np.zeros((test.blocks, classes, classes), np.int64)
        self._boundary = np.zeros((3, classes), np.int64)
        self._calibration = np.zeros((3, BINS))

    def add(
        self,
        number: int,
        labels: npt.NDArray[np.uint8],
        classes: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Count a chip: labels, predicted classes and their probability, each (H, W)."""
        count = self._test.num_classes
        self._confusion[self._test.block_of(number)] += confusion(labels, classes, count)
        self._boundary += boundary_counts(labels, classes, count)
        if confidence is not None:
            self._calibration += calibration_counts(confidence, classes, labels)

    def result(self, name: str, group: str, kind: Kind, seed: int | None = None, **more: Any) -> ModelResult:
        """All counts, with what else `ModelResult` holds."""
        calibration = self._calibration if self._calibration.any() else None
        more |= {"boundary": self._boundary, "calibration": calibration}
        return ModelResult(name, group, kind, seed, self._confusion, **more)


def score_heads(
    fitted: Mapping[str, Fitted],
    store: FeatureStore,
    test: TestChips,
    batch_size: int,
    device: torch.device,
    *,
    prefix: str = "",
    seed: int | None = None,
) -> list[ModelResult]:
    """Test trained heads, all in one pass over the test chips.

    Args:
        fitted: By name.
        store: Features and labels.
        test: The chips.
        batch_size: Chips at once.
        device: Where to compute.
        prefix: Of the names of results and groups.
        seed: Of the training.
    """
    tallies = {name: Tally(test) for name in fitted}
    for name, part, classes, confidence in predict(fitted, store, test.numbers, batch_size, device):
        for number, chip_classes, chip_confidence in zip(part.tolist(), classes, confidence, strict=True):
            tallies[name].add(number, store.labels[number], chip_classes, chip_confidence)
    return [
        tallies[name].result(
            prefix + name if seed is None else f"{prefix}{name}, seed {seed}",
            prefix + name,
            item.kind,
            seed,
            parameters=sum(p.numel() for p in item.head.parameters()),
            best_epoch=item.best_epoch,
            validation_miou=float(np.nanmax(item.validation_miou)) if item.validation_miou else None,
            collapsed=item.collapsed,
            retried=item.retried,
        )
        for name, item in fitted.items()
    ]
