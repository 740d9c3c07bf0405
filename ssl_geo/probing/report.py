"""What the probe found: report.json for programs, report.md for people, and a table that grows with every run.

report.md is written from report.json alone, so the one can always be rebuilt from the other (`markdown`).

Schema 2 of report.json. A number that does not exist (class absent from the labels, too few blocks) is null.

    schema       2
    headline     first line of report.md
    best         name of the group chosen on validation, or null; never chosen by its test score
    classes      [{name, id}], id as in the label files
    checkpoint, settings, timings (seconds), files   as the probe gave them
    splits       sentences: chips, blocks, pixels, distances
    warnings     sentences
    collapsed    [{name, reason}] of the results that learnt nothing
    references   {pixels, random_initialization}: a group, and what stands before a group's name in its twin's name
    groups       one for each model, its seeds together; heads, linear probes, baselines, each by falling mIoU:
      name, kind, parameters, seeds [..], runs, collapsed (runs), retried (runs), validation_miou
      blocks, reliable       spatial blocks with a valid pixel; whether they are enough for an interval
      scores                 miou (macro), micro_iou, frequency_weighted_iou, overall_accuracy, macro_f1, each
                             {value, low, high, mean, sd}: of the counts of all seeds added up, with the 95 % interval
                             over blocks; mean and standard deviation (n - 1) of the seeds' own scores
      per_class              [{name, id, support, iou, iou_low, iou_high, f1, precision, recall, boundary_iou}]; support
                             in pixels, IoU with its 95 % interval over blocks
      boundary_iou           mean over the classes with a boundary in the labels
      expected_calibration_error
      gains                  {pixels, random_initialization}, each null or {reference, value, low, high, blocks, p}: its
                             mIoU less the reference's on the same blocks
    results      one for each run: name, group, kind, seed, parameters, best_epoch, validation_miou, collapsed, retried,
                 scores {miou, ...}, confusion (C, C; rows = label, columns = prediction)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ssl_geo.errors import UserError
from ssl_geo.files import written_whole
from ssl_geo.probing.intervals import MIN_BLOCKS, Statistic, bootstrap, class_intervals, paired_difference
from ssl_geo.probing.markdown import Json, markdown, number, with_interval
from ssl_geo.probing.metrics import (
    Counts,
    Floats,
    boundary_iou,
    expected_calibration_error,
    frequency_weighted_iou,
    macro_f1,
    micro_iou,
    miou,
    overall_accuracy,
    scores,
)

SCHEMA = 2
Kind = Literal["head", "linear probe", "baseline"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order of the table

# Scores of a whole model, by their names in `Scores`.
STATISTICS: dict[str, Statistic] = {
    "miou": miou,
    "micro_iou": micro_iou,
    "frequency_weighted_iou": frequency_weighted_iou,
    "overall_accuracy": overall_accuracy,
    "macro_f1": macro_f1,
}


@dataclass(frozen=True)
class ModelResult:
    """One trained model, or a baseline, on the test split.

    Attributes:
        name: "linear @ layer4, seed 0".
        group: What its seeds have in common, "linear @ layer4".
        kind: "head", "linear probe" or "baseline"; baselines are never chosen as the best.
        seed: Of the training, None where nothing is drawn.
        blocks: (n_blocks, C, C) confusion matrices of the test blocks, the same blocks for every model.
        validation_miou: What the choice between models goes by; None for a model that has none.
        boundary: (3, C) of `metrics.boundary_counts`.
        calibration: (3, bins) of `metrics.calibration_counts`.
        parameters: Trained parameters.
        best_epoch: Chosen on validation, counted from 1.
        collapsed: What is wrong with it in a sentence (`metrics.collapse`), or None.
        retried: Whether it was trained a second time because the first collapsed.
    """

    name: str
    group: str
    kind: Kind
    seed: int | None
    blocks: Counts
    validation_miou: float | None = None
    boundary: Counts | None = None
    calibration: Floats | None = None
    parameters: int | None = None
    best_epoch: int | None = None
    collapsed: str | None = None
    retried: bool = False


@dataclass
class ProbeReport:
    """All that a probe found.

    Attributes:
        class_names: Names of the classes 0 ... C - 1.
        class_ids: Their values in the label files.
        results: One for each model and seed.
        checkpoint: What was probed.
        settings: Of the probe.
        splits: `SplitReport.lines()`.
        warnings: Sentences that a reader must know.
        timings: Seconds of each part.
        files: Paths of what was written, such as the map.
        pixels: Group that "gain over pixels" refers to.
        random_initialization: With ", " and the name of a group, the group that its "gain over random initialization"
            refers to: the same head on the same layers of an untrained backbone. Such groups count as baselines.
    """

    class_names: Sequence[str]
    class_ids: Sequence[int]
    results: list[ModelResult]
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    splits: Sequence[str] = ()
    warnings: list[str] = field(default_factory=list)
    timings: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str | Path] = field(default_factory=dict)
    pixels: str = "pixels"
    random_initialization: str = "random initialization"

    def to_json(self) -> Json:
        """The report in schema 2 (see the module), of plain values that JSON can hold.

        Raises:
            ValueError: Models of other classes, blocks or labels than the first, or one name or group for two
                things.
        """
        self._check()
        by_group: dict[str, list[ModelResult]] = {}
        for result in self.results:
            by_group.setdefault(result.group, []).append(result)
        groups = [self._group(name, by_group) for name in by_group]
        best = _best(groups)  # before sorting: the test score must not even break a tie
        groups.sort(key=lambda group: (KINDS.index(group["kind"]), -_or_lowest(group["scores"]["miou"]["value"])))
        collapsed = [{"name": r.name, "reason": r.collapsed} for r in self.results if r.collapsed is not None]
        report = {
            "schema": SCHEMA,
            "headline": _headline(groups, best),
            "best": best,
            "classes": [{"name": n, "id": i} for n, i in zip(self.class_names, self.class_ids, strict=True)],
            "checkpoint": self.checkpoint,
            "settings": self.settings,
            "splits": self.splits,
            "warnings": [*self.warnings, *self._found(groups)],
            "collapsed": collapsed,
            "timings": self.timings,
            "files": self.files,
            "references": {"pixels": self.pixels, "random_initialization": self.random_initialization},
            "groups": groups,
            "results": [_result(result) | {"kind": self._kind(result)} for result in self.results],
        }
        plain: Json = _plain(report)
        return plain

    def _check(self) -> None:
        classes, names, kinds = len(self.class_names), set[str](), dict[str, str]()
        for result in self.results:
            if result.blocks.ndim != 3 or result.blocks.shape[1:] != (classes, classes):
                raise ValueError(f"{result.name}: blocks {result.blocks.shape}, ({classes} classes) expected")
            first = self.results[0]
            if not np.array_equal(result.blocks.sum(2), first.blocks.sum(2)):
                raise ValueError(f"{result.name} was not scored on the same labels of the same blocks as {first.name}")
            if result.name in names or kinds.setdefault(result.group, result.kind) != result.kind:
                raise ValueError(f"{result.name}: a second result of this name, or a group of two kinds")
            names.add(result.name)

    def _kind(self, result: ModelResult) -> Kind:
        """A head of an untrained backbone is a baseline, whatever it is called: it must not be chosen as the best."""
        reference = result.group == self.pixels or result.group.startswith(f"{self.random_initialization}, ")
        return "baseline" if reference else result.kind

    def _group(self, name: str, by_group: Mapping[str, Sequence[ModelResult]]) -> Json:
        """The seeds of one model together."""
        runs = by_group[name]
        pooled = _pooled(runs)
        whole, single = scores(pooled.sum(0)), [scores(run.blocks.sum(0)) for run in runs]
        ends = class_intervals(pooled)
        intervals = {key: bootstrap(pooled, statistic) for key, statistic in STATISTICS.items()}
        boundary = [run.boundary for run in runs if run.boundary is not None]
        calibration = [run.calibration for run in runs if run.calibration is not None]
        # Some seeds alone would not stand for the group.
        edges = (
            boundary_iou(np.sum(boundary, axis=0)) if len(boundary) == len(runs) else np.full(len(whole.iou), np.nan)
        )
        known = edges[~np.isnan(edges)]
        return {
            "name": name,
            "kind": self._kind(runs[0]),
            "parameters": runs[0].parameters,
            "seeds": [run.seed for run in runs if run.seed is not None],
            "runs": len(runs),
            "collapsed": sum(run.collapsed is not None for run in runs),
            "retried": sum(run.retried for run in runs),
            "validation_miou": _mean([run.validation_miou for run in runs]),
            "blocks": intervals["miou"].blocks,
            "reliable": intervals["miou"].reliable,
            "scores": {
                key: {
                    "value": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "mean": _mean([getattr(run, key) for run in single]),
                    "sd": float(np.std([getattr(run, key) for run in single], ddof=1)) if len(runs) > 1 else None,
                }
                for key, interval in intervals.items()
            },
            "per_class": [
                {
                    "name": class_name,
                    "id": self.class_ids[number],
                    "support": whole.support[number] // len(runs),  # each seed saw the same labels
                    "iou": whole.iou[number],
                    "iou_low": ends[0, number],
                    "iou_high": ends[1, number],
                    "f1": whole.f1[number],
                    "precision": whole.precision[number],
                    "recall": whole.recall[number],
                    "boundary_iou": edges[number],
                }
                for number, class_name in enumerate(self.class_names)
            ],
            "boundary_iou": known.mean() if len(known) else None,
            "expected_calibration_error": (
                expected_calibration_error(np.sum(calibration, axis=0)) if len(calibration) == len(runs) else None
            ),
            "gains": {
                "pixels": _gain(name, self.pixels, by_group),
                "random_initialization": _gain(name, f"{self.random_initialization}, {name}", by_group),
            },
        }

    def _found(self, groups: Sequence[Json]) -> list[str]:
        """Warnings that follow from the results themselves."""
        said = []
        if groups and not groups[0]["reliable"]:
            said.append(
                f"no intervals: the test split has {groups[0]['blocks']} spatial blocks, {MIN_BLOCKS} are needed; "
                "the scores may be far off on other land"
            )
        if all(group["name"] != self.pixels for group in groups):
            said.append(f"there is no baseline {self.pixels!r}: the gain over pixels is unknown")
        alone = [g["name"] for g in groups if g["kind"] != "baseline" and not g["gains"]["random_initialization"]]
        if alone:
            said.append(f"no random initialization to compare with: {', '.join(alone)}")
        said += [
            f"{r.name} collapsed at first and was trained again" for r in self.results if r.retried and not r.collapsed
        ]
        return said


# --- report.json -----------------------------------------------------------------------------------------------------


def _pooled(runs: Sequence[ModelResult]) -> Counts:
    """(n_blocks, C, C) counts of all seeds added up."""
    pooled: Counts = np.sum([run.blocks for run in runs], axis=0)
    return pooled


def _gain(name: str, reference: str, by_group: Mapping[str, Sequence[ModelResult]]) -> Json | None:
    """Difference of mIoU between a group and its reference, None where there is no other such group."""
    if reference == name or reference not in by_group:
        return None
    own, other = by_group[name], by_group[reference]
    # Scores are ratios of counts: multiplied to the same number of runs, both have the same labels.
    difference = paired_difference(_pooled(own) * len(other), _pooled(other) * len(own))
    return {"reference": reference, **asdict(difference)}


def _best(groups: Sequence[Json]) -> str | None:
    """The group with the greatest mean validation mIoU, baselines aside; None where nothing tells them apart."""
    candidates = [group for group in groups if group["kind"] != "baseline"]
    known = [group for group in candidates if math.isfinite(_or_lowest(group["validation_miou"]))]
    if not known:
        return candidates[0]["name"] if len(candidates) == 1 else None
    name: str = max(known, key=lambda group: group["validation_miou"])["name"]
    return name


def _headline(groups: Sequence[Json], best: str | None) -> str:
    if best is None:
        only = all(group["kind"] == "baseline" for group in groups)
        return f"no model was chosen: {'there are only baselines' if only else 'none has a validation score'}"
    group = _plain(next(group for group in groups if group["name"] == best))
    parts = [f"{best}: mIoU {with_interval(group['scores']['miou'])}"]
    if not group["reliable"]:
        parts[0] += f" (no interval: {group['blocks']} blocks, {MIN_BLOCKS} needed)"
    for key, gain in group["gains"].items():
        over = key.replace("_", " ")
        parts.append(f"{with_interval(gain, '+')} over {over}" if gain else f"gain over {over} unknown")
    own = _or_lowest(group["scores"]["miou"]["value"])
    above = [
        g for g in map(_plain, groups) if g["kind"] == "baseline" and _or_lowest(g["scores"]["miou"]["value"]) > own
    ]
    parts += [f"below {g['name']} ({number(g['scores']['miou']['value'])})" for g in above]
    parts.append("the only model" if group["validation_miou"] is None else "chosen on validation")
    if group["collapsed"]:
        parts.append(f"but COLLAPSED in {group['collapsed']} of {group['runs']} runs")
    return ", ".join(parts)


def _result(result: ModelResult) -> Json:
    matrix = result.blocks.sum(0)
    keys = ("name", "group", "kind", "seed", "parameters", "best_epoch", "validation_miou")
    return {
        **{key: getattr(result, key) for key in (*keys, "collapsed", "retried")},
        "scores": {key: float(statistic(matrix)) for key, statistic in STATISTICS.items()},
        "confusion": matrix,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean, None where one is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _or_lowest(value: float | None) -> float:
    """The value, -∞ where there is none."""
    return -math.inf if value is None or math.isnan(value) else value


def _plain(value: Any) -> Any:
    """Only what JSON holds: numbers that are not finite become null, paths, devices and the like their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist() if value.dtype.kind in "iub" else _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def write_report(folder: Path, report: Json) -> Path:
    """Write report.json and report.md, each whole or not at all.

    Args:
        folder: Made where it is missing.
        report: As of `ProbeReport.to_json`.

    Returns:
        Path of report.md; report.json is beside it.

    Raises:
        UserError: The folder cannot be written.
    """
    texts = {  # report.json last: where it is, both are
        "report.md": markdown(report),
        "report.json": json.dumps(report, allow_nan=False, ensure_ascii=False, indent=1) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with written_whole(folder / name) as partial:
                partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be no UTF-8
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); name another folder") from error
    return folder / "report.md"
