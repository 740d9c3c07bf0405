"""Every benchmark that a CPU can run, one after the other, and one table of what came out.

    python -m benchmarks [NAME ...]

A missed target is a measurement, a crash is a failure: exit code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = Path("runs/bench")  # where paired.finish leaves them
SHARED = {"paired", "__main__"}
TOLD = {"benchmark", "ratio", "target", "command", "machine"}  # the rest of a result are its figures
COLUMNS = ["benchmark", "ratio", "target", "reached", "seconds", "main figures"]
FIGURES = 4


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    """Run the benchmarks of a folder and print the table."""
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem not in SHARED)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all, {' '.join(names)}")
    chosen = parser.parse_args(arguments).names or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"there is no benchmark {' '.join(unknown)}; there are {' '.join(names)}")
    rows, crashed = [], []
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        before, began = result(name), time.perf_counter()
        done = subprocess.run([sys.executable, str(folder / f"{name}.py")], capture_output=True, text=True)
        took, after = time.perf_counter() - began, result(name)
        if done.returncode:
            crashed.append(name)
            print(f"{name} crashed with exit code {done.returncode}:\n{done.stderr}", file=sys.stderr)
            rows.append([name, "", "", "crashed", f"{took:.0f}", ""])
        elif after is None or after == before:
            rows.append([name, "", "", "", f"{took:.0f}", f"left no {RESULTS / name}.json"])
        else:
            rows.append(row(json.loads(after[1]), took))
    print(table([COLUMNS, *rows]))
    return 1 if crashed else 0


def result(name: str) -> tuple[int, str] | None:
    """When a benchmark left its result, and what it says."""
    path = RESULTS / f"{name}.json"
    return (path.stat().st_mtime_ns, path.read_text()) if path.is_file() else None


def row(found: dict[str, Any], took: float) -> list[str]:
    """What the table tells of a result."""
    ratio, target = found["ratio"], found["target"]
    reached = "" if ratio is None or target is None else "yes" if ratio >= target else "no"
    figures = [
        f"{name} {plain(value)}" for name, value in found.items() if name not in TOLD and value not in (None, [])
    ]
    return [found["benchmark"], plain(ratio), plain(target), reached, f"{took:.0f}", ", ".join(figures[:FIGURES])]


def plain(value: Any) -> str:
    """A value on one line."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return " / ".join(f"{plain(part)} {name}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[list[str]]) -> str:
    """Rows, the first of them the heads, as Markdown with even columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
