"""What every test may use: the shared real imagery, skipped with its reason where it is absent."""

import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import settings

# Tests are many and small: two processes with a thread each beat one with two. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real imagery beside the checkout (not part of the project)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real imagery not present: {SHARED_DATA}")
    return SHARED_DATA


class SeenPage(HTMLParser):
    """What a browser meets in a page: what it would fetch, headings, and captions of figures that hold a picture."""

    LOADING = ("src", "srcset", "href", "xlink:href", "poster", "data", "action")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = re.findall(r"@import.*|url\((?![\"']?(?:#|data:))[^)]*\)", text)
        self.headings: list[str] = []
        self.captions: list[str] = []
        self._inside: list[str] = []
        self._drawn = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            f"{tag} {v}" for k, v in attrs if k in self.LOADING and not (v or "").startswith(("#", "data:"))
        ]
        self.fetched += [tag] if tag in {"script", "iframe", "object", "embed"} else []
        self._inside.append(tag)
        if tag == "figure":
            self._drawn = False
        elif tag == "h2":
            self.headings.append("")
        elif tag == "figcaption":
            assert self._drawn, "a figure without a picture"
            self.captions.append("")
        self._drawn |= tag in {"path", "image"} and "figure" in self._inside

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._inside.pop()

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "h2":
            self.headings[-1] += data
        if self._inside and self._inside[-1] == "figcaption":
            self.captions[-1] += data


@pytest.fixture
def seen_page() -> Callable[[str], SeenPage]:
    """Read a page as a browser does."""
    return SeenPage
