"""The index holds the right chips and statistics, says what it leaves out, and is rebuilt only when it must be."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st

from ssl_geo.errors import UserError
from ssl_geo.imagery import chips as chips_module
from ssl_geo.imagery import columns, scan
from ssl_geo.imagery.archives import find_scenes
from ssl_geo.imagery.chips import ChipIndex, build_index, cached_index
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.scan import chip_starts
from ssl_geo.imagery.sensors import DEFAULT_BANDS, LIKELY_ORDERS

WriteStack = Callable[..., np.ndarray]
WriteFolder = Callable[..., dict[str, np.ndarray]]
RGB = ("B02", "B03", "B04")


def build(*paths: Path, **settings: Any) -> ChipIndex:
    return build_index(paths, **{"bands": RGB, "chip_size": 16, "progress": False, **settings})


def left_out(index: ChipIndex) -> list[tuple[str, int]]:
    return [(record.unit, record.count) for record in index.left_out]


@given(st.integers(1, 400), st.integers(1, 80))
def test_chips_cover_every_pixel_and_stay_inside(length: int, chip_size: int) -> None:
    starts = chip_starts(length, chip_size)
    if length < chip_size:
        assert len(starts) == 0
        return
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start <= length - chip_size
        covered[start : start + chip_size] += 1
    assert covered.min() == 1
    assert len(starts) == -(-length // chip_size)  # as few as can be
    assert covered.max() <= 2


@pytest.mark.parametrize(
    ("grids", "gsd"),
    [
        ([("EPSG:32632", 20.0), ("EPSG:32633", 20.0)], 20.0),
        ([("EPSG:32632", 10.0), ("EPSG:32632", 20.0)], None),
        ([("EPSG:4326", 1e-4)], None),
        ([("EPSG:2263", 30.0)], None),  # in feet
        ([(None, 10.0)], None),
    ],
)
def test_metres_a_pixel_are_those_of_the_grids(
    tmp_path: Path, grids: list[tuple[str | None, float]], gsd: float | None
):
    """They were 10 whatever the grid was, and so said backbone.json."""
    for number, (crs, step) in enumerate(grids):
        transform = None if crs is None else (step, 0.0, 30.0, 0.0, -step, 40.0)
        dn = np.random.default_rng(number).integers(1, 4000, (3, 32, 32), dtype=np.uint16)
        name = f"S2A_MSIL2A_2018061{number}T103021_N0208_R108_T32UPU.tif"
        write_geotiff(tmp_path / name, dn, crs=crs, transform=transform, descriptions=list(RGB))
    assert build(tmp_path).gsd == gsd


def test_index_of_one_scene_against_a_slow_reference(
    tmp_path: Path, write_stack: WriteStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chips, bounds, valid fractions and statistics, by loops over the whole array; also in several blocks."""
    array = np.random.default_rng(0).integers(1, 10_000, (3, 40, 53)).astype(np.uint16)
    array[:, :9, :9] = 0  # a chip too few
    array[:, 30:33, 20:24] = 0  # holes in chips that are kept
    write_stack(tmp_path / "S2A_MSIL2A_20230101T101031_N0509_x.tif", array=array)
    expected = {}
    counted = np.zeros((40, 53), bool)
    for row in (0, 16, 24):
        for col in (0, 16, 32, 37):
            valid = array[:, row : row + 16, col : col + 16].any(axis=0)
            if valid.mean() >= 0.8:
                expected[row, col] = valid.mean()
                counted[row : row + 16, col : col + 16] = True
            else:
                assert (row, col) == (0, 0)
    counted &= array.any(axis=0)
    reflectance = (array[:, counted].astype(float) - 1000) / 10_000
    for block in (1024, 32, 16):
        monkeypatch.setattr(scan, "BLOCK_PIXELS", block)
        index = build(tmp_path, min_valid=0.8)
        table = index.table.to_pydict()
        got = dict(zip(zip(table["row"], table["col"], strict=True), table["valid_fraction"], strict=True))
        assert got == pytest.approx(expected)
        assert index.statistics.count == counted.sum()  # each pixel once, overlaps included
        np.testing.assert_allclose(index.statistics.mean, reflectance.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(index.statistics.std, reflectance.std(axis=1), rtol=1e-12)
        assert left_out(index) == [("chip", 1)]
        for i in range(len(index)):
            left, top = 400_000 + 10 * table["col"][i], 5_300_000 - 10 * table["row"][i]
            bounds = tuple(table[side][i] for side in ("left", "bottom", "right", "top"))
            assert bounds == (left, top - 160, left + 160, top)
    assert set(table["crs"]) == {"EPSG:32633"}
    assert set(table["level"]) == {"L2A"}
    assert set(table["offset"]) == {-1000.0}
    assert set(table["scale"]) == {1e-4}
    assert set(table["nodata"]) == {None}
    assert set(table["date"]) == {"2023-01-01"}


def test_bounds_on_a_rotated_grid_enclose_the_chip(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif", shape=(16, 16), transform=(6.0, 8.0, 100.0, 8.0, -6.0, 200.0))
    table = build(tmp_path).table.to_pydict()
    assert [table[side][0] for side in ("left", "bottom", "right", "top")] == [100, 104, 324, 328]


def test_number_of_threads_changes_nothing(tmp_path: Path, write_stack: WriteStack) -> None:
    for i in range(12):
        write_stack(tmp_path / f"{i:02d}.tif", shape=(40, 33), seed=i)
    for statistics_chips in (1000, 7):
        one, four = (build(tmp_path, workers=n, statistics_chips=statistics_chips) for n in (1, 4))
        assert one.table.equals(four.table)
        np.testing.assert_array_equal(one.statistics.mean, four.statistics.mean)
        np.testing.assert_array_equal(one.statistics.m2, four.statistics.m2)
        assert one.fingerprint == four.fingerprint


def test_statistics_of_a_large_archive_come_from_a_seeded_subset(tmp_path: Path, write_stack: WriteStack) -> None:
    for i in range(6):
        write_stack(tmp_path / f"{i}.tif", shape=(64, 64), seed=i)
    whole = build(tmp_path)
    first, again, other = (build(tmp_path, statistics_chips=10, seed=seed) for seed in (0, 0, 1))
    assert whole.statistics.count == len(whole) * 16 * 16 == 96 * 256
    assert first.statistics.count == 10 * 256
    np.testing.assert_array_equal(first.statistics.mean, again.statistics.mean)
    assert (first.statistics.mean != other.statistics.mean).all()
    np.testing.assert_allclose(first.statistics.mean, whole.statistics.mean, rtol=0.05)


def test_scenes_that_cannot_be_used_are_counted_and_named(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "good.tif")
    write_stack(tmp_path / "few.tif", ["B02", "B03"])
    write_stack(tmp_path / "small.tif", shape=(15, 400))
    write_stack(tmp_path / "picture.tif", None, count=3, dtype="uint8")
    (tmp_path / "broken.tif").write_text("broken")
    with pytest.raises(UserError, match=r"1 of 5 scenes.*--data.max_unreadable.*broken\.tif"):
        build(tmp_path)
    index = build(tmp_path, max_unreadable=0.2)
    assert left_out(index) == [("scene", 1)] * 4
    lines = "\n".join(str(record) for record in index.left_out)
    for text in ("misses band B04 (few.tif)", "smaller than a chip of 16", "small.tif", "picture.tif", "broken.tif"):
        assert text in lines
    assert set(index.table["scene"].to_pylist()) == {str(tmp_path / "good.tif")}
    assert "from 1 of 5 scenes" in index.report()[0]


def test_the_chip_size_that_would_keep_small_scenes_is_proposed(tmp_path: Path, write_stack: WriteStack) -> None:
    """292 of 400 sites were left out as smaller than a chip of 64, and nothing said how to keep them."""
    write_stack(tmp_path / "large.tif", shape=(64, 64))
    for number, side in enumerate((5, 33, 34, 40, 41, 42, 43, 50, 51, 52, 63)):
        write_stack(tmp_path / f"small-{number}.tif", shape=(side, 70))
    (record,) = build(tmp_path, chip_size=64).left_out
    assert "left out 11 scenes: scene smaller than a chip of 64 pixels; --data.chip_size 32 would keep 10" in str(
        record
    )
    assert not build(tmp_path / "large.tif", chip_size=64).left_out
    assert len(set(build(tmp_path, chip_size=32).table["scene"].to_pylist())) == 11


def test_a_scene_that_fails_while_it_is_read_is_left_out_whole(
    tmp_path: Path, write_stack: WriteStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "BLOCK_PIXELS", 128)
    good = write_stack(tmp_path / "good.tif", shape=(256, 256))
    write_stack(tmp_path / "cut.tif", shape=(256, 256), seed=1)
    data = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) * 9 // 10])
    with pytest.raises(UserError, match=r"1 of 2 scenes cannot be read.*cut\.tif, rows"):
        build(tmp_path)
    index = build(tmp_path, max_unreadable=0.5)
    assert left_out(index) == [("scene", 1)]
    assert set(index.table["scene"].to_pylist()) == {str(tmp_path / "good.tif")}
    assert index.statistics.count == 256 * 256
    np.testing.assert_allclose(index.statistics.mean, good.mean(axis=(1, 2)) / 10_000)


def test_nothing_usable_is_refused_with_what_there_is(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "a" / "x.tif", ["B02", "B11"])
    with pytest.raises(UserError, match="no scene has all the bands B02 B03 B04; the scenes have B02 B11"):
        build(tmp_path / "a")
    write_stack(tmp_path / "b" / "x.tif", shape=(40, 12))
    write_stack(tmp_path / "b" / "y.tif", shape=(9, 90))
    with pytest.raises(UserError, match=r"largest has 40×12.*--data.chip_size to 12 or less"):
        build(tmp_path / "b")
    write_stack(tmp_path / "c" / "x.tif", array=np.zeros((3, 32, 32), np.uint16))
    with pytest.raises(UserError, match=r"none of 4 chips.*--data.min_valid"):
        build(tmp_path / "c")
    write_stack(tmp_path / "d" / "x.tif", None, count=3, dtype="uint8")
    with pytest.raises(UserError, match="picture for display"):
        build(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x.tif").write_text("broken")
    with pytest.raises(UserError, match="cannot open"):
        build(tmp_path / "e", max_unreadable=1)


def test_a_file_named_by_a_detour_counts_once(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "a" / "x.tif")
    (tmp_path / "b").mkdir()
    plain, detour = tmp_path / "a" / "x.tif", tmp_path / "b" / ".." / "a" / "x.tif"
    for paths in ([plain, detour], [detour, plain.parent], [plain.parent, detour.parent]):
        assert find_scenes(paths) == [plain]
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    write_stack(tmp_path / "elsewhere" / "x.tif")
    assert find_scenes([tmp_path / "link" / ".." / "x.tif"]) == [
        tmp_path / "link" / ".." / "x.tif"
    ]  # as the system reads it


def test_settings_that_replace_what_files_state_are_said(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "S2A_MSIL2A_20210101T101031_N0214_x.tif")
    write_stack(tmp_path / "S2A_MSIL2A_20230101T101031_N0509_x.tif", nodata=65535)
    write_stack(tmp_path / "unknown.tif", nodata=0)
    [note] = build(tmp_path, offset=0, nodata=7, level="L1C", scale=1e-4).notes
    assert "replace what 2 of 3 scenes state" in note
    for words in ("level L2A in 2, ", "offset -1000 in 1", "nodata 65535 in 1"):
        assert words in note
    assert "nodata 0" not in note  # zeros go on marking fill
    assert "N0214" in note
    [note] = build(tmp_path, allow_mixed=True, level="L2A", scale=1e-4).notes
    assert "assumed for 1 of 3" in note


def test_mixed_products_and_offsets_are_refused(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "levels" / "x_L1C.tif")
    write_stack(tmp_path / "levels" / "y_L2A.tif")
    write_stack(tmp_path / "levels" / "unknown.tif")
    with pytest.raises(
        UserError, match=r"L1C \(for example .*x_L1C.tif\) and L2A .*y_L2A.tif.*--data.allow_mixed true"
    ) as error:
        build(tmp_path / "levels")
    assert "\n" not in str(error.value)
    index = build(tmp_path / "levels", allow_mixed=True)
    assert any("mixes products L1C and L2A" in note for note in index.notes)
    assert any("assumed for 3 of 3 scenes" in note for note in index.notes)
    write_stack(tmp_path / "offsets" / "S2A_MSIL2A_20210101T101031_N0214_x.tif")
    write_stack(tmp_path / "offsets" / "S2A_MSIL2A_20230101T101031_N0509_x.tif")
    write_stack(tmp_path / "offsets" / "unknown.tif")
    with pytest.raises(UserError, match=r"offsets: -1000 .*N0509.* and 0 .*N0214.*--data.allow_mixed"):
        build(tmp_path / "offsets")
    index = build(tmp_path / "offsets", allow_mixed=True)
    assert set(index.table["offset"].to_pylist()) == {-1000.0, 0.0}
    assert len(build(tmp_path / "offsets", offset=-1000)) == 3 * 6  # a setting settles it


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bands": ["B99"]}, "--data.bands holds B99"),
        ({"bands": []}, "--data.bands"),
        ({"bands": ["B02", "b2"]}, "each once"),
        ({"chip_size": 0}, "--data.chip_size 0"),
        ({"min_valid": 1.5}, "--data.min_valid 1.5"),
        ({"max_unreadable": -1}, "--data.max_unreadable -1"),
        ({"statistics_chips": 0}, "--data.statistics_chips 0"),
        ({"level": "L2"}, "--data.level L2"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, write_stack: WriteStack, settings: dict[str, Any], says: str) -> None:
    write_stack(tmp_path / "x.tif")
    with pytest.raises(UserError, match=says):
        build(tmp_path, **settings)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_loaded_index_lies_in_mapped_files(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "d" / "x.tif", shape=(64, 64))
    index = build(tmp_path / "d")
    table = pa.concat_tables([index.table] * 5000).unify_dictionaries().combine_chunks()
    dataclasses.replace(index, table=table).save(tmp_path / "index.parquet")
    loaded = ChipIndex.load(tmp_path / "index.parquet")
    # What the allocator counts is no measure: threads of others allocate and free meanwhile.
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith("/column (deleted)")]
    mapped = [range(int(start, 16), int(end, 16)) for start, end in spans]
    chunks = [column.chunk(0) for column in loaded.table.columns]
    arrays = chunks + [chunk.dictionary for chunk in chunks if pa.types.is_dictionary(chunk.type)]
    addresses = [buffer.address for array in arrays for buffer in array.buffers() if buffer and buffer.size]
    assert len(addresses) >= len(chunks)
    assert all(any(address in span for span in mapped) for address in addresses)
    assert loaded.table.equals(table)
    assert all(column.num_chunks == 1 for column in loaded.table.columns)


def test_a_full_folder_for_scratch_files_is_not_a_damaged_index(
    tmp_path: Path, write_stack: WriteStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told as "index.parquet cannot be read ... start anew", which could cost somebody a run."""
    write_stack(tmp_path / "a.tif", RGB)
    build(tmp_path / "a.tif").save(tmp_path / "index.parquet")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    monkeypatch.setattr(columns.pa.ipc, "new_file", full)
    with pytest.raises(UserError, match=r"No space left on device.* set TMPDIR") as error:
        ChipIndex.load(tmp_path / "index.parquet", mend="start anew")
    assert "start anew" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere .* set TMPDIR"):
        ChipIndex.load(tmp_path / "index.parquet")


def test_save_and_load_keep_everything(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "d" / "x.tif")
    write_stack(tmp_path / "d" / "y.tif", ["B02"])
    index = build(tmp_path / "d", band_names=RGB)
    index.save(tmp_path / "index.parquet")
    loaded = ChipIndex.load(tmp_path / "index.parquet")
    assert loaded.table.equals(index.table)
    assert loaded.table.schema == index.table.schema
    for name in ("settings", "scene_count", "left_out", "notes", "fingerprint", "bands", "chip_size"):
        assert getattr(loaded, name) == getattr(index, name)
    np.testing.assert_array_equal(loaded.statistics.mean, index.statistics.mean)
    np.testing.assert_array_equal(loaded.statistics.std, index.statistics.std)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "index.parquet"]
    assert str(pq.read_schema(tmp_path / "index.parquet").field("scene").type).startswith("dictionary")


def test_loading_what_is_no_index_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as a chip index"):
        ChipIndex.load(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"missing.parquet cannot be read"):
        ChipIndex.load(tmp_path / "missing.parquet")


def test_cache_is_used_until_files_settings_or_format_change(
    tmp_path: Path, write_stack: WriteStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    real = chips_module._build

    def counting(*args: Any, **kwargs: Any) -> ChipIndex:
        builds.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(chips_module, "_build", counting)
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_stack(data / "a.tif")

    def cached(**settings: Any) -> ChipIndex:
        return cached_index(cache, [data], **{"bands": RGB, "chip_size": 16, "progress": False, **settings})

    def built() -> int:
        count = len(builds)
        builds.clear()
        return count

    first = cached()
    assert built() == 1
    assert cached(workers=2).table.equals(first.table)
    assert built() == 0
    assert len(cached(chip_size=32)) == 2  # other settings
    assert built() == 1
    write_stack(data / "b.tif")  # one more file
    assert len(cached()) == 2 * len(first)
    assert built() == 1
    os.utime(data / "b.tif", (1, 1))  # touched
    cached()
    assert built() == 1
    (data / "b.tif").unlink()
    assert len(cached()) == len(first)
    assert built() == 1
    for content in ("<PAMDataset/>", "<PAMDataset></PAMDataset>"):  # a side file came, and changed
        (data / "a.tif.aux.xml").write_text(content)
        cached()
        assert built() == 1
        cached()
        assert built() == 0
    (data / "MTD_MSIL2A.xml").write_text("<P><BOA_ADD_OFFSET>-1000</BOA_ADD_OFFSET></P>")  # metadata came
    assert set(cached().table["offset"].to_pylist()) == {-1000.0}
    assert built() == 1
    monkeypatch.setattr(chips_module, "FORMAT_VERSION", 3)
    assert any("format 2" in note for note in cached().notes)
    assert built() == 1
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])  # damaged
    told = cached().notes[-1]
    assert told.startswith("rebuilt the chip index: ")
    assert told.endswith(": nothing needs doing")
    assert built() == 1
    assert not any(note.startswith("rebuilt") for note in cached().notes)
    assert built() == 0
    assert all(file.suffix == ".parquet" for file in cache.iterdir())


# The shared imagery --------------------------------------------------------------------------------------------------


def real(shared_data: Path, *folders: str, **settings: Any) -> ChipIndex:
    paths = [shared_data / folder for folder in folders]
    return build_index(paths, **{"bands": DEFAULT_BANDS, "chip_size": 64, "progress": False, **settings})


def test_real_archives_together_leave_out_the_scene_without_two_bands(shared_data: Path) -> None:
    index = real(shared_data, "scenes", "bigearthnet", "chips_seasonal")
    assert len(index) >= 350
    (record,) = (record for record in index.left_out if record.unit == "scene")
    assert (record.reason, record.count) == ("scene misses bands B8A, B12", 1)
    assert [Path(scene).name for scene in record.scenes] == ["australia_20190105_L2A.tif"]
    assert (index.statistics.mean > 0.05).all()
    assert (index.statistics.mean < 0.4).all()
    shared_by_all = [band for band in DEFAULT_BANDS if band not in ("B8A", "B12")]
    wider = real(shared_data, "scenes", "bigearthnet", "chips_seasonal", bands=shared_by_all)
    assert any("australia_20190105" in scene for scene in wider.table["scene"].unique().to_pylist())
    assert not any(record.unit == "scene" for record in wider.left_out)


def test_real_l1c_product_alone_and_refused_beside_l2a(shared_data: Path) -> None:
    index = real(shared_data, "jp2_multires")
    assert len(index) == 12 * 24
    assert set(index.table["level"].to_pylist()) == {"L1C"}
    with pytest.raises(UserError, match=r"L1C.*L2A.*--data.allow_mixed true") as error:
        real(shared_data, "scenes", "bigearthnet", "jp2_multires")
    assert "\n" not in str(error.value)


def test_real_unnamed_chips_need_band_names(shared_data: Path) -> None:
    with pytest.raises(UserError, match=r"--data.band_names is required, likely B01 B02"):
        real(shared_data, "chips_coastal")
    index = real(shared_data, "chips_coastal", band_names=LIKELY_ORDERS[12])
    assert len(index) > 300  # of 308: single dark zeros over the sea do not count as fill
    with pytest.raises(UserError, match="no scene is as large"):
        real(shared_data, "chips_coastal", band_names=LIKELY_ORDERS[12], chip_size=256)


def test_real_statistics_are_those_of_the_pixels(shared_data: Path, tmp_path: Path) -> None:
    """BigEarthNet's six patches against one mean over all pixels (all are valid, none of them twice)."""
    index = real(shared_data, "bigearthnet", bands=("B04", "B11"), chip_size=64)
    pixels = []
    for band, ratio in (("B04", 1), ("B11", 2)):
        arrays = []
        for file in sorted((shared_data / "bigearthnet").rglob(f"*_{band}.tif")):
            with rasterio.open(file) as dataset:
                arrays.append(np.kron(dataset.read(1), np.ones((ratio, ratio))))
        pixels.append(np.stack(arrays) / 10_000)
    assert index.statistics.count == 6 * 120 * 120
    np.testing.assert_allclose(index.statistics.mean, [p.mean() for p in pixels])
    np.testing.assert_allclose(index.statistics.std, [p.std() for p in pixels])


def test_int16_extremes_do_not_wrap(tmp_path: Path) -> None:
    """A uint8 conversion without a clip wraps bright DN round; statistics and DN here must not."""
    array = np.full((3, 16, 16), 32_767, np.int16)
    path = tmp_path / "x.tif"
    write_geotiff(path, array, crs="EPSG:32633", transform=(10, 0, 0, 0, -10, 0), descriptions=RGB)
    np.testing.assert_allclose(build(path, offset=-1000).statistics.mean, 3.1767)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif", RGB)
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cache/chips-.* cannot be written \(File exists\); name another --data.cache"):
        cached_index(tmp_path / "cache", [tmp_path / "x.tif"], bands=RGB, chip_size=16, progress=False)


def test_reflectance_of_floats_is_not_told_of_offsets(tmp_path: Path, write_stack: WriteStack) -> None:
    write_stack(tmp_path / "x.tif", RGB, array=np.full((3, 32, 32), 0.1, np.float32))
    index = build_index([tmp_path / "x.tif"], bands=RGB, chip_size=16, scale=1.0, progress=False)
    assert not any("offset" in note for note in index.notes)


def test_pixels_that_nothing_measures_spoil_no_statistics_and_are_counted(
    tmp_path: Path, write_stack: WriteStack
) -> None:
    """One at 1e30 was the mean of its band."""
    dn = np.random.default_rng(0).uniform(0.05, 0.3, (3, 40, 40)).astype(np.float32)
    write_stack(tmp_path / "clean" / "a.tif", RGB, array=dn)
    clean = build(tmp_path / "clean", scale=1)
    dn[0, 30:33, 30:33] = 1e30  # in the part that the last chips share with those before
    write_stack(tmp_path / "spoilt" / "a.tif", RGB, array=dn)
    spoilt = build(tmp_path / "spoilt", scale=1)
    assert left_out(clean) == []
    assert left_out(spoilt) == [("pixel", 9)]
    assert "9 pixels" in " ".join(spoilt.report())
    np.testing.assert_allclose(spoilt.statistics.mean, clean.statistics.mean, rtol=0.01)
    assert spoilt.statistics.count == clean.statistics.count - 9
    assert ChipIndex.load(_saved(spoilt, tmp_path), mend="").left_out == spoilt.left_out


def _saved(index: ChipIndex, folder: Path) -> Path:
    index.save(folder / "index.parquet")
    return folder / "index.parquet"
