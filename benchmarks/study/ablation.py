"""What each part of the recipe is worth: short runs that differ in one setting.

    python -m benchmarks.study.ablation [--data FOLDER] [--out runs/ablation] [--steps 100] [--shared FOLDER] [NAME ...]

Pretrains on the embedded sample, or on the chips that --data names (the study leaves its packed ones in
runs/study/packed). Every run sees as many chips as so many steps of the default batch hold. Scored is a linear probe on
the sample's training and validation scenes, each tested by a head of other scenes, so that no test label has a say in a
default; intervals are bootstrapped over scenes. With --shared ../shared/data landcover is scored as well: test ground,
which tells whether it agrees and decides nothing. Prints a line a run and ground: minutes of pretraining where it ran
now, mIoU, its difference from the first run, and what a run is worth over the weights that it started from, normalized.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.paired import machine
from benchmarks.study.pretrained import normalized_by
from benchmarks.study.scores import Blocks, score_backbone
from benchmarks.study.sets import LabelledSet, landcover, sample_without_test
from benchmarks.study.tables import backbone_of, described, standardizing, told
from ssl_geo.backbones import untrained
from ssl_geo.config import OptimConfig
from ssl_geo.imagery.sample import SAMPLE, ensure_sample
from ssl_geo.probing.intervals import bootstrap, paired_difference

VARIANTS: dict[str, list[str]] = {
    "default": [],
    "default, another seed": ["--seed=1"],
    "default, a third seed": ["--seed=2"],
    "channel-repeat always (the origin)": ["--views.channel_repeat=1"],
    "no channel-repeat": ["--views.channel_repeat=0"],
    "no rotation by 90 degrees": ["--views.rotate90=false"],
    "no blur": ["--views.blur=[0,0,0]"],
    "no solarize": ["--views.solarize=0"],
    "two local views": ["--views.local_count=2"],
    "global views of 0.14 to 1": ["--views.global_scale=[0.14,1]"],
    "teacher momentum 0.98": ["--dino.teacher_momentum=0.98"],
    "teacher momentum 0.996": ["--dino.teacher_momentum=0.996"],
    "teacher temperature 0.07": ["--dino.teacher_temp=0.07"],
    "K 256": ["--dino.out_dim=256"],
    "K 8192": ["--dino.out_dim=8192"],
    "batches of 32": ["--optim.batch_size=32"],
    "batches of 128": ["--optim.batch_size=128"],
    "global views of 0.1 to 1, local ones of 0.02 to 0.1": [
        "--views.global_scale=[0.1,1]",
        "--views.local_scale=[0.02,0.1]",
    ],
    "chips of 16 pixels, shown at 32": ["--data.chip_size=16", "--views.global_size=32", "--views.local_size=16"],
    "chips of 32 pixels, shown at 64": ["--views.global_size=64", "--views.local_size=32"],
    "learning rate a quarter": ["--optim.lr=0.001"],
    "chips of 64 pixels": ["--data.chip_size=64"],
    "resnet18": ["--backbone.name=resnet18"],
    "resnet18d": ["--backbone.name=resnet18d"],
    "convnext_atto": ["--backbone.name=convnext_atto"],
    "ViT-tiny, patches of 8 pixels": ["--backbone.name=vit_tiny_patch16_224", "--backbone.arguments={patch_size: 8}"],
    "ViT-tiny, patches of 4 pixels": ["--backbone.name=vit_tiny_patch16_224", "--backbone.arguments={patch_size: 4}"],
}
WAY = "features"
BATCH, DEFAULT = "--optim.batch_size", OptimConfig.batch_size


def main() -> None:
    """Run the variants, one after the other; those that are there are only scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all, {'; '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data", type=Path, help="what to pretrain on; default: the sample")
    parser.add_argument("--shared", type=Path, help="folder of the real imagery, to score landcover as well")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(VARIANTS)):
        parser.error(f"there is no variant {unknown[0]!r}; there are {'; '.join(VARIANTS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    ensure_sample()
    grounds = [sample_without_test(SAMPLE), *([landcover(given.shared)] if given.shared else [])]
    tables: dict[str, list[dict[str, Any]]] = {labelled.name: [] for labelled in grounds}
    source = ["--data", str(given.data)] if given.data else []
    first: dict[str, Blocks] = {}
    starts: dict[str, Blocks] = {}
    for name in tqdm(given.names or VARIANTS, desc="ablation", unit="run"):
        run = given.out / "".join(c if c.isalnum() else "-" for c in name)
        seconds = pretrained(run, given.steps, [*source, *VARIANTS[name]])
        for labelled in grounds:
            row = {"variant": name, "settings": VARIANTS[name], "seconds": seconds}
            row |= compared(run, labelled, first, starts)
            tables[labelled.name].append(row)
            print(f"| {labelled.name} | {in_a_line(row)}", flush=True)
        content = {"machine": machine(), "steps": given.steps, "tables": tables}
        (given.out / "ablation.json").write_text(json.dumps(content, indent=1) + "\n")


def compared(run: Path, labelled: LabelledSet, first: dict[str, Blocks], starts: dict[str, Blocks]) -> dict[str, Any]:
    """Score a run on one ground, against the first run there and the run's own start; both are kept for the next."""
    mean, std = standardizing(run, labelled)
    backbone = backbone_of(run, labelled)
    about = described(run)
    start = json.dumps([labelled.name, backbone.timm, about["seed"], about["data"]], sort_keys=True)
    blocks = score_backbone(backbone, labelled, mean, std, [WAY])[WAY]
    first.setdefault(labelled.name, blocks)
    if start not in starts:
        twin = normalized_by(run, untrained(backbone, about["seed"]), labelled.chips.bands)
        starts[start] = score_backbone(twin, labelled, mean, std, [WAY])[WAY]
    return {
        "miou": vars(bootstrap(blocks)),
        "against_first": vars(paired_difference(blocks, first[labelled.name])),
        "over_normalized": vars(paired_difference(blocks, starts[start])),
    }


def in_a_line(row: dict[str, Any]) -> str:
    """A line of the table."""
    minutes = f"{row['seconds'] / 60:.1f}" if row["seconds"] else ""
    gains = [told(row[against], "+") for against in ("against_first", "over_normalized")]
    return f"{row['variant']} | {minutes} | {told(row['miou'])} | {' | '.join(gains)} |"


def pretrained(run: Path, steps: int, settings: list[str]) -> float:
    """Seconds that a run took, 0 for one that is there; as many chips as so many steps of the default batch hold."""
    if (run / "backbone.safetensors").exists():
        return 0.0
    batch = next((int(value) for name, _, value in (s.partition("=") for s in settings) if name == BATCH), DEFAULT)
    command = [sys.executable, "-m", "ssl_geo.pretrain", "--out", str(run), f"--steps={steps * DEFAULT // batch}"]
    began = time.perf_counter()
    with run.with_suffix(".log").open("wb") as log:
        code = subprocess.run([*command, *settings], check=False, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"pretraining ended with an error: see {log.name}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
