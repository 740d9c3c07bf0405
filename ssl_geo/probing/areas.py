"""Area of each class from its map and the errors that the map is known to make."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from ssl_geo.probing.intervals import Interval, bootstrap
from ssl_geo.probing.metrics import Counts, Floats


def adjusted_shares(
    matrix: npt.NDArray[np.number], mapped: npt.NDArray[np.floating], otherwise: Floats | None = None
) -> Floats:
    """Share of the ground that is of each class (Olofsson et al. 2014, Remote Sensing of Environment 148, eq. 1 and 9).

    What is mapped as i is of class j with probability n_ij / n_i, so p_j = Σ_i W_i n_ij / n_i, where n are counts of
    the test pixels by map class i and true class j, and W_i is the share of the map.

    Args:
        matrix: (..., C, C) counts; rows = label, columns = prediction.
        mapped: (C,) W.
        otherwise: (C, C) what stands for n_ij / n_i in a column without counts; None: as mapped.

    Returns:
        (..., C).
    """
    counts = np.asarray(matrix, np.float64)
    predicted = counts.sum(axis=-2, keepdims=True)
    fallback = np.eye(counts.shape[-1]) if otherwise is None else otherwise
    rates = np.where(predicted > 0, counts / np.maximum(predicted, 1), fallback)
    shares: Floats = rates @ np.asarray(mapped, np.float64)
    return shares


def class_areas(blocks: Counts, mapped: npt.NDArray[np.floating]) -> list[Interval]:
    """Error-adjusted area of each class with its 95 % interval.

    The estimate is that of `adjusted_shares`. Its published standard error takes the test pixels for independent; here
    pixels of one block resemble each other, so the interval is a bootstrap over the test blocks. It holds as far as the
    map errs here as it does on the test split.

    Args:
        blocks: (n, C, C) confusion matrices of the test blocks; rows = label, columns = prediction.
        mapped: (C,) mapped area, in any unit.

    Returns:
        (C,) areas in the same unit; NaN bounds with too few blocks.
    """
    total = float(mapped.sum())
    if total == 0:
        return [Interval(0.0, 0.0, 0.0, len(blocks)) for _ in mapped]
    whole = blocks.sum(axis=0)
    classes = np.arange(len(mapped))
    rates = np.stack([adjusted_shares(whole, np.eye(len(mapped))[k]) for k in classes], axis=1)

    def area(number: int, matrix: npt.NDArray[np.number]) -> Floats:
        found: Floats = total * adjusted_shares(matrix, mapped / total, rates)[..., number]
        return found

    return [bootstrap(blocks, partial(area, number)) for number in classes.tolist()]
