"""Each check on a small archive that has the defect, and silence on one that has not."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio

from ssl_geo.config import doctor_config
from ssl_geo.doctor import main
from ssl_geo.errors import UserError
from ssl_geo.imagery.diagnosis import diagnose
from ssl_geo.imagery.findings import exit_code

L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
L1C = (*L2A[:10], "B10", *L2A[10:])
UTM = (10.0, 0.0, 400_000.0, 0.0, -10.0, 5_300_000.0)
STATED = "S2A_MSIL2A_20200610T100031_N0214_R122_T33UUU"  # level, date and offset in the name


@pytest.fixture
def write_land(land, write_stack):
    """Write a scene of land; `change` edits its DN, options go to `write_geotiff`."""

    def write(path, seed=0, *, change=None, bands=L2A, shape=(96, 96), **options):
        array = options.pop("array", None)
        array = land(seed, shape, bands=tuple(b for b in bands if b != "B10")) if array is None else array
        if change is not None:
            array = change(array)
        write_stack(path, options.pop("descriptions", bands), array=array, **{"nodata": 0, **options})
        return path

    return write


def places(k):
    """A footprint of its own for scene k."""
    return (10.0, 0.0, 400_000.0 + 2000 * k, 0.0, -10.0, 5_300_000.0)


def found(*paths, labels=(), **options):
    """The gravest finding of each check."""
    diagnosis = diagnose(paths, labels, progress=False, **options)
    return {finding.check: finding for finding in reversed(diagnosis.findings)}


def test_clean_scenes_give_no_finding_at_all(write_land, tmp_path):
    for k in range(3):
        write_land(tmp_path / f"{STATED}_{k}.tif", k, transform=places(k))
    diagnosis = diagnose([tmp_path], progress=False)
    assert diagnosis.findings == []
    assert (diagnosis.scenes, diagnosis.labels, diagnosis.pixels) == (3, 0, 3 * 96 * 96)


PALETTE = {"descriptions": None, "colormap": {1: (9, 9, 9)}}


def picture(dn):
    return (dn / dn.max(axis=(1, 2), keepdims=True) * 255).astype(np.uint16)


def put(value, *, bands=slice(None), rows=slice(0, 24)):
    def change(dn):
        dn = dn.copy()
        dn[bands, rows] = value
        return dn

    return change


@pytest.mark.parametrize(
    ("check", "severity", "words", "change", "options"),
    [
        ("undeclared nodata", "warning", "0 in 25.0%", put(0), {"nodata": None}),
        ("undeclared nodata", "error", "65535 in 25.0%", put(65535), {}),
        ("undeclared nodata", "error", "-9999", lambda dn: put(-9999, bands=3)(dn.astype(np.int16)), {}),
        ("undeclared nodata", "error", "-32768", lambda dn: put(-32768)(dn.astype(np.int16)), {}),
        ("saturation", "warning", "of B04 at 28000", put(65535, bands=3, rows=slice(0, 1)), {}),
        ("saturation", "warning", "up to 32767", put(32767, bands=[1, 2], rows=slice(0, 1)), {}),
        ("clipped values", "warning", "5000", lambda dn: (dn.astype(np.int32) * 2).clip(1, 5000).astype(np.uint16), {}),
        ("constant band", "warning", "B09 is 7 everywhere", put(7, bands=9, rows=slice(None)), {}),
        ("nothing in it", "warning", "no valid pixel", put(0, rows=slice(None)), {}),
        ("wrong unit", "error", "8-bit picture", picture, {}),
        ("georeferencing missing", "warning", "no CRS", None, {"crs": None}),
        ("georeferencing missing", "warning", "no transform", None, {"crs": None, "transform": None}),
        ("nodata not declared", "info", "uint16", None, {"nodata": None}),
        ("ground sampling distance", "info", "20.0 m", None, {"transform": (20.0, 0.0, 4e5, 0.0, -20.0, 5.3e6)}),
        ("grid not north-up", "info", "south to north", None, {"transform": (10.0, 0.0, 4e5, 0.0, 10.0, 5.3e6)}),
        ("bands missing", "warning", "no B8A", lambda dn: np.delete(dn, 8, 0), {"descriptions": (*L2A[:8], *L2A[9:])}),
        ("band names missing", "error", "12 bands", None, {"descriptions": None}),
        ("no imagery", "warning", "palette", None, {"array": np.ones((1, 9, 9), "u1"), **PALETTE}),
    ],
)  # fmt: skip
def test_a_scene_with_a_defect(write_land, tmp_path, check, severity, words, change, options):
    write_land(tmp_path / f"{STATED}_a.tif", change=change, **{"nodata": 0, **options})
    finding = found(tmp_path)[check]
    assert (finding.severity, finding.count) == (severity, 1)
    assert words in finding.found
    assert finding.fix
    assert finding.paths == (str(tmp_path / f"{STATED}_a.tif"),)


@pytest.mark.parametrize(
    ("words", "factor", "fix"),
    [("percent", 100, "--data.scale 0.01"), ("DN", 10_000, "--data.scale 0.0001")],
)
def test_floating_point_in_other_units(write_land, tmp_path, words, factor, fix):
    write_land(tmp_path / "a.tif", change=lambda dn: (dn * np.float32(factor / 1e4)).astype(np.float32))
    findings = found(tmp_path)
    assert findings["unit unknown"].severity == "error"
    assert words in findings["wrong unit"].found
    assert findings["wrong unit"].fix == fix
    assert "wrong unit" not in found(tmp_path, scale=1 / factor)


def test_reflectance_as_stored_is_the_right_unit(write_land, tmp_path):
    write_land(tmp_path / "a.tif", change=lambda dn: (dn / np.float32(1e4)).astype(np.float32), nodata=np.nan)
    assert {"wrong unit", "unit unknown"}.isdisjoint(found(tmp_path, scale=1.0))


@pytest.mark.parametrize("value", [np.nan, -3.4028234663852886e38, -9999.0])
def test_fill_of_floating_point(write_land, tmp_path, value):
    def change(dn):
        reflectance = (dn / np.float32(1e4)).astype(np.float32)
        reflectance[:, :30] = value
        return reflectance

    write_land(tmp_path / "a.tif", change=change, nodata=None)
    finding = found(tmp_path, scale=1.0)["undeclared nodata"]
    assert finding.severity == ("info" if np.isnan(value) else "error")
    write_land(tmp_path / "a.tif", change=change, nodata=float(value))
    assert "undeclared nodata" not in found(tmp_path, scale=1.0)


@pytest.mark.parametrize(
    ("value", "words"), [(-3.4028234663852886e38, "-3.40282e+38"), (np.inf, "inf"), (2e9, "2e+09")]
)
def test_single_pixels_that_nothing_measures(write_land, tmp_path, value, words):
    """Nine of them were below what counts as fill, and made a tile of a map class 1."""

    def change(dn):
        reflectance = (dn / np.float32(1e4)).astype(np.float32)
        reflectance[2, 40:43, 40:43] = value
        return reflectance

    write_land(tmp_path / "a.tif", change=change, nodata=None)
    finding = found(tmp_path, scale=1.0)["no measurement"]
    assert (finding.severity, finding.paths) == ("warning", (str(tmp_path / "a.tif"),))
    assert f"9 pixels such as {words}" in finding.found
    assert "no measurement" in found(tmp_path, scale=1.0, quick=True)
    write_land(tmp_path / "a.tif", change=lambda dn: np.where(change(dn) == np.float32(value), np.nan, change(dn)))
    assert "no measurement" not in found(tmp_path, scale=1.0)


def test_single_dark_pixels_and_single_bright_ones_are_no_defect(write_land, tmp_path):
    def specks(dn):
        dn = dn.copy()
        dn[:, 5, 5], dn[:, 50, 50], dn[9, ::7, ::7] = 0, 65535, 0
        return dn

    write_land(tmp_path / f"{STATED}_a.tif", change=specks, nodata=None)
    assert set(found(tmp_path)) == {"nodata not declared"}


def test_pixels_that_are_square_on_the_ground_only(write_land, tmp_path):
    lat = 50.0
    square = (1e-4 / np.cos(np.radians(lat)), 0.0, 15.0, 0.0, -1e-4, lat + 48e-4)
    write_land(tmp_path / f"{STATED}_a.tif", crs="EPSG:4326", transform=square)
    assert found(tmp_path)["non-square pixels"].severity == "info"
    write_land(tmp_path / f"{STATED}_a.tif", crs="EPSG:4326", transform=(1.2 * square[0], *square[1:]))
    finding = found(tmp_path)["non-square pixels"]
    assert finding.severity == "warning"
    assert "13.34 × 11.12 m" in finding.found  # 1e-4 degrees of the mean sphere are 11.1195 m
    assert "EPSG:32633" in finding.command


def test_bands_at_several_resolutions(write_band_folder, tmp_path):
    write_band_folder(tmp_path / STATED, prefix="a_")
    finding = found(tmp_path)["mixed resolutions"]
    assert finding.severity == "info"
    assert finding.found.startswith("4 bands of 10, 3 bands of 20, 1 band of 60")


def test_a_truncated_file_is_found_by_reading_it_and_a_quick_look_says_the_rest(write_land, tmp_path):
    path = write_land(tmp_path / f"{STATED}_a.tif", shape=(300, 300))
    path.write_bytes(path.read_bytes()[:-2000])
    finding = found(tmp_path)["unreadable"]
    assert finding.severity == "error"
    assert "rows" in finding.found
    path.write_bytes(path.read_bytes()[:50])
    assert "unreadable" in found(tmp_path, quick=True)


def test_one_broken_file_takes_nothing_from_the_others(write_land, tmp_path):
    for k in range(3):
        write_land(tmp_path / f"{STATED}_{k}.tif", k, transform=places(k), change=put(65535) if k == 2 else None)
    path = tmp_path / f"{STATED}_1.tif"
    path.write_bytes(path.read_bytes()[:-2000])
    findings = found(tmp_path)
    assert set(findings) == {"unreadable", "undeclared nodata"}
    assert findings["unreadable"].paths == (str(path),)
    assert findings["undeclared nodata"].paths == (str(tmp_path / f"{STATED}_2.tif"),)


def test_levels_and_declared_offsets_that_differ(write_land, tmp_path):
    write_land(tmp_path / "S2A_MSIL2A_20200610T100031_N0214_R122_T33UUU.tif", 0)
    write_land(tmp_path / "S2A_MSIL2A_20220610T100031_N0400_R122_T33UUU.tif", 1, change=lambda dn: dn + np.uint16(1000))
    findings = found(tmp_path)
    assert findings["mixed offsets"].severity == "error"
    assert "mixed products" not in findings
    write_land(tmp_path / "S2A_MSIL1C_20220610T100031_N0400_R122_T33UUU.tif", 2, change=lambda dn: dn + np.uint16(1000))
    assert found(tmp_path)["mixed products"].severity == "error"


def test_settings_against_what_files_state(write_land, tmp_path):
    write_land(tmp_path / f"{STATED}_a.tif", 0, transform=places(0))
    write_land(tmp_path / "b.tif", 1, transform=places(1))
    assert "settings against files" not in found(tmp_path)
    finding = found(tmp_path, level="L1C")["settings against files"]
    assert (finding.severity, finding.count, finding.found) == ("warning", 1, "level L2A in 1")


def test_offsets_that_only_the_pixels_tell(write_land, tmp_path):
    for k in range(3):
        write_land(tmp_path / f"{k}.tif", k, transform=places(k), change=lambda dn: dn + np.uint16(1000))
    assert found(tmp_path)["offset not declared"].count == 3
    assert "offset not declared" not in found(tmp_path, offset=-1000.0)
    write_land(tmp_path / "3.tif", 3, transform=places(3))
    finding = found(tmp_path)["mixed offsets in the pixels"]
    assert (finding.severity, finding.count) == ("warning", 3)
    assert "1 other scene" in finding.found


def test_b10_leaves_no_doubt_about_the_offset(write_land, tmp_path):
    rng = np.random.default_rng(0)

    def with_cirrus(shift):
        def change(dn):
            cirrus = rng.integers(15, 25, (1, *dn.shape[1:])).astype(np.uint16)
            return np.concatenate([dn[:10], cirrus, dn[10:]]) + np.uint16(shift)

        return change

    for k, shift in enumerate((0, 1000)):
        write_land(tmp_path / f"{k}.tif", k, transform=places(k), bands=L1C, change=with_cirrus(shift))
    finding = found(tmp_path)["mixed offsets in the pixels"]
    assert (finding.severity, finding.count) == ("error", 1)


def test_a_high_cloud_is_no_offset(write_land, tmp_path):
    """B10 above 900 DN was proof: an error, and a mend that would have written a wrong offset into the file."""
    rng = np.random.default_rng(0)

    def with_b10(least, most):
        def change(dn):
            b10 = rng.integers(least, most, (1, *dn.shape[1:])).astype(np.uint16)
            return np.concatenate([dn[:10], b10, dn[10:]])

        return change

    for k in range(3):
        cirrus = with_b10(1200, 1800) if k == 2 else with_b10(15, 25)
        write_land(tmp_path / f"{k}.tif", k, transform=places(k), bands=L1C, change=cirrus)
    assert {"mixed offsets in the pixels", "offset not declared"}.isdisjoint(found(tmp_path))


@pytest.mark.parametrize("crs", ['LOCAL_CS["site grid",UNIT["metre",1]]', "IAU_2015:30100"])
def test_a_crs_that_leads_nowhere_on_earth_stops_nothing(write_land, tmp_path, crs):
    """GDAL's own error came through, and one such file ended the look over all others."""
    write_land(tmp_path / "site.tif", crs=crs, change=put(65535))
    write_land(tmp_path / "a.tif", 1, transform=places(1), change=put(65535))
    assert found(tmp_path)["undeclared nodata"].count == 2


