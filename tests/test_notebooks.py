"""The notebooks run from top to bottom on the sample, and lie in the repository without their outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
LIMIT = 180  # seconds a notebook may take on two cores


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like the project's, which all notebooks share: the sample and the short run are made once."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "notebooks").mkdir()
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_draws(path, checkout, monkeypatch):
    # Kernels give their outputs through tornado's loop, which pytest's own filter need not judge.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(checkout / "notebooks")}}
    NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    warned = [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    assert not warned


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs_and_takes_a_path_first(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert re.search(r"^(DATA|IMAGES)\b.* = ", cells[0].source, re.MULTILINE)


def test_there_are_four():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
