"""Files of NumPy arrays with checksums: written whole or not at all, read by place.

The checksum guards against broken disks and torn copies, not against malice, so it is the fastest that finds all such
errors: CRC-32.

Rows are read by their place in the file and not through a map: pages of a map stay counted as memory of every process
that touched them, and a map of a file that was cut off kills the process.
"""

from __future__ import annotations

import os
import re
import shlex
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo.files import written_whole
from ssl_geo.imagery.scenes import UnreadableError

_NUMBERS = re.compile(r"[<>|]?[iuf][1248]")  # dtypes
_MAX_OPEN = 256  # files that a process keeps open, far below the usual limit of 1024


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """A .npy file of a packed folder.

    Attributes:
        file: Its name in the folder.
        shape: Of the array.
        dtype: Of the array, for example ``<u2``.
        bytes: Size of the file.
        crc32: Of the whole file.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    crc32: int

    def check(self) -> None:
        """Refuse what a damaged file of JSON may say.

        Raises:
            ValueError: It lies elsewhere, or is no array of numbers.
        """
        if not _NUMBERS.fullmatch(self.dtype):  # bytes read as Python objects would be addresses
            raise ValueError(f"dtype {self.dtype}")
        if Path(self.file).name != self.file:
            raise ValueError(f"{self.file} is no file of the folder")
        if min((self.bytes, *self.shape)) < 0:
            raise ValueError(f"{self.file} of shape {self.shape} and {self.bytes} bytes")


def file_crc32(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


@lru_cache(maxsize=_MAX_OPEN)
def open_array(folder: Path, file: ArrayFile) -> OpenArray:
    """An open file, closed when it is the one used longest ago and no thread reads it any more."""
    return OpenArray(folder / file.file, file)


class OpenArray:
    """An open .npy file; read by place, so that threads and forked processes do not disturb each other."""

    def __init__(self, path: Path, described: ArrayFile) -> None:
        self._path = path
        self._shape = described.shape
        self._dtype = np.dtype(described.dtype)
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else None
                self._start = file.tell()
            if header != (self._shape, False, self._dtype):
                raise ValueError(f"its header says {header}, expected {self._shape}, {self._dtype}")
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        except Exception as error:  # NumPy hands a header's text to Python's parser, which has errors of its own
            raise UnreadableError(f"{path} is damaged ({error}): the pack command that made it mends it") from error

    def read(self, row: int, span: slice) -> npt.NDArray[Any]:
        """Items `span` of a row of the array."""
        item = int(np.prod(self._shape[2:])) * self._dtype.itemsize
        first, last, _ = span.indices(self._shape[1])
        values = np.empty((last - first, *self._shape[2:]), self._dtype)
        start = self._start + (row * self._shape[1] + first) * item
        try:
            count = os.preadv(self._descriptor, [values.data], start)
        except OSError as error:
            raise UnreadableError(f"cannot read {self._path}: {error}") from error
        if count < values.nbytes:
            raise UnreadableError(
                f"{self._path} was cut off: python -m ssl_geo.pack --verify {shlex.quote(str(self._path.parent))}"
            )
        return values


class ArrayWriter:
    """Appends rows to a .npy file and sums it up as it goes."""

    def __init__(self, file: FileIO, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file, self._name, self._shape, self._dtype = file, name, shape, dtype
        self._crc = self._bytes = 0
        header = BytesIO()
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        self._append(header.getvalue())

    def write(self, values: npt.NDArray[Any]) -> None:
        """Append rows."""
        self._append(np.ascontiguousarray(values).data.cast("B"))

    def _append(self, content: bytes | memoryview) -> None:
        self._crc = zlib.crc32(content, self._crc)
        self._bytes += len(content)
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    @property
    def written(self) -> ArrayFile:
        """What was written."""
        return ArrayFile(self._name, self._shape, self._dtype.str, self._bytes, self._crc)


@contextmanager
def array_written_whole(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[ArrayWriter]:
    """Write a .npy file in parts; it appears under its name only when it is complete on the disk."""
    with written_whole(path) as partial, partial.open("wb", buffering=0) as file:
        yield ArrayWriter(file, path.name, shape, dtype)
