"""Chips and statistics that the tests of the views share."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look at the network when albumentations is imported

import numpy as np
import numpy.typing as npt
import pytest

Image = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def statistics() -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the origin's ten bands, in its order, as reflectance (BigEarthNet)."""
    mean = [0.0430, 0.0614, 0.0590, 0.0951, 0.1792, 0.2075, 0.1594, 0.2219, 0.2266, 0.1009]
    std = [0.0572, 0.0583, 0.0676, 0.0730, 0.1096, 0.1273, 0.1079, 0.1365, 0.1356, 0.0819]
    return mean, std


@pytest.fixture(scope="session")
def chip(statistics: tuple[list[float], list[float]]) -> Image:
    """A smooth chip (10, 48, 48) with texture, and with clouds above reflectance 1."""
    rng = np.random.default_rng(7)
    mean, std = (np.array(values)[:, None, None] for values in statistics)
    y, x = np.mgrid[:48, :48] / 48
    waves = [np.sin(2 * np.pi * (x * rng.uniform(1, 4) + y * rng.uniform(1, 4) + rng.uniform())) for _ in range(10)]
    image = mean + std * (np.stack(waves) + 0.3 * rng.normal(size=(10, 48, 48)))
    image[:, 30:42, 5:20] = 1.25 + 0.1 * rng.normal(size=(10, 12, 15))
    return image.astype(np.float32)
