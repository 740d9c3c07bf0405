"""The probe as a user runs it, on a small world of labelled GeoTIFFs."""

import json

import numpy as np
import pytest
import rasterio

from ssl_geo.config import probe_config
from ssl_geo.errors import UserError
from ssl_geo.imagery.rasters import write_geotiff
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.probe import main

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


def arguments(world, tmp_path, *more):
    return probe_config(
        [
            *("--ckpt", "random:resnet18", "--images", str(world / "images"), "--labels", str(world / "labels")),
            *("--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--chip_size", "32"),
            *("--results", str(tmp_path / "results.jsonl"), "--seeds", "1", "--epochs", "2", "--heads", "linear"),
            *("--split.block", "320", "--layers", "layer1", "layer2", *more),
        ]
    )


def test_a_probe_leaves_report_and_maps_on_the_grid_of_the_image(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "over pixels" in said
    assert "over random initialization" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    assert {"linear @ layer1", "linear @ layer2", "pixels", "random convolutions", "majority class"} <= groups.keys()
    assert groups["pixels"]["scores"]["miou"]["value"] > 0.9
    assert (tmp_path / "out" / "report.md").read_text().count("|") > 20
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    (path,) = (tmp_path / "out" / "maps").iterdir()
    with rasterio.open(path) as dataset:
        assert dataset.crs.to_epsg() == 32632
        assert tuple(dataset.transform)[:6] == GRID["transform"]
        assert set(np.unique(dataset.read(1))) <= {3, 7}
        assert dataset.nodata == 255
        assert dataset.colormap(1)[3] != dataset.colormap(1)[7]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--heads", "linaer"], "linaer"),
        (["--classes", "3"], "7"),
        (["--layers", "layer9"], "layer9"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_nothing_is_written(world, tmp_path, more, words):
    with pytest.raises(UserError) as error:
        main(arguments(world, tmp_path, *more))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_layers_are_listed(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--layers", "list")) == 0
    assert "layer4" in capsys.readouterr().out


def test_an_image_without_label_is_refused(world, tmp_path):
    (tmp_path / "labels").mkdir()
    with pytest.raises(UserError, match="label"):
        main(arguments(world, tmp_path, "--labels", str(tmp_path / "labels")))
    assert not (tmp_path / "out").exists()
