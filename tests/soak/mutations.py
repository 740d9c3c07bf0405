"""Change bytes of files and read them: an answer or one line, but no crash, no hang, no other exception.

    python tests/soak/mutations.py --count 10000 [READER ...]

Inputs are read in forked children, so that a crash of a C library is seen and counted; one that takes longer than five
seconds is a hang. Ends with code 1 where there was any; the seed of each is printed: --first SEED --count 1 repeats it.
"""

import argparse
import os
import random
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ssl_geo.errors import UserError
from ssl_geo.imagery.arrays import open_array
from ssl_geo.imagery.chips import ChipIndex, build_index
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.packed import PackedChips, packed_index
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.rasters import open_scene, read_labels, read_window
from ssl_geo.training.runs import load_checkpoint
from ssl_geo.weights import read_tensors

LIMIT = 5  # seconds an input may take
MEMORY = 8 << 30  # bytes a child may map: an allocation that a file's header asks for is to fail, not to swap


def scene(path: Path) -> None:
    """A small stack with texture."""
    dn = np.random.default_rng(0).integers(1, 5000, (3, 48, 48)).astype(np.uint16)
    grid = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5, 0.0, -10.0, 5.4e6)}
    write_geotiff(path, dn, **grid, nodata=0, descriptions=["B02", "B03", "B04"])


def make(folder: Path) -> None:
    """One file for each reader."""
    scene(folder / "scene.tif")
    write_geotiff(folder / "labels.tif", np.arange(400, dtype=np.uint8).reshape(1, 20, 20), crs=None, transform=None)
    index = build_index([folder / "scene.tif"], bands=["B02", "B03", "B04"], chip_size=16, progress=False)
    index.save(folder / "index.parquet")
    pack(index, folder / "packed", shard_bytes=1 << 20, workers=1, progress=False)
    torch.save({"step": 1, "method": {"w": torch.arange(99.0)}, "config": {"seed": 0}}, folder / "checkpoint.pt")
    save_file({"w": torch.arange(99.0), "b": torch.zeros(3)}, folder / "weights.safetensors")


def read_scene(path: Path) -> None:
    """Header and pixels."""
    found = open_scene(path)
    size = [min(64, length) for length in (found.height, found.width)]
    read_window(found, found.bands, 0, 0, *size)


def read_index(path: Path) -> None:
    """Metadata and every column."""
    index = ChipIndex.load(path)
    index.report()
    index.table.slice(0, 100).to_pylist()


def read_packed(path: Path) -> None:
    """Index and every chip of the folder that the file belongs to."""
    open_array.cache_clear()
    index = packed_index(path.parent)
    chips = PackedChips(index, path.parent)
    for number in range(min(len(chips), 100)):
        chips[number]


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "geotiff": ("scene.tif", read_scene),
    "labels": ("labels.tif", read_labels),
    "index": ("index.parquet", read_index),
    "checkpoint": ("checkpoint.pt", load_checkpoint),
    "safetensors": ("weights.safetensors", read_tensors),
    "packed.json": ("packed/packed.json", read_packed),
    "shard": ("packed/chips-00000.npy", read_packed),
}


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, doubled or put in, one to eight times; mostly where headers are."""
    content = bytearray(whole)
    for _ in range(draw.randint(1, 8)):
        size = len(content)
        if not size:
            break
        reach = draw.choice([size, min(size, 512), min(size, 64)])
        place = draw.randrange(reach) if draw.random() < 0.7 else size - 1 - draw.randrange(reach)
        kind = draw.randrange(6)
        if kind <= 1:
            content[place] = draw.randrange(256)
        elif kind == 2:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 3:
            width = draw.choice([2, 4, 8])
            content[place : place + width] = draw.choice([b"\0", b"\xff", b"\x7f"]) * width
        elif kind == 4:
            del content[place : place + draw.randint(1, 40)]
        else:
            content[place:place] = content[place : place + draw.randint(1, 40)]
    return bytes(content[: draw.randrange(len(content) + 1)] if draw.random() < 0.1 else content)


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """What reading comes to."""
    try:
        read(path)
    except UserError as error:
        return "refused" if str(error).strip() else "refused without a word"
    except Exception:
        return "exception " + " ".join(traceback.format_exc().split()[-40:])
    return "read"


def forked(read: Callable[[Path], object], folder: Path, file: Path, whole: bytes, seeds: list[int]) -> list[str]:
    """Outcomes of the seeds, by a child for as long as it lives; where it dies or hangs, its last one says so."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries complain there
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for seed in seeds:
            file.write_bytes(mutated(whole, random.Random(seed)))
            os.write(writing, outcome(read, file).encode()[:4000] + b"\n")
        os._exit(0)
    os.close(writing)
    said = b""
    ending = ""
    while True:
        ready, _, _ = select.select([reading], [], [], LIMIT)
        if not ready:
            os.kill(child, signal.SIGKILL)
            ending = "hang"
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        said += part
    os.close(reading)
    _, status = os.waitpid(child, 0)
    outcomes = said.decode(errors="replace").splitlines()
    if len(outcomes) < len(seeds):
        code = os.waitstatus_to_exitcode(status)
        outcomes.append(ending or f"crash ({signal.Signals(-code).name if code < 0 else code})")
    return outcomes


def main() -> int:
    """Mutate and read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("readers", nargs="*", default=list(READERS))
    given = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for reader in given.readers:
            path, read = READERS[reader]
            file = folder / path
            whole = file.read_bytes()
            seeds, counts = list(range(given.first, given.first + given.count)), Counter[str]()
            while seeds:
                outcomes = forked(read, folder, file, whole, seeds[:500])
                for seed, found in zip(seeds, outcomes, strict=False):
                    counts[found.split()[0]] += 1
                    if found not in ("read", "refused"):
                        bad += 1
                        print(f"{reader} --first {seed}: {found}", flush=True)
                seeds = seeds[len(outcomes) :]
            file.write_bytes(whole)
            print(f"{reader}: {given.count} inputs, {dict(sorted(counts.items()))}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
