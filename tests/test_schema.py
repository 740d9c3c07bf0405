"""Plain values against annotations: what fits is given back, what does not is one line, what names code is refused."""

import contextlib
import dataclasses
import math
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geo.errors import UserError
from ssl_geo.schema import CODE, NonFinite, conform


@dataclasses.dataclass
class Inner:
    mean: list[float] | None = None


@dataclasses.dataclass
class Outer:
    bands: tuple[str, ...]
    inner: Inner = dataclasses.field(default_factory=Inner)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class Loose(TypedDict):
    count: int


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [
        (3, float, 3.0),
        ([1, 2.5], tuple[float, float], (1.0, 2.5)),
        (["a"], tuple[str, ...], ("a",)),
        (None, int | None, None),
        ("cpu", Literal["auto", "cpu"], "cpu"),
        (math.inf, NonFinite | None, math.inf),
        ({"bands": ["B02"], "inner": {"mean": [1]}}, Outer, Outer(("B02",), Inner([1.0]))),
        ({"count": 1, "more": [None, {"a": True}]}, Loose, {"count": 1, "more": [None, {"a": True}]}),
    ],
)
def test_what_fits_is_given_back_as_the_annotation_says(value, kind, found):
    assert conform(value, kind, "x") == found
    assert type(conform(value, kind, "x")) is type(found)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("3", int, "x is '3'; it must be a whole number"),
        (True, int, "a whole number"),
        ("a\0b", str, "text"),
        (1, bool, "true or false"),
        (2**70, int, "a whole number"),
        (10**400, float, "a finite number"),
        (math.nan, float, "a finite number"),
        ([1], tuple[float, float], "2 finite numbers"),
        ("tpu", Literal["auto", "cpu"], "one of auto, cpu"),
        ({"bands": ["B02"], "innner": {}}, Outer, "has no innner; did you mean inner?"),
        ({}, Outer, "lacks bands"),
        ({"bands": ["B02"], "inner": {"mean": [1, "2"]}}, Outer, r"x\.inner\.mean\[1\] is '2'"),
        ({1: 2}, dict[str, int], "keys must be text"),
        ({"count": 1, "more": object()}, Loose, "plain values"),
    ],
)
def test_what_does_not_fit_names_the_place_the_value_and_what_is_allowed(value, kind, said):
    with pytest.raises(UserError, match=said):
        conform(value, kind, "x")


def test_a_number_that_python_writes_no_digits_of_is_refused():
    """YAML reads 0xfff… of any length; its repr in the message once ended in a traceback."""
    for value, kind in ((16**6000, int), (16**6000, Any), ({"count": 1, 16**6000: 1}, Loose)):
        with pytest.raises(UserError, match="a number of thousands of digits"):
            conform(value, kind, "x")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(plain, st.sampled_from([*sorted(CODE), "py/object", "__class__"]), st.data())
def test_a_key_that_names_code_is_refused_wherever_it_stands(value, key, data):
    hidden = {key: value}
    for _ in range(data.draw(st.integers(0, 4))):
        hidden = data.draw(st.sampled_from([{"a": hidden}, [hidden], {"b": [1, hidden]}]))
    for kind in (Any, dict[str, Any] | None, list[Any]):
        with pytest.raises(UserError):
            conform(hidden, kind, "x")
    with pytest.raises(UserError, match="names code"):
        conform({"bands": ["B02"], "extra": {"a": hidden}}, Outer, "x")


@settings(max_examples=40)
@given(plain)
def test_any_plain_value_fits_or_is_refused(value):
    for kind in (Outer, Loose, int, float | None, list[str], dict[str, Any], tuple[float, float] | str):
        with contextlib.suppress(UserError):
            conform(value, kind, "x")
