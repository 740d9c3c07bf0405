"""Chips a second from disk to batches of views: packed, against a plain Dataset of rasterio and albumentations.

    python benchmarks/loader.py [--chips 200] [--batches 6] [--rounds 5]

Both make 2 global views of 120 and 6 local views of 56 pixels of chips of ten bands, in batches of 8, with 0, 1 and 2
loader workers. The plain one opens the chip's GeoTIFF with rasterio and makes one transform a step, as
benchmarks/views.py has it. The headline is the median of the paired ratios without workers. Prints one JSON object.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import rasterio
import torch
from paired import finish, numbers
from read import BANDS, SIDE, write_stacks
from torch.utils.data import DataLoader, Dataset
from views import plain

from ssl_geo.batches import ViewBatches
from ssl_geo.imagery.chips import build_index
from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.packed import open_chips, packed_index
from ssl_geo.imagery.packing import pack
from ssl_geo.training.sampling import StepBatches
from ssl_geo.views.multicrop import MultiCrop, default_recipes

BATCH = 8


class PlainDataset(Dataset):
    """Open, read, divide, one pipeline a view."""

    def __init__(self, files: list[Path], pipelines: list) -> None:
        self.files, self.pipelines = files, pipelines

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        with rasterio.open(self.files[number]) as dataset:
            image = np.ascontiguousarray((dataset.read() / np.float32(10_000)).astype(np.float32).transpose(1, 2, 0))
        return [pipeline(image=image)["image"] for pipeline in self.pipelines]


def main() -> None:
    """Write and pack the archive, draw batches both ways in turn, and print the figures."""
    settings = numbers(__doc__, chips=200, batches=6, rounds=5)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        stacks, packed = write_stacks(Path(scratch) / "stacks", settings.chips), Path(scratch) / "packed"
        index = build_index([stacks], bands=BANDS, chip_size=SIDE, progress=False)
        pack(index, packed, workers=len(os.sched_getaffinity(0)), progress=False)
        global_views, local_views = default_recipes(SIDE, 8, channel_repeat=1.0, rotate90=False)
        mean, std = index.statistics.mean, index.statistics.std
        crops = MultiCrop(mean, std, global_views=global_views, local_views=local_views)
        pipelines = [plain(recipe, mean, std) for recipe in crops.recipes]
        ours = ViewBatches(open_chips(packed_index(packed), [packed]), crops, 0)
        from_scenes = ViewBatches(ChipDataset(index), crops, 0)
        peer = PlainDataset(sorted(stacks.iterdir()), pipelines)
        starts = itertools.count(step=100)

        def order() -> StepBatches:  # other chips each time, so that GDAL's cache does not hold them
            return StepBatches(chips=len(index), batch_size=BATCH, start=next(starts), stop=10**6, seed=0)

        def drawn(make: Callable[[], DataLoader], workers: int) -> Callable[[], float]:
            def run() -> float:
                batches = iter(make())
                for _ in range(2 * workers + 1):  # those made beforehand do not count
                    next(batches)
                began = time.perf_counter()
                for _ in range(settings.batches):
                    next(batches)
                return time.perf_counter() - began

            return run

        repeated = torch.utils.data.RandomSampler(peer, replacement=True, num_samples=10**6)
        rows, ratios = {}, {}
        for workers in (0, 1, 2):
            whole = {"batch_size": None, "num_workers": workers}  # a key is a batch
            ways = {
                "packed": drawn(lambda o=whole: DataLoader(ours, sampler=order(), **o), workers),
                "geotiff": drawn(lambda o=whole: DataLoader(from_scenes, sampler=order(), **o), workers),
                "plain": drawn(lambda n=workers: DataLoader(peer, BATCH, sampler=repeated, num_workers=n), workers),
            }
            rounds = [[way() for way in ways.values()] for _ in range(settings.rounds + 1)][1:]
            for name, times in zip(ways, zip(*rounds, strict=True), strict=True):
                rows[f"{name}, {workers} workers"] = round(BATCH * settings.batches / statistics.median(times), 1)
                ratio = statistics.median(times[-1] / own for own, times in zip(times, rounds, strict=True))
                ratios[f"{name}, {workers} workers"] = round(ratio, 2)
    finish("loader", ratios["packed, 0 workers"], 8, chips_a_second=rows, ratios=ratios, batch=BATCH)


if __name__ == "__main__":
    main()
