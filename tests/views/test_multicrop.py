import pickle
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from ssl_geo.errors import UserError
from ssl_geo.views.multicrop import UNIFORMS_PER_VIEW, MultiCrop, ViewRecipe, default_recipes, draw_view
from ssl_geo.views.photometry import fill_invalid

Image = npt.NDArray[np.float32]
Statistics = tuple[list[float], list[float]]

keys = st.tuples(st.integers(0, 2**63), st.integers(0, 10**4), st.integers(0, 10**9))
# A view of everything: each step is taken or left by chance.
BUSY = ViewRecipe((20, 28), (0.2, 1.0), channel_repeat=0.5, blur=0.5, solarize=0.5, rotate90=0.5)


class Numbers(random.Random):
    """albumentations' generator, made to give the numbers of one row of a table."""

    row: Iterator[float] = iter(())

    def random(self) -> float:
        return next(self.row)


def make(statistics: Statistics, *recipes: ViewRecipe, bands: int = 10) -> MultiCrop:
    mean, std = ((values * 2)[:bands] for values in statistics)
    return MultiCrop(mean, std, global_views=recipes)


def all_valid(image: Image) -> npt.NDArray[np.bool_]:
    return np.ones(image.shape[1:], bool)


def holes(seed: int, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Validity with a missing corner and missing spots."""
    valid = np.random.default_rng(seed).random(shape) > 0.02
    valid[: shape[0] // 3, : shape[1] // 2] = False
    return valid


# ------------------------------------------------------------------------------------------------ what is drawn


def test_views_depend_on_seed_epoch_chip_and_nothing_else(statistics: Statistics, chip: Image) -> None:
    recipes = [BUSY, replace(BUSY, size=(16, 16))]
    wanted = [(seed, epoch, number) for seed in (0, 5) for epoch in (0, 1) for number in range(6)]
    first = make(statistics, *recipes)

    def views(crop: MultiCrop, key: tuple[int, int, int]) -> bytes:
        seed, epoch, number = key
        return b"".join(v.tobytes() for v in crop(chip, all_valid(chip), seed=seed, epoch=epoch, chip=number))

    in_order = {key: views(first, key) for key in wanted}
    shuffled = wanted * 2
    random.Random(0).shuffle(shuffled)
    restored = pickle.loads(pickle.dumps(first))
    with ThreadPoolExecutor(4) as pool:
        for key, result in zip(shuffled, pool.map(lambda key: views(first, key), shuffled), strict=True):
            assert result == in_order[key]
            assert views(restored, key) == in_order[key]
    assert len(set(in_order.values())) == len(wanted)


def test_no_global_random_state_is_used_or_moved(statistics: Statistics, chip: Image) -> None:
    crop = make(statistics, BUSY)
    random.seed(1)
    legacy = np.random.mtrand._rand
    python, numpy = random.getstate(), pickle.dumps(legacy.get_state())
    one = crop(chip, all_valid(chip), seed=1, epoch=2, chip=3)[0]
    assert random.getstate() == python
    assert pickle.dumps(legacy.get_state()) == numpy
    random.seed(2)
    legacy.seed(2)
    np.testing.assert_array_equal(crop(chip, all_valid(chip), seed=1, epoch=2, chip=3)[0], one)


@settings(deadline=None)
@given(first=keys, second=keys)
def test_other_keys_draw_other_views(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    assume(first != second)
    crop = MultiCrop([0.1], [0.1], global_views=[BUSY] * 3)
    one, other = (crop.draw(50, 60, seed=key[0], epoch=key[1], chip=key[2]) for key in (first, second))
    matrices = [draw.matrix for draw in one + other]
    assert len(set(matrices)) == 6


@settings(deadline=None)
@given(key=keys, count=st.integers(1, 9))
def test_a_view_does_not_depend_on_how_many_others_there_are(key: tuple[int, int, int], count: int) -> None:
    draws = [
        MultiCrop([0.1], [0.1], global_views=[BUSY] * n).draw(50, 60, seed=key[0], epoch=key[1], chip=key[2])
        for n in (count, 10)
    ]
    assert draws[0] == draws[1][:count]


def test_draws_are_uncorrelated_between_views_chips_epochs_and_seeds() -> None:
    crop = MultiCrop([0.1], [0.1], global_views=[BUSY] * 2)
    count = 3000
    base = {"seed": 0, "epoch": 0}

    def centres(view: int, **step: int) -> npt.NDArray[np.float64]:
        draws = [crop.draw(64, 64, **(base | {"chip": n} | step))[view].matrix for n in range(count)]
        return np.array([m[0] * 14 + m[1] * 10 + m[2] for m in draws])

    reference = centres(0)
    neighbours = np.array([crop.draw(64, 64, seed=0, epoch=0, chip=n + 1)[0].matrix for n in range(count)])
    others = [centres(1), centres(0, epoch=1), centres(0, seed=1), neighbours @ [14, 10, 1, 0, 0, 0]]
    for other in others:
        assert abs(np.corrcoef(reference, other)[0, 1]) < 4 / np.sqrt(count)


@settings(deadline=None)
@given(
    numbers=st.randoms(use_true_random=False),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
    ratio=st.floats(0.02, 20),
)
def test_a_view_never_runs_out_of_numbers(numbers: random.Random, scale: tuple[float, float], ratio: float) -> None:
    recipe = replace(BUSY, scale=scale, ratio=(ratio, ratio * 1.5))
    row = iter([numbers.random() for _ in range(UNIFORMS_PER_VIEW)])
    draw_view(recipe, row.__next__, 10, 40, 60)


# ---------------------------------------------------------------------------------------- against slow references


@pytest.mark.parametrize("bands", [1, 2, 3, 10, 13])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("channel_repeat", [0.0, 0.5, 1.0])
def test_views_are_the_recipes_pipeline_of_albumentations(
    statistics: Statistics, chip: Image, bands: int, missing: bool, channel_repeat: float
) -> None:
    image = ndimage.gaussian_filter(np.concatenate([chip, chip])[:bands, :, :41], (0, 1, 1))
    recipes = [
        replace(BUSY, channel_repeat=channel_repeat),
        replace(BUSY, channel_repeat=channel_repeat, size=(33, 16), solarize=1.0, blur=1.0),
    ]
    crop = make(statistics, *recipes, bands=bands)
    mean, std = crop.mean.tolist(), crop.std.tolist()
    valid = holes(bands, image.shape[1:]) if missing else all_valid(image)
    pixels = fill_invalid(image.transpose(1, 2, 0), valid, mean)
    pipelines = [recipe.as_compose(mean, std) for recipe in recipes]
    # OpenCV rounds x and y to 1/32 pixel, but not for a single channel: a repeated band is warped alone here, with
    # all channels there.
    slope = max(float(np.abs(np.diff(pixels, axis=axis)).max()) for axis in (0, 1))
    tolerance = 2e-4 + (2 / 64 * slope / min(std) if channel_repeat else 0)
    for number in range(12):
        views = crop(image, valid, seed=3, epoch=1, chip=number)
        table = np.random.default_rng((3, 1, number)).random((2, UNIFORMS_PER_VIEW))
        for view, pipeline, row in zip(views, pipelines, table, strict=True):
            numbers = Numbers()
            numbers.row = iter(row.tolist())
            for step in pipeline.transforms:
                step.set_random_state(np.random.default_rng(0), numbers)
            expected = pipeline(image=pixels, mask=valid.astype(np.uint8))
            np.testing.assert_allclose(view, expected["image"].transpose(2, 0, 1), atol=tolerance)
            if missing:
                np.testing.assert_array_equal(view[:, expected["mask"] == 0], 0)


class Channelaug(A.ImageOnlyTransform):
    """The origin's: one random band in all channels."""

    def apply(self, img: Image, **params: Any) -> Image:
        band = img[:, :, self.py_random.randint(0, img.shape[2] - 1), np.newaxis]
        return np.repeat(band, img.shape[2], axis=2)


def plain_pipeline(recipe: ViewRecipe) -> A.Compose:
    """The origin's recipe for one view, plainly, on albumentations 2.0.8."""
    return A.Compose(
        [
            Channelaug(p=recipe.channel_repeat),
            A.HorizontalFlip(p=recipe.horizontal_flip),
            A.Affine(  # ShiftScaleRotate of albumentations 1.x: one scale for both axes, mirrored at the edge
                scale=(0.9, 1.1),
                translate_percent={"x": (-0.0625, 0.0625), "y": (-0.0625, 0.0625)},
                rotate=(-45, 45),
                keep_ratio=True,
                border_mode=cv2.BORDER_REFLECT_101,
                p=recipe.shift_scale_rotate,
            ),
            A.RandomResizedCrop(recipe.size, scale=recipe.scale, ratio=recipe.ratio),
            A.GaussianBlur(blur_limit=(5, 5), sigma_limit=(1.1, 1.1), p=recipe.blur),
            A.Solarize(threshold_range=(0.5, 0.5), p=recipe.solarize),
        ],
        seed=5,
    )


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_views_have_the_statistics_of_the_plain_recipe(scale: tuple[float, float]) -> None:
    """Over thousands of draws: where views lie, how far they reach, their means and spread."""
    count = 3000
    y, x = np.mgrid[:64, :64].astype(np.float32) / 63
    bright = 0.4 + 0.2 * np.sin(11 * x + 5 * y) + 0.15 * np.cos(7 * y)
    image = np.stack([x, y, bright.astype(np.float32)])
    recipe = ViewRecipe((24, 24), scale, vertical_flip=0, rotate90=0, blur=0.5, solarize=0.2)
    crop = MultiCrop([0.0] * 3, [1.0] * 3, global_views=[recipe])
    pipeline = plain_pipeline(recipe)
    pixels = image.transpose(1, 2, 0).copy()
    ours = np.stack([crop(image, all_valid(image), seed=0, epoch=0, chip=n)[0] for n in range(count)])
    plain = np.stack([pipeline(image=pixels)["image"].transpose(2, 0, 1) for _ in range(count)])
    for channel in range(3):
        one, other = (
            [values.mean((1, 2)), values.std((1, 2)), *np.percentile(values, (10, 50, 90), axis=(1, 2))]
            for values in (ours[:, channel], plain[:, channel])
        )
        for statistic, pair in enumerate(zip(one, other, strict=True)):
            assert stats.ks_2samp(*pair).pvalue > 1e-3, (channel, statistic)
    slopes = [np.diff(views[:, 0], axis=2).mean((1, 2)) for views in (ours, plain)]  # sign: flips, size: resolution
    assert stats.ks_2samp(*slopes).pvalue > 1e-3


def test_views_are_repeated_blurred_and_solarized_as_often_as_in_the_plain_recipe() -> None:
    """Alone and together, told from the values: the whole chip, so that nothing but these three changes them."""
    count, channels = 3000, 4
    recipe = ViewRecipe(
        (16, 16), (1.0, 1.0), ratio=(1.0, 1.0), channel_repeat=0.3, vertical_flip=0, rotate90=0, shift_scale_rotate=0,
        blur=0.5, solarize=0.2,
    )  # fmt: skip
    image = np.random.default_rng(0).uniform(0.55, 0.95, (channels, 16, 16)).astype(np.float32)
    crop = MultiCrop([0.0] * channels, [1.0] * channels, global_views=[recipe])
    pipeline = plain_pipeline(recipe)
    pixels = image.transpose(1, 2, 0).copy()
    ours = np.stack([crop(image, all_valid(image), seed=0, epoch=0, chip=n)[0] for n in range(count)])
    plain = np.stack([pipeline(image=pixels)["image"].transpose(2, 0, 1) for _ in range(count)])
    tables = []
    for views in (ours, plain):
        repeated = np.ptp(views, axis=1).max((1, 2)) < 1e-5
        blurred = views.std((1, 2, 3)) < 0.8 * image.std()
        solarized = views.mean((1, 2, 3)) < 0.5
        tables.append(np.bincount(repeated + 2 * blurred + 4 * solarized, minlength=8))
    assert stats.chi2_contingency(tables).pvalue > 1e-3
    for table in tables:
        assert (
            stats.chisquare(table, count * np.outer([0.8, 0.2], np.outer([0.5] * 2, [0.7, 0.3])).ravel()).pvalue > 1e-3
        )
    # which band is shown, and which way round
    kinds = []
    for views in (ours, plain):
        same = [np.abs(views - shown).max((1, 2, 3)) < 1e-5 for band in image for shown in (band, band[:, ::-1])]
        kinds.append(np.array(same).sum(1))
    assert stats.chi2_contingency(kinds).pvalue > 1e-3
    assert min(kinds[0]) > 0


# ------------------------------------------------------------------------------------------------- what comes out


@settings(deadline=None, max_examples=40)
@given(
    bands=st.integers(1, 13),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    shape=st.tuples(st.integers(8, 50), st.integers(8, 50)),
    seed=st.integers(0, 99),
)
def test_any_number_of_bands_and_views_of_any_size(
    bands: int, sizes: list[tuple[int, int]], shape: tuple[int, int], seed: int
) -> None:
    image = np.random.default_rng(seed).uniform(0, 1.4, (bands, *shape)).astype(np.float32)
    before = image.copy()
    crop = MultiCrop([0.1] * bands, [0.1] * bands, global_views=[replace(BUSY, size=size) for size in sizes])
    valid = holes(seed, shape) if seed % 2 else all_valid(image)
    views = crop(image, valid, seed=seed, epoch=0, chip=0)
    kept = [view.copy() for view in views]
    crop(image, valid, seed=seed, epoch=0, chip=1)
    assert [view.shape for view in views] == [(bands, *size) for size in sizes]
    for view, copy in zip(views, kept, strict=True):
        assert view.dtype == np.float32
        assert view.transpose(1, 2, 0).flags.c_contiguous
        assert np.isfinite(view).all()
        np.testing.assert_array_equal(view, copy)  # a later call leaves the views of an earlier one alone
    np.testing.assert_array_equal(image, before)


def test_views_are_written_where_asked_and_nowhere_else(statistics: Statistics, chip: Image) -> None:
    recipes = [BUSY, replace(BUSY, channel_repeat=1.0, solarize=1.0), replace(BUSY, size=(1, 5), blur=1.0)]
    crop = make(statistics, *recipes)
    for number in range(20):
        batch = [np.full((3, *recipe.size, 10), -9, np.float32) for recipe in recipes]
        valid = holes(number, chip.shape[1:]) if number % 2 else all_valid(chip)
        views = crop(chip, valid, seed=0, epoch=0, chip=number, out=[memory[1] for memory in batch])
        expected = crop(chip, valid, seed=0, epoch=0, chip=number)
        for view, other, memory in zip(views, expected, batch, strict=True):
            np.testing.assert_array_equal(view, other)
            np.testing.assert_array_equal(memory[1].transpose(2, 0, 1), other)
            np.testing.assert_array_equal(memory[::2], -9)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_chips_as_stored_give_the_views_of_their_reflectance(statistics: Statistics, chip: Image, dtype: type) -> None:
    scale, offset = (1e-2, -10.0) if dtype is np.uint8 else (1e-4, -1000.0)
    dn = (chip / scale - offset).clip(0, None).round().astype(dtype)
    reflectance = ((dn + np.float64(offset)) * scale).astype(np.float32)
    crop = make(statistics, BUSY, BUSY)
    for number in range(6):
        views = crop(dn, all_valid(chip), scale, offset, seed=0, epoch=0, chip=number)
        expected = crop(reflectance, all_valid(chip), seed=0, epoch=0, chip=number)
        np.testing.assert_allclose(views, expected, atol=5e-5)


def test_reflectance_above_1_stays(statistics: Statistics) -> None:
    image = np.full((10, 30, 30), 1.5, np.float32)
    recipes = [ViewRecipe((20, 20), (0.4, 1.0), blur=1.0), ViewRecipe((20, 20), (0.4, 1.0), blur=1.0, solarize=1.0)]
    crop = make(statistics, *recipes)
    bright, solarized = crop(image, all_valid(image), seed=0, epoch=0, chip=0)
    mean, std = crop.mean[:, None, None], crop.std[:, None, None]
    np.testing.assert_allclose(bright * std + mean, 1.5, atol=1e-4)
    np.testing.assert_allclose(solarized * std + mean, -0.5, atol=1e-4)


@pytest.mark.parametrize("channel_repeat", [0.0, 1.0])
def test_a_repeated_band_is_standardized_with_the_statistics_of_each_channel(
    statistics: Statistics, chip: Image, channel_repeat: float
) -> None:
    crop = make(statistics, replace(BUSY, channel_repeat=channel_repeat, solarize=0.0))
    for number in range(20):
        (view,) = crop(chip, all_valid(chip), seed=0, epoch=0, chip=number)
        reflectance = view * crop.std[:, None, None] + crop.mean[:, None, None]
        assert np.allclose(reflectance, reflectance[:1], atol=1e-4) == bool(channel_repeat)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), nodata=st.sampled_from([0.0, np.nan, -0.1, 6.5535, np.inf, -3.4e38]))
