"""The notebooks as they lie in the repository, and what of them needs no kernel; `make notebooks` runs them whole."""

import re
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

TESTS = Path(__file__).resolve().parent
NOTEBOOKS = sorted((TESTS.parent / "notebooks").glob("*.ipynb"))
SITES = runpy.run_path(str(TESTS / "soak" / "sites.py"))


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs_and_takes_a_path_and_how_to_read_it_first(path):
    cells = code_cells(path)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    for setting in ("(DATA|IMAGES)", "READING", "BANDS", "CHIP_SIZE"):
        assert re.search(rf"^{setting}\b.* = ", cells[0].source, re.MULTILINE), setting


def test_there_are_four():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.fixture
def run_cells(tmp_path, monkeypatch):
    """Run the code of a notebook's first cells in an empty folder, with settings that follow its first cell."""
    monkeypatch.chdir(tmp_path)

    def run(number: int, count: int | None, settings: dict[str, Any]) -> dict[str, Any]:
        space: dict[str, Any] = {}
        for place, cell in enumerate(code_cells(NOTEBOOKS[number - 1])[:count]):
            exec(re.sub(r"^%.*", "", cell.source, flags=re.MULTILINE), space)
            if place == 0:
                space.update(settings)
        return space

    return run


def test_04_shows_the_findings_that_stop_a_run_and_makes_no_sample_beside_a_folder(run_cells, tmp_path, capsys):
    SITES["write_sites"](tmp_path / "sites", 4)
    with pytest.raises(RuntimeError, match="doctor ended with exit code 2"):
        run_cells(4, 3, {"DATA": str(tmp_path / "sites" / "images")})
    said = capsys.readouterr().out
    assert "band names missing" in said
    assert "--data.band_names B02" in said
    assert "%|" not in said
    assert not (tmp_path / "data").exists()
    run_cells(4, 3, {"DATA": str(tmp_path / "sites" / "images"), "READING": {"band_names": SITES["BANDS"]}})
    assert "band names missing" not in capsys.readouterr().out


@pytest.mark.parametrize(("smallest", "largest", "chip"), [(64, 64, 64), (33, 50, 32)])
def test_01_takes_sites_as_small_as_they_are(run_cells, tmp_path, smallest, largest, chip):
    SITES["write_sites"](tmp_path / "sites", 3, smallest, largest)
    settings = {"DATA": str(tmp_path / "sites" / "images"), "READING": {"band_names": SITES["BANDS"]}}
    made = run_cells(1, None, settings)
    assert made["index"].chip_size == chip
    assert {Path(scene).name for scene in made["index"].table["scene"].to_pylist()} == {
        f"site_{number:03d}.tif" for number in range(3)
    }
