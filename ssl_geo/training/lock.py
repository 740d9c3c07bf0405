"""One process at a time writes to a folder of results: its .lock tells who, while somebody does."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

from ssl_geo.errors import UserError, tell
from ssl_geo.files import partial_files


class Lock:
    """Keeps other processes from writing to a run folder, until it is released or this process ends, however it ends.

    It is a record lock of POSIX, so that loader processes do not inherit it when they are forked, and NFS knows it.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def take(self, folder: Path, say: Callable[[str], None] = tell) -> None:
        """Lock the folder and remove what killed writers left there; a file system without locks is reported.

        Raises:
            UserError: Another process holds it; or the folder cannot be written.
        """
        path = folder / ".lock"
        try:
            descriptor = self._locked(path)
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): let no other process write to it meanwhile")
            return
        self._path, self._descriptor = path, descriptor
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        except OSError as error:
            raise UserError(f"{path} could not be written ({error.strerror}): make room") from error
        for place in (folder, folder / "checkpoints", folder / "skipped"):
            for left in partial_files(place):
                left.unlink(missing_ok=True)

    def _locked(self, path: Path) -> int:
        """The descriptor of the file, locked."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise UserError(f"{path} cannot be written ({error.strerror}): name a folder that can") from error
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                text = os.read(descriptor, 300).decode(errors="replace")
                os.close(descriptor)
                if not isinstance(error, BlockingIOError | PermissionError):
                    raise
                holder = "".join(letter for letter in text if letter.isprintable()) or "another process"
                raise UserError(
                    f"{path.parent} is being written by {holder}: wait until that has ended, or stop it; where its "
                    f"host has crashed, delete {path}"
                ) from error
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # whoever held it has just removed it

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            if _is_at(self._descriptor, self._path):  # the folder may have been moved, and another be there now
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._path = None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
