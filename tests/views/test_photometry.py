import random

import albumentations as A
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ssl_geo.errors import UserError
from ssl_geo.views.photometry import (
    Blur,
    ChannelRepeat,
    Solarize,
    Standardize,
    blur,
    draw_band,
    draw_blur,
    fill_invalid,
    repeat_band,
    solarize,
    standardize,
    standardize_chip,
)

KERNELS = {3: [1, 2, 1], 5: [1, 4, 6, 4, 1], 7: [2, 7, 14, 18, 14, 7, 2]}  # OpenCV's, for sigma from the width


@pytest.fixture
def bright() -> npt.NDArray[np.float32]:
    """Reflectance from -0.02 to 1.6, (20, 24, 5)."""
    return np.random.default_rng(0).uniform(-0.02, 1.6, (20, 24, 5)).astype(np.float32)


@pytest.mark.parametrize("width", [3, 5, 7])
@pytest.mark.parametrize("bands", [0, 1, 3, 10, 13])
def test_blur_is_the_gaussian_mean_with_a_mirrored_edge(width: int, bands: int) -> None:
    shape = (20, 31, bands) if bands else (20, 31)
    image = np.random.default_rng(width).uniform(0, 1.6, shape).astype(np.float32)
    kernel = np.array(KERNELS[width]) / sum(KERNELS[width])
    expected = image.astype(np.float64)
    for axis in (0, 1):
        expected = ndimage.correlate1d(expected, kernel, axis=axis, mode="mirror")
    blurred = blur(image, width)
    assert blurred.dtype == np.float32
    assert blurred.shape == shape
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_blur_widths_are_drawn_as_in_albumentations_1() -> None:
    rng = random.Random(0)
    ours = np.bincount([draw_blur(rng.random) for _ in range(20000)], minlength=8) / 20000
    widths = [width + (width % 2 == 0) for width in (rng.randrange(3, 8) for _ in range(20000))]
    np.testing.assert_allclose(ours, np.bincount(widths, minlength=8) / 20000, atol=0.02)


def test_bands_are_drawn_alike() -> None:
    counts = np.bincount([draw_band(random.Random(seed).random, 10) for seed in range(20000)], minlength=10)
    np.testing.assert_allclose(counts / 20000, 0.1, atol=0.01)
    assert len(counts) == 10


def test_albumentations_clips_where_ours_does_not(bright: npt.NDArray[np.float32]) -> None:
    assert A.GaussianBlur(p=1)(image=bright + 1)["image"].max() == 1
    assert A.Solarize(p=1)(image=bright)["image"].min() == 0
    assert Blur(p=1)(image=bright + 1)["image"].min() > 1
    assert Solarize(p=1)(image=bright)["image"].min() < -0.5


def test_solarize_is_albumentations_within_0_and_1_and_goes_on_in_a_line_above(
    bright: npt.NDArray[np.float32],
) -> None:
    dark = bright / 1.6
    np.testing.assert_array_equal(solarize(dark.clip(0, 1)), A.Solarize(p=1)(image=dark.clip(0, 1))["image"])
    np.testing.assert_array_equal(solarize(bright), np.where(bright >= 0.5, np.float32(1) - bright, bright))
    values = np.array([-0.01, 0.2, 0.5, 0.75, 1.0, 1.25], np.float32)
    assert solarize(values) == pytest.approx([-0.01, 0.2, 0.5, 0.25, 0, -0.25])


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_solarizing_standardized_values_is_standardizing_solarized_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.uniform(-0.05, 1.5, (6, 7, 4)).astype(np.float32)
    mean, std = rng.uniform(0, 0.4, 4).astype(np.float32), rng.uniform(0.02, 0.3, 4).astype(np.float32)
    fast = solarize(standardize(image, mean, std), (1 - 2 * mean) / std)
    np.testing.assert_allclose(fast, standardize(solarize(image), mean, std), atol=2e-5)


