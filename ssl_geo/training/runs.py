"""The run folder: settings, log, checkpoints, and leaving in good order when told to.

RUN/config.yaml            every setting, resolved
RUN/index.parquet          the chips
RUN/log.jsonl              one object a line
RUN/tensorboard/           the same as curves
RUN/checkpoints/step-*.pt  the last few, each complete
RUN/backbone.safetensors   what is kept, with backbone.json beside it
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from ssl_geo.errors import UserError

INTERRUPTED = 75  # exit code of a run that saved and left on a signal (EX_TEMPFAIL of sysexits.h: try again)


def claim(folder: Path) -> None:
    """Make the run folder; one that already holds something belongs to another run.

    Raises:
        UserError: The folder is in use, or its place cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--out {folder} is in use; go on with it by --resume {folder}, or name another folder")
    try:
        (folder / "checkpoints").mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be made ({error.strerror}); name a folder that can be written"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that readers see either the old content or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _replace(temporary, path)


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write RUN/checkpoints/step-N.pt whole or not at all, then drop all but the last `keep`.

    Args:
        folder: The run folder.
        step: Updates done so far.
        content: Tensors and plain values only, so that `torch.load(weights_only=True)` reads it.
        keep: Number of checkpoints left in the folder.
    """
    path = folder / "checkpoints" / f"step-{step:08d}.pt"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"checkpoint {path} could not be written ({error.strerror}); the ones before it are intact: "
            f"make room, then --resume {folder}"
        ) from error
    _replace(temporary, path)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def _replace(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def checkpoints(folder: Path) -> list[Path]:
    """List the run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file, or the last one of a run folder, onto the CPU; nothing is unpickled but tensors.

    Raises:
        UserError: There is none, or it is torn, or holds other than tensors and plain values.
    """
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise UserError(f"{path} holds no checkpoint (looked for checkpoints/step-*.pt); is it a run folder?")
        path = found[-1]
    elif not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder or a checkpoint file")
    if not zipfile.is_zipfile(path):  # torch's container; anything else (a bare pickle) is not even opened
        raise UserError(f"{path} is not a readable checkpoint (not torch's zip container, or torn)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
    ) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path} is not a readable checkpoint of tensors and plain values ({reason})") from error
    if not isinstance(content, dict) or "step" not in content:
        raise UserError(f"{path} is not a checkpoint of ssl_geo (it has no 'step'); name one that pretrain wrote")
    return content


class RunLog:
    """RUN/log.jsonl and RUN/tensorboard/, one record a call; lines after a resumed step are cut off first."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        path = folder / "log.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a")
        self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; its number fields go to TensorBoard too."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._curves.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._curves.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line torn by a kill


class Interruption:
    """Notes SIGTERM, SIGINT and SIGUSR1, so that the loop saves and leaves between two steps.

    A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> Interruption:
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
