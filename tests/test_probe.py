"""The probe as a user runs it, on a small world of labelled GeoTIFFs."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import ssl_geo.probe
from ssl_geo.backbones import create_backbone, describe_backbone, export_backbone, load_backbone
from ssl_geo.config import probe_config
from ssl_geo.errors import UserError
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.labelled import LabelledChips, pair_labels
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.probe import PACE_CHIPS, build_heads, chosen_layers, claimed, main, surely_above, untried
from ssl_geo.probing.enlarging import dense_features
from ssl_geo.probing.features import FeatureExtractor
from ssl_geo.probing.normalizing import normalize
from ssl_geo.probing.saved import load_head
from ssl_geo.task import chip_size, labelled_task

LEFT = {"report.html", "report.json", "report.md", "maps", "best_head"}
GRID = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5, 0.0, -10.0, 5.4e6)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One image whose two classes differ in brightness, with its label raster of ids 3 and 7."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, (12, 12)).repeat(16, axis=0).repeat(16, axis=1)
    dn = (800 + 1500 * classes + rng.normal(0, 300, (10, 192, 192))).clip(1, 9000).astype(np.uint16)
    name = "S2A_MSIL2A_20180611T103021_N0208_R108_T32UPU.tif"
    write_geotiff(folder / "images" / name, dn, nodata=0, descriptions=list(DEFAULT_BANDS), **GRID)
    write_geotiff(folder / "labels" / name, np.where(classes, 7, 3).astype(np.uint8)[None], **GRID)
    return folder


def checkpoint(folder, name, options, bands):
    """An untrained backbone as pretraining leaves it."""
    folder.mkdir()
    torch.manual_seed(5)
    backbone = create_backbone(name, len(bands), [(32, 32)], **options)
    statistics = {"mean": [0.2] * len(bands), "std": [0.1] * len(bands)}
    export_backbone(folder, backbone, describe_backbone(backbone, bands=list(bands), **statistics))


def arguments(world, tmp_path, *more):
    return probe_config(
        [
            *("--ckpt", "random:resnet18", "--images", str(world / "images"), "--labels", str(world / "labels")),
            *("--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--chip_size", "32"),
            *("--results", str(tmp_path / "results.jsonl"), "--seeds", "1", "--epochs", "2", "--heads", "linear"),
            *("--split.block", "320", "--layers", "layer1", "layer2", *more),
        ]
    )


def test_a_probe_leaves_report_and_maps_on_the_grid_of_the_image(world, tmp_path, capsys, seen_page):
    assert main(arguments(world, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "over pixels" in said
    assert "over random initialization" in said
    # Single pixels decide this task.
    assert "try --context 16, so that the backbone sees what surrounds a chip, at four times the time; or --enl" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    assert {"linear @ layer1", "linear @ layer2", "pixels", "random convolutions", "majority class"} <= groups.keys()
    assert groups["pixels"]["scores"]["miou"]["value"] > 0.9
    seen = "random initialization: its batch normalization has seen"
    assert seen in said
    assert any(line.startswith(seen) for line in report["splits"])
    assert (tmp_path / "out" / "report.md").read_text().count("|") > 20
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    page = seen_page((tmp_path / "out" / "report.html").read_text())
    assert page.fetched == []
    assert page.headings[:3] == ["Models and baselines", "Classes", "Best and worst chips"]
    for words in (
        "mIoU",
        "IoU of each",
        "Rows are",
        "Most right",
        "Most wrong",
        "main components",
        "Cosine",
        "split lie",
    ):
        assert any(words in caption for caption in page.captions), words
    (path,) = (tmp_path / "out" / "maps").iterdir()
    with rasterio.open(path) as dataset:
        assert dataset.crs.to_epsg() == 32632
        assert tuple(dataset.transform)[:6] == GRID["transform"]
        assert set(np.unique(dataset.read(1))) <= {3, 7}
        assert dataset.nodata == 255
        assert dataset.colormap(1)[3] != dataset.colormap(1)[7]
        values = dataset.read()
    saved = load_head(tmp_path / "out" / "best_head").description
    assert saved.name.startswith(report["best"])
    (chosen,) = (result for result in report["results"] if result["name"] == saved.name)
    assert saved.confusion.sum(axis=0).tolist() == chosen["confusion"]
    assert (saved.class_ids, saved.bands, saved.chip_size) == ((3, 7), tuple(DEFAULT_BANDS), 32)
    (image,) = (world / "images").iterdir()
    command = [sys.executable, "-m", "ssl_geo.predict", "--head", str(tmp_path / "out" / "best_head"), "--scene"]
    subprocess.run([*command, str(image), "--out", str(tmp_path / "map.tif")], check=True, timeout=120)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.read() == values).mean() > 0.95  # the probe maps chips side by side, from float16 features


def test_context_enlarging_and_pixels_reach_report_maps_and_the_saved_head(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--context", "8", "--pixels", "true", "--enlarge", "2")) == 0
    said = capsys.readouterr().out
    assert "32×32 pixels and 8 around them" in said
    assert "try --" not in said  # nothing is left untried
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = {group["name"] for group in report["groups"]}
    assert {
        "linear probe @ all layers and pixels",
        "random initialization, linear probe @ all layers and pixels",
    } <= groups
    for path in (tmp_path / "out" / "maps").glob("*.tif"):
        with rasterio.open(path) as drawn:
            assert (drawn.read(1) != drawn.nodata).all()
    head = load_head(tmp_path / "out" / "best_head")
    assert (head.description.chip_size, head.description.enlarge) == (48, 2)
    images = torch.randn(2, len(head.description.bands), 48, 48)
    assert head.probabilities(images).shape == (2, len(report["classes"]), 48, 48)
    assert head.description.layers[-1] == "pixels"


def test_dpt_finds_its_four_layers_where_enlarging_adds_a_fifth(world, tmp_path):
    backbone = create_backbone("resnet18", 10, [(32, 32)])
    asked = ("--layers", "auto", "--enlarge", "2", "--heads")
    for head, layers in (("conv_block", 5), ("dpt", 4)):
        found = chosen_layers(arguments(world, tmp_path, *asked, head), backbone)
        extractor = dense_features(backbone.eval(), found, side=32, enlarge=2)
        (built,) = build_heads([head], extractor, 2, seed=0).values()
        assert len(found) == len(built[1]) == layers


def test_context_is_not_named_where_images_end_with_the_chip(world, tmp_path):
    scenes = pair_labels([world / "images"], world / "labels")
    for side, named in ((192, False), (96, True)):
        chips = LabelledChips(scenes, bands=DEFAULT_BANDS, chip_size=side)
        left = untried(arguments(world, tmp_path), chips)
        assert any(way.startswith("--context") for way in left) == named
        assert left[-1].startswith("--enlarge 2")


def test_the_backbone_sees_every_chip_once(world, tmp_path, monkeypatch):
    """Five heads on four layers, three seeds; the untrained twin is another backbone."""
    backbone = ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2})
    checkpoint(tmp_path / "vit", *backbone, DEFAULT_BANDS)
    seen = []
    forward = FeatureExtractor.forward

    def counted(self, images):
        if len(images) != PACE_CHIPS:  # the batch that times are foretold by
            seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(FeatureExtractor, "forward", counted)
    more = ("--ckpt", str(tmp_path / "vit"), "--layers", "auto", "--seeds", "3", "--epochs", "1")
    heads = ("--heads", "linear", "patch_linear", "conv_block", "fpn", "dpt")
    assert main(arguments(world, tmp_path, *more, *heads)) == 0
    assert sum(seen) == 2 * 36
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    assert groups["dpt @ all layers"]["seeds"] == [0, 1, 2]
    assert groups["random initialization, dpt @ all layers"]["seeds"] == [0]
    assert len([name for name in groups if name.startswith("patch_linear @")]) == 4
    # The next probe of the same backbone makes no pass.
    seen.clear()
    assert main(arguments(world, tmp_path, *more, "--heads", "fpn", "--out", str(tmp_path / "again"))) == 0
    assert not seen


def test_the_twin_is_normalized_on_training_chips_and_the_checkpoint_is_not(world, tmp_path, monkeypatch, capsys):
    checkpoint(tmp_path / "run", "resnet18", {}, DEFAULT_BANDS)
    normalized = []

    def record(model, read_image, chips, **how):
        normalize(model, read_image, chips, **how)
        normalized.append((model.model, len(chips)))
        return model

    monkeypatch.setattr(ssl_geo.probe, "normalize", record)
    given = arguments(world, tmp_path, "--ckpt", str(tmp_path / "run"))
    assert main(given) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = "no certain gain over random initialization" in capsys.readouterr().out
    assert told is not surely_above("random_initialization", report)
    ((twin, chips),) = normalized
    assert 0 < chips < 36
    own = load_head(tmp_path / "out" / "best_head").extractor.model
    assert own.bn1.running_mean.abs().max() == 0  # as it was saved: an untrained network's
    assert twin.bn1.running_mean.abs().min() > 0
    # Its features are there now: no chip is read again for them.
    assert main(arguments(world, tmp_path, "--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "again"))) == 0
    assert len(normalized) == 1


def test_a_gain_is_certain_where_its_interval_lies_above_0():
    gains = {"above": {"low": 0.01}, "around": {"low": -0.01}, "without interval": {"low": None}, "no reference": None}
    report = {"best": "b", "groups": [{"name": "a", "gains": {}}, {"name": "b", "gains": gains}]}
    assert [name for name in gains if surely_above(name, report)] == ["above"]


TWELVE = ("B01", *DEFAULT_BANDS[:8], "B09", *DEFAULT_BANDS[8:])
SIX = ("B02", "B03", "B04", "B08", "B11", "B12")
REAL = {  # images, labels, settings, bands of the checkpoint, blocks of test at least
    "landcover": ("landcover/images_l2a", "landcover/labels", ["--split.block", "560"], DEFAULT_BANDS, 15),
    "water": ("water/images/labelled_image_1.tif", "water/labels", ["--split.block", "560"], DEFAULT_BANDS, 5),
    "cloud": (
        "cloud/images",
        "cloud/labels",
        ["--data.scale", "1", "--split.block", "56"],
        ("B02", "B03", "B04", "B08", "B11", "B12"),
        10,
    ),
}


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", REAL)
def test_real_labels_give_a_report_and_maps_over_their_images(name, shared_data, tmp_path):
    images, labels, more, bands, blocks = REAL[name]
    # A patchifying stem: its features lie where they are drawn. (Maps from a ResNet's first layers lie a pixel off.)
    checkpoint(tmp_path / "run", "convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 16, 24, 32]}, bands)
    names = [] if name == "cloud" else ["--data.band_names", *TWELVE]
    given = ["--images", str(shared_data / images), "--labels", str(shared_data / labels), *names, *more]
    settings = ["--chip_size", "56", "--seeds", "1", "--epochs", "1", "--heads", "linear", "--layers", "0"]
    places = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path), "--results", str(tmp_path / "results.jsonl")]
    assert main(probe_config(["--ckpt", str(tmp_path / "run"), *given, *settings, *places])) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["groups"][0]["blocks"] >= blocks
    assert report["groups"][0]["gains"]["pixels"]["low"] is not None
    maps = sorted((tmp_path / "out" / "maps").iterdir())
    assert len(maps) == (5 if name == "landcover" else 1)
    found = np.zeros(25, np.int64)
    for path in maps:
        image = next((shared_data / images).parent.rglob(path.name))
        with rasterio.open(image) as over, rasterio.open(path) as dataset:
            assert (dataset.crs, dataset.transform, dataset.shape) == (over.crs, over.transform, over.shape)
            classes = dataset.read(1)
        truth = rasterio.open(shared_data / labels / path.name).read(1)
        # Shifted by a pixel or two in any direction the map agrees less with its labels.
        inner = truth[2:-2, 2:-2]
        shifts = np.lib.stride_tricks.sliding_window_view(classes, inner.shape).reshape(25, *inner.shape)
        found += (shifts == inner).sum(axis=(1, 2))
    assert found[12] > 0.999 * found.max()  # of the 25 shifts the one by nothing; labels have slips of their own


VIT = ["--ckpt", "random:vit_tiny_patch16_224", "--layers", "auto", "--chip_size", "36"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--heads", "linaer"], "did you mean linear"),
        (["--heads", "linear", "linear"], "each once"),
        (["--classes", "3"], "7"),
        (["--layers", "layer9"], "layer9"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--batch_size", "-1"], "--batch_size is -1"),
        (["--lr", "0"], "--lr is 0.0"),
        (["--split.block", "100000"], "--split.block"),
        (["--split.block", "0"], "blocks of 0 metres: more than 0 is needed, set --split.block"),
        (["--split.fractions", "0.8", "0.0", "0.2"], "no chip in val"),
        (["--split.fractions", "0.5", "0.5", "0.0"], "no chip in test"),
        (["--split.gap", "5000"], "no valid pixel in"),
        (["--results", "/tmp"], "--results /tmp is a folder"),
        (["--out", "/dev/null/out"], "--out /dev/null/out cannot be made (Not a directory)"),
        (["--split.file", "absent.json"], "absent.json"),
        (["--ckpt", "absent"], "absent"),
        (["--ckpt", "random:resnet1"], "resnet1"),
        (["--ckpt", "resnet18"], "timm:resnet18 has its published weights, random:resnet18 is it untrained"),
        (["--split.gap", "-5"], "--split.gap -5"),
        (["--device", "cuda"], "--device cpu"),
        (["--chip_size", "0"], "--chip_size 0"),
        (VIT, "--chip_size 36: the backbone takes sides that are multiples of 16; give --chip_size 32 or 48"),
        ([*VIT, "--context", "3"], "--chip_size 36 with --context 3: the backbone takes sides that are"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_nothing_is_written(world, tmp_path, more, words):
    with pytest.raises(UserError) as error:
        main(arguments(world, tmp_path, *more))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_chips_of_the_sample_are_as_large_as_a_transformer_takes_them():
    """The plainest command with a ViT ended in an assertion of timm's: 120 pixels, patches of 16."""
    config = probe_config(["--ckpt", "random:vit_tiny_patch16_224"])
    assert [chip_size(config, {}, multiple) for multiple in (1, 8, 14, 16, 32)] == [120, 120, 112, 112, 96]
    config.context = 4
    assert chip_size(config, {}, 16) == 120
    config.images = ["any"]
    config.context, config.enlarge = 0, 2
    assert chip_size(config, {"chip_size": 36}, 16) == 32
    assert chip_size(config, {"chip_size": 36}, 8) == 36


