"""Input that is hostile or odd: refused in one line, or read with the right values; nothing it holds is run."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch

from ssl_geo import load_backbone
from ssl_geo.config import pretrain_config
from ssl_geo.errors import UserError
from ssl_geo.imagery.chips import ChipIndex, build_index
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.packed import PackedChips, packed_index
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.pairing import read_splits
from ssl_geo.imagery.rasters import find_scenes, open_scene, read_labels, read_window
from ssl_geo.pretrain import main
from ssl_geo.probing import store
from ssl_geo.training import runs
from ssl_geo.weights import read_tensors, read_torch

BANDS = ["B02", "B03", "B04"]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def scene(path: Path, size: int = 32) -> np.ndarray:
    dn = np.random.default_rng(0).integers(1, 5000, (3, size, size)).astype(np.uint16)
    grid = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5, 0.0, -10.0, 5.4e6)}
    write_geotiff(path, dn, **grid, nodata=0, descriptions=BANDS)
    return dn


def packed(folder: Path) -> Path:
    scene(folder / "scene.tif")
    pack(build_index([folder / "scene.tif"], bands=BANDS, chip_size=16), folder / "packed")
    return folder / "packed"


def as_torch(path: Path, bomb: Bomb) -> None:
    torch.save({"step": 1, "backbone": bomb}, path)


def as_pickle(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps({"step": 1, "backbone": bomb}))


def as_object_array(path: Path, bomb: Bomb) -> None:
    np.save(path, np.array([bomb], dtype=object), allow_pickle=True)


def as_shard(path: Path, bomb: Bomb) -> None:
    path = packed(path.parent) / "chips-00000.npy"
    size = path.stat().st_size
    as_object_array(path, bomb)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def as_yaml(path: Path, bomb: Bomb) -> None:
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{bomb.path}']\n")


def as_run(path: Path, bomb: Bomb) -> None:
    path.mkdir()
    as_yaml(path / "config.yaml", bomb)


def as_index(path: Path, bomb: Bomb) -> None:
    table = pa.table({"scene": [pickle.dumps(bomb)]})
    pq.write_table(table.replace_schema_metadata({b"ssl_geo.chips": pickle.dumps(bomb)}), path)


def read_shard(path: Path) -> None:
    PackedChips(packed_index(path.parent / "packed"), path.parent / "packed")[0]


def read_store(path: Path) -> None:
    store.open_stored(path)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (as_torch, runs.load_checkpoint),
        (as_pickle, runs.load_checkpoint),
        (as_torch, read_torch),
        (as_torch, load_backbone),
        (as_pickle, load_backbone),
        (as_pickle, read_tensors),
        (as_pickle, ChipIndex.load),
        (as_index, ChipIndex.load),
        (as_shard, read_shard),
        (as_object_array, read_store),
        (as_pickle, lambda file: read_splits(file, "--split.file")),
        (as_yaml, lambda path: pretrain_config(["--config", str(path)])),
        (as_run, lambda path: pretrain_config(["--resume", str(path)])),
        (as_pickle, open_scene),
    ],
    ids=lambda f: getattr(f, "__name__", "").replace("<lambda>", "settings"),
)
def test_a_pickle_made_to_run_code_is_refused(tmp_path, write, read, capsys):
    bomb, path = Bomb(tmp_path / "exploded"), tmp_path / "file"
    write(path, bomb)
    if write is as_object_array:
        path = tmp_path / "file.npy"
    with pytest.raises((UserError, SystemExit)) as error:
        read(path)
    said = capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)
    assert said.strip()
    assert "Traceback" not in said
    assert not bomb.path.exists()


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_a_geotiff_that_claims_a_million_pixels_each_way_is_refused(tmp_path):
    path = tmp_path / "huge.tif"
    side = 1_000_000
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 1, "dtype": "uint16", "crs": "EPSG:32632"}
    profile |= {"tiled": True, "blockxsize": 4096, "blockysize": 4096, "sparse_ok": True, "bigtiff": True}
    with rasterio.open(path, "w", transform=rasterio.Affine(10, 0, 0, 0, -10, 0), **profile) as dataset:
        dataset.descriptions = ("B02",)
    assert path.stat().st_size < 2_000_000
    with pytest.raises(UserError, match=r"huge.tif claims 1000000×1000000 pixels, 2000 GB"):  # 621 hours of indexing
        open_scene(path)


@pytest.mark.parametrize("share", [0, 8, 200, 0.5], ids=lambda share: f"first {share}")
def test_a_file_that_is_cut_off_is_refused(tmp_path, share):
    scene(tmp_path / "scene.tif")
    whole = (tmp_path / "scene.tif").read_bytes()
    path = tmp_path / "cut.tif"
    path.write_bytes(whole[: int(len(whole) * share) if isinstance(share, float) else share])
    with pytest.raises(UserError) as error:
        read_window(open_scene(path), BANDS, 0, 0, 32, 32)
    assert "cut.tif" in str(error.value)


VRT = """<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="UInt16" band="1">
<Description>B02</Description><SimpleSource><SourceFilename relativeToVRT="0">{source}</SourceFilename>
<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize("source", ["/vsicurl/http://127.0.0.1:9/a.tif", "http://127.0.0.1:9/a.tif", "{outside}"])
@pytest.mark.parametrize("name", ["scene.vrt", "scene.tif"])
def test_a_vrt_is_refused_wherever_it_points(tmp_path, source, name):
    scene(tmp_path / "outside.tif")
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    path.write_text(VRT.format(source=source.format(outside=tmp_path / "outside.tif")))
    with pytest.raises(UserError) as error:
        open_scene(path)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["with space", "Übersee–海", "two\nlines", "per%20cent {band}x", "'quoted\""])
