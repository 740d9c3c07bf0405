"""Pictures side by side: bands, composites, views, features, classes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ssl_geo.figures.composites import COMPOSITES, Floats, Image, Valid, composite, default_composite, limits
from ssl_geo.figures.feature_maps import cosine_similarity, kmeans_segments, nearest_chips, pca_basis, valid_share
from ssl_geo.figures.style import (
    DIVERGING,
    FAINT,
    INK,
    NODATA,
    PALETTE,
    RIGHT,
    SEQUENTIAL,
    WRONG,
    new_figure,
    plain,
    styled,
    without_axes,
)

Colour = tuple[int, int, int]
Classes = npt.NDArray[np.uint8]
IGNORED = 255
LISTED = 32  # classes of a legend, the most frequent
_SIDE = 1.35  # inches of a picture


@styled
def image_sheet(
    rows: Sequence[Sequence[npt.NDArray[np.floating] | None]],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    titles: Sequence[Sequence[str]] = (),
    marks: Sequence[Sequence[tuple[float, float] | None]] = (),
    legend: Sequence[tuple[str, str]] = (),
    side: float = _SIDE,
) -> Figure:
    """Pictures in a grid.

    Args:
        rows: (H, W, 3 or 4) colours in 0 … 1; transparent pixels are grey; None leaves a place empty.
        column_titles: Above the first row.
        row_titles: Left of the first column.
        titles: One above each picture.
        marks: A place to mark in each picture, as shares of its height and width.
        legend: Pairs of a name and a colour, below.
        side: Width of a picture in inches.
    """
    column_titles, row_titles, titles = plain(column_titles), plain(row_titles), [plain(row) for row in titles]
    columns = max(len(row) for row in rows)
    shape = next(image.shape for row in rows for image in row if image is not None)
    tall = side * min(shape[0] / shape[1], 2.0)
    lines = -(-len(legend) // max(1, round(columns * side / 1.5)))
    height = len(rows) * (tall + (0.2 if titles else 0.06)) + (0.25 if column_titles else 0) + 0.2 * lines + 0.1
    figure, axes = new_figure(columns * side + (0.3 if row_titles else 0.05), height, len(rows), columns)
    figure.set_layout_engine("compressed")  # pictures keep their shape: no more room between them than asked for
    for y, row in enumerate(axes):
        for x, place in enumerate(row):
            place.set(xticks=[], yticks=[])
            place.grid(visible=False)
            place.spines[:].set_visible(False)
            if y == 0 and x < len(column_titles):
                place.set_title(column_titles[x], fontsize=8.5, fontweight="normal", loc="center")
            if x == 0 and y < len(row_titles):
                place.set_ylabel(row_titles[y], fontsize=8.5)
            image = rows[y][x] if x < len(rows[y]) else None
            if image is None:
                without_axes(place)
                continue
            place.imshow(_on_grey(image))
            if titles and y < len(titles) and x < len(titles[y]):
                place.set_title(titles[y][x], fontsize=8, fontweight="normal", loc="center", pad=3)
            if marks and (mark := marks[y][x]) is not None:
                at = mark[1] * image.shape[1] - 0.5, mark[0] * image.shape[0] - 0.5
                place.plot(*at, "o", markersize=7, markerfacecolor="none", markeredgecolor="black", markeredgewidth=3)
                place.plot(*at, "o", markersize=7, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.4)
    if legend:
        names = plain(name for name, _ in legend)
        patches = [
            Patch(facecolor=colour, edgecolor=FAINT, label=name)
            for name, (_, colour) in zip(names, legend, strict=True)
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=max(1, round(columns * side / 1.5)))
    return figure


def band_sheet(image: Image, bands: Sequence[str], *, valid: Valid | None = None, columns: int = 5) -> Figure:
    """Every band alone, in grey, each stretched by itself; nodata is a flat grey."""
    shown = [composite(image, bands, (band, band, band), valid=valid) for band in bands]
    parts = [slice(start, start + columns) for start in range(0, len(bands), columns)]
    return image_sheet([shown[part] for part in parts], titles=[list(bands[part]) for part in parts])


def composite_sheet(image: Image, bands: Sequence[str], *, valid: Valid | None = None, side: float = 2.2) -> Figure:
    """True colour, colour infrared and SWIR side by side, as far as the bands allow."""
    named = {name: which for name, which in COMPOSITES.items() if set(which) <= set(bands)}
    if not named:
        return image_sheet([[composite(image, bands, valid=valid)]], column_titles=["first bands"], side=side)
    shown = [composite(image, bands, which, valid=valid) for which in named.values()]
    return image_sheet([shown], column_titles=[f"{n} ({' '.join(w)})" for n, w in named.items()], side=side)


def view_sheet(
    views: Sequence[Image],
    bands: Sequence[str],
    mean: Floats | npt.NDArray[np.float32],
    std: Floats | npt.NDArray[np.float32],
    *,
    globals_: int = 2,
    chip: tuple[Image, Valid] | None = None,
    side: float = 1.1,
) -> Figure:
    """What the network is fed: global and local views of a chip, in true and false colour.

    A view that shows one band in all channels is grey in each composite.

    Args:
        views: Standardized, (C, h, w) each, the global ones first; a pixel that is 0 in all bands is nodata.
        bands: Names of the channels.
        mean: (C,) reflectance that views were standardized with.
        std: (C,) likewise.
        globals_: How many of the views are global.
        chip: Reflectance (C, H, W) and validity that they were made of; shown first, and it sets the stretch.
        side: Width of a picture in inches.
    """
    repeated = [bool(np.ptp(v * _column(std) + _column(mean), axis=0).max() < 1e-4) for v in views]
    physical = [view * _column(std) + _column(mean) for view in views]
    usable = [(view != 0).any(axis=0) for view in views]
    names = [f"global {n + 1}" for n in range(globals_)] + [f"local {n + 1}" for n in range(len(views) - globals_)]
    names = [f"{name}\none band" if one else name for name, one in zip(names, repeated, strict=True)]
    if chip is not None:
        physical, usable, names = [chip[0], *physical], [chip[1], *usable], ["chip", *names]
    limit = limits(physical[:1], usable[:1])
    wanted = [name for name in ("true colour", "colour infrared") if set(COMPOSITES[name]) <= set(bands)]
    shown = []
    for which in [COMPOSITES[name] for name in wanted] or [default_composite(bands)]:
        row = []
        for number, (image, ok) in enumerate(zip(physical, usable, strict=True)):
            one = repeated[number - (chip is not None)] if number >= (chip is not None) else False
            # One band in all channels would be tinted by limits of many bands: stretch it by itself.
            row.append(composite(image, bands, which, valid=ok, limit=None if one else limit))
        shown.append(row)
    return image_sheet(shown, column_titles=names, row_titles=wanted or ["first bands"], side=side)


@styled
def statistics_chart(before: Image, after: Image, bands: Sequence[str], *, valid: Valid | None = None) -> Figure:
    """How each band is spread before and after standardizing: 5 to 95 % thin, quartiles thick, median a dot.

    Args:
        before: (C, H, W) reflectance.
        after: (C, H, W) standardized.
        bands: Names of the channels.
        valid: (H, W), True = usable; None: everywhere.
    """
    usable = np.ones(before.shape[1:], np.bool_) if valid is None else valid
    figure, axes = new_figure(6.2, 0.24 * len(bands) + 1.0, 1, 2)
    for place, image, title in zip(axes[0], (before, after), ("reflectance", "standardized"), strict=True):
        low, first, middle, third, high = np.percentile(image[:, usable], [5, 25, 50, 75, 95], axis=1)
        y = np.arange(len(bands))
        place.hlines(y, low, high, color=PALETTE[0], linewidth=1.2)
        place.hlines(y, first, third, color=PALETTE[0], linewidth=4.5)
        place.plot(middle, y, "o", color="white", markeredgecolor=INK, markersize=4.5, markeredgewidth=1)
        place.set(title=title, yticks=y, yticklabels=plain(bands), ylim=(len(bands) - 0.4, -0.6))
        place.grid(visible=False, axis="y")
    axes[0][1].axvline(0, color=INK, linewidth=0.8)
    axes[0][1].set_yticklabels([])
    return figure


def pca_sheet(
    images: Sequence[npt.NDArray[np.floating]], layers: dict[str, npt.NDArray[np.floating]], side: float = _SIDE
) -> Figure:
    """Each image beside its features, whose three main components are red, green and blue.

    One basis a layer holds for all chips: equal colours mean equal features within a column.

    Args:
        images: N pictures (H, W, 3 or 4), of `composite`.
        layers: Features (N, D, h, w) by the layer's name.
        side: Width of a picture in inches.
    """
    bases = {name: pca_basis(features) for name, features in layers.items()}
    rows = [
        [image, *(_over(image, bases[name].colours(features[number])) for name, features in layers.items())]
        for number, image in enumerate(images)
    ]
    return image_sheet(rows, column_titles=["image", *layers], side=side)


def similarity_sheet(
    images: Sequence[npt.NDArray[np.floating]],
    features: npt.NDArray[np.floating],
    places: Sequence[tuple[int, int]],
    side: float = _SIDE,
) -> Figure:
    """Each image with a chosen place, and how alike every place of every image is to it.

    Args:
        images: N pictures (H, W, 3 or 4).
        features: (N, D, h, w).
        places: N rows and columns in the features' grid, one to be asked for in each image.
        side: Width of a picture in inches.

    Returns:
        N rows: the image and its place, then N maps from -1 (blue) over 0 (white) to 1 (red).
    """
    height, width = features.shape[2:]
    paint = mpl.colormaps[DIVERGING]
    rows = [
        [
            images[asked],
            *(
                _over(image, paint((cosine_similarity(one, places[asked], features[asked]) + 1) / 2))
                for image, one in zip(images, features, strict=True)
            ),
        ]
        for asked in range(len(images))
    ]
    shares = [((row + 0.5) / height, (column + 0.5) / width) for row, column in places]
    marks = [
        [shares[asked], *(shares[asked] if number == asked else None for number in range(len(images)))]
        for asked in range(len(images))
    ]
    titles = ["asked for", *(f"in image {number + 1}" for number in range(len(images)))]
    legend = [(text, mpl.colors.to_hex(paint(value))) for text, value in (("alike", 0.93), ("unlike", 0.07))]
    return image_sheet(rows, column_titles=titles, marks=marks, legend=legend, side=side)


def attention_sheet(
    images: Sequence[npt.NDArray[np.floating]], attention: npt.NDArray[np.floating], side: float = _SIDE
) -> Figure:
    """Where the class token looks: each image, the mean over heads, and each head.

    Args:
        images: N pictures (H, W, 3 or 4).
        attention: (N, heads, h, w), not negative; each map is shown from 0 to its own maximum.
        side: Width of a picture in inches.
    """
    paint = mpl.colormaps[SEQUENTIAL]
    rows = [
        [image, *(paint(one / max(float(one.max()), 1e-12)) for one in (maps.mean(axis=0), *maps))]
        for image, maps in zip(images, attention, strict=True)
    ]
    titles = ["image", "mean of heads", *(f"head {number + 1}" for number in range(attention.shape[1]))]
    return image_sheet(rows, column_titles=titles, side=side)


def segment_sheet(
    images: Sequence[npt.NDArray[np.floating]],
    features: npt.NDArray[np.floating],
    clusters: int = 6,
    seed: int = 0,
    side: float = _SIDE,
) -> Figure:
    """Each image above what k-means makes of its features: groups found without a label, alike in all images.

    Args:
        images: N pictures (H, W, 3 or 4).
        features: (N, D, h, w).
        clusters: Number of groups, at most 10.
        seed: Of k-means.
        side: Width of a picture in inches.
    """
    colours = np.array([mpl.colors.to_rgb(colour) for colour in (*PALETTE, "#f0e442", INK, NODATA, "#ffffff")])
    groups = kmeans_segments(features, clusters, seed)
    shown = [_over(image, colours[group]) for image, group in zip(images, groups, strict=True)]
    return image_sheet([list(images), shown], row_titles=["image", f"{clusters} groups"], side=side)


def nearest_sheet(
    images: Sequence[npt.NDArray[np.floating]],
    embeddings: npt.NDArray[np.floating],
    queries: Sequence[int],
    count: int = 6,
    side: float = _SIDE,
) -> Figure:
    """Chips most like a query, one query a row, with their cosine similarity.

    Args:
        images: N pictures (H, W, 3 or 4).
        embeddings: (N, D) of the same chips.
        queries: Numbers of the chips to ask for.
        count: Neighbours of each.
        side: Width of a picture in inches.
    """
    rows, titles = [], []
    for query in queries:
        numbers, similarity = nearest_chips(embeddings, query, count)
        rows.append([images[query], *(images[number] for number in numbers)])
        titles.append(["query", *(f"{value:.2f}" for value in similarity)])
    return image_sheet(rows, titles=titles, side=side)


def class_sheet(
    images: Sequence[npt.NDArray[np.floating]],
    labels: Sequence[Classes],
    predictions: Sequence[Classes],
    names: Sequence[str],
    colours: Sequence[Colour],
    *,
    row_titles: Sequence[str] = (),
    side: float = _SIDE,
) -> Figure:
    """Image, label, prediction and error side by side, one chip a row, with the classes' own colours.

    Args:
        images: N pictures (H, W, 3 or 4).
        labels: (H, W) each, 0 … C-1, 255 where there is none.
        predictions: (H, W) each; shown where there is an image, counted where there is a label.
        names: (C,).
        colours: (C,) red, green, blue in 0 … 255.
        row_titles: Of the chips.
        side: Width of a picture in inches.
    """
    table = np.zeros((IGNORED + 1, 4))
    table[: len(colours)] = [(*(np.array(colour) / 255), 1.0) for colour in colours]
    wrong = np.array([[*mpl.colors.to_rgb(RIGHT), 1.0], [*mpl.colors.to_rgb(WRONG), 1.0], [0, 0, 0, 0]])
    rows = [
        [
            image,
            table[label],
            table[np.where(_seen(image), shown, IGNORED)],
            wrong[np.where(label == IGNORED, 2, label != shown).astype(int)],
        ]
        for image, label, shown in zip(images, labels, predictions, strict=True)
    ]
    seen, pixels = np.unique(np.concatenate([np.ravel(part) for part in (*labels, *predictions)]), return_counts=True)
    order = seen[np.argsort(-pixels, kind="stable")]
    listed = np.sort(order[order < len(names)][:LISTED])
    legend = [(names[k], mpl.colors.to_hex(table[k])) for k in listed]
    if (others := int((seen < len(names)).sum()) - len(listed)) > 0:
        legend.append((f"and {others} others", "none"))
    titles = ["image", "label", "prediction", "error"]
    legend += [("right", RIGHT), ("wrong", WRONG), *([("no label", NODATA)] if IGNORED in seen else [])]
    return image_sheet(rows, column_titles=titles, row_titles=row_titles, legend=legend, side=side)


def _on_grey(image: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """(H, W, 3) with what is transparent in the grey of nodata, whatever the page's own ground."""
    if image.shape[2] == 3:
        return image
    opacity = image[..., 3:]
    blended: npt.NDArray[np.floating] = image[..., :3] * opacity + np.array(mpl.colors.to_rgb(NODATA)) * (1 - opacity)
    return blended


def _over(image: npt.NDArray[np.floating], places: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """(h, w, 4) colours of places, transparent where the image has no valid pixel: nothing is to be seen there."""
    height, width = places.shape[:2]
    return np.dstack([places[..., :3], valid_share(_seen(image), (height, width)) > 0])


def _seen(image: npt.NDArray[np.floating]) -> Valid:
    return np.asarray(image[..., 3] > 0 if image.shape[2] == 4 else np.ones(image.shape[:2], np.bool_))


def _column(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    return np.asarray(values)[:, None, None]