def test_a_scale_of_0_and_a_name_in_no_encoding_stop_nothing(write_land, tmp_path):
    write_land(tmp_path / f"{STATED}_1.tif", change=put(65535))
    path = write_land(tmp_path / "flat.tif", 1, transform=places(1))
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = [0.0] * dataset.count
    old = Path(os.fsdecode(os.fsencode(tmp_path) + b"/z\xfcrich.tif"))
    write_land(tmp_path / "zurich.tif", 2, transform=places(2)).rename(old)
    diagnosis = diagnose([tmp_path], progress=False)
    findings = {finding.check: finding for finding in diagnosis.findings}
    assert findings["undeclared nodata"].count == 1
    assert any("a scale of 0" in finding.found for finding in diagnosis.findings)
    assert findings["unreadable"].paths == (str(old),)
    assert main(doctor_config([str(tmp_path), "--out", str(tmp_path / "out")])) == 2
    assert r"z\udcfcrich.tif" in (tmp_path / "out" / "doctor.html").read_text()
    assert r"z\udcfcrich.tif" in (tmp_path / "out" / "doctor.json").read_text()


def test_an_offset_where_none_was_added(write_land, tmp_path):
    write_land(tmp_path / "a.tif")
    assert found(tmp_path, offset=-1000.0)["negative reflectance"].severity == "error"


