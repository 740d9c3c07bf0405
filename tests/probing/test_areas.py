"""Areas adjusted for the map's errors, against the published example and a simulation."""

import math

import numpy as np

from ssl_geo.probing.areas import adjusted_shares, class_areas

# Olofsson et al. 2014, table 8 (deforestation, forest gain, stable forest, stable non-forest): rows = map, as printed.
SAMPLE = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
MAPPED = np.array([200_000, 150_000, 3_200_000, 6_450_000])  # pixels of 30 m


def test_the_published_example():
    shares = adjusted_shares(SAMPLE.T, MAPPED / MAPPED.sum())
    hectares = shares * MAPPED.sum() * 0.09
    assert np.allclose(hectares, [21_158, 11_686, 285_770, 581_386], atol=2)


def test_a_map_without_errors_keeps_its_areas_and_has_no_width():
    areas = class_areas(np.stack([np.diag([5, 7])] * 6), np.array([30.0, 10.0]))
    assert [(area.value, area.low, area.high) for area in areas] == [(30, 30, 30), (10, 10, 10)]


def test_areas_add_up_and_a_class_without_test_pixels_stays_as_mapped():
    blocks = np.random.default_rng(0).integers(0, 9, (7, 3, 3))
    blocks[:, :, 2] = 0
    blocks[:, 2] = 0
    mapped = np.array([50.0, 20.0, 30.0])
    areas = class_areas(blocks, mapped)
    assert math.isclose(sum(area.value for area in areas), 100)
    assert math.isclose(areas[2].value, 30)
    assert all(area.low <= area.value <= area.high for area in areas[:2])


def test_few_blocks_give_no_interval_and_an_empty_map_no_area():
    areas = class_areas(np.ones((2, 2, 2), np.int64), np.array([1.0, 3.0]))
    assert math.isnan(areas[0].low)
    assert math.isclose(areas[0].value, 2)
    assert [area.value for area in class_areas(np.ones((6, 2, 2), np.int64), np.zeros(2))] == [0, 0]


def test_intervals_hold_the_true_area_about_as_often_as_they_say():
    """A map that errs at a rate that differs from block to block; its true area is known."""
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)

        def counts(rate, rng=rng):
            wrong = rng.binomial(200, rate)
            return np.array([[200 - wrong, 0], [wrong, 100]])  # of what is mapped as 0, some is 1

        blocks = np.stack([counts(rng.uniform(0.05, 0.35)) for _ in range(25)])
        area = class_areas(blocks, np.array([1000.0, 500.0]))[1]
        held += area.low <= 500 + 0.2 * 1000 <= area.high
    assert 50 <= held <= 60
