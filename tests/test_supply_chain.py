"""What is installed: pinned, checked against the registry's hashes, bounded, audited."""

import re
import runpy
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
AUDIT = runpy.run_path(str(ROOT / "tests" / "soak" / "audit.py"))


def pins(file: str) -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): pinned for name, pinned in lines}


def test_the_lock_has_the_versions_of_the_constraints_each_with_its_hashes():
    assert pins("requirements.lock") == pins("constraints.txt")
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    assert len(entries) == len(pins("constraints.txt"))
    hashes = [re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry) for entry in entries]
    assert all(hashes), [e for e, h in zip(entries, hashes, strict=True) if not h]


def test_every_dependency_has_an_upper_bound_and_its_pin_lies_within_its_bounds():
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = pins("requirements.lock")
    for requirement in map(Requirement, [*wanted, *PROJECT["build-system"]["requires"]]):
        assert any(s.operator in ("<", "<=", "==") for s in requirement.specifier), requirement
        assert Version(pinned[canonicalize_name(requirement.name)]) in requirement.specifier, requirement


def test_make_installs_nothing_that_its_hash_does_not_vouch_for(tmp_path):
    command = ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", str(tmp_path / "venv" / ".ready")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [line for line in said.splitlines() if "pip install" in line]
    assert installs
    for line in installs:
        checked = "--require-hashes" in line and "--only-binary :all:" in line
        assert "--no-deps" in line
        assert checked or ("--no-index" in line and "--no-build-isolation" in line), line


def advisory(folder: Path, name: str, lines: str) -> None:
    file = folder / "vulns" / name / "PYSEC-2026-1.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"id: PYSEC-2026-1\ndetails: made up\n{lines}")


def affected(name: str, what: str) -> str:
    return f"affected:\n- package:\n    ecosystem: PyPI\n    name: {name}\n{what}"


def ranges(*events: str) -> str:
    return "".join(["  ranges:\n  - type: ECOSYSTEM\n    events:\n", *(f"    - {event}\n" for event in events)])


HERE = version("numpy")
FOUND = {
    "no fix": ranges('introduced: "0"'),
    "fixed later": ranges('introduced: "0"', "fixed: 99.10"),
    "last affected": ranges('introduced: "1.10"', f"last_affected: {HERE}"),
    "listed": f"  versions:\n  - {HERE}\n",
    "came back": ranges('introduced: "0"', "fixed: 1.0", "introduced: 1.2"),
}
PASSED = {
    "fixed before": ranges('introduced: "0"', f"fixed: {HERE}"),
    "introduced later": ranges("introduced: 99.10"),
    "another listed": "  versions:\n  - 0.0.1\n",
    "last affected before": ranges('introduced: "0"', "last_affected: 1.0"),
}


@pytest.mark.parametrize("what", FOUND.values(), ids=FOUND)
def test_an_advisory_for_what_is_installed_is_found(what, tmp_path):
    advisory(tmp_path, "numpy", affected("NumPy", what))
    assert list(AUDIT["advisories"](tmp_path, "numpy", Version(HERE))) == [f"numpy {HERE}: PYSEC-2026-1: made up"]


@pytest.mark.parametrize("what", PASSED.values(), ids=PASSED)
def test_an_advisory_for_another_version_is_none(what, tmp_path):
    advisory(tmp_path, "numpy", affected("numpy", what))
    assert list(AUDIT["advisories"](tmp_path, "numpy", Version(HERE))) == []


def test_a_withdrawn_advisory_is_none(tmp_path):
    advisory(tmp_path, "numpy", "withdrawn: 2026-01-01T00:00:00Z\n" + affected("numpy", FOUND["no fix"]))
    assert list(AUDIT["advisories"](tmp_path, "numpy", Version(HERE))) == []


def test_the_audit_fails_on_an_advisory_for_what_is_installed(tmp_path, capsys):
    advisory(tmp_path, "numpy", affected("numpy", FOUND["no fix"]))
    advisory(tmp_path, "not-installed-here", affected("not-installed-here", FOUND["no fix"]))
    assert AUDIT["main"]([str(tmp_path)]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if "PYSEC" in line]
    assert found == [f"numpy {HERE}: PYSEC-2026-1: made up"]


def test_without_advisories_the_audit_says_how_to_get_them(tmp_path, capsys):
    for arguments in ([], [str(tmp_path)]):
        assert AUDIT["main"](arguments) == 2
        assert "make audit ADVISORIES=DIR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stated", "stays"),
    [
        ("MIT", True),
        ("BSD License", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-3.0-only", False),
        ("MIT AND AGPL-3.0-or-later", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("(MIT OR BSD-3-Clause) AND GPL-3.0-only", False),
        ("unknown", False),
    ],
)
def test_only_permissive_licences_stay_without_a_reason(stated, stays):
    assert AUDIT["may_stay"]("something", stated) is stays


def test_a_licence_that_is_allowed_has_a_reason():
    assert all(len(reason) > 20 for reason in AUDIT["ALLOWED"].values())
    assert AUDIT["may_stay"]("nvidia-cublas", "LicenseRef-NVIDIA-Proprietary")
