"""Every notebook on a folder of small sites, as somebody with such a folder runs them.

``python tests/soak/notebooks.py FOLDER`` makes the sites in FOLDER and leaves the notebooks with their outputs there.
The settings are those of a notebook's first cell, given in a cell after it. Nothing is written outside FOLDER.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).parent))
from sites import BANDS, write_sites

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def run(name: str, folder: Path, settings: dict[str, object], *, save_as: str) -> tuple[str, str | None]:
    """Run a notebook in a folder; returns the text that its cells print, and the error that stopped it."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    first = next(number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    given = "\n".join(f"{setting} = {value!r}" for setting, value in settings.items())
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(given))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    error = None
    try:
        client.execute()
    except CellExecutionError as stopped:
        error = f"{stopped.ename}: {stopped.evalue}"
    nbformat.write(notebook, folder / f"{save_as}.ipynb")
    printed = [o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    return "".join(printed), error


def main(folder: Path) -> None:
    """Run all; an assertion tells what did not come out."""
    folder.mkdir(parents=True)
    write_sites(folder / "sites")
    images = (folder / "sites" / "images").resolve()
    own = {"DATA": str(images), "READING": {"band_names": BANDS, "scale": 1e-4}}
    labelled = {"IMAGES": str(images / "labelled"), "LABELS": str(images.parent / "labels")}

    said, error = run("04_own_data", folder, {"DATA": str(images)}, save_as="04_without_band_names")
    assert "band names missing" in said, said
    assert "--data.band_names B02" in said, said
    assert "%|" not in said, said
    assert error is not None, said
    assert "doctor ended with exit code 2" in error, error

    runs = {
        "01_views": own,
        "02_features": {**own, "CHIP_SIZE": 32},
        "03_probe": {**own, **labelled, "CHIP_SIZE": 32},
        "04_own_data": {**own, **labelled},
    }
    for name, settings in runs.items():
        said, error = run(name, folder, settings, save_as=name)
        assert error is None, f"{name}: {error}\n{said}"
        print(f"{name}: done")
    said, error = run("04_own_data", folder, own, save_as="04_without_labels")
    assert error is None, f"{error}\n{said}"
    assert "no labels" in said, said
    assert not (folder / "data").exists(), "the sample was made although folders were given"
    print("every notebook ran on sites of 33 to 260 pixels")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
