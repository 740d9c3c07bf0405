import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ssl_geo.imagery import profiles
from ssl_geo.imagery.profiles import join, profile_window, windows
from ssl_geo.imagery.rasters import open_scene


@pytest.fixture(scope="module")
def scene(land, write_stack, tmp_path_factory):
    """A scene with a corner of zeros and some DN of 30000; and its array."""
    dn = land(shape=(90, 130))
    dn[:, :20, :31] = 0
    dn[4, 50:53, 7:80] = 30_000
    path = tmp_path_factory.mktemp("profiles") / "a.tif"
    bands = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    write_stack(path, bands, array=dn)
    return open_scene(path), dn


def whole(scene, **options):
    return join([profile_window(scene, window, **options) for window in windows(scene, quick=False)])


@settings(max_examples=8)
@given(side=st.integers(7, 200))
def test_a_profile_does_not_depend_on_the_blocks_but_for_the_digest(scene, side):
    described, dn = scene
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "BLOCK_PIXELS", side)
        profile = whole(described)
    valid = dn.any(axis=0)
    values = dn[:, valid]
    assert (profile.read, profile.valid) == (valid.size, valid.sum())
    np.testing.assert_array_equal(profile.minimum, values.min(axis=1))
    np.testing.assert_array_equal(profile.maximum, values.max(axis=1))
    np.testing.assert_array_equal(profile.at_maximum, (values == values.max(axis=1)[:, None]).sum(axis=1))
    np.testing.assert_array_equal(profile.high, (values >= 28_000).sum(axis=1))
    assert profile.fill[0.0].count == (~valid).sum()
    assert profile.fill[0.0].edge == 20 + 31
    bright = np.where(valid, dn.mean(axis=0), np.nan)
    cells = ndimage.sum_labels(
        np.ones_like(bright), np.arange(90)[:, None] * 32 // 90 * 32 + np.arange(130) * 32 // 130, np.arange(32 * 32)
    )
    sums = ndimage.sum_labels(
        np.nan_to_num(bright), np.arange(90)[:, None] * 32 // 90 * 32 + np.arange(130) * 32 // 130, np.arange(32 * 32)
    )
    assert cells.min() > 0
    inside = np.isfinite(profile.thumbnail) & (np.indices((32, 32))[0] > 8)  # away from the zeros
    np.testing.assert_allclose(profile.thumbnail[inside], (sums / cells).reshape(32, 32)[inside])


def test_solid_fill_is_the_erosion_of_the_fill(scene):
    described, dn = scene
    fill = ndimage.binary_erosion(~dn.any(axis=0), np.ones((3, 3)))
    assert whole(described).fill[0.0].solid == fill.sum()


def test_the_digest_knows_pixels_shape_and_type(write_stack, tmp_path):
    digests = {}
    base = np.arange(1, 1 + 3 * 40 * 50).reshape(3, 40, 50).astype(np.uint16)
    changed = base.copy()
    changed[2, 39, 49] += 1
    for name, array in {
        "a": base,
        "again": base,
        "one pixel": changed,
        "shape": base.reshape(3, 50, 40),
        "type": base.astype(np.int16),
    }.items():
        write_stack(tmp_path / f"{name}.tif", array=array)
        digests[name] = whole(open_scene(tmp_path / f"{name}.tif")).digest
    assert digests["a"] == digests["again"]
    assert len(set(digests.values())) == 4


def test_spectra_are_valid_pixels_in_bounded_number(scene, land, write_stack, tmp_path):
    described, dn = scene
    spectra = whole(described).spectra
    assert 1000 < spectra.shape[1] <= 2 * profiles.SPECTRA
    assert spectra.base is None or spectra.base.size == spectra.size  # else it keeps a whole block in memory
    part = profile_window(described, (0, 0, 90, 130)).profile.spectra
    assert part.base is None
    stored = {tuple(pixel) for pixel in dn[:, dn.any(axis=0)].T.tolist()}
    assert all(tuple(pixel) in stored for pixel in spectra.T.tolist())
    write_stack(tmp_path / "b.tif", array=land(shape=(700, 700), bands=("B02", "B03", "B04")))
    assert whole(open_scene(tmp_path / "b.tif")).spectra.shape[1] <= 2 * profiles.SPECTRA


@pytest.mark.parametrize("quick", [False, True])
def test_spectra_are_of_all_columns(write_stack, tmp_path, quick):
    """Of a square scene they came from two columns: with one of them damaged, half of the pixels seemed to be."""
    dn = np.full((3, 512, 512), 500, np.int16)
    dn[:, :, 0] = -200
    write_stack(tmp_path / "a.tif", array=dn)
    scene = open_scene(tmp_path / "a.tif")
    parts = [profile_window(scene, window, quick=quick) for window in windows(scene, quick=quick)]
    spectra = join(parts).spectra
    assert spectra.shape[1] > 500
    assert (spectra[0] < 0).mean() < 0.02


def test_a_quick_look_reads_little_of_a_large_scene(write_stack, tmp_path):
    write_stack(tmp_path / "a.tif", shape=(1000, 1200), seed=1)
    scene = open_scene(tmp_path / "a.tif")
    parts = [profile_window(scene, window, quick=True) for window in windows(scene, quick=True)]
    profile = join(parts)
    assert profile.read == 3 * 256 * 256
    assert profile.digest is None
    assert profile.thumbnail is None