def test_any_name_of_a_file_will_do(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    dn = scene(folder / f"{name}.tif")
    index = build_index([folder], bands=BANDS, chip_size=32)
    index.save(folder / "index.parquet")
    (path,) = ChipIndex.load(folder / "index.parquet").table["scene"].to_pylist()
    assert np.array_equal(read_window(open_scene(path), BANDS, 0, 0, 32, 32)[0], dn)


def test_links_that_go_in_circles_are_walked_once(tmp_path):
    (tmp_path / "a").mkdir()
    scene(tmp_path / "a" / "scene.tif")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self.tif").symlink_to(tmp_path / "a" / "self.tif")
    found = [path.name for path in find_scenes([tmp_path])]
    assert found.count("scene.tif") == 1
    assert len(build_index([tmp_path], bands=BANDS, chip_size=32, max_unreadable=0.5)) == 1


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(folder: Path):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"cannot list .* \(Permission denied\); give folders you may read"):
        find_scenes([tmp_path])


def test_an_index_of_an_older_version_is_refused_with_what_mends_it(tmp_path):
    scene(tmp_path / "scene.tif")
    path = tmp_path / "index.parquet"
    build_index([tmp_path / "scene.tif"], bands=BANDS, chip_size=16).save(path)
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"ssl_geo.chips"]) | {"format_version": 1}
    pq.write_table(table.replace_schema_metadata({b"ssl_geo.chips": json.dumps(metadata)}), path)
    with pytest.raises(UserError, match="format 1, this version reads 2: build it anew"):
        ChipIndex.load(path)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # of the test's own reading
def test_every_odd_file_is_read_or_refused_in_one_line(shared_data):
    files = sorted((shared_data / "odd").rglob("*.tif"))
    assert len(files) > 50
    read, refused = {}, {}
    for file in files:
        with rasterio.open(file) as dataset:
            names = [*BANDS, "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
            count = sum(c != rasterio.enums.ColorInterp.alpha for c in dataset.colorinterp)
            side = min(64, dataset.height, dataset.width)
        try:
            found = open_scene(file, band_names=names[:count], scale=1.0)
            dn, valid = read_window(found, found.bands, 0, 0, side, side)
        except UserError as error:
            refused[file.name] = str(error)
            continue
        with rasterio.open(file) as dataset:
            numbers = [source.number for source in found.sources]
            expected = dataset.read(numbers, window=((0, side), (0, side)))
            mask = dataset.read_masks(numbers, window=((0, side), (0, side))).all(axis=0)
            if dataset.nodata == 0 and dn.dtype.kind in "iu":  # a declared 0 counts in all bands (docs/sentinel2.md)
                mask = expected.any(axis=0)
        assert np.array_equal(dn, expected, equal_nan=dn.dtype.kind == "f"), file
        assert not (valid & ~mask).any(), file
        read[file.name] = found
    assert len(read) > 15
    assert all(name in line and "\n" not in line for name, line in refused.items())


@pytest.mark.parametrize("name", ["rasterio/float_nan.tif", "rasterio/corrupt.tif", "rio-tiler/cog_rgb.tif"])
def test_pretraining_on_an_odd_file_is_refused_in_one_line(tmp_path, shared_data, name):
    arguments = ["--data", str(shared_data / "odd" / name), "--data.cache", str(tmp_path), "--out", str(tmp_path / "r")]
    with pytest.raises(UserError) as error:
        main(pretrain_config([*arguments, "--data.band_names", "B02", "--data.scale", "1", "--steps", "1"]))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()


def test_a_packed_folder_that_says_its_bytes_are_objects_is_refused(tmp_path):
    folder = packed(tmp_path)
    manifest = folder / "packed.json"
    manifest.write_text(manifest.read_text().replace('"<u2"', '"|O"'))
    with pytest.raises(UserError, match=r"dtype \|O"):
        packed_index(folder)


@pytest.mark.parametrize("change", [('"B03"', '"B08"'), ("[4, 3, 16, 16]", "[4, 2, 16, 16]"), ("[4, 3", "[[4], 3")])
def test_a_packed_json_that_does_not_fit_its_index_is_refused(tmp_path, change):
    folder = packed(tmp_path)
    manifest = folder / "packed.json"
    assert change[0] in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(*change))
    with pytest.raises(UserError, match=r"packed.json (does not fit|cannot be read)"):
        PackedChips(packed_index(folder), folder)


def test_a_band_description_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "scene.tif"
    scene(path)
    path.write_bytes(path.read_bytes().replace(b">B02<", b">\xb02<"))
    with pytest.raises(UserError, match=r"cannot open .*scene\.tif"):
        open_scene(path)


def test_labels_that_claim_more_than_memory_are_refused(tmp_path):
    profile = {"driver": "GTiff", "width": 60_000, "height": 60_000, "count": 1, "dtype": "uint8", "sparse_ok": True}
    transform = rasterio.Affine(10, 0, 0, 0, -10, 0)
    with rasterio.open(tmp_path / "labels.tif", "w", tiled=True, transform=transform, **profile):
        pass
    with pytest.raises(UserError, match="60000×60000 labels of uint8, more than 1024 MB"):
        read_labels(tmp_path / "labels.tif")
