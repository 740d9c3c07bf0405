"""Overlapping tiles over a scene of any size, blended so that no seam shows, row of tiles by row of tiles.

A tile's weight at a pixel is the product of one along each axis. Along an axis it is 0 in the outermost quarter of the
overlap, where a network sees the tile's edge, rises along a raised cosine (Hann) in the middle half, and is 1 from
there on; at the scene's own border there is nothing to blend with and no ramp. Divided by their sum the weights
add up to 1 everywhere, so what all tiles agree on comes out as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_geo.errors import UserError

Floats = npt.NDArray[np.float32]

# First row in pixels -> standardized rows (bands, size, W), 0 where not valid, and valid (size, W).
ReadRows = Callable[[int], tuple[Floats, npt.NDArray[np.bool_]]]
Model = Callable[[Tensor], Tensor]


class NotFiniteError(UserError):
    """The network makes NaN or infinity of pixels that are valid."""

    def __init__(self, where: str = "") -> None:
        super().__init__(
            f"the network makes NaN or infinity of pixels that are valid{where}: its weights diverged or are damaged; "
            "give the --head of another checkpoint"
        )


@dataclass(frozen=True)
class Axis:
    """Where tiles lie along one axis, in cells: pixels, or places of a layer's features.

    Attributes:
        length: Cells of the scene, at least the size of a tile.
        size: Cells of a tile.
        starts: First cell of each tile; the last tile ends where the scene does.
        weights: (tiles, size), adding up to 1 at every cell.
    """

    length: int
    size: int
    starts: tuple[int, ...]
    weights: Floats


def lay_tiles(length: int, size: int, overlap: float) -> Axis:
    """Lay tiles along an axis, the last one moved inwards.

    Args:
        length: Cells of the scene; a shorter one than a tile is taken as long as that.
        size: Cells of a tile.
        overlap: Share of a tile that it has in common with the next, at least; 0 to 0.5.
    """
    length = max(length, size)
    common = min(math.ceil(overlap * size), size // 2)
    count = 1 + math.ceil((length - size) / (size - common))
    starts = tuple(min(number * (size - common), length - size) for number in range(count))
    margin = common // 4
    ramp = np.ones(size)
    ramp[:margin] = 0
    rise = common - 2 * margin
    ramp[margin : margin + rise] = np.sin(np.pi / 2 * (np.arange(rise) + 0.5) / rise) ** 2
    weights = np.ones((count, size))
    weights[1:] *= ramp
    weights[:-1] *= ramp[::-1]
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    normed = [weight / total[start : start + size] for start, weight in zip(starts, weights, strict=True)]
    return Axis(length, size, starts, np.asarray(normed, np.float32))


@torch.inference_mode()
def blended(
    read: ReadRows,
    model: Model,
    rows: Axis,
    columns: Axis,
    channels: int,
    *,
    reduction: int = 1,
    batch_size: int = 32,
    device: torch.device | None = None,
) -> Iterator[tuple[int, Tensor, npt.NDArray[np.bool_]]]:
    """Show every tile with a valid pixel to a model and blend what it says.

    What is held at a time are the rows of one row of tiles, whatever the scene's height.

    Args:
        read: Gives the rows of one row of tiles; asked once for each, from the top.
        model: Tiles (B, bands, h, w) → values (B, K, size, size) in cells.
        rows: Tiles along the scene's height.
        columns: Along its width.
        channels: K.
        reduction: Pixels per cell.
        batch_size: Tiles shown at once.
        device: Where to compute.

    Yields:
        First row in cells; finished values (K, rows, W) on the device, 0 where no tile with a valid pixel lies, which
        the next yield overwrites; valid (rows, W) in pixels.

    Raises:
        NotFiniteError: The model's values are not finite, although what it is shown is.
    """
    place = device or torch.device("cpu")
    side = rows.size * reduction
    sums = torch.zeros(channels, rows.size, columns.length, device=place)
    across = torch.from_numpy(columns.weights).to(place)
    down = torch.from_numpy(rows.weights).to(place)
    for number, top in enumerate(rows.starts):
        image, valid = read(top * reduction)
        used = [
            position
            for position, left in enumerate(columns.starts)
            if valid[:, left * reduction : left * reduction + side].any()
        ]
        for first in range(0, len(used), batch_size):
            part = used[first : first + batch_size]
            lefts = [columns.starts[position] for position in part]
            tiles = np.stack([image[:, :, left * reduction : left * reduction + side] for left in lefts])
            values = model(torch.from_numpy(tiles).to(place))
            values = values * (down[number][:, None] * across[part][:, None, None, :])
            for left, value in zip(lefts, values, strict=True):
                sums[:, :, left : left + columns.size] += value
        last = number + 1 == len(rows.starts)
        finished = (rows.length if last else rows.starts[number + 1]) - top
        if not bool(sums[:, :finished].isfinite().all()):
            raise NotFiniteError(f", first in rows {top * reduction} to {(top + finished) * reduction}")
        yield top, sums[:, :finished], valid[: finished * reduction]
        if not last:
            kept = sums[:, finished:].clone()
            sums[:, : rows.size - finished] = kept
            sums[:, rows.size - finished :] = 0


def any_within(valid: npt.NDArray[np.bool_], reduction: int) -> npt.NDArray[np.bool_]:
    """Whether a cell holds a valid pixel: (H, W) in pixels, whole cells → (H / reduction, W / reduction)."""
    height, width = valid.shape
    cells = valid.reshape(height // reduction, reduction, width // reduction, reduction)
    return np.asarray(cells.any(axis=(1, 3)))
