"""One sample scene: cover its ground plan with materials, light it, and take its picture as Sentinel-2 would.

A point of the half-pixel grid is a linear mixture of two spectra, a ground and a cover (grass and tree, soil and vine),
times a brightness. What tells an orchard from a wood or a vineyard from a half-grown crop is how cover and brightness
vary over 2 to 8 pixels, hardly the mixture of a single pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ssl_geo.imagery.sample_layout import OVERSAMPLING, Bool, Layout, draw_layout, fractal_noise, smooth_noise
from ssl_geo.imagery.sample_spectra import (
    BANDS,
    CLASSES,
    CROPLAND,
    CROPS,
    FOREST,
    GRASSLAND,
    IGNORE,
    MATERIALS,
    ORCHARD,
    QUARRY,
    SETTLEMENT,
    VINEYARD,
    WATER,
    Float,
    crop_spectrum,
    grass_greenness,
    leaf_cover,
    material,
    mix,
    vine_leaf_cover,
)

_UINT16 = npt.NDArray[np.uint16]
_UINT8 = npt.NDArray[np.uint8]


@dataclass
class Ground:
    """What covers the half-pixel grid: reflectance = brightness · (ground + cover · (over - ground)).

    Attributes:
        spectra: All spectra in use, (S, 12).
        ground: Row of `spectra` at each point, (n, n).
        over: Row of `spectra` of what grows or stands on it, (n, n).
        cover: Its share, (n, n) in 0…1.
        brightness: Factor of all bands, (n, n).
    """

    spectra: Float
    ground: npt.NDArray[np.int32]
    over: npt.NDArray[np.int32]
    cover: Float
    brightness: Float


def _step(x: npt.NDArray[np.floating], width: float) -> Float:
    """Smooth step from 0 to 1 around x = 0 over about ±`width`."""
    return np.asarray(1.0 / (1.0 + np.exp(np.clip(-2.2 * x / width, -30, 30))), dtype=np.float32)


def _parcel_spectra(rng: np.random.Generator, layout: Layout, day: float) -> tuple[Float, Float]:
    """Spectra of ground and cover of every parcel, each (P, 12), as the season and the scene's soil make them."""
    count = len(layout.classes)
    scene_soil = rng.uniform(0.1, 0.9)
    soils = mix(material("dark soil"), material("light soil"), np.clip(rng.normal(scene_soil, 0.22, (count, 1)), 0, 1))
    green = grass_greenness(day, drought=float(rng.beta(1.2, 1.8)))
    grass = mix(material("dry grass"), material("green grass"), np.clip(rng.normal(green, 0.14, (count, 1)), 0, 1))
    in_leaf = np.clip(leaf_cover(day) + rng.normal(0, 0.04, (count, 1)), 0, 1)
    leaves = mix(material("bare branches"), material("leaves"), in_leaf)
    needle_share = np.clip(rng.beta(0.5, 0.9, (count, 1)), 0, 1)
    vines = mix(
        material("bare branches"),
        material("vine leaves"),
        np.clip(vine_leaf_cover(day) + rng.normal(0, 0.06, (count, 1)), 0, 1),
    )
    rock = mix(material("sand"), material("gravel"), np.clip(rng.normal(rng.uniform(0.1, 0.8), 0.2, (count, 1)), 0, 1))
    crops = rng.choice(len(CROPS), size=count, p=(0.4, 0.3, 0.18, 0.12))
    fields = np.stack(
        [crop_spectrum(CROPS[c], day + rng.normal(0, 7), soil) for c, soil in zip(crops, soils, strict=True)]
    )

    ground, over = grass.copy(), leaves.copy()
    for land_class, below, above in (
        (FOREST, mix(soils, grass, 0.6), mix(leaves, material("needles"), needle_share)),
        (CROPLAND, fields, soils),
        # Every third vineyard or so has grass between its rows.
        (VINEYARD, mix(soils, grass, np.clip(rng.normal(0.2, 0.3, (count, 1)), 0, 0.85)), vines),
        (QUARRY, mix(rock, soils, rng.uniform(0.0, 0.75, (count, 1))), soils),
    ):
        here = layout.classes == land_class
        ground[here], over[here] = below[here], above[here]
    # No two parcels are alike in brightness, nor quite in colour.
    tone = np.exp(rng.normal(0, 0.10, (2, count, 1)))
    tilt = np.exp(rng.normal(0, 0.04, (2, count, 1)) * np.linspace(-1, 1, len(BANDS)))
    ground, over = (np.array([ground, over]) * tone * tilt).astype(np.float32)
    return ground, over


def _rows(w: Float, period: Float, duty: float | Float) -> Float:
    """Share of each point under rows along lines of constant `w`, `duty` of them covered on average."""
    return _step(np.cos(2 * np.pi * w / period) - np.cos(np.pi * duty), 0.35)


