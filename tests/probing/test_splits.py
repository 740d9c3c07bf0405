import itertools

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ssl_geo.errors import UserError
from ssl_geo.probing.footprints import METRES_PER_DEGREE, Footprints, near, nearest_distance
from ssl_geo.probing.intervals import MIN_BLOCKS
from ssl_geo.probing.splits import LEFT_OUT, SplitReport, smaller_block, split_chips
from ssl_geo.probing.stratification import SPLITS, assign_blocks

# --- blocks to splits

small_worlds = st.tuples(st.integers(3, 7), st.integers(1, 4)).flatmap(
    lambda shape: hnp.arrays(np.int64, shape, elements=st.one_of(st.just(0), st.integers(1, 50)))
)


def absent(class_pixels: np.ndarray, split: np.ndarray) -> int:
    """(split, class) pairs without a pixel, of the classes that are anywhere."""
    held = np.stack([class_pixels[split == index].sum(0) for index in range(3)])
    return int(((held == 0) & (class_pixels.sum(0) > 0)).sum())


@given(small_worlds, st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_classes_are_spread_as_well_as_blocks_allow(class_pixels: np.ndarray, seed: int) -> None:
    if (class_pixels.sum(1) > 0).sum() < 3:
        with pytest.raises(UserError, match=r"--split\.block smaller"):
            assign_blocks(class_pixels, seed=seed)
        return
    split = assign_blocks(class_pixels, seed=seed)
    np.testing.assert_array_equal(split, assign_blocks(class_pixels, seed=seed))
    assert all(class_pixels[split == index].sum() > 0 for index in range(3))
    best = min(absent(class_pixels, np.array(way)) for way in itertools.product(range(3), repeat=len(class_pixels)))
    # A greedy search: never more than one pair worse than the best of all ways.
    assert best <= absent(class_pixels, split) <= best + 1
    rarest = (class_pixels > 0).sum(0)
    if len(class_pixels) >= 3 and class_pixels.shape[1] == 1 and rarest[0] >= 3:
        assert absent(class_pixels, split) == 0


def test_many_blocks_hold_their_fractions_of_every_class() -> None:
    rng = np.random.default_rng(0)
    class_pixels = rng.integers(0, 1000, (200, 5)) * (rng.random((200, 5)) < 0.4)
    class_pixels[:, 4] = 0
    class_pixels[:4, 4] = 10
    split = assign_blocks(class_pixels, (0.5, 0.2, 0.3))
    for index, share in enumerate((0.5, 0.2, 0.3)):
        held = class_pixels[split == index].sum(0) / class_pixels.sum(0)
        np.testing.assert_allclose(held[:4], share, atol=0.02)
        assert held[4] > 0


def test_fractions_of_zero_leave_a_split_empty() -> None:
    split = assign_blocks(np.full((10, 2), 5), (0.7, 0.0, 0.3))
    assert np.bincount(split, minlength=3).tolist() == [7, 0, 3]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.3, -0.2), (0.5, 0.1, 0.1)])
def test_fractions_that_are_none_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"--split\.fractions"):
        assign_blocks(np.ones((9, 2), int), fractions)


# --- footprints


def grid(columns: int, rows: int, size: float = 640.0, step: float | None = None) -> np.ndarray:
    """Bounds of a grid of square chips, row by row."""
    step = size if step is None else step
    left, bottom = np.meshgrid(np.arange(columns) * step, np.arange(rows) * step)
    corner = np.stack([left.ravel(), bottom.ravel()], axis=1)
    return np.concatenate([corner, corner + size], axis=1)


def slow_distance(a: np.ndarray, b: np.ndarray) -> float:
    across = max(a[0] - b[2], b[0] - a[2], 0.0)
    along = max(a[1] - b[3], b[1] - a[3], 0.0)
    return float(np.hypot(across, along))


def test_least_distance_is_the_slow_one() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50_000, (60, 2))
    bounds = np.concatenate([corner, corner + rng.uniform(200, 3000, (60, 2))], axis=1)
    bounds[30:, :] += [9000, 0, 9000, 0]
    for seed in range(5):
        a, b = np.split(np.random.default_rng(seed).permutation(60), [8])
        expected = min(slow_distance(bounds[i], bounds[j]) for i in a for j in b)
        assert nearest_distance(Footprints.in_plane(["EPSG:32631"] * 60, bounds), a, b) == pytest.approx(expected)


def test_distance_on_earth_is_in_metres() -> None:
    # Two chips 0.1° apart at 60° N: half as far as at the equator, less the width of a chip.
    for latitude, factor in ((0.0, 1.0), (60.0, 0.5)):
        chips = Footprints.on_earth([[10.0, latitude], [10.1, latitude]], [[1000, 1000]] * 2)
        expected = 0.1 * METRES_PER_DEGREE * factor - 1000
        assert nearest_distance(chips, np.array([0]), np.array([1])) == pytest.approx(expected, rel=1e-3)
    across_the_date_line = Footprints.on_earth([[179.95, 0.0], [-179.95, 0.0]], [[1000, 1000]] * 2)
    expected = 0.1 * METRES_PER_DEGREE - 1000
    assert nearest_distance(across_the_date_line, np.array([0]), np.array([1])) == pytest.approx(expected, rel=1e-6)
    antipodes = Footprints.on_earth([[0.0, 80.0], [180.0, 80.0]], [[1000, 1000]] * 2)
    assert nearest_distance(antipodes, np.array([0]), np.array([1])) == pytest.approx(20 * METRES_PER_DEGREE, rel=1e-3)


