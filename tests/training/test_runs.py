import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geo.errors import UserError
from ssl_geo.files import partial_path
from ssl_geo.training import runs
from ssl_geo.training.lock import Lock
from ssl_geo.training.progress import Progress


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    runs.claim(folder)
    return folder


def content(step: int) -> dict:
    return {"step": step, "weights": torch.arange(5.0) * step}


def test_a_folder_in_use_is_refused_and_left_alone(run):
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is in use and no run"):
        runs.claim(run)
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match="is in use; go on with it by --resume"):
        runs.claim(run)
    assert (run / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_claimed(tmp_path):
    runs.claim(tmp_path)
    assert (tmp_path / "checkpoints").is_dir()


def test_a_run_killed_before_its_settings_were_written_may_be_claimed_again(tmp_path):
    runs.claim(tmp_path)
    (tmp_path / "index.parquet").touch()
    assert not runs.is_run(tmp_path)
    runs.claim(tmp_path)


@pytest.mark.parametrize("name", [".index.4711-140213.parquet", ".index.partial-0a1b2c3d-4711-4712.parquet"])
def test_a_run_killed_while_its_index_was_written_is_begun_again(tmp_path, name):
    """The file half written made the folder "in use and no run", for ever."""
    runs.claim(tmp_path)
    (tmp_path / name).write_bytes(b"PAR1")
    with Lock() as lock:
        runs.begin(tmp_path, lock, lambda path: path.touch(), "seed: 0\n")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "index.parquet", "config.yaml"}


HOLDER = """
import os, sys, time
from pathlib import Path
from ssl_geo.training.lock import Lock
with Lock() as lock:
    lock.take(Path(sys.argv[1]))
    if loader := os.fork():
        print(loader, flush=True)
    time.sleep(600)
"""


