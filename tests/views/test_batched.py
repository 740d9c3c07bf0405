from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ssl_geo.views.batched import BatchedMultiCrop, ChipBatch, draw_table, mirror
from ssl_geo.views.geometry import Matrix
from ssl_geo.views.multicrop import MultiCrop, ViewDraw, ViewRecipe

Chips = npt.NDArray[Any]
Statistics = tuple[list[float], list[float]]

ALL = ViewRecipe((20, 28), (0.2, 1.0), channel_repeat=0.5, rotate90=0.5, blur=0.6, solarize=0.5)
RECIPES = [
    ALL,
    replace(ALL, size=(33, 16), channel_repeat=1.0, blur=1.0, solarize=0.0),
    replace(ALL, channel_repeat=0.0, blur=0.0),
    ViewRecipe((24, 24), (0.05, 0.4)),
    ViewRecipe((2, 3), (0.5, 1.0), blur=1.0),  # narrower than a kernel
]
SCALE, OFFSET = 1e-4, -1000.0
KERNELS = {0: [1], 3: [1, 2, 1], 5: [1, 4, 6, 4, 1], 7: [2, 7, 14, 18, 14, 7, 2]}


@pytest.fixture
def crops(statistics: Statistics) -> MultiCrop:
    return MultiCrop(*statistics, global_views=RECIPES)


