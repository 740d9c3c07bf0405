"""Ask what a checkpoint is worth on GeoTIFF labels: ``python -m ssl_geo.probe --help``."""

from __future__ import annotations

from ssl_geo.config import PROBE_PROGRAM, ProbeConfig, probe_config, to_dict
from ssl_geo.errors import UserError, interrupt_on_termination, nearest, one_line_errors, tell

if __name__ == "__main__":  # settings first: --help answers before torch is imported
    SETTINGS = probe_config()

import datetime
import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import ssl_geo
from ssl_geo.backbones import load_backbone, required_multiple, untrained
from ssl_geo.figures import readable_layer
from ssl_geo.imagery.labelled import LabelledChips
from ssl_geo.imagery.maps import write_class_map
from ssl_geo.imagery.pairing import scene_name
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.probing.enlarging import dense_features
from ssl_geo.probing.features import Extractor, auto_layers, list_layers
from ssl_geo.probing.fit import Fitted, Recipe, class_weights, predict, train_heads
from ssl_geo.probing.footprints import box_on_earth
from ssl_geo.probing.heads import HEADS, build_head
from ssl_geo.probing.normalizing import chips_to_normalize, normalize
from ssl_geo.probing.pace import Laps, baseline_seconds, measure_pace
from ssl_geo.probing.pixels import PIXELS, BesidePixels, fit_linear_on_layers
from ssl_geo.probing.report import ModelResult, ProbeReport, write_report
from ssl_geo.probing.results import append_result, check_table, result_row
from ssl_geo.probing.rivals import score_rivals
from ssl_geo.probing.saved import HeadDescription, save_head
from ssl_geo.probing.scoring import TestChips, score_heads
from ssl_geo.probing.store import FeatureStore, extract, predicted_bytes, store_key, stored_chips
from ssl_geo.reporting.page import write_page
from ssl_geo.reporting.probing import ProbeChips, chosen_chips, probe_page
from ssl_geo.task import Task, labelled_task
from ssl_geo.training import distributed
from ssl_geo.training.lock import Lock

SINGLE_LAYER = ("linear", "patch_linear")  # heads that are trained on each layer by itself; the others on all
PIXEL_ROWS = 20_000  # training pixels of the linear probe and of the baselines
PACE_CHIPS = 8
PAGES = 20_000_000  # bytes of reports with their pictures, and of the head, at most
REPORT_SECONDS = 15.0  # of drawing, on one core; it hardly depends on the data
FEATURED = 4  # chips whose features the page shows
UNTRAINED = "random initialization, "  # before the name of a model on the untrained backbone


