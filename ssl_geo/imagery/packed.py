"""Packed chips: the chips of an index written once, as stored, so that reading one is a single read of bytes.

    FOLDER/packed.json        format version, bands, chip size, and the files of every shard with their CRC-32
    FOLDER/index.parquet      the chip index, with three more columns: the chip's ``shard``, its ``position`` in it, and
                              its ``valid_row``, -1 where it is valid throughout
    FOLDER/chips-00000.npy    (n, C, h, w) DN of one dtype
    FOLDER/valid-00000.npy    (m, ⌈h·w / 8⌉) uint8, only where a chip of the shard is not valid throughout: a bit a
                              pixel as `numpy.packbits` lays them

Every file opens with NumPy (``numpy.load(…, mmap_mode="r")``) or pandas, and `ssl_geo.imagery.arrays` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ssl_geo.documents import read_json
from ssl_geo.errors import UserError
from ssl_geo.imagery.arrays import ArrayFile, file_crc32, open_array
from ssl_geo.imagery.chips import ChipIndex, IndexSettings
from ssl_geo.imagery.datasets import Chip, ChipDataset
from ssl_geo.imagery.sensors import canonical_band
from ssl_geo.schema import conform
from ssl_geo.threads import in_order

VERSION = 1
MANIFEST = "packed.json"
JOURNAL = "packing.jsonl"  # in its place until the folder is complete
INDEX = "index.parquet"


@dataclass(frozen=True, slots=True)
class Shard:
    """The files of a shard; `valid` is None where all its chips are valid throughout."""

    chips: ArrayFile
    valid: ArrayFile | None

    @property
    def files(self) -> list[ArrayFile]:
        """One or two."""
        return [self.chips] if self.valid is None else [self.chips, self.valid]

    def check(self) -> None:
        """Refuse what a damaged file of JSON may say.

        Raises:
            ValueError: One of its files is none of the folder, or holds no numbers.
        """
        for file in self.files:
            file.check()


@dataclass(frozen=True)
class Manifest:
    """What packed.json says.

    Attributes:
        bands: Canonical names, in the order of the channels.
        chip_size: Pixels of a chip along each axis.
        chips: How many there are.
        fingerprint: Of the index that was packed.
        index_crc32: Of index.parquet.
        shards: In order.
    """

    bands: tuple[str, ...]
    chip_size: int
    chips: int
    fingerprint: str
    index_crc32: int
    shards: tuple[Shard, ...]

    def to_json(self) -> str:
        """A line each for what is said once, and for each shard."""
        shards = ",\n    ".join(json.dumps(asdict(shard)) for shard in self.shards)
        head = {"format": "ssl_geo.packed", "version": VERSION, **asdict(replace(self, shards=()))}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items() if key != "shards"]
        return "{\n" + ",\n".join([*lines, f'  "shards": [\n    {shards}\n  ]']) + "\n}\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read FOLDER/packed.json.

        Raises:
            UserError: If it is damaged or of another version.
        """
        path = folder / MANIFEST
        content = read_json(path, fix=f"delete {folder} and pack again")
        if isinstance(content, dict) and (version := content.get("version")) != VERSION:
            raise UserError(f"{path} is of version {version}, this program reads {VERSION}: pack again")
        try:
            told = {name: value for name, value in content.items() if name not in ("format", "version")}
            manifest: Manifest = conform(told, cls, MANIFEST)
            for shard in manifest.shards:
                shard.check()
        except (AttributeError, ValueError) as error:  # AttributeError: a list
            raise UserError(f"{path} cannot be read ({error}): delete {folder} and pack again") from error
        return manifest


def packed_folder(paths: Sequence[Path | str]) -> Path | None:
    """The packed folder that the paths name, None where they name imagery.

    Raises:
        UserError: If packing it has not come to its end, or something else is named beside it.
    """
    for path in map(Path, paths):
        if (path / JOURNAL).is_file():
            raise UserError(f"{path} is not completely packed: run the same python -m ssl_geo.pack command again")
        if (path / MANIFEST).is_file():
            if len(paths) > 1:
                raise UserError(f"--data names {path}, a folder of packed chips, beside others: give it alone")
            return path
    return None


