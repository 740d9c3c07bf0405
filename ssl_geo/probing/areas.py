"""Area of each class from its map and the errors that the map is known to make."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ssl_geo.probing.intervals import Interval, interval, resamples
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
    used = blocks[blocks.sum((1, 2)) > 0]
    whole, weights = used.sum(axis=0), resamples(len(used))
    share = np.asarray(mapped, np.float64) / total
    rates = np.stack([adjusted_shares(whole, one) for one in np.eye(len(mapped))], axis=1)  # n_ij / n_i at [j, i]
    values = total * adjusted_shares(whole, share, rates)
    predicted = weights @ used.sum(axis=1)  # (draws, C)
    areas = []
    for number, value in enumerate(values.tolist()):
        drawn = np.where(predicted > 0, weights @ used[:, number] / np.maximum(predicted, 1), rates[number]) @ share
        areas.append(interval(value, total * drawn, len(used)))
    return areas
