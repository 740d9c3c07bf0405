"""Columns of millions of rows that take little memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ssl_geo.errors import UserError


class ScratchError(UserError):
    """The folder for scratch files cannot be written: nothing is wrong with the file that is read."""


def mapped_columns(path: str | os.PathLike[str], once: Collection[str]) -> pa.Table:
    """The columns of a Parquet file, each a chunk that lies in a mapped file without a name.

    Decoded column by column, so that the peak is one of them; what is never read never takes memory, and processes
    share what is.

    Args:
        path: The file.
        once: Columns whose values come again and again.

    Raises:
        ScratchError: The folder for scratch files has no room for them.
    """
    columns = {}
    for name in pq.read_schema(path).names:
        column = pq.read_table(path, columns=[name])[name].unify_dictionaries().combine_chunks()
        table = pa.table({name: stored_once(column) if name in once else column})
        try:
            columns[name] = _mapped(table)[name]
        except OSError as error:  # of the scratch file: nothing is wrong with the one that is read
            raise ScratchError(
                f"no scratch file can be written to {_scratch()} ({os.strerror(error.errno or 0)}), where the columns "
                f"of {path} would lie: make room there, or set TMPDIR to a folder on another disk"
            ) from error
        del column, table
        pa.default_memory_pool().release_unused()
    return pa.table(columns)


def _mapped(table: pa.Table) -> pa.Table:
    """The same table in a mapped file without a name."""
    with tempfile.TemporaryDirectory() as scratch:
        file = str(Path(scratch) / "column")
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        with pa.memory_map(file) as mapped:
            return pa.ipc.open_file(mapped).read_all()


def _scratch() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # no folder for them can be written at all
        return os.environ.get("TMPDIR", "/tmp")


def stored_once(column: pa.Array) -> pa.DictionaryArray:
    """The values stored once, and referred to by numbers as small as will do."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    count = len(encoded.dictionary)
    numbers = pa.int8() if count < 2**7 else pa.int16() if count < 2**15 else pa.int32()
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(numbers), encoded.dictionary)
