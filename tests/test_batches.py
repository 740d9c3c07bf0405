"""Batches of views with two dates of a place, on scenes of four dates, units and types."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from scipy import ndimage

from ssl_geo.batches import ChipBatches, Season, ViewBatches
from ssl_geo.imagery.chips import ChipIndex, build_index
from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.packed import open_chips, packed_index
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.seasons import OtherDates
from ssl_geo.views import multicrop
from ssl_geo.views.batched import BatchedMultiCrop
from ssl_geo.views.multicrop import MultiCrop, default_recipes

SIDE, SEED = 32, 5
KEYS = [(0, 0), (3, 5), (1, 2), (0, 4), (2, 1)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A place at four dates, each with holes of its own, and a place at one."""
    folder = tmp_path_factory.mktemp("archive")
    for k, (name, left, dtype) in enumerate(
        [("a_20200101", 0, "uint16"), ("a_20200401", 0, "uint16"), ("a_20200701", 0, "int16"),
         ("a_20201001", 0, "uint16"), ("b_20200101", 9000, "uint16")]
    ):  # fmt: skip
        rng = np.random.default_rng(k)
        smooth = ndimage.gaussian_filter(rng.normal(size=(3, SIDE, 2 * SIDE)), (0, 2, 2))
        dn = (2000 + 300 * k + 8000 * smooth).clip(1, 20_000).astype(dtype)
        dn[:, 5 * k : 5 * k + 4, 3 * k :: 40] = 0
        write_geotiff(
            folder / f"{name}.tif",
            dn,
            crs="EPSG:32632",
            transform=(10.0, 0.0, 6e5 + left, 0.0, -10.0, 5.4e6),
            nodata=0,
            descriptions=["B02", "B03", "B04"],
        )
        with rasterio.open(folder / f"{name}.tif", "r+") as file:
            file.scales, file.offsets = [1e-4] * 3, [-1e-2 * k] * 3
    return folder


@pytest.fixture(scope="module")
def index(archive) -> ChipIndex:
    bands = ["B02", "B03", "B04"]
    return build_index([archive], bands=bands, chip_size=SIDE, min_valid=0.5, allow_mixed=True, progress=False)


@pytest.fixture(scope="module")
def crops(index) -> MultiCrop:
    global_views, local_views = default_recipes(SIDE, 8, local_count=5)
    statistics = index.statistics
    return MultiCrop(statistics.mean, statistics.std, global_views=global_views, local_views=local_views)


def season(index: ChipIndex, probability: float) -> Season:
    return Season(OtherDates(index), probability)


def expected(chips: ChipDataset, crops: MultiCrop, drawn: Season, keys: list[tuple[int, int]]) -> list[np.ndarray]:
    """All views of the chip and all of its other date, and of the two every second: (B, C, h, w) a view."""
    batch = []
    for epoch, number in keys:
        other = drawn.draw(seed=SEED, epoch=epoch, chip=number)
        own, second = (
            crops(c.dn, c.valid, c.scale, c.offset, seed=SEED, epoch=epoch, chip=number)
            for c in (chips[number], chips[number if other is None else other])
        )
        batch.append([own[0], second[1], own[2], second[3], own[4], second[5], own[6]])
    return [np.stack(views) for views in zip(*batch, strict=True)]


def test_the_archive_is_what_it_should_be(index):
    assert len(index) == 10
    assert sorted(len(OtherDates(index)[i]) for i in range(10)) == [0] * 2 + [3] * 8
    chips = ChipDataset(index)
    assert len({chips[i].offset for i in range(10)}) == 5
    assert not any(chips[i].valid.all() for i in range(10))