def _houses(rng: np.random.Generator, u: Float, v: Float, rows: dict[str, int]) -> tuple[npt.NDArray[np.int32], Float]:
    """Settlement at points (u, v): row of the material and brightness.

    Streets every 60 m and every 150 m; between them lots of about 17 m with a house, trees or a lawn each.
    """
    table = 97  # lots repeat after so many, unseen within a settlement
    wide, deep = 1.65, 1.75
    lot = np.floor(u / wide).astype(int) % table, np.floor(v / deep).astype(int) % table
    roofs = ["clay tiles"] * 5 + ["slate", "slate", "bitumen", "concrete", "metal roof"]
    yards = ["lawn", "lawn", "lawn", "trees", "trees", "asphalt", "asphalt", "concrete"]
    roof = np.array([rows[name] for name in roofs])[rng.integers(0, len(roofs), (table, table))][lot]
    yard = np.array([rows[name] for name in yards])[rng.integers(0, len(yards), (table, table))][lot]
    side = rng.uniform(0.5, 0.95, (2, table, table)).astype(np.float32)
    built = rng.random((table, table)) < 0.85
    house = (np.mod(u / wide, 1) < side[0][lot]) & (np.mod(v / deep, 1) < side[1][lot]) & built[lot]
    street = (np.mod(u, wide * 4) < 0.9) | (np.mod(v, deep * 9) < 0.9)
    tone = np.exp(rng.normal(0, 0.15, (table, table))).astype(np.float32)[lot]
    which = np.where(street, rows["asphalt"], np.where(house, roof, yard)).astype(np.int32)
    return which, np.where(street, np.float32(1), tone)


def _halls(rng: np.random.Generator, u: Float, v: Float, rows: dict[str, int]) -> tuple[npt.NDArray[np.int32], Float]:
    """Industry at points (u, v): row of the material and brightness; halls of 50 to 150 m among yards."""
    table = 61
    step_u, step_v = 11.0, 17.0
    lot = np.floor(u / step_u).astype(int) % table, np.floor(v / step_v).astype(int) % table
    roofs = ["metal roof", "concrete", "bitumen", "slate", "clay tiles"]
    yards = ["asphalt", "asphalt", "concrete", "lawn"]
    roof = np.array([rows[name] for name in roofs])[rng.integers(0, len(roofs), (table, table))][lot]
    yard = np.array([rows[name] for name in yards])[rng.integers(0, len(yards), (table, table))][lot]
    side = rng.uniform(0.55, 0.88, (2, table, table)).astype(np.float32)
    in_u, in_v = np.mod(u / step_u, 1), np.mod(v / step_v, 1)
    hall = (in_u > 0.08) & (in_u < side[0][lot]) & (in_v > 0.08) & (in_v < side[1][lot])
    tone = np.exp(rng.normal(0, 0.15, (2, table, table))).astype(np.float32)
    # A pitched roof has a lit and a shaded half.
    pitch = np.where(in_u < side[0][lot] / 2 + 0.04, np.float32(1.06), np.float32(0.94))
    which = np.where(hall, roof, yard).astype(np.int32)
    return which, np.where(hall, tone[0][lot] * pitch, tone[1][lot])