def test_backscatter_is_no_reflectance(write_stack, tmp_path):
    db = np.random.default_rng(0).normal(-14, 3, (2, 64, 64)).astype(np.float32)
    write_stack(tmp_path / "a.tif", ("VV", "VH"), array=db, nodata=np.nan)
    assert {"negative reflectance", "wrong unit", "saturation"}.isdisjoint(found(tmp_path, scale=1.0))


@pytest.mark.parametrize("quick", [False, True])
def test_stacks_in_another_order_than_their_names_say(write_land, tmp_path, quick):
    stored = [0, 3, 2, 1, *range(4, 12)]  # red first
    for k in range(4):
        write_land(tmp_path / f"{STATED}_{k}.tif", k, transform=places(k), change=lambda dn: dn[stored])
    finding = found(tmp_path, quick=quick)["band order"]
    assert (finding.severity, finding.count) == ("warning", 4)
    assert "B01 B04 B03 B02 B05" in finding.found


def test_equal_and_nearly_equal_scenes(write_land, tmp_path):
    for k in range(4):
        write_land(tmp_path / f"{k}.tif", k, transform=places(k))
    assert {"duplicates", "near-duplicates"}.isdisjoint(found(tmp_path))
    write_land(tmp_path / "copy.tif", 2, transform=places(7))
    write_land(tmp_path / "noisy.tif", 1, transform=places(8), change=lambda dn: dn // 2 + 300)
    findings = found(tmp_path)
    assert findings["duplicates"].paths == tuple(str(tmp_path / name) for name in ("2.tif", "copy.tif"))
    assert findings["near-duplicates"].paths == tuple(str(tmp_path / name) for name in ("1.tif", "noisy.tif"))


def test_dates_of_a_place_are_a_series_and_no_duplicates(write_land, tmp_path):
    for date in ("20200601", "20200611"):
        write_land(tmp_path / f"a_{date}.tif", change=lambda dn, date=date: dn + np.uint16(date == "20200601"))
    findings = found(tmp_path)
    assert "near-duplicates" not in findings
    assert findings["shared ground"].severity == "info"


def test_splits_that_share_pixels_or_ground(write_land, tmp_path):
    write_land(tmp_path / "a.tif", 0, transform=places(0))
    write_land(tmp_path / "b.tif", 0, transform=places(1))
    write_land(tmp_path / "c.tif", 1, transform=(10.0, 0.0, 400_500.0, 0.0, -10.0, 5_300_000.0))
    write_land(tmp_path / "d.tif", 2, transform=places(5))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"a": "train", "b": "test", "c": "test"}))
    findings = found(tmp_path, splits=splits)
    assert findings["duplicates across splits"].severity == "error"
    assert "train and test" in findings["splits share ground"].found
    assert findings["splits share ground"].count == 1
    assert findings["split missing"].paths == (str(tmp_path / "d.tif"),)
    assert "split of no scene" not in findings
    splits.write_text(json.dumps({"a": "train", "b": "train", "c": "train", "d": "test"}))
    findings = found(tmp_path, splits=splits)
    assert {"splits share ground", "duplicates across splits"}.isdisjoint(findings)
    splits.write_text(json.dumps({"a": "train", "b": "train", "c": "train", "d": "test", "e.tif": "val", "f": "val"}))
    finding = found(tmp_path, splits=splits)["split of no scene"]
    assert (finding.severity, finding.count, finding.found) == ("warning", 2, "'e.tif' and 1 more")
    for content, words in (("[1]", "must hold"), ('{"a": "training"}', "puts a into 'training'")):
        splits.write_text(content)
        with pytest.raises(UserError, match=words):
            found(tmp_path, splits=splits)


