"""Mapping as a user runs it: made-up scenes, the real imagery, and wrong input in one line."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssl_geo import mapping, predict
from ssl_geo.backbones import create_backbone, describe_backbone
from ssl_geo.config import predict_config
from ssl_geo.errors import UserError
from ssl_geo.files import partial_path
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.rasters import open_scene, read_window
from ssl_geo.mapping import RowsReader
from ssl_geo.predict import main
from ssl_geo.probing.features import FeatureExtractor
from ssl_geo.probing.heads import build_head
from ssl_geo.probing.saved import HeadDescription, SavedHead, load_head, save_head
from ssl_geo.views.photometry import standardize_chip

BANDS = ("B02", "B03", "B04", "B08")
TWELVE = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
GRID = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5, 0.0, -10.0, 5.4e6)}
SHAPE = (300, 330)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A linear head with drawn weights on a small untrained backbone."""
    folder = tmp_path_factory.mktemp("head") / "best_head"
    torch.manual_seed(1)
    backbone = create_backbone("convnext_atto", len(BANDS), [(32, 32)], depths=[1] * 4, dims=[8, 8, 12, 16]).eval()
    extractor = FeatureExtractor(backbone, ["stages.1", "stages.0"], input_size=32)
    linear = build_head("linear", extractor.channels, 3, reduction=extractor.reduction)
    description = HeadDescription(
        name="linear @ all layers, seed 0",
        kind="linear",
        layers=tuple(extractor.names),
        channels=tuple(extractor.channels),
        reduction=tuple(extractor.reduction),
        chip_size=32,
        bands=BANDS,
        mean=(0.1, 0.1, 0.1, 0.2),
        std=(0.05, 0.05, 0.05, 0.1),
        class_ids=(2, 5, 9),
        class_names=("water", "wood", "field"),
        class_colours=((0, 0, 255), (0, 99, 0), (200, 200, 0)),
        checkpoint="runs/x",
        confusion=np.random.default_rng(0).integers(5, 50, (8, 3, 3)) + 300 * np.eye(3, dtype=np.int64),
        provenance={"levels": ["L2A"]},
    )
    save_head(folder, linear, description, backbone, describe_backbone(backbone, bands=list(BANDS)))
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A scene with a corner and a hole without data."""
    path = tmp_path_factory.mktemp("scenes") / "S2A_MSIL2A_20180611T103021_N0208_R108_T32UPU.tif"
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 500, (4, 20, 22)).repeat(15, axis=1).repeat(15, axis=2)
    dn = (1500 + coarse + rng.normal(0, 50, (4, *SHAPE))).clip(1, 9000).astype(np.uint16)
    dn[:, :100, :90] = 0
    dn[:, 200:203, 200:203] = 0
    write_geotiff(path, dn, nodata=0, descriptions=list(BANDS), **GRID)
    return path


def settings(head, scene, out, *more):
    return predict_config(["--head", str(head), "--scene", str(scene), "--out", str(out), "--device", "cpu", *more])


def must_be_cog(path):
    """What `rio cogeo validate` checks (rio-cogeo 5, cogeo.py): blocks, overviews, and the order in the file."""
    with rasterio.open(path) as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert set(dataset.block_shapes) == {(256, 256)}
        height, width = dataset.shape
        overviews = dataset.overviews(1)
        if max(height, width) > 256:
            assert overviews == [2**k for k in range(1, len(overviews) + 1)]
            assert max(height, width) / overviews[-1] <= 256
        directories = [int(dataset.get_tag_item("IFD_OFFSET", "TIFF", bidx=1))]
        blocks = [int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1) or 0)]
        for k in range(len(overviews)):
            directories.append(int(dataset.get_tag_item("IFD_OFFSET", "TIFF", bidx=1, ovr=k)))
            blocks.append(int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1, ovr=k) or 0))
    assert directories[0] < 300  # right after the header
    assert directories == sorted(directories)
    pixels = [block for block in blocks if block]
    assert max(directories) < min(pixels)
    assert pixels == sorted(pixels, reverse=True)  # the smallest overview's come first


def test_a_scene_becomes_a_class_map_over_it(head, scene, tmp_path, capsys):
    out = tmp_path / "new" / "map.tif"
    assert main(settings(head, scene, out, "--confidence", "--probabilities", "--batch_size", "7")) == 0
    for path in out.parent.glob("*.tif"):
        must_be_cog(path)
    with rasterio.open(scene) as over, rasterio.open(out) as dataset:
        valid = over.read().any(axis=0)
        assert (dataset.crs, dataset.transform, dataset.shape) == (over.crs, over.transform, over.shape)
        classes = dataset.read(1)
        assert dataset.nodata == 255
        assert dataset.overviews(1)
        assert dataset.colormap(1)[5][:3] == (0, 99, 0)
        tags = dataset.tags()
    assert (tags["class_2"], tags["class_9"], tags["checkpoint"]) == ("water", "field", "runs/x")
    assert tags["head"] == "linear @ all layers, seed 0"
    assert tags["software"].startswith("ssl_geo ")
    np.testing.assert_array_equal(classes == 255, ~valid)
    assert set(np.unique(classes[valid])) <= {2, 5, 9}
    with rasterio.open(out.with_name("map.probabilities.tif")) as dataset:
        probabilities = dataset.read() * dataset.scales[0]
        assert dataset.descriptions == ("water", "wood", "field")
        assert dataset.nodata == 65535
    np.testing.assert_allclose(probabilities[:, valid].sum(axis=0), 1, atol=3e-4)
    most = probabilities[:, valid].max(axis=0)
    chosen = np.take_along_axis(probabilities[:, valid], np.searchsorted([2, 5, 9], classes[valid])[None], axis=0)[0]
    np.testing.assert_allclose(chosen, most, atol=1.1e-4)
    with rasterio.open(out.with_name("map.confidence.tif")) as dataset:
        confidence = dataset.read(1)
    np.testing.assert_array_equal(confidence == 255, ~valid)
    np.testing.assert_allclose(confidence[valid], 100 * most, atol=0.6)

    areas = json.loads(out.with_suffix(".json").read_text())
    assert areas["unit"] == "ha"
    assert areas["nodata_pixels"] == (~valid).sum()
    assert [c["pixels"] for c in areas["classes"]] == [(classes == i).sum() for i in (2, 5, 9)]
    hectares = valid.sum() / 100  # of 10 m by 10 m, up to the scale of UTM
    assert math.isclose(sum(c["mapped"] for c in areas["classes"]), hectares, rel_tol=1e-3)
    assert math.isclose(sum(c["adjusted"] for c in areas["classes"]), hectares, rel_tol=1e-3)
    assert all(c["low"] <= c["adjusted"] <= c["high"] for c in areas["classes"])
    assert "wood" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "map.confidence.tif",
        "map.json",
        "map.probabilities.tif",
        "map.tif",
    ]


def test_away_from_tile_borders_the_map_says_what_one_tile_says(head, scene, tmp_path):
    """In the middle of the sixth tile of the sixth row, where no other lies."""
    main(settings(head, scene, tmp_path / "map.tif", "--probabilities"))
    saved, opened = load_head(head), open_scene(scene)
    described = saved.description
    with rasterio.open(tmp_path / "map.probabilities.tif") as dataset:
        found = dataset.read() * dataset.scales[0]
    row = col = 5 * 24
    dn, valid = read_window(opened, BANDS, row, col, 32, 32)
    tile = standardize_chip((dn * np.float32(opened.scale)).astype(np.float32), valid, described.mean, described.std)
    with torch.inference_mode():
        expected = saved.probabilities(torch.from_numpy(tile)[None])[0].numpy()
    np.testing.assert_allclose(found[:, row + 8 : row + 24, col + 8 : col + 24], expected[:, 8:24, 8:24], atol=1e-4)


def test_a_constant_head_gives_a_map_of_one_class(head, scene, tmp_path, monkeypatch):
    share = torch.tensor([0.1, 0.6, 0.3])[:, None, None]
    monkeypatch.setattr(SavedHead, "probabilities", lambda self, images: share.expand(len(images), 3, 32, 32))
    main(settings(head, scene, tmp_path / "map.tif", "--confidence", "--overlap", "0.5"))
    with rasterio.open(tmp_path / "map.tif") as dataset, rasterio.open(tmp_path / "map.confidence.tif") as sure:
        assert set(np.unique(dataset.read())) == {5, 255}
        assert set(np.unique(sure.read())) == {60, 255}


def test_a_scene_smaller_than_a_tile_and_without_crs(head, tmp_path, capsys):
    write_geotiff(tmp_path / "s.tif", np.full((4, 9, 50), 900, np.uint16), descriptions=BANDS, crs=None, transform=None)
    assert main(settings(head, tmp_path / "s.tif", tmp_path / "map.tif")) == 0
    assert "s.tif has no CRS" in capsys.readouterr().out
    areas = json.loads((tmp_path / "map.json").read_text())
    assert areas["unit"] == "pixels"
    assert sum(c["mapped"] for c in areas["classes"]) == 450


def test_folders_and_patterns_map_many_scenes(head, scene, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tif").symlink_to(scene)
    assert main(settings(head, tmp_path, tmp_path / "maps")) == 0
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"a.tif", "a.json", "b.tif", "b.json"}
    assert main(settings(head, tmp_path / "[ab].tif", tmp_path / "again", "--data.level", "L1C")) == 0
    assert "is L1C, the head was trained on L2A" in capsys.readouterr().out
    assert (tmp_path / "again" / "b.tif").read_bytes() == (tmp_path / "maps" / "b.tif").read_bytes()


def test_a_torn_scene_among_many_costs_itself_alone(head, scene, tmp_path, capsys):
    """Those after it were once not tried, and the same command stumbled over those before it."""
    for name in ("a", "c"):
        (tmp_path / f"{name}.tif").symlink_to(scene)
    (tmp_path / "b.tif").write_bytes(scene.read_bytes()[:-20_000])
    with pytest.raises(UserError, match="left out 1 of 3 scenes that cannot be read, the others are done"):
        main(settings(head, tmp_path, tmp_path / "maps"))
    assert f"left out cannot read {tmp_path / 'b.tif'}" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"a.tif", "a.json", "c.tif", "c.json"}


@pytest.mark.parametrize(("embed", "channels"), [("pca", 3), ("tokens", 8), ("tokens2", 2)])
def test_features_lie_on_the_layers_grid(head, scene, tmp_path, embed, channels, capsys):
    more = ["--components", "2"] if embed == "tokens2" else []
    out = tmp_path / "features.tif"
    assert main(settings(head, scene, out, "--embed", embed.rstrip("2"), *more)) == 0
    must_be_cog(out)
    with rasterio.open(out) as dataset, rasterio.open(scene) as over:
        values, valid = dataset.read(), over.read().any(axis=0)
        assert dataset.shape == (38, 42)  # a place for each 8 pixels of 300 by 330
        assert tuple(dataset.transform)[:6] == (80.0, 0.0, 6e5, 0.0, -80.0, 5.4e6)
        assert dataset.tags()["layer"] == "stages.1"
    assert len(values) == channels
    places = np.pad(valid, ((0, 4), (0, 6))).reshape(38, 8, 42, 8).any(axis=(1, 3))
    np.testing.assert_array_equal(np.isfinite(values).all(axis=0), places)
    assert values[:, places].std(axis=1).min() > 0
    if embed == "pca":
        assert "explained" in capsys.readouterr().out
        assert np.abs(np.corrcoef(values[:, places])[np.triu_indices(3, 1)]).max() < 0.1
    elif embed == "tokens":
        saved = load_head(head)
        dn, inside = read_window(open_scene(scene), BANDS, 128, 128, 32, 32)
        tile = standardize_chip(dn * np.float32(1e-4), inside, saved.description.mean, saved.description.std)
        with torch.inference_mode():
            expected = saved.extractor.as_list(torch.from_numpy(tile)[None])[0][0].numpy()
        # one place in from each side of a tile, as far as stages of 7×7 convolutions let the edge through
        assert np.corrcoef(values[:, 17:19, 17:19].ravel(), expected[:, 1:3, 1:3].ravel())[0, 1] > 0.9


def test_chips_become_rows_with_their_place(head, scene, tmp_path):
    assert main(settings(head, scene, tmp_path / "chips.parquet", "--embed", "chips")) == 0
    table = pq.read_table(tmp_path / "chips.parquet")
    rows, columns = math.ceil(300 / 32), math.ceil(330 / 32)
    empty = 3 * 2  # 32-pixel chips wholly in the corner without data
    assert table.num_rows == rows * columns - empty
    assert json.loads(table.schema.metadata[b"geo"])["primary_column"] == "geometry"
    (row,) = (chip for chip in table.to_pylist() if (chip["row"], chip["col"]) == (128, 160))
    saved = load_head(head)
    dn, valid = read_window(open_scene(scene), BANDS, 128, 160, 32, 32)
    tile = standardize_chip(dn * np.float32(1e-4), valid, saved.description.mean, saved.description.std)
    with torch.inference_mode():
        expected = saved.backbone(torch.from_numpy(tile)[None])[0].numpy()
    np.testing.assert_allclose(row["embedding"], expected, atol=1e-4)


@pytest.mark.parametrize(("embed", "suffix"), [("chips", ".parquet"), ("pca", ".tif")])
def test_an_empty_scene_of_a_batch_is_left_out_and_said(head, scene, tmp_path, capsys, embed, suffix):
    """It ended the batch, which could then not be gone on with: what was written is not written over."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name in ("a", "c"):
        shutil.copy(scene, folder / f"{name}.tif")
    write_geotiff(folder / "b.tif", np.zeros((4, 64, 64), np.uint16), nodata=0, descriptions=list(BANDS), **GRID)
    assert main(settings(head, folder, tmp_path / "out", "--embed", embed)) == 0
    basis = ["pca.safetensors"] * (embed == "pca")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [f"a{suffix}", f"c{suffix}", *basis]
    said = capsys.readouterr().out
    assert "left out 1 of 3 scenes" in said
    assert f"left out {folder / 'b.tif'}: " in said
    with pytest.raises(UserError, match=r"b\.tif: .* \(--data.nodata\)"):
        main(settings(head, folder / "b.tif", tmp_path / "one", "--embed", embed))


