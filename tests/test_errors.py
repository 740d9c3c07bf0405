"""What the entries turn exceptions into."""

import pytest

from ssl_geo.errors import UserError, one_line_errors


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [(UserError("no\nband"), 2, "x: error: no band\n"), (KeyboardInterrupt(), 130, "x: stopped\n")],
)
def test_what_a_user_did_is_one_line_and_a_code(raised, code, line, capsys):
    """Ctrl-C in a probe once ended in a traceback."""
    with pytest.raises(SystemExit) as ended, one_line_errors("x"):
        raise raised
    assert (ended.value.code, capsys.readouterr().err) == (code, line)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors("x"):
        raise ZeroDivisionError
