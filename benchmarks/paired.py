"""What benchmarks share: numbers asked for, timing in neighbouring pairs, the machine, one JSON object a benchmark.

A machine whose speed drifts still gives a steady ratio when the two sides run in turn: the headline of a benchmark is
the median of the ratios of neighbouring pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path("runs/bench")


class Pair(NamedTuple):
    """Median seconds of both sides, and the median of peer / ours over the pairs."""

    ours: float
    peer: float
    ratio: float


def numbers(doc: str | None, **defaults: int) -> argparse.Namespace:
    """Read whole numbers from the command line, each by the name of its default; `doc` is the benchmark's own."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def compare(ours: Callable[[int], object], peer: Callable[[int], object], rounds: int, warm: int = 2) -> Pair:
    """Time `ours(round)` and `peer(round)` in turn; the first `warm` rounds do not count."""
    pairs = []
    for number in range(warm + rounds):
        began = time.perf_counter()
        ours(number)
        between = time.perf_counter()
        peer(number)
        ended = time.perf_counter()
        if number >= warm:
            pairs.append((between - began, ended - between))
    return Pair(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "bf16_units": "amx_bf16" in flags or "avx512_bf16" in flags,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def finish(benchmark: str, ratio: float | None, target: float | None, **figures: Any) -> None:
    """Print the result as one JSON object and keep it in runs/bench/BENCHMARK.json.

    Args:
        benchmark: Its name.
        ratio: The headline, peer / ours; None for a benchmark without a peer.
        target: What the ratio is to reach.
        figures: All else, named with units.
    """
    result = {
        "benchmark": benchmark,
        "ratio": None if ratio is None else round(ratio, 2),
        "target": target,
        **figures,
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"{benchmark}.json").write_text(text + "\n")
    print(text)