def test_a_draw_is_a_function_of_seed_epoch_and_chip_and_happens_as_often_as_told(index):
    often, seldom, never = (season(index, probability) for probability in (1.0, 0.3, 0.0))
    again = season(index, 1.0)
    keys = [{"seed": s, "epoch": e, "chip": 3} for s in range(20) for e in range(100)]
    drawn = [often.draw(**key) for key in keys]
    assert [again.draw(**key) for key in reversed(keys)] == drawn[::-1]
    counts = np.unique(drawn, return_counts=True)
    assert counts[0].tolist() == often.dates[3].tolist()
    np.testing.assert_allclose(counts[1] / len(keys), 1 / 3, atol=0.04)  # four standard deviations
    some = [seldom.draw(**key) for key in keys]
    assert np.mean([other is not None for other in some]) == pytest.approx(0.3, abs=0.041)
    assert all(other in (None, d) for other, d in zip(some, drawn, strict=True))
    assert {never.draw(**key) for key in keys} == {None}
    lonely = next(i for i in range(10) if not len(often.dates[i]))
    assert often.draw(seed=0, epoch=0, chip=lonely) is None


def test_its_generator_is_none_of_the_views(index):
    """Other dates are drawn independently of how the views are cropped."""
    always = season(index, 1.0)
    which = [list(always.dates[0]).index(always.draw(seed=0, epoch=e, chip=0)) for e in range(2000)]
    first = [np.random.default_rng((0, e, 0)).random(2) for e in range(2000)]
    assert abs(np.corrcoef(which, np.array(first).T)[0, 1:]).max() < 4 / np.sqrt(2000)


@pytest.mark.parametrize("probability", [None, 0.0])
def test_without_it_every_view_is_that_of_its_own_chip_bit_for_bit(index, crops, probability):
    chips = ChipDataset(index)
    none = None if probability is None else season(index, probability)
    batch = ViewBatches(chips, crops, SEED, none)[KEYS]
    for views, reference in zip(batch, expected(chips, crops, season(index, 0.0), KEYS), strict=True):
        np.testing.assert_array_equal(views.numpy(), reference)
    batched = ChipBatches(chips, crops, SEED, none)[KEYS]
    assert batched.second is None
    assert len(batched.dn) == len(KEYS)


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_every_second_view_is_what_the_other_chip_gives_with_the_same_draw(index, crops, probability):
    chips, drawn = ChipDataset(index), season(index, probability)
    batch = ViewBatches(chips, crops, SEED, drawn)[KEYS]
    alone = ViewBatches(chips, crops, SEED)[KEYS]
    reference = expected(chips, crops, drawn, KEYS)
    for i, views in enumerate(batch):
        np.testing.assert_array_equal(views.numpy(), reference[i])
        is_changed = [bool((views[n] != alone[i][n]).any()) for n in range(len(KEYS))]
        others = [drawn.draw(seed=SEED, epoch=epoch, chip=chip) is not None for epoch, chip in KEYS]
        assert is_changed == (others if i % 2 else [False] * len(KEYS))
    assert any(others)


def test_the_second_of_each_kind_changes_whatever_the_number_of_global_views(crops):
    recipe = crops.recipes[0]
    three = MultiCrop(crops.mean, crops.std, global_views=[recipe] * 3, local_views=[recipe] * 4)
    assert three.seconds == (False, True, False, False, True, False, True)


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_views_made_on_the_device_are_those_of_the_loader(index, crops, probability):
    chips, drawn = ChipDataset(index), season(index, probability)
    batch = ChipBatches(chips, crops, SEED, drawn)[KEYS]
    on_device = BatchedMultiCrop(crops, "cpu")(batch)
    loaded = ViewBatches(chips, crops, SEED, drawn)[KEYS]
    # OpenCV rounds source coordinates to 1/32 pixel: 1/64 in x and in y, of the steepest slope (tests/views).
    pixels = [
        np.where(c.valid, (c.reflectance() - crops.mean[:, None, None]) / crops.std[:, None, None], 0)
        for c in (chips[i] for i in range(len(chips)))
    ]
    slope = sum(float(np.abs(np.diff(pixels, axis=axis)).max()) for axis in (2, 3))
    for views, other in zip(on_device, loaded, strict=True):
        # Where the nearest pixel's validity is a matter of rounding one of them is 0.
        agreed = (views != 0).any(1, keepdim=True) == (other != 0).any(1, keepdim=True)
        assert agreed.float().mean() > 0.97
        difference = (views - other).abs() * agreed
        assert difference.max() < (1 / 64 + 1 / 512) * slope + 2e-3
        assert difference.mean() < 0.01


