"""Writing packed chips (`ssl_geo.imagery.packed` tells the format): each block of pixels decoded once, by threads.

Until all is written the folder has no packed.json but packing.jsonl: a line for what is packed, then one for each
finished shard. Finished shards are kept by whoever goes on, the one in the making is written anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from ssl_geo.documents import parse_json
from ssl_geo.errors import UserError
from ssl_geo.files import written_whole
from ssl_geo.imagery.arrays import ArrayFile, array_written_whole, file_crc32
from ssl_geo.imagery.chips import ChipIndex
from ssl_geo.imagery.packed import INDEX, JOURNAL, MANIFEST, Manifest, Shard, damaged_shards, read_index
from ssl_geo.imagery.rasters import open_scene, read_window
from ssl_geo.imagery.scan import BLOCK_PIXELS
from ssl_geo.schema import conform
from ssl_geo.threads import in_order

_INDEX_BYTES = 100  # a chip takes at most in index.parquet, on the safe side


@dataclass(frozen=True)
class _Plan:
    """Where each chip goes: those of one dtype in the order of the index, shard by shard.

    Attributes:
        shard: (N,) number of its shard.
        position: (N,) place in it.
        members: Of each shard, its chips in order.
        dtypes: Of each shard.
    """

    shard: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    members: list[npt.NDArray[np.int64]]
    dtypes: list[np.dtype[Any]]

    @classmethod
    def of(cls, index: ChipIndex, shard_bytes: int) -> _Plan:
        names = index.table["dtype"].chunk(0)
        codes = names.indices.to_numpy()
        plan = cls(np.empty(len(index), np.int32), np.empty(len(index), np.int32), [], [])
        for code, name in enumerate(names.dictionary.to_pylist()):
            dtype = np.dtype(name)
            chips = np.flatnonzero(codes == code)
            size = max(1, shard_bytes // (len(index.bands) * index.chip_size**2 * dtype.itemsize))
            for start in range(0, len(chips), size):
                members = chips[start : start + size]
                plan.shard[members] = len(plan.members)
                plan.position[members] = np.arange(len(members))
                plan.members.append(members)
                plan.dtypes.append(dtype)
        return plan


class _Written(NamedTuple):
    """A finished shard, and the positions of those of its chips that are not valid throughout."""

    shard: Shard
    partly: list[int]


def pack(
    index: ChipIndex, folder: Path, *, shard_bytes: int = 256_000_000, workers: int = 1, progress: bool = True
) -> list[str]:
    """Write the chips of an index into a packed folder, or go on where that was interrupted.

    Finished shards are verified by their checksums and kept; so a folder with damaged shards is mended, too.

    Args:
        index: The chips.
        folder: Made where it is missing.
        shard_bytes: Most that the DN of a shard take; a shard has one chip at least.
        workers: Threads that read.
        progress: Show bars where it takes more than two seconds.

    Returns:
        Lines to print.

    Raises:
        UserError: If the folder holds something else, room does not suffice, or a file cannot be read.
    """
    plan = _Plan.of(index, shard_bytes)
    with _claimed(folder):
        written = _finished(index, folder, plan)
        numbers = sorted(written)
        shards = [written[number].shard for number in numbers]
        bad = [numbers[i] for i in damaged_shards(folder, shards, workers=workers, progress=progress)]
        if (folder / MANIFEST).exists() and not bad:
            (folder / JOURNAL).unlink(missing_ok=True)
            return [f"{folder} holds these {len(index)} chips already, every checksum right"]
        for number in bad:
            del written[number]
        lines = []
        if written or bad:
            lines.append(f"going on with {folder}: {len(written)} of {len(plan.members)} shards are written and intact")
        if bad:
            lines.append(f"{len(bad)} damaged shards are written anew")
        todo = [number for number in range(len(plan.members)) if number not in written]
        _check_room(index, folder, plan, todo)
        head = {**_head(index, plan), "finished": [_record(number, written[number]) for number in sorted(written)]}
        try:
            with written_whole(folder / JOURNAL) as partial:
                partial.write_text(json.dumps(head) + "\n")
            (folder / MANIFEST).unlink(missing_ok=True)
            for number, shard in _write_shards(index, folder, plan, todo, workers=workers, progress=progress):
                written[number] = shard
                with (folder / JOURNAL).open("a") as journal:
                    journal.write(json.dumps(_record(number, shard)) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())
            manifest = _finish(index, folder, plan, [written[number] for number in range(len(plan.members))])
        except OSError as error:
            raise UserError(
                f"packing into {folder} failed ({error.strerror or error}); {len(written)} finished shards are kept: "
                "make room and run the same command again"
            ) from error
    size = sum(file.bytes for shard in manifest.shards for file in shard.files)
    return [*lines, f"{folder}: {len(index)} chips in {len(manifest.shards)} shards, {size / 1e9:.3g} GB"]


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Make the folder and hold it alone; the lock goes with the process, however that ends.

    Raises:
        UserError: If it cannot be made, holds something else, or another process packs into it.
    """
    known = {MANIFEST, JOURNAL, INDEX}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if names and not names & {MANIFEST, JOURNAL}:
            raise UserError(f"--out {folder} holds {min(names)} and no packed chips: name a new or empty folder")
        foreign = {n for n in names - known if not n.startswith(("chips-", "valid-"))}
        if foreign:
            raise UserError(f"--out {folder} holds {min(foreign)} beside packed chips: name a new or empty folder")
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be made ({error.strerror}); name a folder that can be written"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process packs into --out {folder}: wait for it or name another folder") from error
        for left in (file for name in (*known, "chips-*", "valid-*") for file in folder.glob(f".{Path(name).stem}.*")):
            left.unlink()  # by one that was killed
        yield
    finally:
        os.close(descriptor)


