import json
import os
import pickle
import signal

import pytest
import torch

from ssl_geo.errors import UserError
from ssl_geo.training import runs


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    runs.claim(folder)
    return folder


def content(step: int) -> dict:
    return {"step": step, "weights": torch.arange(5.0) * step}


def test_a_folder_in_use_is_refused_and_left_alone(run):
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is in use; go on with it by --resume"):
        runs.claim(run)
    assert (run / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_claimed(tmp_path):
    runs.claim(tmp_path)
    assert (tmp_path / "checkpoints").is_dir()


def test_the_last_checkpoints_are_kept_and_read_back(run):
    for step in (1, 2, 3):
        runs.save_checkpoint(run, step, content(step), keep=2)
    assert [p.name for p in runs.checkpoints(run)] == ["step-00000002.pt", "step-00000003.pt"]
    assert torch.equal(runs.load_checkpoint(run)["weights"], torch.arange(5.0) * 3)
    assert runs.load_checkpoint(run / "checkpoints" / "step-00000002.pt")["step"] == 2
    assert len(list((run / "checkpoints").iterdir())) == 2  # nothing temporary is left


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(run, monkeypatch):
    runs.save_checkpoint(run, 1, content(1), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        runs.save_checkpoint(run, 2, content(2), keep=1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001.pt"]
    assert runs.load_checkpoint(run)["step"] == 1


def test_a_pickle_is_never_run(run, tmp_path):
    proof = tmp_path / "proof"

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {proof}",))

    path = run / "checkpoints" / "step-00000009.pt"
    path.write_bytes(pickle.dumps({"step": 1, "x": Bomb()}))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        runs.load_checkpoint(run)
    torch.save({"step": 1, "x": Bomb()}, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        runs.load_checkpoint(run)
    assert not proof.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_torn_checkpoint_is_one_clear_line(run, share):
    path = runs.save_checkpoint(run, 1, content(1), keep=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        runs.load_checkpoint(run)


def test_what_is_no_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        runs.load_checkpoint(run)
    with pytest.raises(UserError, match="does not exist"):
        runs.load_checkpoint(tmp_path / "nothing.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="has no 'step'"):
        runs.load_checkpoint(tmp_path / "other.pt")


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
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
