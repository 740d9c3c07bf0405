"""A table that grows by a line with every probe, JSON lines that any program reads."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_geo.errors import UserError

Json = dict[str, Any]
ROOM = 100_000  # bytes; a line takes some 2,000
GAIN_COLUMNS = {"": "value", "_low": "low", "_high": "high"}


def result_row(report: Json) -> Json:
    """What the table holds of a report.json: the chosen model, its scores and gains as numbers, and the headline.

    Args:
        report: As of `ProbeReport.to_json`.
    """
    row: Json = {"ckpt": report["checkpoint"].get("path"), "best": report["best"]}
    for group in report["groups"]:
        if group["name"] == report["best"]:
            row |= {name: group["scores"][name]["value"] for name in group["scores"]}
            row |= {"miou_low": group["scores"]["miou"]["low"], "miou_high": group["scores"]["miou"]["high"]}
            for reference, gain in group["gains"].items():
                row |= {f"over_{reference}{end}": gain and gain[key] for end, key in GAIN_COLUMNS.items()}
    return {**row, "headline": report["headline"]}


def check_table(path: Path) -> None:
    """Refuse a table of results that a line could not be added to, before anything is computed for it.

    Raises:
        UserError: It is no file, cannot be opened for appending or made, or its disk is full.
    """
    kind = "folder" if path.is_dir() else "device or pipe"
    if path.exists() and not path.is_file():
        raise UserError(f"--results {path} is a {kind}; name a file of JSON lines in it, or elsewhere")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        if path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        elif not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        elif not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if shutil.disk_usage(folder).free < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(f"--results {path} cannot be written ({error.strerror}); name another file") from error


def append_result(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a table of results that several processes may write to at once.

    Args:
        path: JSON lines; made where it is missing.
        row: What the line holds, of plain values.

    Raises:
        UserError: The file cannot be written; nothing of the row is then in it.
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # a writer was killed within its line: that one must not spoil this
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"results table {path} cannot be written ({error.strerror}); name another file") from error
