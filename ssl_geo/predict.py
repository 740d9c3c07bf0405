"""Map whole scenes with the head that a probe chose: ``python -m ssl_geo.predict --help``."""

from __future__ import annotations

from ssl_geo.config import PREDICT_PROGRAM, PredictConfig, predict_config
from ssl_geo.errors import UserError, interrupt_on_termination, one_line_errors, tell

if __name__ == "__main__":  # settings first: --help answers before torch is imported
    SETTINGS = predict_config()

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssl_geo
from ssl_geo.files import remove_stale
from ssl_geo.imagery.maps import other_pixels
from ssl_geo.imagery.origin import MADE_FROM, content_digest, made_from, scene_state
from ssl_geo.imagery.pairing import scene_name
from ssl_geo.imagery.rasters import Scene, find_scenes, open_scene
from ssl_geo.imagery.scenes import UnreadableError
from ssl_geo.mapping import Layer, embed_chips, embed_places, fit_basis, map_scene, open_layer
from ssl_geo.probing.embedding import EmptySceneError, PrincipalComponents, load_basis, save_basis
from ssl_geo.probing.saved import SavedHead, load_head
from ssl_geo.probing.store import store_key
from ssl_geo.probing.tiling import NotFiniteError
from ssl_geo.training import distributed

BASIS = "pca.safetensors"


def main(config: PredictConfig) -> int:
    """Predict: scene → tiles → probabilities or features, blended → map."""
    check(config)
    head = load_head(Path(config.head))
    device = distributed.setup(config.device).device
    head.backbone.to(device)
    head.head.to(device)
    scenes, unreadable = open_scenes(config, head)
    given = len(scenes) + unreadable
    files = targets(config, scenes)
    for scene in scenes:
        for line in notes(head, scene):
            tell(line)
    made = {"software": ssl_geo.__version__, "head": head_state(Path(config.head)), "settings": deciding(config)}
    layer = open_layer(head, config.layer) if config.embed in ("pca", "tokens") else None
    basis = None
    if config.embed == "pca" and layer is not None:
        basis, made["basis"] = open_basis(config, head, scenes, basis_file(config, files), layer, made, device)
    todo = unfinished(scenes, files, made)
    empty = 0
    for scene, path, key in todo:
        try:
            if layer is not None:
                lines = embed_places(config, head, scene, path, key, device, layer, basis)
            elif config.embed == "chips":
                lines = embed_chips(config, head, scene, path, key, device)
            else:
                lines = map_scene(config, head, scene, path, key, device)
        except NotFiniteError as error:
            raise UserError(f"{scene.path}: {error}") from error
        except EmptySceneError as error:
            if given == 1:
                raise EmptySceneError(f"{scene.path}: {error}") from error
            empty += 1
            tell(f"left out {scene.path}: {error}")
            continue
        except UnreadableError as error:
            if given == 1:
                raise
            unreadable += 1
            tell(f"left out {error}")
            continue
        for line in [f"{scene.path} -> {path}", *lines]:
            tell(line)
    if done := len(scenes) - len(todo):
        tell(f"skipped {done} of {given} scenes: what this command makes of them is there already")
    if empty:
        tell(f"left out {empty} of {given} scenes: nothing to embed")
    if unreadable:
        raise UserError(
            f"left out {unreadable} of {given} scenes that cannot be read, the others are done: mend them and run the "
            "same command again"
        )
    return 0


def check(config: PredictConfig) -> None:
    """Refuse settings that cannot work, before anything is read."""
    if not 0 <= config.overlap <= 0.5:
        raise UserError(f"--overlap is {config.overlap}; it must lie between 0 and 0.5")
    if config.batch_size < 1:
        raise UserError(f"--batch_size is {config.batch_size}; it must be 1 or more")
    if config.components is not None and config.components < 1:
        raise UserError(f"--components is {config.components}; it must be 1 or more")
    if config.embed is not None and (config.confidence or config.probabilities):
        raise UserError(f"--embed {config.embed} writes no classes: leave --confidence and --probabilities out")
    for name in ("layer", "components"):
        if getattr(config, name) is not None and config.embed not in ("pca", "tokens"):
            raise UserError(f"--{name} is for --embed pca and --embed tokens alone")
    if config.basis is not None and config.embed != "pca":
        raise UserError("--basis is for --embed pca alone")


