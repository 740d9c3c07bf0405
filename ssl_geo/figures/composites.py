"""Bands as colours: composites by name, stretched over the pixels that are valid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError, nearest

Image = npt.NDArray[np.floating]
Valid = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# Red, green and blue of what people in the field look at.
COMPOSITES: dict[str, tuple[str, str, str]] = {
    "true colour": ("B04", "B03", "B02"),
    "colour infrared": ("B08", "B04", "B03"),  # vegetation is red
    "SWIR": ("B12", "B8A", "B04"),  # burnt land and bare soil are bright, water is black
}
PERCENTILES = (2.0, 98.0)


def default_composite(bands: Sequence[str]) -> tuple[str, str, str]:
    """The bands to show where none are asked for: the first composite there is, else the first bands."""
    for wanted in COMPOSITES.values():
        if set(wanted) <= set(bands):
            return wanted
    first, second, third = (*bands[:3], *[bands[0]] * 3)[:3] if len(bands) > 2 else [bands[0]] * 3
    return first, second, third


def channels(bands: Sequence[str], which: str | Sequence[str] | None) -> list[int]:
    """Positions of the three bands that a composite shows.

    Args:
        bands: Of the image, in the order of its channels.
        which: A name of `COMPOSITES`, three bands (red, green, blue), or None for `default_composite`.

    Raises:
        UserError: No such composite, or the image lacks one of its bands.
    """
    if which is None:
        wanted: Sequence[str] = default_composite(bands)
    elif isinstance(which, str):
        if which not in COMPOSITES:
            raise UserError(f"composite {which!r}: {nearest(which, COMPOSITES)} or three bands as a tuple")
        wanted = COMPOSITES[which]
    else:
        wanted = which
    if missing := [band for band in wanted if band not in bands]:
        raise UserError(f"composite {' '.join(wanted)}: no band {missing[0]} among {' '.join(bands)}; name another")
    return [list(bands).index(band) for band in wanted]


def limits(
    images: Iterable[Image], valid: Iterable[Valid] | None = None, percentiles: tuple[float, float] = PERCENTILES
) -> Floats:
    """What becomes black and white in each band, over the valid pixels of all images together.

    Args:
        images: (C, H, W) each.
        valid: (H, W) each, True = usable; None: everywhere.
        percentiles: Lower and upper, in percent.

    Returns:
        (C, 2); 0 and 1 where nothing is valid, and a band that is constant gets a range of 1 around its value.
    """
    images = list(images)
    usable = [np.ones(image.shape[1:], np.bool_) for image in images] if valid is None else list(valid)
    pixels = np.concatenate([image[:, ok] for image, ok in zip(images, usable, strict=True)], axis=1)
    pixels = pixels[:, np.isfinite(pixels).all(axis=0)]
    if not pixels.shape[1]:
        return np.tile([0.0, 1.0], (len(pixels), 1))
    found: Floats = np.percentile(pixels, percentiles, axis=1).T
    constant = found[:, 1] <= found[:, 0]
    found[constant] = found[constant, :1] + [-0.5, 0.5]
    return found


def stretch(image: Image, limit: Floats) -> npt.NDArray[np.float32]:
    """Bring each band of (C, H, W) from its limits (C, 2) to 0 … 1, and clip."""
    low, high = limit[:, 0, None, None], limit[:, 1, None, None]
    with np.errstate(invalid="ignore"):
        scaled = (image - low) / (high - low)
    return np.clip(np.nan_to_num(scaled, nan=0.0), 0, 1).astype(np.float32)


def composite(
    image: Image,
    bands: Sequence[str],
    which: str | Sequence[str] | None = None,
    *,
    valid: Valid | None = None,
    limit: Floats | None = None,
) -> npt.NDArray[np.float32]:
    """Show three bands as red, green and blue.

    Args:
        image: (C, H, W).
        bands: Names of its channels.
        which: A name of `COMPOSITES`, three bands, or None for what there is.
        valid: (H, W); elsewhere the picture is transparent. None: everywhere.
        limit: (C, 2) of `limits`, to show several images alike; None: those of this image.

    Returns:
        (H, W, 4) red, green, blue and opacity, 0 … 1.

    Raises:
        UserError: No such composite, or the image lacks one of its bands.
    """
    chosen = channels(bands, which)
    opaque = np.ones(image.shape[1:], np.bool_) if valid is None else valid
    limit = limits([image[chosen]], [opaque]) if limit is None else limit[chosen]
    shown = stretch(image[chosen], limit) * opaque
    return np.concatenate([shown, opaque[None].astype(np.float32)]).transpose(1, 2, 0)