def test_degrees_become_metres_at_their_latitude() -> None:
    chips = Footprints.in_degrees([[10.0, 59.99, 10.02, 60.01], [10.0, -0.01, 10.02, 0.01]])
    np.testing.assert_allclose(chips.height, 0.02 * METRES_PER_DEGREE)
    np.testing.assert_allclose(chips.width, 0.02 * METRES_PER_DEGREE * np.array([0.5, 1.0]), rtol=1e-6)


def test_blocks_are_squares_of_ground_at_every_latitude() -> None:
    for latitude in (0.0, 45.0, 70.0):
        side = 100 / METRES_PER_DEGREE
        longitudes = 10 + np.arange(200) * side / np.cos(np.radians(latitude))
        chips = Footprints.on_earth(np.stack([longitudes, np.full(200, latitude)], 1), np.full((200, 2), 100.0))
        sizes = np.bincount(chips.blocks(2000.0))
        assert set(sizes[1:-1]) <= {19, 20, 21}


def test_repeated_dates_and_other_crs_share_a_block() -> None:
    # Chips just left and right of a block's border, again at other dates, shifted by less than half a chip.
    bounds = np.array([[0, 0, 640, 640], [680, 0, 1320, 640]], dtype=float)
    jitter = np.random.default_rng(0).uniform(-100, 100, (40, 1, 2))
    repeated = (bounds + np.tile(jitter, (1, 1, 2))).reshape(-1, 4)
    blocks = Footprints.in_plane(["EPSG:32631"] * 82, np.concatenate([bounds, repeated])).blocks(330.0)
    assert len(np.unique(blocks[0::2])) == 1
    assert len(np.unique(blocks[1::2])) == 1
    assert blocks[0] != blocks[1]


def test_planes_are_never_near_each_other() -> None:
    chips = Footprints.in_plane(["a.tif", "b.tif"], [[0, 0, 64, 64]] * 2, unit="pixels")
    assert chips.blocks(128).tolist() == [0, 1]
    assert nearest_distance(chips, np.array([0]), np.array([1])) is None
    assert not near(chips, np.array([0]), np.array([1]), 1e4).any()


def test_extents_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="1 chips have no extent on the ground, the first is number 1"):
        Footprints.in_plane(["x", "x"], [[0, 0, 1, 1], [0, 1, 1, 0]])
    with pytest.raises(UserError, match="latitude 500000"):
        Footprints.on_earth([[10, 500_000]], [[640, 640]])
    with pytest.raises(UserError, match=r"--split\.block"):
        Footprints.in_plane(["x"], [[0, 0, 1, 1]]).blocks(0)


# --- chips


chip_worlds = st.tuples(
    st.integers(4, 9), st.integers(4, 9), st.sampled_from([320.0, 500.0, 640.0, 900.0]), st.integers(0, 5)
)


@given(chip_worlds, st.sampled_from([0.0, 300.0]))
@settings(deadline=None, max_examples=30)
def test_no_two_splits_share_ground(world: tuple[int, int, float, int], gap: float) -> None:
    columns, rows, step, seed = world
    bounds = grid(columns, rows, step=step)
    bounds = np.concatenate([bounds, bounds + np.random.default_rng(seed).uniform(-100, 100, (len(bounds), 1))])
    class_pixels = np.random.default_rng(seed).integers(1, 4000, (len(bounds), 3))
    chips = Footprints.in_plane(["EPSG:32631"] * len(bounds), bounds)
    try:
        result = split_chips(chips, class_pixels, block=1300.0, seed=seed, gap=gap)
    except UserError:  # the gap left nothing of a split
        reject()
    for a, b in itertools.combinations(SPLITS, 2):
        for i, j in itertools.product(result.chips(a), result.chips(b)):
            depth = min(
                min(bounds[i, 2], bounds[j, 2]) - max(bounds[i, 0], bounds[j, 0]),
                min(bounds[i, 3], bounds[j, 3]) - max(bounds[i, 1], bounds[j, 1]),
            )
            assert depth <= 0.01 * 640 + 1e-6
            assert slow_distance(bounds[i], bounds[j]) >= gap * (1 - 1e-6)
    report = result.report
    assert sum(report.counts.values()) + report.left_out == len(bounds)
    assert report.left_out == (result.split == LEFT_OUT).sum()
    assert all(distance >= gap * (1 - 1e-6) for distance in report.distances.values())
    np.testing.assert_array_equal(report.class_pixels[0], class_pixels[result.chips("train")].sum(0))


