import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_geo.errors import UserError
from ssl_geo.probing.results import append_result, result_row


def rows(table: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in table.read_text().splitlines()]


def test_a_row_holds_the_chosen_model_in_numbers() -> None:
    scores = {"miou": {"value": 0.5, "low": 0.4, "high": 0.6}, "macro_f1": {"value": 0.7, "low": 0.6, "high": 0.8}}
    gains = {"pixels": {"value": 0.1, "low": -0.1, "high": 0.2, "p": 0.3}, "random_initialization": None}
    groups = [{"name": "fpn", "scores": {}, "gains": {}}, {"name": "linear", "scores": scores, "gains": gains}]
    report = {"best": "linear", "groups": groups, "checkpoint": {"path": "runs/a"}, "headline": "linear: mIoU 0.500"}
    assert result_row(report) == {
        "ckpt": "runs/a",
        "best": "linear",
        "miou": 0.5,
        "macro_f1": 0.7,
        "miou_low": 0.4,
        "miou_high": 0.6,
        "over_pixels": 0.1,
        "over_pixels_low": -0.1,
        "over_pixels_high": 0.2,
        "over_random_initialization": None,
        "over_random_initialization_low": None,
        "over_random_initialization_high": None,
        "headline": "linear: mIoU 0.500",
    }


def test_results_come_back(tmp_path: Path) -> None:
    table = tmp_path / "deep" / "results.jsonl"
    append_result(table, {"miou": 0.5, "name": "a\nb"})
    append_result(table, {"miou": None})
    assert rows(table) == [{"miou": 0.5, "name": "a\nb"}, {"miou": None}]


def test_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    table = tmp_path / "results.jsonl"
    append_result(table, {"run": 1})
    with table.open("ab") as file:
        file.write(b'{"run": 2, "na')
    append_result(table, {"run": 3})
    first, torn, last = table.read_text().splitlines()
    assert (json.loads(first), torn, json.loads(last)) == ({"run": 1}, '{"run": 2, "na', {"run": 3})


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "results.jsonl"
    append_result(table, {"run": 1})
    before = table.read_bytes()
    write = os.write
    monkeypatch.setattr("os.write", lambda descriptor, line: write(descriptor, line[:4]))
    with pytest.raises(UserError, match="cannot be written"):
        append_result(table, {"run": 2})
    assert table.read_bytes() == before


def test_table_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        append_result(tmp_path, {})


WRITERS = """
import os, sys
from pathlib import Path
from ssl_geo.probing.results import append_result
gate, opener = os.pipe()
writers = []
for writer in range(8):
    writers.append(os.fork())
    if not writers[-1]:
        os.close(opener)
        os.read(gate, 1)  # all start together
        for number in range(25):
            append_result(Path(sys.argv[1]), {"writer": writer, "number": number, "filling": "x" * 20_000})
        os._exit(0)
os.close(opener)
sys.exit(any(os.waitpid(writer, 0)[1] for writer in writers))
"""


def test_eight_processes_lose_no_line(tmp_path: Path) -> None:
    table = tmp_path / "results.jsonl"
    subprocess.run([sys.executable, "-c", WRITERS, str(table)], check=True, timeout=60)
    found = rows(table)
    assert sorted((r["writer"], r["number"]) for r in found) == [(w, n) for w in range(8) for n in range(25)]
    for writer in range(8):
        assert [r["number"] for r in found if r["writer"] == writer] == list(range(25))
