"""What the installed tree brings with it: known vulnerabilities and licences. ``python tests/soak/audit.py [DIR]``.

DIR is a checkout of the public PyPA advisory database (pypa/advisory-database: ``vulns/NAME/*.yaml`` in the OSV
schema). Nothing is fetched: pip-audit asks a server and reads no folder, so the few lines that compare versions are
here. Exit code 0: nothing found, 1: something, 2: the advisories could not be looked at.
"""

import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PERMISSIVE = re.compile(
    r"(0BSD|.*\bBSD\b.*|MIT|MIT-CMU|MIT License|Apache.*|ISC.*|MPL-2\.0|Mozilla Public License 2\.0.*|PSF-2\.0|"
    r"Python Software Foundation License|Zlib|CC0-1\.0|BSL-1\.0|HPND)"
)
ALLOWED = {
    "nvidia-*": "CUDA libraries that torch's Linux wheels load; NVIDIA's own licence; nothing of them is shipped here",
    "cuda-*": "the same: what finds and binds them",
}
"""Distributions whose licence is none of the above, or is not stated, and why they may stay."""


def licence(distribution: Distribution) -> str:
    """As the distribution states it: its SPDX expression, else its classifiers, else its licence field."""
    metadata = distribution.metadata
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    first_line = (metadata.get("License") or "").strip().split("\n")[0]
    return metadata.get("License-Expression") or " AND ".join(classifiers) or first_line or "unknown"


def may_stay(name: str, stated: str) -> bool:
    """Whether a licence is permissive (all of its parts, or one of ``A OR B``), or its distribution allowed."""
    if any(fnmatch(name, pattern) for pattern in ALLOWED):
        return True
    parts = [part.strip("() ").split(" WITH ")[0] for part in re.split(" AND | OR ", stated)]
    permissive = [PERMISSIVE.fullmatch(part) is not None for part in parts]
    return all(permissive) or (" AND " not in stated and any(permissive))


def is_affected(version: Version, affected: dict[str, Any]) -> bool:
    """Whether an entry of OSV's ``affected`` holds a version, by its list or by its ranges."""
    if str(version) in affected.get("versions", []):
        return True
    for span in affected.get("ranges", []):
        if span["type"] != "ECOSYSTEM":  # commits
            continue
        inside = False
        for event in span["events"]:  # in the order of versions
            ((kind, text),) = event.items()
            try:
                limit = Version(text)
            except InvalidVersion:
                return True  # what cannot be compared is looked at
            if kind == "introduced" and version >= limit:
                inside = True
            elif (kind == "fixed" and version >= limit) or (kind == "last_affected" and version > limit):
                inside = False
        if inside:
            return True
    return False


def advisories(folder: Path, name: str, version: Version) -> Iterator[str]:
    """Of one distribution: the advisories that hold for its version, each in a line."""
    for file in sorted((folder / "vulns" / name).glob("*.yaml")):
        advisory = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)  # all values as text: 5.10 is no number
        mine = [a for a in advisory["affected"] if canonicalize_name(a["package"]["name"]) == name]
        if "withdrawn" not in advisory and any(is_affected(version, a) for a in mine):
            summary = advisory.get("summary") or advisory.get("details", "")
            yield f"{name} {version}: {advisory['id']}: {' '.join(summary.split())[:160]}"


def main(arguments: list[str]) -> int:
    """Print the tree with its licences, then what is wrong."""
    tree = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    tree.pop("ssl-geo", None)
    folder = Path(arguments[0]) if arguments else None
    wrong = []
    for name, distribution in sorted(tree.items()):
        stated = licence(distribution)
        print(f"{name} {distribution.version}: {stated}")
        if not may_stay(name, stated):
            wrong.append(f"{name} {distribution.version}: licence {stated}: replace it, or allow it with a reason")
        if folder is not None:
            wrong += advisories(folder, name, Version(distribution.version))
    for line in wrong:
        print(line)
    if folder is None or not (folder / "vulns").is_dir():
        where = "no folder is given" if folder is None else f"{folder} holds no vulns/"
        print(f"{len(tree)} distributions, {len(wrong)} findings. Advisories were not looked at: {where}.")
        print("Clone the public pypa/advisory-database where there is internet, then: make audit ADVISORIES=DIR")
        return 2
    print(f"{len(tree)} distributions, {len(wrong)} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
