"""report.md: the report of a probe for a person, from report.json alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

Json = dict[str, Any]
ABSENT = "—"

READING = (
    "mIoU, with its 95 % interval over spatial blocks of the test split, is that of all seeds' counts added up; the "
    "spread between seeds is beside it. Means run over the classes that the labels hold. Gains are differences of mIoU "
    "on the same blocks; one whose interval holds 0 is no evidence, and p (two-sided) is not corrected for the number "
    "of models."
)


def markdown(report: Json) -> str:
    """Render a report.json for a reader.

    Args:
        report: As of `ProbeReport.to_json`, or read from the file.

    Returns:
        Markdown whose first line is the headline.
    """
    part = [report["headline"]]
    if report["collapsed"]:
        part += [
            "**Collapsed, these models learnt nothing:**",
            _list(f"{c['name']}: {c['reason']}" for c in report["collapsed"]),
        ]
    part += ["## Models on the test split", _models(report["groups"]), READING]
    for group in report["groups"]:
        if group["name"] == report["best"]:
            part += [f"## Classes: {_cell(group['name'])}", _classes(group["per_class"])]
    part += ["## Splits", _list(report["splits"]), "## Warnings", _list(report["warnings"])]
    for title in ("checkpoint", "settings", "files"):
        part += [f"## {title.capitalize()}", _list(f"{k}: {_text(v)}" for k, v in report[title].items())]
    part += ["## Timings", _list(f"{name}: {seconds:.1f} s" for name, seconds in report["timings"].items())]
    return "\n\n".join(part) + "\n"


def _models(groups: Sequence[Json]) -> str:
    header = ["model", "kind", "parameters", "seeds", "mIoU", "seeds' mean ± sd", "over pixels"]
    header += ["over random initialization", "micro IoU", "weighted IoU", "accuracy", "macro F1", "boundary IoU"]
    rows = []
    for group in groups:
        values = group["scores"]
        first = values["miou"]
        rows.append(
            [
                group["name"] + (" (collapsed)" if group["collapsed"] else ""),
                group["kind"],
                ABSENT if group["parameters"] is None else f"{group['parameters']:,}",
                ", ".join(map(str, group["seeds"])) or ABSENT,
                with_interval(first),
                ABSENT if first["sd"] is None else f"{number(first['mean'])} ± {number(first['sd'])}",
                *(_gained(gain) for gain in group["gains"].values()),
                *(number(values[key]["value"]) for key in values if key != "miou"),
                number(group["boundary_iou"]),
                number(group["expected_calibration_error"]),
                number(group["validation_miou"]),
            ]
        )
    return _table([*header, "calibration error", "validation mIoU"], rows)


def _classes(per_class: Sequence[Json]) -> str:
    keys = ("iou", "f1", "precision", "recall", "boundary_iou")
    rows = [[c["name"], str(c["id"]), f"{c['support']:,}", *(number(c[key]) for key in keys)] for c in per_class]
    return _table(["class", "id", "pixels", "IoU", "F1", "precision", "recall", "boundary IoU"], rows)


def number(value: float | None, sign: Literal["", "+"] = "") -> str:
    """Three digits, a dash where there is none."""
    return ABSENT if value is None else f"{value:{sign}.3f}"


def with_interval(score: Json, sign: Literal["", "+"] = "") -> str:
    """A score with its interval, if it has one."""
    bounds = f" [{number(score['low'], sign)}, {number(score['high'], sign)}]" if score["low"] is not None else ""
    return number(score["value"], sign) + bounds


def _gained(gain: Json | None) -> str:
    if gain is None:
        return ABSENT
    return with_interval(gain, "+") + ("" if gain["p"] is None else f", p {number(gain['p'])}")


def _text(value: Any) -> str:
    """A setting as a reader writes it, on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _list(lines: Any) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines) or "none"
