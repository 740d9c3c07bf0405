"""The run folder: settings, log, checkpoints, and leaving in good order when told to.

RUN/config.yaml            every setting, resolved
RUN/index.parquet          the chips
RUN/warnings.txt           what was warned of the imagery at the start, if anything was
RUN/log.jsonl              one object a line
RUN/tensorboard/           the same as curves
RUN/checkpoints/step-*.pt  the last few, each complete
RUN/backbone.safetensors   what is kept, with backbone.json beside it
RUN/skipped/               the views of the first steps that were not finite, if there were any
RUN/.lock                  who writes here, while somebody does
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from ssl_geo.documents import parse_json
from ssl_geo.errors import UserError, tell
from ssl_geo.files import partial_files, written_whole
from ssl_geo.training.lock import Lock
from ssl_geo.weights import check_whole, read_torch

Batch = TypeVar("Batch")

SKIPPED_KEPT = 5  # steps that were not finite whose views are kept
INTERRUPTED = 75  # exit code of a run that saved and left on a signal (EX_TEMPFAIL of sysexits.h: try again)


def claim(folder: Path) -> None:
    """Make the run folder; one that already holds something belongs to another run.

    Raises:
        UserError: The folder is in use, or its place cannot be written.
    """
    if is_run(folder):
        raise UserError(f"--out {folder} is in use; go on with it by {resume_option(folder)}, or name another folder")
    # What a run leaves that was killed before its settings were written is no run.
    begun = {folder / name for name in ("checkpoints", "index.parquet", ".lock")} | {*partial_files(folder)}
    if folder.exists() and not (folder.is_dir() and {*folder.iterdir()} <= begun):
        raise UserError(f"--out {folder} is in use and no run; name another folder")
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be made ({error.strerror}); name a folder that can be written"
        ) from error


def begin(folder: Path, lock: Lock, save_index: Callable[[Path], None], settings: str) -> None:
    """Claim the folder, lock it, and write what makes it a run: its index, then its settings.

    Raises:
        UserError: The folder is in use, or cannot be written.
    """
    claim(folder)
    lock.take(folder)
    claim(folder)  # another run may have begun here between the two
    path = folder / "index.parquet"
    with _room_for(path, lambda: "make room, then run the same command again"):
        save_index(path)
    write_settings(folder, settings)


def write_settings(folder: Path, settings: str) -> None:
    """Write RUN/config.yaml: where it is, there is a run.

    Raises:
        UserError: It cannot be written.
    """
    path = folder / "config.yaml"
    with _room_for(path, lambda: "make room, then run the same command again"), written_whole(path) as partial:
        partial.write_text(settings)


def keep_warnings(folder: Path, lines: Sequence[str]) -> None:
    """Write what was warned of at the start to RUN/warnings.txt, for the report; nothing where nothing was.

    Raises:
        UserError: It cannot be written.
    """
    path = folder / "warnings.txt"
    if lines:
        with _room_for(path, lambda: _resuming(folder)), written_whole(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), errors="backslashreplace")


def kept_warnings(folder: Path) -> list[str]:
    """What was warned of when the run began."""
    path = folder / "warnings.txt"
    return path.read_text().splitlines() if path.is_file() else []


def is_run(folder: Path) -> bool:
    """Whether a run began here: its settings and its index are whole (the settings are written last)."""
    return (folder / "config.yaml").is_file()


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write RUN/checkpoints/step-N.pt whole or not at all; once it was read back, drop all but the last `keep`.

    Args:
        folder: The run folder.
        step: Updates done so far.
        content: Tensors and plain values only, so that `torch.load(weights_only=True)` reads it.
        keep: Number of checkpoints left in the folder.

    Raises:
        UserError: It could not be written; those before it are as they were.
    """
    path = folder / "checkpoints" / f"step-{step:08d}.pt"
    with _room_for(path, lambda: _resuming(folder)), written_whole(path) as partial:
        with partial.open("wb") as file:
            torch.save(content, file)
        check_whole(partial)
    for old in [*checkpoints(folder)[:-keep], *path.parent.glob(".step-*")]:  # those half written when a run was killed
        old.unlink()
    return path


