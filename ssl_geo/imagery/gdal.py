"""GDAL, on which rasterio stands: the files it holds open, the memory it takes, the warnings it gives.

Its dataset handles must cross neither a fork nor a thread: each thread of each process keeps a few of its own.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError  # rasterio.errors lacks it
from rasterio.enums import Interleaving, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from ssl_geo.errors import UserError
from ssl_geo.imagery.scenes import UnreadableError

# Bytes of decoded blocks that GDAL keeps; by itself it takes 5 % of the machine's memory, in each loader worker anew.
BLOCK_CACHE = {} if "GDAL_CACHEMAX" in os.environ else {"GDAL_CACHEMAX": 256_000_000}
# Formats whose one file holds all pixels. Others name files and addresses, which GDAL would open: VRT and WMS by
# design, HFA by its .ige and .rrd files, ENVI by its header; of closed libraries (Kakadu, ECW, MrSID) nobody can tell.
# GDAL_SKIP would not do instead: rasterio registers all drivers again at each outermost Env, in any thread.
_FORMATS = ["GTiff", "JP2OpenJPEG", "PNG", "JPEG"]
# What rasterio raises where GDAL fails; CPLE_BaseError are GDAL's own messages that it has no class for.
FAILURES = (RasterioError, CPLE_BaseError, OSError)
UNREADABLE = (*FAILURES, UnicodeError, MemoryError)  # what it raises for damaged files, and names in no encoding
_MAX_OPEN = 64  # files a thread keeps open: two to six band folders, far below the usual limit of 1024 a process


MAX_BLOCK_BYTES = 1 << 28
"""Largest block, decoded, with the bands stored in it; a whole tile of Sentinel-2 in uint16 has 241 MB."""
_ALWAYS_READ = 4_000_000_000  # bytes of pixels of a whole tile of Sentinel-2 in 13 bands (3.1 GB), if it is all fill
_MAX_RATIO = 2000  # of pixels to file in bytes beyond that; deflate reaches 1032:1 (zlib.net, "Technical Details")
_MAX_SIDE_FILE = 1 << 24  # bytes; statistics and tables of classes take kilobytes
# Where side files are copied to: memory, where there is such a folder; on a disk it takes as long as three headers.
_STAGE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_MASK = ".msk"
_METADATA = ".aux.xml"  # CRS, nodata
_WORLD_FILES = (".tfw", ".tifw", ".tiffw", ".j2w", ".jp2w", ".wld")  # where it lies
_TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}  # SHORT, LONG, LONG8
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF


def side_files(rasters: Iterable[Path]) -> list[Path]:
    """All side files in the folders of some rasters, by one look into each folder."""
    found: list[Path] = []
    for folder in dict.fromkeys(raster.parent for raster in rasters):
        if os.access(folder, os.R_OK):  # a file may be given by name in a folder that cannot be listed
            with os.scandir(folder) as entries:
                kinds = (_MASK, _METADATA, *_WORLD_FILES)
                names = sorted(e.name for e in entries if e.name.lower().endswith(kinds))
            found += [folder / name for name in names]
    return found


def _side_file(name: str, file: str, most: int = _MAX_SIDE_FILE) -> bytes | None:
    """The first `most` bytes of a side file, all of it by default; None where there is none.

    Raises:
        UnreadableError: If it is no regular file, a link that leads out of the raster's folder, or larger than
            `_MAX_SIDE_FILE` and wanted whole.
    """
    try:
        status = os.stat(name)  # noqa: PTH116  # eight times a header: pathlib takes ten times as long
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableError(f"cannot read {name} beside {file}: {error.strerror}") from error
    path, raster = Path(name), Path(file)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(f"{path} beside {raster.name} is no regular file; remove it")
        folders = (raster.parent.resolve(), raster.resolve().parent) if path.is_symlink() else ()
        if folders and path.resolve().parent not in folders:
            raise UnreadableError(f"{path} is a link that leads out of its folder; put the file itself there")
        if most == _MAX_SIDE_FILE < status.st_size:
            raise UnreadableError(f"{path} has {status.st_size} bytes, more than {most}; remove it")
        with path.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise UnreadableError(f"cannot read {path} beside {raster.name}: {error.strerror}") from error


@contextmanager
def described(file: str, *, fresh: bool = False) -> Iterator[rasterio.DatasetReader]:
    """The dataset of a file as its metadata and world files describe it, for its header alone: no pixels, no masks.

    GDAL would look beside a raster for some forty names, open what they are by any driver and follow any link. It
    never does: it is given no folder, and where there are side files one with a link to the raster and their copies.

    Raises:
        UnreadableError: If a side file is not what it should be.
        UserError: If no temporary folder can be made.
    """
    alone = open_datasets.get(file, fresh=fresh)
    path = Path(file)
    stem = file.removesuffix(path.suffix)
    names = {path.suffix + _METADATA: file + _METADATA} | {suffix: stem + suffix for suffix in _WORLD_FILES}
    sides = {name: told for name, beside in names.items() if (told := _side_file(beside, file)) is not None}
    if not sides:
        yield alone
        return
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssl_geo-", dir=_STAGE)))
            link = folder / f"raster{path.suffix}"
            link.symlink_to(path)
            for name, told in sides.items():
                (folder / f"raster{name}").write_bytes(told)
        except OSError as error:
            where = _STAGE or tempfile.gettempdir()
            raise UserError(f"cannot copy the side files of {file} to {where} ({error.strerror}); make room") from error
        with ungeoreferenced_allowed(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="FALSE", **BLOCK_CACHE):
            dataset = stack.enter_context(rasterio.DatasetReader(str(link), driver=_FORMATS))
        yield dataset


def _opened(file: str) -> rasterio.DatasetReader:
    """Open one file and nothing else, whatever lies beside it or is written in it.

    Raises:
        UnreadableError: If it is no regular file, has a name that is not UTF-8, or asks for more memory or time than
            its size justifies.
    """
    status = Path(file).stat()  # of a link that leads nowhere GDAL would open what it holds: an address, for example
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(f"{file} is no regular file (a pipe, a device, a folder); take it out of the archive")
    try:
        file.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"{as_utf8(file)} has a name that is not UTF-8; rename it") from error
    with ungeoreferenced_allowed(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", **BLOCK_CACHE):
        dataset = rasterio.DatasetReader(file, driver=_FORMATS)  # rasterio.open takes but one
    try:
        _refuse_bomb(dataset, file, status.st_size)
    except BaseException:
        dataset.close()
        raise
    return dataset


def as_utf8(path: str) -> str:
    """A path as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _refuse_bomb(dataset: rasterio.DatasetReader, file: str, size: int) -> None:
    """Refuse a header that asks for memory or time out of proportion to the file."""
    height, width, count = dataset.height, dataset.width, dataset.count
    itemsize = max(4 if name == "complex_int16" else np.dtype(name).itemsize for name in dataset.dtypes)
    claimed = height * width * count * itemsize
    if claimed > max(_ALWAYS_READ, _MAX_RATIO * size):
        raise UnreadableError(
            f"{file} claims {height}×{width} pixels, {claimed / 1e9:.0f} GB, with {size} bytes, more than "
            f"{_ALWAYS_READ / 1e9:.0f} GB and {_MAX_RATIO} times the file; cut out what holds pixels "
            "(gdal_translate -srcwin)"
        )
    if dataset.driver == "GTiff":
        rows, cols = dataset.block_shapes[0]
        together = count if dataset.interleaving == Interleaving.pixel else 1
        if any(MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags for flags in dataset.mask_flag_enums):
            mask_rows, mask_cols = _tiff_mask_block(file)
            if mask_rows * mask_cols > rows * cols * together * itemsize:
                rows, cols, together, itemsize = mask_rows, mask_cols, 1, 1
    elif dataset.driver == "JP2OpenJPEG":
        rows, cols, together = _jpeg2000_tile(file)
    else:  # PNG and JPEG may be stored so that they are decoded whole
        rows, cols, together = height, width, count
    if (block := rows * cols * together * itemsize) > MAX_BLOCK_BYTES:
        raise UnreadableError(
            f"{file} stores {rows}×{cols} pixels in one block, {block >> 20} MB when decoded, more than "
            f"{MAX_BLOCK_BYTES >> 20} MB; store it in tiles (gdal_translate -co TILED=YES -co COMPRESS=DEFLATE)"
        )


