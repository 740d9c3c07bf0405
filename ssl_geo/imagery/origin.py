"""What a result was made from: a digest of all that decides it, which its file carries, so that it is made once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ssl_geo.errors import UserError
from ssl_geo.imagery.geotiff import read_tags
from ssl_geo.imagery.scenes import Scene

MADE_FROM = "made_from"
_SAID_ONLY = ("offset_source", "level", "overruled")
_MOST_JSON = 1 << 24  # bytes; areas of 255 classes take 60 kB


def content_digest(path: Path) -> str:
    """Of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scene_state(scene: Scene) -> dict[str, Any]:
    """What decides a scene's pixels and place: how it is read; its files and masks, their size and time of change.

    Raises:
        UserError: A file is gone.
    """
    files = sorted({source.file for source in scene.sources})
    state = []
    for file in [*files, *(mask for file in files if Path(mask := file + ".msk").exists())]:
        try:
            status = Path(file).stat()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        state.append([file, status.st_size, status.st_mtime_ns])
    read = {name: value for name, value in asdict(scene).items() if name not in _SAID_ONLY}
    return {"scene": read, "files": state}


def made_from(path: Path) -> str | None:
    """The digest that a GeoTIFF, GeoParquet or JSON file carries; None where it has none or cannot be read."""
    try:
        if path.suffix == ".parquet":
            found = (pq.read_schema(path).metadata or {}).get(MADE_FROM.encode(), b"").decode()
        elif path.suffix == ".json":
            content = json.loads(path.read_text()) if path.stat().st_size <= _MOST_JSON else {}
            found = content["provenance"][MADE_FROM]
        else:
            found = read_tags(path).get(MADE_FROM, "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException):
        return None  # not written here
    return found or None if isinstance(found, str) else None