def test_nodata_is_the_mean_and_never_darkens_its_neighbours(seed: int, nodata: float) -> None:
    mean, std = np.linspace(0.05, 0.2, 4), np.full(4, 0.05)
    image = np.full((4, 40, 40), 0.3, np.float32)
    valid = holes(seed, (40, 40))
    image[:, ~valid] = nodata
    recipes = [
        ViewRecipe((24, 24), (0.4, 1.0), channel_repeat=repeat, blur=1.0, shift_scale_rotate=1.0)
        for repeat in (0.0, 1.0)
    ]
    crop = MultiCrop(mean.tolist(), std.tolist(), global_views=recipes)
    plain, repeated = crop(image, valid, seed=seed, epoch=0, chip=0)
    ground = (0.3 - mean) / std
    # Every pixel lies between the mean (0) and the ground; what is not valid is 0 in all channels alike.
    assert (plain >= -1e-5).all()
    assert (plain <= ground[:, None, None] + 1e-4).all()
    zero = plain == 0
    np.testing.assert_array_equal(zero.all(0), zero.any(0))
    assert 0 < zero.all(0).mean() < 1
    # A repeated band lies between its own mean and the ground, standardized by the channel it stands in.
    missing = (repeated == 0).all(0)
    assert 0 < missing.mean() < 1
    band = repeated[:, ~missing] * std[:, None] + mean[:, None]
    assert band.min() >= mean.min() - 1e-4
    assert band.max() <= 0.3 + 1e-4


