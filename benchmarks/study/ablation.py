"""What each part of the recipe is worth: short runs on the sample that differ in one setting.

    python -m benchmarks.study.ablation [--out runs/ablation] [--steps 100] [NAME ...]

Every run sees the same number of chips. Scored is a linear probe that is fitted and chosen on the sample's training
scenes and tested on its validation scenes, so that no test label has a say in a default. Prints one table: mIoU and its
difference from the first run, of features as they are and at twice the size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.paired import machine
from benchmarks.study.scores import score_backbone
from benchmarks.study.sets import sample
from benchmarks.study.tables import backbone_of, standardizing, told
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
    "K 8192": ["--dino.out_dim=8192"],
    "global views of 0.1 to 1, local ones of 0.02 to 0.1": [
        "--views.global_scale=[0.1,1]",
        "--views.local_scale=[0.02,0.1]",
    ],
    "chips of 16 pixels, shown at 32": ["--data.chip_size=16", "--views.global_size=32", "--views.local_size=16"],
    "chips of 32 pixels, shown at 64": ["--views.global_size=64", "--views.local_size=32"],
    "learning rate a quarter": ["--optim.lr=0.001"],
    "chips of 64 pixels": ["--data.chip_size=64"],
    "resnet18": ["--backbone.name=resnet18"],
    "convnext_atto": ["--backbone.name=convnext_atto"],
}
SCORED = ("features", "features at twice the size")


def main() -> None:
    """Run the variants, one after the other; those that are there are only scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all, {'; '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(VARIANTS)):
        parser.error(f"there is no variant {unknown[0]!r}; there are {'; '.join(VARIANTS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    ensure_sample()
    labelled = sample(SAMPLE, trains=["train"], tests="val")
    rows: list[dict[str, Any]] = []
    reference = None
    for name in tqdm(given.names or VARIANTS, desc="ablation", unit="run"):
        run, began = given.out / "".join(c if c.isalnum() else "-" for c in name), time.perf_counter()
        if not (run / "backbone.safetensors").exists():
            command = [sys.executable, "-m", "ssl_geo.pretrain", "--out", str(run), f"--steps={given.steps}"]
            with run.with_suffix(".log").open("wb") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run([*command, *VARIANTS[name]], check=True, stdout=log, stderr=log, env=environment)
        seconds = time.perf_counter() - began
        mean, std = standardizing(run, labelled)
        scored = score_backbone(backbone_of(run, labelled), labelled, mean, std, SCORED)
        reference = scored if reference is None else reference
        row: dict[str, Any] = {"variant": name, "settings": VARIANTS[name], "seconds": seconds}
        for way, blocks in scored.items():
            against = paired_difference(blocks, reference[way])
            row[way] = {"miou": vars(bootstrap(blocks)), "against_first": vars(against)}
        rows.append(row)
        cells = [f"{told(row[way]['miou'])} | {told(row[way]['against_first'], '+')}" for way in SCORED]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    content = {"machine": machine(), "steps": given.steps, "rows": rows}
    (given.out / "ablation.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