def test_a_repeated_band_stands_in_all_channels(bright: npt.NDArray[np.float32]) -> None:
    repeated = repeat_band(bright, 3)
    assert repeated.shape == bright.shape
    for channel in range(5):
        np.testing.assert_array_equal(repeated[..., channel], bright[..., 3])


def test_channel_repeat_takes_each_band_with_its_probability(bright: npt.NDArray[np.float32]) -> None:
    compose = A.Compose([ChannelRepeat(p=0.5)], seed=1)
    bands = []
    for _ in range(2000):
        image = compose(image=bright)["image"]
        same = [band for band in range(5) if np.array_equal(image, repeat_band(bright, band))]
        assert same or np.array_equal(image, bright)
        bands += same
    assert len(bands) / 2000 == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(np.bincount(bands) / len(bands), 0.2, atol=0.05)


def test_fill_puts_the_mean_where_there_is_no_data_and_leaves_the_input() -> None:
    image = np.full((4, 5, 2), np.nan, np.float32)
    valid = np.zeros((4, 5), bool)
    valid[1:3] = True
    image[valid] = (0.1, 0.2)
    before = image.copy()
    filled = fill_invalid(image, valid, [0.3, 0.4])
    np.testing.assert_array_equal(filled[valid], np.tile(np.array([0.1, 0.2], np.float32), (10, 1)))
    np.testing.assert_array_equal(filled[~valid], np.tile(np.array([0.3, 0.4], np.float32), (10, 1)))
    np.testing.assert_array_equal(image, before)
    assert fill_invalid(filled, np.ones((4, 5), bool), [0.3, 0.4]) is filled


def test_standardize_is_albumentations_normalize_and_0_without_data(bright: npt.NDArray[np.float32]) -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.25]
    expected = A.Normalize(mean=mean, std=std, max_pixel_value=1.0)(image=bright)["image"]
    np.testing.assert_allclose(standardize(bright, mean, std), expected, rtol=1e-4, atol=1e-5)
    mask = np.ones((20, 24), np.uint8)
    mask[3:9] = 0
    sample = A.Compose([Standardize(mean, std)])(image=bright, mask=mask)
    assert sample["image"].dtype == np.float32
    np.testing.assert_array_equal(sample["image"][3:9], 0)
    np.testing.assert_allclose(sample["image"][9:], expected[9:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(Standardize(mean, std)(image=bright)["image"], standardize(bright, mean, std))


def test_a_whole_chip_is_standardized_channels_first_as_its_pixels_are(bright: npt.NDArray[np.float32]) -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.25]
    valid = np.ones((20, 24), bool)
    valid[3:9, 5:] = False
    chip = bright.transpose(2, 0, 1).copy()
    chip[:, ~valid] = np.nan
    before = chip.copy()
    expected = standardize(bright, mean, std, valid).transpose(2, 0, 1)
    np.testing.assert_array_equal(standardize_chip(chip, valid, mean, std), expected)
    np.testing.assert_array_equal(chip, before)


def test_standardized_chips_are_finite_or_refused():
    """A NaN or a subnormal in the statistics made every pixel NaN or infinite."""
    image, valid = np.full((2, 4, 4), 1e6, np.float32), np.ones((4, 4), bool)
    image[0, 1, 1], valid[1, 1] = -3.4028234663852886e38, False
    found = standardize_chip(image, valid, [0.1, 0.2], [1e-30, 0.1])
    assert np.isfinite(found).all()
    assert (found[:, 1, 1] == 0).all()
    for mean, std in [
        (np.nan, 0.1),
        (np.inf, 0.1),
        (0.1, 0.0),
        (0.1, -1.0),
        (0.1, 1e-40),
        (0.1, np.nan),
        (0.1, np.inf),
    ]:
        with pytest.raises(UserError, match="statistics"):
            standardize_chip(image, valid, [0.1, mean], [0.1, std])