def test_a_chip_without_any_data_is_all_mean(statistics: Statistics) -> None:
    nothing = np.full((10, 30, 30), np.nan, np.float32)
    for view in make(statistics, BUSY, BUSY)(nothing, np.zeros((30, 30), bool), seed=0, epoch=0, chip=0):
        np.testing.assert_array_equal(view, 0)


def test_blur_and_channel_repeat_happen_as_often_as_the_recipe_says(statistics: Statistics) -> None:
    recipes, local = default_recipes(120, 8)
    crop = MultiCrop(*statistics, global_views=recipes, local_views=local)
    drawn = [crop.draw(120, 120, seed=0, epoch=0, chip=number) for number in range(2000)]
    blurred = np.mean([[draw.blur > 0 for draw in draws] for draws in drawn], axis=0)
    repeated = np.mean([[draw.band is not None for draw in draws] for draws in drawn], axis=0)
    solarized = np.mean([[draw.solarize for draw in draws] for draws in drawn], axis=0)
    np.testing.assert_allclose(blurred, [1, 0.1] + [0.5] * 6, atol=0.05)
    np.testing.assert_allclose(repeated, [0.2] + [0] * 7, atol=0.04)
    np.testing.assert_allclose(solarized, [0, 0.2] + [0] * 6, atol=0.04)


