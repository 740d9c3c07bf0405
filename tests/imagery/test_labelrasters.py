"""Masks and class maps in a folder of imagery: named as labels, judged by nothing else, destroyed by no advice."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio

from ssl_geo.config import doctor_config
from ssl_geo.imagery.diagnosis import diagnose

L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
STATED = "S2A_MSIL2A_20200610T100031_N0214_R122_T33UUU"


def place(k):
    return (10.0, 0.0, 400_000.0 + 2000 * k, 0.0, -10.0, 5_300_000.0)


@pytest.fixture
def world(land, write_stack, tmp_path):
    """Write images i with masks at `where(i)`, both on one grid; returns the folder, whose name has a space."""

    def write(where, *, count=3, dtype=np.uint8, **options):
        folder = tmp_path / "my archive"
        for k in range(count):
            dn = land(k, (64, 64))
            image, mask = where(k)
            write_stack(folder / image, L2A, array=dn, nodata=0, transform=place(k))
            values = (dn[7:8] > 1000).astype(dtype)
            write_stack(folder / mask, None, array=values, **{"transform": place(k), **options})
        return folder

    return write


def found(*paths, labels=(), **options):
    diagnosis = diagnose(paths, labels, progress=False, **options)
    return {finding.check: finding for finding in reversed(diagnosis.findings)}


def as_the_shell_takes_it(command):
    """The settings of a command line of the doctor, its quotes and patterns resolved by a shell."""
    words = command.removeprefix("python -m ssl_geo.doctor ")
    assert words != command
    listed = subprocess.run(["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True)
    return doctor_config(listed.stdout.splitlines())


LAYOUTS = {
    "the same stem in the same folder": lambda k: (f"{STATED}_{k}.tif", f"{STATED}_{k}_mask.tif"),
    "a folder of labels": lambda k: (f"images/{STATED}_{k}.tif", f"labels/{STATED}_{k}.tif"),
    "labels in parts": lambda k: (f"images/{STATED}_{k}.tif", f"labels/part {k}/{STATED}_{k}.tif"),
    "a folder for each": lambda k: (f"{k}/{STATED}_{k}.tif", f"{k}/{STATED}_{k}_mask.tif"),
    "other images beside": lambda k: (f"{'ab'[k > 1]}/{STATED}_{k}.tif", f"gt/{STATED}_{k}.tif"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_masks_beside_images_are_named_as_labels_with_a_call_that_works(world, write_stack, land, layout, dtype):
    """Of a 0/1 mask the doctor said "undeclared nodata … rio edit-info --nodata 0"; done so, class 0 was gone."""
    folder = world(LAYOUTS[layout], dtype=dtype)
    if layout == "other images beside":
        write_stack(folder / "a" / "unlabelled.tif", L2A, array=land(9, (64, 64)), nodata=0, transform=place(9))
    findings = found(folder)
    finding = findings.pop("labels among the images")
    assert (finding.severity, finding.count) == ("error", 3)  # a run would stop at them
    assert "(0 1)" in finding.found
    assert not [f for f in findings.values() if f.severity != "info"]
    assert not {path for f in findings.values() for path in f.paths} & set(finding.paths)
    config = as_the_shell_takes_it(finding.command)
    diagnosis = diagnose(config.paths, config.labels, progress=False)
    assert (diagnosis.scenes, diagnosis.labels) == (3, 3)
    assert {f.check for f in diagnosis.findings if f.severity != "info"} <= {"label shift"}


def test_a_class_map_of_another_name_is_known_by_its_grid(world):
    folder = world(lambda k: (f"{STATED}_{k}.tif", f"truth of {k}.tif"))
    assert "same grid" in found(folder)["labels among the images"].found


def test_palettes_beside_images_are_labels_too_and_stop_nothing(world):
    folder = world(LAYOUTS["a folder of labels"], colormap={0: (0, 0, 0), 1: (9, 99, 9)})
    findings = found(folder)
    assert findings["labels among the images"].severity == "warning"
    assert "no imagery" not in findings


def test_one_band_of_many_values_or_without_an_image_is_no_label(world, land, write_stack, tmp_path):
    folder = world(lambda k: (f"{k}.tif", f"{k}_height.tif"), count=1)
    height = land(3, (64, 64))[:1]
    write_stack(folder / "0_height.tif", None, array=height, transform=place(0))
    assert "labels among the images" not in found(folder)
    write_stack(tmp_path / "alone" / "mask.tif", None, array=(height > 900).astype(np.uint8), transform=place(0))
    assert "labels among the images" not in found(tmp_path / "alone")


def test_labels_without_a_pattern_in_their_names_are_listed_or_get_a_folder(world):
    names = ("oak", "elm", "ash")
    folder = world(lambda k: (f"{STATED}_{k}.tif", f"{names[k % 3]}{k}.tif"))
    finding = found(folder)["labels among the images"]
    assert {Path(path).name for path in as_the_shell_takes_it(finding.command).labels} == {
        "oak0.tif",
        "elm1.tif",
        "ash2.tif",
    }
    finding = found(world(lambda k: (f"{STATED}_{k}.tif", f"{names[k % 3]}{k}.tif"), count=21))[
        "labels among the images"
    ]
    assert finding.command == ""
    assert "a folder of their own" in finding.fix


def defects(folder, land, write_stack):
    """An archive with nearly every defect that has a fix."""
    edge = land(0)
    edge[:, :20] = 0
    write_stack(folder / "a b.tif", L2A, array=edge, transform=place(0))
    write_stack(folder / "copy of a b.tif", L2A, array=edge, transform=place(0))
    write_stack(folder / "c.tif", L2A, array=land(1), nodata=0, crs=None, transform=None)
    write_stack(folder / "d'.tif", L2A, array=land(2), nodata=0, transform=(13.0, 0.0, 4e5, 0.0, -10.0, 5.3e6))
    write_stack(folder / "e.tif", L2A, array=land(3), nodata=0, transform=(10.0, 0.0, 5e5, 0.0, 10.0, 5.3e6))
    write_stack(folder / "f.tif", L2A, array=land(4) + np.uint16(1000), nodata=0, transform=place(4))


def test_no_advice_changes_a_file_in_place(land, write_stack, tmp_path):
    defects(tmp_path, land, write_stack)
    findings = diagnose([tmp_path], progress=False).findings
    checks = {finding.check for finding in findings}
    assert {
        "undeclared nodata",
        "nodata not declared",
        "duplicates",
        "georeferencing missing",
        "non-square pixels",
    } <= checks
    assert {"grid not north-up", "mixed offsets in the pixels"} <= checks
    for finding in findings:
        assert not re.search(r"\brm\b|edit-info|gdal_edit|gdalwarp|'r\+'|\bmv\b", finding.fix), finding
        if not finding.command:
            continue
        *first, last = [shlex.split(part) for part in finding.command.split(" && ")]
        if first:  # what is changed is a copy that was not there
            assert first[0] == ["test", "!", "-e", "OUT.tif"]
            assert (first[1][0], first[1][2]) == ("cp", "OUT.tif")
            assert last[-1] == "OUT.tif" or "rasterio.open('OUT.tif', 'r+')" in last[-1]
        else:
            assert last[:2] == ["rio", "warp"]
            assert last[3] == "OUT.tif"


def test_a_command_on_a_copy_works_as_pasted(land, write_stack, tmp_path):
    archive, elsewhere = tmp_path / "my 'old' archive", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for k in range(4):
        write_stack(archive / f"{k}.tif", L2A, array=land(k)[::-1], nodata=0, transform=place(k))
    before = (archive / "0.tif").read_bytes()
    command = found(archive)["band order"].command
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], cwd=elsewhere, env={**os.environ, "PATH": path}, check=True)
    assert (archive / "0.tif").read_bytes() == before
    with rasterio.open(elsewhere / "OUT.tif") as copy:
        assert copy.descriptions == L2A[::-1]
    assert subprocess.run(["bash", "-c", command], cwd=elsewhere).returncode == 1  # nothing is written over
