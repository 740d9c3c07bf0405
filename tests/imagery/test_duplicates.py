import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geo.imagery import duplicates
from ssl_geo.imagery.duplicates import (
    Sighting,
    _intersect,
    _overlapping,
    _within_distance,
    check_near_duplicates,
    check_overlaps,
    perceptual_hashes,
)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_pairs_within_a_distance_are_those_of_comparing_all(seed, distance):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, 40, dtype=np.uint64)
    for k in range(20, 40):  # near ones of the first
        for bit in rng.integers(0, 63, rng.integers(0, 8)):
            hashes[k] = hashes[k - 20] ^ (np.uint64(1) << np.uint64(bit)) if bit % 2 else hashes[k] & hashes[k - 20]
    slow = [(i, j) for i in range(40) for j in range(i + 1, 40) if int(hashes[i] ^ hashes[j]).bit_count() <= distance]
    assert _within_distance(hashes, distance) == slow


def test_hashes_ignore_brightness_and_contrast(land):
    images = np.stack([land(k, (32, 32), bands=("B08",))[0].astype(float) for k in range(6)])
    hashes = perceptual_hashes(images)
    np.testing.assert_array_equal(hashes, perceptual_hashes(0.3 * images + 700))
    assert len(set(hashes.tolist())) == 6


def sighting(name, thumbnail=None, *, date=None, split=None):
    return Sighting(name, date, split, None, thumbnail)


def test_flat_pictures_are_no_near_duplicates(land):
    flat = [sighting(str(k), np.full((32, 32), 5.0)) for k in range(3)]
    assert check_near_duplicates(flat) == []
    empty = [sighting(str(k), np.full((32, 32), np.nan)) for k in range(3)]
    assert check_near_duplicates(empty) == []


def test_pictures_are_compared_across_the_portions_they_are_hashed_in(land, monkeypatch):
    monkeypatch.setattr(duplicates, "_HASHED", 2)
    seen = [land(k, (32, 32), bands=("B08",))[0].astype(float) for k in range(5)]
    (finding,) = check_near_duplicates([sighting(str(k), image) for k, image in enumerate([*seen, 1.1 * seen[1]])])
    assert finding.paths == ("1", "5")


def box(left, bottom, width, height=None):
    right, top = left + width, bottom + (height or width)
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def overlapping(*boxes):
    return {tuple(pair) for pair in _overlapping(np.array(boxes, float)).tolist()}


def test_neighbours_touch_and_do_not_overlap():
    grid = [box(10 + 0.01 * i, 50 + 0.01 * j, 0.01) for i in range(4) for j in range(4)]
    assert overlapping(*grid) == set()
    assert overlapping(*grid, box(10.005, 50.005, 0.01)) == {(0, 16), (1, 16), (4, 16), (5, 16)}


def test_a_large_scene_over_small_chips_and_over_the_antimeridian():
    assert overlapping(box(10, 50, 1), box(10.5, 50.5, 0.005), box(11.5, 50.5, 0.005)) == {(0, 1)}
    assert overlapping(box(179.5, 10, 1), box(-179.9, 10.2, 0.1), box(178.0, 10.2, 0.1)) == {(0, 1)}


def sphere(lonlat):
    lon, lat = lonlat[..., 0], lonlat[..., 1]
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_quadrilaterals_intersect_as_their_points_do(seed):
    rng = np.random.default_rng(seed)
    quads = []
    for _ in range(2):
        angle, side = rng.uniform(0, np.pi), rng.uniform(0.5, 1.5, 2) * 1e-4
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = np.array([(-1, 1), (1, 1), (1, -1), (-1, -1)]) * side
        quads.append((turn, side, corners @ turn.T + rng.uniform(-1.5e-4, 1.5e-4, 2)))

    fine = np.stack(np.meshgrid(*[np.linspace(-4e-4, 4e-4, 200)] * 2), axis=-1)

    def shared(size):  # points of a fine grid in both rectangles, brought to a share of their size
        turned = [np.abs((fine - corners.mean(axis=0)) @ turn) < size * side for turn, side, corners in quads]
        return int((turned[0] & turned[1]).all(axis=-1).sum())

    if _intersect(sphere(quads[0][2])[None], sphere(quads[1][2])[None])[0]:
        assert shared(1.0) > 0
    else:  # _intersect looks at 95 % of their size
        assert shared(0.94) == 0


def test_unplaced_scenes_share_no_ground():
    corners = np.full((3, 4, 2), np.nan)
    assert check_overlaps([sighting(str(k)) for k in range(3)], corners) == []
    corners[0] = box(10, 50, 1)
    assert check_overlaps([sighting(str(k)) for k in range(3)], corners) == []


def test_a_series_on_one_footprint_in_two_splits():
    scenes = [sighting(f"{k}", split=split) for k, split in enumerate(["train", "train", "test", "val", None])]
    corners = np.array([box(10, 50, 1)] * 4 + [box(10.5, 50, 1)])
    info, error = sorted(check_overlaps(scenes, corners), key=lambda finding: finding.severity, reverse=True)
    assert (info.severity, info.count) == ("info", 5)
    assert (error.severity, error.count) == ("error", 3)  # train-test, train-val, test-val
