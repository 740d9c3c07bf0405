"""Hostile rasters: GDAL opens nothing else for them, and none takes memory or time that its size does not justify."""

import importlib.util
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import rasterio

from ssl_geo.config import doctor_config, pack_config, predict_config, pretrain_config, probe_config
from ssl_geo.doctor import main as doctor
from ssl_geo.errors import UserError
from ssl_geo.imagery.archives import other_kind
from ssl_geo.imagery.chips import ChipIndex, build_index, cached_index
from ssl_geo.imagery.coordinates import same_crs, to_lonlat
from ssl_geo.imagery.gdal import _tiff_mask_block
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.rasters import open_scene, read_header, read_labels, read_legend, read_window
from ssl_geo.imagery.scenes import SettingError, UnnamedBandsError, UnreadableError

SPEC = importlib.util.spec_from_file_location("hostile", Path(__file__).parent / "soak" / "hostile.py")
assert SPEC is not None
assert SPEC.loader is not None
hostile = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hostile)

BANDS = hostile.BANDS
UTM = rasterio.Affine(10, 0, 6e5, 0, -10, 5.4e6)


def refusals(path: Path) -> list[str]:
    """Read all that is ever read of a raster; what was refused."""
    said = []
    for read in (read_header, pixels, read_labels, read_legend):
        try:
            read(path)
        except UserError as error:
            said.append(str(error))
    return said


def pixels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    scene = open_scene(path)
    return read_window(scene, scene.bands, 0, 0, min(64, scene.height), min(64, scene.width))


# Side files ----------------------------------------------------------------------------------------------------------


def test_no_raster_makes_gdal_connect(tmp_path):
    hostile.write(tmp_path / "outside.tif")
    with hostile.canary() as (port, met):
        hostile.make(tmp_path / "data", port, tmp_path / "outside.tif")
        said = {path.name: refusals(path) for path in sorted((tmp_path / "data").iterdir())}
        assert met == []
    assert [len(said[name]) for name in ("good.tif", "web_ovr.tif")] == [1, 1]  # three bands are no labels
    assert all("\n" not in line for lines in said.values() for line in lines)
    assert [name for name in ("web_msk.tif", "web.tif", "link_web.tif", "pipe.tif") if len(said[name]) < 3] == []


def test_the_canary_hears_what_gdal_does_by_itself(tmp_path):
    hostile.write(tmp_path / "outside.tif")
    with hostile.canary() as (port, met):
        hostile.make(tmp_path / "data", port, tmp_path / "outside.tif")
        with rasterio.open(tmp_path / "data" / "web_msk.tif") as dataset, pytest.raises(rasterio.errors.RasterioError):
            dataset.read_masks(1)
        assert met


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_scan_of_a_hostile_folder_opens_nothing_outside_it_and_nothing_for_writing(tmp_path):
    hostile.write(tmp_path / "outside.tif")
    with hostile.canary() as (port, met):
        hostile.make(tmp_path / "data", port, tmp_path / "outside.tif")
        ended = hostile.traced("scan", tmp_path / "data", tmp_path / "trace")
        if "ptrace" in ended.stderr:
            pytest.skip(f"strace may not trace here: {ended.stderr.splitlines()[0]}")
        assert ended.returncode == 0, ended.stderr
        assert hostile.broken(tmp_path / "trace", tmp_path / "data") == []
        assert met == []


@pytest.mark.parametrize("kind", ["raw", "web", "wms"])
def test_a_mask_that_is_no_geotiff_is_refused(tmp_path, kind):
    hostile.write(tmp_path / "a.tif")
    (tmp_path / "a.tif.msk").write_text(hostile.masks(9, Path("/etc/passwd"))[kind])
    with pytest.raises(UnreadableError, match=r"a\.tif\.msk is no GeoTIFF"):
        open_scene(tmp_path / "a.tif")


def test_a_mask_of_another_size_is_refused(tmp_path):
    hostile.write(tmp_path / "a.tif")
    write_geotiff(tmp_path / "m.tif", np.ones((1, 8, 8), np.uint8), crs=None, transform=None)
    (tmp_path / "m.tif").rename(tmp_path / "a.tif.msk")
    with pytest.raises(UnreadableError, match="8×8 pixels, its raster 64×64"):
        open_scene(tmp_path / "a.tif")


