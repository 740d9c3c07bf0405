"""Columns of millions of rows that take little memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def mapped_columns(path: str | os.PathLike[str], once: Collection[str]) -> pa.Table:
    """The columns of a Parquet file, each a chunk that lies in a mapped file without a name.

    Decoded column by column, so that the peak is one of them; what is never read never takes memory, and processes
    share what is.

    Args:
        path: The file.
        once: Columns whose values come again and again.
    """
    columns = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in pq.read_schema(path).names:
            column = pq.read_table(path, columns=[name])[name].unify_dictionaries().combine_chunks()
            table = pa.table({name: stored_once(column) if name in once else column})
            file = str(Path(scratch) / "column")
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            with pa.memory_map(file) as mapped:
                columns[name] = pa.ipc.open_file(mapped).read_all()[name]
            Path(file).unlink()
            del column, table
            pa.default_memory_pool().release_unused()
    return pa.table(columns)


def stored_once(column: pa.Array) -> pa.DictionaryArray:
    """The values stored once, and referred to by numbers as small as will do."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    count = len(encoded.dictionary)
    numbers = pa.int8() if count < 2**7 else pa.int16() if count < 2**15 else pa.int32()
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(numbers), encoded.dictionary)