@contextmanager
def _room_for(path: Path, fix: Callable[[], str]) -> Iterator[None]:
    """Report in one line what could not be written, most often because the disk is full, and how to resume."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch wraps what the file says
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise UserError(f"{path} could not be written ({reason}); {fix()}") from error


def resume_option(folder: Path) -> str:
    """What resumes a run, as a shell takes it."""
    return f"--resume {shlex.quote(str(folder))}"


def _resuming(folder: Path) -> str:
    """What is left of a run that cannot write, and what to do."""
    if not folder.is_dir():
        return f"{folder} was moved or removed: give --resume the folder where it is now"
    if not (folder / "checkpoints").is_dir():
        return f"{folder / 'checkpoints'} was moved or removed: put it back, then {resume_option(folder)}"
    if kept := checkpoints(folder):
        return f"the checkpoints up to {kept[-1].name} are intact: make room, then {resume_option(folder)}"
    return f"there is no checkpoint yet: make room, then {resume_option(folder)} starts again at step 0"


def keep_skipped(folder: Path, step: int, rank: int, views: Sequence[Tensor], chips: list[dict[str, Any]]) -> Path:
    """Write the views of a step that was not finite to RUN/skipped/, to be looked at; of the first few such steps.

    Args:
        folder: The run folder.
        step: Its number.
        rank: Of the process that saw them.
        views: Each (B, C, h, w).
        chips: What names each of the B chips; goes into the file's metadata as JSON.
    """
    path = folder / "skipped" / f"step-{step:08d}-rank-{rank}.safetensors"
    if len(list(path.parent.glob(f"step-*-rank-{rank}.safetensors"))) < SKIPPED_KEPT:
        tensors = {f"view-{number}": view.cpu().contiguous() for number, view in enumerate(views)}
        with _room_for(path, lambda: _resuming(folder)):
            path.parent.mkdir(exist_ok=True)
            with written_whole(path) as partial:
                save_file(tensors, partial, metadata={"chips": json.dumps(chips)})
    return path.parent


def checkpoints(folder: Path) -> list[Path]:
    """List the run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def last_checkpoint(folder: Path, say: Callable[[str], None] = tell) -> dict[str, Any] | None:
    """Read the run's last checkpoint that is whole, or None where it was stopped before its first.

    Those after it are set aside under another name, and said; where all are torn they stay as they are.

    Raises:
        UserError: All are torn.
    """
    torn: list[tuple[Path, UserError]] = []
    for path in reversed(checkpoints(folder)):
        try:
            content = load_checkpoint(path)
        except UserError as error:
            torn.append((path, error))
            continue
        for other, why in torn:
            other.rename(other.with_name(f"torn-{other.name}"))
            say(f"{why}; set aside as torn-{other.name}, going back to {path.name}")
        return content
    if torn:
        raise UserError(
            f"{folder} holds no checkpoint that can be read: {torn[0][1]}"
            f"{f', and so {len(torn) - 1} more' if len(torn) > 1 else ''}; start anew with --out"
        )
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU; nothing is unpickled but tensors.

    Raises:
        UserError: There is none, or it is torn, or holds other than tensors and plain values.
    """
    content = read_torch(path)
    if "step" not in content:
        raise UserError(f"{path} is not a checkpoint of ssl_geo (it has no 'step'); name one that pretrain wrote")
    return content


class RunLog:
    """RUN/log.jsonl and RUN/tensorboard/, one record a call; lines after a resumed step are cut off first."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._folder, self._path = folder, folder / "log.jsonl"
        with _room_for(self._path, lambda: _resuming(folder)):
            self._open(self._path, step)

    def _open(self, path: Path, step: int) -> None:
        if path.exists():
            if not path.is_file():
                raise UserError(f"{path} is no regular file; remove it, then {_resuming(self._folder)}")
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            with written_whole(path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        self._curves = _Curves(self._folder / "tensorboard", step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; its number fields go to TensorBoard too.

        Raises:
            UserError: It could not be written.
        """
        with _room_for(self._path, lambda: _resuming(self._folder)):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            self._curves.write(int(numbers.pop("step")), numbers)

    def close(self) -> None:
        """Flush both.

        Raises:
            UserError: They could not be written.
        """
        with _room_for(self._path, lambda: _resuming(self._folder)):
            try:
                self._file.close()
            finally:
                self._curves.close()


class _Curves:
    """A file of events for TensorBoard. Its own writer reports what fails from a thread, as a traceback of that one."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        started = datetime.datetime.now().timestamp()
        name = f"events.out.tfevents.{started:.0f}.{socket.gethostname()}.{os.getpid()}.{step}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        if step:  # what an earlier process wrote of later steps is not shown
            self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._add(
            Event(step=step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]))
        )
        self._file.flush()

    def _add(self, event: Event) -> None:
        event.wall_time = datetime.datetime.now().timestamp()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")  # a line torn by a kill, or none of ours


class Stopped(BaseException):
    """Told to stop where nothing is lost by leaving at once."""


class Interruption:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1, so that the loop saves and leaves between two steps.

    A second SIGINT raises KeyboardInterrupt at once. Under nohup, SIGHUP goes on being ignored.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._at_once = False

    def __enter__(self) -> Interruption:
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup)
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, the signal raises `Stopped`, whatever is waited for; so does one that was noted before."""
        try:
            self._at_once = True
            if self.name is not None:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def until_told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on; end where the signal comes while one is waited for."""
        iterator = iter(batches)
        while True:
            try:
                with self.at_once():
                    batch = next(iterator)
            except (Stopped, StopIteration):
                return
            yield batch

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._at_once:
            self._at_once = False  # the next signal is to disturb nobody who saves
            raise Stopped
