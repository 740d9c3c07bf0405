"""Does pretraining pay? Two runs without labels, then linear heads on labels that they never saw, by place.

    python -m benchmarks.study [--data ../shared/data] [--out runs/study] [--only real|sample] [--block SECONDS]

Pretrains on the imagery of --data and on the embedded sample at the same time, a core each; a run that is there is
gone on with or taken as it is. With --block the runs are told to save and stop after so long (exit code 75): the
same command goes on. Writes study.json, and study.md with one table a labelled set: counts are those of all
seeds and folds, intervals are bootstrapped over the spatial blocks of the test ground, gains are paired differences.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from tqdm import tqdm

from benchmarks.paired import machine
from benchmarks.study.scores import Blocks, score_backbone, score_plain
from benchmarks.study.sets import SIX, TWELVE, LabelledSet, cloud, landcover, sample, seasonal, water
from ssl_geo.backbones import create_backbone, load_backbone, untrained
from ssl_geo.imagery.sample import SAMPLE, ensure_sample
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.probing.intervals import bootstrap, paired_difference

UNLABELLED = ("scenes", "bigearthnet", "chips_coastal", "chips_seasonal", "jp2_multires")
SEEDS = 3  # of random initialization
TOLD_TO_STOP = 75  # exit code of a run that was told to stop and has saved
PLAIN = ("majority class", "pixels", "random convolutions")
HEADER = ["model", "mIoU", "accuracy", "over random initialization", "over pixels"]
CURVE = (0.07, 0.25, 1.0)  # shares of a run at which it is tested


def main() -> None:
    """Pretrain, test, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--steps-real", type=int, default=1400)
    parser.add_argument("--steps-sample", type=int, default=300)
    parser.add_argument("--block", type=float, help="seconds after which pretraining saves and stops; default: never")
    parser.add_argument("--only", choices=["real", "sample"], help="one of the two halves")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    ensure_sample()
    halves: dict[str, tuple[list[str], int]] = {
        "real": (imagery(given.data), given.steps_real),
        "sample": ([], given.steps_sample),
    }
    if given.only:
        halves = {given.only: halves[given.only]}
    elif not given.data.is_dir():
        parser.error(f"--data {given.data} is no folder: name the real imagery, or ask for --only sample")
    began = time.perf_counter()
    running = [pretrain(given.out / name, *of, threads=1 if len(halves) > 1 else 2) for name, of in halves.items()]
    codes = [ended(process, given.block and began + given.block) for process in running]
    if TOLD_TO_STOP in codes:
        print(f"saved after {given.block:.0f} s: the same command goes on")
        raise SystemExit(TOLD_TO_STOP)
    if any(codes):
        raise SystemExit(f"a run ended with an error: see the logs in {given.out}")
    pretrained = time.perf_counter() - began
    tables: dict[str, Any] = {}
    for name in halves:
        sets = [sample(SAMPLE)] if name == "sample" else real_sets(given.data)
        for labelled in sets:
            tables[labelled.name] = table(given.out / name, labelled)
            print(markdown(labelled.name, tables[labelled.name]), flush=True)
    seconds = {"pretraining": pretrained, "all": time.perf_counter() - began}
    content = {"machine": machine(), "seconds": seconds, "tables": tables}
    (given.out / "study.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "study.md").write_text("\n".join(markdown(name, rows) for name, rows in tables.items()))


def imagery(shared: Path) -> list[str]:
    """Settings that name all unlabelled real imagery: no image that a label belongs to but the seasonal chips."""
    folders = [str(shared / name) for name in UNLABELLED]
    dates = sorted(map(str, (shared / "water/images").glob("Boadella_*.tif")))
    told = ["--data.band_names", *TWELVE, "--data.allow_mixed", "true", "--data.level", "L2A"]
    return ["--data", *folders, *dates, *told]


def real_sets(shared: Path) -> list[LabelledSet]:
    """The labelled sets of the real imagery."""
    return [landcover(shared), water(shared), seasonal(shared), cloud(shared)]


def pretrain(run: Path, data: list[str], steps: int, *, threads: int) -> subprocess.Popen[bytes]:
    """Start a run with the defaults that everybody gets, or go on with it."""
    command = [sys.executable, "-m", "ssl_geo.pretrain"]
    if (run / "checkpoints").is_dir():
        command += ["--resume", str(run)]
    else:
        kept = [f"--log.checkpoint_every={max(1, round(CURVE[0] * steps))}", "--log.keep=100"]
        command += [*data, "--out", str(run), f"--steps={steps}", *kept]
    command.append(f"--data.workers={0 if threads == 1 else 1}")
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def ended(process: subprocess.Popen[bytes], deadline: float | None) -> int:
    """Exit code of a run, which is told to save and stop at the deadline."""
    try:
        return process.wait(None if deadline is None else max(0.0, deadline - time.perf_counter()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        return process.wait()


def table(run: Path, labelled: LabelledSet) -> list[dict[str, Any]]:
    """Rows of one set: what needs no training, random initialization, and the run after some and all of its steps."""
    checkpoints = sorted((run / "checkpoints").glob("step-*.pt"))
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoints]
    batch = described(run)["batch"]
    chosen = sorted({int(np.argmin([abs(step - share * steps[-1]) for step in steps])) for share in CURVE})
    mean, std = standardizing(run, labelled)
    plain = score_plain(labelled, mean, std)
    # Random initialization has the counts of all its seeds; all else counts as often, so that blocks have one size.
    counts: dict[str, Blocks] = {name: SEEDS * plain[name] for name in PLAIN}
    whole = backbone_of(run, labelled)
    seeds: list[dict[str, Blocks]] = []
    for seed in tqdm(range(SEEDS), desc=f"{labelled.name}: random initialization", unit="seed"):
        torch.manual_seed(seed)
        seeds.append(score_backbone(untrained(whole), labelled, mean, std))
    for kind in ("features", "features + pixels"):
        counts[f"random initialization, {kind}"] = np.sum([found[kind] for found in seeds], axis=0)
    for number in tqdm(chosen, desc=f"{labelled.name}: checkpoints", unit="checkpoint"):
        scored = score_backbone(backbone_of(checkpoints[number], labelled), labelled, mean, std)
        for kind, blocks in scored.items():
            counts[f"DINO, {steps[number] * batch:,} chips, {kind}"] = SEEDS * blocks
    return [
        {
            "model": name,
            "miou": vars(bootstrap(blocks)),
            "accuracy": float(np.trace(blocks.sum(0)) / blocks.sum()),
            "over_random": gain(blocks, name, counts),
            "over_pixels": vars(paired_difference(blocks, counts["pixels"])),
        }
        for name, blocks in counts.items()
    ]


def gain(blocks: Blocks, name: str, counts: dict[str, Blocks]) -> dict[str, Any] | None:
    """Over random initialization with the same inputs; None for what has no such twin."""
    kind = name.rpartition(", ")[2]
    if not name.startswith("DINO"):
        return None
    return vars(paired_difference(blocks, counts[f"random initialization, {kind}"]))


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
    """Name of the timm model and chips a step of a run, or of the run of a checkpoint."""
    run = source if source.is_dir() else source.parent.parent
    settings = yaml.safe_load((run / "config.yaml").read_text())
    return {"name": settings["backbone"]["name"], "batch": settings["optim"]["batch_size"]}


def markdown(name: str, rows: list[dict[str, Any]]) -> str:
    """A table of a set."""
    lines = [f"### {name}", "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {told(row['miou'])} | {row['accuracy']:.3f} | {told(row['over_random'], '+')} "
            f"| {told(row['over_pixels'], '+') if row['model'] != 'pixels' else '—'} |"
        )
    return "\n".join([*lines, ""])


def told(interval: dict[str, Any] | None, sign: str = "") -> str:
    """Value and bounds."""
    if interval is None:
        return "—"
    return f"{interval['value']:{sign}.3f} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


if __name__ == "__main__":
    main()