@contextmanager
def _whole(file: str) -> Iterator[None]:
    """Where a directory ends before it should, the file is cut off."""
    try:
        yield
    except struct.error as error:
        raise UnreadableError(f"{file} is cut off or damaged ({error}); fetch the file again") from error


def _tiff_mask_block(file: str) -> tuple[int, int]:
    """Rows and columns of the largest block of the masks inside a TIFF (TIFF 6.0, sections 2, 8 and 15; BigTIFF).

    GDAL tells the blocks of bands alone.
    """
    largest = (0, 0)
    with Path(file).open("rb") as stream, _whole(file):
        head = stream.read(16)
        order, is_big = "<" if head[:2] == b"II" else ">", b"+" in head[2:4]
        where, entry, count, size = ("Q", "HHQ8s", "Q", 20) if is_big else ("I", "HHI4s", "H", 12)
        (at,) = struct.unpack_from(order + where, head, 8 if is_big else 4)
        for _ in range(1000):  # directories; overviews and masks are a few dozen
            stream.seek(at)
            tags = {}
            (entries,) = struct.unpack(order + count, stream.read(struct.calcsize(order + count)))
            for fields in struct.iter_unpack(order + entry, stream.read(min(entries, 4096) * size)):
                tag, kind, _, value = fields
                if kind in _TIFF_INTEGERS:
                    (tags[tag],) = struct.unpack_from(order + _TIFF_INTEGERS[kind], value)
            if tags.get(254, 0) & 4:  # NewSubfileType: a transparency mask
                height, width = tags.get(257, 0), tags.get(256, 0)
                block = (tags.get(323) or min(tags.get(278, height), height), tags.get(322) or width)
                largest = max(largest, block, key=math.prod)
            following = stream.read(struct.calcsize(order + where))
            (at,) = struct.unpack(order + where, following)
            if at == 0:
                break
    return largest


