"""The same views in batched torch operations, for a device that takes chips as stored and has cores to spare.

`MultiCrop` makes a chip's views one after another on the CPU; here all chips of a batch get their first view, then
their second. Recipes and draws are those of a `MultiCrop`, so that both show the same places and do the same to them.
They differ in rounding: OpenCV rounds source coordinates to 1/32 pixel, torch does not, so that a value may differ
by what 1/64 pixel in x and in y changes of it.

What goes to the device is less than the views, too: with two views of 120 px and six of 56 of a chip of 120 px in
uint16, a sixth of their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_geo.views.multicrop import MultiCrop, ViewDraw, ViewRecipe

# OpenCV's fixed kernels for a width and no sigma (`photometry.blur`), widths 1 (none), 3, 5 and 7 by row.
KERNELS = (
    (0, 0, 0, 1, 0, 0, 0),
    (0, 0, 1 / 4, 2 / 4, 1 / 4, 0, 0),
    (0, 1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16, 0),
    (2 / 64, 7 / 64, 14 / 64, 18 / 64, 14 / 64, 7 / 64, 2 / 64),
)
REACH = 3  # pixels to either side of a kernel's centre


class ChipBatch(NamedTuple):
    """Chips as stored, and what chance decided for their views.

    Attributes:
        dn: (B, C, H, W), an integer type or float32; anything, NaN too, where not valid. After the B chips of the batch
            there may be others, which `second` names.
        valid: (B, H, W) bool, True = usable.
        scale: (B,) float32, reflectance = (dn + offset) · scale.
        offset: (B,) float32, in DN.
        draws: (B, V, 9) float64, `draw_table` of each chip.
        second: (B,) int64, the chip that every second view shows (`MultiCrop.seconds`); None: the same as the others.
    """

    dn: Tensor
    valid: Tensor
    scale: Tensor
    offset: Tensor
    draws: Tensor
    second: Tensor | None = None


def draw_table(draws: Sequence[ViewDraw]) -> npt.NDArray[np.float64]:
    """Put the draws of a chip's views into numbers, (V, 9): band or -1, the matrix, width of the blur, solarize."""
    return np.array(
        [(-1 if draw.band is None else draw.band, *draw.matrix, draw.blur, draw.solarize) for draw in draws], np.float64
    )


class BatchedMultiCrop:
    """Make the views of a batch of chips on a device.

    Args:
        crops: Whose recipes and statistics.
        device: Where.
    """

    def __init__(self, crops: MultiCrop, device: torch.device | str):
        self.device = torch.device(device)
        self.recipes, self.seconds = crops.recipes, crops.seconds
        self.mean = torch.from_numpy(crops.mean).to(self.device)[:, None, None]
        self.std = torch.from_numpy(crops.std).to(self.device)[:, None, None]
        self.kernels = torch.tensor(KERNELS, device=self.device)
        self.axes = {recipe: self._axes(recipe) for recipe in self.recipes}

    @torch.no_grad()
    def __call__(self, chips: ChipBatch) -> list[Tensor]:
        """Make all views.

        Args:
            chips: On any device; from pinned memory they are copied while this goes on.

        Returns:
            Standardized views (B, C, h, w) float32 on the device, the global ones first; 0 where not valid.
        """
        dn, valid, scale, offset, draws = (part.to(self.device, non_blocking=True) for part in chips[:5])
        scale, offset = scale[:, None, None, None], offset[:, None, None, None]
        image = torch.addcmul((offset * scale - self.mean) / self.std, dn.float(), scale / self.std)
        image = image.where(valid[:, None], 0)
        first = second = (image[: len(draws)], valid[: len(draws)])
        if chips.second is not None:
            of = chips.second.to(self.device, non_blocking=True)
            second = (image[of], valid[of])
        return [
            self._view(*(second if is_second else first), recipe, draws[:, i])
            for i, (recipe, is_second) in enumerate(zip(self.recipes, self.seconds, strict=True))
        ]

    def _axes(self, recipe: ViewRecipe) -> list[Tensor]:
        """Rows and columns of a view, mirrored at its edge (reflect 101) as far as its blur looks."""
        rim = REACH if recipe.blur else 0
        positions = (np.pad(np.arange(side, dtype=np.float64), rim, mode="reflect") for side in recipe.size)
        return [torch.from_numpy(along).to(self.device) for along in positions]

    def _view(self, image: Tensor, valid: Tensor, recipe: ViewRecipe, draws: Tensor) -> Tensor:
        """Make one view of each standardized chip (B, C, H, W)."""
        band, matrix, width, solarized = draws[:, 0].long(), draws[:, 1:7], draws[:, 7].long(), draws[:, 8] > 0
        solarized = solarized[:, None, None, None]
        x, y = source(matrix, *self.axes[recipe])

        def shown(image: Tensor) -> Tensor:
            view = sample(image, x, y)
            return blur(view, self.kernels[width // 2]) if recipe.blur else view

        if recipe.channel_repeat < 1:
            view = shown(image)
            if recipe.solarize:
                white = (1 - 2 * self.mean) / self.std  # as in MultiCrop
                view = view.where(~solarized, torch.minimum(view, white - view))
        if recipe.channel_repeat > 0:  # one band alone, then in all channels with the statistics of each
            of = band.clamp(min=0)
            plane = shown(image.take_along_dim(of[:, None, None, None], 1)) * self.std[of, None] + self.mean[of, None]
            if recipe.solarize:
                plane = plane.where(~solarized, torch.minimum(plane, 1 - plane))
            repeated = (plane - self.mean) / self.std
            view = repeated if recipe.channel_repeat >= 1 else repeated.where((band >= 0)[:, None, None, None], view)
        inner = slice(REACH, -REACH) if recipe.blur else slice(None)
        return view.where(sample_valid(valid, x[:, inner, inner], y[:, inner, inner])[:, None], 0)


def source(matrix: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Where views lie in their chips: x and y, (B, h, w), of rows (h,) and columns (w,) through matrices (B, 6)."""
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    rows = rows[:, None]
    return a * columns + b * rows + c, d * columns + e * rows + f


def sample(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolate images (B, C, H, W) linearly at x and y (B, h, w), mirrored at the edge, (B, C, h, w)."""
    height, width = image.shape[2:]
    # grid_sample counts from -1 at the first pixel's centre to 1 at the last one's.
    grid = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)
    return F.grid_sample(image, grid.to(image.dtype), padding_mode="reflection", align_corners=True)


def sample_valid(valid: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Take the validity (B, H, W) of the nearest pixel at x and y (B, h, w), (B, h, w)."""
    rows, columns = (mirror((at + 0.5).floor().long(), n) for at, n in zip((y, x), valid.shape[1:], strict=True))
    return valid.flatten(1).gather(1, (rows * valid.shape[2] + columns).flatten(1)).view(x.shape)


def mirror(position: Tensor, count: int) -> Tensor:
    """Bring positions beyond 0 to count - 1 back, mirrored at the first and last (reflect 101)."""
    period = max(2 * (count - 1), 1)
    position = position.remainder(period)
    return torch.minimum(position, period - position)


def blur(image: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image (B, C, h + 6, w + 6) along both axes with its own kernel (B, 7), (B, C, h, w)."""
    batch, bands, height, width = image.shape
    kernels = kernels.repeat_interleave(bands, 0)[:, None]
    planes = image.reshape(1, batch * bands, height, width)
    planes = F.conv2d(planes, kernels[:, :, :, None], groups=batch * bands)
    planes = F.conv2d(planes, kernels[:, :, None, :], groups=batch * bands)
    return planes.view(batch, bands, height - 2 * REACH, width - 2 * REACH)
