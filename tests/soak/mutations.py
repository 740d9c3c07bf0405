"""Change files and read them: an answer or one line, but no crash, no hang, no other exception, and no code that runs.

    python tests/soak/mutations.py --count 10000 [READER ...]

Inputs are read in forked children, so that a crash of a C library is seen and counted; one that takes longer than ten
seconds is a hang, one that takes more than 2 GB a failure. A module that leaves a mark when it is imported and a port
that counts connections see what an input makes the program do. Ends with code 1 where there was anything; the seed of
each is printed: --first SEED --count 1 repeats it.
"""

import argparse
import io
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import mutators
import numpy as np
import torch
from mutators import Mutate, checkpoint_values, file_bytes, index_values, json_values, side_file, yaml_values
from safetensors.torch import save_file

from ssl_geo.backbones import export_backbone, load_backbone
from ssl_geo.config import pretrain_config, to_yaml
from ssl_geo.errors import UserError
from ssl_geo.imagery.arrays import open_array
from ssl_geo.imagery.chips import ChipIndex, build_index
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.packed import PackedChips, packed_index
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.pairing import read_splits
from ssl_geo.imagery.rasters import open_scene, read_labels, read_window
from ssl_geo.pretrain import prepare
from ssl_geo.probing.saved import HeadDescription, read_description
from ssl_geo.probing.store import stored_chips
from ssl_geo.state import State
from ssl_geo.training.lock import Lock
from ssl_geo.training.runs import load_checkpoint
from ssl_geo.weights import read_tensors

LIMIT = 10  # seconds an input may take
MOST = 2 << 20  # kB of memory that a child may come to
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
    scene(folder / "masked.tif")
    write_geotiff(folder / "mask.tif", np.full((1, 48, 48), 255, np.uint8), crs=None, transform=None)
    (folder / "mask.tif").rename(folder / "masked.tif.msk")
    (folder / "masked.tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:32632</SRS></PAMDataset>")
    (folder / "masked.tfw").write_text("10\n0\n0\n-10\n600000\n5400000\n")
    make_run(folder)
    (folder / "splits.json").write_text(json.dumps({"a": "train", "b": "test", "c": "val"}))
    (folder / "store").mkdir()
    (folder / "store" / "store.json").write_text(
        json.dumps({"done": 3, "chips": 9, "dtype": "float16", "names": ["a"]})
    )
    save_file({"w": torch.arange(99.0), "b": torch.zeros(3)}, folder / "weights.safetensors")


def make_run(folder: Path) -> None:
    """A run of two steps with a small network, its head, and a recipe."""
    out = folder / "run"
    argv = ["--data", str(folder / "scene.tif"), "--data.bands", "B02", "B03", "B04", "--data.chip_size", "16"]
    argv += [
        "--backbone.name",
        "test_resnet",
        "--dino.hidden_dim",
        "16",
        "--dino.out_dim",
        "8",
        "--optim.batch_size",
        "4",
    ]
    argv += ["--steps", "2", "--data.workers", "0", "--data.cache", str(folder / "cache"), "--out", str(out)]
    config = pretrain_config([*argv, "--dino.bottleneck_dim", "8", "--device", "cpu", "--log.health_every", "50"])
    (folder / "recipe.yaml").write_text(to_yaml(config))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run = prepare(config, Lock())
        RUNS.append((config, run.state.index, run.state.crops, run.ranks))
        for parameter in run.state.method.student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.state.optimizer.step()
        torch.save(run.state.checkpoint(), folder / "checkpoint.pt")
        export_backbone(out, run.state.method.backbone, run.state.description())
    (folder / "head").mkdir()
    description = HeadDescription(
        name="linear @ layer1",
        kind="linear",
        layers=("layer1",),
        channels=(16,),
        reduction=(4,),
        chip_size=16,
        bands=("B02", "B03", "B04"),
        mean=(0.1, 0.1, 0.1),
        std=(0.2, 0.2, 0.2),
        class_ids=(0, 1),
        class_names=("a", "b"),
        class_colours=((0, 0, 0), (1, 2, 3)),
        checkpoint="run",
        confusion=np.ones((3, 2, 2), np.int64),
    )
    (folder / "head" / "head.json").write_text(json.dumps(description.to_json()))


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


def read_settings(path: Path) -> None:
    """A recipe of pretrain."""
    settings(lambda: pretrain_config(["--config", str(path)]))


def read_run(path: Path) -> None:
    """RUN/config.yaml."""
    settings(lambda: pretrain_config(["--resume", str(path.parent)]))


