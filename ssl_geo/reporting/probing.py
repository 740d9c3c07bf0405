"""OUT/report.html: what a probe found, from report.json and pictures of its test chips."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo import figures
from ssl_geo.figures.sheets import IGNORED, Classes, Colour
from ssl_geo.reporting.page import Page, Picture, Section, Table

SHOWN = 4  # best and worst chips
CHARTED = 32  # classes that a chart shows; of more the most frequent
Json = Mapping[str, Any]


@dataclass(frozen=True)
class ProbeChips:
    """What the page shows of the chips.

    Attributes:
        images: (C, H, W) reflectance of the best test chips, the best first, and then of the worst, the worst first.
        valid: (H, W) each.
        labels: (H, W) each, 0 … C-1, 255 where there is none.
        predictions: (H, W) each, of the chosen model.
        names: What to call each.
        best: How many of them are the best.
        bands: Names of the channels.
        colours: Of the classes.
        features: (M, D, h, w) of the first M of them, of one layer.
        layer: Its name.
        bounds: (N, 4) left, bottom, right, top of all chips, in `unit`; None where they lie on no common ground.
        splits: (N,) of all chips.
        class_pixels: (N, C) labelled pixels of all chips.
    """

    images: Sequence[npt.NDArray[np.float32]]
    valid: Sequence[npt.NDArray[np.bool_]]
    labels: Sequence[Classes]
    predictions: Sequence[Classes]
    names: Sequence[str]
    best: int
    bands: Sequence[str]
    colours: Sequence[Colour]
    features: npt.NDArray[np.float32]
    layer: str
    bounds: npt.NDArray[np.float64] | None
    splits: Sequence[str]
    class_pixels: npt.NDArray[np.integer]


def chosen_chips(
    labels: npt.NDArray[np.uint8], predictions: npt.NDArray[np.uint8], most: int = SHOWN
) -> tuple[list[int], list[int]]:
    """The chips with the greatest and the least share of right pixels, of those that are labelled by half if any are.

    Args:
        labels: (N, H, W), 255 where there is none.
        predictions: (N, H, W).
        most: How many of each at most.

    Returns:
        Numbers of the best, the best first, and of the worst, the worst first; no chip is in both.
    """
    labelled = labels != IGNORED
    share = labelled.mean(axis=(1, 2))
    candidates = np.flatnonzero(share >= min(0.5, share.max()))
    right = ((predictions == labels) & labelled).sum(axis=(1, 2)) / np.maximum(labelled.sum(axis=(1, 2)), 1)
    order = candidates[np.argsort(-right[candidates], kind="stable")]
    best = order[: min(most, (len(order) + 1) // 2)]
    worst = order[::-1][: min(most, len(order) - len(best))]
    return best.tolist(), worst.tolist()


def probe_page(report: Json, chips: ProbeChips) -> Page:
    """The page of a probe.

    Args:
        report: As of `ProbeReport.to_json`.
        chips: Test chips with their predictions, and where all chips lie.
    """
    groups, names = report["groups"], [c["name"] for c in report["classes"]]
    best = next((group for group in groups if group["name"] == report["best"]), groups[0])
    facts = [_fact(best["scores"]["miou"], f"mIoU of {best['name']}")]
    for key, text in (("pixels", "over single pixels"), ("random_initialization", "over the untrained backbone")):
        if gain := best["gains"][key]:
            facts.append(_fact(gain, f"mIoU {text}", "+"))
    facts += [(f"{best['scores']['overall_accuracy']['value']:.1%}", "of the test pixels right")]
    facts += [(str(best["blocks"]), "test blocks, which the intervals are drawn from")]
    return Page(
        title=f"Probe of {report['checkpoint'].get('path', 'a backbone')}",
        lead=report["headline"],
        facts=facts,
        warnings=[*(f"collapsed: {c['name']}: {c['reason']}" for c in report["collapsed"]), *report["warnings"]],
        sections=[
            _models(report, best),
            _classes(report, best, names, chips.colours),
            _maps(chips, names),
            _features(chips),
            _data(report, chips, names),
            _settings(report),
        ],
        foot="Written by python -m ssl_geo.probe; every number is in report.json beside this page.",
    )


def _models(report: Json, best: Json) -> Section:
    groups = sorted(report["groups"], key=lambda g: (g["kind"] == "baseline", -(g["scores"]["miou"]["value"] or 0)))
    scores = [group["scores"]["miou"] for group in groups]
    chart = figures.model_chart(
        [group["name"] for group in groups],
        [score["value"] for score in scores],
        [score["low"] for score in scores],
        [score["high"] for score in scores],
        [group["kind"] for group in groups],
        chosen=best["name"],
    )
    rows = [
        [
            group["name"],
            _score(group["scores"]["miou"]),
            *(_score(gain, "+") if gain else "—" for gain in group["gains"].values()),
            _number(group["scores"]["overall_accuracy"]["value"]),
            _number(group["boundary_iou"]),
        ]
        for group in groups
    ]
    header = ["model", "mIoU", "over pixels", "over untrained", "accuracy", "boundary IoU"]
    return Section(
        "Models and baselines",
        "Every model on the same test blocks. The one in bold was chosen on validation chips, which are none of these; "
        "a gain whose interval holds 0 is no evidence.",
        [Picture(chart, "mIoU with its 95 % interval over spatial blocks of the test split.", wide=True)],
        [Table(header, rows, strong=best["name"])],
    )


def _classes(report: Json, best: Json, names: Sequence[str], colours: Sequence[Colour]) -> Section:
    of_class = best["per_class"]
    runs = [result for result in report["results"] if result["group"] == best["name"]]
    counts = np.sum([np.array(run["confusion"]) for run in runs], axis=0)
    charted = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:CHARTED])
    bars = figures.class_bars(
        [names[k] for k in charted],
        *([of_class[k][key] for k in charted] for key in ("iou", "iou_low", "iou_high")),
        colours=[colours[k] for k in charted],
    )
    others = ["all others"] if len(charted) < len(names) else []
    matrix = figures.confusion_chart(_together(counts, charted), [*(names[k] for k in charted), *others])
    which = f", the {len(charted)} most frequent of {len(names)}," if others else ""
    rows = [
        [c["name"], f"{c['support']:,}", *(_number(c[k]) for k in ("iou", "f1", "precision", "recall", "boundary_iou"))]
        for c in of_class
    ]
    seeds = f", {len(runs)} seeds added up" if len(runs) > 1 else ""
    return Section(
        "Classes",
        f"Of {best['name']}{seeds}.",
        [
            Picture(bars, f"IoU of each class{which} with its 95 % interval over test blocks."),
            Picture(matrix, "Rows are labels: what share of a class's pixels was taken for which class."),
        ],
        [Table(["class", "test pixels", "IoU", "F1", "precision", "recall", "boundary IoU"], rows)],
    )


def _together(counts: npt.NDArray[np.integer], chosen: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Confusion matrix of the chosen classes and, where there are others, of all those together as the last."""
    place = np.full(len(counts), len(chosen))
    place[chosen] = np.arange(len(chosen))
    size = len(chosen) + (len(chosen) < len(counts))
    together = np.zeros((size, size), counts.dtype)
    np.add.at(together, (place[:, None], place[None, :]), counts)
    return together


