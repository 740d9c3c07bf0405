"""Each check of labels on a small archive that has the defect, and silence on one that has not."""

import re

import numpy as np
import pytest

from ssl_geo.imagery.diagnosis import diagnose

L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
STATED = "S2A_MSIL2A_20200610T100031_N0214_R122_T33UUU"


def place(k):
    return (10.0, 0.0, 400_000.0 + 2000 * k, 0.0, -10.0, 5_300_000.0)


@pytest.fixture
def world(land, write_stack, tmp_path):
    """Write scenes a, b, c with labels 1 to 3 on their grids; `labels` and `options` change those of scene b."""

    def write(labels=lambda values: values, *, images="abc", labelled="abc", shape=(84, 90), **options):
        for k, name in enumerate("abc"):
            dn = land(k + 3, shape)
            if name in images:
                path = tmp_path / "images" / f"{STATED}_{name}.tif"
                write_stack(path, L2A, array=dn, nodata=0, transform=place(k))
            if name in labelled:
                values = (1 + (dn[7] > 1000) + (dn[5] > 3 * dn[3])).astype(np.uint8)
                changed = {**options} if name == "b" else {}
                values = labels(values) if name == "b" else values
                path = tmp_path / "labels" / f"{STATED}_{name}.tif"
                write_stack(path, None, array=values[None], **{"nodata": 255, "transform": place(k), **changed})
        return tmp_path

    return write


def found(folder, **options):
    diagnosis = diagnose([folder / "images"], [folder / "labels"], progress=False, **options)
    return {finding.check: finding for finding in diagnosis.findings}


def test_labels_that_fit_give_nothing_but_their_balance(world):
    findings = found(world())
    assert set(findings) == {"class balance"}
    balance = findings["class balance"]
    assert balance.severity == "info"
    assert balance.found.startswith("3 values in 3 label rasters")


def test_images_without_labels_and_labels_without_images(world):
    findings = found(world(images="ab", labelled="bc"))
    assert findings["image without label"].severity == "error"
    assert findings["image without label"].paths[0].endswith("_a.tif")
    assert findings["label without image"].paths[0].endswith("_c.tif")
    assert findings["label without image"].found == "1 of 2 labels have no image of their name"


def test_an_image_with_two_labels(world, write_stack):
    folder = world()
    for kind in ("LC", "CT"):
        for k, name in enumerate("abc"):
            array = np.ones((1, 84, 90), np.uint8)
            write_stack(folder / "labels" / f"{STATED}_{name}_{kind}.tif", None, array=array, transform=place(k))
            (folder / "labels" / f"{STATED}_{name}.tif").unlink(missing_ok=True)
    finding = found(folder)["several labels"]
    assert (finding.severity, finding.count) == ("error", 3)


@pytest.mark.parametrize(
    ("words", "labels", "options"),
    [
        ("shape 83×90 against 84×90", lambda values: values[:83], {}),
        ("shifted by 0.5, 0.0 pixels", lambda values: values, {"transform": (10, 0, 402_005, 0, -10, 5_300_000)}),
        ("CRS EPSG:32632 against EPSG:32633", lambda values: values, {"crs": "EPSG:32632"}),
        ("pixels of 20×20", lambda values: values[::2, ::2], {"transform": (20, 0, 402_000, 0, -20, 5_300_000)}),
    ],
)
def test_labels_on_another_grid(world, words, labels, options):
    finding = found(world(labels, **options))["label grid"]
    assert (finding.severity, finding.count) == ("error", 1)
    assert words in finding.found
    assert "--align true" in finding.fix


def test_labels_without_crs_cannot_be_warped(world):
    finding = found(world(crs=None))["label grid"]
    assert "georeference" in finding.fix


def test_labels_on_the_right_grid_in_the_wrong_place(world):
    finding = found(world(lambda v: np.roll(v, (3, -4), (0, 1)), images="b", labelled="b", shape=(160, 180)))[
        "label shift"
    ]
    assert (finding.severity, finding.count) == ("warning", 1)
    assert re.search(r"best (2\.[5-9]|3\.\d) pixels up and (3\.[5-9]|4\.\d) pixels right", finding.found)


def test_values_that_are_no_class(world):
    def strange(values):
        values = values.copy()
        values[:2, :10] = 77
        return values

    folder = world(strange)
    finding = found(folder, classes=[1, 2, 3])["label values"]
    assert (finding.severity, finding.count) == ("error", 1)
    assert "77 (20 pixels)" in finding.found
    (path,) = finding.paths  # not all label rasters, whichever comes first
    assert path.endswith("_b.tif")
    rare = found(folder)["rare classes"]
    assert rare.severity == "warning"
    assert "77 (20 pixels in 1)" in rare.found
    assert {"label values", "rare classes"}.isdisjoint(found(folder, ignore=[77]))
    assert "label values" not in found(folder, classes=[1, 2, 3, 77])


def test_measurements_and_fractions_are_no_classes(world):
    folder = world(lambda values: np.arange(values.size).reshape(values.shape).astype(np.uint16), nodata=None)
    assert "different values" in found(folder)["label values"].found
    folder = world(lambda values: values + np.float32(0.5), nodata=None)
    assert "no class id" in found(folder)["label values"].found


def test_one_class_for_nearly_all(world):
    folder = world(labelled="b", images="b", labels=lambda v: np.where(np.arange(v.size).reshape(v.shape) < 300, 2, 1))
    finding = found(folder)["dominant class"]
    assert finding.severity == "warning"
    assert "value 1 holds 96.03%" in finding.found


def test_no_labelled_pixel(world):
    finding = found(world(labelled="b", images="b", labels=lambda values: np.full_like(values, 255)))["label values"]
    assert finding.found == "no labelled pixel"


def test_a_truncated_label_raster(world):
    folder = world()
    path = folder / "labels" / f"{STATED}_c.tif"
    path.write_bytes(path.read_bytes()[:-300])
    finding = found(folder)["unreadable"]
    assert finding.paths == (str(path),)


def test_negative_values_are_no_classes_and_told(world):
    """The probe ignores them; the doctor counted them as a class."""

    def negative(values):
        values = values.astype(np.int16)
        values[:9] = -1
        return values

    folder = world(negative, nodata=None)
    findings = found(folder)
    finding = findings["negative label values"]
    assert (finding.severity, finding.count, finding.found) == ("warning", 1, "-1 (810 pixels)")
    assert "probe ignores" in finding.fix
    assert findings["class balance"].found.startswith("3 values in 3")
    assert "label values" not in found(folder, classes=[1, 2, 3])
    assert "negative label values" not in found(folder, ignore=[-1])
    assert "negative label values" in found(folder, classes=[1, 2, 3])
    assert "negative label values" not in found(world(negative, nodata=-1))
