"""Holds the arrows of docs/design.md against the imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ssl_geo"
ENTRIES = {"pretrain", "probe", "pack", "predict", "doctor"}
# The settings and where rooms meet: for the entries, and for each other.
OF_ENTRIES = {"config", "presets", "resuming", "batches", "state", "material", "task", "mapping"}
DOORS = {
    "rasterio": {"imagery/rasters.py", "imagery/geotiff.py", "imagery/coordinates.py", "imagery/gdal.py"},
    "albumentations": {"views/"},
    "cv2": {"views/"},
    "timm": {"backbones.py", "probing/features.py"},
    "torch.distributed": {"training/distributed.py"},
    "matplotlib": {"figures/", "reporting/page.py"},
}
# What a room must not know, beside the other rooms; views/batched.py alone is written in torch.
FORBIDDEN = {"imagery": {"torch"}, "views": {"torch", "rasterio"}, "methods": {"rasterio", "pathlib"}}
# Pictures and pages are made of plain arrays.
FORBIDDEN |= {"figures": {"torch", "ssl_geo.files"}, "reporting": {"torch"}}
ROOMS = {"imagery", "views", "methods", "probing", "figures", "reporting"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in names)


FILES = {str(p.relative_to(PACKAGE)): imports(p) for p in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("library", DOORS)
def test_one_door_per_library(library):
    users = {file for file, names in FILES.items() if reaches(names, library)}
    assert users
    assert {
        u for u in users if not any(u == d or (d.endswith("/") and u.startswith(d)) for d in DOORS[library])
    } == set()


@pytest.mark.parametrize("file", FILES)
def test_rooms_do_not_know_each_other(file):
    room = file.split("/")[0]
    if room in ROOMS:
        others = {f"ssl_geo.{other}" for other in ROOMS - {room}} | FORBIDDEN.get(room, set())
        if room == "reporting":
            others -= {"ssl_geo.figures"}
        if file == "views/batched.py":
            others -= {"torch"}
        if room == "probing":
            others |= {"ssl_geo.training"}
        assert {o for o in others if reaches(FILES[file], o)} == set()


@pytest.mark.parametrize("file", FILES)
def test_entries_are_imported_by_nobody_and_alone_know_the_settings_and_where_rooms_meet(file):
    known = {e for e in ENTRIES if reaches(FILES[file], f"ssl_geo.{e}")}
    assert known == set()
    if file.removesuffix(".py") not in ENTRIES | OF_ENTRIES:
        assert {o for o in OF_ENTRIES if reaches(FILES[file], f"ssl_geo.{o}")} == set()


def test_the_leaf_stays_a_leaf():
    inner = {n for n in FILES["training/distributed.py"] if n.startswith("ssl_geo")}
    assert inner <= {"ssl_geo.errors", "ssl_geo.errors.UserError"}


def test_no_room_without_a_name():
    assert not [f for f in FILES if Path(f).stem in {"utils", "util", "common", "core", "helpers", "misc"}]
