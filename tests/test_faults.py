"""Faults injected into a run: what is promised in docs/reliability.md."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import ssl_geo.pretrain
from ssl_geo.config import pretrain_config
from ssl_geo.errors import UserError
from ssl_geo.imagery import datasets, gdal
from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.pretrain import main
from ssl_geo.training import runs


@pytest.fixture
def imagery(tmp_path) -> Path:
    folder = tmp_path / "imagery"
    folder.mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).gamma(4, 300, (3, 96, 96))
        write_geotiff(
            folder / f"S2A_MSIL2A_2018061{number}T103021_N0208_R108_T32UPU.tif",
            noise.astype(np.uint16) + 1,
            crs="EPSG:32632",
            transform=(10.0, 0.0, 6e5 + 1000 * number, 0.0, -10.0, 5.4e6),
            nodata=0,
            descriptions=["B02", "B03", "B04"],
        )
    return folder


@pytest.fixture
def arguments(imagery, tmp_path):
    return [
        *("--data", str(imagery), "--data.bands", "B02", "B03", "B04", "--data.cache", str(tmp_path / "cache")),
        *("--data.chip_size", "32", "--views.local_count", "1", "--optim.batch_size", "2", "--optim.precision", "fp32"),
        *("--dino.out_dim", "32", "--dino.hidden_dim", "16", "--dino.bottleneck_dim", "8"),
        *("--backbone.name", "vit_tiny_patch16_224", "--log.every", "1", "--data.workers", "0"),
        *("--backbone.arguments", "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"),
    ]


def pretrain(out: Path, arguments: list[str], *more: str) -> int:
    return main(pretrain_config([*arguments, "--out", str(out), *more]))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_loaders_that_are_killed_are_started_anew_and_nothing_else_changes(tmp_path, arguments, monkeypatch, capsys):
    pretrain(tmp_path / "whole", arguments, "--steps", "6")
    killed = []
    step = ssl_geo.pretrain.train_step

    def step_that_kills(*given, **more):
        if len(killed) < 2 and given[4] in (1, 4):
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)
        return step(*given, **more)

    monkeypatch.setattr(ssl_geo.pretrain, "train_step", step_that_kills)
    pretrain(tmp_path / "run", arguments, "--steps", "6", "--data.workers", "1")
    assert len(killed) == 2
    assert capsys.readouterr().out.count("a loader process was killed (SIGKILL): starting them anew") == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_loaders_that_die_again_and_again_end_the_run_in_one_line(tmp_path, arguments, monkeypatch):
    here = os.getpid()
    read = ChipDataset.__getitem__

    def killed(self, i):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, i)

    monkeypatch.setattr(ChipDataset, "__getitem__", killed)
    with pytest.raises(UserError, match=r"3 times in a row .* killed \(SIGKILL\): .* lower --data.workers from 1$"):
        pretrain(tmp_path / "run", arguments, "--steps", "2", "--data.workers", "1")


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_an_error_in_the_loop_leaves_no_loader_behind_that_the_exit_would_wait_for(
    tmp_path, arguments, monkeypatch, kind
):
    def full(*given):
        raise kind("no space left")

    monkeypatch.setattr(runs, "save_checkpoint", full)
    others = multiprocessing.active_children()
    with pytest.raises(kind, match="no space left") as raised:
        pretrain(tmp_path / "run", arguments, "--steps", "6", "--data.workers", "1", "--log.checkpoint_every", "2")
    assert raised.tb is not None  # holds the loop's frames, as it does at the exit
    for loader in set(multiprocessing.active_children()) - set(others):
        loader.join(10)
        assert loader.exitcode is not None


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_file_that_vanishes_stops_the_run_saved_and_mended_it_is_the_run_undisturbed(
    tmp_path, imagery, arguments, monkeypatch, workers
):
    monkeypatch.setattr(gdal, "_MAX_OPEN", 1)  # else these small files are read from memory once they were open
    settings = [*arguments, "--steps", "12", "--data.workers", workers]
    pretrain(tmp_path / "whole", settings)
    file = sorted(imagery.iterdir())[1]
    step, whole = ssl_geo.pretrain.train_step, file.read_bytes()

    def step_that_breaks(*given, **more):
        if given[4] == 1:
            os.truncate(file, len(whole) // 3)
        return step(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ssl_geo.pretrain, "train_step", step_that_breaks)
        with pytest.raises(UserError) as error:
            pretrain(tmp_path / "run", settings)
    (line,) = str(error.value).splitlines()
    assert file.name in line
    assert f"fix the file, then --resume {tmp_path / 'run'}" in line
    saved = runs.last_checkpoint(tmp_path / "run")["step"]
    assert f"saved at step {saved} of 12" in line
    assert 2 <= saved < 12
    file.write_bytes(whole)
    assert main(pretrain_config(["--resume", str(tmp_path / "run")])) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_file_that_shrank_since_it_was_indexed_is_named(tmp_path, imagery, arguments):
    run = tmp_path / "run"
    pretrain(run, arguments, "--steps", "1")
    runs.checkpoints(run)[0].unlink()
    for file in imagery.iterdir():
        bands = ["B02", "B03", "B04"]
        write_geotiff(file, np.ones((3, 8, 8), np.uint16), crs=None, transform=None, descriptions=bands)
    datasets._described.cache_clear()  # as in a new process
    with pytest.raises(UserError, match="has changed since it was indexed"):
        main(pretrain_config(["--resume", str(run)]))


def test_the_views_of_a_step_that_was_not_finite_are_kept(tmp_path, arguments, monkeypatch, capsys):
    step, seen = ssl_geo.pretrain.train_step, {}

    def step_that_breaks(method, optimizer, scaler, views, number, **more):
        seen[number] = [view.clone() for view in views]
        if number == 2:
            views = [view * float("nan") for view in views]
        return step(method, optimizer, scaler, views, number, **more)

    monkeypatch.setattr(ssl_geo.pretrain, "train_step", step_that_breaks)
    run = tmp_path / "run"
    pretrain(run, arguments, "--steps", "5", "--log.every", "3")
    said = capsys.readouterr().out
    assert f"step 3: 1 not finite, skipped (1 so far), see {run / 'skipped'}" in said
    (kept,) = (run / "skipped").iterdir()
    assert kept.name == "step-00000002-rank-0.safetensors"
    assert (
        "<strong>1</strong><span>steps that were not finite and changed nothing</span>"
        in (run / "report.html").read_text()
    )
    with safe_open(kept, "pt") as file:
        assert all(torch.equal(file.get_tensor(f"view-{i}"), view) for i, view in enumerate(seen[2]))
        chips = json.loads(file.metadata()["chips"])
    assert [set(chip) for chip in chips] == [{"scene", "row", "col"}] * 2
    assert Path(chips[0]["scene"]).is_file()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket that was just being opened
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_signal_while_a_loader_is_blocked_saves_within_seconds(tmp_path, arguments, monkeypatch, capsys, workers):
    read = ChipDataset.__getitem__
    run, blocked = tmp_path / "run", tmp_path / "blocked"

    def slow(self, i):
        if (run / "log.jsonl").exists() and losses(run):
            blocked.touch()
            time.sleep(600)
        return read(self, i)

    def tell():
        while not blocked.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(ChipDataset, "__getitem__", slow)
    thread = threading.Thread(target=tell)
    thread.start()
    began = time.monotonic()
    assert pretrain(run, arguments, "--steps", "500", "--data.workers", workers) == runs.INTERRUPTED
    thread.join()
    assert time.monotonic() - began < 300  # not the ten minutes of the read
    saved = runs.last_checkpoint(run)["step"]
    assert saved == len(losses(run)) > 0
    assert f"SIGUSR1: saved at step {saved} of 500; resume with --resume {run}" in capsys.readouterr().out
    assert not multiprocessing.active_children()


def test_a_signal_during_the_start_leaves_at_once(tmp_path, arguments, monkeypatch, capsys):
    def told(*_: object, **__: object):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    with monkeypatch.context() as patch:
        patch.setattr(ssl_geo.pretrain, "chip_index", told)
        assert pretrain(tmp_path / "run", arguments, "--steps", "2") == runs.INTERRUPTED
    assert "SIGTERM: stopped before the first step; run the same command again" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(ssl_geo.pretrain, "feed", told)
        assert pretrain(tmp_path / "run", arguments, "--steps", "2") == runs.INTERRUPTED
    assert f"resume with --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert main(pretrain_config(["--resume", str(tmp_path / "run")])) == 0


@pytest.mark.parametrize("lost", ["", "checkpoints"])
def test_a_run_that_loses_its_folder_or_its_checkpoints_says_so_in_one_line(tmp_path, arguments, monkeypatch, lost):
    """It was a traceback, or "the checkpoints there are are intact"."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    step = ssl_geo.pretrain.train_step

    def step_that_loses(*given, **more):
        if given[4] == 3:
            (run / lost).rename(elsewhere)
        return step(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ssl_geo.pretrain, "train_step", step_that_loses)
        with pytest.raises(UserError, match=f"{run / lost} was moved or removed: .*--resume"):
            pretrain(run, arguments, "--steps", "6", "--log.checkpoint_every", "2")
    if not lost:
        assert runs.last_checkpoint(elsewhere)["step"] == 2
        assert main(pretrain_config(["--resume", str(elsewhere)])) == 0