def test_baselines_have_the_class_weights_of_the_heads(world, tmp_path, monkeypatch):
    given = {}

    def rivals(*_: object, **settings: object) -> list[object]:
        given.update(settings)
        raise UserError("enough")

    monkeypatch.setattr(ssl_geo.probe, "score_rivals", rivals)
    with pytest.raises(UserError, match="enough"):
        main(arguments(world, tmp_path, "--class_weights", "true"))
    assert given["class_weights"].shape == (2,)
    assert given["class_weights"].mean() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("size", "words"), [("32", "--split.block 320 gives 7"), ("64", "--chip_size 32 --split.block 319.6 gives enough")]
)
def test_few_test_blocks_come_with_a_block_that_gives_enough(world, tmp_path, size, words):
    """A small scene ended with one test block of two chips, and nothing said which --split.block would do."""
    description = {"bands": DEFAULT_BANDS}
    few = ("--split.block", "960", "--chip_size", size)
    (line,) = labelled_task(arguments(world, tmp_path, *few), description).advice
    assert "of the 5 blocks that an interval needs" in line
    assert words in line
    given = [part for pair in re.findall(r"(--[a-z_.]+) ([\d.]+)", line) for part in pair]
    task = labelled_task(arguments(world, tmp_path, *few, *given), description)
    assert task.split.report.blocks["test"] >= 5
    assert task.advice == ()
    if size == "32":
        with pytest.raises(UserError, match=r"make --split.block smaller.*; --split.block \d+(\.\d)? gives \d blocks"):
            labelled_task(arguments(world, tmp_path, "--split.block", "1920"), description)


