"""The command line: typed dataclasses filled from YAML recipes and dotted options; mistakes end in one line.

Recipes and options are plain values until `ssl_geo.schema.conform` has held each against the type of its field: no
setting can name code that is imported or run.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import docstring_parser

from ssl_geo import documents
from ssl_geo.errors import UserError, printable
from ssl_geo.schema import allowed, conform, hints, shown

Config = TypeVar("Config")

_LONGEST_NAME = 255  # bytes of a file's name on Linux's file systems; most texts name files


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A field: its type without null, whether null is one of its values, and its help."""

    kind: Any
    optional: bool
    help: str

    @property
    def origin(self) -> Any:
        """list, tuple, dict, Literal, or the type itself."""
        return get_origin(self.kind) or self.kind


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {printable(' '.join(message.split()))} (--help lists all settings)\n")
        raise AssertionError("exit returned")


def parse(
    kind: type[Config], program: str, argv: list[str], short: dict[str, str], usage: str, positional: str | None = None
) -> Config:
    """Read settings from YAML recipes (`--config`, which may be given several times) and from options, which go first.

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
    settings = _settings(kind)
    parser = _Parser(prog=program, description=_summary(kind), usage=usage, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], help="recipe in YAML; options go before it")
    parser.add_argument("--print_config", action="store_true", help="print all settings as a recipe, and stop")
    _add_options(parser, kind, settings, {name: option for option, name in short.items()})
    if positional is not None and argv and not argv[0].startswith("-"):
        argv = [positional, *argv]
    given, rest = parser.parse_known_args(_with_negative_numbers(argv))
    options = vars(given)
    recipes, prints = options.pop("config"), options.pop("print_config")
    values: dict[str, Any] = {}
    try:
        for recipe in recipes:
            values |= _of_recipe(documents.read_yaml(Path(recipe)), settings, recipe)
        values |= {name: _of_text(_unmarked(text), settings[name], f"--{name}") for name, text in options.items()}
        for name, key, text in _mapping_entries(rest, settings):
            entries = {**values.get(name, {}), key: documents.parse_yaml(text, f"--{name}.{key}")}
            values[name] = conform(entries, settings[name].kind, f"--{name}")
        filled: Config = _build(kind, values)
    except UserError as error:
        parser.error(str(error))
    if prints:
        parser.exit(0, to_yaml(filled))
    return filled


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain values (tuples become lists), as YAML, JSON and checkpoints hold them."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def to_yaml(config: Any) -> str:
    """Write a configuration as the YAML that `--config` reads."""
    return documents.to_yaml(to_dict(config))


def _settings(kind: Any, prefix: str = "") -> dict[str, _Setting]:
    """Every field of a dataclass and of those that it holds, by dotted name."""
    found: dict[str, _Setting] = {}
    help = _field_docs(kind)
    for name, hint in hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= _settings(hint, f"{prefix}{name}.")
            continue
        others = [part for part in get_args(hint) if part is not NoneType]
        optional = NoneType in get_args(hint)
        found[f"{prefix}{name}"] = _Setting(others[0] if optional else hint, optional, help[name])
    return found


def _summary(kind: Any) -> str:
    return (kind.__doc__ or "").strip()


@functools.cache
def _field_docs(kind: Any) -> dict[str, str]:
    """The text below each field of a dataclass."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        docs |= {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(base).params}
    return docs


def _add_options(parser: _Parser, kind: Any, settings: Mapping[str, _Setting], short: Mapping[str, str]) -> None:
    """An option for each setting, in a group for each dataclass."""
    groups: dict[str, Any] = {"": parser}
    for name, hint in hints(kind).items():
        if dataclasses.is_dataclass(hint):
            groups[name] = parser.add_argument_group(_summary(hint).rstrip("."))
    defaults = _flat(dataclasses.asdict(kind(**dict.fromkeys(_required(kind)))), settings)
    for name, setting in settings.items():
        options = [f"--{name}"] + ([short[f"--{name}"]] if f"--{name}" in short else [])
        told = f"{setting.help} ({allowed(setting.kind)}{' or null' if setting.optional else ''}"
        told += ")" if name in _required(kind) else f"; default: {json.dumps(defaults[name])})"
        count: dict[str, Any] = {}
        if setting.origin in (list, tuple):
            count = {"nargs": "*"}
        elif setting.kind is bool:
            count = {"nargs": "?", "const": "true"}
        groups[name.rpartition(".")[0]].add_argument(
            *options,
            dest=name,
            default=argparse.SUPPRESS,
            metavar=name.rpartition(".")[2].upper(),
            help=told.replace("%", "%%"),
            **count,
        )


def _required(kind: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]