def test_a_mask_without_gdals_word_for_one_is_none_as_with_gdal(tmp_path):
    hostile.write(tmp_path / "a.tif")
    write_geotiff(tmp_path / "m.tif", np.zeros((1, 64, 64), np.uint8), crs=None, transform=None)
    (tmp_path / "m.tif").rename(tmp_path / "a.tif.msk")
    assert pixels(tmp_path / "a.tif")[1].all()


@pytest.mark.parametrize("suffix", [".tif.msk", ".tif.aux.xml", ".tfw", ".wld"])
def test_a_side_file_is_a_regular_file_of_its_folder(tmp_path, suffix):
    outside = tmp_path / "outside"
    outside.write_bytes(b"II*\0")
    (tmp_path / "data").mkdir()
    hostile.write(tmp_path / "data" / "a.tif")
    side = tmp_path / "data" / f"a{suffix}"
    side.symlink_to(outside)
    with pytest.raises(UnreadableError, match="link that leads out of its folder"):
        open_scene(tmp_path / "data" / "a.tif")
    side.unlink()
    os.mkfifo(side)
    with pytest.raises(UnreadableError, match="no regular file"):
        open_scene(tmp_path / "data" / "a.tif")


def test_a_scene_that_is_a_link_may_have_linked_side_files(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "data").mkdir()
    hostile.write(tmp_path / "store" / "a.tif")
    (tmp_path / "store" / "a.tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:32631</SRS></PAMDataset>")
    for name in ("a.tif", "a.tif.aux.xml"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    assert open_scene(tmp_path / "data" / "a.tif").crs == open_scene(tmp_path / "store" / "a.tif").crs == "EPSG:32631"


def test_a_full_temporary_folder_makes_no_scene_unreadable(tmp_path, monkeypatch):
    hostile.write(tmp_path / "a.tif")
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset/>")
    monkeypatch.setattr("ssl_geo.imagery.gdal._STAGE", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="make room") as error:
        open_scene(tmp_path / "a.tif")
    assert not isinstance(error.value, UnreadableError)


@pytest.mark.parametrize("name", ["http://127.0.0.1:{port}/", "{file}"])
def test_a_crs_that_is_an_address_or_a_file_is_not_opened(tmp_path, name):
    (tmp_path / "crs.wkt").write_text(rasterio.CRS.from_epsg(32632).wkt)
    with hostile.canary() as (port, met):
        name = name.format(port=port, file=tmp_path / "crs.wkt")
        with pytest.raises(UserError, match="neither a code"):
            to_lonlat(name, [6e5], [5.4e6])
        with pytest.raises(UserError, match="neither a code"):
            same_crs(name, "EPSG:32632")
        assert met == []


# Bombs ---------------------------------------------------------------------------------------------------------------


def sparse(path: Path, side: int, **options: object) -> Path:
    """A GeoTIFF without a pixel in it."""
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 1, "dtype": "uint16", "crs": "EPSG:32632"}
    with rasterio.open(path, "w", transform=UTM, sparse_ok=True, **{**profile, **options}) as dataset:
        dataset.descriptions = ("B02", "B03", "B04")[: dataset.count]
    return path


def test_one_block_of_gigabytes_is_refused(tmp_path):
    tiles = {"tiled": True, "compress": "DEFLATE"}
    path = sparse(tmp_path / "a.tif", 32768, blockxsize=32768, blockysize=32768, **tiles)
    with pytest.raises(UnreadableError, match=r"32768×32768 pixels in one block, 2048 MB .* more than 256 MB; .*TILED"):
        open_scene(path)
    path = sparse(tmp_path / "b.tif", 8192, count=3, blockxsize=8192, blockysize=8192, interleave="PIXEL", **tiles)
    with pytest.raises(UnreadableError, match="384 MB when decoded"):
        open_scene(path)
    path = sparse(tmp_path / "c.tif", 8192, count=3, blockxsize=8192, blockysize=8192, interleave="BAND", **tiles)
    assert open_scene(path).bands == ("B02", "B03", "B04")


def test_a_mask_of_one_block_of_gigabytes_is_refused(tmp_path):
    path = sparse(tmp_path / "a.tif", 32768, tiled=True)
    tiles = {"tiled": True, "blockxsize": 32768, "blockysize": 32768, "compress": "DEFLATE"}
    sparse(tmp_path / "m.tif", 32768, dtype="uint8", **tiles).rename(tmp_path / "a.tif.msk")
    with pytest.raises(UnreadableError, match=r"a\.tif\.msk stores 32768×32768"):
        open_scene(path)