def _maps(chips: ProbeChips, names: Sequence[str]) -> Section:
    shown = _composites(chips)
    right = [
        np.mean((predicted == label)[label != IGNORED])
        for label, predicted in zip(chips.labels, chips.predictions, strict=True)
    ]
    pictures = []
    for title, part in (("Most right", slice(chips.best)), ("Most wrong", slice(chips.best, None))):
        if shown[part]:
            sheet = figures.class_sheet(
                shown[part],
                chips.labels[part],
                chips.predictions[part],
                names,
                chips.colours,
                row_titles=[f"{share:.0%} right" for share in right[part]],
            )
            pictures.append(Picture(sheet, f"{title}, from above: {'; '.join(chips.names[part])}."))
    return Section(
        "Best and worst chips",
        "Test chips by their share of right pixels. In the error maps wrong pixels are orange; pixels without a label "
        "are grey and count for nothing.",
        pictures,
    )


def _features(chips: ProbeChips) -> Section:
    count, (height, width) = len(chips.features), chips.features.shape[2:]
    images = _composites(chips)[:count]
    asked = [figures.central_place(valid, (height, width)) for valid in chips.valid[:count]]
    return Section(
        "What the features hold",
        f"Dense features of {chips.layer}, {height}×{width} places a chip, as the heads get them.",
        [
            Picture(
                figures.pca_sheet(images, {"features": chips.features}),
                "The three main components as red, green and blue: equal colours are equal features, in all chips.",
                wide=True,
            ),
            Picture(
                figures.similarity_sheet(images, chips.features, asked),
                "Cosine similarity to the ringed place: red is alike, white unrelated, blue opposed.",
                wide=True,
            ),
        ],
    )


def _composites(chips: ProbeChips) -> list[npt.NDArray[np.float32]]:
    return [
        figures.composite(image, chips.bands, valid=valid)
        for image, valid in zip(chips.images, chips.valid, strict=True)
    ]


def _data(report: Json, chips: ProbeChips, names: Sequence[str]) -> Section:
    splits = list(dict.fromkeys(["train", "val", "test", *chips.splits]))
    member = np.array(chips.splits)
    parts = {split: member == split for split in splits if (member == split).any()}
    pixels = [chips.class_pixels[part].sum(axis=0) for part in parts.values()]
    rows = [["chips", *(f"{part.sum():,}" for part in parts.values())]]
    rows += [[f"{name}, pixels", *(f"{count[k]:,}" for count in pixels)] for k, name in enumerate(names)]
    pictures = []
    if chips.bounds is not None:
        drawn = figures.footprints_map(chips.bounds, chips.splits)
        pictures.append(Picture(drawn, "Where the chips of each split lie; small ones are drawn larger than they are."))
    return Section(
        "What data went in",
        pictures=pictures,
        tables=[Table(["", *parts], rows)],
        lines=report["splits"],
    )


def _settings(report: Json) -> Section:
    called = {"expected": "expected beforehand"}
    seconds = [[called.get(name, name), f"{value:.1f}"] for name, value in report["timings"].items()]
    folded = [(name, json.dumps(report[name], indent=2, ensure_ascii=False)) for name in ("settings", "checkpoint")]
    return Section("Settings", tables=[Table(["part", "seconds"], seconds)], folded=folded)


def _fact(score: Json, what: str, sign: str = "") -> tuple[str, str]:
    """The number, and what it is with its interval."""
    number = _number(score["value"], sign)
    return number, what + _score(score, sign).removeprefix(number)


def _number(value: float | None, sign: str = "") -> str:
    return "—" if value is None else f"{value:{sign}.3f}".replace("-", "−")


def _score(score: Json, sign: str = "") -> str:
    number, low, high = (_number(score[key], sign) for key in ("value", "low", "high"))
    return number if score["low"] is None else f"{number} [{low},\N{NO-BREAK SPACE}{high}]"
