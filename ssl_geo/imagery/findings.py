"""What the doctor reports: one finding a check, how grave it is, where, and what fixes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The gravest first: stops or corrupts a run; worth a look; good to know."""

MAX_PATHS = 1000
"""Paths that a finding keeps; all are counted."""
MAX_FOLDERS = 20
"""Folders by which findings are grouped; where there are more, by the folders above them."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rasters of one folder and of one kind.

    Attributes:
        folder: That all of them lie in or below.
        product: Level, number of bands and type, ``L2A, 12 bands of uint16`` for example; ``labels``.
        rasters: How many scenes or label rasters.
    """

    folder: str
    product: str
    rasters: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, of one file or of many alike.

    Attributes:
        check: Which check found it, for example ``undeclared nodata``.
        severity: ``error`` stops or corrupts a run, ``warning`` is worth a look, ``info`` is good to know.
        paths: The files or scenes concerned, the first `MAX_PATHS` of them.
        found: What was found in the first of them, with its figures.
        expected: What was expected or allowed.
        fix: What fixes it: a setting, or what to do. Nothing that changes the user's files in place.
        count: How many files, scenes or pairs it concerns.
        command: A command line that does it, as a shell takes it; empty where there is none.
        where: The group that holds all paths; None for the whole archive, and for information.
    """

    check: str
    severity: Severity
    paths: tuple[str, ...]
    found: str
    expected: str
    fix: str
    count: int = 1
    command: str = ""
    where: Group | None = None

    @property
    def counted_in_group(self) -> str:
        """How many, and of how many where it counts the rasters of a group: ``3 of 12``."""
        counts_rasters = self.count == len(self.paths) or self.count > len(self.paths) == MAX_PATHS
        of_all = f" of {self.where.rasters}" if self.where is not None and counts_rasters else ""
        return f"{self.count}{of_all}"

    @property
    def example(self) -> str:
        """The first path, within the group's folder; empty where there is none."""
        if not self.paths:
            return ""
        return self.paths[0] if self.where is None else self.paths[0].removeprefix(self.where.folder.rstrip("/") + "/")

    def line(self) -> str:
        """One line for a log: what, how many, an example, what fixes it."""
        where = f" ({self.paths[0]})" if self.paths else ""
        line = f"{self.severity}: {self.check}, {self.count}×: {self.found}{where}; {self.fix}"
        return " ".join(line.split())  # a path may hold a line break

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**asdict(self), "paths": list(self.paths)}


def counted(count: int, what: str) -> str:
    """A number with its noun: ``1 scene``, ``2 scenes``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def copied(file: str) -> str:
    """The start of a command line that changes a copy, OUT.tif, and neither the file nor a copy that is there."""
    return f"test ! -e OUT.tif && cp {shlex.quote(file)} OUT.tif"


def groups_of(products: Mapping[str, str]) -> dict[str, Group]:
    """The group of each raster: its folder, or where these are many a folder above, and its product.

    Args:
        products: By path; a path's folder is its parent.
    """
    parents = {path: Path(path).parent.parts for path in products}
    depth = max(map(len, parents.values()), default=0)
    while depth > 1 and len({parts[:depth] for parts in parents.values()}) > MAX_FOLDERS:
        depth -= 1
    folders = {path: str(Path(*parts[:depth])) for path, parts in parents.items()}
    sizes: dict[tuple[str, str], int] = {}
    for path, product in products.items():
        sizes[folders[path], product] = sizes.get((folders[path], product), 0) + 1
    return {path: Group(folders[path], product, sizes[folders[path], product]) for path, product in products.items()}


def placed(finding: Finding, groups: Mapping[str, Group]) -> list[Finding]:
    """The finding by the groups that hold its paths.

    It stays one, of the whole archive, where it is information, counts other than rasters (pairs), or has one command
    line for all.
    """
    among: dict[Group | None, list[str]] = {}
    for path in finding.paths:
        among.setdefault(groups.get(path), []).append(path)
    if finding.severity == "info" or not among:
        return [finding]
    if len(among) == 1:
        return [replace(finding, where=next(iter(among)))]
    if finding.count != len(finding.paths) or finding.command:
        return [finding]
    return [replace(finding, where=where, paths=tuple(of), count=len(of)) for where, of in among.items()]


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for all of the same group, check, severity and expectation.

    The worst group comes first: that of the gravest finding, then of the larger share of its rasters; within it the
    gravest, then by check. Information comes last. The first finding gives its figures and its fix; counts add up.
    """
    alike: dict[tuple[Group | None, str, str, str], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.where, finding.severity, finding.check, finding.expected), []).append(finding)
    merged = [
        replace(
            same[0],
            paths=tuple(dict.fromkeys(path for finding in same for path in finding.paths))[:MAX_PATHS],
            count=sum(finding.count for finding in same),
        )
        for same in alike.values()
    ]
    badness: dict[Group | None, tuple[int, float]] = {}
    for finding in merged:
        share = finding.count / finding.where.rasters if finding.where is not None else float("inf")
        worst = SEVERITIES.index(finding.severity), -min(share, 1.0)
        badness[finding.where] = min(worst, badness.get(finding.where, worst))

    def order(finding: Finding) -> tuple[Any, ...]:
        where, severity = finding.where, SEVERITIES.index(finding.severity)
        place = ("", "") if where is None else (where.folder, where.product)
        return finding.severity == "info", badness[where], place, severity, finding.check, -finding.count

    return sorted(merged, key=order)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 where there is nothing but information, 1 for warnings, 2 for errors."""
    severities = {finding.severity for finding in findings}
    return 2 if "error" in severities else int("warning" in severities)
