"""Files that are whole or not there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a hidden path beside `path` to write to; it takes the name of `path` when all of it is on the disk.

    On an error, or where the process dies, `path` stays as it was. Processes and threads do not disturb each other.

    Args:
        path: In a folder that exists.

    Yields:
        The path to write to, with the suffix of `path`.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
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


def _flush_folder(folder: Path) -> None:
    """Put a rename on the disk (POSIX)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
