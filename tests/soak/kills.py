"""Kill a run at random moments (SIGKILL), resume it each time, and compare it with the run that nobody disturbed.

    python tests/soak/kills.py --data IMAGERY --kills 50 FOLDER

Ends with code 1 where weights, center, optimizer state or log differ, or a checkpoint was lost. Runs are forked from
this process, which has imported everything and computed nothing, so that the kills meet training and not the imports.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from ssl_geo.config import pretrain_config
from ssl_geo.errors import one_line_errors
from ssl_geo.pretrain import main as pretrain
from ssl_geo.training import runs

INTERVAL = 3  # steps between checkpoints
OF_TIME = {"data_wait", "samples_per_s"}  # what a log holds of the clock


def start(arguments: list[str], said: Path) -> int:
    """Fork a run and return its process id."""
    child = os.fork()
    if child:
        return child
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        torch.set_num_threads(1)
        with one_line_errors("soak"):
            code = pretrain(pretrain_config(arguments))
    finally:
        sys.stdout.flush()
        os._exit(code)


def saved_step(run: Path) -> int:
    """Of the run's last checkpoint, by its name; 0 where there is none."""
    found = runs.checkpoints(run)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def log(run: Path) -> list[dict]:
    """The log without what the clock says."""
    lines = (run / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in OF_TIME} for line in lines]


def same(a: object, b: object) -> bool:
    """Whether two parts of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    settings = [
        *("--data", *given.data, "--data.cache", str(given.folder / "cache"), "--data.chip_size", "32"),
        *("--data.bands", "B02", "B03", "B04", "B08", "B11", "--data.workers", str(given.workers)),
        *("--optim.batch_size", "4", "--optim.precision", "fp32", "--views.local_count", "2"),
        *("--dino.out_dim", "64", "--dino.hidden_dim", "32", "--dino.bottleneck_dim", "16"),
        *("--backbone.name", "vit_tiny_patch16_224", "--steps", str(40 + 15 * given.kills)),
        *("--backbone.arguments", "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, drop_path_rate: 0.1}"),
        *("--log.every", "1", "--log.checkpoint_every", str(INTERVAL), "--log.keep", "2", "--log.health_every", "7"),
    ]
    given.folder.mkdir(parents=True, exist_ok=True)
    undisturbed, run, said = given.folder / "undisturbed", given.folder / "killed", given.folder / "said.txt"
    began = time.monotonic()
    _, status = os.waitpid(start([*settings, "--out", str(undisturbed)], said), 0)
    lasts = time.monotonic() - began
    if status:
        print(f"the undisturbed run failed:\n{said.read_text()}")
        return 1

    kills, before_first, before = 0, 0, 0
    while True:
        going_on = runs.is_run(run)
        child = start(["--resume", str(run)] if going_on else [*settings, "--out", str(run)], said)
        if kills < given.kills:
            # Mostly while it trains, now and then while it starts or ends.
            time.sleep(draw.uniform(0, 1 + 0.7 * lasts / given.kills))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        text = said.read_text()
        if os.WIFSIGNALED(status):
            kills += 1
            before_first += not runs.checkpoints(run)
            if "torn" in text or saved_step(run) < before:
                print(f"a checkpoint was lost after kill {kills}: step {before} before, {saved_step(run)} now\n{text}")
                return 1
            before = saved_step(run)
        elif status:
            print(f"ended by itself with {os.waitstatus_to_exitcode(status)} after kill {kills}:\n{text}")
            return 1
        else:
            break
    if left := [str(path) for path in run.rglob(".*")]:
        print(f"left behind: {' '.join(left)}")
        return 1
    first, second = (runs.last_checkpoint(folder) for folder in (undisturbed, run))
    different = [key for key in ("step", "method", "optimizer", "backbone") if not same(first[key], second[key])]
    different += [] if log(undisturbed) == log(run) else ["log"]
    print(
        f"{kills} kills, {before_first} of them before the first checkpoint; "
        + (f"different: {', '.join(different)}" if different else "weights, center, optimizer and log are identical")
    )
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