def test_the_device_makes_of_both_chips_what_it_makes_of_each_alone(index, crops):
    chips, drawn = ChipDataset(index), season(index, 0.5)
    device = BatchedMultiCrop(crops, "cpu")
    batch = ChipBatches(chips, crops, SEED, drawn)[KEYS]
    assert len(KEYS) < len(batch.dn) < 2 * len(KEYS)  # who has no other stands there once
    own = device(ChipBatches(chips, crops, SEED)[KEYS])
    others = [drawn.draw(seed=SEED, epoch=epoch, chip=chip) for epoch, chip in KEYS]
    shown = [chips[k if o is None else o] for o, (_, k) in zip(others, KEYS, strict=True)]
    replaced = batch._replace(
        dn=torch.from_numpy(np.stack([c.dn for c in shown]).astype(np.float32)),
        valid=torch.from_numpy(np.stack([c.valid for c in shown])),
        scale=torch.tensor([c.scale for c in shown]),
        offset=torch.tensor([c.offset for c in shown]),
        second=None,
    )
    second = device(replaced)
    for i, views in enumerate(device(batch)):
        torch.testing.assert_close(views, (second if i % 2 else own)[i], rtol=0, atol=1e-5)


def test_no_chip_is_read_and_no_view_is_made_twice(index, crops, monkeypatch):
    read, warped = [], []

    class Counted(ChipDataset):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    warp = multicrop.warp
    monkeypatch.setattr(multicrop, "warp", lambda *a, **k: warped.append(1) or warp(*a, **k))
    drawn = season(index, 1.0)
    wanted = [k for _, k in KEYS]
    others = [drawn.draw(seed=SEED, epoch=epoch, chip=chip) for epoch, chip in KEYS]
    ViewBatches(Counted(index), crops, SEED, drawn)[KEYS]
    assert len(warped) == len(KEYS) * len(crops.recipes)
    assert sorted(read) == sorted([*wanted, *(o for o in others if o is not None)])
    read.clear()
    ChipBatches(Counted(index), crops, SEED, drawn)[KEYS]
    assert sorted(read) == sorted([*wanted, *(o for o in others if o is not None)])


def test_packed_chips_give_the_same_batches(index, crops, tmp_path, archive):
    uniform = build_index(
        [*archive.glob("a_20200[14]*.tif"), *archive.glob("a_202010*.tif")],
        bands=["B04", "B02", "B03"],
        chip_size=SIDE,
        min_valid=0.5,
        allow_mixed=True,
        progress=False,
    )
    pack(uniform, tmp_path / "packed", progress=False)
    packed = packed_index(tmp_path / "packed")
    keys = [(0, i) for i in range(len(uniform))]
    from_scenes = ViewBatches(ChipDataset(uniform), crops, SEED, season(uniform, 1.0))[keys]
    from_packed = ViewBatches(open_chips(packed, [tmp_path / "packed"]), crops, SEED, season(packed, 1.0))[keys]
    assert len(keys) == 6
    assert all(torch.equal(one, other) for one, other in zip(from_scenes, from_packed, strict=True))


def test_real_dates_of_a_place_are_its_views(shared_data, crops):
    """The water of ten dates: every second view of a chip is the reservoir at another of them."""
    twelve = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    files = sorted((shared_data / "water" / "images").glob("Boadella_*.tif"))
    index = build_index(files, bands=["B02", "B03", "B04"], band_names=twelve, chip_size=SIDE, progress=False)
    chips, drawn = ChipDataset(index), season(index, 1.0)
    keys = [(epoch, chip) for epoch in range(2) for chip in range(0, len(index), 97)]
    batch = ViewBatches(chips, crops, SEED, drawn)[keys]
    for views, reference in zip(batch, expected(chips, crops, drawn, keys), strict=True):
        np.testing.assert_array_equal(views.numpy(), reference)
    dates = index.table["date"].to_pylist()
    assert all(dates[drawn.draw(seed=SEED, epoch=e, chip=k)] != dates[k] for e, k in keys)
