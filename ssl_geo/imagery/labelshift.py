"""Whether labels lie beside what they label: correlation of the image's edges with the labels' boundaries.

The borders of label areas are where images change, so their edges correlate best at the true position. A second peak
elsewhere, far above what chance gives and well above the correlation in place, is a shift: a half-pixel convention
applied twice, another grid's origin, a flipped array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage
from skimage.registration import phase_cross_correlation

REACH = 16
"""Pixels along each axis up to which a shift is looked for."""
_WINDOW = 1024  # side of the part that is compared
_SMALLEST = 48  # side of a scene below which the surface of correlations is too small to tell chance
_BOUNDARY = 100  # pixels of label boundary from which on there is enough to compare
_BACKGROUND = 31  # pixels of the mean that is subtracted, so that bright fields do not outweigh borders
_PEAK = 5  # pixels around the peak that belong to it
# Calibrated on 24 sample scenes (0.0 to 0.2 pixels, 11 to 27 standard deviations), a reservoir (15) and a cloud mask
# (21); images under labels of other places stay below 5.3 (72 and 176 pairs).
_SIGNIFICANT = 6.0  # standard deviations of the peak over the surface away from it
_ABOVE_IN_PLACE = 2.0  # standard deviations of the peak over the correlation without shift
_SHIFT = 0.9  # pixels

Float = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shift:
    """Where labels would fit best.

    Attributes:
        rows: Pixels by which labels have to be moved down.
        cols: Pixels by which they have to be moved right.
        significance: Of the peak, in standard deviations of the correlations away from it.
        in_place: The same of the correlation without shift.
    """

    rows: float
    cols: float
    significance: float
    in_place: float

    @property
    def is_shift(self) -> bool:
        """Whether the peak is significant, away from zero and well above the correlation there."""
        return (
            self.significance >= _SIGNIFICANT
            and float(np.hypot(self.rows, self.cols)) >= _SHIFT
            and self.significance - self.in_place >= _ABOVE_IN_PLACE
        )


def busiest_window(boundary: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Row, column, height, width of the part with the most boundary, of those side by side and at the ends."""
    height, width = (min(side, _WINDOW) for side in boundary.shape)
    starts = [sorted({*range(0, n - k + 1, k), n - k}) for n, k in zip(boundary.shape, (height, width), strict=True)]
    return max(
        ((row, col, height, width) for row in starts[0] for col in starts[1]),
        key=lambda w: int(boundary[w[0] : w[0] + w[2], w[1] : w[1] + w[3]].sum()),
    )


def label_boundary(labels: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Pixels (H, W) with another label above, below, left or right: both sides, so that the border is in the middle."""
    boundary = np.zeros(labels.shape, np.bool_)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    boundary[1:] |= down
    boundary[:-1] |= down
    boundary[:, 1:] |= right
    boundary[:, :-1] |= right
    return boundary


def image_edges(dn: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Float:
    """Gradient (H, W), summed over the bands, each stretched from its 2nd to its 98th percentile."""
    edges = np.zeros(valid.shape)
    for band in dn:
        seen = band[valid].astype(np.float64)
        low, middle, high = np.percentile(seen, [2, 50, 98])
        if high > low:
            stretched = np.clip((np.where(valid, band, middle).astype(np.float64) - low) / (high - low), 0, 1)
            edges += np.hypot(ndimage.sobel(stretched, 0), ndimage.sobel(stretched, 1))
    return edges


def measure_shift(edges: Sequence[Float], boundary: npt.NDArray[np.bool_]) -> Shift | None:
    """Find where the labels fit best.

    Args:
        edges: Of one image of the labels or of several dates, (H, W) each; correlation is linear, so they add up.
        boundary: (H, W), of the labels.

    Returns:
        The shift, subpixel by `phase_cross_correlation` without whitening (Guizar-Sicairos et al. 2008,
        doi:10.1364/OL.33.000156); None where there is too little to compare.
    """
    if min(boundary.shape) < _SMALLEST or int(boundary.sum()) < _BOUNDARY:
        return None
    image = np.sum([_whole(edge) for edge in edges], axis=0)
    label = _whole(boundary.astype(np.float64))
    if not (image.any() and label.any()):
        return None
    shape = image.shape
    product = fft.rfft2(image) * np.conj(fft.rfft2(label))
    surface = np.roll(fft.irfft2(product, s=shape), (REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]
    row, col = np.unravel_index(surface.argmax(), surface.shape)
    rows, cols = np.ogrid[: surface.shape[0], : surface.shape[1]]
    away = surface[np.hypot(rows - row, cols - col) > _PEAK]
    shift = np.array([row - REACH, col - REACH], np.float64)
    fine, _, _ = phase_cross_correlation(image, label, upsample_factor=10, normalization=None)
    if np.abs(fine - shift).max() <= 1:  # else its maximum lies beyond the reach
        shift = fine
    significance, in_place = (
        (float(value) - away.mean()) / away.std() for value in (surface.max(), surface[REACH, REACH])
    )
    return Shift(float(shift[0]), float(shift[1]), float(significance), float(in_place))


def _whole(image: Float) -> Float:
    """An image without its background, faded out to its borders, of length 1 (or 0 where there is nothing)."""
    detail = image - ndimage.uniform_filter(image, _BACKGROUND)
    detail *= np.outer(np.hanning(image.shape[0]), np.hanning(image.shape[1]))
    length = float(np.linalg.norm(detail))
    return np.asarray(detail / length) if length > 0 else detail
