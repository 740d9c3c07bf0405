"""Where things lie in a sample scene: zones, parcels with a class each, roads, rivers and lakes.

Everything is drawn on a grid of half pixels (5 m), so that the pixels on a boundary come out as mixtures; lengths
are in pixels of 10 m.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, spatial

from ssl_geo.imagery.sample_spectra import CLASSES, FOREST, INDUSTRY, QUARRY, SETTLEMENT, WATER, Float

Int = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

OVERSAMPLING = 2
"""Grid points per 10 m pixel and direction."""


@dataclass(frozen=True)
class Layout:
    """The ground plan of a scene on the half-pixel grid, n = 2·size points a side.

    Attributes:
        labels: Class of each point, (n, n) uint8.
        parcel: Parcel of each point, (n, n), 0…P-1; under water and roads too.
        classes: Class of each parcel, (P,).
        u: Coordinate across the parcel's main direction, in pixels of 10 m, (n, n).
        v: Coordinate along it, (n, n).
        road: Paved share of each point, (n, n) in 0…1.
        border: Points on the border of two parcels, (n, n).
        shore: Points of the land within two or three pixels of a river, (n, n).
    """

    labels: npt.NDArray[np.uint8]
    parcel: Int
    classes: npt.NDArray[np.intp]
    u: Float
    v: Float
    road: Float
    border: Bool
    shore: Bool


def smooth_noise(rng: np.random.Generator, n: int, scale: float) -> Float:
    """Gaussian noise of unit standard deviation and one scale, (n, n).

    Args:
        rng: Source of the noise.
        n: Points a side.
        scale: Distance in points between the independent values that a cubic spline joins.
    """
    knots = int(np.ceil(n / scale)) + 4
    values = rng.standard_normal((knots, knots), dtype=np.float32)
    offset = 1.0 + rng.random(2)
    # The splines are separable: interpolate the rows, then the columns.
    for axis in (0, 1):
        position = offset[axis] + np.arange(n) / scale
        first = position.astype(int)
        t = (position - first).astype(np.float32)
        # Catmull-Rom weights of the four knots around each position.
        weights = (
            0.5 * (-t + 2 * t**2 - t**3),
            0.5 * (2 - 5 * t**2 + 3 * t**3),
            0.5 * (t + 4 * t**2 - 3 * t**3),
            0.5 * (-(t**2) + t**3),
        )
        values = sum(w[:, None] * values[first - 1 + k] for k, w in enumerate(weights)).T
    # The weights' sum of squares is 0.82 on average over t, in each direction.
    return np.asarray(values / np.float32(0.82), dtype=np.float32)


def fractal_noise(rng: np.random.Generator, n: int, scale: float, octaves: int) -> Float:
    """Sum of `octaves` smooth noises, each of half the scale and 0.6 of the amplitude, unit deviation, (n, n)."""
    amplitudes = 0.6 ** np.arange(octaves)
    total = sum(a * smooth_noise(rng, n, scale / 2**k) for k, a in enumerate(amplitudes))
    return np.asarray(total / np.sqrt((amplitudes**2).sum()), dtype=np.float32)


def _grid(n: int) -> tuple[Float, Float]:
    """Rows and columns of the points, in pixels of 10 m, broadcastable (n, 1) and (1, n)."""
    line = ((np.arange(n) + 0.5) / OVERSAMPLING).astype(np.float32)
    return line[:, None], line[None, :]


def _parcels(rng: np.random.Generator, n: int) -> tuple[Int, Float, Float, Float]:
    """Divide the land: Voronoi zones, each cut into strips in its own direction and the strips into parcels.

    Returns:
        Parcel numbers, u and v (as in `Layout`), and the distance to the nearest zone border, in pixels.
    """
    row, col = _grid(n)
    row = row + 2.5 * smooth_noise(rng, n, 60)
    col = col + 2.5 * smooth_noise(rng, n, 60)
    extent = n / OVERSAMPLING
    count = max(6, round((extent / 62) ** 2))
    sites = rng.uniform(-0.05 * extent, 1.05 * extent, (count, 2))
    distance, index = spatial.cKDTree(sites).query(np.stack([row, col], axis=-1), k=2)
    zone = index[..., 0]
    # To the perpendicular bisector of the two nearest sites.
    apart = np.hypot(*(sites[zone] - sites[index[..., 1]]).transpose(2, 0, 1))
    to_border = (distance[..., 1] ** 2 - distance[..., 0] ** 2) / (2 * apart)

    main_direction = rng.uniform(0, np.pi)
    u, v = np.empty_like(row), np.empty_like(row)
    key = np.zeros((n, n), dtype=np.int64)
    for number, (r, c) in enumerate(sites):
        inside = zone == number
        angle = main_direction + rng.normal(0, 0.5)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        across = (row[inside] - r) * cos + (col[inside] - c) * sin
        along = (col[inside] - c) * cos - (row[inside] - r) * sin
        scale = rng.uniform(0.8, 1.25)
        strips = np.cumsum(scale * rng.uniform(13, 32, 60))
        cuts = np.cumsum(scale * rng.uniform(20, 52, 60))
        shift = rng.uniform(0, 40, 61)
        strip = np.searchsorted(strips - strips[30], across)
        piece = np.searchsorted(cuts - cuts[30], along + shift[strip])
        key[inside] = (number * 64 + strip) * 64 + piece
        u[inside], v[inside] = across, along
    parcel = np.unique(key, return_inverse=True)[1].reshape(n, n).astype(np.int32)
    return parcel, u, v, to_border.astype(np.float32)


def _assign_classes(rng: np.random.Generator, parcel: Int) -> npt.NDArray[np.intp]:
    """Give each parcel a class, (P,): neighbours tend to agree, and the areas come near the scene's own shares."""
    n = len(parcel)
    area = np.bincount(parcel.ravel()).astype(np.float64)
    rows, cols = (
        np.clip(np.bincount(parcel.ravel(), weights=index.ravel()) / area, 0, n - 1).astype(int)
        for index in np.indices((n, n), dtype=np.float32)
    )
    shares = np.array([c.share for c in CLASSES[1:]]) * rng.gamma(4.0, 0.25, len(CLASSES) - 1)
    shares /= shares.sum()
    scores = np.stack([smooth_noise(rng, n, 110)[rows, cols] for _ in shares], axis=1).astype(np.float64)
    scores += 0.35 * rng.gumbel(size=scores.shape)
    bias, best, least = np.zeros(len(shares)), np.zeros(len(area), dtype=np.intp), np.inf
    for _ in range(200):
        classes = (scores + bias).argmax(axis=1)
        got = np.bincount(classes, weights=area, minlength=len(shares)) / area.sum()
        if (miss := np.abs(got - shares).sum()) < least:
            best, least = classes, miss
        bias += 0.15 * np.log((shares + 0.01) / (got + 0.01))
    return best + 1  # class 0 is water