def test_touching_chips_are_kept_and_their_distance_is_told() -> None:
    chips = Footprints.in_plane(["EPSG:32631"] * 64, grid(8, 8))
    result = split_chips(chips, np.full((64, 1), 4096), block=1280.0)
    assert result.report.left_out == 0
    assert result.report.distances[("train", "test")] == 0
    assert "least distance train-test: 0 metres" in result.report.lines(["a", "b", "c"])
    apart = split_chips(chips, np.full((64, 1), 4096), block=1280.0, gap=100.0)
    assert apart.report.left_out > 0
    assert apart.report.distances[("train", "test")] >= 640
    assert any(f"{apart.report.left_out} chips left out" in line for line in apart.report.lines(["a", "b", "c"]))


def test_the_order_of_chips_changes_nothing() -> None:
    bounds, pixels = grid(7, 6), np.random.default_rng(0).integers(0, 900, (42, 3))
    order = np.random.default_rng(1).permutation(42)
    blocks = Footprints.in_plane(["x"] * 42, bounds).blocks(1280.0)
    np.testing.assert_array_equal(Footprints.in_plane(["x"] * 42, bounds[order]).blocks(1280.0), blocks[order])
    first = split_chips(Footprints.in_plane(["x"] * 42, bounds), pixels, block=1280.0)
    second = split_chips(Footprints.in_plane(["x"] * 42, bounds[order]), pixels[order], block=1280.0)
    np.testing.assert_array_equal(first.split[order], second.split)


def test_given_splits_are_taken_and_their_overlap_is_told() -> None:
    bounds = grid(4, 1)
    bounds[3] = bounds[0] + [0, 10, 0, 10]  # a test chip on the ground of a training chip
    chips = Footprints.in_plane(["x"] * 4, bounds)
    result = split_chips(chips, np.full((4, 2), 9), block=640.0, given=["train", "train", "val", "test"])
    assert result.split.tolist() == [0, 0, 1, 2]
    assert (result.report.shared, result.report.left_out) == (1, 0)
    assert any("1 chips of the given splits overlap" in line for line in result.report.lines(["a", "b", "c"]))
    with pytest.raises(UserError, match=r"split 'tset' in --split\.file, did you mean test"):
        split_chips(chips, np.full((4, 2), 9), block=640.0, given=["train", "train", "val", "tset"])
    with pytest.raises(UserError, match="no valid pixel in test"):
        split_chips(chips, np.full((4, 2), 9), block=640.0, given=["train", "train", "val", "val"])


def test_a_class_that_a_split_lacks_is_told() -> None:
    pixels = np.full((36, 3), 10)
    pixels[:, 2] = 0
    pixels[7, 2] = 5
    report = split_chips(Footprints.in_plane(["x"] * 36, grid(6, 6)), pixels, block=640.0).report
    assert sorted(report.missing().values()) == [[2], [2]]
    assert any("holds no pixel of c" in line for line in report.lines(["a", "b", "c"]))


def test_large_numbers_are_told_with_separators() -> None:
    report = SplitReport(
        counts={"train": 12_345, "val": 678, "test": 1_000},
        blocks={"train": 1_234, "val": 5, "test": 6},
        class_pixels=np.array([[1_000_000, 234_567], [8, 9], [10, 11]]),
        left_out=4_321,
        gap=0.0,
        shared=0,
        distances={("train", "test"): 5_600.0},
        distance_unit="metres",
    )
    said = report.lines(["a", "b"])
    assert said[0] == "train: 12,345 chips in 1,234 blocks, 1,234,567 valid pixels"
    assert "least distance train-test: 5,600 metres" in said
    assert said[-1].startswith("4,321 chips left out")


def test_too_few_blocks_end_in_one_line() -> None:
    chips = Footprints.in_plane(["x"] * 16, grid(4, 4))
    with pytest.raises(UserError, match=r"1 blocks with valid pixels for 3 splits.*val, test.*--split\.block"):
        split_chips(chips, np.full((16, 2), 9), block=100_000.0)
    with pytest.raises(UserError, match=r"no valid pixel in .*left out.*--split\.gap"):
        split_chips(chips, np.full((16, 2), 9), block=640.0, gap=5000.0)


def test_a_block_that_gives_enough_test_blocks_is_found() -> None:
    """One small scene ended with one test block, and nothing said which --split.block would do."""
    side, size = 12, 64.0
    corner = np.stack(np.divmod(np.arange(side**2), side), 1) * size
    chips = Footprints.in_plane(["scene"] * len(corner), np.hstack([corner, corner + size]), unit="pixels")
    pixels = np.full((len(corner), 2), 100)
    assert split_chips(chips, pixels, block=6 * size).report.blocks["test"] < MIN_BLOCKS
    found = smaller_block(chips, pixels, block=6 * size, least=size)
    assert found is not None
    assert found[1] == split_chips(chips, pixels, block=found[0]).report.blocks["test"] >= MIN_BLOCKS
    assert split_chips(chips, pixels, block=found[0] + size).report.blocks["test"] < MIN_BLOCKS
    few = Footprints.in_plane(["scene"] * 9, np.hstack([corner, corner + size])[:9], unit="pixels")
    assert smaller_block(few, pixels[:9], block=2 * size, least=size) is None
