"""Ask what a checkpoint is worth on GeoTIFF labels: ``python -m ssl_geo.probe --help``."""

from __future__ import annotations

from ssl_geo.config import PROBE_PROGRAM, ProbeConfig, probe_config, to_dict
from ssl_geo.errors import UserError, one_line_errors

if __name__ == "__main__":  # settings first: --help answers before torch is imported
    SETTINGS = probe_config()

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ssl_geo.backbones import load_backbone, untrained
from ssl_geo.imagery.labelled import LabelledChips, pair_labels, write_class_map
from ssl_geo.imagery.sample import ensure_sample
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.probing.baselines import RandomConvolutions, fit_pixels, majority_class, pixel_features
from ssl_geo.probing.features import FeatureExtractor, auto_layers, list_layers
from ssl_geo.probing.fit import Fitted, Recipe, class_weights, predict, train_heads
from ssl_geo.probing.footprints import Footprints
from ssl_geo.probing.heads import HEADS, build_head
from ssl_geo.probing.linear import fit_linear
from ssl_geo.probing.metrics import boundary_counts, calibration_counts, confusion_by_block
from ssl_geo.probing.pixels import fit_linear_on_layers, sample_rows
from ssl_geo.probing.report import ModelResult, ProbeReport, append_result, write_report
from ssl_geo.probing.splits import ChipSplit, split_chips
from ssl_geo.probing.store import FeatureStore, extract, store_key
from ssl_geo.views.photometry import standardize_chip

SAMPLE = Path("data/sample")
SINGLE_LAYER = ("linear", "patch_linear")  # heads that are trained on each layer by itself; the others on all
PIXEL_ROWS = 20_000  # training pixels of the per-pixel baselines and the linear probe