@pytest.mark.parametrize("big", ["NO", "YES"])
@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_a_mask_inside_a_file_of_one_block_of_gigabytes_is_refused(tmp_path, big, order):
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "width": 300, "height": 200, "count": 3, "dtype": "uint16", "crs": "EPSG:32632"}
    profile |= {"tiled": True, "blockxsize": 128, "blockysize": 64, "BIGTIFF": big, "ENDIANNESS": order}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", transform=UTM, **profile) as dataset,
    ):
        dataset.descriptions = ("B02", "B03", "B04")
        dataset.write(np.ones((3, 200, 300), np.uint16))
        dataset.write_mask(np.eye(200, 300, dtype=bool))
    assert _tiff_mask_block(str(path)) == (64, 128)
    assert np.array_equal(pixels(path)[1], np.eye(64, dtype=bool))
    content, mark = path.read_bytes(), "<" if order == "LITTLE" else ">"
    entries = [struct.pack(mark + "HH", tag, kind) for tag in (322, 323) for kind in (3, 4)]  # TileWidth, TileLength
    for entry in entries:
        at = content.rfind(entry)  # the mask's directory is the last
        if at >= 0:
            value = at + (12 if big == "YES" else 8)
            content = (
                content[:at]
                + struct.pack(mark + "HH", struct.unpack(mark + "H", entry[:2])[0], 4)
                + (content[at + 4 : value] + struct.pack(mark + "I", 65536) + content[value + 4 :])
            )
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="65536×65536 pixels in one block, 4096 MB"):
        open_scene(path)


def test_more_pixels_than_a_file_can_hold_are_refused_and_an_empty_tile_is_not(tmp_path):
    path = sparse(tmp_path / "a.tif", 1_000_000, tiled=True, blockxsize=4096, blockysize=4096, bigtiff="YES")
    with pytest.raises(UnreadableError, match=r"1000000×1000000 pixels, 2000 GB, with .* bytes, more than 4 GB"):
        open_scene(path)
    with pytest.raises(UnreadableError, match="2000 GB"):
        read_labels(path)
    assert not pixels(sparse(tmp_path / "b.tif", 10980, tiled=True, count=3))[1].any()


@pytest.mark.parametrize("side", [20_000, 60_000])
def test_a_jpeg2000_of_one_huge_tile_is_refused(tmp_path, side):
    path = tmp_path / "a_B02.jp2"
    profile = {"driver": "JP2OpenJPEG", "width": 64, "height": 64, "count": 1, "dtype": "uint16", "crs": "EPSG:32632"}
    with rasterio.open(path, "w", transform=UTM, **profile) as dataset:
        dataset.write(np.ones((1, 64, 64), np.uint16))
    assert pixels(path)[1].all()
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">2I", content, at + 8, side, side)
    struct.pack_into(">2I", content, at + 24, side, side)
    struct.pack_into(">2I", content, content.index(b"ihdr") + 4, side, side)
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=f"{side}×{side} pixels"):
        open_scene(path)


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.tif")
    (tmp_path / "device.tif").symlink_to("/dev/zero")
    hostile.write(tmp_path / "good.tif")
    for name in ("pipe.tif", "device.tif"):
        with pytest.raises(UnreadableError, match=r"no regular file|does not exist"):
            open_scene(tmp_path / name)
        with pytest.raises(UnreadableError, match="no regular file"):
            read_header(tmp_path / name)
    index = build_index([tmp_path], bands=BANDS, chip_size=32, max_unreadable=0.7)
    assert len(index) == 4
    assert doctor(doctor_config([str(tmp_path)])) == 2


# Numbers that make no sense ------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
TRANSFORMS = [(0, 0, 1, 0, 0, 1), (10, 10, 1, 10, 10, 1), (NAN, 0, 1, 0, -10, 1), (10, 0, NAN, 0, -10, 1)]
TRANSFORMS += [
    (10, 0, INF, 0, -10, 1),
    (1e308, 0, 0, 0, -1e308, 0),
    (1e-320, 0, 0, 0, -1e-320, 0),
    (10, 0, 1e308, 0, -10, 0),
]


def with_good(folder: Path) -> None:
    """Three scenes that are fine, and the index that they make beside one that is not."""
    for number in range(3):
        hostile.write(folder / f"good{number}.tif", number)


