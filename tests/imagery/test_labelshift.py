import itertools
import math

import numpy as np
import pytest

from ssl_geo.imagery.labelshift import busiest_window, image_edges, label_boundary, measure_shift
from ssl_geo.imagery.rasters import find_scenes, open_scene, read_labels, read_window


@pytest.fixture(scope="module")
def labelled(land):
    """A scene of land and its true classes (water or not by B08, leaves or not by B06 over B04)."""
    dn = land(3, (160, 180)).astype(np.float64)
    labels = (dn[7] > 1000).astype(np.uint8) + (dn[5] > 3 * dn[3])
    return image_edges(dn, np.ones(labels.shape, np.bool_)), labels


def test_labels_in_place(labelled):
    edges, labels = labelled
    shift = measure_shift([edges], label_boundary(labels))
    assert shift is not None
    assert np.hypot(shift.rows, shift.cols) <= 0.5
    assert shift.significance > 10
    assert not shift.is_shift


def test_every_shift_is_measured_and_told(labelled):
    """All up to 10 pixels. Of those between 1.2 and 2.5 pixels one correlates nearly as well in place: (-1, 2)."""
    edges, labels = labelled
    told, quiet = [], []
    for rows, cols in itertools.product(range(-10, 11), repeat=2):
        shift = measure_shift([edges], label_boundary(np.roll(labels, (rows, cols), (0, 1))))
        assert shift is not None
        assert (shift.rows, shift.cols) == pytest.approx((-rows, -cols), abs=0.5)
        (told if shift.is_shift else quiet).append(math.hypot(rows, cols))
    assert min(told) > 1.2
    assert max(quiet) < 2.5
    assert len(quiet) <= 9 + 1  # within 1.5 pixels, and that one


def test_labels_of_another_place_say_nothing(labelled, land):
    edges, _ = labelled
    for seed in range(10, 16):
        dn = land(seed, (160, 180))
        shift = measure_shift([edges], label_boundary((dn[7] > 1000).astype(np.uint8)))
        assert shift is not None
        assert not shift.is_shift


def test_too_little_to_compare(labelled):
    edges, labels = labelled
    assert measure_shift([edges], np.zeros_like(labels, np.bool_)) is None
    assert measure_shift([edges[:40, :40]], label_boundary(labels[:40, :40])) is None


def test_the_boundary_is_on_both_sides_of_the_border():
    labels = np.zeros((4, 6), np.uint8)
    labels[:, 3:] = 1
    assert label_boundary(labels).tolist() == [[False, False, True, True, False, False]] * 4


def test_the_busiest_window_is_found_at_the_end_too():
    boundary = np.zeros((1500, 2600), np.bool_)
    boundary[1400:, 2500:] = True
    assert busiest_window(boundary) == (476, 1576, 1024, 1024)
    assert busiest_window(boundary[:100, :90]) == (0, 0, 100, 90)


def test_real_labels(shared_data):
    """Two sets lie in place; those of chips_seasonal lie two pixels too far up, at both sites and in both kinds."""
    for folder, settings_ in (
        ("water", {"band_names": [f"B{k:02d}" for k in range(1, 13)]}),
        ("cloud", {"scale": 1.0}),
    ):
        for path in find_scenes([shared_data / folder / "images"]):
            file = shared_data / folder / "labels" / f"{path.stem}.tif"
            if file.exists():
                scene = open_scene(path, **settings_)
                edges = image_edges(*read_window(scene, scene.bands, 0, 0, scene.height, scene.width))
                shift = measure_shift([edges], label_boundary(read_labels(file)[0]))
                assert shift.significance > 10
                assert not shift.is_shift
    for site in ("00002806639B424A", "0000280849BAC91C"):
        edges = []
        for path in sorted((shared_data / "chips_seasonal").glob(f"{site}_*.tif"))[::5]:
            scene = open_scene(path)
            edges.append(image_edges(*read_window(scene, scene.bands, 0, 0, 64, 64)))
        for kind in ("LC", "CT"):
            labels = read_labels(shared_data / "chips_seasonal_labels" / f"{site}_{kind}.tif")[0]
            shift = measure_shift(edges, label_boundary(labels))
            assert shift.is_shift
            assert (shift.rows, shift.cols) == pytest.approx((2, 0), abs=0.5)
            back = measure_shift(edges, label_boundary(np.roll(labels, 2, axis=0)))
            assert not back.is_shift
