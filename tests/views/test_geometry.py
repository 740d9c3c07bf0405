import math
import random

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ssl_geo.views.geometry import (
    Geometry,
    Matrix,
    ViewWarp,
    draw_box,
    draw_geometry,
    happens,
    view_matrix,
    warp,
    warp_valid,
)

PROBABILITIES = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "rotate90": 1.0, "shift_scale_rotate": 0.5}
ORIGIN = {"horizontal_flip": 0.5, "vertical_flip": 0.0, "rotate90": 0.0, "shift_scale_rotate": 0.5}


def some_geometry(seed: int, height: int, width: int) -> Geometry:
    uniform = random.Random(seed).random
    return draw_geometry(uniform, height, width, scale=(0.1, 1.0), ratio=(3 / 4, 4 / 3), **PROBABILITIES)


def coordinates(height: int, width: int) -> npt.NDArray[np.float32]:
    """An image whose pixels hold their own x and y."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([x, y], axis=-1)


def source(matrix: Matrix, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """x and y in the chip of each pixel of the view, (h, w, 2)."""
    a, b, c, d, e, f = matrix
    v, u = np.mgrid[: size[0], : size[1]]
    return np.stack([a * u + b * v + c, d * u + e * v + f], axis=-1)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(24, 64),
    width=st.integers(24, 64),
    size=st.tuples(st.integers(8, 48), st.integers(8, 48)),
)
def test_one_warp_shows_what_the_plain_steps_of_albumentations_show(
    seed: int, height: int, width: int, size: tuple[int, int]
) -> None:
    geometry = some_geometry(seed, height, width)
    # albumentations 2.0.8 shifts by whole pixels only
    geometry = geometry._replace(shift=(round(geometry.shift[0]), round(geometry.shift[1])))
    left, top, box_width, box_height = geometry.box
    flips = A.Compose([A.HorizontalFlip(p=geometry.horizontal_flip), A.VerticalFlip(p=geometry.vertical_flip)])
    affine = A.Affine(
        scale=(geometry.zoom, geometry.zoom),
        rotate=(geometry.angle, geometry.angle),
        translate_px={"x": int(geometry.shift[0]), "y": int(geometry.shift[1])},
        border_mode=cv2.BORDER_REFLECT_101,
        p=1,
    )
    crop = A.Crop(left, top, left + box_width, top + box_height)
    plain = flips(image=coordinates(height, width))["image"]
    plain = np.rot90(plain, geometry.quarter_turns)
    plain = A.Compose([affine, crop, A.Resize(*size)])(image=plain)["image"]

    matrix = view_matrix(geometry, height, width, size)
    view = warp(coordinates(height, width), matrix, size)

    at = source(matrix, size)
    inside = ((at >= 1) & (at <= (width - 2, height - 2))).all(-1)
    np.testing.assert_allclose(view[inside], at[inside], atol=1 / 32)
    # The plain recipe repeats the box's outermost pixels where the resize looks beyond their centres.
    u, v = (np.arange(size[1]) + 0.5) * box_width / size[1], (np.arange(size[0]) + 0.5) * box_height / size[0]
    inside &= ((v > 0.5) & (v < box_height - 0.5))[:, None] & ((u > 0.5) & (u < box_width - 0.5))[None]
    # ... and has blended with what the mirror shows where its two interpolations reach over the chip's edge.
    reach = 1 + 1 / geometry.zoom
    inside &= ((at >= reach) & (at <= (width - 1 - reach, height - 1 - reach))).all(-1)
    np.testing.assert_allclose(view[inside], plain[inside], atol=0.08)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
def test_flips_turns_and_crops_at_full_resolution_move_pixels_unchanged(
    turns: int, horizontal: bool, vertical: bool
) -> None:
    image = np.random.default_rng(0).random((20, 31, 3), dtype=np.float32)
    expected = image[:, ::-1] if horizontal else image
    expected = np.rot90(expected[::-1] if vertical else expected, turns)[2:14, 5:15]
    geometry = Geometry(horizontal, vertical, turns, (0.0, 0.0), 1.0, 0.0, (5, 2, 10, 12))
    np.testing.assert_array_equal(warp(image, view_matrix(geometry, 20, 31, (12, 10)), (12, 10)), expected)


@pytest.mark.parametrize("bands", [1, 3, 10, 13])
@pytest.mark.parametrize("size", [(24, 24), (17, 40)])
def test_warp_interpolates_linearly_and_mirrors_at_the_edge(bands: int, size: tuple[int, int]) -> None:
    image = np.random.default_rng(bands).random((30, 36, bands), dtype=np.float32)
    for seed in range(8):
        matrix = view_matrix(some_geometry(seed, 30, 36), 30, 36, size)
        x, y = np.moveaxis(source(matrix, size), -1, 0)
        expected = [ndimage.map_coordinates(image[..., band], [y, x], order=1, mode="mirror") for band in range(bands)]
        view = warp(image, matrix, size)
        assert view.shape == (*size, bands)
        assert view.dtype == np.float32
        np.testing.assert_allclose(view, np.stack(expected, -1), atol=2 / 32)  # OpenCV rounds x and y to 1/32 pixel


def test_validity_follows_the_nearest_pixel() -> None:
    valid = np.random.default_rng(1).random((30, 36)) > 0.3
    for seed in range(20):
        matrix = view_matrix(some_geometry(seed, 30, 36), 30, 36, (24, 20))
        x, y = np.moveaxis(source(matrix, (24, 20)), -1, 0)
        expected = ndimage.map_coordinates(valid.astype(np.uint8), [y, x], order=0, mode="mirror").astype(bool)
        # pixels half way between two centres may fall to either
        clear = (np.abs(x % 1 - 0.5) > 1 / 16) & (np.abs(y % 1 - 0.5) > 1 / 16)
        shown = warp_valid(valid, matrix, (24, 20))
        assert shown.dtype == np.bool_
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(shown[clear], expected[clear])


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (120, 120, (0.4, 1.0), (3 / 4, 4 / 3)),
        (120, 120, (0.05, 0.4), (3 / 4, 4 / 3)),
        (64, 100, (0.4, 1.0), (3 / 4, 4 / 3)),
        (40, 200, (0.8, 1.0), (3 / 4, 4 / 3)),  # too wide: the centred box
        (200, 40, (0.8, 1.0), (3 / 4, 4 / 3)),  # too high
        (50, 50, (1.0, 1.0), (1.0, 1.0)),
    ],
)
def test_boxes_are_those_of_albumentations_from_the_same_random_numbers(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    reference = A.RandomResizedCrop((8, 8), scale=scale, ratio=ratio)
    reference.set_random_state(np.random.default_rng(0), random.Random(5))
    uniform = random.Random(5).random
    for _ in range(3000):
        left, top, right, bottom = reference.get_params_dependent_on_data({"shape": (height, width)}, {})["crop_coords"]
        assert draw_box(uniform, height, width, scale, ratio) == (left, top, right - left, bottom - top)


def test_steps_are_drawn_as_often_and_as_far_as_the_recipe_says() -> None:
    uniform = random.Random(3).random
    count = 8000
    drawn = [
        draw_geometry(uniform, 100, 160, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3), **PROBABILITIES) for _ in range(count)
    ]
    tolerance = 4 * math.sqrt(0.25 / count)
    assert np.mean([g.horizontal_flip for g in drawn]) == pytest.approx(0.5, abs=tolerance)
    assert np.mean([g.vertical_flip for g in drawn]) == pytest.approx(0.5, abs=tolerance)
    assert np.bincount([g.quarter_turns for g in drawn]) / count == pytest.approx([0.25] * 4, abs=tolerance)
    moved = [g for g in drawn if g.angle]
    assert len(moved) / count == pytest.approx(0.5, abs=tolerance)
    for values, limit, centre in (
        ([g.angle for g in moved], 45, 0),
        ([g.zoom for g in moved], 0.1, 1),
        ([g.shift[0] / (100 if g.quarter_turns % 2 else 160) for g in moved], 0.0625, 0),
        ([g.shift[1] / (160 if g.quarter_turns % 2 else 100) for g in moved], 0.0625, 0),
    ):
        values_array = (np.array(values) - centre) / limit
        assert np.abs(values_array).max() == pytest.approx(1, abs=0.01)
        assert np.abs(values_array).max() <= 1
        assert values_array.mean() == pytest.approx(0, abs=4 / math.sqrt(3 * len(moved)))
        assert values_array.var() == pytest.approx(1 / 3, rel=0.06)


def test_the_origins_recipe_neither_turns_nor_flips_upside_down() -> None:
    uniform = random.Random(4).random
    drawn = [draw_geometry(uniform, 50, 50, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3), **ORIGIN) for _ in range(500)]
    assert not any(g.vertical_flip or g.quarter_turns for g in drawn)
    assert any(g.horizontal_flip for g in drawn)


def test_certain_outcomes_take_no_random_number() -> None:
    def fail() -> float:
        raise AssertionError("drew a number")

    assert happens(fail, 1.0)
    assert not happens(fail, 0.0)
    assert happens(lambda: 0.29, 0.3)
    assert not happens(lambda: 0.3, 0.3)


def test_view_warp_composes_draws_from_albumentations_and_keeps_image_and_mask_together() -> None:
    image = coordinates(40, 60)
    mask = (image[..., 0] > 30).astype(np.uint8)
    compose = A.Compose([ViewWarp((24, 32), scale=(0.2, 0.8))], seed=11)
    again = A.Compose([ViewWarp((24, 32), scale=(0.2, 0.8))], seed=11)
    seen = []
    for _ in range(20):
        sample = compose(image=image, mask=mask)
        assert sample["image"].shape == (24, 32, 2)
        assert sample["mask"].shape == (24, 32)
        clear = np.abs(sample["image"][..., 0] - 30.5) > 0.6
        np.testing.assert_array_equal(sample["mask"][clear], sample["image"][..., 0][clear] > 30.5)
        np.testing.assert_array_equal(sample["image"], again(image=image, mask=mask)["image"])
        seen.append(sample["image"].tobytes())
    assert len(set(seen)) == 20
