"""What the user gave wrong: one line that names the value found, what was allowed and what mends it."""

from __future__ import annotations

import difflib
import errno
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ssl_geo.threads import leave_hanging


class UserError(ValueError):
    """A mistake in the user's input, settings or files, told in one line without a traceback.

    Everything below the entries raises it where a user can mend the cause; a programming error keeps its own
    exception and traceback.
    """


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Say which known names are closest to `name`, as a clause to end an error message with.

    Args:
        name: The name that was not found.
        known: The names there are.
        count: How many to list at most.

    Returns:
        For example ``did you mean optim.lr?``; the sorted known names where none is close.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey.

    Names of files, bands and classes come from anywhere: escape sequences, line breaks, control and direction
    characters, and bytes of no encoding are written as backslash escapes.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    """A byte of no encoding (PEP 383) as that byte, anything else as Python writes it."""
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else ascii(c)[1:-1]


def tell(line: str) -> None:
    """Print a line for the user, `printable`."""
    print(printable(line))


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2, Ctrl-C into one and 130; other exceptions pass.

    A thread that hangs in the file system does not hold up the exit.

    Args:
        program: The command's name, printed before the message.
    """
    try:
        try:
            yield
        except UserError as error:
            print(f"{program}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
            raise SystemExit(2) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            name = printable(str(error.filename)[:80])
            print(f"{program}: error: {name}… is too long for the name of a file", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"{program}: stopped", file=sys.stderr)
            raise SystemExit(130) from None  # 128 + SIGINT, as shells have it
    except SystemExit as end:
        leave_hanging(end.code)
        raise


def interrupt_on_termination() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that what is half written is cleared away.

    Under nohup, SIGHUP goes on being ignored.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
