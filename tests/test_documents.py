"""YAML and JSON from anywhere: plain values, or one line; bombs are refused before they grow."""

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geo.documents import MAX_JSON, parse_yaml, read_json, read_yaml, to_yaml
from ssl_geo.errors import UserError

ALIASES = "a: &a [x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIASES, "anchor or alias"),
        ("[" * 100_000, "nested"),
        ("- " * 100_000, "nested"),
        ("? " * 100_000, "nested"),
        ("[" + "1," * 200_000 + "]", "more than 100,000"),
        ("x: !!python/object/apply:os.mkdir [exploded]", "tag"),
        ("x: !!binary aGk=", "tag"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "stands twice"),
        ("x: " + "9" * 10_000, "no readable YAML"),
        ("a: 1\n---\nb: 2", "no readable YAML"),
        ("x: \0", "no readable YAML"),
        ("{a", "no readable YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_is_a_bomb_or_more_than_plain_values_is_refused(text, said, tmp_path):
    """An alias bomb once took more than a minute and 1.6 GB; deep nesting ended in a segmentation fault."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("[" + "0," * 11_000_000 + "0]", "more than 10,000,000 values"),
        ("9" * 10_000, "no readable JSON"),
        ("", "no readable JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_is_a_bomb_is_refused(text, said, tmp_path):
    """Deep nesting once ended in a RecursionError."""
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=f"{said}.*; run it again"):
        read_json(tmp_path / "r.json", fix="run it again")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is no regular file|does not exist"):
            read_yaml(path)
        with pytest.raises(UserError, match=r"is no regular file|does not exist"):
            read_json(path, fix="again")


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(MAX_JSON + 1)
    with pytest.raises(UserError, match="larger than 256 MB"):
        read_json(tmp_path / "huge.json", fix="again")


def test_values_are_those_of_yaml_1_2():
    """PyYAML alone reads 1e-4 as text, 12:30 as 750 and 2024-01-01 as a date."""
    found = parse_yaml("[1e-4, 12:30, 2024-01-01, B08, .inf, 017, 0x1f, -3, true, null, ~, '1']", "x")
    assert found == [1e-4, "12:30", "2024-01-01", "B08", float("inf"), "017", 31, -3, True, None, None, "1"]


texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["1e-4", "017", "12:30", "no", "~", "- a"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | texts,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(texts, part, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(plain)
def test_what_is_written_is_read_back(value):
    assert parse_yaml(to_yaml(value), "x") == value


@settings(max_examples=40)
@given(st.text(max_size=40) | st.text("[]{}:,-?!&*|>'\"#% \n\tab1.", max_size=60))
def test_any_text_is_plain_values_or_one_line(text):
    try:
        found = parse_yaml(text, "x")
    except UserError:
        return
    yaml.safe_dump(found)  # which takes plain values alone
