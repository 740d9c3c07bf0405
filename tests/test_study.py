"""The folds of benchmarks/study: what trains or chooses is never tested, all ground is tested once, dates together."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.sample import make_sample

ROOT = Path(__file__).resolve().parents[1]
TWELVE = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]


def write(path: Path, channels: int, side: int, *, left: float | None, bands: list[str] | None = None) -> None:
    """Random DN, or of one channel random classes, on a grid of 10 m; without georeferencing where left is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    most = 4000 if channels > 1 else 3
    drawn = np.random.default_rng(0).integers(1, most + 1, (channels, side, side))
    write_geotiff(
        path,
        drawn.astype(np.uint16 if channels > 1 else np.uint8),
        crs=None if left is None else "EPSG:32633",
        transform=None if left is None else (10.0, 0.0, left, 0.0, -10.0, 5_300_000.0),
        descriptions=bands,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folders that the study reads, small: sides that blocks do not divide, several places, five dates of two."""
    folder = tmp_path_factory.mktemp("shared")
    for place in range(2):
        for kind, channels in (("images_l2a", 12), ("labels", 1)):
            write(folder / "landcover" / kind / f"place_{place}.tif", channels, 250, left=400_000.0 + 9000 * place)
        for date in range(5):
            image = folder / "chips_seasonal" / f"SITE{place}_2018010{date + 1}.tif"
            write(image, 12, 64, left=500_000.0 + 9000 * place, bands=TWELVE)
        write(folder / "chips_seasonal_labels" / f"SITE{place}_LC.tif", 1, 64, left=500_000.0 + 9000 * place)
    for kind, channels in (("images", 12), ("labels", 1)):
        write(folder / "water" / kind / "labelled_image_1.tif", channels, 300, left=600_000.0)
    for kind, channels in (("images", 6), ("labels", 1)):
        write(folder / "cloud" / kind / "scene.tif", channels, 300, left=None)
    return folder


@pytest.fixture
def study(monkeypatch):
    """A module of the study by its name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.study.{name}")


def grounds(chips) -> list[tuple[float, ...]]:
    """Upper left corner of each chip: where it lies, whatever image it is of."""
    corners = []
    for number, row, col in zip(chips.scene, chips.row, chips.col, strict=True):
        a, _, c, _, e, f = chips.scenes[number].scene.transform
        corners.append((c + a * col, f + e * row))
    return corners


@pytest.mark.parametrize(("name", "dates"), [("landcover", 1), ("water", 1), ("cloud", 1), ("seasonal", 4)])
def test_folds_share_no_ground_and_test_all_of_it_once(study, shared, name, dates):
    labelled = getattr(study("sets"), name)(shared)
    where = grounds(labelled.chips)
    assert set(Counter(where).values()) == {dates}
    tested: list[int] = []
    blocks: list[tuple[int, tuple[float, ...]]] = []
    for fold in labelled.folds:
        parts = [part.tolist() for part in (fold.train, fold.test)]
        assert all(parts)
        assert sorted(itertools.chain(*parts)) == list(range(len(labelled.chips)))
        ground = [{where[chip] for chip in part} for part in parts]
        assert sum(map(len, ground)) == len(set.union(*ground))
        tested += parts[-1]
        blocks += zip(fold.block.tolist(), (where[chip] for chip in parts[-1]), strict=True)
    assert sorted(tested) == list(range(len(labelled.chips)))
    assert len({block for block, _ in blocks}) == len({place for _, place in blocks}) == len(set(blocks))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_sample(tmp_path_factory.mktemp("sample"), scenes=6, size=240)


def test_the_samples_scenes_are_held_out_whole(study, made):
    labelled = study("sets").sample(made)
    (fold,) = labelled.folds
    told = {scene["name"]: scene["split"] for scene in json.loads((made / "sample.json").read_text())["scenes"]}
    stems = [Path(labelled.chips.scenes[number].scene.path).stem for number in labelled.chips.scene]
    for splits, part in (({"train", "val"}, fold.train), ({"test"}, fold.test)):
        assert part.tolist() == [chip for chip, stem in enumerate(stems) if told[stem] in splits]
    assert len(set(fold.block.tolist())) == len(fold.test)


def test_no_test_chip_has_a_say_in_a_default(study, made):
    sets = study("sets")
    labelled = sets.sample_without_test(made)
    (whole,) = sets.sample(made).folds
    own = whole.train.tolist()
    assert sorted(np.concatenate([fold.test for fold in labelled.folds]).tolist()) == own
    for fold in labelled.folds:
        parts = [set(labelled.chips.scene[part].tolist()) for part in (fold.train, fold.test)]
        assert sorted(np.concatenate([fold.train, fold.test]).tolist()) == own
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert fold.block.tolist() == labelled.chips.scene[fold.test].tolist()


ENDING = """
import os, signal, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.study.__main__ import ended, leave

class Run(subprocess.Popen):
    def wait(self, timeout=None):
        print(self.pid, flush=True)  # not before somebody waits for it
        return super().wait(timeout)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    if sys.argv[1] == "tables":
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            print(pool.submit(os.getpid).result(), flush=True)
            pool.submit(time.sleep, 600).result()
    else:
        ended(Run(["sleep", "600"]), None)
"""


@pytest.mark.parametrize("doing", ["tables", "a run"])
def test_a_study_that_is_told_to_end_leaves_no_process_behind(tmp_path, doing):
    script = tmp_path / "study.py"
    script.write_text(ENDING)
    command, environment = [sys.executable, str(script), doing], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        child = int(process.stdout.readline())
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_counts_of_all_seeds_are_added_and_each_seed_is_told(study, tmp_path, monkeypatch):
    tables = study("tables")
    runs = [tmp_path / "run", tmp_path / "run-seed1"]
    for run in runs:
        (run / "checkpoints").mkdir(parents=True)
        for step in range(10, 101, 10):
            (run / "checkpoints" / f"step-{step:08d}.pt").touch()
        (run / "config.yaml").write_text("backbone: {name: any}\noptim: {batch_size: 64}\nseed: 0\ndata: {}\n")
    right, wrong = np.array([[9, 1], [1, 9]]), np.array([[5, 5], [5, 5]])
    asked = []

    def score(source, labelled, mean, std, ways=tuple(tables.WAYS)):
        asked.append(source)
        pretrained = str(source).startswith(str(runs[0] / "checkpoints"))
        return {way: np.stack([right if pretrained else wrong] * 3) for way in ways}

    monkeypatch.setattr(tables, "standardizing", lambda run, labelled: (0, 1))
    monkeypatch.setattr(tables, "backbone_of", lambda source, labelled: source)
    monkeypatch.setattr(tables, "untrained", lambda backbone, seed: "random")
    monkeypatch.setattr(tables, "normalized_by", lambda run, network, bands: "random")
    monkeypatch.setattr(tables, "score_backbone", score)
    monkeypatch.setattr(tables, "score_plain", lambda *_: {name: np.stack([wrong] * 3) for name in tables.PLAIN})
    name, rows = tables.table(
        runs, lambda folder: SimpleNamespace(name="set", chips=SimpleNamespace(bands=())), tmp_path
    )
    whole = {row["model"]: row for row in rows}["DINO, 6,400 chips, features"]
    iou = np.diag(right + wrong) / (2 * 20 - np.diag(right + wrong))  # every class has 10 pixels on each side
    assert name == "set"
    assert whole["miou"]["value"] == pytest.approx(iou.mean())
    assert whole["each_seed"] == pytest.approx([9 / 11, 5 / 15])
    assert whole["over_pixels"]["value"] == pytest.approx(iou.mean() - 5 / 15)
    assert [Path(source).name for source in asked if source != "random"] == [
        f"step-{step:08d}.pt" for step in (10, 20, 100) for _ in runs
    ]


@pytest.mark.parametrize(
    ("asked", "name", "settings"),
    [([], "sample", []), (["--backbone", "resnet18d"], "sample-resnet18d", ["--backbone.name=resnet18d"])],
)
def test_each_seed_and_backbone_asked_for_is_a_run_of_its_own(study, tmp_path, monkeypatch, asked, name, settings):
    main, begun = study("__main__"), []
    monkeypatch.setattr(main, "ensure_sample", lambda: None)
    monkeypatch.setattr(main, "pretrain", lambda run, told, steps, seed: begun.append((run.name, told, seed)))
    monkeypatch.setattr(main, "ended", lambda process, deadline: main.TOLD_TO_STOP if len(begun) == 2 else 0)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    call = ["study", "--only", "sample", "--seeds", "0", "3", "0", "--block", "60", "--out", str(tmp_path / "study")]
    monkeypatch.setattr(sys, "argv", [*call, *asked])
    with pytest.raises(SystemExit):
        main.main()
    assert begun == [(name, settings, 0), (f"{name}-seed3", settings, 3)]


def test_a_run_is_held_against_the_first_and_its_own_start_of_the_same_ground(study, monkeypatch):
    ablation = study("ablation")
    right, half, wrong = np.array([[8, 0], [0, 8]]), np.array([[6, 2], [2, 6]]), np.array([[4, 4], [4, 4]])
    counts = {("a", 0): half, ("b", 0): right, ("start of a", 0): wrong, ("start of b", 0): half}
    counts |= {("a", 1): wrong, ("b", 1): half, ("start of a", 1): wrong, ("start of b", 1): right}
    scored = []

    def score(source, labelled, mean, std, ways):
        scored.append((source.timm, labelled.number))
        return {way: np.stack([counts[source.timm, labelled.number]] * 3) for way in ways}

    monkeypatch.setattr(ablation, "standardizing", lambda run, labelled: (0, 1))
    monkeypatch.setattr(ablation, "backbone_of", lambda run, labelled: SimpleNamespace(timm=run.name))
    monkeypatch.setattr(ablation, "described", lambda run: {"seed": 0, "data": {"chip_size": len(run.parts)}})
    monkeypatch.setattr(ablation, "untrained", lambda backbone, seed: SimpleNamespace(timm=f"start of {backbone.timm}"))
    monkeypatch.setattr(ablation, "normalized_by", lambda run, network, bands: network)
    monkeypatch.setattr(ablation, "score_backbone", score)
    grounds = [SimpleNamespace(name=f"ground {k}", number=k, chips=SimpleNamespace(bands=())) for k in range(2)]
    first, starts, gains = {}, {}, []
    for run in ("a", "b", "a"):
        for labelled in grounds:
            row = ablation.compared(Path(run), labelled, first, starts)
            gains.append([row[name]["value"] for name in ("miou", "against_first", "over_normalized")])
    miou = {"right": 1.0, "half": 6 / 10, "wrong": 4 / 12}
    a = [[miou["half"], 0, miou["half"] - miou["wrong"]], [miou["wrong"], 0, 0]]
    b = [[1, 1 - miou["half"], 1 - miou["half"]], [miou["half"], miou["half"] - miou["wrong"], miou["half"] - 1]]
    np.testing.assert_allclose(gains, [*a, *b, *a], atol=1e-12)
    # The same network on other chips starts from other statistics.
    ablation.compared(Path("other/a"), grounds[0], first, starts)
    assert scored[-2:] == [("a", 0), ("start of a", 0)]
    assert Counter(scored[:-2]) == {
        key: 1 if key[0].startswith("start") else (2 if key[0] == "a" else 1) for key in counts
    }
