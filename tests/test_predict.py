"""Mapping as a user runs it: made-up scenes, the real imagery, and wrong input in one line."""

import json
import math
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

from ssl_geo import predict
from ssl_geo.backbones import create_backbone, describe_backbone
from ssl_geo.config import predict_config
from ssl_geo.errors import UserError
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
