"""What the entries turn exceptions into."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_geo.errors import UserError, one_line_errors, printable


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [(UserError("no\nband"), 2, "x: error: no band\n"), (KeyboardInterrupt(), 130, "x: stopped\n")],
)
def test_what_a_user_did_is_one_line_and_a_code(raised, code, line, capsys):
    """Ctrl-C in a probe once ended in a traceback."""
    with pytest.raises(SystemExit) as ended, one_line_errors("x"):
        raise raised
    assert (ended.value.code, capsys.readouterr().err) == (code, line)


@given(st.text(st.characters()))
def test_what_is_told_leaves_the_terminal_as_it_is(text):
    """Escape sequences of file and band names once reached it."""
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


def test_names_in_no_encoding_are_told():
    assert printable("caf\udce9\x1b[31m\u202e.tif") == r"caf\xe9\x1b[31m\u202e.tif"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors("x"):
        raise ZeroDivisionError
