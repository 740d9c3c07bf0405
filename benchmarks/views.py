"""Views of a chip on one core, against the origin's recipe written plainly with albumentations.

    python benchmarks/views.py [--chips 400]

Both make 2 global views of 120 and 6 local views of 56 pixels of chips of ten bands, and end in a batch of eight chips:
ours are written there, the plain ones are stacked. The floor is told beside: the warps alone, with their draws.
"""

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from paired import compare, finish, numbers

from ssl_geo.views.geometry import warp
from ssl_geo.views.multicrop import MultiCrop, ViewRecipe, default_recipes
from ssl_geo.views.photometry import ChannelRepeat

BANDS, SIDE, CHIPS = 10, 120, 8  # chips a turn


def plain(recipe: ViewRecipe, mean: np.ndarray, std: np.ndarray) -> A.Compose:
    """One transform a step, as the origin has it, in albumentations 2.0.8.

    Some of its defaults have changed since; the mirrored edge and the blur 3 to 7 pixels wide are those the origin had.
    """
    return A.Compose(
        [
            ChannelRepeat(p=recipe.channel_repeat),
            A.HorizontalFlip(p=recipe.horizontal_flip),
            A.Affine(  # ShiftScaleRotate, by the name it has there
                scale=(0.9, 1.1),
                translate_percent=(-0.0625, 0.0625),
                rotate=(-45, 45),
                keep_ratio=True,
                border_mode=cv2.BORDER_REFLECT_101,
                p=recipe.shift_scale_rotate,
            ),
            A.RandomResizedCrop(recipe.size, scale=recipe.scale, ratio=recipe.ratio),
            A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(1.1, 1.1), p=recipe.blur),
            A.Solarize(threshold_range=(0.5, 0.5), p=recipe.solarize),
            A.Normalize(mean=mean.tolist(), std=std.tolist(), max_pixel_value=1.0),
            ToTensorV2(),
        ]
    )


def main() -> None:
    """Time both and print the figures."""
    rounds = numbers(__doc__, chips=400).chips // CHIPS
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    chip = rng.gamma(2.0, 0.1, (BANDS, SIDE, SIDE)).astype(np.float32).clip(0, 1)
    mean, std = chip.mean((1, 2)), chip.std((1, 2))
    global_views, local_views = default_recipes(SIDE, 8, channel_repeat=1.0, rotate90=False)
    crops = MultiCrop(mean, std, global_views=global_views, local_views=local_views)
    pipelines = [plain(recipe, mean, std) for recipe in crops.recipes]
    image, valid = np.ascontiguousarray(chip.transpose(1, 2, 0)), np.ones((SIDE, SIDE), bool)

    def ours(number: int) -> object:
        batch = [torch.empty((CHIPS, *recipe.size, BANDS)) for recipe in crops.recipes]
        memory = [views.numpy() for views in batch]
        for i in range(CHIPS):
            crops(chip, valid, seed=0, epoch=number, chip=i, out=[views[i] for views in memory])
        return batch

    def theirs(number: int) -> object:
        chips = [[pipeline(image=image)["image"] for pipeline in pipelines] for _ in range(CHIPS)]
        return [torch.stack(views) for views in zip(*chips, strict=True)]

    def warps(number: int) -> None:
        for i in range(CHIPS):
            draws = crops.draw(SIDE, SIDE, seed=0, epoch=number, chip=i)
            for recipe, draw in zip(crops.recipes, draws, strict=True):
                warp(image if draw.band is None else chip[draw.band], draw.matrix, recipe.size)

    pair, floor = compare(ours, theirs, rounds), compare(ours, warps, rounds)
    finish(
        "views",
        pair.ratio,
        8.0,
        ms_a_chip=round(1e3 * pair.ours / CHIPS, 3),
        ms_a_chip_plain=round(1e3 * pair.peer / CHIPS, 3),
        ms_a_chip_warps_alone=round(1e3 * floor.peer / CHIPS, 3),
        share_of_warps=round(floor.ratio, 2),
        mb_a_chip_written=round(4e-6 * BANDS * sum(recipe.size[0] * recipe.size[1] for recipe in crops.recipes), 2),
        chips=rounds * CHIPS,
        opencv=cv2.__version__,
    )


if __name__ == "__main__":
    main()
