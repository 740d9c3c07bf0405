"""What the doctor reports: one finding a check, how grave it is, and what mends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The gravest first: stops or corrupts a run; worth a look; good to know."""

MAX_PATHS = 1000
"""Paths that a finding keeps; all are counted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, of one file or of many alike.

    Attributes:
        check: Which check found it, for example ``undeclared nodata``.
        severity: ``error`` stops or corrupts a run, ``warning`` is worth a look, ``info`` is good to know.
        paths: The files or scenes concerned, the first `MAX_PATHS` of them.
        found: What was found in the first of them, with its figures.
        expected: What was expected or allowed.
        mend: The command or setting that mends it.
        count: How many files, scenes or pairs it concerns.
    """

    check: str
    severity: Severity
    paths: tuple[str, ...]
    found: str
    expected: str
    mend: str
    count: int = 1

    def line(self) -> str:
        """One line for a log: what, how many, an example, what mends it."""
        where = f" ({self.paths[0]})" if self.paths else ""
        line = f"{self.severity}: {self.check}, {self.count}×: {self.found}{where}; {self.mend}"
        return " ".join(line.split())  # a path may hold a line break

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**asdict(self), "paths": list(self.paths)}


def counted(count: int, what: str) -> str:
    """A number with its noun: ``1 scene``, ``2 scenes``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for all of the same check, severity and expectation, the gravest first, then by check.

    The first finding of a group gives its figures and its mend; counts add up.
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.check, finding.expected), []).append(finding)
    merged = [
        replace(
            group[0],
            paths=tuple(dict.fromkeys(path for finding in group for path in finding.paths))[:MAX_PATHS],
            count=sum(finding.count for finding in group),
        )
        for group in groups.values()
    ]
    return sorted(merged, key=lambda finding: (SEVERITIES.index(finding.severity), finding.check, -finding.count))


def exit_code(findings: Sequence[Finding]) -> int:
    """0 where there is nothing but information, 1 for warnings, 2 for errors."""
    severities = {finding.severity for finding in findings}
    return 2 if "error" in severities else int("warning" in severities)