@dataclass(frozen=True)
class Task:
    """The labelled chips, their split, and how pixels are standardized."""

    chips: LabelledChips
    split: ChipSplit
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.chips.ids)

    def standardized(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Image (C, H, W) as the backbone takes it, and labels (H, W)."""
        chip = self.chips[number]
        return standardize_chip(chip.reflectance, chip.valid, self.mean, self.std), chip.labels

    def members(self, name: str) -> npt.NDArray[np.int64]:
        """Chips of a split."""
        return self.split.chips(name)


def main(config: ProbeConfig) -> int:
    """Probe: checkpoint → backbone → features → heads → metrics → report and map."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    for name in config.heads:
        if name not in HEADS:
            raise UserError(f"--heads {name}; allowed: {', '.join(HEADS)}")
    backbone, description = subject(config)
    if config.layers == ["list"]:
        print("\n".join(str(layer) for layer in list_layers(backbone)))
        return 0
    out = Path(config.out or f"runs/probe-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is in use; name another folder")

    task = labelled_task(config, description)
    train, validation = task.members("train"), task.members("val")
    for line in task.split.report.lines():
        print(line)

    torch.manual_seed(0)
    rivals = {"": backbone, "random initialization, ": untrained(backbone)}
    results: list[ModelResult] = []
    chosen_from: list[tuple[ModelResult, str, Fitted, FeatureStore]] = []
    for prefix, net in rivals.items():
        store, extractor = features(config, net, prefix, task, description, device)
        for seed in range(config.seeds):
            fitted = train_heads(
                build_heads(config, extractor, task, seed),
                store,
                train,
                validation,
                task.num_classes,
                Recipe(config.epochs, config.batch_size, config.lr, 0.1, seed),
                weights=class_weights(store.labels[train], task.num_classes) if config.class_weights else None,
                device=device,
            )
            if seed == 0:
                linear, fit = fit_linear_on_layers(
                    store, extractor.names, train, validation, task.num_classes, rows=PIXEL_ROWS
                )
                fitted["linear probe @ all layers"] = Fitted(
                    linear.to(device), extractor.names, validation_miou=[fit.validation[fit.penalty]]
                )
            scored = score(fitted, store, task, config.batch_size, device, prefix, seed)
            results += scored
            if not prefix:
                chosen_from += [(r, name, item, store) for r, (name, item) in zip(scored, fitted.items(), strict=True)]
    results += baselines(task)

    out.mkdir(parents=True, exist_ok=True)
    report = ProbeReport(
        class_names=task.chips.names,
        class_ids=task.chips.ids,
        results=results,
        checkpoint={"path": config.ckpt, **description},
        settings=to_dict(config),
        splits=task.split.report.lines(),
        timings={"all": time.perf_counter() - began},
        files={"maps": str(out / "maps")},
    )
    written, markdown = write_report(out, report)
    found = json.loads(written.read_text())
    best = max((c for c in chosen_from if c[0].group == found["best"]), key=lambda c: c[0].validation_miou or 0.0)
    maps = write_maps(out / "maps", task, best[1], best[2], best[3], config, device)
    append_result(Path(config.results), {"out": str(out), "ckpt": config.ckpt, "headline": found["headline"]})
    print(found["headline"])
    print(f"report: {markdown}; map: {maps[0]}")
    return 0


def subject(config: ProbeConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone to probe and what is known of it."""
    backbone: Any = load_backbone(config.ckpt, DEFAULT_BANDS)
    return backbone, backbone.description


def labelled_task(config: ProbeConfig, description: Mapping[str, Any]) -> Task:
    """Pair images with labels, cut them into chips and split these by place."""
    given: dict[str, str] | None = None
    if not config.images:
        ensure_sample(SAMPLE)
        images, labels = [SAMPLE / "images"], SAMPLE / "labels"
        made = json.loads((SAMPLE / "sample.json").read_text())["scenes"]
        given = {scene["name"]: scene["split"] for scene in made}
    elif config.labels is None:
        raise UserError("--images needs --labels DIR: label GeoTIFFs named like the images")
    else:
        images, labels = [Path(p) for p in config.images], Path(config.labels)
    if config.split.file:
        given = json.loads(Path(config.split.file).read_text())
    scenes = pair_labels(
        images,
        labels,
        align=config.align,
        classes=config.classes,
        ignore=config.ignore,
        **dataclasses.asdict(config.data),
    )
    size = config.chip_size or description.get("chip_size", 64)
    chips = LabelledChips(scenes, bands=description["bands"], chip_size=size)
    for line in chips.report():
        print(line)
    side = config.split.block or 2 * size * (float(chips.size_m.mean() / size) if chips.size_m is not None else 1)
    split = split_chips(
        footprints(chips),
        chips.class_pixels,
        block=side,
        fractions=config.split.fractions,
        seed=0,
        gap=config.split.gap,
        given=None if given is None else chips.given(given),
    )
    mean, std = description.get("mean"), description.get("std")
    if mean is None or std is None:  # a timm model: standardize with the training chips
        mean, std = chips.statistics(split.chips("train"))
    return Task(chips, split, np.asarray(mean, np.float32), np.asarray(std, np.float32))


def hashed(tensor: Tensor) -> str:
    """Digest of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def footprints(chips: LabelledChips) -> Footprints:
    """Where the chips lie on the ground, or in their image where that has no georeferencing."""
    if chips.lonlat is not None and chips.size_m is not None:
        return Footprints.on_earth(chips.lonlat, chips.size_m)
    size = chips.chip_size
    bounds = np.stack([chips.col, chips.row, chips.col + size, chips.row + size], axis=1)
    return Footprints.in_plane([str(number) for number in chips.scene], bounds, unit="pixels")


def features(
    config: ProbeConfig,
    net: nn.Module,
    prefix: str,
    task: Task,
    description: Mapping[str, Any],
    device: torch.device,
) -> tuple[FeatureStore, FeatureExtractor]:
    """Features of all chips under the names of their layers: one backbone pass, or none if they are there."""
    layers = (
        auto_layers(net)
        if config.layers == ["auto"]
        else [int(n) if n.lstrip("-").isdigit() else n for n in config.layers]
    )
    net.to(device).eval()
    extractor = FeatureExtractor(net, layers, input_size=task.chips.chip_size)
    key = store_key(
        {
            "weights": {name: hashed(value) for name, value in net.state_dict().items()},
            "layers": extractor.layers,
            "mean": task.mean.tolist(),
            "std": task.std.tolist(),
            "bands": description["bands"],
            "chips": task.chips.fingerprint(),
        }
    )
    folder = Path(config.cache).expanduser() / "features" / key
    store = extract(
        extractor, task.standardized, len(task.chips), folder, memory=int(config.memory * 1e9), device=device
    )
    return store, extractor


def build_heads(
    config: ProbeConfig, extractor: FeatureExtractor, task: Task, seed: int
) -> dict[str, tuple[nn.Module, list[str]]]:
    """One head a name: single-layer heads on each layer, the others on all, with weights drawn from the seed."""
    torch.manual_seed(seed)
    described = dict(zip(extractor.names, zip(extractor.channels, extractor.reduction, strict=True), strict=True))
    heads: dict[str, tuple[nn.Module, list[str]]] = {}
    for kind in config.heads:
        for layers in [[name] for name in extractor.names] if kind in SINGLE_LAYER else [extractor.names]:
            head = build_head(
                kind,
                [described[name][0] for name in layers],
                task.num_classes,
                reduction=[described[name][1] for name in layers],
            )
            heads[f"{kind} @ {layers[0] if len(layers) == 1 else 'all layers'}"] = (head, list(layers))
    return heads


class Tally:
    """Counts of one model over the test chips, by spatial block."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._blocks, self._of_chip = np.unique(task.split.block[task.members("test")], return_inverse=True)
        self._place = dict(zip(task.members("test").tolist(), self._of_chip.tolist(), strict=True))
        classes = task.num_classes
        self.confusion = np.zeros((len(self._blocks), classes, classes), np.int64)
        self.boundary = np.zeros((3, classes), np.int64)
        self.calibration = np.zeros((3, 15))

    def add(
        self,
        number: int,
        labels: npt.NDArray[np.uint8],
        classes: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32] | None,
    ) -> None:
        """Count one chip (H, W)."""
        count = self._task.num_classes
        self.confusion[self._place[number]] += confusion_by_block(labels, classes, None, 1, count)[0]
        self.boundary += boundary_counts(labels, classes, count)
        if confidence is not None:
            self.calibration += calibration_counts(confidence, classes, labels)


def score(
    fitted: Mapping[str, Fitted],
    store: FeatureStore,
    task: Task,
    batch_size: int,
    device: torch.device,
    prefix: str,
    seed: int,
) -> list[ModelResult]:
    """Test every head once."""
    tallies = {name: Tally(task) for name in fitted}
    for name, part, classes, confidence in predict(fitted, store, task.members("test"), batch_size, device):
        for number, chip_classes, chip_confidence in zip(part.tolist(), classes, confidence, strict=True):
            tallies[name].add(number, store.labels[number], chip_classes, chip_confidence)
    return [
        ModelResult(
            name=f"{prefix}{name}, seed {seed}",
            group=prefix + name,
            kind="linear probe" if name.startswith("linear probe") else "head",
            seed=seed,
            blocks=tallies[name].confusion,
            boundary=tallies[name].boundary,
            calibration=tallies[name].calibration,
            parameters=sum(p.numel() for p in item.head.parameters()),
            best_epoch=item.best_epoch or None,
            validation_miou=float(np.nanmax(item.validation_miou)),
            collapsed=item.collapsed,
            retried=item.retried,
        )
        for name, item in fitted.items()
    ]


def baselines(task: Task) -> list[ModelResult]:
    """Majority class, logistic regression on single pixels, random convolutions: on the same chips and metric."""
    train, validation = task.members("train"), task.members("val")
    bands = task.chips.bands
    random_convolutions = RandomConvolutions(len(bands))

    def spectra(number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        chip = task.chips[number]
        filled = np.where(chip.valid, chip.reflectance, task.mean[:, None, None])
        return pixel_features(filled, bands), chip.labels

    def textures(number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        image, labels = task.standardized(number)
        return random_convolutions(torch.from_numpy(image)[None])[0].numpy(), labels

    rows, labels = sample_rows(spectra, train, PIXEL_ROWS, seed=0)
    pixels = fit_pixels(rows.T, labels, task.num_classes, limit=None)
    rows, labels = sample_rows(textures, train, PIXEL_ROWS, seed=0)
    convolutions = fit_linear(
        rows, labels, task.num_classes, *sample_rows(textures, validation, PIXEL_ROWS // 2, seed=0)
    )
    majority = majority_class(task.chips.class_pixels[train].sum(axis=0))
    tallies = {name: Tally(task) for name in ("pixels", "random convolutions", "majority class")}
    for number in tqdm(task.members("test").tolist(), desc="baselines", unit="chip", delay=2):
        features, truth = spectra(number)
        probabilities = pixels.probabilities(features)
        tallies["pixels"].add(number, truth, probabilities.argmax(axis=0).astype(np.uint8), probabilities.max(axis=0))
        features, _ = textures(number)
        classes = convolutions.predict(features.reshape(len(features), -1).T.copy()).numpy().astype(np.uint8)
        tallies["random convolutions"].add(number, truth, classes.reshape(truth.shape), None)
        tallies["majority class"].add(number, truth, np.full_like(truth, majority), None)
    return [
        ModelResult(
            name=name,
            group=name,
            kind="baseline",
            seed=None,
            blocks=tally.confusion,
            boundary=tally.boundary,
            calibration=tally.calibration if name == "pixels" else None,
        )
        for name, tally in tallies.items()
    ]


def write_maps(
    folder: Path,
    task: Task,
    name: str,
    item: Fitted,
    store: FeatureStore,
    config: ProbeConfig,
    device: torch.device,
) -> list[Path]:
    """Class maps of the images with test chips, by the head that validation chose, on the images' grids."""
    folder.mkdir()
    chips, size, written = task.chips, task.chips.chip_size, []
    for number in np.unique(chips.scene[task.members("test")]).tolist():
        scene = chips.scenes[number].scene
        classes = np.full((scene.height, scene.width), 255, np.uint8)
        members = np.flatnonzero(chips.scene == number)
        for _, part, predicted, _ in predict({name: item}, store, members, config.batch_size, device):
            for chip, values in zip(part.tolist(), predicted, strict=True):
                row, col = int(chips.row[chip]), int(chips.col[chip])
                place = classes[row : row + size, col : col + size]
                valid = chips[chip].valid[: place.shape[0], : place.shape[1]]
                place[valid] = values[: place.shape[0], : place.shape[1]][valid]
        path = folder / f"{Path(scene.path).stem}.tif"
        tags = {"checkpoint": config.ckpt, "head": name}
        write_class_map(path, classes, scene, chips.names, chips.ids, chips.colours, tags)
        written.append(path)
    return written


if __name__ == "__main__":
    with one_line_errors(PROBE_PROGRAM):
        raise SystemExit(main(SETTINGS))
