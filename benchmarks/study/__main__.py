"""Does pretraining pay? Two runs without labels, then linear heads on labels that they never saw, by place.

    python -m benchmarks.study [--data ../shared/data] [--out runs/study] [--only real|sample] [--seeds S ...]
        [--backbone NAME]

Packs the imagery of --data once, and pretrains on it and on the embedded sample; a run that is there is gone on with
or taken as it is. With --block SECONDS a run is told to save and stop after so long (exit code 75); the same command
goes on then. Writes study.json, and study.md with one table a labelled set: counts are those of all seeds and folds,
intervals are bootstrapped over the spatial blocks of the test ground, gains are paired differences.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.paired import machine
from benchmarks.study.sets import TWELVE, cloud, landcover, sample, seasonal, water
from benchmarks.study.tables import CURVE, markdown, table
from ssl_geo.imagery.sample import SAMPLE, ensure_sample

UNLABELLED = ("scenes", "bigearthnet", "chips_coastal", "chips_seasonal", "jp2_multires")
TOLD_TO_STOP = 75  # exit code of a run that was told to stop and has saved
SETS = {"real": [landcover, water, seasonal, cloud], "sample": [sample]}


def main() -> None:
    """Pretrain, test, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--steps-real", type=int, default=1400)
    parser.add_argument("--steps-sample", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each half one run a seed; default: 0")
    parser.add_argument("--backbone", help="timm model of all runs; default: that of pretraining")
    parser.add_argument("--block", type=float, help="seconds after which pretraining saves and stops; default: never")
    parser.add_argument("--only", choices=["real", "sample"], help="one of the two halves")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, leave)
    ensure_sample()
    halves = {"sample": given.steps_sample, "real": given.steps_real}
    if given.only:
        halves = {given.only: halves[given.only]}
    if "real" in halves and not given.data.is_dir():
        parser.error(f"--data {given.data} is no folder: name the real imagery, or ask for --only sample")
    began = time.perf_counter()
    runs: dict[str, list[Path]] = {name: [] for name in halves}
    network = [f"--backbone.name={given.backbone}"] if given.backbone else []
    for name, steps in halves.items():
        data = [] if name == "sample" else ["--data", str(packed(given.data, given.out / "packed"))]
        for seed in dict.fromkeys(given.seeds):
            run = given.out / "-".join(filter(None, [name, given.backbone, seed and f"seed{seed}"]))
            code = ended(pretrain(run, [*data, *network], steps, seed), given.block and began + given.block)
            if code == TOLD_TO_STOP:
                print(f"saved after {given.block:.0f} s: the same command goes on")
                raise SystemExit(TOLD_TO_STOP)
            if code:
                raise SystemExit(f"a run ended with an error: see {run}.log")
            runs[name].append(run)
    pretrained = time.perf_counter() - began
    labelled = {"real": given.data, "sample": SAMPLE}
    wanted = [(runs[half], make, labelled[half]) for half in halves for make in SETS[half]]
    tables: dict[str, Any] = {}
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for name, rows in pool.map(table, *zip(*wanted, strict=True)):
            tables[name] = rows
            print(markdown(name, rows), flush=True)
    seconds = {"pretraining": pretrained, "all": time.perf_counter() - began}
    content = {"machine": machine(), "seconds": seconds, "tables": tables}
    (given.out / "study.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "study.md").write_text("\n".join(markdown(name, rows) for name, rows in tables.items()))


def packed(shared: Path, out: Path) -> Path:
    """Chips of all unlabelled real imagery, written once: no image that a label belongs to but the seasonal chips."""
    folders = [str(shared / name) for name in UNLABELLED]
    dates = sorted(map(str, (shared / "water/images").glob("Boadella_*.tif")))
    told = ["--data.band_names", *TWELVE, "--data.allow_mixed", "true", "--data.level", "L2A"]
    command = [sys.executable, "-m", "ssl_geo.pack", "--data", *folders, *dates, *told, "--out", str(out)]
    with out.with_suffix(".log").open("ab") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"packing ended with an error: see {log.name}")
    return out


def pretrain(run: Path, settings: list[str], steps: int, seed: int) -> subprocess.Popen[bytes]:
    """Start a run, with the defaults that everybody gets but for the settings, or go on with it."""
    command = [sys.executable, "-m", "ssl_geo.pretrain"]
    if (run / "checkpoints").is_dir():
        command += ["--resume", str(run)]
    else:
        kept = [f"--log.checkpoint_every={max(1, round(CURVE[0] * steps))}", "--log.keep=100"]
        command += [*settings, "--out", str(run), f"--steps={steps}", f"--seed={seed}", *kept]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stderr=log)


def ended(process: subprocess.Popen[bytes], deadline: float | None) -> int:
    """Exit code of a run, which is told to save and stop at the deadline, or where the study itself is to end."""
    try:
        return process.wait(None if deadline is None else max(0.0, deadline - time.perf_counter()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def leave(number: int, frame: FrameType | None) -> None:
    """End with the processes that make tables; a run is told by `ended`."""
    for child in active_children():
        child.terminate()
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