def _flat(tree: Mapping[str, Any], settings: Mapping[str, _Setting], prefix: str = "") -> dict[str, Any]:
    """Nested values by the dotted name of their setting."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in settings:
            flat |= _flat(value, settings, f"{name}.")
        else:
            flat[name] = value
    return flat


def _of_recipe(content: Any, settings: Mapping[str, _Setting], recipe: str) -> dict[str, Any]:
    """The settings of a recipe by dotted name."""
    if not isinstance(content or {}, dict):
        raise UserError(f"{recipe} holds no settings; write NAME: VALUE, or GROUP: {{NAME: VALUE}}")
    flat = _flat(conform(content or {}, dict[str, Any], recipe), settings)
    groups = {name.partition(".")[0] for name in settings if "." in name}
    for name, value in flat.items():
        if name in groups:
            raise UserError(f"{recipe}: {name} is a group of settings, not {value!r}; write {name}: {{NAME: VALUE}}")
        if name not in settings:
            raise UserError(f"{recipe}: {_unknown(name, settings)}")
    return {name: _checked(value, settings[name], f"{recipe}: {name}") for name, value in flat.items()}


def _checked(value: Any, setting: _Setting, where: str) -> Any:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not _may_be_a_path(text):
            raise UserError(f"{where} is {shown(text)}; no file can have this name")
    return conform(value, setting.kind | None if setting.optional else setting.kind, where)


def _may_be_a_path(text: str) -> bool:
    """Whether the system takes the text for a path; most texts are one, and others are short."""
    try:
        return "\0" not in text and max(map(len, os.fsencode(text).split(b"/"))) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False


def _of_text(text: Any, setting: _Setting, where: str) -> Any:
    """The value that an option's text, or texts of a list, stands for."""
    if text == "" or (isinstance(text, list) and "" in text):
        raise UserError(f"{where} is empty; leave it out, or give {allowed(setting.kind)}")
    if setting.optional and text in ("null", ["null"]):
        return None
    if setting.origin in (list, tuple):
        if len(text) == 1 and text[0].startswith("["):
            return _checked(documents.parse_yaml(text[0], where), setting, where)
        kinds = get_args(setting.kind)
        each = [kinds[0]] * len(text) if setting.origin is list else kinds
        values = [_scalar(part, kind) for part, kind in zip(text, each, strict=False)]
        return _checked(values + text[len(values) :], setting, where)
    if setting.origin is dict:
        return _checked(documents.parse_yaml(text, where), setting, where)
    return _checked(_scalar(text, setting.kind), setting, where)


def _scalar(text: str, kind: Any) -> Any:
    """A number or truth value where one is wanted and the text is one; else the text."""
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        if kind is int:
            return int(text)
        return text if kind is str or get_origin(kind) is Literal else float(text)
    except ValueError:
        return text


def _mapping_entries(rest: list[str], settings: Mapping[str, _Setting]) -> Iterator[tuple[str, str, str]]:
    """What argparse does not know: entries of mappings, as in ``--backbone.arguments.patch_size 8``.

    Yields:
        The setting, the key and the text of its value.

    Raises:
        UserError: Anything else.
    """
    position = 0
    while position < len(rest):
        option, equals, text = rest[position].partition("=")
        name, _, key = option.removeprefix("--").rpartition(".")
        if not option.startswith("--") or name not in settings or settings[name].origin is not dict:
            is_option = option.startswith("-")
            raise UserError(_unknown(option.lstrip("-"), settings) if is_option else f"{option} belongs to no setting")
        if not equals:
            position += 1
            text = rest[position] if position < len(rest) else ""
        yield name, key, text
        position += 1


def _unknown(name: str, settings: Mapping[str, _Setting]) -> str:
    close = difflib.get_close_matches(name, settings, n=1)
    return f"unknown setting {name}" + (f"; did you mean {close[0]}?" if close else "")


def _with_negative_numbers(argv: list[str]) -> list[str]:
    """Mark numbers such as -3.4e38, which argparse takes for options before Python 3.14."""
    marked = []
    for argument in argv:
        try:
            is_number = argument.startswith("-") and float(argument) < math.inf
        except ValueError:
            is_number = False
        marked.append(f" {argument}" if is_number else argument)
    return marked


def _unmarked(text: Any) -> Any:
    """What `_with_negative_numbers` marked, as it was given."""
    if isinstance(text, list):
        return [_unmarked(part) for part in text]
    return text[1:] if text.startswith(" -") else text


def _build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass with the values given, and defaults for the rest."""
    fields: dict[str, Any] = {}
    for name, hint in hints(kind).items():
        if dataclasses.is_dataclass(hint):
            fields[name] = _build(hint, values, f"{prefix}{name}.")
        elif f"{prefix}{name}" in values:
            fields[name] = values[f"{prefix}{name}"]
    if missing := [name for name in _required(kind) if name not in fields]:
        raise UserError(f"{' and '.join(f'--{prefix}{name}' for name in missing)} is required")
    return kind(**fields)
