"""Mapping a scene by rows of blended tiles, against the whole scene in memory with the same tiles and weights.

    python benchmarks/predict.py [--side 1536] [--chip_size 256] [--no-peer]

The scene is made here: 12 bands, uint16, deflated blocks of 512 pixels. The head is a linear one on a very small
ConvNeXt, so that reading, blending and writing count. Each side is a process of its own; the memory is what Linux calls
VmHWM. A whole Sentinel-2 tile: --side 10980 --no-peer. Prints one JSON object; the headline is the time of the peer
over ours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from paired import finish
from rasterio.windows import Window

from ssl_geo.imagery.sensors import DEFAULT_BANDS

BANDS = ("B01", *DEFAULT_BANDS[:8], "B09", *DEFAULT_BANDS[8:])
BLOCK = 512
CLASSES = 5


def main() -> None:
    """Make scene and head, map in processes of their own, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1536)
    parser.add_argument("--chip_size", type=int, default=256)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.case:
        measure(settings.case[0], Path(settings.case[1]))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_scene(folder / "scene.tif", settings.side)
        make_head(folder / "best_head", settings.chip_size)
        for kind in ("ours",) if settings.no_peer else ("ours", "peer"):
            command = [sys.executable, __file__, "--case", kind, str(folder)]
            output = subprocess.check_output(command, text=True).splitlines()[-1]
            found[kind] = json.loads(output)
    megapixels = settings.side**2 / 1e6
    finish(
        "predict",
        found["peer"]["seconds"] / found["ours"]["seconds"] if "peer" in found else None,
        None,
        megapixels_per_s={kind: round(megapixels / figures["seconds"], 2) for kind, figures in found.items()},
        km2_per_s={kind: round(megapixels * 100 / figures["seconds"], 1) for kind, figures in found.items()},
        peak_mb={kind: figures["peak_mb"] for kind, figures in found.items()},
        side=settings.side,
        bands=len(BANDS),
        chip_size=settings.chip_size,
    )


def make_scene(path: Path, side: int) -> None:
    """One block of land-like noise, again and again."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 600, (len(BANDS), BLOCK // 16, BLOCK // 16)).repeat(16, axis=1).repeat(16, axis=2)
    block = (2000 + coarse + rng.normal(0, 30, (len(BANDS), BLOCK, BLOCK))).clip(1, 9000).astype(np.uint16)
    profile = {"driver": "GTiff", "count": len(BANDS), "height": side, "width": side, "dtype": "uint16"}
    profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "zlevel": 1}
    profile |= {"interleave": "band", "num_threads": "all_cpus", "bigtiff": "if_safer", "crs": "EPSG:32633"}
    profile |= {"transform": rasterio.Affine(10, 0, 399_960, 0, -10, 5_300_040)}
    row = np.tile(block, (1, 1, -(-side // BLOCK)))[:, :, :side]
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.descriptions = BANDS
        for top in range(0, side, BLOCK):
            height = min(BLOCK, side - top)
            dataset.write(row[:, :height], window=Window(0, top, side, height))


def make_head(folder: Path, chip_size: int) -> None:
    """A linear head with drawn weights, as a probe leaves it."""
    import torch

    from ssl_geo.backbones import create_backbone, describe_backbone
    from ssl_geo.probing.features import FeatureExtractor
    from ssl_geo.probing.heads import build_head
    from ssl_geo.probing.saved import HeadDescription, save_head

    torch.manual_seed(0)
    shape = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    backbone = create_backbone("convnext_atto", len(BANDS), [(chip_size, chip_size)], **shape).eval()
    extractor = FeatureExtractor(backbone, ["stages.0"], input_size=chip_size)
    mean, std = (0.2,) * len(BANDS), (0.06,) * len(BANDS)
    description = HeadDescription(
        name="linear @ stages.0",
        kind="linear",
        layers=("stages.0",),
        channels=tuple(extractor.channels),
        reduction=tuple(extractor.reduction),
        chip_size=chip_size,
        bands=BANDS,
        mean=mean,
        std=std,
        class_ids=tuple(range(CLASSES)),
        class_names=tuple(f"class {k}" for k in range(CLASSES)),
        class_colours=tuple((50 * k, 0, 0) for k in range(CLASSES)),
        checkpoint="made here",
        confusion=np.random.default_rng(0).integers(1, 100, (8, CLASSES, CLASSES)),
    )
    head = build_head("linear", extractor.channels, CLASSES, reduction=extractor.reduction)
    save_head(folder, head, description, backbone, describe_backbone(backbone, bands=list(BANDS)))


def measure(kind: str, folder: Path) -> None:
    """Map the scene and print seconds, without start-up, and peak memory in MB."""
    from ssl_geo import predict
    from ssl_geo.config import predict_config

    arguments = ["--head", str(folder / "best_head"), "--scene", str(folder / "scene.tif")]
    config = predict_config([*arguments, "--out", str(folder / f"{kind}.tif"), "--batch_size", "16"])
    began = time.perf_counter()
    if kind == "ours":
        predict.main(config)
    else:
        map_whole(folder)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}))


def map_whole(folder: Path) -> None:
    """The plain way: scene, probabilities and weights whole in memory; a GeoTIFF without overviews."""
    import torch

    from ssl_geo.probing.saved import load_head
    from ssl_geo.probing.tiling import lay_tiles

    head = load_head(folder / "best_head")
    with rasterio.open(folder / "scene.tif") as dataset:
        image = torch.from_numpy(dataset.read().astype(np.float32))
        profile = dataset.profile | {"count": 1, "dtype": "uint8"}
    image = (image * 1e-4 - 0.2) / 0.06
    size = head.description.chip_size
    axis = lay_tiles(image.shape[1], size, 0.25)
    sums = torch.zeros(CLASSES, *image.shape[1:])
    places = [(row, col) for row in range(len(axis.starts)) for col in range(len(axis.starts))]
    weights = torch.from_numpy(axis.weights)
    with torch.inference_mode():
        for first in range(0, len(places), 16):
            part = places[first : first + 16]
            corners = [(axis.starts[row], axis.starts[col]) for row, col in part]
            tiles = torch.stack([image[:, top : top + size, left : left + size] for top, left in corners])
            for (row, col), (top, left), values in zip(part, corners, head.probabilities(tiles), strict=True):
                sums[:, top : top + size, left : left + size] += values * weights[row][:, None] * weights[col]
    with rasterio.open(folder / "peer.tif", "w", **profile) as dataset:
        dataset.write(sums.argmax(dim=0).to(torch.uint8).numpy()[None])


def peak_mb() -> float:
    """VmHWM of this process."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000, 1)


if __name__ == "__main__":
    main()