def settings(read: Callable[[], object]) -> None:
    """As a command reads them: one line and code 2 are a refusal."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            read()
    except SystemExit as ended:
        line = said.getvalue().strip()
        if ended.code == 2 and line and "\n" not in line and line.isprintable():
            raise UserError(line) from None
        raise RuntimeError(f"exit code {ended.code}: {line[:200]!r}") from None


def resume(path: Path) -> None:
    """A checkpoint into the run that it is of, and one more update."""
    config, index, crops, ranks = RUNS[0]
    state = State(config, index, crops, ranks, load_checkpoint(path))
    for parameter in state.method.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()


RUNS: list[tuple[Any, ...]] = []  # of one run: what a state is built from

READERS: dict[str, tuple[str, Callable[[Path], object], Mutate]] = {
    "geotiff": ("scene.tif", read_scene, file_bytes),
    "labels": ("labels.tif", read_labels, file_bytes),
    "mask": ("masked.tif.msk", lambda path: read_scene(path.with_suffix("")), side_file),
    "metadata": ("masked.tif.aux.xml", lambda path: read_scene(path.with_name("masked.tif")), side_file),
    "world file": ("masked.tfw", lambda path: read_scene(path.with_suffix(".tif")), side_file),
    "recipe": ("recipe.yaml", read_settings, yaml_values),
    "config.yaml": ("run/config.yaml", read_run, yaml_values),
    "index": ("index.parquet", read_index, file_bytes),
    "index table": ("index.parquet", read_index, index_values),
    "checkpoint": ("checkpoint.pt", load_checkpoint, file_bytes),
    "resumed": ("checkpoint.pt", resume, checkpoint_values),
    "safetensors": ("weights.safetensors", read_tensors, file_bytes),
    "backbone.json": ("run/backbone.json", lambda path: load_backbone(path.parent), json_values),
    "head.json": ("head/head.json", lambda path: read_description(path.parent), json_values),
    "splits": ("splits.json", lambda path: read_splits(path, "--split.file"), json_values),
    "store.json": ("store/store.json", lambda path: stored_chips(path.parent), json_values),
    "packed.json": ("packed/packed.json", read_packed, file_bytes),
    "packed.json values": ("packed/packed.json", read_packed, json_values),
    "shard": ("packed/chips-00000.npy", read_packed, file_bytes),
}


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """What reading comes to."""
    try:
        read(path)
    except UserError as error:
        return "refused" if str(error).strip() else "refused without a word"
    except Exception:
        return "exception " + " ".join(traceback.format_exc().split()[-40:])
    return "read"


def forked(read: Callable[[Path], object], mutate: Mutate, file: Path, whole: bytes, seeds: list[int]) -> list[str]:
    """Outcomes of the seeds, by a child for as long as it lives; where it dies or hangs, its last one says so."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries complain there
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for seed in seeds:
            file.write_bytes(mutate(whole, random.Random(seed)))
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
    _, status, used = os.wait4(child, 0)
    outcomes = said.decode(errors="replace").splitlines()
    if len(outcomes) < len(seeds):
        code = os.waitstatus_to_exitcode(status)
        outcomes.append(ending or f"crash ({signal.Signals(-code).name if code < 0 else code})")
    if used.ru_maxrss > MOST:
        outcomes[-1] = f"memory {used.ru_maxrss >> 10} MB, of one of the last {len(outcomes)}"
    return outcomes


def listening() -> tuple[socket.socket, list[str]]:
    """A port of this machine that counts who connects, and the connections so far."""
    server, seen = socket.create_server(("127.0.0.1", 0)), []

    def accept() -> None:
        while True:
            connection, address = server.accept()
            seen.append(str(address))
            connection.close()

    threading.Thread(target=accept, daemon=True).start()
    return server, seen


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
        server, connections = listening()
        mutators.CANARY = f"http://127.0.0.1:{server.getsockname()[1]}/"
        (folder / "tripwire.py").write_text(f"import os\nos.mkdir({str(folder / 'PWNED')!r})\nclass Bomb: pass\n")
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        for reader in given.readers:
            path, read, mutate = READERS[reader]
            file = folder / path
            whole = file.read_bytes()
            if (untouched := outcome(read, file)) != "read":
                raise SystemExit(f"{reader}: the file as it was made is not read: {untouched}")
            seeds, counts = list(range(given.first, given.first + given.count)), Counter[str]()
            while seeds:
                outcomes = forked(read, mutate, file, whole, seeds[:500])
                for seed, found in zip(seeds, outcomes, strict=False):
                    counts[found.split()[0]] += 1
                    if found not in ("read", "refused"):
                        bad += 1
                        print(f"{reader} --first {seed}: {found}", flush=True)
                seeds = seeds[len(outcomes) :]
            file.write_bytes(whole)
            print(f"{reader}: {given.count} inputs, {dict(sorted(counts.items()))}", flush=True)
            if connections or (folder / "PWNED").exists():
                bad += 1
                print(f"{reader}: {len(connections)} connections, code run: {(folder / 'PWNED').exists()}", flush=True)
        os.chdir("/")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
