"""Scenes of every shape are read as the same pixels on one grid, and odd files are refused in one line."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geo.errors import UserError
from ssl_geo.imagery.archives import find_scenes, walk_scenes
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.products import date_in_names, date_in_tag, level_in_names, offset_in_names
from ssl_geo.imagery.rasters import open_scene, read_counted, read_labels, read_window
from ssl_geo.imagery.scenes import NotImageryError, Scene, UnreadableError, listed_statements, measured
from ssl_geo.imagery.sensors import DEFAULT_BANDS, LIKELY_ORDERS

WriteStack = Callable[..., np.ndarray]
WriteFolder = Callable[..., dict[str, np.ndarray]]
UTM = "EPSG:32633"
GRID = (10.0, 0.0, 400_000.0, 0.0, -10.0, 5_300_000.0)


def read_whole(scene: Scene, bands: tuple[str, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    return read_window(scene, bands or scene.bands, 0, 0, scene.height, scene.width)


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level", "offset", "date"),
    [
        ("S2A_MSIL2A_20230101T101031_N0509_R022_T33UUU_20230102T140000.SAFE", "L2A", -1000, "2023-01-01"),
        ("S2B_MSIL1C_20170216T102101_N0204_R065_T33UUU_20170216T102204", "L1C", 0, "2017-02-16"),
        ("S2A_MSIL2A_20190101T101031_N9999_R022_T33UUU_20230102T140000", "L2A", None, "2019-01-01"),
        ("S2A_MSIL2A_20220125T101031_N0400_R022", "L2A", -1000, "2022-01-25"),
        ("S2A_MSIL2A_20220124T101031_N0399_R022", "L2A", 0, "2022-01-24"),
        ("aquileia_20190416_L2A", "L2A", None, "2019-04-16"),
        ("images_l1c", "L1C", None, None),
        ("ship_209075000_2022-08-12", None, None, "2022-08-12"),
        ("00002806639B424A_20170824", None, None, "2017-08-24"),
        ("a_20201399_b", None, None, None),
        ("L1C_and_L2A", None, None, None),
        ("MODEL2A_N400", None, None, None),
        # Chips that are numbered, and a place by its latitude, were once read as processing baselines.
        ("chip_N0400", None, None, None),
        ("tile_N4530_E0123", None, None, None),
    ],
)
def test_what_a_name_tells(name: str, level: str | None, offset: int | None, date: str | None) -> None:
    assert (level_in_names([name]), offset_in_names([name]), date_in_names([name])) == (level, offset, date)


def test_date_of_a_tiff_tag() -> None:
    assert date_in_tag("2021:07:23 13:22:41") == "2021-07-23"
    assert date_in_tag("yesterday") is None
    assert date_in_tag(None) is None


# Finding scenes --------------------------------------------------------------------------------------------------


def test_find_scenes_tells_stacks_folders_and_groups_apart(
    tmp_path: Path, write_stack: WriteStack, write_band_folder: WriteFolder
) -> None:
    write_stack(tmp_path / "deep" / "er" / "stack.TIF")
    write_band_folder(tmp_path / "patch", "S2A_MSIL2A_20170613T101031_1_")
    write_band_folder(tmp_path / "two", "one_", bands=("B02", "B05"))
    write_band_folder(tmp_path / "two", "other_", bands=("B02", "B05"))
    write_stack(tmp_path / "two" / "one_SCL.tif", ["SCL"])  # beside its bands: no scene
    write_stack(tmp_path / "two" / "lonely_B04.tif", None, count=1)
    (tmp_path / "notes.txt").write_text("no raster")
    expected = ["deep/er/stack.TIF", "patch", "two/lonely_B04.tif", "two/one_{band}", "two/other_{band}"]
    found = find_scenes([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == expected
    for path in found:
        assert open_scene(path).bands
    assert find_scenes([tmp_path, tmp_path / "patch", tmp_path / "deep"]) == found  # nothing twice
    assert find_scenes(found[3:]) == found[3:]  # scene paths are paths
    group = next(scene for scene in walk_scenes([tmp_path]) if scene.path.name == "one_{band}")
    assert sorted(file.name for file in group.files) == ["one_B02.tif", "one_B05.tif"]


def test_find_scenes_takes_files(tmp_path: Path, write_stack: WriteStack, write_band_folder: WriteFolder) -> None:
    write_stack(tmp_path / "a.tif")
    write_band_folder(tmp_path, "p_", bands=("B02", "B03"))
    assert find_scenes([tmp_path / "a.tif"]) == [tmp_path / "a.tif"]
    # band files as a shell expands p_*.tif
    assert find_scenes([tmp_path / "p_B02.tif", tmp_path / "p_B03.tif"]) == [tmp_path / "p_{band}"]


def test_find_scenes_does_not_hang_on_links_in_a_circle(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "a" / "x.tif")
    (tmp_path / "a" / "round").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    assert [path.name for path in find_scenes([tmp_path])] == ["x.tif"]


def test_find_scenes_refuses_what_holds_no_raster(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no raster under .*\.tif, \.tiff, \.jp2") as error:
        find_scenes([tmp_path])
    assert "--data" in one_line(error)
    with pytest.raises(UserError, match="does not exist"):
        find_scenes([tmp_path / "missing"])
    with pytest.raises(UserError, match="no path given"):
        find_scenes([])


def test_safe_product_is_one_scene_of_its_finest_files(tmp_path: Path, write_stack: WriteStack) -> None:
    product = tmp_path / "S2A_MSIL2A_20230101T101031_N0509_R022_T33UUU_20230102T140000.SAFE"
    granule = product / "GRANULE" / "L2A_T33UUU_A039325_20230101T101026"
    name = "T33UUU_20230101T101031_"
    stored = {}
    for resolution, ratio, bands in ((10, 1, ("B02", "B04")), (20, 2, ("B02", "B05")), (60, 6, ("B01", "B02"))):
        for i, band in enumerate(bands):
            stored[resolution, band] = write_stack(
                granule / "IMG_DATA" / f"R{resolution}m" / f"{name}{band}_{resolution}m.tif",
                None,
                (60 // ratio, 60 // ratio),
                count=1,
                seed=resolution + i,
                transform=(10.0 * ratio, 0.0, GRID[2], 0.0, -10.0 * ratio, GRID[5]),
            )[0]
    write_stack(granule / "IMG_DATA" / "R10m" / f"{name}TCI_10m.tif", None, (60, 60), count=3, dtype="uint8")
    write_stack(granule / "QI_DATA" / "MSK_QUALIT_B02.tif", None, (60, 60), count=1, dtype="uint8")
    assert find_scenes([tmp_path]) == [granule / "IMG_DATA"]
    scene = open_scene(granule / "IMG_DATA")
    assert set(scene.bands) == {"B01", "B02", "B04", "B05"}
    assert (scene.level, scene.offset, scene.offset_source, scene.date) == ("L2A", -1000.0, "name", "2023-01-01")
    dn, _ = read_whole(scene, ("B02", "B05"))
    np.testing.assert_array_equal(dn[0], stored[10, "B02"])
    np.testing.assert_array_equal(dn[1], np.kron(stored[20, "B05"], np.ones((2, 2), int)))
    (product / "MTD_MSIL2A.xml").write_text(
        "<?xml version='1.0'?><n1:P xmlns:n1='x'><BOA_QUANTIFICATION_VALUE unit='none'>5000</BOA_QUANTIFICATION_VALUE>"
        "<L><BOA_ADD_OFFSET band_id='0'>-900</BOA_ADD_OFFSET><BOA_ADD_OFFSET band_id='1'>-900</BOA_ADD_OFFSET></L>"
        "</n1:P>"
    )
    scene = open_scene(granule / "IMG_DATA")
    assert (scene.offset, scene.offset_source, scene.scale) == (-900.0, "metadata", 1 / 5000)


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_scene(write_band_folder: WriteFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, np.ndarray]:
    """A scene at 10, 20 and 60 m, and its whole grid by a slow reference: np.kron of every stored array."""
    folder = tmp_path_factory.mktemp("folder")
    stored = write_band_folder(folder, "p_", size=60)
    scene = open_scene(folder)
    whole = [np.kron(stored[band], np.ones((60 // len(stored[band]),) * 2, np.uint16)) for band in scene.bands]
    return scene, np.stack(whole)


@settings(max_examples=150)
@given(st.data())
def test_any_window_across_ratios_is_that_of_the_whole(
    folder_scene: tuple[Scene, np.ndarray], data: st.DataObject
) -> None:
    scene, whole = folder_scene
    row, col = data.draw(st.integers(0, 59)), data.draw(st.integers(0, 59))
    height, width = data.draw(st.integers(1, 60 - row)), data.draw(st.integers(1, 60 - col))
    channels = data.draw(st.permutations(range(len(scene.bands))))[: data.draw(st.integers(1, len(scene.bands)))]
    dn, valid = read_window(scene, [scene.bands[c] for c in channels], row, col, height, width)
    np.testing.assert_array_equal(dn, whole[channels][:, row : row + height, col : col + width])
    assert dn.dtype == np.uint16
    assert valid.all()


def test_stack_reads_bands_by_name_in_the_order_asked(tmp_path: Path, write_stack: WriteStack) -> None:
    array = write_stack(tmp_path / "x.tif", ["B8A", "QA60", "B02", "Band 4 (red)"])
    scene = open_scene(tmp_path / "x.tif")
    assert scene.bands == ("B8A", "B02", "B04")  # QA60 is no band
    dn, _ = read_window(scene, ["B04", "B8A"], 3, 5, 7, 11)
    np.testing.assert_array_equal(dn, array[[3, 0], 3:10, 5:16])
    with pytest.raises(UserError, match=r"no band B12.*B8A B02 B04.*--data.bands"):
        read_window(scene, ["B12"], 0, 0, 1, 1)
    for window in ((-1, 0, 4, 4), (0, 0, 33, 4), (0, 37, 4, 4), (0, 0, 0, 4)):
        with pytest.raises(ValueError, match="not within"):
            read_window(scene, ["B02"], *window)


def test_grids_that_disagree_are_refused(tmp_path: Path, write_stack: WriteStack) -> None:
    def pair(name: str, shape: tuple[int, int], **options: Any) -> Path:
        write_stack(tmp_path / name / "B02.tif", None, (24, 24), count=1)
        write_stack(tmp_path / name / "B05.tif", None, shape, count=1, **options)
        return tmp_path / name

    coarse = (20.0, 0.0, GRID[2], 0.0, -20.0, GRID[5])
    assert open_scene(pair("good", (12, 12), transform=coarse)).sources[1].ratio == 2
    for folder, says in (
        (pair("zone", (12, 12), transform=coarse, crs="EPSG:32632"), "CRS"),
        (pair("size", (13, 13), transform=coarse), "do not divide"),
        (pair("shift", (12, 12), transform=(20.0, 0.0, GRID[2] + 20, 0.0, -20.0, GRID[5])), "pixels apart"),
        (pair("scale", (12, 12)), "pixels apart"),
    ):
        with pytest.raises(UserError, match=says) as error:
            open_scene(folder)
        assert "B02.tif" in one_line(error)
        assert "B05.tif" in one_line(error)


def test_folder_of_two_products_asks_for_one(tmp_path: Path, write_band_folder: WriteFolder) -> None:
    write_band_folder(tmp_path, "a_", bands=("B02", "B03"))
    write_band_folder(tmp_path, "b_", bands=("B02", "B03"))
    with pytest.raises(UserError, match=r"2 products.*a_\{band\}"):
        open_scene(tmp_path)


def test_band_file_with_several_bands_is_refused(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "B02.tif", None, count=1)
    write_stack(tmp_path / "B03.tif", None, count=4)
    with pytest.raises(UserError, match=r"B03\.tif is named as the file of band B03 and has 4 bands"):
        open_scene(tmp_path)


# Names of bands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 12, 13])
def test_unnamed_bands_are_asked_for_with_the_likely_order(tmp_path: Path, write_stack: WriteStack, count: int) -> None:
    write_stack(tmp_path / "x.tif", None, count=count)
    with pytest.raises(UserError) as error:
        open_scene(tmp_path / "x.tif")
    message = one_line(error)
    assert f"x.tif has {count} bands" in message
    assert "--data.band_names is required" in message
    assert " ".join(LIKELY_ORDERS[count]) in message
    scene = open_scene(tmp_path / "x.tif", band_names=LIKELY_ORDERS[count])
    assert scene.bands == LIKELY_ORDERS[count]
    assert scene.level == ("L1C" if count == 13 else None)  # only L1C has B10
    with pytest.raises(UserError, match=f"{count} bands where --data.band_names lists 2"):
        open_scene(tmp_path / "x.tif", band_names=["B02", "B03"])
    with pytest.raises(UserError, match="BX2, which is no band"):
        open_scene(tmp_path / "x.tif", band_names=["BX2"] * count)


def test_band_names_that_contradict_the_file_are_refused(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif", ["B02", "B03", "B04"])
    assert open_scene(tmp_path / "x.tif", band_names=["b2", "b3", "b4"]).bands == ("B02", "B03", "B04")
    with pytest.raises(UserError, match=r"B02 where --data.band_names says B04"):
        open_scene(tmp_path / "x.tif", band_names=["B04", "B03", "B02"])
    # a list of another length speaks of other files
    assert open_scene(tmp_path / "x.tif", band_names=LIKELY_ORDERS[12]).bands == ("B02", "B03", "B04")


def test_one_band_without_a_name_may_be_no_imagery(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x_mask.tif", [""])
    with pytest.raises(UserError, match=r"names none.*; or point --data at imagery alone$"):
        open_scene(tmp_path / "x_mask.tif")


def test_descriptions_that_only_count_name_nothing(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif", [f"Band {i}" for i in range(1, 13)])
    with pytest.raises(UserError, match="names none"):
        open_scene(tmp_path / "x.tif")
    # "b1 b2 b3 b4" of blue, green, red and near infrared was once read as B01 to B04, and nobody could mend it.
    write_stack(tmp_path / "x.tif", ["b1", "b2", "b3", "b4"])
    with pytest.raises(UserError, match="names none"):
        open_scene(tmp_path / "x.tif")
    names = ["B02", "B03", "B04", "B08"]
    assert open_scene(tmp_path / "x.tif", band_names=names).bands == tuple(names)
    write_stack(tmp_path / "x.tif", ["B1", "B2", "B3", "B4"])
    assert open_scene(tmp_path / "x.tif").bands == ("B01", "B02", "B03", "B04")
    write_stack(tmp_path / "y.tif", ["Band 2", "Band 3", "Band 4"])
    assert open_scene(tmp_path / "y.tif").bands == ("B02", "B03", "B04")


def test_a_band_named_twice_is_refused(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif", ["B02", "B2", "B03"])
    with pytest.raises(UserError, match="B02 more than once"):
        open_scene(tmp_path / "x.tif")


# Units -----------------------------------------------------------------------------------------------------------


def tag_scaling(path: Path, scale: float, offset: float) -> None:
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (scale,) * dataset.count
        dataset.offsets = (offset,) * dataset.count


def test_offset_by_order_of_trust(tmp_path: Path, write_stack: WriteStack) -> None:
    path = tmp_path / "S2A_MSIL2A_20230101T101031_N0509_x.tif"
    write_stack(path)
    scene = open_scene(path)
    assert (scene.scale, scene.offset, scene.offset_source) == (1e-4, -1000.0, "name")
    (tmp_path / "MTD_MSIL2A.xml").write_text("<P><BOA_QUANTIFICATION_VALUE>10000</BOA_QUANTIFICATION_VALUE></P>")
    assert (open_scene(path).offset, open_scene(path).offset_source) == (0.0, "metadata")
    tag_scaling(path, 2e-4, -0.2)  # GDAL: value = stored · scale + offset, so -1000 DN
    scene = open_scene(path)
    assert scene.offset == pytest.approx(-1000)
    assert (scene.scale, scene.offset_source) == (2e-4, "tags")
    scene = open_scene(path, offset=7, scale=1e-3)
    assert (scene.scale, scene.offset, scene.offset_source) == (1e-3, 7.0, "setting")
    assert scene.overruled == ("scale 0.0002", "offset -1000")
    assert open_scene(path, offset=-1000, scale=2e-4, level="L2A").overruled == ()
    write_stack(tmp_path / "plain" / "x.tif")
    (tmp_path / "MTD_MSIL2A.xml").unlink()
    assert open_scene(tmp_path / "plain" / "x.tif").offset_source == "assumed"


def test_the_most_frequent_of_many_statements_are_listed() -> None:
    overruled = [("offset -1000", "level L2A"), ("level L2A",), *((f"nodata {k}",) for k in range(4))]
    assert listed_statements(overruled) == "level L2A in 2, offset -1000 in 1, nodata 0 in 1, nodata 1 in 1, …"
    assert listed_statements(overruled[:2]) == "level L2A in 2, offset -1000 in 1"


def test_broken_metadata_is_told(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif")
    for text in ("<P>", "<P><BOA_ADD_OFFSET>-1000</BOA_ADD_OFFSET><BOA_ADD_OFFSET>0</BOA_ADD_OFFSET></P>"):
        (tmp_path / "MTD_MSIL2A.xml").write_text(text)
        with pytest.raises(UserError, match=r"MTD_MSIL2A.xml.*--data.offset"):
            open_scene(tmp_path / "x.tif")
        scene = open_scene(tmp_path / "x.tif", offset=-1000)  # what the message says mends it
        assert (scene.offset, scene.offset_source, scene.level, scene.overruled) == (-1000.0, "setting", "L2A", ())


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_unknown_units_are_asked_for(tmp_path: Path, write_stack: WriteStack, dtype: str) -> None:
    write_stack(tmp_path / "S2A_MSIL2A_20230101T101031_N0509_x.tif", dtype=dtype)
    path = tmp_path / "S2A_MSIL2A_20230101T101031_N0509_x.tif"
    with pytest.raises(UserError, match=f"{dtype} and no scale tag.*--data.scale"):
        open_scene(path)
    scene = open_scene(path, scale=1.0)
    assert (scene.scale, scene.offset, scene.offset_source) == (1.0, 0.0, "assumed")  # the name speaks of integers
    assert scene.zero_fill == (dtype == "uint8")


def test_level_by_order_of_trust(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "images_l2a" / "x.tif", ["B02", "B10"])
    path = tmp_path / "images_l2a" / "x.tif"
    assert open_scene(path).level == "L2A"
    assert open_scene(path, level="L1C").level == "L1C"
    write_stack(tmp_path / "images" / "x.tif", ["B02", "B10"])
    assert open_scene(tmp_path / "images" / "x.tif").level == "L1C"
    with pytest.raises(UserError, match=r"--data.level L3"):
        open_scene(path, level="L3")


# Validity --------------------------------------------------------------------------------------------------------


def test_side_files_tell_where_a_scene_lies_and_what_is_nodata(tmp_path: Path, write_stack: WriteStack) -> None:
    """As QGIS and gdal_translate write them; unread, a map had no place and -9999 was reflectance."""
    path = tmp_path / "x.tif"
    array = np.full((3, 8, 8), 500, np.int16)
    array[:, :2] = -9999
    write_stack(path, array=array, crs=None, transform=None)
    assert open_scene(path).crs is None
    (tmp_path / "x.tfw").write_text("10.0\n0.0\n0.0\n-10.0\n400005.0\n5299995.0\n")
    bands = "".join(f'<PAMRasterBand band="{b}"><NoDataValue>-9999</NoDataValue></PAMRasterBand>' for b in (1, 2, 3))
    (tmp_path / "x.tif.aux.xml").write_text(f"<PAMDataset><SRS>{UTM}</SRS>{bands}</PAMDataset>")
    scene = open_scene(path)
    with rasterio.open(path) as plain:
        assert (scene.crs, scene.transform, scene.nodata) == (UTM, tuple(plain.transform)[:6], -9999)
    assert scene.transform == GRID
    valid = read_whole(scene)[1]
    assert not valid[:2].any()
    assert valid[2:].all()


def test_zero_is_fill_in_all_bands_and_dark_ground_in_one(tmp_path: Path, write_stack: WriteStack) -> None:
    array = np.full((3, 8, 8), 500, np.uint16)
    array[:, :2] = 0  # fill
    array[1, 4] = 0  # dark in one band
    write_stack(tmp_path / "x.tif", array=array)
    expected = np.ones((8, 8), bool)
    expected[:2] = False
    scene = open_scene(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_whole(scene)[1], expected)
    # Another value that marks clouds leaves fill what it is: it once let a scene's black border into training.
    # Nor does a file that declares 0 make dark water fill: it cost half the pixels of chips_coastal.
    write_stack(tmp_path / "declared.tif", array=array, nodata=0)
    undeclared = [open_scene(tmp_path / "x.tif", nodata=value) for value in (0, 9, 65535)]
    for scene in (open_scene(tmp_path / "declared.tif"), *undeclared):
        np.testing.assert_array_equal(read_whole(scene)[1], expected)
    # only requested bands count
    assert read_window(open_scene(tmp_path / "declared.tif"), ["B02"], 2, 0, 6, 8)[1].all()
    assert not read_window(open_scene(tmp_path / "declared.tif"), ["B03"], 4, 0, 1, 8)[1].any()


@pytest.mark.parametrize(("dtype", "nodata"), [("int16", -9999), ("uint16", 65535), ("float32", -3.4e38)])
def test_declared_nodata_in_any_band_is_invalid(
    tmp_path: Path, write_stack: WriteStack, dtype: str, nodata: float
) -> None:
    array = np.full((2, 8, 8), 500, dtype)
    array[0, 0, 0] = array[1, 7, 7] = nodata
    write_stack(tmp_path / "x.tif", ["B02", "B03"], array=array, nodata=nodata)
    _, valid = read_whole(open_scene(tmp_path / "x.tif", scale=1e-4))
    assert [tuple(map(int, pixel)) for pixel in np.argwhere(~valid)] == [(0, 0), (7, 7)]


def test_nan_and_infinity_are_never_valid(tmp_path: Path, write_stack: WriteStack) -> None:
    array = np.zeros((2, 8, 8), np.float32)  # a float zero is a value
    array[0, 0, 0], array[1, 1, 1], array[1, 2, 2] = np.nan, np.inf, -np.inf
    for name, nodata in (("x.tif", None), ("nan.tif", float("nan"))):
        write_stack(tmp_path / name, ["B02", "B03"], array=array, nodata=nodata)
        _, valid = read_whole(open_scene(tmp_path / name, scale=1))
        assert [tuple(map(int, pixel)) for pixel in np.argwhere(~valid)] == [(0, 0), (1, 1), (2, 2)]


def test_nodata_never_bleeds_from_coarse_bands(tmp_path: Path, write_band_folder: WriteFolder) -> None:
    write_band_folder(tmp_path, bands=("B02", "B01"))
    stored = np.full((1, 10, 10), 700, np.uint16)
    stored[0, 3, 4] = 1234
    write_geotiff(
        tmp_path / "B01.tif", stored, crs=UTM, transform=(60.0, 0.0, GRID[2], 0.0, -60.0, GRID[5]), nodata=1234
    )
    with pytest.raises(UserError, match=r"different nodata.*--data.nodata"):
        open_scene(tmp_path)
    dn, valid = read_whole(open_scene(tmp_path, nodata=1234), ("B01",))
    expected = np.ones((60, 60), bool)
    expected[18:24, 24:30] = False
    np.testing.assert_array_equal(valid, expected)
    assert set(np.unique(dn)) == {700, 1234}


def test_alpha_and_masks_make_pixels_invalid(tmp_path: Path, write_stack: WriteStack) -> None:
    array = np.full((4, 8, 8), 500, np.uint16)
    array[3] = 65535
    array[3, :3] = 0
    write_stack(tmp_path / "alpha.tif", ["B02", "B03", "B04", "alpha"], array=array)
    with rasterio.open(tmp_path / "alpha.tif", "r+") as dataset:
        dataset.colorinterp = [*dataset.colorinterp[:3], rasterio.enums.ColorInterp.alpha]
    expected = np.ones((8, 8), bool)
    expected[:3] = False
    scene = open_scene(tmp_path / "alpha.tif")
    assert scene.bands == ("B02", "B03", "B04")
    np.testing.assert_array_equal(read_whole(scene)[1], expected)
    for internal in (True, False):
        path = tmp_path / f"mask_{internal}.tif"
        write_stack(path, array=array[:3])
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(path, "r+") as dataset:
            dataset.write_mask(expected)
        assert path.with_name(path.name + ".msk").exists() is not internal
        np.testing.assert_array_equal(read_whole(open_scene(path))[1], expected)


# Odd files -------------------------------------------------------------------------------------------------------


def test_pictures_palettes_and_complex_numbers_are_no_imagery(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "rgb.tif", None, count=3, dtype="uint8")
    write_stack(tmp_path / "palette.tif", ["B02"], array=np.ones((1, 8, 8), np.uint8), colormap={1: (9, 9, 9)})
    write_stack(tmp_path / "complex.tif", ["B02"], array=np.ones((1, 8, 8), np.complex64))
    for name, says in (("rgb", "picture for display"), ("palette", "palette"), ("complex", "complex")):
        with pytest.raises(NotImageryError, match=says) as error:
            open_scene(tmp_path / f"{name}.tif", scale=1)
        assert f"{name}.tif" in one_line(error)


def test_what_gdal_cannot_open_or_read_names_the_file(tmp_path: Path, write_stack: WriteStack) -> None:
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(UnreadableError, match=r"text.tif"):
        open_scene(tmp_path / "text.tif")
    write_stack(tmp_path / "cut.tif", shape=(300, 300))
    data = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
    scene = open_scene(tmp_path / "cut.tif")
    with pytest.raises(UnreadableError, match=r"cut\.tif, rows 130 to 300, columns 0 to 300") as error:
        read_window(scene, scene.bands, 130, 0, 170, 300)
    one_line(error)


def test_files_without_georeferencing_are_read_without_a_warning(
    tmp_path: Path, write_band_folder: WriteFolder
) -> None:
    for band, size in (("B02", 12), ("B05", 6)):
        array = np.full((1, size, size), 7, np.uint16)
        write_geotiff(tmp_path / f"{band}.tif", array, crs=None, transform=None)
    scene = open_scene(tmp_path)
    assert scene.crs is None
    assert [source.ratio for source in scene.sources] == [1, 2]
    assert read_whole(scene)[0].shape == (2, 12, 12)


def test_a_file_replaced_is_read_anew(tmp_path: Path, write_stack: WriteStack) -> None:
    for seed in (0, 1):
        array = write_stack(tmp_path / "x.tif", seed=seed)
        np.testing.assert_array_equal(read_whole(open_scene(tmp_path / "x.tif"))[0], array)


# Threads and processes ---------------------------------------------------------------------------------------------


def test_threads_read_what_one_thread_reads(folder_scene: tuple[Scene, np.ndarray]) -> None:
    scene, whole = folder_scene
    names = {thread.name for thread in threading.enumerate()}

    def read(row: int) -> bool:
        return np.array_equal(read_window(scene, scene.bands, row, 0, 5, 60)[0], whole[:, row : row + 5])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [i % 56 for i in range(200)]))
    assert {thread.name for thread in threading.enumerate()} == names


def _child(scene: Scene, expected: np.ndarray, queue: Any) -> None:
    queue.put(bool(np.array_equal(read_whole(scene)[0], expected)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_opens_its_own_files(folder_scene: tuple[Scene, np.ndarray]) -> None:
    scene, whole = folder_scene
    read_whole(scene)  # the parent's handles are open
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(scene, whole, queue))
    process.start()
    assert queue.get(timeout=30)
    process.join()
    assert process.exitcode == 0
    np.testing.assert_array_equal(read_whole(scene)[0], whole)  # and the parent's are still good


# Labels ------------------------------------------------------------------------------------------------


def test_labels_are_read_whole_as_integers(tmp_path: Path, write_stack: WriteStack) -> None:
    ids = np.random.default_rng(0).integers(0, 5, (1, 9, 7))
    path = tmp_path / "l.tif"
    write_geotiff(path, ids.astype(np.uint8), crs=UTM, transform=GRID, nodata=255, colormap={1: (1, 2, 3)})
    labels, crs, transform, nodata = read_labels(path)
    np.testing.assert_array_equal(labels, ids[0])
    assert (labels.dtype.name, crs, transform, nodata) == ("uint8", UTM, GRID, 255)
    floats = ids.astype(np.float32)
    floats[0, 0, 0] = np.nan
    write_geotiff(path, floats, crs=None, transform=None)
    labels, crs, _, nodata = read_labels(path)
    assert (labels[0, 0], nodata, crs) == (-1, -1, None)
    np.testing.assert_array_equal(labels.ravel()[1:], ids.ravel()[1:])
    write_geotiff(path, floats + np.float32(0.5), crs=None, transform=None)
    with pytest.raises(UserError, match="no class id"):
        read_labels(path)
    write_stack(path)
    with pytest.raises(UserError, match="3 bands"):
        read_labels(path)


@pytest.mark.parametrize("nodata", [None, 0])
def test_labels_that_a_mask_or_an_alpha_band_excludes_are_none(tmp_path: Path, nodata: int | None) -> None:
    """Ground outside the labelled area, as `gdalwarp -dstalpha` leaves it, was once class 0."""
    ids = np.random.default_rng(0).integers(0, 5, (1, 9, 7)).astype(np.uint8)
    shown = np.ones((9, 7), bool)
    shown[:3] = False
    mask, alpha = tmp_path / "mask.tif", tmp_path / "alpha.tif"
    write_geotiff(mask, ids, crs=UTM, transform=GRID, nodata=nodata)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(mask, "r+") as dataset:
        dataset.write_mask(shown)
    both = np.concatenate([ids, 255 * shown[None].astype(np.uint8)])
    write_geotiff(alpha, both, crs=UTM, transform=GRID, nodata=nodata)
    with rasterio.open(alpha, "r+") as dataset:
        dataset.colorinterp = [dataset.colorinterp[0], rasterio.enums.ColorInterp.alpha]
    for path in (mask, *([alpha] if nodata is None else [])):  # GDAL goes by a declared value, else by an alpha band
        labels, *_, none = read_labels(path)
        assert none == -1  # no id that --classes may list, declared as it may be
        unlabelled = ~shown | (ids[0] == nodata if nodata is not None else False)
        np.testing.assert_array_equal(labels == none, unlabelled)
        np.testing.assert_array_equal(labels[~unlabelled], ids[0][~unlabelled])


# The shared imagery --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "counts", "shape", "crs"),
    [
        ("landcover/labels/282D_485L_3_3.tif", {1: 25991, 2: 18690, 6: 3316, 9: 2179}, (224, 224), "EPSG:32722"),
        ("water/labels/labelled_image_1.tif", {0: 114116, 1: 29144}, (377, 380), "EPSG:4326"),
        ("cloud/labels/scene.tif", {0: 28583, 1: 840, 3: 183124, 4: 49597}, (512, 512), None),
    ],
)
def test_real_labels_have_the_manifest_figures(
    shared_data: Path, file: str, counts: dict[int, int], shape: tuple[int, int], crs: str | None
) -> None:
    labels, label_crs, transform, _ = read_labels(shared_data / file)
    assert dict(zip(*(array.tolist() for array in np.unique(labels, return_counts=True)), strict=True)) == counts
    assert labels.shape == shape
    assert label_crs == crs
    image = shared_data / file.replace("labels/", "images_l2a/" if "landcover" in file else "images/")
    names = None if "cloud" in file else LIKELY_ORDERS[12]
    scene = open_scene(image, band_names=names, scale=1.0 if "cloud" in file else None)
    assert (scene.height, scene.width, scene.crs) == (*shape, crs)
    assert scene.transform == pytest.approx(transform)


def test_real_jp2_product_agrees_with_each_of_its_files(shared_data: Path) -> None:
    scene = open_scene(shared_data / "jp2_multires")
    assert (scene.height, scene.width, scene.level, scene.date) == (768, 1536, "L1C", "2017-02-16")
    assert len(scene.bands) == 13
    rng = np.random.default_rng(0)
    windows = [(int(rng.integers(0, 668)), int(rng.integers(0, 1436)), 100, 100) for _ in range(3)]
    read = [read_window(scene, scene.bands, *window)[0] for window in windows]
    for i, band in enumerate(scene.bands):
        with rasterio.open(shared_data / "jp2_multires" / f"T33UUU_20170216T102101_{band}.jp2") as dataset:
            stored = dataset.read(1)
        whole = np.kron(stored, np.ones((768 // stored.shape[0],) * 2, stored.dtype))
        for (row, col, height, width), dn in zip(windows, read, strict=True):
            np.testing.assert_array_equal(dn[i], whole[row : row + height, col : col + width])


def test_real_scenes_have_their_shapes_and_bands(shared_data: Path) -> None:
    patches = find_scenes([shared_data / "bigearthnet"])
    assert len(patches) == 6
    for path in patches:
        scene = open_scene(path)
        assert (scene.height, scene.width, scene.level) == (120, 120, "L2A")
        assert set(scene.bands) == set(LIKELY_ORDERS[12])
        assert read_whole(scene, DEFAULT_BANDS)[1].all()
    for folder, count in (("images_l1c", 13), ("images_l2a", 12)):
        scene = open_scene(shared_data / "landcover" / folder / "282D_485L_3_3.tif", band_names=LIKELY_ORDERS[count])
        assert scene.level == {13: "L1C", 12: "L2A"}[count]
        assert read_whole(scene)[0].shape == (count, 224, 224)
    water = find_scenes([shared_data / "water" / "images"])
    assert len(water) == 11
    assert open_scene(water[0], band_names=LIKELY_ORDERS[12]).date == "2020-01-18"
    with pytest.raises(UserError, match=r"--data.scale"):
        open_scene(shared_data / "cloud" / "images" / "scene.tif")
    cloud = open_scene(shared_data / "cloud" / "images" / "scene.tif", scale=1)
    assert cloud.bands == ("B02", "B03", "B04", "B08", "B11", "B12")
    assert 0 < read_whole(cloud)[0].mean() < 1


def test_real_odd_files_are_read_or_refused_in_one_line(shared_data: Path) -> None:
    files = sorted((shared_data / "odd").rglob("*.tif"))
    assert len(files) > 50
    read = 0
    for file in files:
        # none names Sentinel-2 bands
        with pytest.raises(UserError, match=re.escape(file.name)) as error:
            open_scene(file)
        one_line(error)
        try:
            scene = open_scene(file, band_names=["B02", "B03", "B04"], scale=1)
        except UserError:
            continue
        dn, valid = read_window(scene, scene.bands, 0, 0, min(64, scene.height), min(64, scene.width))
        assert valid.shape == dn.shape[1:]
        assert not np.isnan(dn[:, valid]).any()
        read += 1
    assert read >= 5


@pytest.mark.parametrize("nodata", [-3.4028234663852886e38, -9999.0, 0.0])
def test_labels_of_floats_may_declare_any_nodata(tmp_path: Path, nodata: float) -> None:
    """The least float32, which many programs take, was once refused as a class."""
    labels = np.array([[1, 2], [nodata, np.nan]], np.float32)
    write_geotiff(tmp_path / "labels.tif", labels[None], crs=UTM, transform=GRID, nodata=nodata)
    ids, _, _, missing = read_labels(tmp_path / "labels.tif")
    assert ids[0].tolist() == [1, 2]
    assert (ids[1] == missing).all()
    assert missing not in (1, 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [-3.4028234663852886e38, 1e30, -1e20, 1e300, np.nan, -np.inf])
def test_what_nothing_measures_is_not_valid_and_counted(
    tmp_path: Path, write_stack: WriteStack, dtype: str, value: float
) -> None:
    """Undeclared, -3.4e38 was reflectance to all that read it."""
    if dtype == "float32" and abs(value) == 1e300:
        value = np.inf
    array = np.full((2, 8, 8), 0.1, dtype)
    array[1, 2:4, 3], array[0, 7, 7], array[0, 6, 6] = value, 5.0, -999_999.0  # these two are finite numbers
    write_stack(tmp_path / "x.tif", ["B02", "B03"], array=array)
    dn, valid, dropped = read_counted(open_scene(tmp_path / "x.tif", scale=1), ["B02", "B03"], 0, 0, 8, 8)
    assert [tuple(map(int, pixel)) for pixel in np.argwhere(~valid)] == [(2, 3), (3, 3)]
    np.testing.assert_array_equal(dropped, ~valid)
    np.testing.assert_array_equal(dn, array)
    # In B02 alone nothing of the kind lies; declared, it is not counted.
    assert read_counted(open_scene(tmp_path / "x.tif", scale=1), ["B02"], 0, 0, 8, 8)[2] is None
    if not np.isinf(value):
        declared = open_scene(tmp_path / "x.tif", scale=1, nodata=value)
        _, same, counted = read_counted(declared, ["B02", "B03"], 0, 0, 8, 8)
        np.testing.assert_array_equal(same, valid)
        assert counted is None


def test_measured_is_told_in_reflectance_and_of_products_by_their_type() -> None:
    dn = np.array([[[0, 65535]]], np.uint16)
    assert measured(dn, 1e-4, -1000) is None
    np.testing.assert_array_equal(measured(dn, 100.0, 0), [[True, False]])
    np.testing.assert_array_equal(measured(dn.astype(np.float32), -100.0, 0), [[True, False]])
    assert measured(dn.astype(np.float64) * 1e9, 1e-9, 0) is None
    huge = np.array([[[1e35, 1.0]]], np.float64)
    np.testing.assert_array_equal(measured(huge, 1e-35, 0), [[False, True]])  # overflows float32 whatever its scale
