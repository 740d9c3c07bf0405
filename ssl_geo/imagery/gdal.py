"""GDAL, on which rasterio stands: the files it holds open, the memory it takes, the warnings it gives.

Its dataset handles must cross neither a fork nor a thread: each thread of each process keeps a few of its own.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rasterio
from rasterio._err import CPLE_BaseError  # rasterio.errors lacks it
from rasterio.errors import NotGeoreferencedWarning, RasterioError

# Bytes of decoded blocks that GDAL keeps; by itself it takes 5 % of the machine's memory, in each loader worker anew.
BLOCK_CACHE = {} if "GDAL_CACHEMAX" in os.environ else {"GDAL_CACHEMAX": 256_000_000}
# Formats that hold their pixels themselves. Others (VRT, WMS ...) name files and addresses, which GDAL would open.
_FORMATS = ["GTiff", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "PNG", "JPEG", "HFA", "ENVI"]
# What rasterio raises where GDAL fails; CPLE_BaseError are GDAL's own messages that it has no class for.
FAILURES = (RasterioError, CPLE_BaseError, OSError)
UNREADABLE = (*FAILURES, UnicodeError, MemoryError)  # what it raises for damaged files, and names in no encoding
_MAX_OPEN = 64  # files a thread keeps open: two to six band folders, far below the usual limit of 1024 a process


_AFTER_NAME = (".msk", ".aux.xml")  # masks; metadata (CRS, nodata)
_FOR_SUFFIX = (".tfw", ".tifw", ".tiffw", ".j2w", ".jp2w", ".wld", ".hdr")  # world files; ENVI's headers


def _has_side_file(file: Path) -> bool:
    beside = [file.with_name(file.name + suffix) for suffix in _AFTER_NAME]
    beside += [file.with_suffix(suffix) for suffix in _FOR_SUFFIX]
    return any(path.exists() for path in beside)


def side_files(rasters: Iterable[Path]) -> list[Path]:
    """All side files in the folders of some rasters, by one look into each folder."""
    found: list[Path] = []
    for folder in dict.fromkeys(raster.parent for raster in rasters):
        if os.access(folder, os.R_OK):  # a file may be given by name in a folder that cannot be listed
            with os.scandir(folder) as entries:
                names = sorted(e.name for e in entries if e.name.lower().endswith((*_AFTER_NAME, *_FOR_SUFFIX)))
            found += [folder / name for name in names]
    return found


class _OpenDatasets(threading.local):
    """The files that this thread of this process holds open, the last used last."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.datasets: OrderedDict[str, rasterio.DatasetReader] = OrderedDict()
        self.inherited: list[object] = []

    def get(self, file: str, *, fresh: bool = False) -> rasterio.DatasetReader:
        """The open dataset of a file; `fresh` opens it anew, as it may have been replaced since."""
        if self.process != os.getpid():
            # After a fork: GDAL's handles belong to the parent; kept, so that this process does not close them.
            self.inherited.append(self.datasets)
            self.process, self.datasets = os.getpid(), OrderedDict()
        dataset = self.datasets.pop(file, None)
        if dataset is not None and fresh:
            dataset.close()
            dataset = None
        if dataset is None:
            # A scan of the folder costs more than reading a chip: the side files that count are asked for by name.
            sides = "TRUE" if _has_side_file(Path(file)) else "EMPTY_DIR"
            with ungeoreferenced_allowed(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN=sides, **BLOCK_CACHE):
                dataset = rasterio.DatasetReader(file, driver=_FORMATS)  # rasterio.open takes but one
        self.datasets[file] = dataset
        if len(self.datasets) > _MAX_OPEN:
            self.datasets.popitem(last=False)[1].close()
        return dataset

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