def test_a_run_that_another_process_writes_is_left_alone(tmp_path, arguments):
    run = tmp_path / "run"
    pretrain(run, arguments, "--steps", "2")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code = "import sys, time; from pathlib import Path; from ssl_geo.training.lock import Lock; lock = Lock()"
    code += "; lock.take(Path(sys.argv[1])); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match=f"is being written by process {holder.pid} on "):
            main(pretrain_config(["--resume", str(run)]))
        holder.kill()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main(pretrain_config(["--resume", str(run)])) == 0


HANGING = """
import os, sys
import ssl_geo.imagery.survey
import ssl_geo.pretrain
from ssl_geo.config import pretrain_config
from ssl_geo.errors import one_line_errors
silent, _ = os.pipe()
def open_scene(*given, **more):
    print("opening", flush=True)
    os.read(silent, 1)  # as a file system does whose server is gone
ssl_geo.imagery.survey.open_scene = open_scene
with one_line_errors("ssl_geo.pretrain"):
    sys.exit(ssl_geo.pretrain.main(pretrain_config(sys.argv[1:])))
"""


def test_a_run_whose_indexing_hangs_in_the_file_system_stops_when_told(tmp_path, arguments):
    command = [sys.executable, "-c", HANGING, *arguments, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "opening\n"
        process.send_signal(signal.SIGHUP)
        said, errors = process.communicate(timeout=100)
    assert process.returncode == runs.INTERRUPTED
    assert "SIGHUP: stopped before the first step; run the same command again" in said
    assert errors == ""


LOADER = """
import os, sys
import ssl_geo.pretrain
from ssl_geo.config import pretrain_config
from ssl_geo.errors import one_line_errors
from ssl_geo.imagery.scenes import UnreadableError
feed = ssl_geo.pretrain.feed
def feed_that_breaks(dataset, order, **more):
    for number, batch in enumerate(feed(dataset, order, **more)):
        if number == 3 and os.environ["RANK"] == sys.argv[1]:
            raise UnreadableError("scene.tif cannot be read")
        yield batch
ssl_geo.pretrain.feed = feed_that_breaks
with one_line_errors("ssl_geo.pretrain"):
    sys.exit(ssl_geo.pretrain.main(pretrain_config(sys.argv[2:])))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_where_one_of_two_ranks_cannot_read_both_leave_and_the_run_is_saved(tmp_path, arguments, rank):
    """It said "saved" on a rank that saves nothing, while the main one waited for it inside a step."""
    (tmp_path / "rank.py").write_text(LOADER)
    settings, run = [*arguments, "--steps", "6"], tmp_path / "run"
    command = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    command += [str(tmp_path / "rank.py"), rank, *settings, "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(ssl_geo.pretrain.__file__).parents[1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert f"scene.tif cannot be read; saved at step 3 of 6: fix the file, then --resume {run}" in done.stderr
    assert runs.last_checkpoint(run)["step"] == 3
    assert main(pretrain_config(["--resume", str(run)])) == 0
    pretrain(tmp_path / "one", settings)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


RANK = """
import os, signal, sys
import ssl_geo.pretrain
from ssl_geo.config import pretrain_config
step = ssl_geo.pretrain.train_step
def step_that_dies(*given, **more):
    if given[4] == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*given, **more)
ssl_geo.pretrain.train_step = step_that_dies
sys.exit(ssl_geo.pretrain.main(pretrain_config()))
"""


def test_a_rank_that_dies_under_torchrun_goes_on_from_the_last_checkpoint(tmp_path, arguments):
    (tmp_path / "rank.py").write_text(RANK)
    settings, run = [*arguments, "--steps", "5", "--log.checkpoint_every", "2"], tmp_path / "run"
    command = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    command += ["--max-restarts", "2", str(tmp_path / "rank.py"), *settings, "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(ssl_geo.pretrain.__file__).parents[1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"going on with {run} from step 2 of 5" in done.stdout
    pretrain(tmp_path / "one", settings)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_restarts_of_torchrun_want_a_run_folder_by_name(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(SystemExit):
        pretrain_config([])
    assert "goes on with the run that --out names" in capsys.readouterr().err


def test_nothing_is_timed_by_a_clock_that_may_jump():
    for file in Path(ssl_geo.__file__).parent.rglob("*.py"):
        assert "time.time(" not in file.read_text(), file
