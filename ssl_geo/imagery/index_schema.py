"""What index.parquet may hold: a file from anywhere is held against this before a column of it is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssl_geo.documents import parse_json
from ssl_geo.errors import UserError
from ssl_geo.imagery.survey import LeftOut
from ssl_geo.schema import conform

METADATA_KEY = b"ssl_geo.chips"
SHARED = ("scene", "crs", "dtype", "level", "offset", "scale", "nodata", "date")
"""Columns whose values all chips of a scene share."""
_TEXT, _NUMBER = pa.string(), pa.float64()
_COLUMNS = {"row": pa.int32(), "col": pa.int32(), "valid_fraction": pa.float32()}
_COLUMNS |= dict.fromkeys(("left", "bottom", "right", "top"), _NUMBER)
_COLUMNS |= dict.fromkeys(("scene", "crs", "dtype", "level", "date"), _TEXT)
_COLUMNS |= dict.fromkeys(("offset", "scale", "nodata"), _NUMBER)
_PACKED = dict.fromkeys(("shard", "position", "valid_row"), pa.int32())  # of a packed folder's index
_MAY_BE_NULL = {"crs", "level", "nodata", "date"}
_MAX_ROWS = 200_000_000
_ROWS_A_BYTE = 100  # of the file; one row repeated 20 million times takes 17 a byte, real ones less


class _Statistics(TypedDict):
    count: int
    mean: list[float]
    m2: list[float]


class _Metadata(TypedDict):
    format_version: int
    settings: dict[str, Any]
    statistics: _Statistics
    scene_count: int
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    fingerprint: str


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what the file's schema tells beside the columns.

    Raises:
        UserError: It is no chip index, tells something of another type, or claims more rows than it can hold.
        OSError: It cannot be read; pyarrow.ArrowException and ValueError likewise.
    """
    if not Path(path).is_file():  # a pipe would be waited for, where no signal is heard
        why = "is no regular file" if Path(path).exists() else "does not exist"
        raise UserError(f"{path} cannot be read as a chip index (it {why})")
    with pq.ParquetFile(path) as file:
        rows, told = file.metadata.num_rows, (file.schema_arrow.metadata or {}).get(METADATA_KEY)
    if told is None:
        raise UserError(f"{path} is no chip index")
    if rows > min(_MAX_ROWS, _ROWS_A_BYTE * Path(path).stat().st_size):
        raise UserError(f"{path} claims {rows:,} chips, more than its size can hold")
    metadata: dict[str, Any] = conform(parse_json(told.decode()), _Metadata, str(path))
    statistics = metadata["statistics"]
    bands = len(metadata["settings"].get("bands", ()))
    for name in ("mean", "m2"):
        if len(statistics[name]) != bands:
            raise UserError(f"{path}: statistics.{name} has {len(statistics[name])} values for {bands} bands")
    if min([statistics["count"], metadata["scene_count"], *statistics["m2"]]) < 0:
        raise UserError(f"{path}: statistics or scene_count hold a negative number")
    return metadata


def check_columns(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Refuse columns that are missing, of another type, or hold what no index does.

    Args:
        table: As `ssl_geo.imagery.columns.mapped_columns` gives it.
        path: Where it is from, for the message.

    Raises:
        UserError: Naming the column.
    """
    wanted = _COLUMNS | (_PACKED if "shard" in table.column_names else {})
    for name, kind in wanted.items():
        if name not in table.column_names:
            raise UserError(f"{path} lacks the column {name}")
        column = table[name]
        found = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if found != kind:
            raise UserError(f"{path}: the column {name} holds {found}, not {kind}")
        if column.null_count and name not in _MAY_BE_NULL:
            raise UserError(f"{path}: the column {name} lacks {column.null_count} values")
        if name in SHARED:
            _check_shared(name, column.chunk(0).dictionary.to_pylist() if len(column) else [], path)
        elif len(column):
            _check_numbers(name, column, path)


def _check_numbers(name: str, column: pa.ChunkedArray, path: str | os.PathLike[str]) -> None:
    least = -1 if name == "valid_row" else -np.inf if name in ("left", "bottom", "right", "top") else 0
    limits = pc.min_max(column).as_py()
    finite = pa.types.is_integer(column.type) or pc.all(pc.is_finite(column)).as_py()
    if not finite or limits["min"] < least or (name == "valid_fraction" and limits["max"] > 1):
        raise UserError(f"{path}: the column {name} holds {limits['min']} to {limits['max']}")


def _check_shared(name: str, values: list[Any], path: str | os.PathLike[str]) -> None:
    for value in values:
        if name == "dtype":
            fits = isinstance(value, str) and value in _DTYPES
        elif name in ("offset", "scale"):
            fits = np.isfinite(value) and (value != 0 or name == "offset")
        else:
            continue
        if not fits:
            raise UserError(f"{path}: the column {name} holds {value!r}")


_DTYPES = {np.dtype(code).name for code in "bBhHiIqQefd"}