def _jpeg2000_tile(file: str) -> tuple[int, int, int]:
    """Rows and columns of a tile of JPEG 2000 and its components (ISO/IEC 15444-1, annexes A.5.1 and I.4).

    GDAL calls a part of a larger tile a block, and decodes the tile.
    """
    with Path(file).open("rb") as stream:
        at = 0
        for _ in range(1000):  # boxes; products have less than ten
            stream.seek(at)
            head = stream.read(16)
            if head[:4] == b"\xff\x4f\xff\x51":  # a codestream without boxes
                break
            if len(head) < 16:
                raise UnreadableError(f"{file} holds no JPEG 2000 codestream; fetch the file again")
            length = int.from_bytes(head[:4], "big")
            start = 16 if length == 1 else 8
            if head[4:8] == b"jp2c":
                at += start
                break
            at += int.from_bytes(head[8:], "big") if length == 1 else length or 1 << 62
        stream.seek(at)
        marker = stream.read(42)
    if len(marker) < 42 or marker[:4] != b"\xff\x4f\xff\x51":
        raise UnreadableError(f"{file} holds no JPEG 2000 codestream; fetch the file again")
    width, height, left, top, tile_width, tile_height = struct.unpack(">6I", marker[8:32])
    (components,) = struct.unpack(">H", marker[40:42])
    return min(tile_height, height - top), min(tile_width, width - left), components


class _OpenDatasets(threading.local):
    """The files that this thread of this process holds open, the last used last."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.datasets: OrderedDict[str, rasterio.DatasetReader] = OrderedDict()
        self.inherited: list[object] = []

    def get(self, file: str, *, fresh: bool = False) -> rasterio.DatasetReader:
        """The open dataset of a file; `fresh` opens it again, as it may have been replaced since."""
        if self.process != os.getpid():
            # After a fork: GDAL's handles belong to the parent; kept, so that this process does not close them.
            self.inherited.append(self.datasets)
            self.process, self.datasets = os.getpid(), OrderedDict()
        dataset = self.datasets.pop(file, None)
        if dataset is not None and fresh:
            dataset.close()
            dataset = None
        if dataset is None:
            dataset = _opened(file)
        self.datasets[file] = dataset
        if len(self.datasets) > _MAX_OPEN:
            self.datasets.popitem(last=False)[1].close()
        return dataset

    def mask(self, file: str, *, fresh: bool = False) -> rasterio.DatasetReader | None:
        """The mask beside a file (``NAME.msk``), unless it holds one itself; GDAL would open it by any driver.

        Raises:
            UnreadableError: If it is no GeoTIFF of the file's size, or see `_side_file` and `_opened`.
        """
        beside = file + _MASK
        if (magic := _side_file(beside, file, most=4)) is None:
            return None
        dataset = self.get(file)
        if any(MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags for flags in dataset.mask_flag_enums):
            return None
        if magic not in _TIFF:
            raise UnreadableError(f"{beside} is no GeoTIFF, as masks are; write the mask again or remove it")
        mask = self.get(beside, fresh=fresh)
        if (mask.height, mask.width) != (dataset.height, dataset.width):
            raise UnreadableError(
                f"{beside} has {mask.height}×{mask.width} pixels, its raster {dataset.height}×{dataset.width}; "
                "write the mask again or remove it"
            )
        tags = mask.tags()  # what a mask of GDAL is to its raster; without a word it is none
        flags = [tags.get(f"INTERNAL_MASK_FLAGS_{n}", "") for n in range(1, dataset.count + 1)]
        return mask if any(text.isdecimal() and int(text) & MaskFlags.per_dataset for text in flags) else None

    def drop(self, file: str) -> None:
        """Close a file after a failure."""
        if (dataset := self.datasets.pop(file, None)) is not None:
            dataset.close()


open_datasets = _OpenDatasets()


_quiet_lock = threading.Lock()
_quiet_threads = 0
_quiet_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def ungeoreferenced_allowed() -> Iterator[None]:
    """Ignore rasterio's NotGeoreferencedWarning, and only that, while any thread is inside.

    `warnings.catch_warnings` saves and restores state of the whole process, so threads that enter and leave it
    in turn would restore each other's: the first thread in installs the filter, the last one out removes it.
    """
    global _quiet_threads, _quiet_filters
    with _quiet_lock:
        if _quiet_threads == 0:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
        _quiet_threads += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_threads -= 1
            if _quiet_threads == 0 and _quiet_filters is not None:
                _quiet_filters.__exit__(None, None, None)
