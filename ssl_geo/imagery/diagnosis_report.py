"""A diagnosis as a table of text, as JSON, and as one HTML page that loads nothing."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ssl_geo.errors import printable
from ssl_geo.html import fill
from ssl_geo.imagery.diagnosis import Diagnosis
from ssl_geo.imagery.findings import SEVERITIES, Finding, Group, counted, exit_code

FORMAT = 2
"""Of the JSON; raised with every change that a reader of it would notice."""
_WIDTH = 120  # characters of the text table
_COLUMNS = ("severity", "check", "count", "example")
_VERDICTS = (
    "clean: nothing that would trouble a run",
    "worth a look before a run",
    "this would stop or corrupt a run",
)


def verdict(findings: Sequence[Finding]) -> str:
    """One clause for the worst of the findings."""
    return _VERDICTS[exit_code(findings)]


def as_text(diagnosis: Diagnosis) -> str:
    """The findings by folder and product, the worst first; what is good to know of all at the end.

    One row a finding with severity, check, count and an example; below it what was found, what fixes it, and the
    command line that does, which is never wrapped, so that it can be pasted.
    """
    cells = [(f.severity, f.check, f.counted_in_group, printable(f.example)) for f in diagnosis.findings]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *cells, strict=True)][:3]
    indent = " " * (widths[0] + 2)
    lines = [_row(_COLUMNS, widths), "-" * _WIDTH] if cells else []
    for heading, findings in by_group(diagnosis):
        lines += ["", *_wrapped(printable(heading))]
        for finding in findings:
            lines.append(_row(cells[diagnosis.findings.index(finding)], widths))
            for label, text in (("found", finding.found), ("fix", finding.fix)):
                lines += _wrapped(f"{label + ':':7}{printable(text)}", indent, indent + " " * 7)
            if finding.command and finding.severity != "info":
                lines.append(f"{indent}{'run:':7}{printable(finding.command)}")
    if cells and diagnosis.sound:
        lines += ["", "without error or warning"]
        lines += [f"  {printable(heading_of(group))}" for group in diagnosis.sound]
    return "\n".join([*lines, *([""] if cells else []), f"{_counted(diagnosis)}: {verdict(diagnosis.findings)}"])


def by_group(diagnosis: Diagnosis) -> list[tuple[str, list[Finding]]]:
    """Headings and findings: of each group, the worst first, of the whole archive, and what is good to know."""
    parts: dict[str, list[Finding]] = {}
    for finding in diagnosis.findings:
        heading = "good to know" if finding.severity == "info" else heading_of(finding.where)
        parts.setdefault(heading, []).append(finding)
    return list(parts.items())


def heading_of(group: Group | None) -> str:
    """A group in words."""
    if group is None:
        return "across folders and products"
    return f"{group.folder}: {counted(group.rasters, 'raster')}, {group.product}"


def as_json(diagnosis: Diagnosis, settings: Mapping[str, Any], version: str) -> str:
    """The diagnosis as JSON.

    ``format`` (2), ``version`` of ssl_geo, ``settings``, ``scenes``, ``labels``, ``pixels``, ``exit_code``,
    ``verdict``; ``groups``, each with ``folder``, ``product``, ``rasters``, ``errors``, ``warnings``; and ``findings``,
    each with ``check``, ``severity``, ``paths`` (the first 1000), ``found``, ``expected``, ``fix``, ``count``,
    ``command`` (a line for a shell, or empty) and ``where`` (its group; null for the whole archive). Both are sorted,
    the worst group first.
    """
    return json.dumps(
        {
            "format": FORMAT,
            "version": version,
            "settings": dict(settings),
            "scenes": diagnosis.scenes,
            "labels": diagnosis.labels,
            "pixels": diagnosis.pixels,
            "exit_code": exit_code(diagnosis.findings),
            "verdict": verdict(diagnosis.findings),
            "groups": [asdict(group) | _totals(diagnosis, group) for group in diagnosis.groups],
            "findings": [finding.plain() for finding in diagnosis.findings],
        },
        indent=2,
    )


def as_html(diagnosis: Diagnosis, settings: Mapping[str, Any], version: str) -> str:
    """The diagnosis as one page, readable on a phone and in the dark; what files and paths hold is escaped."""
    return fill(
        "imagery/diagnosis.html",
        counted=_counted(diagnosis),
        verdict=verdict(diagnosis.findings),
        code=exit_code(diagnosis.findings),
        parts=by_group(diagnosis),
        groups=[(group, _totals(diagnosis, group)) for group in diagnosis.groups],
        totals={severity: sum(f.severity == severity for f in diagnosis.findings) for severity in SEVERITIES},
        settings=json.dumps(dict(settings), indent=2),
        version=version,
    )


def _totals(diagnosis: Diagnosis, group: Group) -> dict[str, int]:
    """Errors and warnings of a group."""
    severities = [finding.severity for finding in diagnosis.findings if finding.where == group]
    return {"errors": severities.count("error"), "warnings": severities.count("warning")}


def _wrapped(text: str, first: str = "", later: str = "  ") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    severity, check, count, example = cells
    return f"{severity:{widths[0]}}  {check:{widths[1]}}  {count:>{widths[2]}}  {example}".rstrip()


def _counted(diagnosis: Diagnosis) -> str:
    labels = f", {counted(diagnosis.labels, 'label raster')}" if diagnosis.labels else ""
    return f"{counted(diagnosis.scenes, 'scene')}{labels}, {diagnosis.pixels / 1e6:.1f} million pixels read"