def _round_woods(rng: np.random.Generator, parcel: Int, classes: npt.NDArray[np.intp]) -> Int:
    """Give woods edges of their own instead of the parcels': each point won or lost joins the nearest parcel there."""
    wood = classes[parcel] == FOREST
    n = len(parcel)
    density = ndimage.gaussian_filter(wood.astype(np.float32), 3.5 * OVERSAMPLING, truncate=2.5)
    rounded = density + 0.07 * fractal_noise(rng, n, 22, 3) > 0.5
    parcel = parcel.copy()
    for changed, donor in ((rounded & ~wood, wood), (wood & ~rounded, ~wood & ~rounded)):
        if changed.any() and donor.any():
            nearest = ndimage.distance_transform_edt(~donor, return_distances=False, return_indices=True)
            parcel[changed] = parcel[nearest[0][changed], nearest[1][changed]]
    return parcel


def _line(rng: np.random.Generator, n: int, bend: float, scale: float) -> Float:
    """Distance, in pixels, of each point to a winding line through the scene, (n, n).

    Args:
        rng: Source of its course.
        n: Points a side.
        bend: Amplitude of the meanders, in pixels.
        scale: Length of a bend, in pixels.
    """
    row, col = _grid(n)
    extent = n / OVERSAMPLING
    angle = rng.uniform(0, 2 * np.pi)
    r, c = rng.uniform(0.3, 0.7, 2) * extent
    along = (row - r) * np.cos(angle) + (col - c) * np.sin(angle)
    across = (col - c) * np.cos(angle) - (row - r) * np.sin(angle)
    stations = np.linspace(-1.5 * extent, 1.5 * extent, 1500)
    width = 1500 / (3 * extent)  # stations a pixel
    course = ndimage.gaussian_filter1d(rng.standard_normal(1500), scale * width / 4, mode="wrap")
    course = course / course.std() * bend
    slope = np.gradient(course, stations)
    offset = np.abs(across - np.interp(along, stations, course))
    return np.asarray(offset / np.sqrt(1 + np.interp(along, stations, slope) ** 2), dtype=np.float32)


