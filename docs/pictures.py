"""Make the pictures of README and site: `make demo`, then `make pictures` (or `python docs/pictures.py RUN OUT`)."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ssl_geo import figures, load_backbone
from ssl_geo.config import predict_config
from ssl_geo.imagery.chips import build_index
from ssl_geo.imagery.datasets import ChipDataset
from ssl_geo.imagery.labelled import LabelledChips, pair_labels
from ssl_geo.imagery.rasters import read_labels
from ssl_geo.imagery.sample import ensure_sample
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.predict import main as predict
from ssl_geo.probing.features import FeatureExtractor, auto_layers
from ssl_geo.views.multicrop import MultiCrop, default_recipes
from ssl_geo.views.photometry import standardize_chip

PICTURES = Path(__file__).resolve().parent / "pictures"
SIDE = 352  # pixels of a sample image that strides of 32 cover
SHOWN = (19, 5)  # images of the sample


def views(sample: Path) -> Figure:
    """A chip and the views that are cropped from it."""
    index = build_index([sample / "images"], bands=DEFAULT_BANDS, chip_size=120, progress=False)
    mean, std = index.statistics.mean, index.statistics.std
    global_views, local_views = default_recipes(index.chip_size)
    crops = MultiCrop(mean, std, global_views=global_views, local_views=local_views)
    number = len(index) // 3
    chip = ChipDataset(index)[number]
    made = crops(chip.dn, chip.valid, chip.scale, chip.offset, seed=0, epoch=0, chip=number)
    return figures.view_sheet(made, chip.bands, mean, std, chip=(chip.reflectance(), chip.valid))


def scenes(sample: Path, bands: tuple[str, ...]) -> LabelledChips:
    """The shown places, each as one large chip."""
    pairs = pair_labels([sample / "images"], [sample / "labels"])
    picked = [pair for number in SHOWN for pair in pairs if f"sample{number:02}" in Path(pair.scene.path).stem]
    return LabelledChips(picked, bands=bands, chip_size=SIDE)


def features(run: Path, chips: LabelledChips) -> Figure:
    """What each layer of the backbone holds, as principal components."""
    backbone = load_backbone(run)
    told = backbone.description
    read = [chips[number] for number in first_of_each(chips)]
    batch = [standardize_chip(chip.reflectance, chip.valid, told["mean"], told["std"]) for chip in read]
    layers = auto_layers(backbone)[::-1][:3]
    with torch.no_grad(), FeatureExtractor(backbone, layers, input_size=SIDE) as extractor:
        maps = {name: found.numpy() for name, found in extractor(torch.from_numpy(np.stack(batch))).items()}
    pictures = [figures.composite(chip.reflectance, told["bands"], valid=chip.valid) for chip in read]
    return figures.pca_sheet(pictures, maps, side=2.2)


def classes(head: Path, chips: LabelledChips, folder: Path) -> Figure:
    """Image, label, map and errors."""
    numbers = first_of_each(chips)
    files = [str(chips.scenes[chips.scene[number]].scene.path) for number in numbers]
    predict(predict_config(["--head", str(head), "--scene", *files, "--out", str(folder)]))
    positions = np.full(256, 255, np.uint8)
    positions[list(chips.ids)] = range(len(chips.ids))
    read = [chips[number] for number in numbers]
    mapped = [positions[read_labels(folder / f"{Path(file).stem}.tif")[0][:SIDE, :SIDE]] for file in files]
    pictures = [figures.composite(chip.reflectance, chips.bands, valid=chip.valid) for chip in read]
    return figures.class_sheet(pictures, [chip.labels for chip in read], mapped, chips.names, chips.colours, side=2.2)


def first_of_each(chips: LabelledChips) -> list[int]:
    """The upper left chip of each scene."""
    return [int(np.flatnonzero(chips.scene == number)[0]) for number in range(len(chips.scenes))]


def main(run: Path, probe: Path) -> None:
    """Write the pictures.

    Args:
        run: A pretraining run on the sample.
        probe: What the probe wrote for it.
    """
    sample = ensure_sample(Path("data/sample"))
    chips = scenes(sample, tuple(load_backbone(run).description["bands"]))
    with tempfile.TemporaryDirectory() as folder:
        drawn = {
            "views": views(sample),
            "features": features(run, chips),
            "map": classes(probe / "best_head", chips, Path(folder)),
        }
    PICTURES.mkdir(exist_ok=True)
    size = {"dpi": 100, "bbox_inches": "tight", "pad_inches": 0.06}
    for name, figure in drawn.items():
        figure.savefig(PICTURES / f"{name}.webp", pil_kwargs={"quality": 80, "method": 6}, **size)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
