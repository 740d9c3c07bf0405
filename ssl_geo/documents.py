"""YAML and JSON files as plain values, within bounds: somebody else's file neither runs code nor eats memory.

Both readers refuse in one line what is no regular file (a FIFO would be waited for), what is larger than a bound, and
what is nested too deep. YAML takes neither tags (which name types to build) nor anchors and aliases (which multiply),
and a key only once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ssl_geo.errors import UserError

MAX_YAML = 4 << 20
"""Bytes of a YAML file: settings with tens of thousands of paths."""
MAX_JSON = 256 << 20
"""Bytes of a JSON file: a head of 255 classes tested on a thousand blocks."""
MAX_VALUES = 10_000_000
"""Values of a JSON file, each of which takes up to a hundred bytes of memory."""
_MAX_DEPTH = 32  # of YAML
_MAX_EVENTS = 100_000  # of a YAML file: keys, values, beginnings and ends; a second or two
# The core schema of YAML 1.2. PyYAML follows 1.1, which reads 1e-4 as text, 12:30 as 750 and 2024-01-01 as a date.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE)
_OF_1_1 = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml is in PyYAML's wheels
    """Plain values; see the module."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that stands twice, of which the first would be lost."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} stands twice", node.start_mark)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OF_1_1]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Returns:
        None, bool, int, float, str, or lists and dictionaries of such.

    Raises:
        UserError: It is not there, no regular file, too large, or no plain YAML.
    """
    return parse_yaml(_read(path, MAX_YAML), str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """Read YAML; as `read_yaml`, with `origin` for the message."""
    try:
        depth = 0
        for number, event in enumerate(yaml.parse(text, _Loader)):  # flat, unlike what builds the values
            if number > _MAX_EVENTS:
                raise UserError(f"{origin} holds more than {_MAX_EVENTS:,} keys and values")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise UserError(f"{origin} holds an anchor or alias (& or *); write the value out where it is wanted")
            if (tag := getattr(event, "tag", None)) is not None:
                raise UserError(f"{origin} holds the tag {tag}; settings are plain values, without tags")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise UserError(f"{origin} is nested more than {_MAX_DEPTH} levels deep")
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{origin} is no readable YAML ({reason})") from error


def to_yaml(content: Any) -> str:
    """Write plain values as the YAML that `read_yaml` reads back."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False)
    return text


def read_json(path: Path, *, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        fix: What to do where it cannot be read; ends the message.

    Returns:
        None, bool, int, float, str, or lists and dictionaries of such.

    Raises:
        UserError: It is not there, no regular file, too large, or no JSON.
    """
    try:
        return parse_json(_read(path, MAX_JSON))
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        message = reason if isinstance(error, UserError) else f"{path} is no readable JSON ({reason})"
        raise UserError(f"{message}; {fix}") from error


def parse_json(text: str) -> Any:
    """Read JSON, within bounds.

    Raises:
        ValueError: It is no JSON, nested too deep, or holds too many values.
    """
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _read(path: Path, most: int) -> str:
    try:
        if not path.is_file():
            raise UserError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise UserError(f"{path} is larger than {most >> 20} MB, which is no file of ours")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error})") from error
