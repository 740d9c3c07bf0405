import os
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssl_geo.files import partial_files, partial_path, remove_stale, written_whole
from ssl_geo.imagery.geotiff import cog_by_rows


def test_a_file_is_new_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    with written_whole(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def killed() -> None:
        with written_whole(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_whoever_may_read_new_files_may_read_safetensors(tmp_path):
    """They once were its owner's alone, and colleagues could not open a backbone."""
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "a.safetensors") as partial:
            save_file({"weight": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def dead_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_what_a_killed_writer_left_goes_and_what_others_write_stays(tmp_path):
    """`.map.*.rows` of predict and `.backbone.*.safetensors` once stayed for ever."""
    ours = partial_path(tmp_path / "map.tif")
    host, dead = ours.name.split("-")[1], dead_process()
    left = [f".map.partial-{host}-{dead}-7.tif", f".map.partial-{host}-{dead}-7.rows", f".odd.partial-{host}-{2**70}-7"]
    stay = [ours.name, f".map.partial-00000000-{dead}-7.tif", f".index.{dead}-7.parquet", ".hidden", "map.tif"]
    for name in left + stay:
        (tmp_path / name).touch()
    assert {path.name for path in partial_files(tmp_path)} == {*left, *stay[:3]}
    remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(stay)


def test_the_next_map_in_a_folder_removes_rows_of_a_killed_one(tmp_path):
    left = partial_path(tmp_path / "other.rows")
    left.with_name(left.name.replace(str(os.getpid()), str(dead_process()))).touch()
    with cog_by_rows(tmp_path / "map.tif", (1, 8, 8), np.uint8, crs=None, transform=None) as write:
        write(0, np.ones((1, 8, 8), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["map.tif"]
