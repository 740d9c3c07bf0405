"""The command line: typed dataclasses filled from YAML recipes and dotted options; mistakes end in one line."""

from __future__ import annotations

import argparse
import json
import re
from difflib import get_close_matches
from typing import NoReturn, TypeVar

import jsonargparse

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


class _Parser(jsonargparse.ArgumentParser):
    """Errors in one line, with the nearest known setting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        known = [option.lstrip("-") for option in self._option_string_actions if option.startswith("--")]
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", line) or re.search(
            r"Group '([\w.]+)' does not accept option '([\w.]+)'", line
        )
        if unknown:
            name = ".".join(unknown.groups())
            close = get_close_matches(name, known, n=1, cutoff=0.3)
            line = f"unknown setting {name}" + (f"; the nearest known one is {close[0]}" if close else "")
        self.exit(2, f"{self.prog}: error: {line} (--help lists all settings)\n")
        raise AssertionError("exit returned")


def parse(
    kind: type[Config], program: str, argv: list[str], short: dict[str, str], usage: str, positional: str | None = None
) -> Config:
    """Read settings from the command line and from YAML recipes (`--config`, which may be given several times).

    Args:
        kind: The dataclass to fill.
        program: Name of the command in help and errors.
        argv: Arguments without the program's name.
        short: Short forms of options, for example ``{"--data": "--data.paths"}``.
        usage: Line that opens the help.
        positional: The list that arguments before the first option fill, for example ``--paths``.

    Returns:
        The filled dataclass. Ends the process with code 2 and one line on a mistake, with code 0 after `--help`
        or `--print_config`.
    """
    parser = _Parser(prog=program, description=(kind.__doc__ or "").strip(), usage=usage)
    parser.add_argument("--config", action="config", help="recipe in YAML; later options override it")
    parser.add_class_arguments(kind, as_group=False)
    for option in short:  # it would read a YAML file, were it not short for something else
        parser._option_string_actions[option].help = argparse.SUPPRESS
    lists = {
        option
        for option, action in parser._option_string_actions.items()
        if re.search(r"\b(list|tuple)\[", str(getattr(action, "_typehint", "")))
    }
    flags = {
        option
        for option, action in parser._option_string_actions.items()
        if getattr(action, "_typehint", None) is bool or getattr(action, "type", None) is bool
    }
    if positional is not None and argv and not argv[0].startswith("-"):
        argv = [positional, *argv]
    arguments = _spread([_expand(a, short) for a in argv], lists, flags)
    settings = parser.parse_args(arguments)
    settings.pop("config", None)
    filled: Config = kind(**vars(parser.instantiate(settings)))
    return filled


def _expand(argument: str, short: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return short.get(name, name) + equals + value


def _spread(argv: list[str], lists: set[str], flags: set[str]) -> list[str]:
    """Turn ``--data.paths a b`` into one JSON list, so that one value and several are written alike.

    A flag at the end or before another option means true: ``--quick`` is ``--quick true``.
    """
    out: list[str] = []
    position = 0
    while position < len(argv):
        name = argv[position]
        position += 1
        out.append(name)
        if name in flags and (position == len(argv) or argv[position].startswith("--")):
            out.append("true")
        if name not in lists:
            continue
        values = []
        while position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        as_written = len(values) == 1 and (values[0].startswith("[") or values[0] == "null")
        out.append(values[0] if as_written else json.dumps(values))
    return out
