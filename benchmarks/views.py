"""Chips a second of the views on one core, against the origin's recipe written plainly with albumentations.

    python benchmarks/views.py [--chips 200]

Both make 2 global views of 120 and 6 local views of 56 pixels of a chip of ten bands, in turn; the headline is the
median of the ratios of neighbouring pairs, which holds on a machine whose speed drifts. Prints one JSON object.
"""

import argparse
import json
import platform
import statistics
import time

import albumentations as A
import cv2
import numpy as np

from ssl_geo.views.multicrop import MultiCrop, ViewRecipe, default_recipes
from ssl_geo.views.photometry import ChannelRepeat

BANDS, SIDE = 10, 120


def plain(recipe: ViewRecipe, mean: np.ndarray, std: np.ndarray) -> A.Compose:
    """One transform a step, as the origin has it, in albumentations 2.0.8 (whose blur and solarize clip to [0, 1])."""
    return A.Compose(
        [
            ChannelRepeat(p=recipe.channel_repeat),
            A.HorizontalFlip(p=recipe.horizontal_flip),
            A.Affine(
                scale=(0.9, 1.1),
                translate_percent=(-0.0625, 0.0625),
                rotate=(-45, 45),
                border_mode=cv2.BORDER_REFLECT_101,
                p=recipe.shift_scale_rotate,
            ),
            A.RandomResizedCrop(recipe.size, scale=recipe.scale, ratio=recipe.ratio),
            A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(1.1, 1.1), p=recipe.blur),
            A.Solarize(threshold_range=(0.5, 0.5), p=recipe.solarize),
            A.Normalize(mean=mean.tolist(), std=std.tolist(), max_pixel_value=1.0),
        ]
    )


def main() -> None:
    """Time both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, default=200)
    chips = parser.parse_args().chips
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    chip = rng.gamma(2.0, 0.1, (BANDS, SIDE, SIDE)).astype(np.float32).clip(0, 1)
    mean, std = chip.mean((1, 2)), chip.std((1, 2))
    global_views, local_views = default_recipes(SIDE, 8, channel_repeat=1.0, rotate90=False)
    crops = MultiCrop(mean, std, global_views=global_views, local_views=local_views)
    pipelines = [plain(recipe, mean, std) for recipe in crops.recipes]
    image, valid = np.ascontiguousarray(chip.transpose(1, 2, 0)), np.ones((SIDE, SIDE), bool)

    ours, theirs = [], []
    for number in range(chips + 10):
        began = time.perf_counter()
        crops(chip, valid, seed=0, epoch=0, chip=number)
        between = time.perf_counter()
        for pipeline in pipelines:
            np.ascontiguousarray(pipeline(image=image)["image"].transpose(2, 0, 1))
        if number >= 10:  # warm
            ours.append(between - began)
            theirs.append(time.perf_counter() - between)
    ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
    print(
        json.dumps(
            {
                "benchmark": "views",
                "ratio": round(ratio, 2),
                "ms_a_chip": round(1e3 * statistics.median(ours), 3),
                "ms_a_chip_plain": round(1e3 * statistics.median(theirs), 3),
                "chips": chips,
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "python": platform.python_version(),
                },
                "opencv": cv2.__version__,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