@pytest.fixture
def reflectance(chip: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Six chips (6, 10, 48, 41) that differ; smooth, with clouds above reflectance 1."""
    smooth = ndimage.gaussian_filter(chip, (0, 1, 1))[:, :, :41]
    return np.stack([np.roll(smooth, 7 * n, axis=n % 3) for n in range(6)])


def stored(reflectance: npt.NDArray[np.float32], dtype: type) -> Chips:
    dn = reflectance / SCALE - OFFSET
    return dn.astype(dtype) if np.issubdtype(dtype, np.floating) else dn.round().astype(dtype)


def draws(crops: MultiCrop, shape: tuple[int, ...], count: int) -> list[list[ViewDraw]]:
    return [crops.draw(*shape[-2:], seed=3, epoch=1, chip=n) for n in range(count)]


def batch(dn: Chips, valid: npt.NDArray[np.bool_], drawn: list[list[ViewDraw]]) -> ChipBatch:
    units = torch.tensor([[SCALE, OFFSET]] * len(dn)).unbind(1)
    table = np.stack([draw_table(each) for each in drawn])
    return ChipBatch(torch.from_numpy(dn), torch.from_numpy(valid), *units, torch.from_numpy(table))


def holes(shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    valid = np.random.default_rng(0).random(shape) > 0.02
    valid[:, : shape[1] // 3, : shape[2] // 2] = False
    valid[0] = True
    return valid


def positions(matrix: Matrix, size: tuple[int, int]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    a, b, c, d, e, f = matrix
    v, u = np.mgrid[: size[0], : size[1]]
    return a * u + b * v + c, d * u + e * v + f


def clear_of_ties(matrix: Matrix, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Where the nearest pixel is not a matter of rounding."""
    x, y = positions(matrix, size)
    return (np.abs(x % 1 - 0.5) > 1 / 64) & (np.abs(y % 1 - 0.5) > 1 / 64)


def reference(
    pixels: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_], draw: ViewDraw, size: tuple[int, int], crops: Any
) -> npt.NDArray[np.float64]:
    """The recipe step by step in double precision, channel-repeat to standardizing, in reflectance."""
    mean, std = (values.astype(np.float64)[:, None, None] for values in (crops.mean, crops.std))
    pixels = np.where(valid, pixels, mean)
    if draw.band is not None:
        pixels = np.repeat(pixels[draw.band : draw.band + 1], len(pixels), axis=0)
    x, y = positions(draw.matrix, size)
    view = np.stack([ndimage.map_coordinates(band, [y, x], order=1, mode="mirror") for band in pixels])
    kernel = np.array(KERNELS[draw.blur]) / sum(KERNELS[draw.blur])
    for axis in (1, 2):
        view = ndimage.correlate1d(view, kernel, axis=axis, mode="mirror")
    if draw.solarize:
        view = np.where(view >= 0.5, 1 - view, view)
    shown = ndimage.map_coordinates(valid.astype(np.uint8), [y, x], order=0, mode="mirror").astype(bool)
    return np.where(shown, (view - mean) / std, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("missing", [False, True])
def test_views_are_the_recipe_in_double_precision(
    crops: MultiCrop, reflectance: npt.NDArray[np.float32], dtype: type, missing: bool
) -> None:
    dn = stored(reflectance, np.uint16) // 64 if dtype is np.uint8 else stored(reflectance, dtype)
    dn = dn.astype(dtype)
    valid = holes(dn[:, 0].shape) if missing else np.ones(dn[:, 0].shape, bool)
    pixels = (dn.astype(np.float64) + OFFSET) * SCALE
    if dtype is np.float32:
        dn.transpose(0, 2, 3, 1)[~valid] = np.nan
    drawn = draws(crops, dn.shape, len(dn))
    views = BatchedMultiCrop(crops, "cpu")(batch(dn, valid, drawn))
    for i, recipe in enumerate(RECIPES):
        assert views[i].shape == (len(dn), 10, *recipe.size)
        assert views[i].dtype == torch.float32
        for n in range(len(dn)):
            expected = reference(np.nan_to_num(pixels[n]), valid[n], drawn[n][i], recipe.size, crops)
            clear = clear_of_ties(drawn[n][i].matrix, recipe.size)
            np.testing.assert_allclose(views[i][n].numpy()[:, clear], expected[:, clear], atol=3e-4)
    # chance took every way
    kinds = {(d.band is None, d.blur, d.solarize) for chip in drawn for d in chip}
    assert {blur for _, blur, _ in kinds} == {0, 3, 5, 7}
    assert {band for band, _, _ in kinds} == {solarized for _, _, solarized in kinds} == {True, False}


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("missing", [False, True])
def test_views_are_those_of_the_cpu(
    crops: MultiCrop, reflectance: npt.NDArray[np.float32], dtype: type, missing: bool
) -> None:
    dn = stored(reflectance, dtype)
    valid = holes(dn[:, 0].shape) if missing else np.ones(dn[:, 0].shape, bool)
    if dtype is np.float32:
        dn.transpose(0, 2, 3, 1)[~valid] = np.nan
    drawn = draws(crops, dn.shape, len(dn))
    views = BatchedMultiCrop(crops, "cpu")(batch(dn, valid, drawn))
    # OpenCV rounds x and y to the nearest 1/32 pixel, so by 1/64 at most (and in sums of two terms, each to 1/1024).
    filled = np.where(valid[:, None], reflectance, crops.mean[:, None, None])
    slope = sum(float(np.abs(np.diff(filled, axis=axis)).max()) for axis in (2, 3))
    tolerance = (1 / 64 + 1 / 512) * slope / float(crops.std.min()) + 2e-3
    for n in range(len(dn)):
        expected = crops(dn[n], valid[n], SCALE, OFFSET, seed=3, epoch=1, chip=n)
        for i, view in enumerate(expected):
            clear = clear_of_ties(drawn[n][i].matrix, view.shape[1:])
            got = views[i][n].numpy()
            np.testing.assert_allclose(got[:, clear], view[:, clear], atol=tolerance)
            assert np.abs(got - view)[:, clear].mean() < tolerance / 8
            np.testing.assert_array_equal((got == 0).all(0)[clear], (view == 0).all(0)[clear])


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 9), reach=st.integers(0, 40))
def test_positions_beyond_the_edge_are_mirrored(count: int, reach: int) -> None:
    expected = np.pad(np.arange(count), reach, mode="reflect")
    np.testing.assert_array_equal(mirror(torch.arange(-reach, count + reach), count), expected)


def test_chips_of_one_batch_keep_their_own_units(crops: MultiCrop, reflectance: npt.NDArray[np.float32]) -> None:
    valid = np.ones(reflectance[:, 0].shape, bool)
    drawn = draws(crops, reflectance.shape, 6)
    batched = BatchedMultiCrop(crops, "cpu")
    expected = batched(batch(stored(reflectance, np.float32), valid, drawn))
    dn, scale, offset = np.empty_like(reflectance), torch.empty(6), torch.empty(6)
    for n in range(6):
        scale[n], offset[n] = 2e-4 * (n + 1), 50.0 * n
        dn[n] = reflectance[n] / float(scale[n]) - float(offset[n])
    chips = batch(dn, valid, drawn)._replace(scale=scale, offset=offset)
    for view, other in zip(batched(chips), expected, strict=True):
        torch.testing.assert_close(view, other, atol=1e-3, rtol=0)
