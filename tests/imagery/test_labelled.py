"""Images and labels: the right pair, the right pixel, the right class; and a clear line where they do not fit."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.warp
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geo.errors import UserError
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.labelled import IGNORED, LabelledChips, LabelledScene, pair_labels
from ssl_geo.imagery.maps import write_class_map
from ssl_geo.imagery.rasters import open_scene, read_labels, read_legend, read_window
from ssl_geo.imagery.sample import make_sample

BANDS = ("B02", "B03", "B04")
CRS = "EPSG:32633"
GRID = (10.0, 0.0, 400_000.0, 0.0, -10.0, 5_300_000.0)
L2A = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
L1C = [*L2A[:10], "B10", *L2A[10:]]
TEN = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")

WriteStack = Callable[..., np.ndarray]


def shifted(cols: float, rows: float) -> tuple[float, ...]:
    return (10.0, 0.0, GRID[2] + 10 * cols, 0.0, -10.0, GRID[5] - 10 * rows)


def write_labels(path: Path, values: np.ndarray, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_geotiff(path, values[None], **{"crs": CRS, "transform": GRID, **options})
    return values


def random_labels(shape: tuple[int, int], ids: Sequence[int] = (1, 2, 7), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(ids, np.uint8), shape)


def whole(chips: LabelledChips, number: int) -> np.ndarray:
    """The classes of a scene, put together from its chips."""
    scene, size = chips.scenes[number].scene, chips.chip_size
    found = np.full((scene.height + size, scene.width + size), IGNORED, np.uint8)
    for i in np.flatnonzero(chips.scene == number):
        found[chips.row[i] : chips.row[i] + size, chips.col[i] : chips.col[i] + size] = chips[i].labels
    return found[: scene.height, : scene.width]


@pytest.fixture
def world(tmp_path: Path, write_stack: WriteStack) -> tuple[Path, np.ndarray, np.ndarray]:
    """One image of 32 × 40 and its labels 1 2 7 of the same name."""
    dn = write_stack(tmp_path / "images" / "a.tif")
    return tmp_path, dn, write_labels(tmp_path / "labels" / "a.tif", random_labels((32, 40)))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- chips


def test_chips_tile_the_image_and_pad_its_border(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, dn, labels = world
    chips = LabelledChips(pair_labels([folder / "images"], folder / "labels"), bands=("B04", "B02"), chip_size=24)
    assert list(zip(chips.row.tolist(), chips.col.tolist(), strict=True)) == [(0, 0), (0, 24), (24, 0), (24, 24)]
    assert len(chips) == 4
    assert chips.ids == (1, 2, 7)
    for i in range(4):
        row, col = int(chips.row[i]), int(chips.col[i])
        expected = np.zeros((2, 24, 24), np.float32)
        expected_labels = np.full((24, 24), 255)
        height, width = min(24, 32 - row), min(24, 40 - col)
        for y in range(height):
            for x in range(width):
                expected[:, y, x] = dn[[2, 0], row + y, col + x] / 10_000
                expected_labels[y, x] = {1: 0, 2: 1, 7: 2}[int(labels[row + y, col + x])]
        chip = chips[i]
        assert chip.reflectance.dtype == np.float32
        assert chip.valid.dtype == np.bool_
        assert chip.labels.dtype == np.uint8
        np.testing.assert_allclose(chip.reflectance, expected, rtol=1e-6)
        np.testing.assert_array_equal(chip.labels, expected_labels)
        np.testing.assert_array_equal(chip.valid, expected_labels != 255)
        np.testing.assert_array_equal(chips.class_pixels[i], [(expected_labels == k).sum() for k in range(3)])
    assert "3 chips reach over an image's border" in " ".join(chips.report())
    with pytest.raises(IndexError):
        chips[4]


@settings(max_examples=25)
@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 41), context=st.integers(1, 30))
def test_context_is_what_lies_around_a_chip_and_has_no_labels(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, size: int, context: int
) -> None:
    folder = tmp_path_factory.mktemp("context")
    dn = np.arange(1, height * width + 1, dtype=np.uint16).reshape(1, height, width)
    write_geotiff(folder / "a.tif", dn, crs=CRS, transform=GRID, descriptions=["B02"])
    write_labels(folder / "a_label.tif", random_labels((height, width), (3, 5), seed=height * width))
    pairs = pair_labels([folder / "a.tif"], folder / "a_label.tif")
    plain = LabelledChips(pairs, bands=["B02"], chip_size=size)
    wide = LabelledChips(pairs, bands=["B02"], chip_size=size, context=context)
    assert len(wide) == len(plain)
    assert wide.side == size + 2 * context
    assert wide.fingerprint != plain.fingerprint
    np.testing.assert_array_equal(wide.class_pixels, plain.class_pixels)
    scene = np.pad(dn[0], context + size) / 10_000  # 0 beyond the scene
    for i in range(len(wide)):
        chip, row, col = wide[i], int(wide.row[i]) + size, int(wide.col[i]) + size
        around = scene[row : row + wide.side, col : col + wide.side]
        np.testing.assert_allclose(chip.reflectance[0], around, rtol=1e-6)
        np.testing.assert_array_equal(chip.valid, around > 0)
        expected = np.full_like(chip.labels, 255)
        expected[context : context + size, context : context + size] = plain[i].labels
        np.testing.assert_array_equal(chip.labels, expected)


def test_an_image_smaller_than_a_chip_is_one_padded_chip(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = world
    chips = LabelledChips(pair_labels([folder / "images"], folder / "labels"), bands=BANDS, chip_size=100)
    chip = chips[0]
    assert len(chips) == 1
    assert chip.labels.shape == (100, 100)
    assert chip.valid.sum() == (chip.labels != 255).sum() == 32 * 40
    assert chip.valid[:32, :40].all()
    assert not chip.reflectance[:, ~chip.valid].any()


@settings(max_examples=25)
@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 41))
def test_chips_hold_every_labelled_pixel_once(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("grid")
    dn = np.ones((1, height, width), np.uint16)
    write_geotiff(folder / "a.tif", dn, crs=CRS, transform=GRID, descriptions=["B02"])
    labels = write_labels(folder / "a_label.tif", random_labels((height, width), (3, 5), seed=height * width))
    chips = LabelledChips(pair_labels([folder / "a.tif"], folder / "a_label.tif"), bands=["B02"], chip_size=size)
    assert len(chips) == math.ceil(height / size) * math.ceil(width / size)
    np.testing.assert_array_equal(np.array(chips.ids)[whole(chips, 0)], labels)
    assert chips.class_pixels.sum(axis=0).tolist() == [int((labels == i).sum()) for i in chips.ids]


def test_invalid_pixels_and_nodata_are_ignored_and_empty_chips_left_out(
    tmp_path: Path, write_stack: WriteStack
) -> None:
    dn = np.random.default_rng(0).integers(1, 9000, (3, 32, 32)).astype(np.uint16)
    dn[:, :16, :16] = 0  # fill of the image: no chip
    dn[:, 20, 20] = 0
    write_stack(tmp_path / "i" / "a.tif", array=dn)
    labels = random_labels((32, 32), (0, 1))
    labels[:16, 16:] = 99  # nodata of the labels: no chip
    labels[30, 3] = 42  # ignored by the user
    write_labels(tmp_path / "l" / "a.tif", labels, nodata=99)
    scenes = pair_labels([tmp_path / "i"], tmp_path / "l", ignore=[42])
    chips = LabelledChips(scenes, bands=BANDS, chip_size=16)
    assert chips.ids == (0, 1)
    assert (len(chips), chips.left_out) == (2, 2)
    assert "left out 2 chips" in " ".join(chips.report())
    expected = labels.copy()
    expected[:16] = expected[20, 20] = expected[30, 3] = 255
    np.testing.assert_array_equal(whole(chips, 0), expected)
    chip = chips[1]
    assert not chip.valid[4, 4]
    assert chip.labels[4, 4] == 255
    assert not chip.reflectance[:, 4, 4].any()


def test_not_a_number_in_the_image_is_zero_in_the_chip(tmp_path: Path, write_stack: WriteStack) -> None:
    dn = np.full((3, 8, 8), 0.25, np.float32)
    dn[1, 2, 3] = np.nan
    write_stack(tmp_path / "i" / "a.tif", array=dn)
    write_labels(tmp_path / "l" / "a.tif", np.ones((8, 8), np.uint8))
    scenes = pair_labels([tmp_path / "i"], tmp_path / "l", scale=1, offset=0.5)
    chip = LabelledChips(scenes, bands=BANDS, chip_size=8)[0]
    assert np.isfinite(chip.reflectance).all()
    assert (chip.reflectance[:, chip.valid] == 0.75).all()
    assert not chip.valid[2, 3]
    assert chip.labels[2, 3] == 255
    assert (chip.labels == 255).sum() == 1


def test_nothing_valid_and_labelled_is_refused(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = world
    write_geotiff(
        folder / "images" / "a.tif",
        np.zeros((3, 32, 40), np.uint16),
        crs=CRS,
        transform=GRID,
        descriptions=list(BANDS),
    )
    scenes = pair_labels([folder / "images"], folder / "labels")
    with pytest.raises(UserError, match="no pixel of 1 images is valid and labelled") as error:
        LabelledChips(scenes, bands=BANDS, chip_size=16)
    one_line(error)
    with pytest.raises(UserError, match="no labelled pixel in 1 label rasters"):
        pair_labels([folder / "images"], folder / "labels", ignore=[1, 2, 7])


def test_a_missing_band_is_named(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = world
    scenes = pair_labels([folder / "images"], folder / "labels")
    with pytest.raises(UserError, match=r"a\.tif has no band B8A, only B02 B03 B04") as error:
        LabelledChips(scenes, bands=("B03", "B8A", "B11"), chip_size=16)
    one_line(error)


def test_chips_go_to_other_processes_and_threads(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = world
    chips = LabelledChips(pair_labels([folder / "images"], folder / "labels"), bands=BANDS, chip_size=8)
    copy = pickle.loads(pickle.dumps(chips))
    with ThreadPoolExecutor(4) as pool:
        for i, chip in enumerate(pool.map(copy.__getitem__, range(len(copy)))):
            np.testing.assert_array_equal(chip.labels, chips[i].labels)
            np.testing.assert_array_equal(chip.reflectance, chips[i].reflectance)


def test_statistics_are_those_of_the_valid_pixels(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, dn, _ = world
    chips = LabelledChips(pair_labels([folder / "images"], folder / "labels"), bands=BANDS, chip_size=24)
    mean, std = chips.statistics(np.arange(4))
    np.testing.assert_allclose(mean, dn.mean(axis=(1, 2)) / 1e4, rtol=1e-5)
    np.testing.assert_allclose(std, dn.std(axis=(1, 2)) / 1e4, rtol=1e-5)


def test_given_splits_go_by_name(tmp_path: Path, write_stack: WriteStack) -> None:
    for name in "ba":
        write_stack(tmp_path / "i" / f"{name}.tif", shape=(8, 16))
        write_labels(tmp_path / "l" / f"{name}.tif", random_labels((8, 16)))
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l"), bands=BANDS, chip_size=8)
    assert chips.given({"a": "test", "b": "train", "c": "val"}) == ["test", "test", "train", "train"]
    with pytest.raises(UserError, match="1 of 2 images have no split, the first is b"):
        chips.given({"a": "test"})


def test_fingerprint_changes_with_files_and_settings(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = world

    def fingerprint(bands: Sequence[str] = BANDS, size: int = 16, **options: Any) -> str:
        scenes = pair_labels([folder / "images"], folder / "labels", **options)
        return LabelledChips(scenes, bands=bands, chip_size=size).fingerprint

    first = fingerprint()
    others = [fingerprint(size=8), fingerprint(bands=BANDS[:2]), fingerprint(ignore=[7]), fingerprint(offset=-1000)]
    others.append(fingerprint(classes=[7, 2, 1]))
    assert fingerprint() == first
    for path in (folder / "labels" / "a.tif.aux.xml", folder / "images" / "a.tif.aux.xml"):
        path.write_text("<PAMDataset/>")
        others.append(fingerprint())
    for path in (folder / "labels" / "a.tif", folder / "images" / "a.tif"):
        changed = path.stat().st_mtime_ns + 1_000_000_000
        os.utime(path, ns=(changed, changed))
        others.append(fingerprint())
    assert len({first, *others}) == 1 + len(others)


def test_labels_that_changed_are_read_anew(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, labels = world
    scenes = pair_labels([folder / "images"], folder / "labels")
    chips = LabelledChips(scenes, bands=BANDS, chip_size=40)
    before = chips[0].labels
    write_labels(folder / "labels" / "a.tif", np.flip(labels).copy())
    after = chips[0].labels
    np.testing.assert_array_equal(after[:32], np.flip(before[:32]))


# --- where chips lie


def test_places_are_those_of_rasterio_and_neighbours_meet(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "i" / "a.tif", shape=(40, 56))
    write_labels(tmp_path / "l" / "a.tif", random_labels((40, 56)))
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l"), bands=BANDS, chip_size=24)
    assert chips.lonlat is not None
    assert chips.size_m is not None
    x = [GRID[2] + 10 * (c + min(c + 24, 56)) / 2 for c in chips.col]
    y = [GRID[5] - 10 * (r + min(r + 24, 40)) / 2 for r in chips.row]
    lon, lat = rasterio.warp.transform(CRS, "EPSG:4326", x, y)
    np.testing.assert_allclose(chips.lonlat, np.stack([lon, lat], axis=1), atol=1e-12)
    expected = [
        (10 * (min(c + 24, 56) - c), 10 * (min(r + 24, 40) - r)) for r, c in zip(chips.row, chips.col, strict=True)
    ]
    np.testing.assert_allclose(chips.size_m, expected, rtol=6e-3)  # UTM's scale, a sphere for the ellipsoid
    # two full chips side by side, measured as the footprints are: centres half of both widths apart
    degree = np.pi * 6_371_008.8 / 180
    apart = (chips.lonlat[1] - chips.lonlat[0]) * degree * (np.cos(np.radians(chips.lonlat[0, 1])), 1)
    np.testing.assert_allclose(np.hypot(*apart), (chips.size_m[0, 0] + chips.size_m[1, 0]) / 2, rtol=1e-4)


def test_chips_on_the_antimeridian_have_their_size(tmp_path: Path, write_stack: WriteStack) -> None:
    crs = "EPSG:32660"  # longitude 174 to 180 degrees
    x, y = rasterio.warp.transform("EPSG:4326", crs, [180.0], [10.0])
    grid = (10.0, 0.0, x[0] - 160, 0.0, -10.0, y[0] + 160)
    write_stack(tmp_path / "i" / "a.tif", shape=(32, 32), crs=crs, transform=grid)
    write_labels(tmp_path / "l" / "a.tif", random_labels((32, 32)), crs=crs, transform=grid)
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l"), bands=BANDS, chip_size=32)
    np.testing.assert_allclose(chips.size_m, [[320, 320]], rtol=1e-2)


# --- pairs by name


@pytest.mark.parametrize(
    ("images", "labels", "pairs"),
    [
        (["b", "a", "a_2"], ["a_2", "a", "b"], {"a": "a", "a_2": "a_2", "b": "b"}),
        (["x1", "x2"], ["x2_label", "x1_label"], {"x1": "x1_label", "x2": "x2_label"}),
        (["x1_image", "x2_image"], ["x2_mask", "x1_mask"], {"x1_image": "x1_mask", "x2_image": "x2_mask"}),
        (["x1_image"], ["x1"], {"x1_image": "x1"}),
        (["x1-img", "x2-img"], ["x1-corn", "x2-corn"], {"x1-img": "x1-corn", "x2-img": "x2-corn"}),
        (
            ["S_20180419", "S_20180426", "T_2018-04-26"],
            ["T_LC", "S_LC"],
            {"S_20180419": "S_LC", "S_20180426": "S_LC", "T_2018-04-26": "T_LC"},
        ),
        (
            ["S_20180419", "S_20180426"],
            ["S_20180426_LC", "S_20180419_LC"],
            {f"S_{d}": f"S_{d}_LC" for d in (20180419, 20180426)},
        ),
    ],
)
def test_pairs_go_by_name(
    tmp_path: Path, write_stack: WriteStack, images: list[str], labels: list[str], pairs: dict[str, str]
) -> None:
    for name in images:
        write_stack(tmp_path / "i" / f"{name}.tif", shape=(4, 4))
    for k, name in enumerate(labels):
        write_labels(tmp_path / "l" / f"{name}.tif", np.full((4, 4), k, np.uint8))
    scenes = pair_labels([tmp_path / "i"], tmp_path / "l")
    assert {Path(s.scene.path).stem: Path(s.labels).stem for s in scenes} == pairs


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["i/north/a", "i/south/a"], ["l/north/a", "l/south/a"]),
        (["w/north/i/a", "w/south/i/a"], ["w/north/l/a", "w/south/l/a"]),
        (["i/north/a_image", "i/south/a_image"], ["l/north/a_mask", "l/south/a_mask"]),
    ],
)
def test_of_equal_names_the_folders_decide(
    tmp_path: Path, write_stack: WriteStack, images: list[str], labels: list[str]
) -> None:
    for name in images:
        write_stack(tmp_path / f"{name}.tif", shape=(4, 4))
    for k, name in enumerate(labels):
        write_labels(tmp_path / f"{name}.tif", np.full((4, 4), k, np.uint8))
    given = [tmp_path / f"{name}.tif" for name in images], [tmp_path / f"{name}.tif" for name in labels]
    scenes = pair_labels(*given)
    assert [labelled.labels for labelled in scenes] == [str(path) for path in given[1]]
    with pytest.raises(UserError, match=r"1 of 2 labels have no image, the first is .*south"):
        pair_labels(given[0][:1], given[1])
    for k in range(2):
        write_labels(tmp_path / "v" / str(k) / f"{Path(labels[0]).name}.tif", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="2 labels fit the image"):
        pair_labels(given[0][:1], tmp_path / "v")


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (["a", "b", "c"], ["a"], r"2 of 3 images have no label, the first is .*i/b\.tif: looked for b\.tif"),
        (["a"], ["a", "b", "c"], r"2 of 3 labels have no image, the first is .*l/b\.tif"),
        (["a", "b"], ["c", "d"], r"2 of 2 images have no label, the first is .*a\.tif"),
        (["S_20180419"], ["S_LC", "S_CT"], r"2 labels fit the image S_20180419, .*S_CT\.tif and .*S_LC\.tif"),
        (["river_south"], ["river_north"], "1 of 1 images have no label"),
        (["x_1"], ["x_2"], "1 of 1 images have no label"),
        (["a", "a_20180419"], ["a"], r"1 of 2 images have no label, the first is .*a_20180419\.tif"),
    ],
)
def test_an_image_or_label_alone_is_refused(
    tmp_path: Path, write_stack: WriteStack, images: list[str], labels: list[str], said: str
) -> None:
    for name in images:
        write_stack(tmp_path / "i" / f"{name}.tif", shape=(4, 4))
    for name in labels:
        write_labels(tmp_path / "l" / f"{name}.tif", np.ones((4, 4), np.uint8))
    with pytest.raises(UserError, match=said) as error:
        pair_labels([tmp_path / "i"], tmp_path / "l")
    one_line(error)


def test_a_folder_of_band_files_pairs_by_its_name(tmp_path: Path, write_band_folder: Callable[..., Any]) -> None:
    write_band_folder(tmp_path / "i" / "patch_7", "patch_7_", bands=("B02", "B05"))
    labels = write_labels(tmp_path / "l" / "patch_7.tif", random_labels((60, 60)))
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l"), bands=["B05"], chip_size=30)
    assert len(chips) == 4
    np.testing.assert_array_equal(np.array(chips.ids)[whole(chips, 0)], labels)


def test_labels_beside_the_images_are_no_images(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "a.tif", shape=(4, 4))
    write_labels(tmp_path / "a_mask.tif", np.ones((4, 4), np.uint8))
    assert len(pair_labels([tmp_path], [tmp_path / "a_mask.tif"])) == 1
    with pytest.raises(UserError, match="all rasters that --images names are label rasters"):
        pair_labels([tmp_path], tmp_path)


def test_labels_that_are_not_there_are_said(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, _ = world
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"no label raster under .*empty"):
        pair_labels([folder / "images"], folder / "empty")
    with pytest.raises(UserError, match=r"gone does not exist; --labels"):
        pair_labels([folder / "images"], folder / "gone")


# --- grids


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((33, 41), {}, "shape 33×41 against 32×40;"),
        ((32, 40), {"transform": shifted(0.5, 0)}, "shifted by 0.5, 0.0 pixels;"),
        ((32, 40), {"transform": shifted(0, -3)}, "shifted by 0.0, -3.0 pixels;"),
        ((33, 41), {"transform": shifted(-0.5, 0.5)}, "shape 33×41 against 32×40, shifted by -0.5, 0.5 pixels;"),
        ((32, 40), {"crs": "EPSG:32634"}, "CRS EPSG:32634 against EPSG:32633;"),
        (
            (16, 20),
            {"transform": (20.0, 0.0, GRID[2], 0.0, -20.0, GRID[5])},
            "shape 16×20 against 32×40, pixels of 20×20 against 10×10;",
        ),
        ((32, 40), {"transform": (10.0, 0.0, GRID[2], 0.0, 10.0, GRID[5] - 320)}, "axes turned or mirrored"),
    ],
)
def test_another_grid_is_told_in_numbers(
    world: tuple[Path, np.ndarray, np.ndarray], shape: tuple[int, int], options: dict[str, Any], said: str
) -> None:
    folder, _, _ = world
    write_labels(folder / "labels" / "a.tif", random_labels(shape), **options)
    with pytest.raises(UserError, match="is not on the grid of") as error:
        pair_labels([folder / "images"], folder / "labels")
    assert said in one_line(error)
    assert "--align true" in str(error.value)


def test_a_hundredth_of_a_pixel_is_the_same_grid(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, labels = world
    write_labels(folder / "labels" / "a.tif", labels, transform=shifted(0.009, -0.009))
    assert pair_labels([folder / "images"], folder / "labels")[0].warped is None
    write_labels(folder / "labels" / "a.tif", labels, transform=shifted(0.012, 0))
    with pytest.raises(UserError, match=r"shifted by 0\.01, 0\.0 pixels"):
        pair_labels([folder / "images"], folder / "labels")
    stretched = (10.0 * (1 + 0.02 / 40), *GRID[1:])  # the right side is 0.02 pixels off, the corner is not
    write_labels(folder / "labels" / "a.tif", labels, transform=stretched)
    with pytest.raises(UserError, match=r"pixels of 10\.005×10 against 10×10"):
        pair_labels([folder / "images"], folder / "labels")


def nearest_reference(labels: np.ndarray, crs: str, transform: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    """The label under the centre of each pixel of the image's grid, -1 outside: pixel by pixel."""
    found = np.full(shape, -1)
    for row in range(shape[0]):
        x = [GRID[0] * (col + 0.5) + GRID[2] for col in range(shape[1])]
        y = [GRID[4] * (row + 0.5) + GRID[5]] * shape[1]
        xs, ys = rasterio.warp.transform(CRS, crs, x, y)
        for col, (px, py) in enumerate(zip(xs, ys, strict=True)):
            c = math.floor((px - transform[2]) / transform[0])
            r = math.floor((py - transform[5]) / transform[4])
            if 0 <= r < labels.shape[0] and 0 <= c < labels.shape[1]:
                found[row, col] = labels[r, c]
    return found


