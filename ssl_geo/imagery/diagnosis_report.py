"""A diagnosis as a table of text, as JSON, and as one HTML page that loads nothing."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_geo.html import fill
from ssl_geo.imagery.diagnosis import Diagnosis
from ssl_geo.imagery.findings import SEVERITIES, Finding, counted, exit_code

FORMAT = 1
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
    """One row a finding with severity, check, count and an example; below it what was found and what mends it."""
    rows = [(f.severity, f.check, str(f.count), _printable(f.paths[0]) if f.paths else "") for f in diagnosis.findings]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)][:3]
    lines = [_row(_COLUMNS, widths), "-" * _WIDTH] if rows else []
    indent = " " * (widths[0] + 2) if rows else ""
    for row, finding in zip(rows, diagnosis.findings, strict=True):
        lines.append(_row(row, widths))
        for label, text in (("found", finding.found), ("mend", finding.mend)):
            lines += textwrap.wrap(
                f"{label + ':':7}{_printable(text)}",
                _WIDTH,
                initial_indent=indent,
                subsequent_indent=indent + " " * 7,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join([*lines, *([""] if rows else []), f"{_counted(diagnosis)}: {verdict(diagnosis.findings)}"])


def as_json(diagnosis: Diagnosis, settings: Mapping[str, Any], version: str) -> str:
    """The diagnosis as JSON.

    ``format`` (1), ``version`` of ssl_geo, ``settings``, ``scenes``, ``labels``, ``pixels``, ``exit_code``,
    ``verdict``, and ``findings``, each with ``check``, ``severity``, ``paths`` (the first 1000), ``found``,
    ``expected``, ``mend``, ``count``.
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
        findings=diagnosis.findings,
        totals={severity: sum(f.severity == severity for f in diagnosis.findings) for severity in SEVERITIES},
        settings=json.dumps(dict(settings), indent=2),
        version=version,
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    severity, check, count, example = cells
    return f"{severity:{widths[0]}}  {check:{widths[1]}}  {count:>{widths[2]}}  {example}".rstrip()


def _counted(diagnosis: Diagnosis) -> str:
    labels = f", {counted(diagnosis.labels, 'label raster')}" if diagnosis.labels else ""
    return f"{counted(diagnosis.scenes, 'scene')}{labels}, {diagnosis.pixels / 1e6:.1f} million pixels read"


def _printable(text: str) -> str:
    """Without line breaks and control characters, which a path may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
