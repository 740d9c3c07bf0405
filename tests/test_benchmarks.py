"""The table of all benchmarks."""

import runpy
import shutil
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FAKES = {
    "fast": 'finish("fast", 8.123, 8, ms={"ours": 1.5, "plain": 12.0}, none=None)',
    "missed": 'finish("missed", 1.0, 2.5)',
    "alone": 'finish("alone", None, None, chips=7)',
    "silent": "print('nothing to keep')",
    "broken": "raise RuntimeError('no such thing')",
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The command on made-up benchmarks: names → exit code."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    shutil.copy(BENCHMARKS / "paired.py", folder)
    for name, line in FAKES.items():
        (folder / f"{name}.py").write_text(f"from paired import finish\n{line}\n")
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(BENCHMARKS / "__main__.py"))["main"]
    return lambda *names: main(list(names), folder)


def rows(text: str) -> dict[str, list[str]]:
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:4] + row[5:] for row in table[1:]}


def test_one_row_a_benchmark_and_a_missed_target_is_no_failure(bench, capsys):
    assert bench("fast", "missed", "alone", "silent") == 0
    assert rows(capsys.readouterr().out) == {
        "fast": ["8.12", "8", "yes", "ms 1.5 ours / 12 plain"],
        "missed": ["1", "2.5", "no", ""],
        "alone": ["", "", "", "chips 7"],
        "silent": ["", "", "", "left no runs/bench/silent.json"],
    }


def test_a_crash_is_told_and_fails_once_all_have_run(bench, capsys):
    assert bench() == 1
    said = capsys.readouterr()
    assert set(rows(said.out)) == set(FAKES)  # and not paired.py
    assert rows(said.out)["broken"][2] == "crashed"
    assert "no such thing" in said.err


def test_the_result_of_an_earlier_run_is_not_told_again(bench, tmp_path, capsys):
    assert bench("fast") == 0
    (tmp_path / "benchmarks" / "fast.py").write_text("")
    capsys.readouterr()
    assert bench("fast") == 0
    assert rows(capsys.readouterr().out)["fast"][0] == ""


def test_an_unknown_name_is_refused(bench, capsys):
    with pytest.raises(SystemExit) as end:
        bench("fats")
    assert end.value.code == 2
    assert "fats" in capsys.readouterr().err
