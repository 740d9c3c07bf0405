"""How every figure looks: quiet axes, readable type, colours that colour-blind readers tell apart."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_geo.errors import printable

Drawing = ParamSpec("Drawing")

# Okabe & Ito 2008, "Color Universal Design", without its yellow and black, which need a dark and a light ground.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#1b2127", "#c9d0d7"  # text and lines; grids and frames
NODATA = "#9aa3ab"
RIGHT, WRONG = "#d9dee3", "#d55e00"  # of an error map
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
LONGEST = 60  # letters of a name

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a name with $ is no formula
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "image.interpolation": "nearest",
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
}


def styled(draw: Callable[Drawing, Figure]) -> Callable[Drawing, Figure]:
    """Draw in the style of the house, whatever style the caller has set."""

    @wraps(draw)
    def drawn(*args: Drawing.args, **kwargs: Drawing.kwargs) -> Figure:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return drawn


def plain(names: Iterable[str]) -> list[str]:
    """Names as a figure can show them: control characters escaped, but for line ends; cut where they are too long."""
    shown = ("\n".join(map(printable, name.split("\n"))) for name in names)
    return [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in shown]


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """A figure of a grid of axes, in inches; no global state of pyplot is touched."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def without_axes(axes: Axes) -> None:
    """Leave nothing but what is drawn."""
    axes.set_axis_off()


def as_svg(figure: Figure) -> str:
    """A figure as an SVG element for a page: no background, text as text, ink in the colour of the page's own text.

    Args:
        figure: Of this package, so that its ink is known.

    Returns:
        ``<svg ...>`` without the XML head. `INK` becomes ``currentColor`` and `FAINT` ``var(--line)``, which the page
        sets for light and dark.
    """
    written = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "ssl_geo", "text.parse_math": False}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # text stays text: the page's fonts have it
        kept = {"Date": None, "Creator": None}
        figure.savefig(written, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.02, metadata=kept)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids of groups repeat from figure to figure and nothing refers to them; those of clip paths name their content.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", svg)
    return re.sub(r'(<svg [^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'\1style="max-width: \2pt"', svg, count=1)
