"""The first pass of a chip index: describe every scene; refuse what does not fit together before pixels are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ssl_geo.errors import UserError
from ssl_geo.imagery.archives import FoundScene
from ssl_geo.imagery.gdal import as_utf8
from ssl_geo.imagery.rasters import open_scene
from ssl_geo.imagery.scenes import (
    NotImageryError,
    OffsetSource,
    Scene,
    Transform,
    UnreadableError,
    listed_statements,
)
from ssl_geo.threads import in_order

CHIP_STEP, SMALLEST_CHIP = 8, 16  # pixels; of the chip sizes that are proposed
NAMED_SCENES = 20  # scenes that a left-out record names; all are counted


@dataclass(frozen=True)
class LeftOut:
    """What an index leaves out for one reason.

    Attributes:
        reason: For example ``scene misses bands B8A, B12``.
        unit: ``scene``, ``chip`` or ``pixel``.
        count: How many.
        scenes: The first paths concerned, in order.
    """

    reason: str
    unit: str
    count: int
    scenes: tuple[str, ...]

    def __str__(self) -> str:
        """One line: how many, why, where."""
        line = f"left out {self.count} {self.unit}{'' if self.count == 1 else 's'}: {self.reason}"
        if self.unit == "scene":
            more = self.count - 3
            line += (
                f" ({', '.join(Path(scene).name for scene in self.scenes[:3])}{f', {more} more' if more > 0 else ''})"
            )
        return line


class SceneRecord(NamedTuple):
    """What the survey keeps of a scene."""

    path: str
    height: int
    width: int
    crs: str | None
    transform: Transform
    dtype: str
    level: str | None
    offset: float
    offset_source: OffsetSource
    scale: float
    nodata: float | None
    date: str | None
    overruled: tuple[str, ...]


def describe_scenes(
    found: Sequence[FoundScene],
    *,
    bands: Sequence[str],
    chip_size: int,
    scene_settings: Mapping[str, Any],
    max_unreadable: float,
    workers: int,
    progress: bool,
) -> tuple[list[SceneRecord], list[LeftOut]]:
    """Describe every scene; leave out, and count, those that are no use.

    Returns:
        The scenes that have all bands and room for a chip, in order, and what was left out.

    Raises:
        UserError: If none is left, too many cannot be opened, or a scene needs a setting.
    """

    def describe(scene: FoundScene) -> Scene | UnreadableError | NotImageryError:
        try:
            return open_scene(scene.path, **scene_settings)
        except (UnreadableError, NotImageryError) as error:
            return error

    kept: list[SceneRecord] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    bands_seen: set[str] = set()
    unreadable: dict[str, str] = {}
    pictures: list[str] = []
    too_small = f"scene smaller than a chip of {chip_size} pixels"
    small_sides: list[int] = []
    largest = (0, 0)
    scenes = in_order(describe, found, workers)
    bar = tqdm(scenes, "describing scenes", len(found), unit=" scenes", delay=2, disable=not progress)
    for path, scene in zip((as_utf8(str(scene.path)) for scene in found), bar, strict=True):
        if isinstance(scene, UnreadableError):
            unreadable[path] = str(scene)
        elif isinstance(scene, NotImageryError):
            pictures.append(str(scene))
            left_out["no imagery (palette, picture for display, complex numbers)"].append(path)
        elif missing := [band for band in bands if band not in scene.bands]:
            bands_seen.update(scene.bands)
            left_out[f"scene misses band{'' if len(missing) == 1 else 's'} {', '.join(missing)}"].append(path)
        elif min(scene.height, scene.width) < chip_size:
            largest = max(largest, (scene.height, scene.width), key=min)
            small_sides.append(min(scene.height, scene.width))
            left_out[too_small].append(path)
        else:
            kept.append(SceneRecord(path, *(getattr(scene, name) for name in SceneRecord._fields[1:])))
    refuse_unreadable(unreadable, len(found), max_unreadable)
    if not kept:
        if largest != (0, 0):
            raise UserError(
                f"no scene is as large as a chip of {chip_size} pixels, the largest has {largest[0]}×{largest[1]}: "
                f"set --data.chip_size to {min(largest)} or less"
            )
        if bands_seen:
            raise UserError(
                f"no scene has all the bands {' '.join(bands)}; the scenes have {' '.join(sorted(bands_seen))}: "
                "set --data.bands"
            )
        raise UserError(next(iter([*pictures, *unreadable.values()]), "no scene found; set --data"))
    if small_sides:
        left_out[too_small + _smaller_chips(small_sides)] = left_out.pop(too_small)
    records = [LeftOut(why, "scene", len(paths), tuple(paths[:NAMED_SCENES])) for why, paths in left_out.items()]
    return kept, [*records, *([unreadable_record(unreadable)] if unreadable else [])]


def _smaller_chips(sides: Sequence[int]) -> str:
    """The chip size that keeps nine of ten small scenes, of which the shorter sides are given, as a clause."""
    size = sorted(sides)[len(sides) // 10] // CHIP_STEP * CHIP_STEP
    if size < SMALLEST_CHIP:
        return ""
    return f"; --data.chip_size {size} would keep {sum(side >= size for side in sides)} of them"


def refuse_mixed(scenes: Sequence[SceneRecord]) -> None:
    """Refuse scenes of different products or with different offsets that are known; unknown ones do not conflict.

    Raises:
        UserError: Naming both, a scene of each, and the setting that allows it.
    """
    known_offsets = [(f"{s.offset:g}", s.path) for s in scenes if s.offset_source != "assumed"]
    for what, seen in (
        ("products", [(s.level, s.path) for s in scenes if s.level is not None]),
        ("offsets", known_offsets),
    ):
        first: dict[str, str] = {}
        for value, path in seen:
            first.setdefault(value, path)
        if len(first) > 1:
            examples = " and ".join(f"{value} (for example {path})" for value, path in sorted(first.items()))
            raise UserError(
                f"the scenes mix {what}: {examples}; give one of them to --data or set --data.allow_mixed true"
            )


def unit_notes(scenes: Sequence[Scene | SceneRecord], noun: str) -> list[str]:
    """What a reader should know of the scenes' units: offsets that were assumed, statements that settings replace.

    Args:
        scenes: Any number.
        noun: What to call them, ``scenes`` or ``images``.
    """
    notes = []
    integer = [scene for scene in scenes if np.dtype(scene.dtype).kind in "iu"]
    if assumed := sum(scene.offset_source == "assumed" for scene in integer):
        notes.append(
            f"offset 0 assumed for {assumed} of {len(scenes)} {noun}: no tag, metadata or product name states it, and "
            "products since January 2022 carry -1000; --data.offset sets it"
        )
    if overruled := [scene for scene in scenes if scene.overruled]:
        notes.append(
            f"settings replace what {len(overruled)} of {len(scenes)} {noun} state of themselves: "
            f"{listed_statements(scene.overruled for scene in overruled)} (the first {overruled[0].path}); leave a "
            "setting out to read each as it says"
        )
    return notes


def refuse_unreadable(unreadable: Mapping[str, str], scenes: int, allowed: float) -> None:
    """Refuse to go on where more than the allowed share of the scenes cannot be read.

    Args:
        unreadable: What was wrong, by path of the scene.
        scenes: How many scenes there are.
        allowed: Share of them.

    Raises:
        UserError: Naming the count, the share and the first.
    """
    if len(unreadable) > allowed * scenes:
        raise UserError(
            f"{len(unreadable)} of {scenes} scenes cannot be read, more than the share {allowed:g} that "
            f"--data.max_unreadable allows: {next(iter(unreadable.values()))}"
        )


def unreadable_record(unreadable: Mapping[str, str]) -> LeftOut:
    """What to say of scenes that cannot be read, with what was wrong with the first."""
    reason = f"unreadable, {next(iter(unreadable.values()))}"
    return LeftOut(reason, "scene", len(unreadable), tuple(unreadable)[:NAMED_SCENES])