def open_scenes(config: PredictConfig, head: SavedHead) -> tuple[list[Scene], int]:
    """Find the scenes and read their headers; each must have the head's bands. How many of several are unreadable."""
    paths: list[str] = []
    for path in config.scene:
        pattern = Path(path)
        if pattern.exists() or not set("*?[") & set(path):
            paths.append(path)
            continue
        found = sorted(str(match) for match in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
        if not found:
            raise UserError(f"--scene {path} matches nothing; name files, folders or another pattern")
        paths += found
    scenes, unreadable, files = [], 0, find_scenes(paths)
    for file in files:
        try:
            scenes.append(open_scene(file, **dataclasses.asdict(config.data)))
        except UnreadableError as error:
            unreadable += 1
            if unreadable == len(files):
                raise
            tell(f"left out {error}")
    for scene in scenes:
        if missing := [band for band in head.description.bands if band not in scene.bands]:
            raise UserError(
                f"{scene.path} has no band {missing[0]}, only {' '.join(scene.bands)}, where the head takes "
                f"{' '.join(head.description.bands)}: give scenes that have them (--data.band_names names the bands of "
                "files that name none)"
            )
    return scenes, unreadable


def targets(config: PredictConfig, scenes: list[Scene]) -> list[list[Path]]:
    """The files of each scene, the main one first; nothing there that predict has not written is written over."""
    out, suffixes = Path(config.out), [".parquet"] if config.embed == "chips" else [".tif", ".tiff"]
    suffix = suffixes[0]
    if out.suffix.lower() in suffixes:
        if len(scenes) > 1:
            raise UserError(f"--out {out} is one file for {len(scenes)} scenes; name a folder")
        files = [out]
    elif out.suffix.lower() in (".tif", ".tiff", ".parquet", ".json"):
        raise UserError(f"--out {out}: what is written is {suffix}; name such a file or a folder")
    else:
        files = [out / f"{scene_name(Path(scene.path)) or 'scene'}{suffix}" for scene in scenes]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise UserError(f"two scenes would be written to {twice}; predict them into folders of their own")
    extra = [".json"] * (config.embed is None) + [".confidence.tif"] * config.confidence
    extra += [".probabilities.tif"] * config.probabilities
    everything = [[file, *(file.with_name(file.stem + more) for more in extra)] for file in files]
    for path in (path for own in everything for path in own):
        if path.exists() and made_from(path) is None:
            raise UserError(f"--out: {path} exists; name another place or remove it")
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({error.strerror}); name a folder that can") from error
    if left := remove_stale(folder):
        tell(f"removed {left} half-written files that a killed process left in {folder}")
    return everything


def deciding(config: PredictConfig) -> dict[str, Any]:
    """The settings that decide what is written, beside head, scene and basis."""
    names = ("embed", "layer", "components", "overlap", "confidence", "probabilities")
    return {name: getattr(config, name) for name in names}


def head_state(folder: Path) -> list[str]:
    """What decides what a head says."""
    names = ("head.json", "head.safetensors", "backbone.json", "backbone.safetensors")
    return [content_digest(folder / name) for name in names]


def basis_file(config: PredictConfig, files: Sequence[list[Path]]) -> Path:
    """Where the basis of this call goes: beside what is made with it."""
    main_file = files[0][0]
    return main_file.with_suffix(".pca.safetensors") if Path(config.out) == main_file else main_file.with_name(BASIS)


def open_basis(
    config: PredictConfig,
    head: SavedHead,
    scenes: Sequence[Scene],
    path: Path,
    layer: Layer,
    made: dict[str, Any],
    device: torch.device,
) -> tuple[PrincipalComponents, str]:
    """The basis of the call: read where one is given or this command has left it, else fitted and written; its digest.

    Raises:
        UserError: It is of another backbone or layer, or one of other scenes lies where this one goes.
    """
    described = head.description
    key = store_key({**made, "scenes": [scene_state(scene) for scene in scenes]})
    seen = {name: getattr(described, name) for name in ("bands", "mean", "std", "enlarge")}
    backbone = store_key({"weights": content_digest(Path(config.head) / "backbone.safetensors"), **seen})
    if config.basis is None and not path.exists():
        components = fit_basis(config, head, scenes, layer, device)
        about = {"layer": layer.name, "backbone": backbone, "checkpoint": described.checkpoint, MADE_FROM: key}
        save_basis(path, components, about)
    source = path if config.basis is None else Path(config.basis)
    if not source.is_file():
        raise UserError(f"--basis {source} does not exist; name a pca.safetensors that --embed pca left")
    components, about = load_basis(source)
    if config.basis is None and about.get(MADE_FROM) != key:
        raise UserError(
            f"--out: {path} exists, fitted on other scenes or with other settings: --basis {shlex.quote(str(path))} "
            "takes it for these scenes too, or name another place"
        )
    if about["layer"] != layer.name:
        raise UserError(
            f"--basis {source} is of layer {about['layer']}, not {layer.name}: give --layer {about['layer']}"
        )
    if about["backbone"] != backbone:
        raise UserError(
            f"--basis {source} is of another backbone ({about['checkpoint']}) than --head {config.head}: features of "
            "two backbones cannot be compared; leave it out"
        )
    kept, channels = components.axes.shape
    if channels != layer.channels or config.components not in (None, kept):
        raise UserError(
            f"--basis {source} has {kept} components of {channels} channels; the layer has {layer.channels} channels"
            + (f", and --components asks for {config.components}" if config.components else "")
        )
    lines = " ".join(f"{share:.1%}" for share in components.explained.tolist())
    tell(f"basis {source}, components explained: {lines}")
    return components, content_digest(source)


def unfinished(
    scenes: Sequence[Scene], files: Sequence[list[Path]], made: dict[str, Any]
) -> list[tuple[Scene, Path, str]]:
    """Scenes whose files are not all there, with the main file and a digest of what they are made from.

    A file that is there must be of the same head, settings and scene.

    Raises:
        UserError: Another file is there.
    """
    todo = []
    for scene, own in zip(scenes, files, strict=True):
        key = store_key({**made, **scene_state(scene)})
        there = [file for file in own if file.exists()]
        for file in there:
            if made_from(file) != key:
                raise UserError(
                    f"--out: {file} exists, made with another head, other settings or from another state of "
                    f"{scene.path}: name another place or remove it"
                )
        if len(there) < len(own):
            todo.append((scene, own[0], key))
    return todo


def notes(head: SavedHead, scene: Scene) -> Iterator[str]:
    """What a reader of the map should know of how it was read."""
    levels = head.description.provenance.get("levels")
    if levels and scene.level is not None and scene.level not in levels:
        yield f"{scene.path} is {scene.level}, the head was trained on {' '.join(levels)}: its classes may be off"
    if scene.offset_source == "assumed" and np.dtype(scene.dtype).kind in "iu":
        yield f"{scene.path}: offset 0 assumed, nothing states it; --data.offset sets it"
    if scene.crs is None:
        yield f"{scene.path} has no CRS: nor has what is made of it, and areas are in pixels"
    if scene.overruled:
        yield f"{scene.path} states {', '.join(scene.overruled)}: settings say otherwise, and are followed"
    backbone: Any = head.backbone
    if line := other_pixels(scene, backbone.description.get("gsd")):
        yield line


if __name__ == "__main__":
    interrupt_on_termination()
    with one_line_errors(PREDICT_PROGRAM):
        raise SystemExit(main(SETTINGS))