def _head(index: ChipIndex, plan: _Plan) -> dict[str, Any]:
    """What must be the same for shards to be kept."""
    return {"fingerprint": index.fingerprint, "chips": len(index), "shards": [len(m) for m in plan.members]}


def _record(number: int, written: _Written) -> dict[str, Any]:
    return {"shard": number, **asdict(written.shard), "partly": written.partly}


class _RecordJson(TypedDict):
    shard: int
    chips: ArrayFile
    valid: ArrayFile | None
    partly: list[int]


def _finished_shard(record: Any) -> tuple[int, _Written]:
    """Number and files of a shard, from a line of the journal."""
    told: _RecordJson = conform(record, _RecordJson, JOURNAL)
    shard = Shard(told["chips"], told["valid"])
    shard.check()
    return told["shard"], _Written(shard, told["partly"])


def _finished(index: ChipIndex, folder: Path, plan: _Plan) -> dict[int, _Written]:
    """The shards that the folder says it has, by number."""
    other = UserError(f"--out {folder} holds chips of other imagery or settings: delete it or name another folder")
    if (folder / MANIFEST).exists():
        manifest = Manifest.load(folder)
        sizes = [shard.chips.shape[0] for shard in manifest.shards]
        if (manifest.fingerprint, sizes) != (index.fingerprint, [len(m) for m in plan.members]):
            raise other
        rows = read_index(folder, manifest).table["valid_row"].chunk(0).to_numpy()
        partly = [np.flatnonzero(rows[members] >= 0).tolist() for members in plan.members]
        return {n: _Written(*pair) for n, pair in enumerate(zip(manifest.shards, partly, strict=True))}
    if not (folder / JOURNAL).exists():
        return {}
    try:
        first, *lines = (folder / JOURNAL).read_text().splitlines()
        head = parse_json(first)
        records = head.pop("finished")
        if head != json.loads(json.dumps(_head(index, plan))):
            raise other
        for line in lines:
            try:
                records.append(parse_json(line))
            except ValueError:
                break  # torn by a kill
        return dict(map(_finished_shard, records))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if error is other:
            raise
        raise UserError(f"{folder / JOURNAL} cannot be read ({error!r}): delete {folder} and pack anew") from error


def _check_room(index: ChipIndex, folder: Path, plan: _Plan, todo: Sequence[int]) -> None:
    pixels = index.chip_size**2
    partly = index.table["valid_fraction"].chunk(0).to_numpy() < 1
    need = len(index) * _INDEX_BYTES
    for number in todo:
        members = plan.members[number]
        need += len(members) * len(index.bands) * pixels * plan.dtypes[number].itemsize
        need += int(partly[members].sum()) * -(-pixels // 8)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"packing {len(index)} chips needs {need / 1e9:.3g} GB more, {folder} has {free / 1e9:.3g} GB free: make "
            "room or name a folder on another disk with --out"
        )


