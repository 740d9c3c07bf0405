"""Which scenes a folder holds: one walk over the names, no raster opened.

A scene is a file (a stacked GeoTIFF), a folder (band files of one product, at one or several resolutions), or a
group of band files that shares its folder with others. A group is written as its files' common name with ``{band}`` in
the band's place, for example ``clips/T33UUU_20170216T102101_{band}``.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ssl_geo.errors import UserError
from ssl_geo.imagery.sensors import band_token, canonical_band

GEOTIFF_SUFFIXES = (".tif", ".tiff")
RASTER_SUFFIXES = (*GEOTIFF_SUFFIXES, ".jp2")
BAND = "{band}"

_RESOLUTION_FOLDER = re.compile(r"R?(?:10|20|60)m", re.IGNORECASE)
_RESOLUTION_SUFFIX = re.compile(r"[_\-. ](?:10|20|60)m$", re.IGNORECASE)
# Masks and auxiliary data of a SAFE product: single-band JPEG 2000 files with band names that are no imagery.
_NO_IMAGERY_FOLDERS = frozenset({"QI_DATA", "AUX_DATA", "HTML", "rep_info", "__MACOSX"})
# What products and cloud archives put beside the bands, under the same name.
_BESIDE_BANDS = re.compile(
    r"(?:TCI|SCL|AOT|WVP|PVI|CLD\w*|SNW\w*|MSK\w*|QA\d\d|visual|thumbnail|preview)", re.IGNORECASE
)
_WORD = re.compile(r"[A-Za-z0-9]+")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/|/vsi[a-z0-9_]+/")  # one slash: pathlib takes the other for none
# What is met as data and not read, by suffix, and what makes a GeoTIFF of it.
_OTHER_KINDS = {
    ".vrt": ("a VRT, which names other files", "gdal_translate IN OUT"),
    **dict.fromkeys((".nc", ".nc4", ".cdf"), ("netCDF", "gdal_translate NETCDF:IN:VARIABLE OUT")),
    **dict.fromkeys(
        (".h5", ".he5", ".hdf5", ".hdf"), ("HDF", "gdal_translate on a subdataset that gdalinfo IN lists, to OUT")
    ),
    ".zarr": ("Zarr", "gdal_translate on a subdataset that gdalinfo IN lists, to OUT"),
    ".zip": ("an archive", "unzip IN and give the folder"),
    **dict.fromkeys((".tar", ".tgz", ".gz"), ("an archive", "unpack IN and give the folder")),
    **dict.fromkeys(
        (".json", ".geojson"), ("JSON (a STAC item names its rasters)", "download its assets and give their folder")
    ),
    **dict.fromkeys(
        (".img", ".dat", ".hdr"), ("ERDAS or ENVI, which keep pixels in other files", "gdal_translate IN OUT")
    ),
}
_MAGIC = {  # of the same kinds whatever their names say
    b"<VRTDataset": ".vrt",
    b"CDF": ".nc",
    b"\x89HDF": ".h5",
    b"PK\3\4": ".zip",
    b"\x1f\x8b": ".gz",
    b"{": ".json",
    b"EHFA_HEADER_TAG": ".img",
}


@dataclass(frozen=True, slots=True)
class FoundScene:
    """A scene's path (see the module) and the raster files that make it up."""

    path: Path
    files: tuple[Path, ...]


def refuse_addresses(setting: str, paths: Sequence[str]) -> None:
    """Refuse what is no local path, before it is taken for one and made absolute.

    Args:
        setting: What named them, ``--data`` for example.
        paths: As the user gave them.

    Raises:
        UserError: Naming the first.
    """
    for path in paths:
        if _ADDRESS.match(path) and not Path(path).exists():
            raise UserError(
                f"{setting} {path} is an address, only local files are read: download it and give its folder"
            )