def main(config: ProbeConfig) -> int:
    """Probe: checkpoint → backbone → features → heads → metrics → report and maps."""
    check(config)
    device = distributed.setup(config.device).device
    backbone: Any = load_backbone(config.ckpt, DEFAULT_BANDS)
    if config.layers == ["list"]:
        for layer in list_layers(backbone):
            tell(str(layer))
        return 0
    check_table(Path(config.results))
    with claimed(Path(config.out or f"runs/probe-{datetime.datetime.now():%Y%m%d-%H%M%S}")) as out:
        return probe(config, backbone, out, device)


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Make the folder of the report, for this process alone; where nothing comes of it, it is removed again.

    Raises:
        UserError: It holds something, another probe is at work for it, or it cannot be made or written.
    """
    in_use, was_there = f"--out {out} is in use; name another folder", out.exists()
    if was_there and not out.is_dir():
        raise UserError(in_use)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}); name a folder that can") from error
    try:
        with Lock() as lock:
            lock.take(out)
            if {path.name for path in out.iterdir()} - {".lock"}:
                raise UserError(in_use)
            yield out
    finally:
        if not was_there and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def probe(config: ProbeConfig, backbone: Any, out: Path, device: torch.device) -> int:
    """From features to heads, metrics, report and maps in `out`."""
    task = labelled_task(config, backbone.description, multiple=required_multiple(backbone))
    train, validation = task.split.chips("train"), task.split.chips("val")
    test = TestChips(task.split.chips("test"), task.split.block[task.split.chips("test")], task.num_classes)
    layers = chosen_layers(config, backbone)
    twin = untrained(backbone, backbone.description.get("seed", 0))  # a run's own initial weights
    extractors = {
        prefix: dense_features(net.to(device).eval(), layers, side=task.chips.side, enlarge=config.enlarge)
        for prefix, net in (("", backbone), (UNTRAINED, twin))
    }
    seen = chips_to_normalize(extractors[UNTRAINED], train)
    sources: dict[str, Extractor] = {
        prefix: BesidePixels(extractor, task.mean, task.std, task.chips.bands) if config.pixels else extractor
        for prefix, extractor in extractors.items()
    }
    probed = "linear probe @ all layers" + (f" and {PIXELS}" if config.pixels else "")
    folders = {prefix: features_folder(config, sources[prefix], task, seen if prefix else ()) for prefix in sources}
    weights = class_weights(task.chips.class_pixels[train]) if config.class_weights else None
    balance = None if weights is None else weights.double().numpy()
    splits = [*task.split.report.lines(task.chips.names), *task.advice]
    if len(seen):
        splits.append(f"{UNTRAINED.rstrip(', ')}: its batch normalization has seen {len(seen)} training chips")
    for line in splits:
        tell(line)
    size = sum(predicted_bytes(source, len(task.chips), (task.chips.side,) * 2) for source in sources.values())
    expected = expected_seconds(config, task, extractors[""], folders.values(), device)
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in expected.items())
    tell(
        f"expected: {sum(expected.values()) / 60:.1f} min ({parts}); {size / 1e6:.0f} MB of features in {config.cache}"
    )
    check_room(out, task, backbone)

    clock = Laps()
    results: list[ModelResult] = []
    candidates: list[tuple[ModelResult, str, Fitted]] = []
    stores: dict[str, FeatureStore] = {}
    for prefix, extractor in extractors.items():
        if prefix and stored_chips(folders[prefix]) < len(task.chips):
            normalize(extractor, task.image, seen, batch_size=config.batch_size, device=device)
        stores[prefix] = extract(
            sources[prefix],
            task.standardized,
            len(task.chips),
            folders[prefix],
            memory=int(config.memory * 1e9),
            batch_size=config.batch_size,
            device=device,
        )
        clock.lap("features")
        # The untrained backbone is a reference and no candidate: one seed of its heads will do.
        for seed in range(1 if prefix else config.seeds):
            heads = build_heads(config.heads, extractor, task.num_classes, seed)
            recipe = Recipe(config.epochs, config.batch_size, config.lr, 0.1, seed)
            fitted = train_heads(
                heads, stores[prefix], train, validation, task.num_classes, recipe, weights=weights, device=device
            )
            scored = score_heads(fitted, stores[prefix], test, config.batch_size, device, prefix=prefix, seed=seed)
            results += scored
            candidates += [] if prefix else list(zip(scored, fitted, fitted.values(), strict=True))
        clock.lap("heads")
        linear = fit_linear_on_layers(
            stores[prefix],
            sources[prefix].names,
            [(train, validation)],
            task.num_classes,
            rows=PIXEL_ROWS,
            class_weights=balance,
        )
        linear.head.to(device)
        fitted = {probed: linear}
        scored = score_heads(fitted, stores[prefix], test, config.batch_size, device, prefix=prefix)
        results += scored
        candidates += [] if prefix else list(zip(scored, fitted, fitted.values(), strict=True))
        clock.lap("linear probes")
    results += score_rivals(
        task.rival_chip,
        task.chips.bands,
        task.chips.class_pixels,
        [(train, validation)],
        test,
        rows=PIXEL_ROWS,
        class_weights=balance,
    )
    clock.lap("baselines")

    report = ProbeReport(
        class_names=task.chips.names,
        class_ids=task.chips.ids,
        results=results,
        checkpoint={"path": config.ckpt, **backbone.description},
        settings=to_dict(config),
        splits=[*task.chips.report(), *splits],
        warnings=task.warnings,
        timings={"expected": sum(expected.values()), **clock.seconds},
        files={"maps": str(out / "maps"), "head": str(out / "best_head")},
    ).to_json()
    chosen = [candidate for candidate in candidates if candidate[0].group == report["best"]]
    result, name, item = max(chosen, key=lambda candidate: candidate[0].validation_miou or 0.0)
    description = describe_head(task, result, name, item, sources[""], config)
    standardizing = {"mean": list(description.mean), "std": list(description.std), "chip_size": description.chip_size}
    try:
        save_head(out / "best_head", item.head, description, backbone, {**backbone.description, **standardizing})
        maps = write_maps(out / "maps", task, name, item, stores[""], config, device)
        markdown = write_report(out, report)
        html = write_page(
            out / "report.html", probe_page(report, shown_chips(task, name, item, stores[""], config, device))
        )
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"--out {out} cannot be written ({reason}); make room, or name another folder: the features are kept in "
            f"{config.cache}"
        ) from error
    tell(report["headline"])
    if not surely_above("random_initialization", report):
        tell("no certain gain over random initialization: what was learned does not show here; pretrain on more chips")
    if not surely_above("pixels", report) and (left := untried(config, task.chips)):
        tell(f"no certain gain over pixels: try {'; or '.join(left)}")
    tell(f"report: {html}, {markdown}; map: {maps[0]}; head for ssl_geo.predict: {out / 'best_head'}")
    try:  # last, so that it costs nothing of the above
        append_result(Path(config.results), {"out": str(out), **result_row(report)})
    except UserError as error:
        raise UserError(f"{error}; the report is complete without it") from error
    return 0


def chosen_layers(config: ProbeConfig, backbone: nn.Module) -> list[str] | list[int | str]:
    """The layers that were named, or those to probe where none is."""
    if config.layers != ["auto"]:
        return [int(layer) if layer.lstrip("-").isdigit() else layer for layer in config.layers]
    # The dpt head takes four layers, as there are of the image as it is.
    return auto_layers(backbone, enlarge=1 if "dpt" in config.heads else config.enlarge)


def untried(config: ProbeConfig, chips: LabelledChips) -> list[str]:
    """Settings that were left at their defaults and may win over pixels, with what each is good for and costs."""
    left: list[str] = []
    wider = any(max(labelled.scene.height, labelled.scene.width) > chips.chip_size for labelled in chips.scenes)
    if config.context == 0 and wider:
        around = max(1, chips.chip_size // 2)
        left.append(f"--context {around}, so that the backbone sees what surrounds a chip, at four times the time")
    if config.enlarge == 1:
        left.append("--enlarge 2, a finer grid for fine structures at four times the time")
    return left


def surely_above(reference: str, report: Mapping[str, Any]) -> bool:
    """Whether the interval of the chosen group's gain over a reference lies above 0."""
    gain = next(group["gains"][reference] for group in report["groups"] if group["name"] == report["best"])
    return gain is not None and gain["low"] is not None and gain["low"] > 0