def _waters(rng: np.random.Generator, n: int) -> tuple[Bool, Bool]:
    """Draw a river in two scenes of three and some lakes, more where there is no river: water and river shore."""
    row, col = _grid(n)
    extent = n / OVERSAMPLING
    water = np.zeros((n, n), dtype=np.bool_)
    shore = np.zeros((n, n), dtype=np.bool_)
    river = rng.random() < 0.67
    if river:
        scale = rng.uniform(50, 100)
        distance = _line(rng, n, bend=rng.uniform(0.12, 0.24) * scale, scale=scale)
        half = rng.uniform(1.4, 4.2) * (1 + 0.15 * smooth_noise(rng, n, 50))
        water |= distance < half
        shore |= (distance < half + 2.2) & (smooth_noise(rng, n, 14) > -0.2)
    for _ in range(max(1, round((rng.uniform(2, 4) if river else rng.uniform(4, 7)) * (extent / 360) ** 1.5))):
        r, c = rng.uniform(0.08, 0.92, 2) * extent
        radius = rng.uniform(8, 18) * min(1.0, extent / 240)
        stretch, angle = rng.uniform(1, 2), rng.uniform(0, np.pi)
        along = (row - r) * np.cos(angle) + (col - c) * np.sin(angle)
        across = (col - c) * np.cos(angle) - (row - r) * np.sin(angle)
        shape = np.hypot(along / stretch, across) + 0.16 * radius * fractal_noise(rng, n, 2 * radius, 2)
        water |= shape < radius
    return water, shore & ~water


def draw_layout(rng: np.random.Generator, size: int) -> Layout:
    """Draw the ground plan of one scene.

    Args:
        rng: Source of every draw.
        size: Side of the scene in pixels of 10 m.
    """
    n = OVERSAMPLING * size
    parcel, u, v, to_zone_border = _parcels(rng, n)
    classes = _assign_classes(rng, parcel)
    parcel = _round_woods(rng, parcel, classes)
    labels = classes.astype(np.uint8)[parcel]

    # Country roads follow zone borders outside of the woods; one scene in two has a motorway.
    road = ((to_zone_border < 0.5) & (labels != FOREST)).astype(np.float32)
    if rng.random() < 0.5:
        road[_line(rng, n, bend=6, scale=160) < 1.2] = 1.0

    border = np.zeros((n, n), dtype=np.bool_)
    border[:, 1:] |= parcel[:, 1:] != parcel[:, :-1]
    border[1:] |= parcel[1:] != parcel[:-1]
    border &= ~np.isin(labels, (FOREST, SETTLEMENT, INDUSTRY, QUARRY))

    water, shore = _waters(rng, n)
    labels[water] = WATER
    return Layout(labels, parcel, classes, u, v, road, border, shore)