def left_out(folder: Path) -> str:
    index = build_index([folder], bands=BANDS, chip_size=32, max_unreadable=0.3, progress=False)
    assert len(index) == 12
    (record,) = [record for record in index.left_out if record.reason.startswith("unreadable")]
    assert record.count == 1
    return record.reason


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_scene_that_lies_nowhere_is_left_out_and_stops_nothing(tmp_path, transform):
    with_good(tmp_path)
    dn = np.ones((3, 64, 64), np.uint16)
    write_geotiff(tmp_path / "bad.tif", dn, crs="EPSG:32632", transform=transform, descriptions=BANDS)
    assert "bad.tif lies nowhere" in left_out(tmp_path)
    with pytest.raises(UserError, match="lies nowhere"):
        read_labels(tmp_path / "bad.tif")
    assert doctor(doctor_config([str(tmp_path)])) == 2


@pytest.mark.parametrize(
    ("scale", "offset"), [(1e308, 0), (NAN, 0), (INF, 0), (0, 0), (1e-308, 1), (1, NAN), (1e-4, 1e308)]
)
def test_a_scale_that_makes_no_reflectance_is_left_out_and_stops_nothing(tmp_path, scale, offset):
    with_good(tmp_path)
    hostile.write(tmp_path / "bad.tif")
    with rasterio.open(tmp_path / "bad.tif", "r+") as dataset:
        dataset.scales, dataset.offsets = [float(scale)] * 3, [float(offset)] * 3
    assert "bad.tif" in (reason := left_out(tmp_path))
    assert "scale" in reason
    assert doctor(doctor_config([str(tmp_path)])) == 2


def test_metadata_whose_offset_is_not_a_number_is_left_out(tmp_path):
    hostile.write(tmp_path / "a.tif")
    (tmp_path / "MTD_MSIL2A.xml").write_text("<P><BOA_ADD_OFFSET>nan</BOA_ADD_OFFSET></P>")
    with pytest.raises(UnreadableError, match="offset nan"):
        open_scene(tmp_path / "a.tif")