def cover_ground(rng: np.random.Generator, layout: Layout, day: float) -> Ground:
    """Grow and build on a ground plan what belongs there on a day of the year."""
    n, count = len(layout.labels), len(layout.classes)
    own_ground, own_over = _parcel_spectra(rng, layout, day)
    lawn = mix(material("dry grass"), material("green grass"), grass_greenness(day, 0.3))
    trees = mix(material("bare branches"), material("leaves"), leaf_cover(day))
    lake = mix(material("clear water"), material("turbid water"), rng.uniform(0, 1))
    extra = {"lawn": lawn, "trees": trees, "water": lake} | {name: material(name) for name in MATERIALS}
    rows = {name: 2 * count + k for k, name in enumerate(extra)}
    spectra = np.concatenate([own_ground, own_over, np.stack(list(extra.values()))]).astype(np.float32)

    ground, over = layout.parcel.copy(), layout.parcel + np.int32(count)
    cover = np.zeros((n, n), dtype=np.float32)
    brightness = 1 + 0.03 * fractal_noise(rng, n, 24, 4)
    crowns = smooth_noise(rng, n, 2.6) + 0.7 * smooth_noise(rng, n, 5.2)
    patches = fractal_noise(rng, n, 36, 3)
    tufts = smooth_noise(rng, n, 7)

    # Per parcel: do rows run along or across it, how far apart, how wide, how even.
    turned = rng.random(count) < 0.35
    period = rng.uniform(2.4, 4.2, count).astype(np.float32)
    duty = rng.uniform(0.32, 0.62, count).astype(np.float32)
    vigour = rng.uniform(0.75, 1.0, count).astype(np.float32)

    for land_class in range(1, len(CLASSES)):
        at = np.nonzero(layout.labels == land_class)
        p = layout.parcel[at]
        across = np.where(turned[p], layout.v[at], layout.u[at])
        along = np.where(turned[p], layout.u[at], layout.v[at])
        if land_class == FOREST:
            cover[at] = np.clip(0.9 + 0.1 * crowns[at] + 0.12 * patches[at], 0.2, 1)
            brightness[at] *= np.exp(0.17 * crowns[at] + 0.05 * patches[at])
        elif land_class == ORCHARD:
            trees_here = _step(
                np.cos(2 * np.pi * across / period[p])
                + np.cos(2 * np.pi * along / (1.15 * period[p]))
                - 2 * np.cos(np.pi * duty[p] * 1.1),
                0.5,
            )
            cover[at] = trees_here * vigour[p] * np.clip(1 + 0.12 * tufts[at], 0, 1)
            brightness[at] *= np.exp(0.05 * crowns[at]) * (1 - 0.12 * trees_here)
        elif land_class == GRASSLAND:
            cover[at] = 0.9 * _step(crowns[at] + 0.5 * patches[at] - 2.3, 0.25)
            brightness[at] *= np.exp(0.07 * tufts[at] + 0.06 * patches[at])
        elif land_class == CROPLAND:
            cover[at] = 0.12 * _rows(across, period[p] * 2.2, 0.15) + np.clip(0.08 * patches[at], 0, 0.3)
            brightness[at] *= np.exp(0.05 * patches[at])
        elif land_class == VINEYARD:
            cover[at] = _rows(across, period[p], duty[p] + 0.05) * vigour[p] * np.clip(1 + 0.1 * tufts[at], 0, 1)
            brightness[at] *= np.exp(0.03 * patches[at])
        elif land_class == QUARRY:
            faces = np.abs(patches[at]) + 0.35 * tufts[at]
            cover[at] = _step(tufts[at] + patches[at] - 0.8, 0.5)
            brightness[at] *= np.exp(0.22 * np.cos(7 * faces) + 0.05 * crowns[at])
        else:
            build = _houses if land_class == SETTLEMENT else _halls
            ground[at], tone = build(rng, layout.u[at], layout.v[at], rows)
            over[at] = rows["trees"]
            brightness[at] *= tone
            if land_class == SETTLEMENT:
                cover[at] = 0.9 * _step(crowns[at] - 1.6, 0.3)

    # Field borders are grass, in places a hedge; trees stand along rivers.
    edge = layout.border & (layout.labels != WATER)
    ground[edge] = rows["lawn"]
    over[edge | layout.shore] = rows["trees"]
    cover[edge] = 0.9 * _step(patches[edge] - 0.5, 0.3)
    cover[layout.shore] = np.clip(0.85 + 0.15 * crowns[layout.shore], 0, 1)
    paved = (layout.road > 0) & (layout.labels != WATER)
    ground[paved], cover[paved], brightness[paved] = rows["asphalt"], 0.0, 1.0
    wet = layout.labels == WATER
    ground[wet], cover[wet] = rows["water"], 0.0
    brightness[wet] = np.exp(0.06 * patches[wet])
    return Ground(spectra, ground, over, cover, brightness)


def _averaged(image: Float, factor: int) -> Float:
    """Mean over blocks of factor×factor points."""
    n = len(image) // factor
    return np.asarray(image.reshape(n, factor, n, factor).mean(axis=(1, 3)), dtype=np.float32)


