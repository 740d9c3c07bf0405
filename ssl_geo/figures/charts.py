"""Numbers as charts: scores with intervals, confusion, curves, where the chips lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ssl_geo.figures.sheets import Colour
from ssl_geo.figures.style import FAINT, INK, PALETTE, new_figure, plain, styled

Number = float | None
_CURVES = {  # panel: the log's names and what each is called
    "loss": {"loss": "loss", "ln_k": "ln K, an even answer"},
    "entropy of the teacher": {"teacher_entropy": "teacher", "ln_k": "ln K, an even answer"},
    "prototypes in use": {"prototypes_used": "for the views of a step"},
    "effective rank": {"effective_rank": "of the embeddings"},
    "spread of the embeddings": {"embedding_std": "1 = over the whole sphere"},
    "kNN accuracy": {"knn_accuracy": "other scenes vote"},
    "learning rate": {"lr": "learning rate"},
    "share of time waiting for data": {"data_wait": "data wait"},
    "chips per second": {"samples_per_s": "speed"},
}


@styled
def class_bars(
    names: Sequence[str],
    values: Sequence[Number],
    low: Sequence[Number],
    high: Sequence[Number],
    *,
    colours: Sequence[Colour] | None = None,
    label: str = "IoU",
) -> Figure:
    """One bar a class with its 95 % interval, the best first; a class without a value has none.

    Args:
        names: (C,).
        values: (C,) in 0 … 1.
        low: (C,) lower ends of the intervals, None where there is none.
        high: (C,) upper ends.
        colours: (C,) red, green, blue in 0 … 255, drawn as a chip beside the bar.
        label: Of the axis.
    """
    order = np.argsort(-np.nan_to_num(_numbers(values), nan=-1.0), kind="stable").tolist()
    y = np.arange(len(order))
    figure, ((place,),) = new_figure(4.6, 0.3 * len(order) + 0.8)
    points = _numbers([values[k] for k in order])
    place.barh(y, np.nan_to_num(points), height=0.62, color=PALETTE[0], alpha=0.85)
    ends = _numbers([low[k] for k in order]), _numbers([high[k] for k in order])
    place.hlines(y, *ends, color=INK, linewidth=1.4)
    for number, (k, value, end) in enumerate(zip(order, points, ends[1], strict=True)):
        text = "not in the test labels" if np.isnan(value) else f"{value:.2f}"
        place.text(np.nanmax([value, end, 0.0]) + 0.015, number, text, va="center", fontsize=8)
        if colours is not None:
            chip = Rectangle((-0.045, number - 0.31), 0.035, 0.62, clip_on=False, ec=FAINT, lw=0.6)
            chip.set_facecolor([part / 255 for part in colours[k]])
            place.add_patch(chip)
    place.set(yticks=y, yticklabels=plain(names[k] for k in order), xlim=(0, 1.1), xlabel=label)
    place.set(ylim=(len(order) - 0.4, -0.6), xticks=np.linspace(0, 1, 6))
    place.tick_params(axis="y", length=0, pad=16 if colours is not None else 3)
    place.spines["left"].set_visible(False)
    place.grid(visible=False, axis="y")
    return figure


@styled
def model_chart(
    names: Sequence[str],
    values: Sequence[Number],
    low: Sequence[Number],
    high: Sequence[Number],
    kinds: Sequence[str],
    *,
    chosen: str | None = None,
    label: str = "mIoU",
) -> Figure:
    """One dot a model with its 95 % interval, in the order given, coloured by kind; the chosen one is bold."""
    known = list(dict.fromkeys(kinds))
    figure, ((place,),) = new_figure(5.4, 0.25 * len(names) + 1.0)
    y, points, (left, right) = np.arange(len(names)), _numbers(values), (_numbers(low), _numbers(high))
    for number, kind in enumerate(known):
        own = np.array([k == kind for k in kinds])
        colour = PALETTE[number % len(PALETTE)]
        place.hlines(y[own], left[own], right[own], color=colour, linewidth=1.6)
        place.plot(points[own], y[own], "o", color=colour, markersize=5.5, label=kind)
    place.set(yticks=y, yticklabels=plain(names), ylim=(len(names) - 0.4, -0.6), xlabel=label)
    for name, text in zip(names, place.get_yticklabels(), strict=True):
        text.set_fontweight("bold" if name == chosen else "normal")
    place.set_xlim(left=0)
    place.tick_params(axis="y", length=0)
    place.spines["left"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(known))
    return figure


@styled
def confusion_chart(counts: npt.NDArray[np.integer], names: Sequence[str]) -> Figure:
    """Confusion matrix: rows are labels, columns predictions; shades and percentages by row.

    Args:
        counts: (C, C) pixels.
        names: (C,).
    """
    total = counts.sum(axis=1, keepdims=True)
    share = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
    side = max(0.47 * len(names), 1.4) + 1.4
    figure, ((place,),) = new_figure(side, side)
    place.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        if np.isnan(share[row, column]):
            continue
        dark = share[row, column] > 0.55
        place.text(
            column,
            row,
            f"{share[row, column]:.0%}",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if dark else "#20262c",
        )
    place.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=plain(names))
    place.set(xlabel="predicted", ylabel="labelled")
    place.set_xticklabels(plain(names), rotation=40, ha="right", rotation_mode="anchor")
    place.grid(visible=False)
    place.spines[:].set_visible(False)
    place.tick_params(length=0)
    return figure


@styled
def curves(title: str, x: npt.ArrayLike, lines: Mapping[str, npt.ArrayLike], *, xlabel: str = "step") -> Figure:
    """Curves in one panel.

    Args:
        title: Above it.
        x: (N,), such as steps.
        lines: (N,) values by name; NaN where there is none; a line that is the same everywhere is a dashed reference.
        xlabel: Below it.
    """
    figure, ((place,),) = new_figure(3.7, 2.2)
    colour = iter(PALETTE)
    for name, values in zip(plain(lines), lines.values(), strict=True):
        array, at = np.asarray(values, np.float64), np.asarray(x, np.float64)
        there = ~np.isnan(array)
        constant = len(lines) > 1 and np.ptp(array[there]) == 0 and there.sum() > 1
        style = {"color": INK, "linestyle": "--", "linewidth": 1} if constant else {"color": next(colour)}
        few = there.sum() < 4 and not constant  # so that they are seen to be points
        place.plot(at[there], array[there], label=name, marker="o" if few else None, markersize=4, **style)
        place.update_datalim(np.column_stack([at, at]), updatey=False)  # the same axis in all panels
    place.set(title=plain([title])[0], xlabel=xlabel)
    place.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    place.yaxis.set_major_locator(MaxNLocator(5))
    values = np.concatenate([np.asarray(line, np.float64) for line in lines.values()])
    if np.nanmin(values) >= 0:
        place.set_ylim(0, 1.08 * np.nanmax(values) or 1)  # from 0: a small change is not to look large
    if title.startswith("share"):
        place.set_ylim(0, 1)
        place.yaxis.set_major_formatter(PercentFormatter(1))
    if len(lines) > 1:
        place.legend(loc="best")
    return figure


def training_curves(log: Sequence[Mapping[str, Number]]) -> dict[str, Figure]:
    """Loss, entropy, prototypes in use, rank, spread, kNN, learning rate, data wait and speed of a run.

    Args:
        log: Lines of RUN/log.jsonl in order; what a line does not hold is left out.

    Returns:
        One figure a panel, by its name, for what the log holds.
    """
    drawn = {}
    for title, series in _CURVES.items():
        first = next(iter(series))
        if any(line.get(first) is not None for line in log):
            # A value goes with its step; measures that come seldom are joined over the lines between.
            lines = {text: _numbers([line.get(name) for line in log]) for name, text in series.items()}
            held = {text: values for text, values in lines.items() if not np.isnan(values).all()}
            drawn[title] = curves(title, _numbers([line["step"] for line in log]), held)
    return drawn


@styled
def footprints_map(
    bounds: npt.NDArray[np.floating],
    groups: Sequence[str] | None = None,
    *,
    unit: str = "degrees",
    most: int = 4000,
) -> Figure:
    """Where chips lie: a rectangle each.

    Args:
        bounds: (N, 4) left, bottom, right, top; in degrees (longitude, latitude) or pixels.
        groups: (N,) what colours them, such as the split.
        unit: Of the axes; degrees are drawn true to scale at the mean latitude.
        most: Rectangles drawn at most, taken evenly.
    """
    figure, ((place,),) = new_figure(4.6, 3.6)
    picked = np.unique(np.linspace(0, len(bounds) - 1, min(len(bounds), most)).round().astype(int))
    names = np.array(["chips"] * len(bounds) if groups is None else plain(groups))
    extent = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
    span = np.maximum(extent[1] - extent[0], 1e-9)
    smallest = span.max() / 90  # else chips of a wide archive could not be seen
    for number, name in enumerate(dict.fromkeys(names.tolist())):
        own = bounds[picked[names[picked] == name]]
        middle, size = (own[:, :2] + own[:, 2:]) / 2, np.maximum(own[:, 2:] - own[:, :2], smallest)
        colour = PALETTE[number % len(PALETTE)]
        boxes = [Rectangle(tuple(at - s / 2), *s) for at, s in zip(middle, size, strict=True)]
        place.add_collection(PatchCollection(boxes, facecolor=colour, edgecolor=colour, alpha=0.55, linewidth=0.4))
        place.plot([], [], "s", color=colour, alpha=0.7, label=name)
    place.update_datalim([extent[0] - smallest / 2, extent[1] + smallest / 2])
    place.margins(0.05)
    place.autoscale_view()
    if unit == "degrees":
        place.set(xlabel="longitude", ylabel="latitude")
        place.set_aspect(1 / max(np.cos(np.radians((extent[0][1] + extent[1][1]) / 2)), 0.05), adjustable="datalim")
    else:
        place.set(xlabel=f"column, {unit}", ylabel=f"row, {unit}")
        place.set_aspect("equal", adjustable="datalim")
        place.invert_yaxis()
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    place.ticklabel_format(useOffset=False)
    if groups is not None:
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _numbers(values: Sequence[Number]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)
