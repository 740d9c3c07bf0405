"""Plain values (of YAML, JSON, checkpoints, the command line) held against type annotations.

Nothing that a value says is imported or called: what is built are the dataclasses that the annotation names, and
nothing else. A file of settings or a description beside weights is data, whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from ssl_geo.errors import UserError, nearest

NonFinite = Annotated[float, "NaN and infinities are values too"]
"""A float that may be NaN or infinite; all others must be finite."""

# Keys by which configuration libraries name code to run (jsonargparse, Hydra, jsonpickle, PyYAML).
CODE = frozenset({"class_path", "init_args", "dict_kwargs", "_target_", "_partial_", "_args_", "_convert_"})
_CODE_PREFIXES = ("py/", "!!", "__")
_MAX_INT = 2**63 - 1
_MAX_DEPTH = 32  # of values of no declared type
_SHOWN = 80  # characters of a value that a message shows

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    Any: "plain values",
}
_PLURALS = {int: "whole numbers", float: "finite numbers", str: "texts"}


def conform(value: Any, kind: Any, where: str) -> Any:
    """Check a plain value against a type annotation, and build the dataclasses that it names.

    Args:
        value: None, bool, int, float, str, or lists and mappings of such.
        kind: The annotation: one of these types, `Any`, `object` (not looked at), `Literal`, a union, ``list[X]``,
            ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[X, Y]``, `NonFinite`, a class that the value is an instance of,
            a TypedDict (may hold further plain values) or a dataclass (may not).
        where: What the value is, for the message: ``--optim.lr``, or ``head.json: mean``.

    Returns:
        The value; ints as floats and lists as tuples where those are asked for, mappings as their dataclass.

    Raises:
        UserError: It does not fit; the message names the value found and what is allowed.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value, where)
    if kind is object:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, where)
    if origin is Literal:
        if any(value == allowed and type(value) is type(allowed) for allowed in arguments):
            return value
    elif kind is float or origin is Annotated:
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _float(value)
            if math.isfinite(number) or origin is Annotated:
                return number
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT:
            return value
    elif kind is str:
        if isinstance(value, str) and "\0" not in value:  # which no path can hold
            return value
    elif origin in (list, tuple):
        if isinstance(value, list | tuple) and (found := _sequence(value, origin, arguments, where)) is not None:
            return found
    elif origin is dict:
        if isinstance(value, Mapping):
            keys = {
                key: _key(key, where) if arguments[0] is str else conform(key, arguments[0], where) for key in value
            }
            return {keys[key]: conform(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    elif dataclasses.is_dataclass(kind) or is_typeddict(kind):
        if isinstance(value, Mapping):
            return _record(value, kind, where)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise UserError(f"{where} is {shown(value)}; it must be {allowed(kind)}")


def hints(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass or TypedDict by field."""
    return get_type_hints(kind, include_extras=True)


def allowed(kind: Any) -> str:
    """What an annotation allows, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(argument) for argument in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is Annotated:
        return "a number"
    if origin in (list, tuple):
        many = _PLURALS.get(arguments[0], f"items, each {allowed(arguments[0])}")
        is_fixed = origin is tuple and arguments[-1] is not ...
        return f"{len(arguments)} {many}" if is_fixed else f"a list of {many}"
    return _NAMES.get(origin or kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """A value for a message, cut to one short line."""
    try:
        text = repr(value[:_SHOWN] if isinstance(value, str | list | tuple) else value)
    except ValueError:  # Python writes no more than 4300 digits; YAML and pickles hold longer numbers as base 16
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    errors = []
    for kind in kinds:
        try:
            return conform(value, kind, where)
        except UserError as error:
            errors.append(error)
    deeper = [error for error in errors if not str(error).startswith(f"{where} is ")]  # about a part of the value
    raise deeper[0] if deeper else UserError(f"{where} is {shown(value)}; it must be {allowed(Union[kinds])}")  # noqa: UP007 - of a tuple


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _sequence(value: Any, origin: type, arguments: tuple[Any, ...], where: str) -> Any:
    if origin is list or arguments[-1] is ...:
        return origin(conform(item, arguments[0], f"{where}[{number}]") for number, item in enumerate(value))
    if len(value) != len(arguments):
        return None
    parts = enumerate(zip(value, arguments, strict=True))
    return tuple(conform(item, kind, f"{where}[{number}]") for number, (item, kind) in parts)


def _record(value: Mapping[Any, Any], kind: Any, where: str) -> Any:
    known = hints(kind)
    if is_typeddict(kind):
        required = kind.__required_keys__
    else:
        required = {
            field.name
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
    if missing := sorted(required - value.keys()):
        raise UserError(f"{where} lacks {', '.join(missing)}")
    content = {}
    for key, item in value.items():
        if key not in known and not is_typeddict(kind):
            raise UserError(f"{where} has no {_key(key, where)}; {nearest(key, known)}")
        name = _key(key, where)
        content[name] = conform(item, known.get(key, Any), f"{where}.{name}")
    return content if is_typeddict(kind) else kind(**content)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Values of no declared type: none that would name code, be it as a key or as an object."""
    if depth > _MAX_DEPTH:
        raise UserError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{number}]", depth + 1) for number, item in enumerate(value)]
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise UserError(f"{where} is {shown(value)}; whole numbers go up to 2**63 - 1")
    if value is not None and type(value) not in (bool, int, float, str):
        raise UserError(f"{where} is a {type(value).__name__}; it must be {_NAMES[Any]}")
    return value


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise UserError(f"{where} has the key {shown(key)}; keys must be text")
    if key in CODE or key.startswith(_CODE_PREFIXES):
        raise UserError(f"{where} holds {shown(key)}, which names code to run: settings and files are data alone")
    return key