def test_a_header_that_claims_more_than_the_file_can_hold_is_not_read(write_stack, tmp_path):
    import rasterio

    path = tmp_path / "huge.tif"
    profile = {"driver": "GTiff", "count": 1, "height": 200_000, "width": 200_000, "dtype": "uint16"}
    with rasterio.open(
        path, "w", **profile, SPARSE_OK=True, tiled=True, transform=rasterio.Affine(*UTM), crs="EPSG:32633"
    ):
        pass
    finding = found(tmp_path)["unreadable"]
    assert "200000×200000" in finding.found


def test_the_number_of_threads_changes_nothing(write_land, tmp_path):
    for k in range(5):
        write_land(tmp_path / f"{k}.tif", k % 3, transform=places(k % 4), nodata=None, change=put(0))
    one, four = (diagnose([tmp_path], workers=workers, progress=False) for workers in (1, 4))
    assert one == four
    assert exit_code(one.findings) == 1


def test_labels_below_the_images_are_no_scenes(write_land, write_stack, tmp_path):
    write_land(tmp_path / "images" / f"{STATED}.tif")
    write_stack(tmp_path / "labels" / f"{STATED}.tif", None, array=np.ones((1, 96, 96), np.uint8), nodata=255)
    diagnosis = diagnose([tmp_path], [tmp_path / "labels"], progress=False)
    assert (diagnosis.scenes, diagnosis.labels) == (1, 1)
    with pytest.raises(UserError, match="label rasters"):
        diagnose([tmp_path / "labels"], [tmp_path / "labels"], progress=False)


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_nothing_to_look_at_is_the_users_mistake(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=str(tmp_path / path)):
        diagnose([tmp_path / path], progress=False)