def packed_index(folder: Path, *, bands: Sequence[str] | None = None, **settings: Any) -> ChipIndex:
    """The index of a packed folder, for all its bands or some of them.

    Args:
        folder: From `packed_folder`.
        bands: Names in the order wanted; None for those packed. Whether a pixel is valid was decided with all of
            the packed bands, and so were the chips and the statistics chosen.
        **settings: Of `build_index`, the chip size too; one that is set to other than what was packed is refused,
            None is what was packed.

    Raises:
        UserError: If the folder lacks what is asked for or is damaged; it names what is there and how to pack.
    """
    manifest = Manifest.load(folder)
    for file in (file for shard in manifest.shards for file in shard.files):
        path = folder / file.file
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
            raise UserError(f"{path} {found}: run the same python -m ssl_geo.pack command again, it mends {folder}")
    index = read_index(folder, manifest)
    wanted = tuple(canonical_band(band) or band for band in bands or index.bands)
    defaults = {field.name: field.default for field in fields(IndexSettings)}
    for name, value in {"bands": wanted, **settings}.items():
        packed = getattr(index.settings, name)
        value = tuple(value) if isinstance(value, list) else value
        fits = set(value) <= set(packed) if name == "bands" else value in (None, packed, defaults[name])
        if not fits:
            said, there = (" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (value, packed))
            raise UserError(
                f"{folder} was packed with --data.{name} {there}, not {said}: ask for what is there, or pack anew by "
                f"python -m ssl_geo.pack --data DIR --data.{name} {said} --out FOLDER"
            )
    if not wanted or len(set(wanted)) < len(wanted):
        raise UserError(f"--data.bands {' '.join(wanted)}: name one band or more, each once")
    return index.with_bands(wanted)


def read_index(folder: Path, manifest: Manifest) -> ChipIndex:
    """FOLDER/index.parquet.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / INDEX
    if not path.is_file() or file_crc32(path) != manifest.index_crc32:
        raise UserError(f"{path} is missing or damaged: delete {folder} and pack anew")
    return ChipIndex.load(path, mend=f"delete {folder} and pack anew")


def open_chips(index: ChipIndex, paths: Sequence[Path | str]) -> ChipDataset | PackedChips:
    """The chips of an index, from the packed folder that the paths name or from the scenes."""
    folder = packed_folder(paths)
    return ChipDataset(index) if folder is None else PackedChips(index, folder)


class PackedChips:
    """The chips of an index, read by number from a packed folder; to be used like `ChipDataset`.

    Holds no open file: it may be pickled and forked; each process opens its own.
    """

    def __init__(self, index: ChipIndex, folder: Path) -> None:
        """Take the chips of `packed_index(folder)`, or of a copy of it.

        Raises:
            UserError: If the folder was packed from another index since.
        """
        manifest = Manifest.load(folder)
        if index.fingerprint != manifest.fingerprint:
            raise UserError(f"{folder} was packed anew from other imagery or settings since: start anew with --out")
        _check_fit(manifest, index, folder)
        self.bands = index.bands
        self.chip_size = index.chip_size
        self._folder = folder
        self._shards = manifest.shards
        channels = [manifest.bands.index(band) for band in index.bands]
        self._span = slice(min(channels), max(channels) + 1)  # what is read in one go
        self._channels = None if channels == list(range(*self._span.indices(len(manifest.bands)))) else channels
        columns = [index.table[name].chunk(0).to_numpy() for name in ("shard", "position", "valid_row")]
        self._shard, self._position, self._valid_row = columns
        self._units = [index.table[name].chunk(0) for name in ("scale", "offset", "nodata")]

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, i: int) -> Chip:
        """Read chip `i`.

        Raises:
            IndexError: If there is no such chip.
            UnreadableError: If a file cannot be read.
        """
        i = range(len(self))[i]
        shard = self._shards[self._shard[i]]
        dn = open_array(self._folder, shard.chips).read(int(self._position[i]), self._span)
        if self._channels is not None:
            dn = dn[[channel - self._span.start for channel in self._channels]]
        size, row = self.chip_size, int(self._valid_row[i])
        if row < 0 or shard.valid is None:
            valid = np.ones((size, size), np.bool_)
        else:
            bits = open_array(self._folder, shard.valid).read(row, slice(None))
            valid = np.unpackbits(bits, count=size * size).view(np.bool_).reshape(size, size)
        scale, offset, nodata = (column[i].as_py() for column in self._units)
        return Chip(dn, valid, self.bands, scale, offset, nodata)


def _check_fit(manifest: Manifest, index: ChipIndex, folder: Path) -> None:
    """Refuse a packed.json that was damaged such that it describes other arrays than the index refers to."""
    shape, shards = (len(manifest.bands), index.chip_size, index.chip_size), manifest.shards
    numbers, positions = (index.table[name].chunk(0).to_numpy() for name in ("shard", "position"))
    counts = np.bincount(numbers, minlength=len(shards)).tolist() if len(numbers) and numbers.min() >= 0 else []
    if (
        not set(index.bands) <= set(manifest.bands)
        or counts != [shard.chips.shape[0] for shard in shards]
        or any(shard.chips.shape[1:] != shape for shard in shards)
        or (positions < 0).any()
        or (positions >= np.array(counts)[numbers]).any()
    ):
        raise UserError(f"{folder / MANIFEST} does not fit {INDEX}, one is damaged: delete {folder} and pack anew")


def damaged_shards(folder: Path, shards: Sequence[Shard], *, workers: int, progress: bool) -> list[int]:
    """Read every file of the shards and compare it with its checksum: the numbers of those that differ or are gone."""

    def intact(shard: Shard) -> bool:
        paths = [folder / file.file for file in shard.files]
        return all(path.is_file() for path in paths) and all(
            file_crc32(path) == file.crc32 for path, file in zip(paths, shard.files, strict=True)
        )

    results = in_order(intact, shards, workers)
    bar = tqdm(results, "verifying", len(shards), unit=" shards", delay=2, disable=not progress)
    return [number for number, good in enumerate(bar) if not good]


def verify(folder: Path, *, workers: int, progress: bool = True) -> str:
    """Compare every shard of a packed folder with its checksum, and say what was found.

    Raises:
        UserError: If it is no packed folder or a shard is damaged.
    """
    if packed_folder([folder]) is None:
        raise UserError(f"{folder} is no folder of packed chips: it has no {MANIFEST}")
    manifest = Manifest.load(folder)
    packed_index(folder)
    if damaged := damaged_shards(folder, manifest.shards, workers=workers, progress=progress):
        names = ", ".join(manifest.shards[number].chips.file for number in damaged[:5])
        raise UserError(
            f"{len(damaged)} of {len(manifest.shards)} shards of {folder} are damaged ({names}"
            f"{', …' if len(damaged) > 5 else ''}): run the pack command that made it again, it mends them"
        )
    return f"{folder}: {manifest.chips} chips in {len(manifest.shards)} shards, every checksum right"