@pytest.mark.parametrize("nodata", ["nan", "inf", "-inf", "1e300", "-1.7976931348623157e308"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_nodata_value_that_no_pixel_can_have_marks_none(tmp_path, nodata, dtype):
    array = np.ones((3, 64, 64), dtype)
    write_geotiff(tmp_path / "a.tif", array, crs="EPSG:32632", transform=tuple(UTM)[:6], descriptions=BANDS)
    of_bands = "".join(
        f'<PAMRasterBand band="{b}"><NoDataValue>{nodata}</NoDataValue></PAMRasterBand>' for b in (1, 2, 3)
    )
    (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset>{of_bands}</PAMDataset>")
    scene = open_scene(tmp_path / "a.tif", scale=1.0)
    assert read_window(scene, BANDS, 0, 0, 64, 64)[1].all()
    if dtype == "uint16":  # what a setting declares counts for all files, of any type
        scene = open_scene(tmp_path / "a.tif", nodata=float(nodata))
        assert read_window(scene, BANDS, 0, 0, 64, 64)[1].all()


@pytest.mark.parametrize(
    "settings", [{"scale": 1e308}, {"scale": NAN}, {"scale": 0.0}, {"offset": NAN}, {"offset": INF}]
)
def test_settings_that_make_no_reflectance_are_refused(tmp_path, settings):
    hostile.write(tmp_path / "a.tif")
    ((name, value),) = settings.items()
    with pytest.raises(SettingError, match=f"--data.{name} is"):
        open_scene(tmp_path / "a.tif", **settings)
    config = doctor_config([str(tmp_path)])
    setattr(config.data, name, value)
    with pytest.raises(UserError, match=f"--data.{name} is"):
        doctor(config)


# Names, other layers, other kinds ------------------------------------------------------------------------------------


def test_a_name_that_is_not_utf8_is_left_out_and_stops_nothing(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    with_good(data)
    (data / "good0.tif").rename(os.fsdecode(os.fsencode(data) + b"/caf\xe9.tif"))
    settings = {"bands": BANDS, "chip_size": 32, "max_unreadable": 0.5}
    index = cached_index(tmp_path / "cache", [data], **settings)
    (record,) = index.left_out
    assert r"caf\xe9.tif has a name that is not UTF-8" in record.reason
    "\n".join(index.report()).encode()
    index.save(tmp_path / "index.parquet")
    assert ChipIndex.load(tmp_path / "index.parquet").left_out == index.left_out
    assert len(cached_index(tmp_path / "cache", [data], **settings)) == len(index) == 8
    pack(index, tmp_path / "packed", workers=1, progress=False)


def test_a_stack_with_other_layers_is_read_with_a_placeholder(tmp_path):
    dn = np.stack([np.full((32, 32), value, np.uint16) for value in (11, 22, 33, 44, 55)])
    write_geotiff(tmp_path / "a.tif", dn, crs="EPSG:32632", transform=tuple(UTM)[:6])
    with pytest.raises(UnnamedBandsError, match="- stands for a layer that is no band"):
        open_scene(tmp_path / "a.tif")
    scene = open_scene(tmp_path / "a.tif", band_names=["B02", "-", "B04", "B08", "-"])
    assert scene.bands == ("B02", "B04", "B08")
    read = read_window(scene, ["B08", "B02", "B04"], 0, 0, 1, 1)[0]
    assert read.ravel().tolist() == [44, 11, 33]
    with pytest.raises(UserError, match="names no band"):
        open_scene(tmp_path / "a.tif", band_names=["-"] * 5)
    with pytest.raises(UserError, match=r"has 5 bands where --data.band_names lists 3"):
        open_scene(tmp_path / "a.tif", band_names=["B02", "-", "B04"])
    config = pretrain_config(["--data", str(tmp_path), "--data.band_names", "B02", "-", "B04", "B08", "-"])
    index = build_index([tmp_path], bands=["B02", "B04"], chip_size=32, band_names=config.data.band_names)
    assert len(index) == 1


def test_a_placeholder_does_not_contradict_a_name_silently(tmp_path):
    hostile.write(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"names its bands, B03 where --data.band_names says -"):
        open_scene(tmp_path / "a.tif", band_names=["B02", "-", "B04"])


KINDS = {
    "a.vrt": (b"<VRTDataset rasterXSize='1' rasterYSize='1'/>", "gdal_translate a.vrt a.tif"),
    "b.tif": (b"<VRTDataset rasterXSize='1' rasterYSize='1'/>", "gdal_translate b.tif"),
    "c.nc": (b"CDF\1", "NETCDF:c.nc:VARIABLE c.tif"),
    "d.h5": (b"\x89HDF\r\n\x1a\n", "gdalinfo d.h5"),
    "e.SAFE.zip": (b"PK\3\4", "unzip e.SAFE.zip"),
    "f.json": (b'{"type": "Feature"}', "download its assets"),
    "g.img": (b"EHFA_HEADER_TAG", "gdal_translate g.img g.tif"),
    "ein Würfel.nc": (b"CDF\1", "NETCDF:'ein Würfel.nc':VARIABLE 'ein Würfel.tif'"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_that_is_not_read_says_so_and_what_to_do(tmp_path, name, capsys):
    content, advice = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not read") as error:
        build_index([tmp_path / name], bands=BANDS, chip_size=32)
    assert advice in str(error.value)
    assert doctor(doctor_config([str(tmp_path / name)])) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert advice in said
    assert "fetch the file again" not in said


@pytest.mark.parametrize("name", ["a.zarr", "b"])
def test_a_folder_of_a_kind_that_is_not_read_says_so(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.nc").write_bytes(b"CDF\1")
    with pytest.raises(UserError, match=r"no raster under .* is not read; gdal_translate"):
        build_index([tmp_path / name], bands=BANDS, chip_size=32)
    assert other_kind(tmp_path) is None


def test_an_address_is_no_local_path(capsys):
    for parse, arguments in (
        (pretrain_config, ["--data", "https://example.org/a.tif"]),
        (pretrain_config, ["--data.labels", "s3://bucket/a"]),
        (pretrain_config, ["--backbone.weights", "/vsicurl/http://x/a.pth"]),
        (pack_config, ["--data", "/vsis3/bucket/a"]),
        (probe_config, ["--ckpt", "random:resnet10t", "--images", "gs://bucket/a"]),
        (doctor_config, ["ftp://x/a.tif"]),
        (predict_config, ["--head", "x", "--out", "x.tif", "--scene", "http://x/a.tif"]),
    ):
        with pytest.raises(SystemExit) as error:
            parse(arguments)
        said = capsys.readouterr().err
        assert error.value.code == 2
        assert f"{arguments[-1]} is an address" in said
        assert "download" in said
