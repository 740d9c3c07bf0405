import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_geo.errors import UserError
from ssl_geo.probing.intervals import bootstrap, paired_difference
from ssl_geo.probing.markdown import markdown
from ssl_geo.probing.metrics import (
    boundary_counts,
    boundary_iou,
    calibration_counts,
    class_iou,
    expected_calibration_error,
    frequency_weighted_iou,
    macro_f1,
    micro_iou,
    miou,
    overall_accuracy,
    scores,
)
from ssl_geo.probing.report import (
    Kind,
    ModelResult,
    ProbeReport,
    write_report,
)

CLASSES = ("water", "forest", "never there")
SUPPORT = np.random.default_rng(0).integers(50, 200, (12, 3)) * np.array([1, 1, 0])


def blocks(skill: float, seed: int = 0, count: int = 12) -> np.ndarray:
    """Confusion matrices of blocks with the same labels whatever the skill; the third class is in no label."""
    share = np.clip(np.random.default_rng(seed).normal(skill, 0.1, (count, 3)), 0, 1)
    matrices = np.zeros((count, 3, 3), np.int64)
    for own in range(3):
        hits = np.round(SUPPORT[:count, own] * share[:, own]).astype(np.int64)
        matrices[:, own, own] = hits
        matrices[:, own, (own + 1) % 3] = SUPPORT[:count, own] - hits
    return matrices


def model(group: str, skill: float, kind: Kind = "head", seed: int | None = None, **more: Any) -> ModelResult:
    name = group if seed is None else f"{group}, seed {seed}"
    more = {"blocks": blocks(skill, seed or 0), "validation_miou": skill} | more
    return ModelResult(name, group, kind, seed, **more)


def full() -> list[ModelResult]:
    """A better test score for fpn, a better validation score for linear; two and three seeds, one for the baselines."""
    rng = np.random.default_rng(1)
    labels, predictions = rng.integers(0, 2, (2, 16, 16))
    return [
        model("majority", 0.2, "baseline"),
        model("pixels", 0.5, "baseline"),
        model("random initialization, linear @ layer4", 0.55, "baseline", seed=0),
        *(model("fpn @ all", 0.9, seed=s, validation_miou=0.5, parameters=2_800_000) for s in range(2)),
        *(
            model(
                "linear @ layer4",
                0.7 + s / 50,
                seed=s,
                validation_miou=0.8 + s / 100,
                parameters=4620,
                best_epoch=3,
                boundary=boundary_counts(np.where(labels == s % 2, labels, 1), predictions, 3),
                calibration=calibration_counts(rng.random((16, 16)), predictions, labels),
            )
            for s in range(3)
        ),
        model("closed form @ layer4", 0.65, "linear probe", validation_miou=0.7),
    ]


def report(results: list[ModelResult], **more: Any) -> ProbeReport:
    more = {"splits": ["test: 40 chips in 12 blocks", "least distance train-test: 560 metres"]} | more
    return ProbeReport(CLASSES, (10, 20, 30), results, **more)


