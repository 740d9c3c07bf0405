"""The multi-crop recipe: one chip in, a few large (global) and many small (local) standardized views out.

Caron et al. 2021, arXiv 2104.14294, section 3.1, and 2020, arXiv 2006.09882, section 3.3; for Sentinel-2 after this
project's origin, which adds channel-repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from ssl_geo.errors import UserError
from ssl_geo.views.geometry import Matrix, Uniform, ViewWarp, draw_geometry, happens, view_matrix, warp, warp_valid
from ssl_geo.views.photometry import (
    Blur,
    ChannelRepeat,
    Image,
    Solarize,
    Standardize,
    blur,
    draw_band,
    draw_blur,
    solarize,
)

Size = int | tuple[int, int]  # side, or height and width, in pixels
Range = tuple[float, float]

UNIFORMS_PER_VIEW = 40  # a view takes at most 2 (channel-repeat) + 31 (geometry) + 2 (blur) + 1 (solarize)


@dataclass(frozen=True)
class ViewRecipe:
    """How one view is made, in the order of its steps; standardizing comes last.

    Attributes:
        size: Height and width in pixels.
        channel_repeat: Probability that one random band is shown in all channels.
        horizontal_flip: Probability.
        vertical_flip: Probability; seen from above there is no up.
        rotate90: Probability of a rotation by 0°, 90°, 180° or 270°, each alike.
        shift_scale_rotate: Probability of a shift of up to ±1/16, a scale of 0.9 to 1.1 and a rotation of up to ±45°.
        scale: Least and greatest share of the chip's area that the view covers.
        ratio: Least and greatest width / height of what it covers.
        blur: Probability of a Gaussian blur 3 to 7 pixels wide.
        solarize: Probability of inverting what is brighter than reflectance 0.5.
    """

    size: tuple[int, int]
    scale: Range
    channel_repeat: float = 0.0
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    rotate90: float = 1.0
    shift_scale_rotate: float = 0.5
    ratio: Range = (3 / 4, 4 / 3)
    blur: float = 0.5
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(
                f"a view of {self.size[0]}×{self.size[1]} px: give --views.global_size, --views.local_size of 1 or more"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(
                f"views cover {self.scale} of a chip's area: give --views.global_scale, --views.local_scale as "
                "two shares, 0 < least <= greatest <= 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"views of ratio {self.ratio}: give two widths / heights, 0 < least <= greatest")
        for name in (
            "channel_repeat", "horizontal_flip", "vertical_flip", "rotate90", "shift_scale_rotate", "blur", "solarize",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--views.{name} is {getattr(self, name)}: give a probability from 0 to 1")

    def as_compose(self, mean: Sequence[float], std: Sequence[float]) -> A.Compose:
        """Spell the recipe out as a pipeline of albumentations: the same views, slower, open to other transforms.

        Args:
            mean: Reflectance of each band.
            std: Reflectance of each band.

        Returns:
            Takes image (H, W, C), filled where not valid (`fill_invalid`), and mask (H, W) uint8, 1 = valid.
        """
        return A.Compose(
            [
                ChannelRepeat(p=self.channel_repeat),
                ViewWarp(
                    self.size,
                    self.scale,
                    self.ratio,
                    self.horizontal_flip,
                    self.vertical_flip,
                    self.rotate90,
                    self.shift_scale_rotate,
                ),
                Blur(p=self.blur),
                Solarize(p=self.solarize),
                Standardize(mean, std),
            ]
        )


class ViewDraw(NamedTuple):
    """What chance decided for one view; with its recipe, all that is needed to make it.

    Attributes:
        band: The band shown in all channels; None: each in its own.
        matrix: From the view's pixels to the chip's.
        blur: Width of the Gaussian kernel in pixels; 0: none.
        solarize: Whether what is bright is inverted.
    """

    band: int | None
    matrix: Matrix
    blur: int
    solarize: bool


def draw_view(recipe: ViewRecipe, uniform: Uniform, bands: int, height: int, width: int) -> ViewDraw:
    """Draw one view of a chip with so many bands, of such height and width in pixels."""
    band = draw_band(uniform, bands) if happens(uniform, recipe.channel_repeat) else None
    geometry = draw_geometry(
        uniform,
        height,
        width,
        scale=recipe.scale,
        ratio=recipe.ratio,
        horizontal_flip=recipe.horizontal_flip,
        vertical_flip=recipe.vertical_flip,
        rotate90=recipe.rotate90,
        shift_scale_rotate=recipe.shift_scale_rotate,
    )
    return ViewDraw(
        band,
        view_matrix(geometry, height, width, recipe.size),
        draw_blur(uniform) if happens(uniform, recipe.blur) else 0,
        happens(uniform, recipe.solarize),
    )


class MultiCrop:
    """Make the views of a chip.

    What is computed is, for each view, `recipe.as_compose(mean, std)`. How: standardizing is affine in each band, and
    the warp and the blur take weighted means, so that it may as well come before them. It is done once for the chip,
    and then a pixel without data is 0, the mean, before and after. The two steps that do not commute with it,
    channel-repeat and solarize, are written for standardized values. A repeated band is warped and blurred alone and
    then put into all channels.

    Args:
        mean: Reflectance of each band, over the data in use.
        std: Reflectance of each band, over the data in use.
        global_views: Recipes of the views that the teacher sees too.
        local_views: Recipes of the others.

    Attributes:
        recipes: One a view, the global ones first.
        seconds: For each view whether it is every second of its kind: the second global view, the second local one, …;
            these may be made of another chip of the same place.

    Raises:
        UserError: Statistics that cannot be used, or no global view.
    """

    def __init__(
        self,
        mean: Sequence[float] | Image,
        std: Sequence[float] | Image,
        *,
        global_views: Sequence[ViewRecipe],
        local_views: Sequence[ViewRecipe] = (),
    ):
        self.mean = np.asarray(mean, np.float32)
        self.std = np.asarray(std, np.float32)
        self.recipes = (*global_views, *local_views)
        self.seconds = tuple(i % 2 == 1 for views in (global_views, local_views) for i in range(len(views)))
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape or self.mean.size == 0:
            raise UserError(
                f"statistics: {self.mean.size} means and {self.std.size} standard deviations; give one of each a band"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise UserError(
                f"statistics: mean {self.mean.tolist()}, std {self.std.tolist()}; give finite means and positive "
                "standard deviations, or leave out the band that is constant (--data.bands)"
            )
        if not global_views:
            raise UserError("no global view: DINO's teacher sees the global views, give at least one")
        self._white = (1 - 2 * self.mean) / self.std  # 1 - x, where x = std·z + mean, standardized is white - z
        self._standardizing = np.stack((1 / self.std, -self.mean / self.std))  # (x, 1) times this is standardized

    def draw(self, height: int, width: int, *, seed: int, epoch: int, chip: int) -> list[ViewDraw]:
        """Draw all views of a chip.

        The numbers of a view come from its own row of a table, filled row by row by a generator that (seed, epoch,
        chip) seeds: they depend on these three and the view's number, and on nothing else.

        Args:
            height: Of the chip, in pixels.
            width: Of the chip, in pixels.
            seed: Of the run; not negative.
            epoch: Counts from 0.
            chip: The chip's number in the index.

        Returns:
            One a recipe.
        """
        generator = np.random.default_rng((seed, epoch, chip))
        table = generator.random((len(self.recipes), UNIFORMS_PER_VIEW)).tolist()
        return [
            draw_view(recipe, iter(row).__next__, self.mean.size, height, width)
            for recipe, row in zip(self.recipes, table, strict=True)
        ]

    def __call__(
        self,
        dn: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        scale: float = 1.0,
        offset: float = 0.0,
        *,
        seed: int,
        epoch: int,
        chip: int,
        out: Sequence[Image] | None = None,
    ) -> list[Image]:
        """Make all views of a chip.

        Args:
            dn: (C, H, W) of any type, as stored; anything, NaN too, where not valid.
            valid: (H, W), True = usable.
            scale: Reflectance = (dn + offset) · scale.
            offset: In DN.
            seed: Of the run; not negative.
            epoch: Counts from 0.
            chip: The chip's number in the index.
            out: Where to write, (h, w, C) C-contiguous for each view, such as its place in a batch; None: new memory.

        Returns:
            Standardized views (C, h, w) float32, the global ones first; 0 where not valid. In memory the channels come
            last: so the warp writes them, and so convolutions like them (`torch.channels_last`).

        Raises:
            UserError: The chip has other bands than the statistics.
        """
        if out is None:
            out = [np.empty((*recipe.size, self.mean.size), np.float32) for recipe in self.recipes]
        self.make(dn, valid, scale, offset, self.draw(*valid.shape, seed=seed, epoch=epoch, chip=chip), out)
        return [view.transpose(2, 0, 1) for view in out]

    def make(
        self,
        dn: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        scale: float,
        offset: float,
        draws: Sequence[ViewDraw | None],
        out: Sequence[Image],
    ) -> None:
        """Make the views of a chip that have been drawn.

        Args:
            dn: As above, like the next three.
            valid: (H, W).
            scale: Of the chip.
            offset: Of the chip.
            draws: One a recipe; None: the view is left as it is.
            out: (h, w, C) C-contiguous, one a recipe.

        Raises:
            UserError: The chip has other bands than the statistics.
        """
        bands, height, width = dn.shape
        if bands != self.mean.size:
            raise UserError(
                f"a chip of {bands} bands, statistics of {self.mean.size}: give --data.bands as the index has them"
            )
        known = None if valid.all() else valid
        image = np.empty((height, width, bands), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # where not valid
            cv2.transpose(np.ascontiguousarray(dn, np.float32).reshape(bands, -1), dst=image.reshape(-1, bands))
            rows = image.reshape(height, -1)  # numpy is fast along rows of pixels, not along ten bands
            rows *= np.tile(scale / self.std, width)
            rows += np.tile((offset * scale - self.mean) / self.std, width)
        if known is not None:
            np.copyto(image, 0, where=~known[..., None])

        for view, draw in zip(out, draws, strict=True):
            if draw is None:
                continue
            if draw.band is None:
                _warp_and_blur(image, draw, view)
                if draw.solarize:
                    rows = view.reshape(len(view), -1)
                    solarize(rows, np.tile(self._white, view.shape[1]), out=rows)
            else:
                self._repeat_band(image, draw, view)
            if known is not None:
                np.copyto(view, 0, where=~warp_valid(known, draw.matrix, view.shape[:2])[..., None])

    def _repeat_band(self, image: Image, draw: ViewDraw, view: Image) -> None:
        """Show one band of a standardized chip (H, W, C) in all channels, with the statistics of each."""
        band = np.empty(view.shape[:2], np.float32)
        _warp_and_blur(np.ascontiguousarray(image[:, :, draw.band]), draw, band)
        band *= self.std[draw.band]
        band += self.mean[draw.band]
        if draw.solarize:
            solarize(band, out=band)
        np.matmul(cv2.merge([band, np.ones_like(band)]), self._standardizing, out=view)


def _warp_and_blur(image: Image, draw: ViewDraw, view: Image) -> None:
    """Write into a view, (h, w) or (h, w, C), what its draw shows of an image of as many channels."""
    warp(image, draw.matrix, view.shape[:2], out=view)
    if draw.blur:
        blur(view, draw.blur, out=view)


def default_recipes(
    chip_size: int,
    patch_size: int = 1,
    *,
    global_count: int = 2,
    local_count: int = 6,
    global_size: Size | None = None,
    local_size: Size | None = None,
    global_scale: Range = (0.4, 1.0),
    local_scale: Range = (0.05, 0.4),
    channel_repeat: float = 0.2,
    rotate90: bool = True,
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
    solarize: float = 0.2,
) -> tuple[list[ViewRecipe], list[ViewRecipe]]:
    """Build the recipes of DINO's views: one global, further globals with solarize, and locals.

    The origin's recipe is ``default_recipes(120, 8, channel_repeat=1.0, rotate90=False)``. Its first view always shows
    one band in all channels, which makes the teacher's target poorer in spectrum and learning much slower; the
    default does it to one chip in five.

    Args:
        chip_size: Side of the chips in pixels.
        patch_size: Of the backbone, in pixels; its views are multiples of it. 1: any size.
        global_count: Number of global views.
        local_count: Number of local views.
        global_size: Side, or height and width, in pixels; None: the chip's, rounded down to a multiple of the patch.
        local_size: Likewise; None: half of the chip's, rounded down.
        global_scale: Least and greatest share of the chip's area that a global view covers.
        local_scale: Likewise, a local view.
        channel_repeat: Probability that the first global view shows one random band in all channels.
        rotate90: Rotate by multiples of 90° and flip vertically, too.
        blur: Probability of blur in the first global view, further global views and local views.
        solarize: Probability of solarizing a further global view.

    Returns:
        Recipes of the global and of the local views.

    Raises:
        UserError: Numbers or sizes that are impossible.
    """
    if global_count < 1:
        raise UserError(f"{global_count} global views: give 1 or more; DINO's teacher sees the global views")
    if local_count < 0:
        raise UserError(f"--views.local_count is {local_count}: give 0 or more")
    vertical_flip, quarter_turns = (0.5, 1.0) if rotate90 else (0.0, 0.0)
    size = _view_size("global_size", global_size, chip_size, patch_size)
    further = ViewRecipe(
        size, global_scale, vertical_flip=vertical_flip, rotate90=quarter_turns, blur=blur[1], solarize=solarize
    )
    first = replace(further, channel_repeat=channel_repeat, blur=blur[0], solarize=0.0)
    global_views = [first] + [further] * (global_count - 1)
    if not local_count:
        return global_views, []
    size = _view_size("local_size", local_size, chip_size // 2, patch_size)
    local = replace(further, size=size, scale=local_scale, blur=blur[2], solarize=0.0)
    return global_views, [local] * local_count


def _view_size(setting: str, asked: Size | None, default: int, patch_size: int) -> tuple[int, int]:
    """Give height and width: as asked, or the default rounded down to a multiple of the patch size."""
    if asked is None:
        if default < patch_size:
            raise UserError(
                f"--views.{setting} would be {default} px, less than the backbone's patch of {patch_size} px: "
                "give larger chips (--data.chip_size) or a smaller patch"
            )
        return (default // patch_size * patch_size,) * 2
    size = (asked, asked) if isinstance(asked, int) else asked
    for side in size:
        if side < 1 or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            raise UserError(
                f"--views.{setting} is {side}: give a multiple of the backbone's patch size {patch_size}, "
                f"for example {below} or {below + patch_size}"
            )
    return size