def check(config: ProbeConfig) -> None:
    """Refuse settings that cannot work, before anything is read."""
    for name in ("seeds", "epochs", "batch_size", "enlarge"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be 1 or more")
    if config.chip_size is not None and config.chip_size < 1:
        raise UserError(f"--chip_size {config.chip_size}: it must be 1 or more")
    if not config.lr > 0:
        raise UserError(f"--lr is {config.lr}; it must be greater than 0")
    if not config.heads or len(set(config.heads)) < len(config.heads):
        raise UserError(f"--heads {' '.join(config.heads)}: name one or more, each once")
    for name in config.heads:
        if name not in HEADS:
            raise UserError(f"--heads {name} is no segmentation head; {nearest(name, HEADS)}")
    if bool(config.images) != bool(config.labels):
        given, lacking = ("images", "labels") if config.images else ("labels", "images")
        raise UserError(f"--{given} without --{lacking}: give both, or neither for the embedded sample")


def check_room(out: Path, task: Task, backbone: nn.Module) -> None:
    """Refuse a disk that cannot take what a probe leaves at its end: backbone, maps, pages."""
    chips = task.chips
    mapped = {int(number) for number in chips.scene[task.split.chips("test")]}
    need = PAGES + sum(tensor.nbytes for tensor in backbone.state_dict().values())
    need += sum(chips.scenes[number].scene.height * chips.scenes[number].scene.width for number in mapped)
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"the probe leaves some {need / 1e6:.0f} MB in --out {out}, whose disk has {free / 1e6:.0f} MB free: make "
            "room or name a folder on another disk"
        )


