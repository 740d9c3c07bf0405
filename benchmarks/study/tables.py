"""A table of one labelled set: no training, random initialization, and a run after some and all of its steps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn
from tqdm import tqdm

from benchmarks.study.pretrained import normalized_by
from benchmarks.study.scores import WAYS, Blocks, score_backbone, score_plain
from benchmarks.study.sets import SIX, LabelledSet
from ssl_geo.backbones import create_backbone, load_backbone, untrained
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.probing.intervals import bootstrap, paired_difference
from ssl_geo.probing.metrics import miou

HEADER = ["model", "mIoU", "of each seed", "accuracy", "over random initialization", "over normalized", "over pixels"]
RANDOM, NORMALIZED = "random initialization", "random initialization, normalized"  # batch norm has seen the imagery
PLAIN = ("majority class", "pixels", "random convolutions")
CURVE = (0.07, 0.25, 1.0)  # shares of a run at which it is tested


def table(runs: Sequence[Path], make: Callable[[Path], LabelledSet], folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """A set's name and rows: what needs no training, random initialization, and the runs after some and all steps.

    Args:
        runs: They differ in their seeds alone; their counts are added, and each one's mIoU is told beside.
        make: Reads the set.
        folder: Where it lies.
    """
    labelled = make(folder)
    checkpoints = [sorted((run / "checkpoints").glob("step-*.pt")) for run in runs]
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoints[0]]
    batch = described(runs[0])["batch"]
    chosen = sorted({int(np.argmin([abs(step - share * steps[-1]) for step in steps])) for share in CURVE})
    mean, std = standardizing(runs[0], labelled)
    plain = score_plain(labelled, mean, std)
    # (runs, blocks, C, C) each: a model counts as often as any other, so that blocks have one size.
    counts: dict[str, Blocks] = {name: np.stack([plain[name]] * len(runs)) for name in PLAIN}
    started: dict[str, list[dict[str, Blocks]]] = {RANDOM: [], NORMALIZED: []}
    for run in tqdm(runs, desc=f"{labelled.name}: random initialization", unit="run"):
        network = untrained(backbone_of(run, labelled), described(run)["seed"])
        started[RANDOM].append(score_backbone(network, labelled, mean, std))
        normalized = normalized_by(run, network, labelled.chips.bands)
        started[NORMALIZED].append(score_backbone(normalized, labelled, mean, std))
    for name, kind in itertools.product(started, WAYS):
        counts[f"{name}, {kind}"] = np.stack([found[kind] for found in started[name]])
    for number in tqdm(chosen, desc=f"{labelled.name}: checkpoints", unit="checkpoint"):
        # The learning curve is told of plain features.
        ways = list(WAYS) if number == chosen[-1] else ["features"]
        each = [score_backbone(backbone_of(c[number], labelled), labelled, mean, std, ways) for c in checkpoints]
        for kind in ways:
            counts[f"DINO, {steps[number] * batch:,} chips, {kind}"] = np.stack([found[kind] for found in each])
    whole = {name: blocks.sum(axis=0) for name, blocks in counts.items()}
    return labelled.name, [
        {
            "model": name,
            "miou": vars(bootstrap(blocks)),
            "each_seed": miou(counts[name].sum(axis=1)).tolist(),
            "accuracy": float(np.trace(blocks.sum(0)) / blocks.sum()),
            "over_random": gain(blocks, name, whole, RANDOM),
            "over_normalized": gain(blocks, name, whole, NORMALIZED),
            "over_pixels": vars(paired_difference(blocks, whole["pixels"])),
        }
        for name, blocks in whole.items()
    ]


def gain(blocks: Blocks, name: str, counts: dict[str, Blocks], twin: str) -> dict[str, Any] | None:
    """Over the weights that the runs started from, with the same inputs; None for what has no such twin."""
    kind = name.rpartition(", ")[2]
    if not name.startswith("DINO"):
        return None
    return vars(paired_difference(blocks, counts[f"{twin}, {kind}"]))


def backbone_of(source: Path, labelled: LabelledSet) -> nn.Module:
    """The backbone of a run or checkpoint; its input layer adapted by name where the set has other bands."""
    if labelled.chips.bands == DEFAULT_BANDS:
        return load_backbone(str(source), DEFAULT_BANDS)
    name, sizes = described(source)["name"], [(labelled.chips.side, labelled.chips.side)]
    return create_backbone(name, len(SIX), sizes, weights=source, bands=SIX)


def standardizing(run: Path, labelled: LabelledSet) -> tuple[Any, Any]:
    """Mean and standard deviation (C,) that the run standardized with; its training chips' for top-of-atmosphere."""
    told = json.loads((run / "backbone.json").read_text())
    if labelled.chips.bands == SIX:
        return labelled.chips.statistics(labelled.folds[0].train)
    return np.array(told["mean"], np.float32), np.array(told["std"], np.float32)


def described(source: Path) -> dict[str, Any]:
    """Name of the timm model, chips a step, seed and imagery of a run, or of the run of a checkpoint."""
    run = source if source.is_dir() else source.parent.parent
    settings = yaml.safe_load((run / "config.yaml").read_text())
    return {
        "name": settings["backbone"]["name"],
        "batch": settings["optim"]["batch_size"],
        "seed": settings["seed"],
        "data": settings["data"],
    }


def markdown(name: str, rows: list[dict[str, Any]]) -> str:
    """A table of a set."""
    lines = [f"### {name}", "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {told(row['miou'])} | {', '.join(f'{each:.3f}' for each in row['each_seed'])} "
            f"| {row['accuracy']:.3f} | {told(row['over_random'], '+')} "
            f"| {told(row['over_normalized'], '+')} "
            f"| {told(row['over_pixels'], '+') if row['model'] != 'pixels' else '—'} |"
        )
    return "\n".join([*lines, ""])


def told(interval: dict[str, Any] | None, sign: str = "") -> str:
    """Value and bounds."""
    if interval is None:
        return "—"
    return f"{interval['value']:{sign}.3f} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"