def test_names_with_spaces_unicode_and_line_breaks(write_land, tmp_path):
    path = write_land(Path(tmp_path) / "Grüße\n aus München.tif", nodata=None, change=put(0))
    assert found(tmp_path)["undeclared nodata"].paths == (str(path),)


def eurosat(dn, seed=0):
    """L2A's twelve bands with a B10, B8A last."""
    b10 = np.random.default_rng(seed).integers(8, 20, (1, *dn.shape[1:])).astype(np.uint16)
    return np.concatenate([dn[:8], dn[9:10], b10, dn[10:], dn[8:9]])


EUROSAT = (*L2A[:8], "B09", "B10", "B11", "B12", "B8A")


def test_a_wrong_order_of_thirteen_bands_is_neither_suggested_nor_certified(write_land, tmp_path):
    """The doctor printed the order with B8A in place and, given that, answered "clean"."""
    for k in range(3):
        write_land(tmp_path / f"{k}.tif", k, transform=places(k), change=eurosat, descriptions=None)
    assert found(tmp_path)["band names missing"].fix == f"--data.band_names {' '.join(EUROSAT)}"
    assert "band order" not in found(tmp_path)  # one finding, one order
    assert found(tmp_path, band_names=L1C)["band order"].severity == "error"
    assert exit_code(diagnose([tmp_path], progress=False, band_names=EUROSAT).findings) == 0