def _write_shards(
    index: ChipIndex, folder: Path, plan: _Plan, todo: Sequence[int], *, workers: int, progress: bool
) -> Iterator[tuple[int, _Written]]:
    """Read by threads, write in order: the shards that are to be written, one after another."""
    describe = lru_cache(maxsize=64)(lambda path: open_scene(path, **index.settings.scene_settings))
    size = index.chip_size

    def read(block: _Block) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        scene = describe(block.scene)
        if scene.dtype != plan.dtypes[block.shard].name:
            raise UserError(f"{block.scene} changed while it was packed: run the same command again")
        top, left = int(block.rows.min()), int(block.cols.min())
        height, width = int(block.rows.max()) - top + size, int(block.cols.max()) - left + size
        dn, valid = read_window(scene, index.bands, top, left, height, width)
        windows = [np.s_[r : r + size, c : c + size] for r, c in zip(block.rows - top, block.cols - left, strict=True)]
        return np.stack([dn[:, *window] for window in windows]), np.stack([valid[window] for window in windows])

    blocks, again = _blocks(index, plan, todo), _blocks(index, plan, todo)
    results = zip(again, in_order(read, blocks, workers), strict=True)
    total = sum(len(plan.members[number]) for number in todo)
    with tqdm(desc="packing", total=total, unit=" chips", delay=2, disable=not progress) as bar:
        for number in todo:
            count = len(plan.members[number])
            shape = (count, len(index.bands), size, size)
            partly: list[int] = []
            bits: list[npt.NDArray[np.uint8]] = []
            with array_written_whole(folder / f"chips-{number:05}.npy", shape, plan.dtypes[number]) as chips:
                done = 0
                while done < count:
                    _, (dn, valid) = next(results)
                    chips.write(dn)
                    some = np.flatnonzero(~valid.all(axis=(1, 2)))
                    partly += (done + some).tolist()
                    bits.append(np.packbits(valid.reshape(len(valid), -1)[some], axis=1))
                    done += len(dn)
                    bar.update(len(dn))
            invalid: ArrayFile | None = None
            if partly:
                rows = np.concatenate(bits)
                with array_written_whole(folder / f"valid-{number:05}.npy", rows.shape, rows.dtype) as file:
                    file.write(rows)
                invalid = file.written
            yield number, _Written(Shard(chips.written, invalid), partly)


class _Block(NamedTuple):
    """Neighbouring chips of one scene that follow each other in a shard, read at once."""

    shard: int
    scene: str
    rows: npt.NDArray[np.int32]
    cols: npt.NDArray[np.int32]


def _blocks(index: ChipIndex, plan: _Plan, todo: Sequence[int]) -> Iterator[_Block]:
    """Cut the shards' rows of chips where the scene changes or the chips reach further than a block's side."""
    table = index.table
    paths, scenes = table["scene"].chunk(0).dictionary, table["scene"].chunk(0).indices.to_numpy()
    all_rows, all_cols = (table[name].chunk(0).to_numpy() for name in ("row", "col"))
    reach = max(BLOCK_PIXELS - index.chip_size, 0)
    for number in todo:
        members = plan.members[number]
        scene, rows, cols = scenes[members], all_rows[members], all_cols[members]
        start = 0
        bounds = [rows[0], rows[0], cols[0], cols[0]]
        for i, (r, c) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
            wider = [min(bounds[0], r), max(bounds[1], r), min(bounds[2], c), max(bounds[3], c)]
            if scene[i] != scene[start] or wider[1] - wider[0] > reach or wider[3] - wider[2] > reach:
                yield _Block(number, paths[int(scene[start])].as_py(), rows[start:i], cols[start:i])
                start, wider = i, [r, r, c, c]
            bounds = wider
        yield _Block(number, paths[int(scene[start])].as_py(), rows[start:], cols[start:])


def _finish(index: ChipIndex, folder: Path, plan: _Plan, written: Sequence[_Written]) -> Manifest:
    """Write the index and, last of all, packed.json."""
    valid_row = np.full(len(index), -1, np.int32)
    for members, (_, partly) in zip(plan.members, written, strict=True):
        valid_row[members[partly]] = np.arange(len(partly))
    table = index.table
    for name, column in (("shard", plan.shard), ("position", plan.position), ("valid_row", valid_row)):
        table = table.append_column(name, pa.array(column))
    replace(index, table=table).save(folder / INDEX)
    shards = tuple(shard for shard, _ in written)
    crc32 = file_crc32(folder / INDEX)
    manifest = Manifest(index.bands, index.chip_size, len(index), index.fingerprint, crc32, shards)
    with written_whole(folder / MANIFEST) as partial:
        partial.write_text(manifest.to_json())
    (folder / JOURNAL).unlink()
    return manifest