# ----------------------------------------------------------------------------------------------------- recipes


def test_the_origins_recipe_can_be_expressed() -> None:
    straight = ViewRecipe(
        (120, 120), (0.4, 1.0), horizontal_flip=0.5, vertical_flip=0.0, rotate90=0.0, shift_scale_rotate=0.5
    )
    first = replace(straight, channel_repeat=1.0, blur=1.0, solarize=0.0)
    second = replace(straight, channel_repeat=0.0, blur=0.1, solarize=0.2)
    local = replace(straight, size=(56, 56), scale=(0.05, 0.4), channel_repeat=0.0, blur=0.5, solarize=0.0)
    origin = default_recipes(120, 8, channel_repeat=1.0, rotate90=False)
    assert origin == ([first, second], [local] * 6)
    assert first.ratio == (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("chip_size", "patch_size", "global_size", "local_size"),
    [(120, 8, 120, 56), (120, 16, 112, 48), (64, 8, 64, 32), (64, 1, 64, 32), (100, 14, 98, 42), (17, 8, 16, 8)],
)
def test_default_sizes_are_the_chip_and_its_half_rounded_down_to_patches(
    chip_size: int, patch_size: int, global_size: int, local_size: int
) -> None:
    global_views, local_views = default_recipes(chip_size, patch_size, global_count=3, local_count=4)
    assert [view.size for view in global_views] == [(global_size, global_size)] * 3
    assert [view.size for view in local_views] == [(local_size, local_size)] * 4
    assert [view.channel_repeat for view in global_views] == [0.2, 0, 0]
    assert [view.solarize for view in global_views + local_views] == [0, 0.2, 0.2, 0, 0, 0, 0]


