"""One HTML file that loads nothing: sections of text, figures and tables, for any screen, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from ssl_geo.figures import as_svg
from ssl_geo.files import written_whole
from ssl_geo.html import fill


@dataclass(frozen=True)
class Picture:
    """A figure with what to see in it; a `wide` one keeps its size and scrolls in its box on a small screen."""

    figure: Figure
    caption: str = ""
    wide: bool = False

    @property
    def svg(self) -> Markup:
        """Its markup, with text escaped by matplotlib."""
        return Markup(as_svg(self.figure))

    @property
    def width(self) -> int:
        """Pixels that it was drawn for."""
        return round(self.figure.get_figwidth() * 96)


@dataclass(frozen=True)
class Table:
    """Cells as text; columns of numbers are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: str | None = None  # first cell of the row that stands out


@dataclass(frozen=True)
class Section:
    """A heading with what belongs to it."""

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    lines: Sequence[str] = ()
    folded: Sequence[tuple[str, str]] = ()  # a title and preformatted text, to be unfolded


@dataclass(frozen=True)
class Page:
    """A report: what it is, the figures that count, and the sections."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]] = ()  # value and what it is
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)
    foot: str = ""


def as_html(page: Page) -> str:
    """The page; everything but figures is escaped."""
    return fill("reporting/page.html", page=page)


def write_page(path: Path, page: Page) -> Path:
    """Write a page, whole or not at all, and return its path."""
    text = as_html(page)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be no UTF-8
    return path