@pytest.mark.parametrize(("names", "severities"), [(EUROSAT, set()), (L1C, {"error"})])
def test_thirteen_names_that_files_carry(write_land, tmp_path, names, severities):
    """EuroSAT's own names were taken for mere counting: "13 bands without a name"."""
    for k in range(2):
        write_land(tmp_path / f"{k}.tif", k, transform=places(k), change=eurosat, descriptions=names)
    findings = found(tmp_path)
    assert "band names missing" not in findings
    assert {finding.severity for finding in findings.values()} - {"info"} == severities
    if severities:
        assert " ".join(EUROSAT) in findings["band order"].command  # no setting can rename them


@pytest.mark.parametrize("side", [6, 7])
def test_one_pixel_of_60_m_is_no_clip(write_land, tmp_path, side):
    """172 rasters were flagged for one pixel of B01 or B09, 36 of 10 m or 49, that was their brightest."""

    def repeated(dn):
        coarse = dn[:, ::side, ::side].repeat(side, axis=1).repeat(side, axis=2)[:, :64, :64]
        dn = dn[:, :64, :64].copy()
        dn[[0, 9]] = coarse[[0, 9]]
        dn[0, side : 2 * side, side : 2 * side] = 6000
        return dn

    write_land(tmp_path / f"{STATED}_a.tif", change=repeated, nodata=0)
    assert "clipped values" not in found(tmp_path)

    def clipped(dn):
        dn = repeated(dn).astype(np.int32)
        dn[[0, 9]] = (dn[[0, 9]] * 4).clip(1, 4500)
        return dn.astype(np.uint16)

    write_land(tmp_path / f"{STATED}_a.tif", change=clipped, nodata=0)
    assert "clipped values" in found(tmp_path)


def test_files_of_60_m_brought_to_10_m_count_as_stored(write_stack, land, tmp_path):
    bright = land(0, (66, 66))[0]
    coarse = land(0, (11, 11))[0]
    coarse[5, 5] = 6000
    write_stack(tmp_path / "a_B02.tif", None, array=bright[None], descriptions=None)
    write_stack(
        tmp_path / "a_B01.tif", None, array=coarse[None], descriptions=None, transform=(60, 0, 4e5, 0, -60, 5.3e6)
    )
    assert "clipped values" not in found(tmp_path)


def test_findings_are_grouped_by_folder_and_product_the_worst_first(write_land, tmp_path):
    for k in range(6):
        bad = (put(65535), 0) if k < 2 else (put(0), None) if k < 4 else (None, 0)
        folder = tmp_path / ("north", "south", "west")[k // 2]
        write_land(folder / f"{STATED}_{k}.tif", k, transform=places(k), change=bad[0], nodata=bad[1])
    write_land(
        tmp_path / "north" / f"{STATED}_9.tif", 9, transform=places(9), change=lambda dn: dn[:10], descriptions=L2A[:10]
    )
    diagnosis = diagnose([tmp_path], progress=False)
    told = [
        (f.where and (Path(f.where.folder).name, f.where.product), f.check, f.counted_in_group)
        for f in diagnosis.findings
        if f.severity != "info"
    ]
    assert told == [
        (("north", "L2A, 12 bands of uint16"), "undeclared nodata", "2 of 2"),
        (("north", "L2A, 10 bands of uint16"), "bands missing", "1 of 1"),
        (("south", "L2A, 12 bands of uint16"), "undeclared nodata", "2 of 2"),
    ]
    assert {f.severity for f in diagnosis.findings[3:]} == {"info"}  # at the end
    assert [Path(group.folder).name for group in diagnosis.groups] == ["north", "north", "south", "west"]
    assert [(Path(group.folder).name, group.rasters) for group in diagnosis.sound] == [("west", 2)]
