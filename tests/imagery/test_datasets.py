"""A chip by its number: the right pixels, physical, from any process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ssl_geo.errors import UserError
from ssl_geo.imagery.chips import build_index
from ssl_geo.imagery.datasets import Chip, ChipDataset, dominant_labels
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.scenes import UnreadableError

WriteStack = Callable[..., np.ndarray]
WriteFolder = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def world(tmp_path: Path, write_stack: WriteStack, write_band_folder: WriteFolder) -> dict[str, np.ndarray]:
    """A stack with a -1000 offset, a stack without, and a band folder; whole arrays of B05 B02 by scene path."""
    new = tmp_path / "S2A_MSIL2A_20230101T101031_N0509_x.tif"
    old = tmp_path / "old.tif"
    whole = {
        str(new): write_stack(new, ["B02", "B05"], (40, 33), seed=1)[::-1],
        str(old): write_stack(old, ["B05", "B02"], (16, 16), seed=2),
    }
    stored = write_band_folder(tmp_path / "patch", bands=("B02", "B05"))
    whole[str(tmp_path / "patch")] = np.stack([np.kron(stored["B05"], np.ones((2, 2), np.uint16)), stored["B02"]])
    return whole


def test_chips_are_the_windows_of_the_index(tmp_path: Path, world: dict[str, np.ndarray]) -> None:
    index = build_index([tmp_path], bands=["B05", "B02"], chip_size=16, progress=False)
    dataset = ChipDataset(index)
    assert len(dataset) == len(index) == 9 + 1 + 16
    for i, row in enumerate(index.table.to_pylist()):
        chip = dataset[i]
        expected = world[row["scene"]][:, row["row"] : row["row"] + 16, row["col"] : row["col"] + 16]
        np.testing.assert_array_equal(chip.dn, expected)
        assert chip.dn.dtype == np.uint16
        assert chip.valid.shape == (16, 16)
        assert chip.valid.all()
        assert (chip.bands, chip.scale, chip.nodata) == (("B05", "B02"), 1e-4, None)
        assert chip.offset == row["offset"] == (-1000.0 if "N0509" in row["scene"] else 0.0)
        reflectance = chip.reflectance()
        assert reflectance.dtype == np.float32
        np.testing.assert_allclose(reflectance, (expected.astype(float) + chip.offset) / 10_000, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(dataset[-1].dn, dataset[len(dataset) - 1].dn)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_reflectance_leaves_the_dn_alone_and_does_not_wrap() -> None:
    dn = np.array([[[0, 65535]]], np.uint16)
    chip = Chip(dn, np.ones((1, 2), bool), ("B02",), 1e-4, -1000.0, None)
    np.testing.assert_allclose(chip.reflectance(), [[[-0.1, 6.4535]]], rtol=1e-6)
    np.testing.assert_array_equal(chip.dn, [[[0, 65535]]])


def test_dataset_goes_to_other_processes_and_threads(tmp_path: Path, world: dict[str, np.ndarray]) -> None:
    dataset = ChipDataset(build_index([tmp_path], bands=["B05", "B02"], chip_size=16, progress=False))
    copy = pickle.loads(pickle.dumps(dataset))  # as a spawned worker gets it
    with ThreadPoolExecutor(3) as pool:
        for i, chip in enumerate(pool.map(copy.__getitem__, range(len(copy)))):
            np.testing.assert_array_equal(chip.dn, dataset[i].dn)


def test_a_new_index_reads_the_new_file(tmp_path: Path, write_stack: WriteStack) -> None:
    for seed in (0, 1):
        array = write_stack(tmp_path / "x.tif", shape=(16, 16), seed=seed)
        dataset = ChipDataset(build_index([tmp_path], bands=["B03"], chip_size=16, progress=False))
        np.testing.assert_array_equal(dataset[0].dn[0], array[1])


def test_a_file_that_went_bad_is_named_with_its_window(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif", shape=(256, 256))
    dataset = ChipDataset(build_index([tmp_path], bands=["B04"], chip_size=16, progress=False))
    data = (tmp_path / "x.tif").read_bytes()
    (tmp_path / "x.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableError, match=r"x\.tif, rows 240 to 256, columns 240 to 256"):
        dataset[len(dataset) - 1]


def test_a_file_that_is_gone_is_named(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "gone.tif")
    dataset = ChipDataset(build_index([tmp_path], bands=["B04"], chip_size=16, progress=False))
    (tmp_path / "gone.tif").unlink()
    with pytest.raises(UserError, match=r"gone\.tif"):
        dataset[0]


def test_dominant_labels_are_the_most_frequent_of_each_chip(
    tmp_path: Path, write_stack: WriteStack, write_band_folder: WriteFolder
) -> None:
    images, folder = tmp_path / "images", tmp_path / "labels"
    folder.mkdir()
    write_stack(images / "a.tif", shape=(40, 33))
    write_band_folder(images / "b", bands=("B02", "B03", "B04"))
    rng = np.random.default_rng(0)
    whole = {}
    grid = (10.0, 0.0, 400_000.0, 0.0, -10.0, 5_300_000.0)
    for name, shape in (("a", (40, 33)), ("b", (60, 60))):
        whole[name] = rng.choice([1, 2, 7, 255], size=shape, p=[0.2, 0.2, 0.2, 0.4]).astype(np.uint8)
        whole[name][:16, :16] = 255
        write_geotiff(folder / f"{name}.tif", whole[name][None], crs="EPSG:32633", transform=grid, nodata=255)
    index = build_index([images], bands=["B02"], chip_size=16, progress=False)
    positions = rng.permutation(len(index))
    table = index.table.take(positions).to_pylist()
    expected = []
    for row in table:
        labels = whole[Path(row["scene"]).stem][row["row"] : row["row"] + 16, row["col"] : row["col"] + 16]
        counts = {int(i): int((labels == i).sum()) for i in (1, 2, 7)}
        expected.append(max(counts, key=lambda i: (counts[i], -i)) if any(counts.values()) else -1)
    assert -1 in expected
    assert dominant_labels(index, positions, folder).tolist() == expected
    below = whole["b"].astype(np.int16)
    below[(below == 255) | (below == 7)] = -1  # no label, though not declared
    write_geotiff(folder / "b.tif", below[None], crs="EPSG:32633", transform=grid)
    corners = [(row["row"], row["col"]) for row in table if Path(row["scene"]).stem == "b"]
    pixels = sum(int((below[r : r + 16, c : c + 16] < 0).sum()) for r, c in corners)
    said: list[str] = []
    assert set(dominant_labels(index, positions, folder, said.append).tolist()) == {-1, 1, 2, 7}
    assert "values below 0, which are no class: ignored" in said[0]
    assert said[0].split()[0] == f"{pixels:,}"
    numbers = index.scene_numbers(positions)
    assert {(n, row["scene"]) for n, row in zip(numbers.tolist(), table, strict=True)} == {
        (0, str(images / "a.tif")),
        (1, str(images / "b")),
    }
    write_geotiff(folder / "b.tif", whole["b"][None], crs="EPSG:32632", transform=grid)
    with pytest.raises(UserError, match=r"b\.tif is not on the grid of .*CRS EPSG:32632 against EPSG:32633"):
        dominant_labels(index, positions, folder)
    for off in ((10, 0, 400_005, 0, -10, 5_300_000), (10, 0, 4e5, 0, -10, 5_300_005), (10.01, 0, 4e5, 0, -10, 5.3e6)):
        write_geotiff(folder / "b.tif", whole["b"][None], crs="EPSG:32633", transform=off)
        with pytest.raises(UserError, match=r"shifted by 0\.5, 0\.0|shifted by 0\.0, -0\.5|pixels of 10\.01"):
            dominant_labels(index, positions, folder)
    write_geotiff(folder / "b.tif", whole["b"][None, 1:], crs="EPSG:32633", transform=grid)
    with pytest.raises(UserError, match="shape 59×60 against 60×60"):
        dominant_labels(index, positions, folder)
    (folder / "b.tif").unlink()
    with pytest.raises(UserError, match=r"no labels for .*looked for b\.tif"):
        dominant_labels(index, positions, folder)


def test_index_tells_the_units_its_chips_share(tmp_path: Path, world: dict[str, np.ndarray]) -> None:
    index = build_index([tmp_path], bands=["B02"], chip_size=16, progress=False)
    assert (index.scale, index.offset) == (1e-4, None)  # one scene has -1000, the others an assumed 0
