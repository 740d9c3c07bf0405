"""What a checkpoint must beat, on the same chips and by the same counts: pixels, random convolutions, one class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ssl_geo.probing.baselines import RandomConvolutions, fit_pixels, majority_class, pixel_features
from ssl_geo.probing.linear import PENALTIES
from ssl_geo.probing.pixels import Folds, fit_linear_chosen, sample_rows, training_ground
from ssl_geo.probing.report import ModelResult
from ssl_geo.probing.scoring import Tally, TestChips

Floats = npt.NDArray[np.float32]


class RivalChip(NamedTuple):
    """A chip without any backbone.

    Attributes:
        reflectance: (C, H, W), filled where there is no data.
        standardized: (C, H, W).
        labels: (H, W), 255 = ignored.
    """

    reflectance: Floats
    standardized: Floats
    labels: npt.NDArray[np.uint8]


def score_rivals(
    read: Callable[[int], RivalChip],
    bands: Sequence[str],
    class_pixels: npt.NDArray[np.int64],
    folds: Folds,
    test: TestChips,
    *,
    rows: int,
    penalties: Sequence[float] = PENALTIES,
    class_weights: npt.NDArray[np.float64] | None = None,
) -> list[ModelResult]:
    """Fit and test logistic regression on single pixels, the linear probe on random convolutions, the majority class.

    Args:
        read: Gives a chip by its number.
        bands: Names of the channels.
        class_pixels: (N, C) valid pixels of each chip and class.
        folds: Chips to fit on and chips to choose the penalty by, which are fitted on then.
        test: Chips to test on.
        rows: Most training pixels.
        penalties: λ of random convolutions' probe, as of `fit_linear_chosen`.
        class_weights: (C,) in the losses, as in those of the heads that are to beat them.
    """
    convolutions = RandomConvolutions(len(bands))

    def spectra(number: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
        chip = read(number)
        return pixel_features(chip.reflectance, bands), chip.labels

    def textures(number: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
        chip = read(number)
        return convolutions(torch.from_numpy(chip.standardized)[None])[0].numpy(), chip.labels

    whole = training_ground(folds)
    features, labels = sample_rows(spectra, whole, rows, seed=0)
    pixels = fit_pixels(features.T, labels, test.num_classes, class_weights=class_weights)
    draw = partial(sample_rows, textures, seed=0)
    linear, _ = fit_linear_chosen(
        draw, folds, test.num_classes, rows=rows, penalties=penalties, class_weights=class_weights
    )
    majority = majority_class(class_pixels[whole].sum(axis=0))

    tallies = {name: Tally(test) for name in ("pixels", "random convolutions", "majority class")}
    for number in tqdm(test.numbers.tolist(), desc="baselines", unit="chip", delay=2, dynamic_ncols=True):
        maps, truth = spectra(number)
        probabilities = pixels.probabilities(maps)
        tallies["pixels"].add(number, truth, probabilities.argmax(axis=0).astype(np.uint8), probabilities.max(axis=0))
        maps, _ = textures(number)
        classes = linear.predict(maps.reshape(len(maps), -1).T.copy()).numpy().astype(np.uint8)
        tallies["random convolutions"].add(number, truth, classes.reshape(truth.shape))
        tallies["majority class"].add(number, truth, np.full_like(truth, majority))
    return [tally.result(name, name, "baseline") for name, tally in tallies.items()]