def sensed(image: Float, gsd: int) -> Float:
    """What detectors of `gsd` metres see of an image on the half-pixel grid: blurred and averaged over their area.

    The modulation transfer at the Nyquist frequency is 0.25, within the 0.15 to 0.30 required of Sentinel-2's MSI (ESA
    2015, Sentinel-2 User Handbook): a square detector gives sin(π/2)/(π/2) = 0.64, a Gaussian of 0.44 pixels the rest.
    """
    ratio = gsd * OVERSAMPLING // 10  # points of the grid per native pixel
    fine = min(ratio, 3 if ratio % 3 == 0 else 2)  # blur at 2 or 3 points a pixel, which is fine enough
    return _averaged(ndimage.gaussian_filter(_averaged(image, ratio // fine), 0.44 * fine, truncate=3), fine)


def _clouds(rng: np.random.Generator, n: int, sun: tuple[float, float]) -> tuple[Float, Float]:
    """Opacity of clouds and depth of their shadows on the half-pixel grid, each (n, n) in 0…1."""
    field = fractal_noise(rng, n, min(110.0, n / 3), 6)
    start = np.quantile(field, rng.uniform(0.78, 0.9))
    opacity = np.clip((field - start) / 1.1, 0, 1).astype(np.float32) ** np.float32(1.2)
    height = rng.uniform(900, 1600)  # metres; shadows fall away from the sun
    zenith, azimuth = sun
    reach = height * np.tan(zenith) / 10 * OVERSAMPLING
    shift = (reach * np.cos(azimuth), -reach * np.sin(azimuth))
    shadow = ndimage.shift(opacity, shift, order=1, mode="reflect")
    return opacity, np.clip(1.6 * shadow, 0, 1)


def _outside_swath(rng: np.random.Generator, size: int) -> Bool:
    """Pixels beyond the swath's edge, (size, size): a straight line inclined as the orbit, about 12° off north."""
    row, col = np.indices((size, size))
    outside: Bool = col < rng.uniform(0.1, 0.3) * size + np.tan(np.radians(12)) * (size / 2 - row)
    return outside if rng.random() < 0.5 else outside[::-1, ::-1]


def render_scene(
    rng: np.random.Generator, size: int, *, day: float, cloudy: bool, swath_edge: bool
) -> tuple[_UINT16, _UINT8]:
    """Make one scene and its labels.

    Args:
        rng: Source of every draw.
        size: Side in pixels of 10 m, a multiple of 6.
        day: Day of the year, 80…300.
        cloudy: Whether clouds and their shadows pass over.
        swath_edge: Whether a part lies outside of the swath.

    Returns:
        DN (12, size, size) = reflectance · 10000, 0 without data and at least 1 elsewhere, and labels (size, size).
        Pixels of 20 and 60 m bands are repeated on the 10 m grid.
    """
    n = OVERSAMPLING * size
    layout = draw_layout(rng, size)
    ground = cover_ground(rng, layout, day)

    # Sun over central Europe (50° N) at 10:30, and the hills' slopes towards it (cosine correction left out, as in L2A
    # without a terrain model).
    declination = 23.4 * np.sin(2 * np.pi * (day - 81) / 365)
    zenith, azimuth = np.radians(90 - (40 + declination) * 0.93), np.radians(155 + rng.normal(0, 4))
    hills = fractal_noise(rng, n, 150, 3) * rng.uniform(2, 18)
    south, east = np.gradient(hills, 10 / OVERSAMPLING)
    toward_sun = np.cos(azimuth) * south - np.sin(azimuth) * east
    light = (ground.brightness * np.clip(1 + np.tan(zenith) * toward_sun, 0.5, 1.5)).astype(np.float32)
    opacity, shadow = _clouds(rng, n, (zenith, azimuth)) if cloudy else np.zeros((2, n, n), dtype=np.float32)

    # What is left of the atmosphere and of the directional effects after correction: haze that falls with wavelength,
    # thicker here and there, and an error of gain with a tilt over the spectrum.
    wavelength = np.array([band.wavelength_nm for band in BANDS])
    haze = rng.gamma(1.5, 0.010) * np.maximum(1 + 0.3 * smooth_noise(rng, n, 200), 0)
    thickness = (wavelength / 443) ** -1.5
    tilt = np.log(wavelength / 900) / np.log(2200 / 443)  # about -0.5 … 0.5
    gain = np.exp(rng.normal(0, 0.09) + rng.normal(0, 0.07) * tilt + rng.normal(0, 0.025, len(BANDS)))
    white = np.interp(wavelength, [443, 950, 1610, 2200], [0.62, 0.68, 0.52, 0.42])

    dn = np.empty((len(BANDS), size, size), dtype=np.uint16)
    for number, band in enumerate(BANDS):
        spectra = ground.spectra[:, number]
        below = spectra[ground.ground]
        surface = light * (below + ground.cover * (spectra[ground.over] - below))
        surface *= np.float32(gain[number]) * (1 - np.float32(0.6) * shadow)
        surface += np.float32(thickness[number]) * haze.astype(np.float32) * (1 - surface)
        surface += opacity * (np.float32(white[number]) - surface)
        seen = sensed(surface, band.gsd_m)
        # Signal-to-noise ratios of 100 to 170 at reference radiance (ESA 2015, Sentinel-2 User Handbook).
        seen += np.hypot(np.float32(0.0006), np.float32(0.006) * seen) * rng.standard_normal(seen.shape, np.float32)
        native = np.clip(np.round(seen * 10_000), 1, 65_535).astype(np.uint16)
        repeat = band.gsd_m // 10
        dn[number] = native.repeat(repeat, axis=0).repeat(repeat, axis=1)

    votes = np.stack([_averaged((layout.labels == k).astype(np.float32), OVERSAMPLING) for k in range(len(CLASSES))])
    labels = votes.argmax(axis=0).astype(np.uint8)
    labels[_averaged(opacity, OVERSAMPLING) > 0.35] = IGNORE
    if swath_edge:
        outside = _outside_swath(rng, size)
        dn[:, outside], labels[outside] = 0, IGNORE
    return dn, labels
