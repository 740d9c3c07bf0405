import os

import pytest
import torch
from safetensors.torch import save_file

from ssl_geo.files import written_whole


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
