"""How long one waits: for --help, for the package, and for pretraining's first step on the embedded sample.

    python benchmarks/startup.py [--rounds 2]

Each is a fresh process, in turn with one that does nothing but import torch, which no training goes without. The
headline is what the import of torch alone takes against --help. Prints one JSON object.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from paired import compare, finish, numbers

from ssl_geo.imagery.sample import ensure_sample


def main() -> None:
    """Start every command and print the figures."""
    rounds = numbers(__doc__, rounds=2).rounds
    ensure_sample()  # once for all; the index is cached by the round that does not count
    with tempfile.TemporaryDirectory() as scratch:

        def python(*arguments: str) -> Callable[[int], object]:
            def run(number: int) -> object:
                command = [sys.executable, *(a.replace("ROUND", f"{scratch}/{os.urandom(4).hex()}") for a in arguments)]
                return subprocess.run(command, check=True, capture_output=True)

            return run

        torch = python("-c", "import torch")
        ways = {
            "--help": python("-m", "ssl_geo.pretrain", "--help"),
            "import ssl_geo": python("-c", "import ssl_geo"),
            "import ssl_geo.pretrain": python("-c", "import ssl_geo.pretrain"),
            "first step": python(
                *("-m", "ssl_geo.pretrain", "--out", "ROUND", "--steps", "1", "--data.cache", f"{scratch}/cache")
            ),
        }
        pairs = {name: compare(way, torch, rounds, warm=1) for name, way in ways.items()}
    finish(
        "startup",
        pairs["--help"].ratio,
        None,
        seconds={
            **{name: round(pair.ours, 2) for name, pair in pairs.items()},
            "import torch": round(pairs["first step"].peer, 2),
        },
        torch_against={name: round(pair.ratio, 2) for name, pair in pairs.items()},
    )


if __name__ == "__main__":
    main()
