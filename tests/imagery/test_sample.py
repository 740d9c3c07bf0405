"""The sample scenes: reproducible, true to Sentinel-2's conventions, and a task that pixels alone do not solve."""

import hashlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_geo.errors import UserError
from ssl_geo.imagery import sample
from ssl_geo.imagery.sample import ensure_sample, make_sample
from ssl_geo.imagery.sample_layout import smooth_noise
from ssl_geo.imagery.sample_scene import render_scene, sensed
from ssl_geo.imagery.sample_spectra import BANDS, CLASSES, IGNORE, MATERIALS, crop_spectrum, material

NAMES = [band.name for band in BANDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("sample"), seed=0, scenes=6, size=192)


@pytest.fixture(scope="module")
def catalogue(folder):
    return json.loads((folder / "sample.json").read_text())


@pytest.fixture(scope="module")
def arrays(folder, catalogue):
    """DN (12, 192, 192) and labels (192, 192) of every scene, in the catalogue's order."""
    pairs = []
    for scene in catalogue["scenes"]:
        name = f"{scene['name']}.tif"
        with rasterio.open(folder / "images" / name) as image, rasterio.open(folder / "labels" / name) as labels:
            pairs.append((image.read(), labels.read(1)))
    return pairs


def contents(folder):
    """Every file of a folder by name, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_are_utm_geotiffs_with_named_bands(folder, catalogue):
    places = set()
    for scene in catalogue["scenes"]:
        name = f"{scene['name']}.tif"
        with rasterio.open(folder / "images" / name) as image, rasterio.open(folder / "labels" / name) as labels:
            assert (image.count, image.height, image.width, image.dtypes[0]) == (12, 192, 192, "uint16")
            assert list(image.descriptions) == NAMES == catalogue["bands"]
            assert image.nodata == 0
            assert image.crs.to_epsg() in (32631, 32632, 32633)
            assert image.crs.to_epsg() == 32600 + int(name.split("_T")[1][:2])
            assert image.res == (10, 10)
            assert image.transform.c % 60 == image.transform.f % 60 == 0  # the 60 m grid of the tile
            assert (labels.crs, labels.transform, labels.shape) == (image.crs, image.transform, image.shape)
            assert (labels.count, labels.dtypes[0], labels.nodata) == (1, "uint8", IGNORE)
            for value, land_class in enumerate(CLASSES):
                assert labels.tags()[f"class_{value}"] == land_class.name
                assert labels.colormap(1)[value][:3] == land_class.color
            places.add((image.crs.to_epsg(), *image.bounds))
    assert len(places) == 6
    assert {f"{scene['name']}.tif" for scene in catalogue["scenes"]} == {p.name for p in (folder / "images").iterdir()}


def test_names_say_level_date_and_a_baseline_without_offset(catalogue):
    for scene in catalogue["scenes"]:
        mission, level, sensing, baseline, *_ = scene["name"].split("_")
        assert mission in ("S2A", "S2B")
        assert level == "MSIL2A"
        assert sensing[:8] == scene["date"].replace("-", "")
        assert int(baseline[1:]) < 400
    assert len({scene["date"] for scene in catalogue["scenes"]}) == 6


def test_split_is_by_scene_and_each_part_occurs(catalogue):
    parts = [scene["split"] for scene in catalogue["scenes"]]
    assert sorted(parts) == ["test", "test", "train", "train", "train", "val"]


def test_same_seed_same_files_however_many_threads(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.os, "cpu_count", lambda: 1)
    alone = make_sample(tmp_path / "alone", scenes=3, size=96)
    monkeypatch.setattr(sample.os, "cpu_count", lambda: 4)
    assert contents(make_sample(tmp_path / "together", scenes=3, size=96)) == contents(alone)
    other = contents(make_sample(tmp_path / "other", seed=1, scenes=3, size=96))
    assert [name for name, data in contents(alone).items() if other[name] == data] == []


def test_a_scene_does_not_depend_on_the_others_nor_on_the_process(tmp_path):
    few, more = (make_sample(tmp_path / str(count), scenes=count, size=48) for count in (1, 2))
    first = next((few / "images").iterdir())
    assert (more / "images" / first.name).read_bytes() == first.read_bytes()
    code = (
        "import hashlib, numpy as np; from ssl_geo.imagery.sample_scene import render_scene;"
        "dn, labels = render_scene(np.random.default_rng([0, 5]), 96, day=150, cloudy=True, swath_edge=True);"
        "print(hashlib.sha256(dn.tobytes() + labels.tobytes()).hexdigest())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(sample.__file__).parents[2]
    )
    dn, labels = render_scene(np.random.default_rng([0, 5]), 96, day=150, cloudy=True, swath_edge=True)
    assert elsewhere.stdout.strip() == hashlib.sha256(dn.tobytes() + labels.tobytes()).hexdigest()


def test_nodata_is_zero_in_all_bands_and_ignored(arrays, catalogue):
    with_edge = 0
    for (dn, labels), scene in zip(arrays, catalogue["scenes"], strict=True):
        nodata = (dn == 0).all(axis=0)
        assert (nodata == (dn == 0).any(axis=0)).all()
        assert (labels[nodata] == IGNORE).all()
        assert nodata.any() == scene["swath_edge"]
        if not scene["cloudy"]:
            assert (nodata == (labels == IGNORE)).all()
        with_edge += nodata.any()
    assert with_edge == 1


def test_thick_cloud_is_bright_and_ignored(arrays, catalogue):
    k = next(k for k, scene in enumerate(catalogue["scenes"]) if scene["cloudy"] and not scene["swath_edge"])
    dn, labels = arrays[k]
    blue = dn[NAMES.index("B02")]
    cloud = labels == IGNORE
    assert 0.005 < cloud.mean() < 0.3
    assert np.median(blue[cloud]) > 3 * np.median(blue[~cloud])


@pytest.mark.parametrize("band", [band for band in BANDS if band.gsd_m > 10], ids=lambda band: band.name)
def test_coarse_bands_are_repeated_pixels_of_their_own_size(arrays, catalogue, band):
    ratio = band.gsd_m // 10
    for (dn, _), scene in zip(arrays, catalogue["scenes"], strict=True):
        values = dn[NAMES.index(band.name)]
        native = values.reshape(192 // ratio, ratio, 192 // ratio, ratio).max(axis=(1, 3))
        repeated = native.repeat(ratio, axis=0).repeat(ratio, axis=1)
        valid = values > 0  # the swath's edge cuts through pixels of 20 and 60 m
        assert (values[valid] == repeated[valid]).all()
        if not scene["swath_edge"]:
            assert (np.diff(native.astype(int), axis=1) != 0).mean() > 0.9  # and no coarser than that


@pytest.mark.parametrize("gsd", [10, 20, 60])
def test_sharpness_is_that_of_detector_and_optics(gsd):
    points = gsd // 5  # of the half-pixel grid per native pixel
    n = 24 * points
    cycles = 0.25  # per native pixel
    x = (np.arange(n) + 0.5) / points
    wave = np.cos(2 * np.pi * cycles * x + np.pi / 4).astype(np.float32)
    seen = sensed(np.broadcast_to(wave, (n, n)).copy(), gsd)
    assert seen.shape == (24, 24)
    centre = seen[8:16, 8:16]
    expected = np.sinc(cycles) * np.exp(-2 * (np.pi * 0.44 * cycles) ** 2)
    assert np.sqrt(2) * centre.std() == pytest.approx(expected, abs=0.02)
    assert sensed(np.full((n, n), 0.3, np.float32), gsd) == pytest.approx(0.3)


def test_coarse_bands_average_the_same_ground(arrays):
    """B8A (20 m) against B08 (10 m) averaged to 20 m: nearly the same wavelength, so nearly the same picture."""
    dn, _ = arrays[0]
    near = dn[NAMES.index("B08")].reshape(96, 2, 96, 2).mean(axis=(1, 3))
    narrow = dn[NAMES.index("B8A"), ::2, ::2]
    assert np.corrcoef(near.ravel(), narrow.ravel())[0, 1] > 0.97


def test_every_class_occurs_and_every_scene_holds_several(arrays):
    counts = np.array([np.bincount(labels.ravel(), minlength=256) for _, labels in arrays])
    assert counts[:, len(CLASSES) : IGNORE].sum() == 0
    per_class = counts[:, : len(CLASSES)]
    assert (per_class.sum(axis=0) / per_class.sum()).min() > 0.02
    assert (per_class > 50).sum(axis=1).min() >= 4


def pixel_features(dn):
    """Bands in reflectance, NDVI, NDWI, NDMI: (15, h, w)."""
    r = dn.astype(np.float32) / 1e4
    of = dict(zip(NAMES, r, strict=True))
    indices = [(of[a] - of[b]) / (of[a] + of[b] + 1e-6) for a, b in (("B08", "B04"), ("B03", "B08"), ("B08", "B11"))]
    return np.concatenate([r, indices])


def context_features(dn):
    """The same, and mean, deviation, gradient energy and its coherence over 5×5 and 9×9 windows."""
    pixels = pixel_features(dn)
    base = pixels[[NAMES.index(name) for name in ("B02", "B04", "B08", "B11")] + [12]]
    features = [pixels]
    for window in (5, 9):
        mean, square = (np.stack([ndimage.uniform_filter(b, window) for b in x]) for x in (base, base**2))
        features += [mean, np.log(np.sqrt(np.clip(square - mean**2, 0, None)) + 1e-3)]
        for band in (base[2], base[4]):
            gy, gx = np.gradient(band)
            xx, yy, xy = (ndimage.uniform_filter(g, window) for g in (gx * gx, gy * gy, gx * gy))
            features.append(np.stack([np.log(xx + yy + 1e-6), np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-6)]))
    return np.concatenate(features)


def held_out_miou(arrays, catalogue, features):
    """Mean IoU on the test scenes of a logistic regression fitted on the training scenes."""
    rng = np.random.default_rng(0)
    samples = {"train": ([], []), "val": ([], []), "test": ([], [])}
    for (dn, labels), scene in zip(arrays, catalogue["scenes"], strict=True):
        usable = rng.choice(np.flatnonzero(labels != IGNORE), 4000, replace=False)
        x, y = samples[scene["split"]]
        x.append(features(dn).reshape(-1, labels.size)[:, usable].T)
        y.append(labels.ravel()[usable])
    (x, y), (x_test, y_test) = (map(np.concatenate, samples[part]) for part in ("train", "test"))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1, tol=1e-3)).fit(x, y)
    return jaccard_score(y_test, model.predict(x_test), labels=range(len(CLASSES)), average="macro", zero_division=0)


def test_context_tells_what_pixels_do_not(arrays, catalogue):
    pixels = held_out_miou(arrays, catalogue, pixel_features)
    context = held_out_miou(arrays, catalogue, context_features)
    assert 0.25 < pixels < 0.55
    assert context > pixels + 0.08


def test_materials_look_like_what_they_are():
    of = {name: dict(zip(NAMES, values, strict=True)) for name, values in MATERIALS.items()}
    assert all(0 < value < 0.6 for bands in of.values() for value in bands.values())
    for leaf in ("leaves", "needles", "green grass", "cereal", "maize", "vine leaves"):
        bands = of[leaf]
        assert bands["B08"] > 5 * bands["B04"]  # red edge
        assert bands["B03"] > max(bands["B02"], bands["B04"])  # green
        assert bands["B12"] < bands["B11"] < bands["B8A"]  # leaf water
    for soil in ("dark soil", "light soil", "sand"):
        visible = [of[soil][name] for name in NAMES[:9]]
        assert visible == sorted(visible)  # rises up to the near infrared
    for water in ("clear water", "turbid water"):
        assert of[water]["B03"] > of[water]["B08"] > of[water]["B11"]


def test_crops_follow_the_season():
    def ndvi(crop, day):
        red, near = crop_spectrum(crop, day, material("dark soil"))[[NAMES.index("B04"), NAMES.index("B08")]]
        return (near - red) / (near + red)

    assert ndvi("winter cereal", 140) > 0.75 > 0.45 > ndvi("winter cereal", 205)
    assert ndvi("maize", 120) < 0.35 < 0.75 < ndvi("maize", 215)
    green, red, blue = crop_spectrum("rape", 128, material("dark soil"))[[2, 3, 1]]
    assert min(green, red) > 2 * blue  # in flower: yellow


@pytest.mark.parametrize("scale", [3, 40])
def test_smooth_noise_has_unit_deviation_and_its_scale(scale):
    fields = np.stack([smooth_noise(np.random.default_rng(seed), 200, scale) for seed in range(150)])
    assert fields.std() == pytest.approx(1, abs=0.05)
    neighbour = np.corrcoef(fields[:, :, 1:].ravel(), fields[:, :, :-1].ravel())[0, 1]
    far = np.corrcoef(fields[:, :, 3 * scale :].ravel(), fields[:, :, : -3 * scale].ravel())[0, 1]
    assert neighbour > 0.75
    assert abs(far) < 0.25


@pytest.fixture
def small_default(monkeypatch):
    monkeypatch.setattr(sample, "make_sample", partial(make_sample, scenes=2, size=48))


def test_ensure_makes_it_once(tmp_path, small_default):
    ensure_sample(tmp_path / "new")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*")}
    assert len([path for path in before if path.suffix == ".tif"]) == 4
    assert ensure_sample(tmp_path / "new") == tmp_path / "new"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*")} == before


def test_half_made_sample_is_made_again(tmp_path, small_default, monkeypatch):
    whole = contents(ensure_sample(tmp_path / "whole"))

    def fail_on_labels(path, array, **arguments):
        if path.parent.name == "labels":
            raise OSError(28, "No space left on device")
        sample_write(path, array, **arguments)

    sample_write = sample.write_geotiff
    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_geotiff", fail_on_labels)
        with pytest.raises(UserError, match="No space left on device"):
            ensure_sample(tmp_path / "half")
    assert not (tmp_path / "half" / "sample.json").exists()
    assert contents(ensure_sample(tmp_path / "half")) == whole


@pytest.mark.parametrize("content", ['{"version": 0, "scenes": []}', '{"version": ', "[]", '{"version": 1}'])
def test_other_version_is_replaced_and_foreign_files_are_kept(tmp_path, small_default, content):
    (tmp_path / "images").mkdir()
    stale = tmp_path / "images" / "S2A_MSIL2A_20180101T105031_N0208_R051_T31UFT_sample00.tif"
    own = tmp_path / "images" / "my_scene.tif"
    for path in (stale, own):
        path.write_bytes(b"x")
    (tmp_path / "sample.json").write_text(content)
    ensure_sample(tmp_path)
    assert json.loads((tmp_path / "sample.json").read_text())["version"] == sample.VERSION
    assert not stale.exists()
    assert own.read_bytes() == b"x"


def test_missing_file_is_noticed(tmp_path, small_default):
    whole = contents(ensure_sample(tmp_path))
    next((tmp_path / "labels").iterdir()).unlink()
    assert contents(ensure_sample(tmp_path)) == whole


def test_wrong_numbers_and_folders_are_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"size 100 .* multiple of 6"):
        make_sample(tmp_path, size=100)
    with pytest.raises(UserError, match=r"0 sample scenes.* 1 to 100"):
        make_sample(tmp_path, scenes=0)
    with pytest.raises(UserError, match="seed -1"):
        make_sample(tmp_path, seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the sample imagery to .*file"):
        make_sample(tmp_path / "file", scenes=1, size=48)
