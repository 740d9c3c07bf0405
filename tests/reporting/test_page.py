"""A page holds all that it shows and fetches nothing, whatever is written in it."""

from ssl_geo import figures
from ssl_geo.reporting.page import Page, Picture, Section, Table, as_html

HOSTILE = "<script src='https://example.org/x.js'></script><img src=//example.org/y>"


def test_a_page_shows_every_picture_and_fetches_nothing(seen_page):
    drawn = [figures.curves(f"panel {number} {HOSTILE}", [1, 2], {HOSTILE: [1, 2]}) for number in range(3)]
    section = Section(
        HOSTILE,
        HOSTILE,
        pictures=[Picture(figure, f"caption {number}", wide=number == 0) for number, figure in enumerate(drawn)],
        tables=[Table([HOSTILE, "b"], [[HOSTILE, "1"]], strong=HOSTILE)],
        lines=[HOSTILE],
        folded=[(HOSTILE, HOSTILE)],
    )
    text = as_html(Page(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [HOSTILE], [section], HOSTILE))
    page = seen_page(text)
    assert page.fetched == []
    assert page.captions == ["caption 0", "caption 1", "caption 2"]
    assert page.headings == [HOSTILE]
    assert all(f"panel {number}" in text for number in range(3))


def test_what_a_page_would_fetch_is_found(seen_page):
    for text in (
        HOSTILE,
        "<link href=a.css>",
        "<style>b { background: url(c.png) }</style>",
        "<style>@import 'd'</style>",
    ):
        assert seen_page(text).fetched, text


def test_seven_and_more_facts_stand_in_two_rows():
    for count, columns in ((1, 1), (5, 5), (7, 4), (8, 4)):
        assert f"--columns: {columns}" in as_html(Page("t", "l", [("1", "one")] * count))