@pytest.mark.parametrize("name", ["scenes/aquileia_20190416_L2A.tif", "water/images/labelled_image_1.tif"])
def test_real_scenes(head, shared_data, tmp_path, name):
    names = ["--data.band_names", *TWELVE] if name.startswith("water") else []
    assert main(settings(head, shared_data / name, tmp_path / "map.tif", *names)) == 0
    must_be_cog(tmp_path / "map.tif")
    with rasterio.open(shared_data / name) as over, rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.crs, dataset.transform, dataset.shape) == (over.crs, over.transform, over.shape)
        bands = over.read([TWELVE.index(band) + 1 for band in BANDS])
        np.testing.assert_array_equal(dataset.read(1) == 255, ~bands.any(axis=0))
        assert dataset.nodata == 255
        assert len(dataset.overviews(1)) >= 1
        assert dataset.colormap(1)[2][:3] == (0, 0, 255)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--head", "absent"], "--head absent holds no head.json"),
        (["--scene", "absent.tif"], "absent.tif"),
        (["--scene", "absent*.tif"], "matches nothing"),
        (["--overlap", "0.6"], "--overlap is 0.6"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--components", "3"], "--components is for --embed"),
        (["--layer", "stages.0"], "--layer is for --embed"),
        (["--embed", "pca", "--components", "0"], "--components is 0"),
        (["--embed", "pca", "--components", "99"], "--components 99"),
        (["--embed", "pca", "--layer", "stages.9"], "stages.9"),
        (["--embed", "pca", "--confidence"], "writes no classes"),
        (["--embed", "chips"], "name such a file or a folder"),
        (["--basis", "x"], "--basis is for --embed pca"),
        (["--embed", "pca", "--basis", "absent"], "absent"),
        (["--device", "cuda"], "--device cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_nothing_is_written(head, scene, tmp_path, more, words):
    if more[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as error:
        main(settings(head, scene, tmp_path / "map.tif", *more))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_and_names_may_not_meet(head, scene, tmp_path):
    (tmp_path / "map.confidence.tif").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        main(settings(head, scene, tmp_path / "map.tif", "--confidence"))
    assert [p.name for p in tmp_path.iterdir()] == ["map.confidence.tif"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.tif").symlink_to(scene)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(UserError, match="one file for 2 scenes"):
        main(settings(head, scene, tmp_path / "x.tif", "--scene", *both))
    with pytest.raises(UserError, match="two scenes would be written"):
        main(settings(head, scene, tmp_path / "x", "--scene", *both))


def test_a_scene_that_lacks_a_band_or_breaks_off_leaves_nothing(head, scene, tmp_path):
    write_geotiff(tmp_path / "few.tif", np.ones((2, 9, 9), np.uint16), descriptions=["B02", "B03"], **GRID)
    with pytest.raises(UserError, match="no band B04"):
        main(settings(head, tmp_path / "few.tif", tmp_path / "out.tif"))
    torn = tmp_path / "torn.tif"
    torn.write_bytes(scene.read_bytes()[:-20_000])
    with pytest.raises(UserError, match="cannot read"):
        main(settings(head, torn, tmp_path / "out.tif", "--probabilities"))
    assert {p.name for p in tmp_path.iterdir()} == {"few.tif", "torn.tif"}


def test_the_command_ends_with_exit_code_2_and_one_line(scene, tmp_path):
    command = [
        sys.executable,
        "-m",
        "ssl_geo.predict",
        "--head",
        str(tmp_path),
        "--scene",
        str(scene),
        "--out",
        "x.tif",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("ssl_geo.predict: error: ")
    assert "head.json" in line


def test_a_predict_that_is_told_to_stop_leaves_nothing(head, tmp_path):
    """As `kill` and Slurm do it."""
    rng = np.random.default_rng(0)
    write_geotiff(tmp_path / "s.tif", rng.integers(1, 9000, (4, 4000, 600), np.uint16), descriptions=BANDS, **GRID)
    command = [sys.executable, "-m", "ssl_geo.predict", "--head", str(head), "--scene", str(tmp_path / "s.tif")]
    out = tmp_path / "maps" / "s.tif"
    process = subprocess.Popen([*command, "--out", str(out), "--batch_size", "1"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out.parent.is_dir() and any(out.parent.iterdir())):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "ssl_geo.predict: stopped"
    assert not any(out.parent.iterdir())


def test_settings_against_what_a_scene_states_are_said(head, scene):
    said = list(predict.notes(load_head(head), open_scene(scene, level="L1C", offset=0, scale=2e-4)))
    assert said[-1] == f"{scene} states level L2A: settings say otherwise, and are followed"
    assert not any("states" in line for line in predict.notes(load_head(head), open_scene(scene)))


def test_rows_are_padded_as_not_valid(head, scene):
    read = RowsReader(load_head(head), open_scene(scene), 32, 340)
    image, valid = read(290)
    assert image.shape == (4, 32, 340)
    assert valid[:10, :330].all()
    assert not valid[10:].any()
    assert not valid[:, 330:].any()
    assert (image[:, ~valid] == 0).all()


FLOAT_MOST = 3.4028234663852886e38


def write_floats(path, *, hole=None, shape=(96, 96), bands=BANDS, **options):
    """Reflectance as stored, with a value in nine pixels of the first band."""
    values = np.random.default_rng(2).uniform(0.05, 0.3, (len(bands), *shape)).astype(np.float32)
    if hole is not None:
        values[0, 40:43, 40:43] = hole
    write_geotiff(path, values, descriptions=list(bands), **{**GRID, **options})
    return path


@pytest.mark.parametrize("value", [-FLOAT_MOST, FLOAT_MOST, 1e30, np.inf, np.nan])
def test_nine_pixels_that_nothing_measures_are_nodata_and_cost_themselves_alone(head, tmp_path, value, capsys):
    """They made a whole tile class 1 of confidence 0, which the areas counted."""
    write_floats(tmp_path / "s.tif", hole=value)
    assert main(settings(head, tmp_path / "s.tif", tmp_path / "map.tif", "--confidence", "--data.scale", "1")) == 0
    with rasterio.open(tmp_path / "map.tif") as dataset, rasterio.open(tmp_path / "map.confidence.tif") as sure:
        classes, confidence = dataset.read(1), sure.read(1)
    hole = np.zeros((96, 96), bool)
    hole[40:43, 40:43] = True
    np.testing.assert_array_equal(classes == 255, hole)
    assert confidence[~hole].min() >= 33  # of three classes the most probable
    areas = json.loads((tmp_path / "map.json").read_text())
    assert (areas["nodata_pixels"], areas["unmeasured_pixels"]) == (9, 9)
    assert "  9 pixels hold what nothing measures" in capsys.readouterr().out
    # Declared, they are nodata all the same, and not counted.
    write_floats(tmp_path / "declared.tif", hole=value, nodata=None if np.isinf(value) else value)
    if not np.isinf(value):
        assert main(settings(head, tmp_path / "declared.tif", tmp_path / "again.tif", "--data.scale", "1")) == 0
        with rasterio.open(tmp_path / "again.tif") as dataset:
            np.testing.assert_array_equal(dataset.read(1), classes)
        areas = json.loads((tmp_path / "again.json").read_text())
        assert (areas["nodata_pixels"], areas["unmeasured_pixels"]) == (9, 0)


@pytest.mark.parametrize("embed", ["pca", "tokens", "chips"])
def test_embeddings_of_a_scene_with_such_pixels_are_finite(head, tmp_path, embed, capsys):
    write_floats(tmp_path / "s.tif", hole=-FLOAT_MOST)
    out = tmp_path / ("e.parquet" if embed == "chips" else "e.tif")
    assert main(settings(head, tmp_path / "s.tif", out, "--embed", embed, "--data.scale", "1")) == 0
    assert "  9 pixels hold what nothing measures" in capsys.readouterr().out
    if embed == "chips":
        values = np.stack(pq.read_table(out)["embedding"].to_pylist())
    else:
        with rasterio.open(out) as dataset:
            values = dataset.read()
    assert np.isfinite(values).all()


def test_a_band_that_nothing_measured_leaves_no_map_of_it(head, tmp_path):
    values = np.full((4, 64, 64), 0.2, np.float32)
    values[2] = 1e30
    write_geotiff(tmp_path / "s.tif", values, descriptions=BANDS, **GRID)
    assert main(settings(head, tmp_path / "s.tif", tmp_path / "map.tif", "--data.scale", "1")) == 0
    areas = json.loads((tmp_path / "map.json").read_text())
    assert (areas["nodata_pixels"], areas["unmeasured_pixels"]) == (64 * 64, 64 * 64)
    assert all(c["pixels"] == 0 for c in areas["classes"])


@pytest.mark.parametrize("kind", ["map", "pca", "tokens", "chips"])
def test_a_network_that_is_not_finite_on_valid_pixels_is_refused(head, scene, tmp_path, monkeypatch, kind):
    saved = load_head(head)
    for module in (saved.backbone, saved.head):
        for weight in module.parameters():
            torch.nn.init.constant_(weight, 1e38)
    monkeypatch.setattr(predict, "load_head", lambda folder: saved)
    more = [] if kind == "map" else ["--embed", kind]
    with pytest.raises(UserError, match="NaN or infinity of pixels that are valid") as error:
        main(settings(head, scene, tmp_path / "out", *more))
    assert str(scene) in str(error.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("mean", "std"), [(math.nan, 0.05), (0.1, 1e-40), (0.1, math.inf)])
def test_statistics_that_standardize_nothing_are_refused(head, scene, tmp_path, monkeypatch, mean, std):
    """A NaN in head.json made the whole map one class."""
    saved = load_head(head)
    told = dataclasses.replace(saved.description, mean=(0.1, mean, 0.1, 0.2), std=(0.05, std, 0.05, 0.1))
    monkeypatch.setattr(predict, "load_head", lambda folder: dataclasses.replace(saved, description=told))
    with pytest.raises(UserError, match="statistics"):
        main(settings(head, scene, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("area", [math.nan, math.inf, 0.0])
def test_pixels_of_no_area_are_refused_in_one_line(head, scene, tmp_path, monkeypatch, area):
    """Areas were NaN, which is no JSON, with exit code 0."""
    monkeypatch.setattr(mapping, "pixel_areas", lambda scene: np.array([100.0] * (scene.height - 1) + [area]))
    with pytest.raises(UserError, match="no ground area") as error:
        main(settings(head, scene, tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_same_command_again_does_what_is_not_done_and_no_more(head, scene, tmp_path, capsys):
    """Killed between two files it refused to run again: "exists; name another place"."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(scene, tmp_path / "in" / f"{name}.tif")
    out = tmp_path / "maps"
    command = settings(head, tmp_path / "in", out, "--confidence")
    assert main(command) == 0
    before = contents(out)
    (out / "b.json").unlink()  # killed after the map, before its areas
    (out / "c.tif").unlink()
    dead, ours = (
        partial_path(out / "c.tif").name.replace(f"-{os.getpid()}-", f"-{process}-")
        for process in (dead_process(), os.getppid())
    )
    for name in (dead, dead.replace(".tif", ".rows"), ours, ".c.140-1.rows"):
        (out / name).write_text("half")
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "skipped 1 of 3 scenes" in said
    assert "removed 2 half-written files" in said
    assert f"{tmp_path / 'in' / 'b.tif'} -> " in said
    after = contents(out)
    assert {name for name in after if name.startswith(".")} == {ours, ".c.140-1.rows"}
    assert {name: after[name][1] for name in before} == {name: content for name, (_, content) in before.items()}
    assert all(after[f"a{end}"] == before[f"a{end}"] for end in (".tif", ".json", ".confidence.tif"))  # not touched
    assert main(command) == 0
    assert "skipped 3 of 3 scenes" in capsys.readouterr().out
    assert contents(out) == after


def dead_process():
    """The number of a process that has ended."""
    if not hasattr(dead_process, "pid"):
        process = subprocess.Popen(["true"])
        process.wait()
        dead_process.pid = process.pid
    return dead_process.pid


@pytest.mark.parametrize("change", ["settings", "head", "scene", "foreign"])
def test_what_another_command_made_is_not_written_over(head, scene, tmp_path, change):
    shutil.copy(scene, tmp_path / "s.tif")
    shutil.copytree(head, tmp_path / "head")
    out = tmp_path / "maps"
    command = [tmp_path / "head", tmp_path / "s.tif", out]
    assert main(settings(*command)) == 0
    if change == "settings":
        command += ["--overlap", "0.5"]
    elif change == "head":
        content = json.loads((tmp_path / "head" / "head.json").read_text())
        content["mean"][0] += 0.01
        (tmp_path / "head" / "head.json").write_text(json.dumps(content))
    elif change == "scene":
        dn = np.full((4, 64, 64), 900, np.uint16)
        write_geotiff(tmp_path / "s.tif", dn, descriptions=BANDS, **GRID)
    else:
        (out / "s.json").write_text("[" * 100_000)
    before = contents(out)
    with pytest.raises(UserError, match=r"maps/s\.\w+ exists"):
        main(settings(*command))
    assert contents(out) == before


@pytest.mark.parametrize("embed", ["tokens", "chips", "pca"])
def test_embeddings_that_are_there_are_skipped(head, scene, tmp_path, embed, capsys):
    command = settings(head, scene, tmp_path / "out", "--embed", embed)
    assert main(command) == 0
    before = contents(tmp_path / "out")
    assert main(command) == 0
    assert "skipped 1 of 1 scenes" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_a_scene_whose_header_is_torn_costs_itself_alone(head, scene, tmp_path, capsys):
    (tmp_path / "a.tif").symlink_to(scene)
    (tmp_path / "b.tif").write_bytes(b"II*\0torn")
    with pytest.raises(UserError, match="left out 1 of 2 scenes that cannot be read"):
        main(settings(head, tmp_path, tmp_path / "maps"))
    assert "b.tif" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"a.tif", "a.json"}


def two_dates(folder):
    """Two scenes that share their left half."""
    rng = np.random.default_rng(5)
    first, second = (rng.normal(2000 * k, 300, (4, 12, 12)).repeat(8, 1).repeat(8, 2) for k in (1, 2))
    second[:, :, :48] = first[:, :, :48]
    folder.mkdir()
    for name, dn in (("a", first), ("b", second)):
        write_geotiff(folder / f"{name}.tif", dn.clip(1, 9000).astype(np.uint16), descriptions=BANDS, **GRID)


def read(path):
    with rasterio.open(path) as dataset:
        return dataset.read(), dataset.tags()


def test_the_same_ground_has_the_same_colour_in_every_scene_of_a_call(head, tmp_path):
    """Each scene had principal components of its own."""
    two_dates(tmp_path / "in")
    assert main(settings(head, tmp_path / "in", tmp_path / "out", "--embed", "pca", "--overlap", "0")) == 0
    (first, tags), (second, same) = (read(tmp_path / "out" / f"{name}.tif") for name in ("a", "b"))
    np.testing.assert_array_equal(first[:, :, :4], second[:, :, :4])  # the first column of tiles
    assert np.abs(first[:, :, 8:] - second[:, :, 8:]).max() > 0.01
    assert tags["display_low"] == same["display_low"]
    low, high = (np.array([float(v) for v in tags[f"display_{end}"].split()]) for end in ("low", "high"))
    assert (low < high).all()
    both = np.concatenate([first.reshape(3, -1), second.reshape(3, -1)], axis=1)
    inside = ((both > low[:, None]) & (both < high[:, None])).mean(axis=1)
    assert ((inside > 0.8) & (inside <= 1)).all()


def test_a_basis_is_taken_again_where_it_fits(head, scene, tmp_path):
    two_dates(tmp_path / "in")
    out = tmp_path / "out"
    assert main(settings(head, tmp_path / "in", out, "--embed", "pca")) == 0
    given = ["--embed", "pca", "--basis", str(out / "pca.safetensors")]
    assert main(settings(head, tmp_path / "in" / "b.tif", tmp_path / "b.tif", *given)) == 0
    np.testing.assert_array_equal(read(tmp_path / "b.tif")[0], read(out / "b.tif")[0])
    assert not (tmp_path / "b.pca.safetensors").exists()
    # A folder that has grown: its basis stays, and is said.
    shutil.copy(scene, tmp_path / "in" / "c.tif")
    with pytest.raises(UserError, match=r"fitted on other scenes .*--basis"):
        main(settings(head, tmp_path / "in", out, "--embed", "pca"))
    assert main(settings(head, tmp_path / "in", out, *given)) == 0
    assert (out / "c.tif").exists()


def test_the_basis_that_is_suggested_is_quoted_and_a_missing_one_is_named_as_such(head, scene, tmp_path):
    out = tmp_path / "läufe with spaces"
    assert main(settings(head, scene, out, "--embed", "pca")) == 0
    shutil.copy(scene, tmp_path / "b.tif")
    with pytest.raises(UserError) as error:
        main(settings(head, tmp_path / "b.tif", out, "--embed", "pca"))
    words = shlex.split(str(error.value))
    assert words[words.index("--basis") + 1] == str(out / "pca.safetensors")
    with pytest.raises(UserError, match=r"--basis .*nowhere.* does not exist; name a pca\.safetensors"):
        main(settings(head, scene, out, "--embed", "pca", "--basis", str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("more", "change", "words"),
    [
        (["--layer", "stages.0"], {}, "--basis .* is of layer stages.1"),
        (["--components", "2"], {}, "3 components of 8 channels"),
        ([], {"backbone": "another"}, "another backbone"),
        ([], {"format": "9"}, "no basis"),
        ([], {"axes": torch.zeros(3, 5)}, "no basis"),
        ([], {"mean": torch.full((8,), math.nan)}, "no basis"),
        ([], {"torn": True}, "not a readable safetensors"),
    ],
)
def test_a_basis_that_does_not_fit_is_one_line(head, scene, tmp_path, more, change, words):
    basis = tmp_path / "basis.safetensors"
    assert main(settings(head, scene, tmp_path / "x.tif", "--embed", "pca")) == 0
    tensors = load_file(tmp_path / "x.pca.safetensors")
    with safe_open(tmp_path / "x.pca.safetensors", "pt") as file:
        about = file.metadata()
    for name, value in change.items():
        (tensors if isinstance(value, torch.Tensor) else about).update({name: value if name != "torn" else ""})
    save_file(tensors, basis, about)
    if "torn" in change:
        basis.write_bytes(basis.read_bytes()[:-5])
    with pytest.raises(UserError, match=words) as error:
        main(settings(head, scene, tmp_path / "out", "--embed", "pca", "--basis", str(basis), *more))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())
