"""Peak memory of pretraining's data side as the archive grows 1×, 10×, 100×, against a list of chips and a permutation.

    python benchmarks/memory.py [--chips 10000] [--steps 30]

The archives are sparse: an index of 10,000, 100,000 and 1,000,000 chips of 64 pixels and ten bands, a hundred a scene,
over files that all lead to one GeoTIFF, or over shards that take no room on the disk. Each case is a process of its own
that loads the index and draws batches of views through a loader with one worker; the peer keeps one tuple a chip and
shuffles with torch. The memory is what Linux calls VmHWM, of the process and of its worker; the headline is that at 1×
over that at 100×, of the four cases the worst: 0.91 is a growth of 10 %. Prints one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from paired import finish

from ssl_geo.imagery.arrays import array_written_whole, file_crc32
from ssl_geo.imagery.chips import ChipIndex, IndexSettings
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.packed import INDEX, MANIFEST, Manifest, Shard
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.imagery.statistics import BandStatistics

SIDE, PER_SCENE, BATCH, PER_SHARD = 64, 100, 32, 3000


def main() -> None:
    """Measure every case in its own process and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.case:
        measure(settings.case[0], Path(settings.case[1]), settings.steps)
        return
    peaks: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for times in (1, 10, 100):
            folder = Path(scratch) / f"{times}"
            make_archive(folder, settings.chips * times)
            for kind in ("geotiff", "packed", "peer"):
                command = [sys.executable, __file__, "--steps", str(settings.steps), "--case", kind, str(folder)]
                output = subprocess.check_output(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
                peaks.setdefault(kind, []).append(json.loads(output))
    growth = {
        kind: {who: round(runs[-1][who] / runs[0][who] - 1, 3) for who in runs[0]} for kind, runs in peaks.items()
    }
    worst = max(1 + part for kind in ("geotiff", "packed") for part in growth[kind].values())
    finish(
        "memory",
        1 / worst,
        0.91,
        growth_from_1_to_100=growth,
        chips=[settings.chips * times for times in (1, 10, 100)],
        peak_mb=peaks,
    )


def make_archive(folder: Path, chips: int) -> None:
    """An index, its scenes (links to one GeoTIFF), and a packed folder of shards without content."""
    (folder / "scenes").mkdir(parents=True)
    rng = np.random.default_rng(0)
    dn = rng.integers(1, 5000, (len(DEFAULT_BANDS), SIDE * 10, SIDE * 10)).astype(np.uint16)
    write_geotiff(folder / "scene.tif", dn, crs=None, transform=None, descriptions=DEFAULT_BANDS)
    paths = [folder / "scenes" / f"{number:07}.tif" for number in range(chips // PER_SCENE)]
    for path in paths:
        path.symlink_to(folder / "scene.tif")
    number = np.arange(chips)
    scene = (number // PER_SCENE).astype(np.int32)

    def shared(value: object, kind: pa.DataType) -> pa.Array:
        return pa.array([value], kind).dictionary_encode().take(pa.array(np.zeros(chips, np.int32)))

    columns = {
        "scene": pa.DictionaryArray.from_arrays(scene, [str(path) for path in paths]),
        "row": (number % PER_SCENE // 10 * SIDE).astype(np.int32),
        "col": (number % 10 * SIDE).astype(np.int32),
        "crs": shared("EPSG:32633", pa.string()),
        **{side: rng.random(chips) for side in ("left", "bottom", "right", "top")},
        "valid_fraction": np.ones(chips, np.float32),
        "dtype": shared("uint16", pa.string()),
        "level": shared("L2A", pa.string()),
        "offset": shared(-1000.0, pa.float64()),
        "scale": shared(1e-4, pa.float64()),
        "nodata": shared(None, pa.float64()),
        "date": shared("2023-01-01", pa.string()),
        "shard": (number // PER_SHARD).astype(np.int32),
        "position": (number % PER_SHARD).astype(np.int32),
        "valid_row": np.full(chips, -1, np.int32),
    }
    statistics = BandStatistics(1000, np.full(len(DEFAULT_BANDS), 0.2), np.full(len(DEFAULT_BANDS), 10.0))
    index_settings = IndexSettings(tuple(DEFAULT_BANDS), SIDE)
    index = ChipIndex(pa.table(columns), index_settings, statistics, len(paths), (), (), "synthetic")
    packed = folder / "packed"
    packed.mkdir()
    index.save(packed / INDEX)
    shards = []
    for start in range(0, chips, PER_SHARD):
        shape = (min(PER_SHARD, chips - start), len(DEFAULT_BANDS), SIDE, SIDE)
        name = f"chips-{len(shards):05}.npy"
        with array_written_whole(packed / name, shape, np.dtype(np.uint16)) as writer:
            pass
        os.truncate(packed / name, writer.written.bytes + 2 * int(np.prod(shape)))
        shards.append(Shard(writer.written, None))
    manifest = Manifest(index.bands, SIDE, chips, "synthetic", file_crc32(packed / INDEX), tuple(shards))
    (packed / MANIFEST).write_text(manifest.to_json())


def measure(kind: str, folder: Path, steps: int) -> None:
    """Draw batches as pretraining does, and print the peak memory in MB of this process and of its worker."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from ssl_geo.batches import ViewBatches
    from ssl_geo.imagery.packed import open_chips
    from ssl_geo.training.sampling import StepBatches
    from ssl_geo.views.multicrop import MultiCrop, default_recipes

    index = ChipIndex.load(folder / "packed" / INDEX)
    global_views, local_views = default_recipes(SIDE, 8)
    crops = MultiCrop(index.statistics.mean, index.statistics.std, global_views=global_views, local_views=local_views)
    chips = open_chips(index, [folder / "packed"] if kind == "packed" else [folder / "scenes"])
    views = ViewBatches(chips, crops, 0)
    if kind == "peer":
        table = index.table
        rows = list(zip(*(table[name].to_pylist() for name in ("scene", "row", "col")), strict=True))

        class Listed(Dataset):
            def __len__(self) -> int:
                return len(rows)

            def __getitem__(self, number: int) -> object:
                _path, _row, _col = rows[number]
                return views[[(0, number)]]

        loader = DataLoader(Listed(), BATCH, shuffle=True, num_workers=1)
    else:
        order = StepBatches(chips=len(index), batch_size=BATCH, start=0, stop=steps, seed=0)
        loader = DataLoader(views, sampler=order, batch_size=None, num_workers=1)
    torch.set_num_threads(1)
    batches = iter(loader)
    for _ in range(steps - 1):
        next(batches)
    (worker,) = batches._workers
    print(json.dumps({"process": peak_mb("self"), "worker": peak_mb(worker.pid)}))


def peak_mb(process: int | str) -> float:
    """VmHWM of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000, 1)


if __name__ == "__main__":
    main()
