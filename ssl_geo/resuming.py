"""Going on with a run: which settings it keeps to and which may change. Settings are plain values here."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from ssl_geo.documents import read_yaml
from ssl_geo.errors import UserError

# A resumed run may change these: they do not touch its result.
FREE = ("out", "resume", "resume_changed", "device", "data.workers", "data.cache", "log.")
# These of `data.` it may change when told to; what else of it is changed makes other chips, and so another run.
OF_THE_SAME_CHIPS = ("data.labels", "data.mean", "data.std")
# What versions did that had no such setting: a run of theirs keeps to it.
BEFORE_IT_WAS_A_SETTING = {"views.backend": "opencv"}


def restarted_by_torchrun(out: str | None, resume: str | None) -> bool:
    """Whether torchrun has started the same command again after a rank died, and the run that it began is there.

    Args:
        out: --out of the command.
        resume: Its --resume.

    Raises:
        UserError: It could not be gone on with, as it has no name that the command gives.
    """
    if resume is None and out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UserError("torchrun --max-restarts goes on with the run that --out names: give it")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return restarts > 0 and resume is None and (Path(out or "") / "config.yaml").is_file()


def read_settings(run: str) -> dict[str, Any]:
    """RUN/config.yaml as plain values.

    Raises:
        UserError: It is not there or damaged.
    """
    recipe = Path(run) / "config.yaml"
    if not recipe.is_file():
        raise UserError(
            f"--resume {run} is not a run folder: it has no config.yaml; a run that was stopped before it had one is "
            f"started again by the command that began it, with --out {shlex.quote(run)}"
        )
    settings = read_yaml(recipe)
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{recipe} holds no settings: start a new run with --out")
    return settings


def resume_changes(now: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """What a resumed run changes of the settings that decide its result, a line each.

    Args:
        now: What was asked for, --resume among it.
        defaults: Of all settings.

    Raises:
        UserError: It was not told to, or what changes cannot.
    """
    run = now["resume"]
    changed = changed_settings(read_settings(run), now, defaults)
    lines = [f"{name} {values}" for name, values in changed.items()]
    if changed and not now["resume_changed"]:
        raise UserError(
            f"--resume {run} with other settings: {'; '.join(lines)}; leave them out, or give "
            "--resume_changed to go on with them, to another result"
        )
    if others := [name for name in changed if name.startswith("data.") and name not in OF_THE_SAME_CHIPS]:
        raise UserError(
            f"--resume {run} keeps to its chips, {', '.join(others)} cannot change: start anew with --out, "
            f"from its backbone with --backbone.weights {shlex.quote(run)}"
        )
    return lines


def changed_settings(before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> dict[str, str]:
    """Name the settings that would change a run's result.

    Args:
        before: RUN/config.yaml; what an older version did not know counts as the default.
        now: What was asked for on resuming.
        defaults: Of all settings.

    Returns:
        By name what changed, as ``0.001 -> 0.002``.
    """
    old = _flat(defaults) | BEFORE_IT_WAS_A_SETTING | _flat(before)
    new = _flat(now)
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and not k.startswith(FREE)]
    return {k: f"{old.get(k)} -> {new.get(k)}" for k in changed}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "arguments":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
