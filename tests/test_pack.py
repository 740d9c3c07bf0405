"""The command as a user runs it: pack, verify, train from what was packed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ssl_geo.config import pack_config
from ssl_geo.errors import UserError
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.pack import main


@pytest.fixture(scope="module")
def imagery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagery")
    for number in range(2):
        dn = np.random.default_rng(number).integers(1, 9000, (3, 70, 64)).astype(np.uint16)
        grid = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5 + 1000 * number, 0.0, -10.0, 5.4e6)}
        write_geotiff(folder / f"{number}.tif", dn, descriptions=["B02", "B03", "B04"], **grid)
    return folder


@pytest.fixture
def arguments(imagery, tmp_path):
    return [
        *("--data", str(imagery), "--data.bands", "B02", "B04", "--data.chip_size", "32"),
        *("--data.cache", str(tmp_path / "cache"), "--out", str(tmp_path / "packed")),
    ]


def test_pack_and_verify(arguments, tmp_path, capsys):
    assert main(pack_config(arguments)) == 0
    assert "12 chips of 32×32 pixels from 2 of 2 scenes" in (said := capsys.readouterr().out)
    assert "12 chips in 1 shards" in said
    assert main(pack_config(["--verify", str(tmp_path / "packed")])) == 0
    assert "every checksum right" in capsys.readouterr().out
    assert main(pack_config(arguments)) == 0
    assert "holds these 12 chips already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.bands", "B02", "B12"], "B12"),
        (["--shard_mb", "0"], "--shard_mb is 0"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--seed", "-1"], "--seed -1: it must be 0 or more"),
        (["--data", "MISSING"], "MISSING"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_nothing_is_written(arguments, tmp_path, more, words):
    more = [str(tmp_path / m) if m == "MISSING" else m for m in more]
    with pytest.raises(UserError, match=words) as error:
        main(pack_config([*arguments, *more]))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "packed").exists()


def test_what_must_be_named_is_named():
    with pytest.raises(UserError, match=r"--data DIR .* --out FOLDER"):
        main(pack_config(["--out", "x"]))


def test_help_answers_without_torch_and_mistakes_with_code_2(tmp_path):
    code = "import sys, ssl_geo.pack; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
    done = subprocess.run(
        [sys.executable, "-m", "ssl_geo.pack", "--verify", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"ssl_geo.pack: error: {tmp_path} is no folder of packed chips")
    assert len(done.stderr.strip().splitlines()) == 1


def test_told_to_stop_it_says_how_to_go_on(tmp_path):
    (tmp_path / "images").mkdir()
    dn = np.ones((1, 64, 64), np.uint16)
    write_geotiff(tmp_path / "images" / "a.tif", dn, crs=None, transform=None, descriptions=["B02"])
    code = f"""
import time, sys, ssl_geo.pack, ssl_geo.config
ssl_geo.pack.pack = lambda *_, **__: (print("packing", flush=True), time.sleep(60))
arguments = ["--data", r"{tmp_path / "images"}", "--data.bands", "B02", "--out", r"{tmp_path / "packed"}"]
sys.exit(ssl_geo.pack.main(ssl_geo.config.pack_config([*arguments, "--data.cache", r"{tmp_path / "cache"}"])))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while (line := process.stdout.readline()) and line != "packing\n":
        pass
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "the same command goes on" in said
    assert process.returncode == 75