@pytest.mark.parametrize(
    ("shape", "crs", "transform"),
    [
        ((32, 40), CRS, shifted(0.25, 0)),
        ((33, 41), CRS, shifted(-0.4, -0.3)),
        ((32, 40), CRS, shifted(0.5, 0)),
        ((32, 40), CRS, shifted(7, -3)),
        ((20, 20), CRS, (20.0, 0.0, GRID[2], 0.0, -20.0, GRID[5])),
        ((200, 200), "EPSG:32632", None),
        ((90, 120), "EPSG:4326", None),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_align_takes_the_label_under_each_pixel_centre(
    world: tuple[Path, np.ndarray, np.ndarray],
    shape: tuple[int, int],
    crs: str,
    transform: tuple[float, ...] | None,
    dtype: str,
) -> None:
    folder, _, _ = world
    if transform is None:  # a grid of 10 m around the image
        xs, ys = rasterio.warp.transform(CRS, crs, [GRID[2] + 200], [GRID[5] - 160])
        step = (10.0, 10.0) if crs != "EPSG:4326" else (1.3e-4, 9e-5)
        transform = (step[0], 0.0, xs[0] - step[0] * shape[1] / 2, 0.0, -step[1], ys[0] + step[1] * shape[0] / 2)
    labels = random_labels(shape, range(60)).astype(dtype)
    write_labels(folder / "labels" / "a.tif", labels, crs=crs, transform=transform)
    scenes = pair_labels([folder / "images"], folder / "labels", align=True)
    chips = LabelledChips(scenes, bands=BANDS, chip_size=16)
    expected = nearest_reference(labels, crs, transform, (32, 40))
    found = whole(chips, 0)
    np.testing.assert_array_equal(np.where(found == 255, -1, np.array((*chips.ids, *[-1] * 256))[found]), expected)
    assert chips.ids == tuple(sorted(set(np.unique(expected).tolist()) - {-1}))
    assert scenes[0].warped is not None
    assert "warped to the image's grid" in " ".join(chips.report())


def test_align_leaves_labels_on_the_grid_alone(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, labels = world
    scenes = pair_labels([folder / "images"], folder / "labels", align=True)
    assert scenes[0].warped is None
    chips = LabelledChips(scenes, bands=BANDS, chip_size=16)
    np.testing.assert_array_equal(np.array(chips.ids)[whole(chips, 0)], labels)
    assert "warped" not in " ".join(chips.report())


def test_without_georeferencing_only_the_shape_counts(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "i" / "a.tif", crs=None, transform=None)
    labels = write_labels(tmp_path / "l" / "a.tif", random_labels((32, 40)), crs=None, transform=None)
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l"), bands=BANDS, chip_size=16)
    np.testing.assert_array_equal(np.array(chips.ids)[whole(chips, 0)], labels)
    assert chips.lonlat is None
    assert chips.size_m is None
    assert "1 of 1 images have no CRS" in " ".join(chips.report())
    write_labels(tmp_path / "l" / "a.tif", random_labels((33, 40)), crs=None, transform=None)
    with pytest.raises(UserError, match="shape 33×40 against 32×40; without a CRS on both sides"):
        pair_labels([tmp_path / "i"], tmp_path / "l", align=True)


def test_georeferencing_on_one_side_only_is_refused(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, labels = world
    write_labels(folder / "labels" / "a.tif", labels, crs=None, transform=None)
    with pytest.raises(UserError, match="CRS none against EPSG:32633; without a CRS on both sides it cannot be warped"):
        pair_labels([folder / "images"], folder / "labels", align=True)


# --- classes


def test_a_value_outside_the_list_is_named_with_its_pixels(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, labels = world
    with pytest.raises(UserError) as error:
        pair_labels([folder / "images"], folder / "labels", classes=[1, 9])
    said = one_line(error)
    assert f"hold 2 values not among --classes 1 9: 2 ({(labels == 2).sum()} pixels), 7 ({(labels == 7).sum()} " in said
    assert "--ignore" in said
    scenes = pair_labels([folder / "images"], folder / "labels", classes=[9, 7, 1], ignore=[2])
    chips = LabelledChips(scenes, bands=BANDS, chip_size=40)
    assert chips.ids == (9, 7, 1)  # in the order asked for
    assert chips.class_pixels.sum(axis=0).tolist() == [0, (labels == 7).sum(), (labels == 1).sum()]
    np.testing.assert_array_equal(whole(chips, 0), np.select([labels == 7, labels == 1], [1, 2], 255))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": [1, 1]}, "--classes 1 1: name one id or more, each once"),
        ({"classes": []}, "name one id or more"),
        ({"classes": [-1, 1, 2]}, "--classes -1: ids of classes must be 0 or more"),
        ({"classes": [1, 2, 7], "ignore": [2]}, "--classes and --ignore both hold 2"),
    ],
)
def test_lists_that_contradict_themselves(
    world: tuple[Path, np.ndarray, np.ndarray], options: dict[str, Any], said: str
) -> None:
    folder, _, _ = world
    with pytest.raises(UserError, match=said):
        pair_labels([folder / "images"], folder / "labels", **options)


def test_nodata_of_one_file_is_a_class_of_another(tmp_path: Path, write_stack: WriteStack) -> None:
    labels = random_labels((8, 8), (0, 1))
    for name, nodata in (("a", 0), ("b", None)):
        write_stack(tmp_path / "i" / f"{name}.tif", shape=(8, 8))
        write_labels(tmp_path / "l" / f"{name}.tif", labels, nodata=nodata)
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l"), bands=BANDS, chip_size=8)
    assert chips.ids == (0, 1)
    assert any(line.startswith("0 is a class, and 1 of 2 label rasters declare it") for line in chips.report())
    np.testing.assert_array_equal(chips[0].labels, np.where(labels == 0, 255, 1))
    np.testing.assert_array_equal(chips[1].labels, labels)
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l", classes=[0, 1]), bands=BANDS, chip_size=8)
    np.testing.assert_array_equal(chips[0].labels, labels)  # asked for, so a class
    assert not any("is a class, and" in line for line in chips.report())


def test_values_below_0_are_no_class_and_counted(tmp_path: Path, write_stack: WriteStack) -> None:
    """A -1 for what nobody looked at was a class of its own: 0.466 mIoU against 0.687 with --ignore -1."""
    for name in ("a", "b", "b_20200101", "b_20200201"):
        write_stack(tmp_path / "i" / f"{name}.tif", shape=(8, 8))
    labels = random_labels((8, 8), (1, 2)).astype(np.int16)
    labels[:2], labels[2, :3], labels[3, :4] = -1, -7, -9999
    for name in ("a", "b", "b_20200101", "b_20200201"):
        write_labels(tmp_path / "l" / f"{name}.tif", labels if name != "a" else abs(labels) % 3, nodata=-9999)
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l"), bands=BANDS, chip_size=8)
    assert chips.ids == (0, 1, 2)
    np.testing.assert_array_equal(whole(chips, 1), np.where(labels < 0, 255, labels))
    (said,) = [line for line in chips.report() if "below 0" in line]
    assert said.startswith(f"{3 * (16 + 3)} pixels in 3 label rasters")
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l", ignore=[-1, -7]), bands=BANDS, chip_size=8)
    assert not any("below 0" in line for line in chips.report())


def test_at_most_255_classes(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "i" / "a.tif", shape=(16, 17))
    labels = (np.arange(16 * 17).reshape(16, 17) % 256 + 1000).astype(np.uint16)
    write_labels(tmp_path / "l" / "a.tif", labels)
    with pytest.raises(UserError, match=r"256 classes, 1000 to 1255, .* at most 255") as error:
        pair_labels([tmp_path / "i"], tmp_path / "l")
    one_line(error)
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l", ignore=[1000]), bands=BANDS, chip_size=17)
    assert len(chips.ids) == 255
    np.testing.assert_array_equal(whole(chips, 0), np.where(labels == 1000, 255, labels - 1001))
    assert len(set(chips.colours[:48])) == 48


def test_names_and_colours_come_from_the_labels(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "i" / "a.tif", shape=(8, 8))
    labels = random_labels((8, 8))
    path = tmp_path / "l" / "a.tif"
    colours = {1: (0, 0, 255), 2: (0, 100, 0), 7: (200, 200, 10)}
    tags = {"class_1": "water", "class_7": "bare", "class_x": "not an id"}
    write_labels(path, labels, tags=tags, colormap=colours)
    scene = pair_labels([tmp_path / "i"], tmp_path / "l")[0]
    assert scene.classes.names == ("water", "class 2", "bare")
    assert scene.classes.colours == tuple(colours.values())
    write_labels(path, labels, colormap={1: (0, 0, 255)})  # the others would be black alike
    plain = pair_labels([tmp_path / "i"], tmp_path / "l")[0].classes
    assert plain.names == ("class 1", "class 2", "class 7")
    assert len(set(plain.colours)) == 3
    assert (0, 0, 0) not in plain.colours


def test_the_sample_tells_its_classes(tmp_path: Path) -> None:
    make_sample(tmp_path, scenes=1, size=48)
    chips = LabelledChips(pair_labels([tmp_path / "images"], tmp_path / "labels"), bands=TEN, chip_size=24)
    names, colours = read_legend(chips.scenes[0].labels)
    assert chips.names == tuple(names[i] for i in chips.ids)
    assert chips.colours == tuple(colours[i] for i in chips.ids)
    assert 255 not in chips.ids
    assert not any(name.startswith("class ") for name in chips.names)


# --- maps


@pytest.mark.parametrize(
    ("ids", "dtype", "nodata"),
    [
        ((1, 2, 7), "uint8", 255),
        ((0, 255), "uint8", 254),
        ((11, 1200), "uint16", 65535),
        (tuple(range(2, 256)), "uint8", 1),
        (tuple(range(1, 256)), "uint8", 0),
        ((-1, 5), "int32", 2**31 - 1),
    ],
)
def test_a_class_map_reads_back_as_labels(
    world: tuple[Path, np.ndarray, np.ndarray], ids: tuple[int, ...], dtype: str, nodata: int
) -> None:
    folder, _, _ = world
    scene = open_scene(folder / "images" / "a.tif")
    classes = np.random.default_rng(0).integers(0, len(ids), (32, 40)).astype(np.uint8)
    classes[:, 3] = 255
    names = [f"name {i}" for i in ids]
    colours = [(k, 255 - k, 7) for k in range(len(ids))]
    path = folder / "map.tif"
    write_class_map(path, classes, scene, names, ids, colours, {"checkpoint": "runs/x"})
    values, crs, transform, found = read_labels(path)
    assert (crs, transform, found, values.dtype) == (CRS, GRID, nodata, np.dtype(dtype))
    np.testing.assert_array_equal(values, np.where(classes == 255, nodata, np.array((*ids, *[0] * 256))[classes]))
    with rasterio.open(path) as dataset:
        assert dataset.tags()["checkpoint"] == "runs/x"
    told, palette = read_legend(path)
    assert told == dict(zip(ids, names, strict=True))
    if dtype != "int32":
        assert [palette[i] for i in ids] == colours


def test_a_class_map_is_a_label_raster_of_its_image(world: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, labels = world
    chips = LabelledChips(pair_labels([folder / "images"], folder / "labels"), bands=BANDS, chip_size=16)
    scene = chips.scenes[0].scene
    write_class_map(folder / "a.tif", whole(chips, 0), scene, chips.names, chips.ids, chips.colours, {})
    np.testing.assert_array_equal(read_labels(folder / "a.tif")[0], labels)
    again = pair_labels([folder / "images"], folder / "a.tif")
    assert again[0].classes == chips.scenes[0].classes
    with pytest.raises(ValueError, match="neither 255 nor below 3"):
        write_class_map(
            folder / "b.tif", np.full((32, 40), 3, np.uint8), scene, chips.names, chips.ids, chips.colours, {}
        )
    with pytest.raises(ValueError, match="do not fit"):
        write_class_map(folder / "b.tif", np.zeros((3, 4), np.uint8), scene, chips.names, chips.ids, chips.colours, {})


# --- real labels


def pixels(scenes: Sequence[LabelledScene], bands: Sequence[str], size: int) -> tuple[LabelledChips, dict[int, int]]:
    """The chips, and the valid pixels of each id."""
    chips = LabelledChips(scenes, bands=bands, chip_size=size)
    return chips, dict(zip(chips.ids, chips.class_pixels.sum(axis=0).tolist(), strict=True))


@pytest.mark.parametrize(("images", "band_names"), [("images_l2a", L2A), ("images_l1c", L1C)])
def test_landcover(shared_data: Path, images: str, band_names: list[str]) -> None:
    folder = shared_data / "landcover"
    scenes = pair_labels([folder / images], folder / "labels", band_names=band_names)
    chips, found = pixels(scenes, TEN, 56)
    assert len(scenes) == 5
    assert len(chips) == 5 * 16
    assert set(found) <= set(range(1, 10))
    assert chips.lonlat is not None
    number = next(k for k, s in enumerate(scenes) if Path(s.scene.path).name.startswith("282D"))
    ids, counts = np.unique(np.array(chips.ids)[whole(chips, number)], return_counts=True)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {1: 25991, 2: 18690, 6: 3316, 9: 2179}


def test_water(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "water"
    with pytest.raises(UserError, match=r"10 of 11 images have no label, the first is .*Boadella_2020-01-18\.tif"):
        pair_labels([folder / "images"], folder / "labels", band_names=L2A)
    scenes = pair_labels([folder / "images" / "labelled_image_1.tif"], folder / "labels", band_names=L2A)
    chips, found = pixels(scenes, TEN, 56)
    assert found == {0: 114116, 1: 29144}
    assert round(found[1] / sum(found.values()), 3) == 0.203
    assert len(chips) == 49
    path = tmp_path / "map.tif"
    write_class_map(path, whole(chips, 0), scenes[0].scene, chips.names, chips.ids, chips.colours, {})
    with rasterio.open(path) as written, rasterio.open(scenes[0].scene.path) as image:
        assert (written.crs, written.transform, written.shape) == (image.crs, image.transform, image.shape)
    np.testing.assert_array_equal(read_labels(path)[0], read_labels(folder / "labels" / "labelled_image_1.tif")[0])


def test_cloud(shared_data: Path) -> None:
    folder = shared_data / "cloud"
    scenes = pair_labels([folder / "images"], folder / "labels", scale=1)
    chips, found = pixels(scenes, ("B02", "B03", "B04", "B08", "B11", "B12"), 100)
    assert found == {0: 28583, 1: 840, 3: 183124, 4: 49597}
    assert chips.lonlat is None
    assert chips[35].valid.sum() == 12 * 12
    dn, _ = read_window(scenes[0].scene, chips.bands, 100, 200, 100, 100)
    np.testing.assert_array_equal(chips[8].reflectance, dn)  # reflectance as stored


def test_seasons_share_the_labels_of_their_site(shared_data: Path) -> None:
    with pytest.raises(UserError, match="2 labels fit the image"):
        pair_labels([shared_data / "chips_seasonal"], shared_data / "chips_seasonal_labels")
    files = sorted((shared_data / "chips_seasonal_labels").glob("*_LC.tif"))
    scenes = pair_labels([shared_data / "chips_seasonal"], files)
    assert len(scenes) == 88
    for labelled in scenes:
        assert Path(labelled.labels).stem == Path(labelled.scene.path).stem.split("_")[0] + "_LC"
    chips, found = pixels(scenes[:3], TEN, 64)
    assert set(found) == {11, 13, 60, 99}
    values = read_labels(files[0])[0]
    for i in range(len(chips)):
        chip = chips[i]
        np.testing.assert_array_equal(np.array(chips.ids)[chip.labels[chip.valid]], values[chip.valid])


def test_images_of_two_products_are_said(tmp_path: Path) -> None:
    """L1C beside L2A once went into one probe without a word."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name in ("S2A_MSIL1C_20200101T101031_N0208_a", "S2A_MSIL2A_20200101T101031_N0213_b"):
        dn = np.full((1, 16, 16), 500, np.uint16)
        write_geotiff(tmp_path / "images" / f"{name}.tif", dn, crs=CRS, transform=GRID, descriptions=["B02"])
        write_labels(tmp_path / "labels" / f"{name}.tif", random_labels((16, 16), (3, 5), seed=0))
    pairs = pair_labels([tmp_path / "images"], tmp_path / "labels")
    said = LabelledChips(pairs, bands=["B02"], chip_size=16).report()
    assert "mixes products, L1C in 1 and L2A in 1 of 2 images: their reflectance differs, probe one kind" in said


def test_pixels_that_nothing_measures_are_left_out_and_said(tmp_path: Path, write_stack: WriteStack) -> None:
    image = np.full((3, 8, 12), 0.25, np.float32)
    image[1, 2, 3] = image[0, 7, 11] = -3.4028234663852886e38
    write_stack(tmp_path / "i" / "a.tif", array=image)
    write_labels(tmp_path / "l" / "a.tif", np.ones((8, 12), np.uint8))
    chips = LabelledChips(pair_labels([tmp_path / "i"], tmp_path / "l", scale=1), bands=BANDS, chip_size=8)
    assert (chips.unmeasured, chips.class_pixels.sum()) == (2, 94)
    assert "left out 2 pixels" in " ".join(chips.report())
    read = [chips[number] for number in range(len(chips))]
    assert all((chip.reflectance[:, chip.valid] == 0.25).all() for chip in read)
    assert all(np.isfinite(chip.reflectance).all() for chip in read)