def test_sizes_and_counts_are_taken_as_asked() -> None:
    global_views, local_views = default_recipes(
        100, 8, global_size=(96, 64), local_size=40, global_scale=(0.5, 0.9), local_scale=(0.1, 0.2), local_count=1
    )
    assert [(view.size, view.scale) for view in global_views + local_views] == [
        ((96, 64), (0.5, 0.9)),
        ((96, 64), (0.5, 0.9)),
        ((40, 40), (0.1, 0.2)),
    ]
    assert default_recipes(8, 8, local_count=0)[1] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_size": 100}, r"--views.global_size is 100: .* patch size 16, for example 96 or 112"),
        ({"global_size": (96, 0)}, r"--views.global_size is 0: .* for example 16 or 32"),
        ({"local_size": -16}, r"--views.local_size is -16"),
        ({"local_size": 5}, r"--views.local_size is 5: .* for example 16 or 32"),
        ({"chip_size": 15}, r"--views.global_size would be 15 px, .*--data.chip_size"),
        ({"chip_size": 24}, r"--views.local_size would be 12 px, .*--data.chip_size"),
        ({"local_count": -1}, r"--views.local_count is -1"),
        ({"global_count": 0}, r"0 global views"),
        ({"channel_repeat": 1.2}, r"--views.channel_repeat is 1.2: give a probability"),
        ({"blur": (1.0, -0.1, 0.5)}, r"--views.blur is -0.1"),
        ({"solarize": float("nan")}, r"--views.solarize is nan"),
        ({"global_scale": (0.4, 1.5)}, r"--views.global_scale"),
        ({"local_scale": (0.4, 0.1)}, r"--views.local_scale"),
        ({"local_scale": (0.0, 0.1)}, r"--views.local_scale"),
    ],
)
def test_impossible_settings_are_refused_with_their_names(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        default_recipes(**({"chip_size": 64, "patch_size": 16} | arguments))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.1, 0.2], [0.1], "2 means and 1 standard deviations"),
        ([], [], "0 means"),
        ([0.1], [0.0], "positive standard deviations"),
        ([float("nan")], [0.1], "finite"),
    ],
)
def test_unusable_statistics_are_refused(mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultiCrop(mean, std, global_views=[BUSY])


def test_a_chip_of_other_bands_and_a_recipe_without_global_views_are_refused(statistics: Statistics) -> None:
    with pytest.raises(UserError, match=r"a chip of 9 bands, statistics of 10: .*--data.bands"):
        make(statistics, BUSY)(np.zeros((9, 8, 8), np.float32), np.ones((8, 8), bool), seed=0, epoch=0, chip=0)
    with pytest.raises(UserError, match="no global view"):
        MultiCrop(*statistics, global_views=[], local_views=[BUSY])