def features_folder(config: ProbeConfig, extractor: Extractor, task: Task, normalizing: Iterable[int]) -> Path:
    """Where the features lie: named by all that decides what they are, the model as it is before normalizing."""
    key = store_key(
        {
            "weights": {name: hashed(value) for name, value in extractor.model.state_dict().items()},
            "layers": extractor.layers,
            "enlarge": config.enlarge,
            "normalizing": [int(chip) for chip in normalizing],
            "mean": task.mean.tolist(),
            "std": task.std.tolist(),
            "chips": task.chips.fingerprint,
        }
    )
    return Path(config.cache).expanduser() / "features" / key


def hashed(tensor: Tensor) -> str:
    """Digest of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def build_heads(
    kinds: Sequence[str], extractor: Extractor, num_classes: int, seed: int
) -> dict[str, tuple[nn.Module, list[str]]]:
    """One head a name: single-layer heads on each layer, the others on all, with weights drawn from the seed."""
    torch.manual_seed(seed)
    channels = dict(zip(extractor.names, extractor.channels, strict=True))
    reduction = dict(zip(extractor.names, extractor.reduction, strict=True))
    heads: dict[str, tuple[nn.Module, list[str]]] = {}
    for kind in kinds:
        for layers in [[name] for name in extractor.names] if kind in SINGLE_LAYER else [extractor.names]:
            head = build_head(
                kind, [channels[n] for n in layers], num_classes, reduction=[reduction[n] for n in layers]
            )
            heads[f"{kind} @ {layers[0] if len(layers) == 1 else 'all layers'}"] = (head, list(layers))
    return heads


def expected_seconds(
    config: ProbeConfig,
    task: Task,
    extractor: Extractor,
    folders: Iterable[Path],
    device: torch.device,
) -> dict[str, float]:
    """Seconds of each part of the probe, from one small batch."""
    train, validation, test = (task.split.chips(name) for name in ("train", "val", "test"))
    pairs = [task.standardized(int(number)) for number in train[:PACE_CHIPS]]
    images = torch.from_numpy(np.stack([image for image, _ in pairs]))
    rows = min(PIXEL_ROWS, int(task.chips.class_pixels[np.concatenate([train, validation])].sum()))
    pace = measure_pace(
        extractor,
        images,
        torch.from_numpy(np.stack([labels for _, labels in pairs])).long(),
        build_heads(config.heads, extractor, task.num_classes, 0),
        task.num_classes,
        device,
    )
    missing = sum(len(task.chips) - stored_chips(folder) for folder in folders)
    return {
        "features": missing * pace.features,
        "heads": (config.seeds + 1)
        * pace.heads(train=len(train), validation=len(validation), test=len(test), epochs=config.epochs),
        "linear probes": 2 * pace.linear_probe(rows),
        "baselines": baseline_seconds(
            images[:1],
            task.chips.bands,
            task.num_classes,
            rows=rows,
            chips=2 * (len(train) + len(validation)) + len(test),
        ),
        "report": REPORT_SECONDS,
    }


def describe_head(
    task: Task, result: ModelResult, name: str, item: Fitted, extractor: Extractor, config: ProbeConfig
) -> HeadDescription:
    """What using the chosen head takes, and where it comes from."""
    chips = task.chips
    position = [extractor.names.index(layer) for layer in item.layers]
    scenes = [labelled.scene for labelled in chips.scenes]
    return HeadDescription(
        name=result.name,
        kind=name.partition(" @ ")[0],
        layers=tuple(item.layers),
        channels=tuple(extractor.channels[k] for k in position),
        reduction=tuple(extractor.reduction[k] for k in position),
        chip_size=chips.side,
        enlarge=config.enlarge,
        bands=chips.bands,
        mean=tuple(task.mean.tolist()),
        std=tuple(task.std.tolist()),
        class_ids=chips.ids,
        class_names=chips.names,
        class_colours=chips.colours,
        checkpoint=config.ckpt,
        confusion=result.blocks,
        provenance={
            "version": ssl_geo.__version__,
            "validation_miou": result.validation_miou,
            "levels": sorted({scene.level for scene in scenes if scene.level is not None}),
            "scale": sorted({scene.scale for scene in scenes}),
            "offset": sorted({scene.offset for scene in scenes}),
        },
    )


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
    chips, size, context, written = task.chips, task.chips.chip_size, task.chips.context, []
    core = np.s_[context : context + size, context : context + size]
    for number in np.unique(chips.scene[task.split.chips("test")]).tolist():
        scene = chips.scenes[number].scene
        classes = np.full((scene.height, scene.width), 255, np.uint8)
        members = np.flatnonzero(chips.scene == number)
        for _, part, predicted, _ in predict({name: item}, store, members, config.batch_size, device):
            for chip, values in zip(part.tolist(), predicted, strict=True):
                row, col = int(chips.row[chip]), int(chips.col[chip])
                place = classes[row : row + size, col : col + size]
                inside = np.s_[: place.shape[0], : place.shape[1]]
                valid = chips[chip].valid[core][inside]
                place[valid] = values[core][inside][valid]
        stem = scene_name(Path(scene.path))
        names = itertools.chain([f"{stem}.tif"], (f"{stem}-{k}.tif" for k in itertools.count(2)))
        path = next(folder / name for name in names if folder / name not in written)  # as folders of dates repeat them
        tags = {"checkpoint": config.ckpt, "head": name}
        write_class_map(path, classes, scene, chips.names, chips.ids, chips.colours, tags)
        written.append(path)
    return written


def shown_chips(
    task: Task, name: str, item: Fitted, store: FeatureStore, config: ProbeConfig, device: torch.device
) -> ProbeChips:
    """What the page shows: the best and the worst test chips of the chosen head, and where all chips lie."""
    chips, test = task.chips, task.split.chips("test")
    parts = list(predict({name: item}, store, test, config.batch_size, device))
    predicted = np.concatenate([classes for _, _, classes, _ in parts])
    best, worst = chosen_chips(store.labels[test], predicted)
    numbers = [int(number) for number in test[[*best, *worst]]]
    read = [chips[number] for number in numbers]
    bounds = None
    if chips.lonlat is not None and chips.size_m is not None:
        bounds = box_on_earth(chips.lonlat, chips.size_m)
    layer = readable_layer({name: store.layers[name] for name in item.layers[::-1]})
    splits = np.full(len(chips), "left out")
    for split in ("train", "val", "test"):
        splits[task.split.chips(split)] = split
    return ProbeChips(
        images=[chip.reflectance for chip in read],
        valid=[chip.valid for chip in read],
        labels=[chip.labels for chip in read],
        predictions=list(predicted[[*best, *worst]]),
        names=[
            f"{Path(chips.scenes[chips.scene[n]].scene.path).stem} (row {chips.row[n]}, column {chips.col[n]})"
            for n in numbers
        ],
        best=len(best),
        bands=chips.bands,
        colours=chips.colours,
        features=np.asarray(store.layers[layer][numbers[:FEATURED]], np.float32),
        layer=layer,
        bounds=bounds,
        splits=splits.tolist(),
        class_pixels=chips.class_pixels,
    )


if __name__ == "__main__":
    interrupt_on_termination()
    with one_line_errors(PROBE_PROGRAM):
        raise SystemExit(main(SETTINGS))
