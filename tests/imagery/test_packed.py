"""Packed chips are the chips of the scenes, byte for byte, whatever happens while they are written or read."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ssl_geo.errors import UserError
from ssl_geo.imagery import arrays, packing
from ssl_geo.imagery.chips import ChipIndex, build_index
from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.packed import PackedChips, open_chips, packed_folder, packed_index, verify
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.scenes import UnreadableError

WriteStack = Callable[..., np.ndarray]
WriteFolder = Callable[..., dict[str, np.ndarray]]
BANDS = ("B05", "B02")
CHIP = 16 * 16 * len(BANDS) * 2  # bytes of one of uint16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, write_stack: WriteStack, write_band_folder: WriteFolder) -> Path:
    """Stacks of two integer types and of floats, with holes, different offsets and nodata, and a band folder."""
    folder = tmp_path_factory.mktemp("world")
    bands = ["B02", "B05"]
    write_stack(folder / "S2A_MSIL2A_20230101T101031_N0509_x.tif", bands, (70, 33), seed=1)
    write_stack(folder / "old.tif", bands[::-1], (33, 50), seed=2)
    dn = np.random.default_rng(3).integers(1, 9000, (2, 40, 40)).astype(np.int16)
    dn[:, 5:9, 30:36] = -5
    write_stack(folder / "signed.tif", bands, array=dn, nodata=-5)
    real = np.random.default_rng(4).uniform(0, 1, (2, 20, 48)).astype(np.float32)
    real[0, 3, 4] = np.nan
    write_stack(folder / "float.tif", bands, array=real)
    holes = np.random.default_rng(5).integers(1, 9000, (2, 32, 64)).astype(np.uint16)
    holes[:, 10:14, 20:50] = 0
    write_stack(folder / "holes.tif", bands, array=holes)
    write_band_folder(folder / "patch", bands=("B02", "B05"))
    return folder


@pytest.fixture(scope="module")
def index(world: Path) -> ChipIndex:
    return build_index([world], bands=BANDS, chip_size=16, scale=1e-4, min_valid=0.5, allow_mixed=True, progress=False)


def packed_from(index: ChipIndex, folder: Path, **options: object) -> list[str]:
    return pack(index, folder, **{"shard_bytes": 10 * CHIP, "workers": 2, "progress": False, **options})


def assert_same_chips(ours: PackedChips | ChipDataset, scenes: ChipDataset) -> None:
    assert len(ours) == len(scenes)
    assert (ours.bands, ours.chip_size) == (scenes.bands, scenes.chip_size)
    for i in range(len(scenes)):
        chip, expected = ours[i], scenes[i]
        assert chip.dn.dtype == expected.dn.dtype
        assert chip.dn.tobytes() == expected.dn.tobytes()  # NaN included
        np.testing.assert_array_equal(chip.valid, expected.valid)
        assert chip.valid.dtype == np.bool_
        assert (chip.bands, chip.scale, chip.offset) == (expected.bands, expected.scale, expected.offset)
        assert repr(chip.nodata) == repr(expected.nodata)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_packed_chips_are_those_of_the_scenes(index: ChipIndex, tmp_path: Path) -> None:
    said = packed_from(index, tmp_path / "p")
    assert f"{len(index)} chips in " in said[-1]
    again = packed_index(tmp_path / "p", bands=BANDS, chip_size=16)
    chips = open_chips(again, [tmp_path / "p"])
    assert isinstance(chips, PackedChips)
    assert_same_chips(chips, ChipDataset(index))
    partly = [not chips[i].valid.all() for i in range(len(chips))]
    assert 3 < sum(partly) < len(chips)
    np.testing.assert_array_equal(again.statistics.mean, index.statistics.mean)
    np.testing.assert_array_equal(again.statistics.m2, index.statistics.m2)
    assert again.table.drop_columns(["shard", "position", "valid_row"]).equals(index.table)
    chips[0].dn[:] = 0  # what is handed out belongs to the taker
    assert chips[0].dn.any()
    with pytest.raises(IndexError):
        chips[len(chips)]
    assert chips[-1].dn.tobytes() == chips[len(chips) - 1].dn.tobytes()


def test_the_container_is_what_its_description_says(index: ChipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    packed_from(index, folder)
    manifest = json.loads((folder / "packed.json").read_text())
    assert (manifest["version"], manifest["bands"], manifest["chip_size"]) == (1, list(BANDS), 16)
    shards = manifest["shards"]
    assert {np.dtype(shard["chips"]["dtype"]).name for shard in shards} == {"uint16", "int16", "float32"}
    assert len(shards) > 5
    files = [shard[kind] for shard in shards for kind in ("chips", "valid") if shard[kind]]
    assert names(folder) == {"packed.json", "index.parquet", *(file["file"] for file in files)}
    for file in files:
        assert zlib.crc32((folder / file["file"]).read_bytes()) == file["crc32"]
        assert (folder / file["file"]).stat().st_size == file["bytes"] <= 10 * CHIP + 128
    scenes = ChipDataset(index)
    for i, row in enumerate(pq.read_table(folder / "index.parquet").to_pylist()):  # as a stranger would read it
        dn = np.load(folder / f"chips-{row['shard']:05}.npy", mmap_mode="r", allow_pickle=False)[row["position"]]
        assert dn.tobytes() == scenes[i].dn.tobytes()
        assert dn.dtype == np.dtype(row["dtype"])
        valid = np.ones((16, 16), bool)
        if row["valid_row"] >= 0:
            bits = np.load(folder / f"valid-{row['shard']:05}.npy", allow_pickle=False)[row["valid_row"]]
            valid = np.unpackbits(bits, count=256).reshape(16, 16).astype(bool)
            assert not valid.all()
        np.testing.assert_array_equal(valid, scenes[i].valid)
        assert row["scene"].endswith((".tif", "patch"))


@pytest.mark.parametrize(("shard_bytes", "workers"), [(1, 3), (7 * CHIP + 5, 1), (10**9, 4)])
def test_size_of_shards_and_number_of_threads_change_no_chip(
    index: ChipIndex, tmp_path: Path, shard_bytes: int, workers: int
) -> None:
    packed_from(index, tmp_path / "p", shard_bytes=shard_bytes, workers=workers)
    assert_same_chips(PackedChips(packed_index(tmp_path / "p"), tmp_path / "p"), ChipDataset(index))


@pytest.mark.parametrize("bands", [["B02"], ["B2", "B05"], ["B05"]])
def test_some_of_the_bands_in_any_order(world: Path, index: ChipIndex, tmp_path: Path, bands: list[str]) -> None:
    packed_from(index, tmp_path / "p")
    part = packed_index(tmp_path / "p", bands=bands, chip_size=16)
    chips, whole = PackedChips(part, tmp_path / "p"), ChipDataset(index)
    channels = [BANDS.index(band.replace("B2", "B02")) for band in bands]
    assert part.bands == chips.bands == tuple(BANDS[c] for c in channels)
    np.testing.assert_array_equal(part.statistics.mean, index.statistics.mean[channels])
    np.testing.assert_array_equal(part.statistics.std, index.statistics.std[channels])
    for i in range(len(whole)):
        assert chips[i].dn.tobytes() == whole[i].dn[channels].tobytes()
        np.testing.assert_array_equal(chips[i].valid, whole[i].valid)
    part.save(tmp_path / "index.parquet")  # as a run folder keeps it
    again = PackedChips(ChipIndex.load(tmp_path / "index.parquet"), tmp_path / "p")
    assert again[3].dn.tobytes() == chips[3].dn.tobytes()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"bands": ["B02", "B12"]}, r"packed with --data.bands B05 B02, not B02 B12: .*ssl_geo\.pack .*--out FOLDER"),
        ({"chip_size": 32}, r"packed with --data.chip_size 16, not 32: .*ssl_geo\.pack"),
        ({"min_valid": 0.8}, r"packed with --data.min_valid 0.5, not 0.8"),
        ({"offset": -1000.0}, r"packed with --data.offset None, not -1000.0"),
        ({"band_names": ["B02", "B03"]}, r"packed with --data.band_names None, not B02 B03"),
        ({"bands": ["B02", "B02"]}, r"each once"),
        ({"bands": []}, None),
        ({"min_valid": 0.9, "scale": 1e-4, "allow_mixed": False}, None),
    ],
)
def test_what_the_folder_lacks_is_refused_in_a_line(
    index: ChipIndex, tmp_path: Path, asked: dict[str, object], words: str | None
) -> None:
    packed_from(index, tmp_path / "p")
    if words is None:  # a default asks for nothing
        assert len(packed_index(tmp_path / "p", **asked)) == len(index)
        return
    with pytest.raises(UserError, match=words) as error:
        packed_index(tmp_path / "p", **asked)
    assert "\n" not in str(error.value)


def _first_bytes(chips: PackedChips, queue: multiprocessing.Queue) -> None:
    queue.put([chips[i].dn.tobytes() for i in range(len(chips))])


def test_the_dataset_goes_to_other_processes_and_threads(
    index: ChipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_from(index, tmp_path / "p")
    chips = PackedChips(packed_index(tmp_path / "p"), tmp_path / "p")
    expected = [chips[i].dn.tobytes() for i in range(len(chips))]  # files are open now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_first_bytes, args=(chips, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60), queue.get(timeout=60)] == [expected, expected]
    for process in processes:
        process.join(60)
    copy = pickle.loads(pickle.dumps(chips))
    arrays.open_array.cache_clear()
    small = arrays.lru_cache(maxsize=1)(arrays.open_array.__wrapped__)  # files close while others read
    monkeypatch.setattr("ssl_geo.imagery.packed.open_array", small)
    with ThreadPoolExecutor(4) as pool:
        order = np.random.default_rng(0).permutation(len(copy)).tolist() * 5
        for i, chip in zip(order, pool.map(copy.__getitem__, order), strict=True):
            assert chip.dn.tobytes() == expected[i]


def _pack_until(index: ChipIndex, folder: Path, stop_after: int) -> None:
    """Pack, and die without a word before the file after `stop_after` others gets its name."""
    replace, count = Path.replace, 0

    def replace_or_die(self: Path, target: Path) -> Path:
        nonlocal count
        if count == stop_after:
            os._exit(9)
        count += 1
        return replace(self, target)

    Path.replace = replace_or_die  # type: ignore[method-assign]  # this process is not long for this world
    packed_from(index, folder)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_kill_at_any_point_leaves_nothing_that_looks_finished_and_is_gone_on_from(
    index: ChipIndex, tmp_path: Path
) -> None:
    packed_from(index, tmp_path / "whole")
    written = {name: (tmp_path / "whole" / name).read_bytes() for name in names(tmp_path / "whole")}
    steps = len(written) + 1  # the journal comes first
    for stop_after in range(steps):
        folder = tmp_path / f"{stop_after}"
        process = multiprocessing.get_context("fork").Process(target=_pack_until, args=(index, folder, stop_after))
        process.start()
        process.join(60)
        assert process.exitcode == 9
        assert not (folder / "packed.json").exists()
        if stop_after:
            with pytest.raises(UserError, match="not completely packed: run the same"):
                packed_folder([folder])
        kept = {name: (folder / name).stat().st_mtime_ns for name in sorted(names(folder)) if name.startswith("chips")}
        packed_from(index, folder)
        assert {name: (folder / name).read_bytes() for name in names(folder)} == written
        sure = list(kept)[:-1]  # the last one may have missed its line in the journal
        assert all((folder / name).stat().st_mtime_ns == kept[name] for name in sure)


def test_a_full_disk_is_told_before_and_while(
    index: ChipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        with pytest.raises(UserError, match=r"needs .* GB more, .*p has 1e-05 GB free: make room"):
            packed_from(index, tmp_path / "p")
        assert names(tmp_path / "p") == set()
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"No space left on device\); 2 finished shards are kept: make room"):
            packed_from(index, tmp_path / "p")
    assert not [name for name in names(tmp_path / "p") if "partial" in name or name == "packed.json"]
    said = packed_from(index, tmp_path / "p")
    assert "2 of " in said[0]
    assert_same_chips(PackedChips(packed_index(tmp_path / "p"), tmp_path / "p"), ChipDataset(index))


def test_the_predicted_size_is_the_size(index: ChipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_from(index, tmp_path / "p")
    size = sum(path.stat().st_size for path in (tmp_path / "p").iterdir() if path.suffix == ".npy")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    with pytest.raises(UserError, match="needs") as error:
        packed_from(index, tmp_path / "q")
    predicted = float(str(error.value).split("needs ")[1].split()[0]) * 1e9
    assert size < predicted + 128 * 20 < 1.2 * size


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "valid"])
def test_a_damaged_shard_is_found_and_mended(index: ChipIndex, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "p"
    packed_from(index, folder)
    assert "every checksum right" in verify(folder, workers=2, progress=False)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    name = next(n for n in sorted(before) if n.startswith("valid")) if harm == "valid" else "chips-00001.npy"
    if harm == "gone":
        (folder / name).unlink()
    else:
        content = bytearray(before[name])
        content[200] ^= 16
        (folder / name).write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    with pytest.raises(UserError, match=r"damaged \(|is missing|has \d+ bytes instead of \d+") as error:
        verify(folder, workers=2, progress=False)
    assert "mends" in str(error.value)
    if harm in ("cut", "gone"):  # a run finds these without reading
        with pytest.raises(UserError, match=name):
            packed_index(folder)
    said = packed_from(index, folder)
    assert "1 damaged shards are written anew" in said
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert "holds these" in packed_from(index, folder)[0]


def test_a_shard_that_is_cut_off_under_a_run_is_named(index: ChipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    packed_from(index, folder)
    chips = PackedChips(packed_index(folder), folder)
    assert chips[0].dn.size
    os.truncate(folder / "chips-00000.npy", 200)
    with pytest.raises(UnreadableError, match=r"chips-00000\.npy was cut off"):
        chips[0]
    (folder / "chips-00001.npy").write_bytes(b"no array")
    at_two = next(i for i in range(len(chips)) if index_of(folder, i) == 1)
    with pytest.raises(UnreadableError, match=r"chips-00001\.npy is damaged"):
        chips[at_two]


def index_of(folder: Path, i: int) -> int:
    return int(pq.read_table(folder / "index.parquet")["shard"][i].as_py())


def test_another_archive_or_another_use_of_the_folder_is_refused(index: ChipIndex, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    packed_from(index, folder)
    other = build_index([world / "old.tif"], bands=["B02"], chip_size=16, progress=False)
    with pytest.raises(UserError, match="holds chips of other imagery or settings"):
        packed_from(other, folder)
    with pytest.raises(UserError, match="holds chips of other imagery or settings"):
        packed_from(index, folder, shard_bytes=3 * CHIP)
    with pytest.raises(UserError, match="packed anew from other imagery"):
        PackedChips(other, folder)
    with pytest.raises(UserError, match=r"names .*p, a folder of packed chips, beside others: give it alone"):
        packed_folder([folder, world])
    with pytest.raises(UserError, match=r"holds .* and no packed chips"):
        packed_from(index, world)
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt beside packed chips"):
        packed_from(index, folder)
    assert packed_folder([world]) is None
    with pytest.raises(UserError, match="no folder of packed chips"):
        verify(world, workers=1)


def test_two_at_once_do_not_disturb_each_other(index: ChipIndex, tmp_path: Path) -> None:
    with packing._claimed(tmp_path / "p"), pytest.raises(UserError, match="another process packs into"):
        packed_from(index, tmp_path / "p")
    packed_from(index, tmp_path / "p")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": 9}', '{"version": 1, "bands": 3}', "\x00"])
def test_a_damaged_manifest_is_refused_in_a_line(index: ChipIndex, tmp_path: Path, content: str) -> None:
    packed_from(index, tmp_path / "p")
    (tmp_path / "p" / "packed.json").write_text(content)
    with pytest.raises(UserError, match=r"packed\.json"):
        packed_index(tmp_path / "p")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"fingerprint": "x"}', "\x00", '{"fingerprint": ', "3"])
def test_a_damaged_journal_is_refused_in_a_line(index: ChipIndex, tmp_path: Path, content: str) -> None:
    packed_from(index, tmp_path / "p")
    (tmp_path / "p" / "packed.json").unlink()
    (tmp_path / "p" / "packing.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"packing\.jsonl cannot be read .*: delete .* and pack anew") as error:
        packed_from(index, tmp_path / "p")
    assert "\n" not in str(error.value)


def test_a_damaged_index_is_refused(index: ChipIndex, tmp_path: Path) -> None:
    packed_from(index, tmp_path / "p")
    other = build_index([Path(index.table["scene"][0].as_py())], bands=BANDS, chip_size=16, progress=False)
    other.save(tmp_path / "p" / "index.parquet")
    with pytest.raises(UserError, match=r"index\.parquet is missing or damaged"):
        packed_index(tmp_path / "p")


def test_real_imagery_is_packed_as_it_is(shared_data: Path, tmp_path: Path) -> None:
    bands = ["B08", "B02", "B11"]
    folders = [shared_data / name for name in ("scenes", "bigearthnet", "jp2_multires")]
    real = build_index(folders, bands=bands, chip_size=120, allow_mixed=True, min_valid=0.7, progress=False)
    packed_from(real, tmp_path / "p", shard_bytes=2_000_000)
    assert_same_chips(PackedChips(packed_index(tmp_path / "p"), tmp_path / "p"), ChipDataset(real))
