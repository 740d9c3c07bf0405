"""Other dates of a chip, against every pair of chips compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_geo.imagery.chips import ChipIndex, build_index
from ssl_geo.imagery.packed import packed_index
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.seasons import OtherDates

SIZE = 4
TWELVE = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
UTM, DEGREES = "EPSG:32633", "EPSG:4326"


@pytest.fixture(scope="session")
def empty(tmp_path_factory, write_stack) -> ChipIndex:
    """An index whose table the tests replace."""
    folder = tmp_path_factory.mktemp("one")
    write_stack(folder / "a.tif")
    return build_index([folder], bands=["B02"], chip_size=SIZE, progress=False)


def with_rows(index: ChipIndex, rows: list[dict]) -> ChipIndex:
    """An index of chips with given scene, date, crs, left, top, and pixel in x and y."""
    once = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("scene", "date", "crs")}
    left, top = (np.array([row[side] for row in rows], np.float64) for side in ("left", "top"))
    x, y = (np.array([row["pixel"][axis] for row in rows]) for axis in (0, 1))
    sides = {"left": left, "bottom": top - y * SIZE, "right": left + x * SIZE, "top": top}
    windows = {name: np.array([row.get(name, 0) for row in rows], np.int32) for name in ("row", "col")}
    encoded = {name: column.dictionary_encode() for name, column in once.items()}
    return replace(index, table=pa.table({**encoded, **sides, **windows}))


def row(scene="a", date="2020-01-01", crs=UTM, left=5e5, top=5e6, pixel=(10.0, 10.0)):
    return {"scene": scene, "date": date, "crs": crs, "left": left, "top": top, "pixel": pixel}


def every_pair(index: ChipIndex) -> list[list[int]]:
    """The definition: link all chips of one place pair by pair, follow the links, compare dates."""
    chips, n = index.table.to_pylist(), len(index)

    def near(one: dict, other: dict) -> bool:
        if one["crs"] is None or one["crs"] != other["crs"]:
            return False
        for low, high in (("left", "right"), ("bottom", "top")):
            pixel = min(one[high] - one[low], other[high] - other[low]) / SIZE
            if max(abs(one[low] - other[low]), abs(one[high] - other[high])) >= pixel / 2:
                return False
        return True

    def another(one: dict, other: dict) -> bool:
        if one["date"] is None or other["date"] is None:
            return one["scene"] != other["scene"]
        return one["date"] != other["date"]

    place = list(range(n))
    for i in range(n):
        for j in range(i):
            if near(chips[i], chips[j]):
                place = [place[j] if p == place[i] else p for p in place]
    return [[j for j in range(n) if place[j] == place[i] and another(chips[i], chips[j])] for i in range(n)]


def others(index: ChipIndex) -> list[list[int]]:
    dates = OtherDates(index)
    found = [dates[i].tolist() for i in range(len(index))]
    assert dates.count == sum(map(bool, found))
    undated = sum(bool(f) and d is None for f, d in zip(found, index.table["date"].to_pylist(), strict=True))
    told = f"; {undated:,} of unknown date, taken for one of their own" if undated else ""
    assert dates.report() == f"season: {dates.count:,} of {len(index):,} chips have another date{told}"
    return found


# Thirds of a pixel apart, and by the noise of a last digit: links, chains, pixels of other sizes. Never half a pixel
# to the last digit.
NEAR = st.integers(-4, 4).map(lambda third: third / 3) | st.sampled_from([1e-9, -1e-9, 0.4999, 0.5001])
SCENES = {"a": "2020-01-01", "b": "2020-01-01", "c": "2019-06-01", "d": "2021-01-01", "e": None, "f": None}


@st.composite
def drawn_rows(draw: st.DrawFn) -> dict:
    scene, crs = draw(st.sampled_from(sorted(SCENES))), draw(st.sampled_from([UTM, UTM, UTM, DEGREES, None]))
    pixel = draw(st.sampled_from([(10.0, 10.0)] * 3 + [(11.0, 10.0), (10.0, 9.0), (21.0, 21.0)]))
    left, top = (origin + 10 * draw(NEAR) for origin in ((9, 47) if crs == DEGREES else (5e5, 5e6)))
    return row(scene, SCENES[scene], crs, left, top, pixel)


ROWS = st.lists(drawn_rows(), min_size=1, max_size=14)


@given(rows=ROWS)
def test_other_dates_are_those_that_comparing_every_pair_finds(empty, rows):
    index = with_rows(empty, rows)
    assert others(index) == every_pair(index)


def test_many_places_are_those_of_every_pair(empty):
    rng = np.random.default_rng(0)
    rows = [
        row(f"s{s}", f"2020-01-{s % 9 + 1:02d}", left=5e5 + 10 * x + rng.normal(0, 1), top=5e6 + 10 * y)
        for s, x, y in rng.integers(0, (12, 6, 6), (150, 3)).tolist()
    ]
    index = with_rows(empty, rows)
    expected = every_pair(index)
    assert others(index) == expected
    assert len({len(e) for e in expected}) > 5


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([row("a"), row("b")], [[], []]),  # two products of one date
        ([row("a"), row("a2"), row("b", "2020-06-01")], [[2], [2], [0, 1]]),
        ([row("a", None), row("b", None)], [[1], [0]]),
        ([row("a", None), row("b", "2020-06-01")], [[1], [0]]),
        ([row("a", None), row("a", None, left=5e5 + 4)], [[], []]),  # one scene
        ([row("a", crs=None), row("b", "2020-06-01", crs=None)], [[], []]),
        ([row("a"), row("b", "2020-06-01", left=5e5 + 4.99, top=5e6 - 4.99)], [[1], [0]]),
        ([row("a"), row("b", "2020-06-01", left=5e5 + 5)], [[], []]),  # half a pixel is not less than half a pixel
        ([row("a"), row("b", "2020-06-01", pixel=(10.0, 11.3))], [[], []]),
        ([row("a"), row("b", "2020-06-01", crs="EPSG:32634")], [[], []]),
        ([row("a", pixel=(0.0, 0.0)), row("b", "2020-06-01", pixel=(0.0, 0.0))], [[], []]),
        # A CRS beside a transform that is the identity: the box is the window.
        ([row("a", left=0, top=4, pixel=(1.0, 1.0)), row("b", None, left=0, top=4, pixel=(1.0, 1.0))], [[], []]),
    ],
)
def test_what_counts_as_another_date(empty, rows, found):
    assert others(with_rows(empty, rows)) == found


def test_the_reason_why_no_chip_has_another_date(empty):
    def why(*rows: dict) -> str:
        dates = OtherDates(with_rows(empty, list(rows)))
        assert dates.count == 0
        return dates.why_none()

    assert "none has georeferencing" in why(row("a", crs=None), row("b", crs=None))
    assert "no two scenes" in why(row("a"), row("a", left=6e5))
    assert "are of one date" in why(row("a"), row("b"))


def test_a_chip_takes_a_few_bytes(empty):
    n = 4000
    rows = [row(f"s{k % 4}", f"2020-01-0{k % 4 + 1}", left=5e5 + 640 * (k // 4)) for k in range(n)]
    held = [value for value in vars(OtherDates(with_rows(empty, rows))).values() if not isinstance(value, int)]
    assert sum(value.nbytes for value in held) < 16 * n


def test_read_again_and_packed_an_index_has_the_same_other_dates(tmp_path, write_stack):
    for k, day in enumerate(("2021-05-01", "2019-05-01", "2020-05-01", "2020-05-01")):
        write_stack(tmp_path / "images" / f"{'bacd'[k]}_{day}.tif", seed=k)
    index = build_index([tmp_path / "images"], bands=["B03", "B02"], chip_size=16, progress=False)
    index.save(tmp_path / "index.parquet")
    pack(index, tmp_path / "packed", workers=1, progress=False)
    built = others(index)
    assert others(ChipIndex.load(tmp_path / "index.parquet")) == built == every_pair(index)
    assert others(packed_index(tmp_path / "packed")) == built
    assert {len(b) for b in built} == {2, 3}


@pytest.fixture(scope="session")
def water(shared_data) -> Path:
    return shared_data / "water" / "images"


def test_every_chip_of_ten_real_dates_has_nine_others(water):
    index = build_index(
        sorted(water.glob("Boadella_*.tif")), bands=["B04"], band_names=TWELVE, chip_size=64, progress=False
    )
    found = others(index)
    assert len(index) == 10 * 6 * 6  # 377×380 pixels
    assert {len(f) for f in found} == {9}
    chips = index.table.to_pylist()
    for i, f in enumerate(found):
        assert {(chips[j]["row"], chips[j]["col"]) for j in f} == {(chips[i]["row"], chips[i]["col"])}
        assert len({chips[j]["date"] for j in [i, *f]}) == 10


def test_an_undated_real_image_on_the_grid_of_ten_is_another_date_of_each(water):
    """Its transform differs from theirs in the last digits of its origin."""
    index = build_index([water], bands=["B04"], band_names=TWELVE, chip_size=64, progress=False)
    assert {len(f) for f in others(index)} == {10}
    told = "season: 396 of 396 chips have another date; 36 of unknown date, taken for one of their own"
    assert OtherDates(index).report() == told


def test_real_places_of_a_season_keep_to_themselves(shared_data):
    """55 and 33 dates of two places, a chip each."""
    index = build_index([shared_data / "chips_seasonal"], bands=["B04"], chip_size=64, progress=False)
    assert sorted(len(f) for f in others(index)) == [32] * 33 + [54] * 55
