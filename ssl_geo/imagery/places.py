"""Where chips of an index lie on the Earth."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError
from ssl_geo.imagery.chips import ChipIndex
from ssl_geo.imagery.coordinates import to_lonlat


def lonlat_bounds(index: ChipIndex, positions: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64] | None:
    """Boxes around chips in degrees of longitude and latitude (WGS 84).

    Args:
        index: The chips.
        positions: (N,) their numbers.

    Returns:
        (N, 4) left, bottom, right, top; None where a chip has no CRS, or a local one. A chip across the antimeridian
        gets a box around the whole Earth.
    """
    names = index.table["crs"].take(positions).to_pylist()
    if None in names:
        return None
    left, bottom, right, top = (index.table[side].take(positions).to_numpy() for side in _SIDES)
    x, y = np.stack([left, left, right, right]), np.stack([bottom, top, bottom, top])  # corners (4, N)
    boxes = np.empty((len(positions), 4))
    for name in set(names):
        of_crs = np.array([own == name for own in names])
        try:
            corners = to_lonlat(name, x[:, of_crs].ravel(), y[:, of_crs].ravel()).reshape(4, -1, 2)
        except UserError:
            return None
        boxes[of_crs] = np.concatenate([corners.min(axis=0), corners.max(axis=0)], axis=1)
    return boxes


_SIDES = ("left", "bottom", "right", "top")