def test_an_out_that_is_a_file_is_refused(world, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out is in use"):
        main(arguments(world, tmp_path))
    assert (tmp_path / "out").read_text() == "mine"


def test_labels_of_one_class_are_no_question(world, tmp_path):
    """A mask of 0 and 1 that declares 0 as nodata gave mIoU 1.000, for sure."""
    labels = tmp_path / "labels"
    labels.mkdir()
    (path,) = (world / "labels").iterdir()
    with rasterio.open(path) as dataset:
        ids = dataset.read()
    write_geotiff(labels / path.name, (ids == 7).astype(np.uint8), nodata=0, **GRID)
    with pytest.raises(UserError, match=r"the labels hold one class, 1, .* unless --classes lists it"):
        main(arguments(world, tmp_path, "--labels", str(labels)))
    assert main(arguments(world, tmp_path, "--labels", str(labels), "--classes", "0", "1")) == 0


def test_maps_of_images_with_one_name_are_all_kept(world, tmp_path):
    """Folders of dates hold files of one name: the later map replaced the earlier one."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    labels.mkdir()
    (image,), (label,) = (world / "images").iterdir(), (world / "labels").iterdir()
    shutil.copy(label, labels / "site.tif")
    for date in ("20200101", "20210101"):
        (images / date).mkdir(parents=True)
        shutil.copy(image, images / date / "site.tif")
    assert main(arguments(world, tmp_path, "--images", str(images), "--labels", str(labels))) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "maps").iterdir()) == ["site-2.tif", "site.tif"]


def test_images_without_labels_are_no_question(tmp_path):
    for given, lacking in (("images", "labels"), ("labels", "images")):
        with pytest.raises(UserError, match=f"--{given} without --{lacking}"):
            main(probe_config(["--ckpt", "random:resnet18", f"--{given}", str(tmp_path)]))


def test_a_file_of_splits_is_checked(world, tmp_path):
    for content, words in (
        ("{", "no readable JSON"),
        ('["a"]', "must hold"),
        ('{"other": "train"}', "no split"),
        ('{"other": "trian"}', "puts other into 'trian'; the splits are train, val and test"),
    ):
        (tmp_path / "splits.json").write_text(content)
        with pytest.raises(UserError, match=words):
            main(arguments(world, tmp_path, "--split.file", str(tmp_path / "splits.json")))


def test_names_of_splits_that_are_no_images_are_said(world, tmp_path, capsys):
    (image,) = (world / "images").iterdir()
    images, labels = tmp_path / "images", tmp_path / "labels"
    splits = {}
    for number, split in enumerate(("train", "val", "test")):
        for folder, source in ((images, "images"), (labels, "labels")):
            folder.mkdir(exist_ok=True)
            (folder / f"{number}.tif").symlink_to(world / source / image.name)
        splits[str(number)] = split
    (tmp_path / "splits.json").write_text(json.dumps({**splits, "3": "test"}))
    where = ["--images", str(images), "--labels", str(labels), "--split.file", str(tmp_path / "splits.json")]
    labelled_task(arguments(world, tmp_path, *where), {"bands": DEFAULT_BANDS})
    assert "1 of 4 names in --split.file are no image's, the first is 3" in capsys.readouterr().out


def test_what_is_warned_at_the_start_stands_in_the_report(world, tmp_path, capsys):
    """The console warned of clipped values, and report.md said "Warnings: none"."""
    for kind in ("images", "labels"):
        shutil.copytree(world / kind, tmp_path / "clipped" / kind)
    (image,) = (tmp_path / "clipped" / "images").iterdir()
    with rasterio.open(image, "r+") as dataset:
        dataset.write((dataset.read().astype(np.int32) * 3).clip(1, 6000).astype(np.uint16))
    assert main(arguments(tmp_path / "clipped", tmp_path)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: clipped values")]
    assert line in json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert "clipped values" in (tmp_path / "out" / "report.md").read_text().partition("## Warnings")[2]
    assert "clipped values" in (tmp_path / "out" / "report.html").read_text()


def test_a_full_disk_is_said_before_anything_is_computed(world, tmp_path, monkeypatch):
    """It was met at the end, after all heads were trained, and left an --out that could not be used again."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"leaves some \d+ MB in --out .* 1 MB free"):
        main(arguments(world, tmp_path))
    assert not (tmp_path / "out").exists()  # so that it can be used again


def test_a_results_table_that_cannot_grow_is_refused_before_anything_is_computed(world, tmp_path, monkeypatch):
    """It was found out after all heads were trained, and cost report.html."""
    monkeypatch.setattr(ssl_geo.probe, "labelled_task", lambda *_, **__: pytest.fail("began to compute"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for table, words in (("pipe", "is a device or pipe"), ("file/results.jsonl", "Not a directory")):
        with pytest.raises(UserError, match=words):
            main(arguments(world, tmp_path, "--results", str(tmp_path / table)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"--results .*results.jsonl cannot be written \(No space left"):
        main(arguments(world, tmp_path))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "results.jsonl").exists()


def test_a_results_table_that_fails_at_the_end_costs_no_report(world, tmp_path, monkeypatch, capsys):
    def full(path, row):
        raise UserError(f"results table {path} cannot be written (No space left on device)")

    monkeypatch.setattr(ssl_geo.probe, "append_result", full)
    with pytest.raises(UserError, match=r"No space left on device.*; the report is complete"):
        main(arguments(world, tmp_path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == LEFT
    assert "report.html" in capsys.readouterr().out


def test_two_probes_of_one_out_do_not_disturb_each_other(world, tmp_path):
    """The second once wrote into the folder of the first, and both ended in tracebacks."""
    out = tmp_path / "out"
    out.mkdir()
    hold = "import sys, pathlib, ssl_geo.training.lock as l; k = l.Lock(); k.take(pathlib.Path(sys.argv[1])); "
    hold += "print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, str(out)], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"being written by process {other.pid}"):
            main(arguments(world, tmp_path))
        other.kill()
    (out / ".lock").unlink()
    out.rmdir()
    with claimed(tmp_path / "out"):
        (tmp_path / "out" / "report.md").touch()
    with pytest.raises(UserError, match="is in use"), claimed(tmp_path / "out"):
        pytest.fail("took a folder that is in use")


def test_an_out_that_vanishes_while_a_probe_computes_is_one_line(world, tmp_path, monkeypatch):
    def vanish(path, *_):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(ssl_geo.probe, "save_head", vanish)
    with pytest.raises(UserError, match=r"--out .* cannot be written \(No such file or directory\)"):
        main(arguments(world, tmp_path, "--layers", "layer2", "--epochs", "1"))


def test_a_run_that_is_renamed_while_its_backbone_is_read_is_one_line(tmp_path, monkeypatch):
    checkpoint(tmp_path / "run", "resnet18", {}, DEFAULT_BANDS)
    monkeypatch.setattr(Path, "is_file", lambda self: True)  # it was there a moment ago
    for name in ("backbone.safetensors", "backbone.json"):
        (tmp_path / "run" / name).unlink()
        with pytest.raises(UserError, match=name):
            load_backbone(tmp_path / "run")


def test_a_single_training_chip_is_enough_to_probe(world, tmp_path):
    """Batch normalization of the twin met one value a channel, which has no variance."""
    (image,) = (world / "images").iterdir()
    with rasterio.open(image) as dataset, rasterio.open(world / "labels" / image.name) as labelled:
        dn, labels = dataset.read(), labelled.read()
    for number, name in enumerate(("a", "b", "c")):
        for kind, array, options in (
            ("images", dn, {"nodata": 0, "descriptions": list(DEFAULT_BANDS)}),
            ("labels", labels, {}),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            part = array[:, :32, 32 * number : 32 * number + 32]
            write_geotiff(
                tmp_path / kind / f"{name}.tif", part, crs=GRID["crs"], transform=GRID["transform"], **options
            )
    (tmp_path / "splits.json").write_text(json.dumps({"a": "train", "b": "val", "c": "test"}))
    where = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    more = ["--split.file", str(tmp_path / "splits.json"), "--layers", "layer3", "layer4"]
    assert main(arguments(world, tmp_path, *where, *more)) == 0


def test_a_band_that_the_images_lack_is_named(world, tmp_path):
    checkpoint(tmp_path / "run", "resnet18", {}, ["B02", "B01"])
    with pytest.raises(UserError, match="no band B01"):
        main(arguments(world, tmp_path, "--ckpt", str(tmp_path / "run")))
    assert not (tmp_path / "out").exists()


def test_labels_on_another_grid_are_refused_or_warped(world, tmp_path, capsys):
    (labels,) = (world / "labels").iterdir()
    (tmp_path / "labels").mkdir()
    with rasterio.open(labels) as dataset:
        shifted = {**GRID, "transform": (10.0, 0.0, 6e5 + 40, 0.0, -10.0, 5.4e6)}
        write_geotiff(tmp_path / "labels" / labels.name, dataset.read(), **shifted)
    with pytest.raises(UserError, match="--align"):
        main(arguments(world, tmp_path, "--labels", str(tmp_path / "labels")))
    assert main(arguments(world, tmp_path, "--labels", str(tmp_path / "labels"), "--align", "true")) == 0
    assert "warped to the image's grid" in capsys.readouterr().out


def test_a_checkpoint_from_elsewhere_or_torn_ends_with_exit_code_2(world, tmp_path):
    torch.save({"weights": [1, 2]}, tmp_path / "elsewhere.pt")
    checkpoint(tmp_path / "torn", "resnet18", {}, DEFAULT_BANDS)
    weights = tmp_path / "torn" / "backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for name in ("elsewhere.pt", "torn"):
        command = [
            sys.executable,
            "-m",
            "ssl_geo.probe",
            "--ckpt",
            str(tmp_path / name),
            "--out",
            str(tmp_path / "out"),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2
        (line,) = ended.stderr.splitlines()
        assert name in line
    assert not (tmp_path / "out").exists()


def test_layers_are_listed(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--layers", "list")) == 0
    assert "layer4" in capsys.readouterr().out


def test_an_image_without_label_is_refused(world, tmp_path):
    (tmp_path / "labels").mkdir()
    with pytest.raises(UserError, match="label"):
        main(arguments(world, tmp_path, "--labels", str(tmp_path / "labels")))
    assert not (tmp_path / "out").exists()
