"""What the entries turn exceptions into."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_geo.config import pretrain_config
from ssl_geo.errors import UserError, one_line_errors, printable
from ssl_geo.imagery.products import read_metadata
from ssl_geo.training.progress import Progress


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


def test_a_name_too_long_for_any_file_is_one_line(capsys):
    """``--resume`` with one once ended in a traceback."""
    with pytest.raises(SystemExit) as end:
        pretrain_config(["--resume", "a" * 5000])
    assert end.value.code == 2
    assert "no file can have this name" in capsys.readouterr().err


def test_a_name_that_grows_too_long_on_the_way_is_one_line(tmp_path, capsys):
    """A file is written under a longer name than its own."""
    with pytest.raises(SystemExit) as end, one_line_errors("x"):
        (tmp_path / ("a" * 300)).touch()
    assert end.value.code == 2
    assert "too long for the name of a file" in capsys.readouterr().err


def test_lines_beside_the_progress_bar_are_printable(tmp_path, capsys):
    (tmp_path / "tensorboard").mkdir()
    with Progress(tmp_path, start=0, steps=1, batch_size=1, main=True) as progress:
        progress.say("a\x1b[31mb")
    assert "a\\x1b[31mb" in capsys.readouterr().out


def test_product_metadata_in_an_unknown_encoding_are_one_line(tmp_path):
    (tmp_path / "MTD_MSIL1C.xml").write_text('<?xml version="1.0" encoding="foo"?><a/>')
    with pytest.raises(UserError, match="unknown encoding"):
        read_metadata(tmp_path / "MTD_MSIL1C.xml")
