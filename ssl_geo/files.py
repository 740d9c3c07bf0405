"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The first versions' names lack the host.
_PARTIAL = re.compile(r"\..+\.(?:partial-(?P<host>[0-9a-f]{8})-)?(?P<process>\d+)-\d+(?:\.[^.]*)?")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a hidden path beside `path` to write to; it takes the name of `path` when all of it is on the disk.

    On an error, or where the process dies, `path` stays as it was. Processes and threads do not disturb each other.

    Args:
        path: In a folder that exists.

    Yields:
        The path to write to, with the suffix of `path`.
    """
    partial = partial_path(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode  # that of new files here; safetensors lets nobody else read its own
        partial.unlink()
        yield partial
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where this thread writes what is to become `path`: a hidden name that tells who writes."""
    return path.with_name(f".{path.stem}.partial-{_host()}-{os.getpid()}-{threading.get_native_id()}{path.suffix}")


def partial_files(folder: Path) -> list[Path]:
    """What writers have begun in a folder and not finished: at work, or killed. It counts nowhere as content."""
    return [path for path in folder.glob(".*") if _PARTIAL.fullmatch(path.name)]


def remove_stale(folder: Path) -> int:
    """Remove the partial files in a folder whose writers were processes of this host and live no longer; how many."""
    removed = 0
    for path in partial_files(folder):
        written_by = _PARTIAL.fullmatch(path.name)
        if written_by and written_by["host"] == _host() and not _lives(int(written_by["process"])):
            with suppress(PermissionError):  # somebody else's, who may remove it
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _flush_folder(folder: Path) -> None:
    """Put a rename on the disk (POSIX)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
