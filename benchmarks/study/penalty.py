"""The penalty of the study's heads, chosen where nothing is tested: on the sample's training and validation scenes.

    python -m benchmarks.study.penalty RUN ...

Each scene is tested by a head of other scenes. Prints the mIoU by penalty, of each run and of the weights that it
started from, normalized; the study takes the penalty that is best over all of them (`PENALTY` in scores.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.study.pretrained import normalized_by
from benchmarks.study.scores import features_of, score_linear
from benchmarks.study.sets import sample_without_test
from benchmarks.study.tables import backbone_of, described, standardizing
from ssl_geo.backbones import untrained
from ssl_geo.imagery.sample import SAMPLE, ensure_sample
from ssl_geo.probing.metrics import miou

PENALTIES = (1e-2, 3e-3, 1e-3)


def main() -> None:
    """Print one row a run and size, and the mean over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="pretraining runs, of any imagery")
    given = parser.parse_args()
    ensure_sample()
    labelled = sample_without_test(SAMPLE)
    rows: list[list[float]] = []
    print(f"| run | size | {' | '.join(f'{penalty:g}' for penalty in PENALTIES)} |", flush=True)
    for run in given.runs:
        mean, std = standardizing(run, labelled)
        trained = backbone_of(run, labelled)
        twin = normalized_by(run, untrained(trained, described(run)["seed"]), labelled.chips.bands)
        for name, network in ((run.name, trained), (f"{run.name}, before it", twin)):
            for enlarge in (1, 2):
                with features_of(network, labelled, mean, std, enlarge, pixels=False) as store:
                    counts = [score_linear(store, list(store.layers), labelled, penalty) for penalty in PENALTIES]
                rows.append([float(miou(blocks.sum(axis=0))) for blocks in counts])
                print(f"| {name} | {enlarge} | {' | '.join(f'{value:.3f}' for value in rows[-1])} |", flush=True)
    print(f"| mean | | {' | '.join(f'{value:.3f}' for value in np.mean(rows, axis=0))} |")


if __name__ == "__main__":
    main()