def other_kind(path: Path) -> str | None:
    """What a file or folder is that is no raster to be read, and what to do, as a clause that follows its path.

    Its first bytes tell, else its suffix; None where neither does.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except OSError:  # a folder
        head = b""
    suffix = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), path.suffix.lower())
    if suffix not in _OTHER_KINDS:
        return None
    what, mend = _OTHER_KINDS[suffix]
    out = f"{path.stem.removesuffix('.')}.tif" if path.suffix != ".tif" else f"{path.stem}_2.tif"
    names = {"IN": shlex.quote(path.name), "OUT": shlex.quote(out)}
    return f"is {what}, and is not read; {re.sub('IN|OUT', lambda word: names[word[0]], mend)}"


def find_scenes(paths: Sequence[Path | str]) -> list[Path]:
    """Find the scenes under folders and among files; see `walk_scenes`."""
    return [scene.path for scene in walk_scenes(paths)]


def walk_scenes(paths: Sequence[Path | str], *, progress: bool = False) -> list[FoundScene]:
    """Find the scenes under folders (with all folders below them) and among files, by one walk over the names.

    Band files (one band's name in each file name) that differ in nothing but band and resolution are one scene,
    also across the folders ``R10m``, ``R20m``, ``R60m`` of a product. Every other .tif and .tiff is one scene. What a
    product puts beside its bands (true colour image, scene classification, quality masks) and JPEG 2000 files
    named by no band are none. Links to folders are followed, each folder is entered once.

    Args:
        paths: Folders, files, or scene paths as this function returns them.
        progress: Show a bar where the walk takes more than two seconds.

    Returns:
        Sorted by path, each scene once.

    Raises:
        UserError: If a path does not exist or a folder holds no raster.
    """
    scenes: dict[Path, FoundScene] = {}
    loose: dict[Path, list[Path]] = {}
    entered: set[tuple[int, int]] = set()
    with tqdm(desc="finding scenes", unit=" folders", delay=2, disable=not progress) as bar:
        # Folders before what lies below them, so that a path given twice is met as entered, not as empty.
        for path in sorted((straight_path(p) for p in paths), key=lambda p: len(p.parts)):
            if path.is_dir():
                if _identity(path) in entered:
                    continue
                found = _walk(path, entered, bar)
                if not found:
                    inside = sorted(path.iterdir()) if path.suffix.lower() not in _OTHER_KINDS else []
                    for other in (path, *inside):
                        if other.suffix.lower() in _OTHER_KINDS and (kind := other_kind(other)) is not None:
                            raise UserError(f"no raster under {path}: {other} {kind}")
                    raise UserError(
                        f"no raster under {path}: looked for {', '.join(RASTER_SUFFIXES)} in all folders below it; "
                        "point --data at a folder of GeoTIFFs or a product's band files"
                    )
                scenes.update((scene.path, scene) for scene in found)
            elif path.exists():
                loose.setdefault(path.parent, []).append(path)
            elif BAND in path.name:
                scenes[path] = FoundScene(path, tuple(file for _, file in band_files(path)))
            else:
                raise UserError(f"{path} does not exist; --data (of a probe: --images) takes folders and GeoTIFF files")
    for folder, files in loose.items():
        found = _group(folder, sorted(files), whole=False, any_suffix=True)
        scenes.update((scene.path, scene) for scene in found)
    if not scenes:
        raise UserError(
            "no path given to look for scenes; --data (of a probe: --images) takes folders and GeoTIFF files"
        )
    return [scenes[path] for path in sorted(scenes)]


def straight_path(path: Path | str) -> Path:
    """Absolute, and without detours by ``..`` where these lead to the same file (links to folders may not)."""
    absolute = Path(path).absolute()
    straight = Path(os.path.normpath(absolute))
    return straight if straight.exists() and absolute.exists() and straight.samefile(absolute) else absolute


def band_files(path: Path) -> list[tuple[str, Path]]:
    """The band files of a scene that is a folder or a group, sorted; a band may come at several resolutions.

    Args:
        path: A folder, or a group's path with ``{band}`` in its name.

    Returns:
        Pairs of canonical band name and file.

    Raises:
        UserError: If there are none, or the folder holds more than one product.
    """
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    if not folder.is_dir() or not (is_folder or BAND in path.name):
        raise UserError(f"{path} does not exist; --data (of a probe: --images) takes folders and GeoTIFF files")
    groups: dict[str, list[tuple[str, Path]]] = {}
    for file in _pooled_files(folder):
        split = _split(file.stem)
        if split is not None:
            groups.setdefault(split[1], []).append((split[0], file))
    if is_folder and len(groups) == 1:
        return sorted(groups.popitem()[1])
    if is_folder and groups:
        raise UserError(
            f"{path} holds {len(groups)} products, {' and '.join(sorted(groups)[:2])} among them; "
            f"name one, for example {path / min(groups)}"
        )
    if path.name in groups:
        return sorted(groups[path.name])
    raise UserError(f"no band files for {path}: looked for {', '.join(RASTER_SUFFIXES)} with a band's name (_B04)")


def _walk(folder: Path, entered: set[tuple[int, int]], bar: tqdm[None]) -> list[FoundScene]:
    """The scenes in `folder` and below it."""
    found: list[FoundScene] = []
    pending = [folder]
    while pending:
        here = pending.pop()
        try:
            if _identity(here) in entered:
                continue
            entered.add(_identity(here))
            files, folders = _listing(here)
        except OSError as error:
            raise UserError(f"cannot list {here} ({error.strerror}); give folders you may read") from error
        bar.update()
        for below in folders:
            if _RESOLUTION_FOLDER.fullmatch(below.name):
                files += _listing(below)[0]
            elif below.name not in _NO_IMAGERY_FOLDERS:
                pending.append(below)
        found += _group(here, files, whole=True)
    return found


def _identity(folder: Path) -> tuple[int, int]:
    """What stays the same of a folder by whatever link it is reached."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Rasters and folders in `folder`, each sorted; hidden ones (files in the making among them) are left out."""
    files: list[Path] = []
    folders: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself: a file that cannot be read, to be counted as such
                is_folder = False
            if is_folder:
                folders.append(folder / entry.name)
            elif entry.name.lower().endswith(RASTER_SUFFIXES):
                files.append(folder / entry.name)
    return sorted(files), sorted(folders)


def _pooled_files(folder: Path) -> list[Path]:
    files, folders = _listing(folder)
    for below in folders:
        if _RESOLUTION_FOLDER.fullmatch(below.name):
            files += _listing(below)[0]
    return files


def _split(stem: str) -> tuple[str, str] | None:
    """Band and group of a file name: ``T33_B04_10m`` is (``B04``, ``T33_{band}``); None where it names no one band."""
    band = canonical_band(stem)
    if band is None:
        return None
    stem = _RESOLUTION_SUFFIX.sub("", stem)
    for word in _WORD.finditer(stem):
        if band_token(word[0]) is not None:
            return band, stem[: word.start()] + BAND + stem[word.end() :]
    return None  # "Band 4": two words, a spelling of descriptions


def _group(folder: Path, files: Sequence[Path], *, whole: bool, any_suffix: bool = False) -> list[FoundScene]:
    """Sort the rasters of one folder into scenes.

    Args:
        folder: Where they lie, directly or in its resolution folders.
        files: Sorted.
        whole: Whether `files` is all that `folder` holds, so that its only scene may go by the folder's path.
        any_suffix: Whether files that are neither GeoTIFF nor JPEG 2000 are scenes (files that the user named).
    """
    groups: dict[str, list[tuple[str, Path]]] = {}
    others: list[Path] = []
    for file in files:
        split = _split(file.stem)
        if split is None:
            others.append(file)
        else:
            groups.setdefault(split[1], []).append((split[0], file))
    products: dict[str, tuple[Path, ...]] = {}
    for name, members in groups.items():
        if len({band for band, _ in members}) > 1:
            products[name] = tuple(file for _, file in members)
        else:
            others += [file for _, file in members]
    stems = [name.partition(BAND)[0] for name in products]
    scenes = [
        FoundScene(file, (file,))
        for file in others
        if not any(file.stem.startswith(stem) and _beside_bands(file.stem[len(stem) :]) for stem in stems)
        and (any_suffix or file.suffix.lower() in GEOTIFF_SUFFIXES or _split(file.stem) is not None)
    ]
    if whole and len(products) == 1 and not scenes and len(groups) == 1:
        return [FoundScene(folder, next(iter(products.values())))]
    return scenes + [FoundScene(folder / name, members) for name, members in products.items()]


def _beside_bands(rest: str) -> bool:
    """Whether what follows the product's name says auxiliary raster (``TCI_10m``, ``SCL``)."""
    word = _WORD.match(rest)
    return word is not None and _BESIDE_BANDS.fullmatch(word[0]) is not None