def test_a_run_folder_is_locked_until_its_process_ends_however_long_its_loaders_live(run):
    """Two `--resume RUN` once destroyed each other's checkpoints."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        loader = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match=rf"is being written by process {holder.pid} on .* since 20\d\d-"):
                Lock().take(run)
            with pytest.raises(UserError, match=f"process {holder.pid} "):
                runs.begin(run, Lock(), lambda path: path.touch(), "seed: 0\n")
            assert not runs.is_run(run)
            left = [run / ".backbone.12-34.safetensors", run / "checkpoints" / partial_path(run / "step-1.pt").name]
            for path in left:
                path.touch()
            holder.kill()
            holder.wait()
            os.kill(loader, 0)  # lives, and inherited everything but the lock
            with Lock() as lock:
                lock.take(run)
                assert not any(path.exists() for path in left)
            assert not (run / ".lock").exists()
        finally:
            holder.kill()
            os.kill(loader, signal.SIGKILL)


def test_a_file_system_without_locks_is_reported_and_nothing_is_removed(run, monkeypatch):
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (run / ".backbone.12-34.safetensors").touch()
    monkeypatch.setattr(fcntl, "lockf", without)
    said: list[str] = []
    with Lock() as lock:
        lock.take(run, said.append)
    assert "cannot be locked (No locks available)" in said[0]
    assert (run / ".backbone.12-34.safetensors").exists()


def test_a_full_disk_that_hits_the_log_first_is_one_line(run):
    """Closing the log raised over the line that the user was to see."""

    def write() -> None:
        with Progress(run, start=0, steps=9, batch_size=1, main=True) as progress:
            progress._log._file.close()
            progress._log._file = full
            progress.record(1, torch.tensor(1.0), {})

    words = r"log.jsonl could not be written \(No space left on device\); there is no checkpoint yet"
    with Path("/dev/full").open("a") as full, pytest.raises(UserError, match=words):
        write()


def test_the_last_checkpoints_are_kept_and_read_back(run):
    for step in (1, 2, 3):
        runs.save_checkpoint(run, step, content(step), keep=2)
    assert [p.name for p in runs.checkpoints(run)] == ["step-00000002.pt", "step-00000003.pt"]
    assert torch.equal(runs.last_checkpoint(run)["weights"], torch.arange(5.0) * 3)
    assert runs.load_checkpoint(run / "checkpoints" / "step-00000002.pt")["step"] == 2
    assert len(list((run / "checkpoints").iterdir())) == 2  # nothing temporary is left


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
import torch
from ssl_geo.backbones import export_backbone
from ssl_geo.errors import UserError, one_line_errors
from ssl_geo.probing import store
from ssl_geo.training import runs
run = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk: the write fails, nobody is killed
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
def log():
    log = runs.RunLog(run)
    for step in range(9999):
        log.write({"step": step, "note": "x" * 999})
big = torch.zeros(1 << 20)
for write in (
    log,
    lambda: export_backbone(run, torch.nn.Linear(1000, 100), {}),
    lambda: runs.keep_skipped(run, 1, 0, [big], []),
    lambda: store._open(run, 1000, [np.zeros((1, 8, 9, 9)), np.zeros((1, 9, 9))], 0, np.dtype("float16")),
):
    try:
        write()
    except UserError as error:
        print(error)
with one_line_errors("run"):
    runs.save_checkpoint(run, 2, {"step": 2, "weights": big}, keep=1)
"""


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_there_are(run):
    """torch and safetensors wrap the file's error in ones of their own."""
    runs.save_checkpoint(run, 1, content(1), keep=1)
    ended = subprocess.run([sys.executable, "-c", LIMITED, str(run)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "could not be written (File too large)" in line
    others = ended.stdout.splitlines()
    assert len(others) == 4
    assert all("File too large" in line and "make room" in line for line in others)
    assert not list(run.glob("*.npy"))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001.pt"]
    assert runs.last_checkpoint(run)["step"] == 1


def test_what_a_killed_writer_left_is_cleared_away(run):
    (run / "checkpoints" / ".step-00000001.77.pt").write_bytes(b"half")
    runs.save_checkpoint(run, 2, content(2), keep=1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002.pt"]


def test_a_pickle_is_never_run(run, tmp_path):
    proof = tmp_path / "proof"

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {proof}",))

    path = run / "checkpoints" / "step-00000009.pt"
    path.write_bytes(pickle.dumps({"step": 1, "x": Bomb()}))
    with pytest.raises(UserError, match="not a readable file of tensors"):
        runs.load_checkpoint(path)
    torch.save({"step": 1, "x": Bomb()}, path)
    with pytest.raises(UserError, match="torn, or holds other than tensors"):
        runs.load_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_torn_checkpoint_gives_way_to_the_one_before(run, share):
    runs.save_checkpoint(run, 1, content(1), keep=2)
    path = runs.save_checkpoint(run, 2, content(2), keep=2)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    said = []
    assert runs.last_checkpoint(run, said.append)["step"] == 1
    (line,) = said
    assert "set aside as torn-step-00000002.pt" in line
    assert [p.name for p in runs.checkpoints(run)] == ["step-00000001.pt"]


def test_where_all_checkpoints_are_torn_a_second_try_does_not_start_anew(run):
    """The first try set them aside, and so the next found none, started at step 0 and cut the log off."""
    for step in (1, 2):
        path = runs.save_checkpoint(run, step, content(step), keep=2)
        path.write_bytes(path.read_bytes()[:50])
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint that can be read: .*-00000002.pt .*, and so 1 more; start"):
            runs.last_checkpoint(run)
    assert len(runs.checkpoints(run)) == 2


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_noticed_or_changes_nothing(data):
    """torch.load does not compare checksums: it would hand out wrong weights."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "step-00000001.pt"
        torch.save(content(3), path)
        whole = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
        try:
            found = runs.load_checkpoint(path)
        except UserError:
            return
    assert found["step"] == 3
    assert torch.equal(found["weights"], content(3)["weights"])


def test_what_is_no_checkpoint_is_refused(run, tmp_path):
    assert runs.last_checkpoint(run) is None
    with pytest.raises(UserError, match="does not exist"):
        runs.load_checkpoint(tmp_path / "nothing.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="has no 'step'"):
        runs.load_checkpoint(tmp_path / "other.pt")
    (run / "checkpoints" / "step-00000001.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no checkpoint that can be read: .* is torn"):
        runs.last_checkpoint(run)


def test_the_log_forgets_what_came_after_the_resumed_step(run):
    log = runs.RunLog(run)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0 / step})
    log.close()
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    log = runs.RunLog(run, step=2)
    log.write({"step": 3, "loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]


@pytest.mark.parametrize(
    "odd", [b"5", b"[]", b'{"step": null}', b'{"step": "x"}', b"[" * 100_000, b"\xff", b'{"step": 1%s}' % (b"0" * 400)]
)
def test_lines_of_a_log_that_are_none_of_ours_are_dropped(run, odd):
    """They once ended a resumed run in a traceback."""
    (run / "log.jsonl").write_bytes(b'{"step": 1}\n' + odd + b"\n")
    runs.RunLog(run, step=2).close()
    assert (run / "log.jsonl").read_text() == '{"step": 1}\n'


def test_a_log_that_is_a_pipe_is_refused(run):
    os.mkfifo(run / "log.jsonl")
    with pytest.raises(UserError, match="no regular file"):
        runs.RunLog(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with runs.Interruption() as interruption:
        assert interruption.name is None
        os.kill(os.getpid(), number)
        assert interruption.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_leaves_at_once():
    with runs.Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_a_run_goes_on_when_its_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runs.Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.name is None
    finally:
        signal.signal(signal.SIGHUP, before)