def group(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(g for g in content["groups"] if g["name"] == name)


def pooled(results: list[ModelResult], name: str) -> np.ndarray:
    return sum(r.blocks for r in results if r.group == name)


def test_defect_9_every_class_interval_and_seed_is_reported() -> None:
    results = full()
    told = group(report(results).to_json(), "linear @ layer4")
    counts = pooled(results, "linear @ layer4")
    own = [r for r in results if r.group == "linear @ layer4"]
    for key, statistic in {
        "miou": miou,
        "micro_iou": micro_iou,
        "frequency_weighted_iou": frequency_weighted_iou,
        "overall_accuracy": overall_accuracy,
        "macro_f1": macro_f1,
    }.items():
        expected = bootstrap(counts, statistic)
        single = [float(statistic(r.blocks.sum(0))) for r in own]
        assert told["scores"][key] == pytest.approx(
            {
                "value": float(statistic(counts.sum(0))),
                "low": expected.low,
                "high": expected.high,
                "mean": np.mean(single),
                "sd": np.std(single, ddof=1),
            }
        )
        assert told["scores"][key]["sd"] > 0
    whole = scores(counts.sum(0))
    edges = boundary_iou(sum(r.boundary for r in own))
    for number, line in enumerate(told["per_class"][:2]):
        for key in ("iou", "f1", "precision", "recall"):
            assert line[key] == getattr(whole, key)[number]
        assert line["support"] == SUPPORT[:, number].sum()
        assert line["boundary_iou"] == edges[number]
    assert told["boundary_iou"] == pytest.approx(edges[:2].mean())
    assert told["expected_calibration_error"] == expected_calibration_error(sum(r.calibration for r in own))
    assert told["blocks"] == 12
    assert told["validation_miou"] == pytest.approx(0.81)


def test_gains_are_paired_whatever_the_number_of_seeds() -> None:
    results = full()
    content = report(results).to_json()
    gains = group(content, "linear @ layer4")["gains"]
    for key, reference in {
        "pixels": "pixels",
        "random_initialization": "random initialization, linear @ layer4",
    }.items():
        # Three runs against one: the one, counted three times, has the same labels.
        expected = paired_difference(pooled(results, "linear @ layer4"), 3 * pooled(results, reference))
        assert gains[key] == {
            "reference": reference,
            "value": expected.value,
            "low": expected.low,
            "high": expected.high,
            "blocks": 12,
            "p": expected.p,
        }
        assert gains[key]["value"] > 0
    assert group(content, "pixels")["gains"] == {"pixels": None, "random_initialization": None}
    assert group(content, "fpn @ all")["gains"]["random_initialization"] is None
    assert "no random initialization to compare with: fpn @ all, closed form @ layer4" in content["warnings"]


def test_a_constant_gain_has_no_width() -> None:
    """Were the two models drawn apart, the blocks' own spread would be in the interval."""
    same = blocks(0.7)
    content = report([model("pixels", 0.7, "baseline", blocks=same), model("linear", 0.7, blocks=same)]).to_json()
    gain = group(content, "linear")["gains"]["pixels"]
    assert (gain["value"], gain["low"], gain["high"], gain["p"]) == (0, 0, 0, 1)
    score = group(content, "linear")["scores"]["miou"]
    assert score["low"] < score["high"]


def test_best_is_chosen_on_validation() -> None:
    content = report(full()).to_json()
    assert (
        group(content, "fpn @ all")["scores"]["miou"]["value"]
        > (group(content, "linear @ layer4")["scores"]["miou"]["value"])
    )
    assert content["best"] == "linear @ layer4"
    # Not even a tie goes by the test score.
    tie = [model("linear", 0.6, validation_miou=0.5), model("fpn", 0.9, validation_miou=0.5)]
    assert report(tie).to_json()["best"] == "linear"
    assert report(tie).to_json()["groups"][0]["name"] == "fpn"


def test_baselines_and_broken_models_are_never_the_best() -> None:
    results = [model("pixels", 0.9, "baseline"), model("linear", 0.3), model("fpn", 0.5, validation_miou=math.nan)]
    assert report(results).to_json()["best"] == "linear"
    untrained = model("random initialization, linear", 0.8)  # given as a head, and better than the trained one
    content = report([*results, untrained]).to_json()
    assert content["best"] == "linear"
    assert group(content, untrained.group)["kind"] == content["results"][-1]["kind"] == "baseline"
    content = report(results[:1]).to_json()
    assert content["best"] is None
    assert content["headline"] == "no model was chosen: there are only baselines"
    unknown = [model("linear", 0.3, validation_miou=None), model("fpn", 0.5, validation_miou=None)]
    assert report(unknown).to_json()["headline"] == "no model was chosen: none has a validation score"
    assert report(unknown[:1]).to_json()["headline"].endswith("the only model")


def test_a_baseline_that_does_better_is_in_the_headline() -> None:
    convolutions = model("random convolutions", 0.9, "baseline")
    content = report([model("pixels", 0.5, "baseline"), convolutions, model("linear", 0.7)]).to_json()
    score = group(content, "random convolutions")["scores"]["miou"]["value"]
    assert f", below random convolutions ({score:.3f}), " in content["headline"]
    assert "below pixels" not in content["headline"]
    assert "below" not in report(full()).to_json()["headline"]


def test_headline_is_the_first_line() -> None:
    results = full()
    counts = pooled(results, "linear @ layer4")
    score = bootstrap(counts)
    gains = [
        paired_difference(counts, 3 * pooled(results, reference))
        for reference in ("pixels", "random initialization, linear @ layer4")
    ]
    over = [f"{g.value:+.3f} [{g.low:+.3f}, {g.high:+.3f}] over" for g in gains]
    assert markdown(report(results).to_json()).splitlines()[0] == (
        f"linear @ layer4: mIoU {score}, {over[0]} pixels, {over[1]} random initialization, chosen on validation"
    )


def test_groups_are_sorted_by_kind_then_miou() -> None:
    names = [g["name"] for g in report(full()).to_json()["groups"]]
    assert names == [
        "fpn @ all",
        "linear @ layer4",
        "closed form @ layer4",
        "random initialization, linear @ layer4",
        "pixels",
        "majority",
    ]
    text = markdown(report(full()).to_json())
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[2 : 2 + len(names)] == names


def test_absent_class_is_a_dash_and_null() -> None:
    told = report(full())
    absent = group(told.to_json(), "linear @ layer4")["per_class"][2]
    assert absent == {
        "name": "never there",
        "id": 30,
        "support": 0,
        "iou": None,
        "iou_low": None,
        "iou_high": None,
        "f1": None,
        "precision": None,
        "recall": None,
        "boundary_iou": None,
    }
    assert "| never there | 30 | 0 | — | — | — | — | — |" in markdown(told.to_json())
    water = class_iou(pooled(told.results, "linear @ layer4").sum(0))[0]
    assert f"| water | 10 | {SUPPORT[:, 0].sum():,} | {water:.3f} |" in markdown(told.to_json())


def test_collapse_stands_at_the_top() -> None:
    results = [*full(), model("dpt @ all", 0.1, collapsed="class 0 is predicted everywhere", retried=True)]
    text = markdown(report(results).to_json())
    top = text[: text.index("## ")]
    assert "- dpt @ all: class 0 is predicted everywhere" in top
    assert "| dpt @ all (collapsed) |" in text
    assert report(results).to_json()["collapsed"] == [
        {"name": "dpt @ all", "reason": "class 0 is predicted everywhere"}
    ]
    assert "Collapsed" not in markdown(report(full()).to_json())
    alone = report([model("linear", 0.1, collapsed="the training loss is not finite")])
    assert markdown(alone.to_json()).splitlines()[0].endswith("but COLLAPSED in 1 of 1 runs")
    mended = report([model("linear", 0.6, retried=True)]).to_json()
    assert "linear collapsed at first and was trained again" in mended["warnings"]


def test_too_few_blocks_are_said_in_words() -> None:
    results = [
        model("pixels", 0.5, "baseline", blocks=blocks(0.5, count=3)),
        model("linear", 0.7, blocks=blocks(0.7, count=3)),
    ]
    told = report(results)
    linear = group(told.to_json(), "linear")
    assert not linear["reliable"]
    assert linear["scores"]["miou"]["low"] is None
    assert linear["gains"]["pixels"]["p"] is None
    text = markdown(told.to_json())
    assert "(no interval: 3 blocks, 5 needed)" in text.splitlines()[0]
    assert "no intervals: the test split has 3 spatial blocks, 5 are needed" in text
    assert "nan" not in text.lower()


def test_missing_pixel_baseline_is_said() -> None:
    told = report([model("linear", 0.7)])
    assert "gain over pixels unknown" in told.to_json()["headline"]
    assert "there is no baseline 'pixels': the gain over pixels is unknown" in told.to_json()["warnings"]


def test_json_round_trip_rebuilds_the_text() -> None:
    told = report(
        full(),
        checkpoint={"path": Path("runs/a|b"), "step": np.int64(7), "bands": ("B02", "B03")},
        settings={"device": torch.device("cpu"), "lr": 1e-3, "given": None, "loss": math.nan, "scales": np.ones(2)},
        timings={"features": 12.34},
        files={"map": Path("out/map.tif")},
        warnings=["labels were warped"],
    )
    content = told.to_json()
    again = json.loads(json.dumps(content, allow_nan=False))
    assert again == content
    assert markdown(again) == markdown(told.to_json())
    assert content["settings"] == {"device": "cpu", "lr": 0.001, "given": None, "loss": None, "scales": [1.0, 1.0]}
    for line in ("- map: out/map.tif", "- features: 12.3 s", "- lr: 0.001", "- labels were warped", "- step: 7"):
        assert line in markdown(told.to_json()).splitlines()
    assert "- least distance train-test: 560 metres" in markdown(told.to_json())


def test_no_valid_pixel_at_all_is_null() -> None:
    nothing = np.zeros((6, 3, 3), np.int64)
    told = report([model("pixels", 0, "baseline", blocks=nothing), model("linear", 0, blocks=nothing)])
    content = json.loads(json.dumps(told.to_json(), allow_nan=False))
    assert group(content, "linear")["scores"]["miou"]["value"] is None
    assert "nan" not in markdown(told.to_json()).lower()


def test_schema_is_stable() -> None:
    """A change here is a new schema number, and of the module's description."""
    content = report(full()).to_json()
    assert content["schema"] == 2
    parts = {
        "": content,
        "group": content["groups"][0],
        "score": content["groups"][0]["scores"]["miou"],
        "class": content["groups"][0]["per_class"][0],
        "gain": group(content, "linear @ layer4")["gains"]["pixels"],
        "result": content["results"][0],
    }
    assert {name: " ".join(part) for name, part in parts.items()} == {
        "": "schema headline best classes checkpoint settings splits warnings collapsed timings files references "
        "groups results",
        "group": "name kind parameters seeds runs collapsed retried validation_miou blocks reliable scores "
        "per_class boundary_iou expected_calibration_error gains",
        "score": "value low high mean sd",
        "class": "name id support iou iou_low iou_high f1 precision recall boundary_iou",
        "gain": "reference value low high blocks p",
        "result": "name group kind seed parameters best_epoch validation_miou collapsed retried scores confusion",
    }
    assert content["classes"][1] == {"name": "forest", "id": 20}
    assert content["references"] == {"pixels": "pixels", "random_initialization": "random initialization"}
    linear = next(r for r in content["results"] if r["name"] == "linear @ layer4, seed 1")
    assert np.array_equal(linear["confusion"], blocks(0.72, 1).sum(0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (model("fpn", 0.5, blocks=blocks(0.5)[:5]), "same labels"),
        (model("fpn", 0.5, blocks=blocks(0.5)[::-1]), "same labels"),
        (model("fpn", 0.5, blocks=np.zeros((12, 2, 2), np.int64)), "3 classes"),
        (model("linear", 0.5), "second result of this name"),
        (model("linear", 0.5, "baseline", seed=1), "two kinds"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(wrong: ModelResult, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report([model("linear", 0.6), wrong]).to_json()


def test_names_cannot_break_the_table() -> None:
    text = markdown(report([model("linear @ a|b\nc", 0.6)]).to_json())
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[2].startswith("| linear @ a\\|b c | head |")


# --- files -----------------------------------------------------------------------------------------------------------


def test_report_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = report(full())
    as_text = write_report(tmp_path / "new" / "out", told.to_json())
    as_json = as_text.with_suffix(".json")
    assert json.loads(as_json.read_text()) == told.to_json()
    assert as_text.read_text() == markdown(told.to_json())
    before = as_json.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(as_json.parent, report(full()[:2]).to_json())
    assert as_json.read_bytes() == before
    assert sorted(p.name for p in as_json.parent.iterdir()) == ["report.json", "report.md"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .* cannot be written"):
        write_report(tmp_path / "file", report(full()).to_json())
