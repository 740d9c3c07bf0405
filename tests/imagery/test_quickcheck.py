import numpy as np
import pytest

from ssl_geo.errors import UserError
from ssl_geo.imagery.chips import build_index
from ssl_geo.imagery.labelled import LabelledChips, pair_labels
from ssl_geo.imagery.quickcheck import check_index, check_labelled

L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
BANDS = ("B02", "B03", "B04", "B08", "B11")


@pytest.fixture
def archive(land, write_stack, tmp_path):
    """Write `count` scenes; `change` edits the DN of the first `changed`."""

    def write(change=None, changed=0, count=4):
        for k in range(count):
            dn = land(k, (128, 128))
            dn = change(dn) if k < changed else dn
            write_stack(tmp_path / "images" / f"{k}.tif", L2A, array=dn, nodata=0)
            write_stack(tmp_path / "labels" / f"{k}.tif", None, array=(1 + (dn[7:8] > 1000)).astype(np.uint8))
        return build_index([tmp_path / "images"], bands=BANDS, chip_size=32, progress=False)

    return write


def fill(dn):
    dn = dn.copy()
    dn[:, :, :40] = 65535
    return dn


def test_sound_chips_say_nothing(archive, tmp_path):
    index = archive()
    assert check_index(index) == []
    scenes = pair_labels([tmp_path / "images"], tmp_path / "labels")
    assert check_labelled(LabelledChips(scenes, bands=BANDS, chip_size=48)) == []


def test_fill_that_would_pass_for_reflectance_stops_the_run(archive):
    with pytest.raises(UserError, match=r"undeclared nodata in 4 of 4 scenes.*65535.*--data\.nodata 65535") as error:
        check_index(archive(fill, 4))
    assert "\n" not in str(error.value)


def test_one_scene_of_many_is_only_told(archive):
    lines = check_index(archive(fill, 1, count=12))
    assert any(line.startswith("error: undeclared nodata, 1×") for line in lines)
    assert "ssl_geo.doctor" in lines[-1]


def test_a_wrong_order_and_an_unstated_offset_are_told(archive):
    descending = [0, 10, 7, 3, 4, 5, 6, 2, 8, 9, 1, 11]  # of the bands in use
    lines = check_index(archive(lambda dn: dn[descending], 4))
    assert any("band order" in line and "B11 B08 B04 B03 B02" in line for line in lines)
    lines = check_index(archive(lambda dn: dn + np.uint16(1000), 4))
    assert any("offset not declared" in line and "--data.offset -1000" in line for line in lines)


def test_only_the_bands_in_use_are_looked_at(archive):
    def broken(dn):
        dn = dn.copy()
        dn[9] = 65535
        return dn

    assert check_index(archive(broken, 4)) == []


def test_the_same_seed_looks_at_the_same_chips(archive):
    index = archive(lambda dn: dn + np.uint16(1000), 3)
    assert check_index(index, seed=1) == check_index(index, seed=1)


def test_a_wrong_place_of_b10_is_told_where_it_is_not_in_use(land, write_stack, tmp_path):
    """The ten bands of a run fit no land in either order; that B10 is read as B09 leaves no doubt."""
    for k in range(3):
        dn = land(k, (64, 64))
        b10 = np.random.default_rng(k).integers(8, 20, (1, 64, 64)).astype(np.uint16)
        stored = np.concatenate([dn[:8], dn[9:10], b10, dn[10:], dn[8:9]])
        write_stack(tmp_path / f"{k}.tif", (*L2A[:10], "B10", *L2A[10:]), array=stored, nodata=0)
    with pytest.raises(UserError, match="band order in 3 of 3"):
        check_index(build_index([tmp_path], bands=BANDS, chip_size=32, progress=False))
