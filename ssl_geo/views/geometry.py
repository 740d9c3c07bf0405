"""Where a view lies in its chip: flip, rotation, shift, scale and resized crop as one warp of the view's pixels alone.

The plain recipe resamples the whole chip once for the rotation and once more for the crop. Both are affine, so here
they are multiplied into one 2×3 matrix, and a single `cv2.warpAffine` computes the pixels of the view and no others:
several times faster, and sharper, because every pixel is interpolated once instead of twice.

Drawing is apart from applying: `draw_geometry` turns uniform numbers into a `Geometry`, `view_matrix` turns that into
the matrix, `warp` applies it. A batched implementation elsewhere can use the same draws.

Interpolation is linear, as in the origin's recipe (albumentations' default); DINO's own crops are bicubic (arXiv
2104.14294, main_dino.py). Linear interpolation is a weighted mean: reflectance stays between its neighbours', with no
over- and undershoot around clouds, shores and nodata, and it costs a third. That there is only one interpolation
already keeps more of the detail than bicubic would after two. OpenCV rounds source coordinates to 1/32 pixel.

There is no filter against aliasing, as there is none in the origin: a global view at most keeps the chip's
resolution, a local view (0.4 of a 120 px chip shown on 56 px, times a scale of 0.9) reduces it by at most
1.5, or 1.8 along the longer side of a 4:3 box. Views much smaller than the ground they cover would want one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt
from albumentations.core.transforms_interface import BaseTransformInitSchema
from albumentations.core.type_definitions import Targets

Uniform = Callable[[], float]
"""A source of independent uniform numbers in [0, 1): `random.Random.random`, `iter(numbers).__next__` ..."""

Matrix = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): the view's pixel (u, v) shows the chip at x = a·u + b·v + c, y = d·u + e·v + f."""

Number = TypeVar("Number", bound=np.generic)

# Defaults of albumentations 1.x ShiftScaleRotate, which the origin's recipe uses as they are.
SHIFT_LIMIT = 0.0625  # share of width and height
SCALE_LIMIT = 0.1
ROTATE_LIMIT = 45.0  # degrees
CROP_ATTEMPTS = 10  # as in torchvision's and albumentations' RandomResizedCrop


class Geometry(NamedTuple):
    """How one view lies in its chip: the steps of the recipe, in the order in which they act on the chip.

    Attributes:
        horizontal_flip: Left becomes right.
        vertical_flip: Top becomes bottom.
        quarter_turns: Counter-clockwise rotations by 90° (0 to 3).
        shift: Translation (x, y) in pixels.
        zoom: Magnification about the centre.
        angle: Counter-clockwise rotation about the centre in degrees.
        box: Left, top, width and height in pixels of what is cropped and resized to the view.
    """

    horizontal_flip: bool
    vertical_flip: bool
    quarter_turns: int
    shift: tuple[float, float]
    zoom: float
    angle: float
    box: tuple[int, int, int, int]


def happens(uniform: Uniform, probability: float) -> bool:
    """Draw whether a step is taken; certain outcomes draw nothing (as in albumentations)."""
    return probability >= 1 or (probability > 0 and uniform() < probability)


def draw_box(
    uniform: Uniform, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop (Szegedy et al. 2015, arXiv 1409.4842; as torchvision and albumentations).

    Args:
        uniform: Source of random numbers; takes at most 22.
        height: Of the image to crop, in pixels.
        width: Of the image to crop, in pixels.
        scale: Least and greatest share of the image's area.
        ratio: Least and greatest width / height, drawn uniformly in the logarithm.

    Returns:
        Left, top, width and height in whole pixels. After ten boxes that do not fit: the largest centred box of an
        allowed ratio.
    """
    least, greatest = scale[0] * height * width, scale[1] * height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_ATTEMPTS):
        area = least + (greatest - least) * uniform()
        aspect = math.exp(low + (high - low) * uniform())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(uniform() * (height - h + 1)), int(uniform() * (width - w + 1))
            return left, top, w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def draw_geometry(
    uniform: Uniform,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    horizontal_flip: float,
    vertical_flip: float,
    rotate90: float,
    shift_scale_rotate: float,
) -> Geometry:
    """Draw how a view lies in its chip.

    Args:
        uniform: Source of random numbers; takes at most 31.
        height: Of the chip, in pixels.
        width: Of the chip, in pixels.
        scale: Least and greatest share of the chip's area that the view covers.
        ratio: Least and greatest width / height of the crop.
        horizontal_flip: Probability.
        vertical_flip: Probability.
        rotate90: Probability of a rotation by 0°, 90°, 180° or 270°, each alike.
        shift_scale_rotate: Probability of a shift of up to ±1/16, a scale of 0.9 to 1.1 and a rotation of up to ±45°.

    Returns:
        The steps drawn.
    """
    flips = happens(uniform, horizontal_flip), happens(uniform, vertical_flip)
    turns = int(uniform() * 4) if happens(uniform, rotate90) else 0
    if turns % 2:
        height, width = width, height
    shift, zoom, angle = (0.0, 0.0), 1.0, 0.0
    if happens(uniform, shift_scale_rotate):
        shift = width * SHIFT_LIMIT * (2 * uniform() - 1), height * SHIFT_LIMIT * (2 * uniform() - 1)
        zoom = 1 + SCALE_LIMIT * (2 * uniform() - 1)
        angle = ROTATE_LIMIT * (2 * uniform() - 1)
    return Geometry(*flips, turns, shift, zoom, angle, draw_box(uniform, height, width, scale, ratio))


def view_matrix(geometry: Geometry, height: int, width: int, size: tuple[int, int]) -> Matrix:
    """Multiply the steps of a geometry into one affine matrix from the view's pixels to the chip's.

    Args:
        geometry: The steps.
        height: Of the chip, in pixels.
        width: Of the chip, in pixels.
        size: Height and width of the view.

    Returns:
        The matrix; integer coordinates are the centres of pixels.
    """
    left, top, box_width, box_height = geometry.box
    step_x, step_y = box_width / size[1], box_height / size[0]
    cosine = math.cos(math.radians(geometry.angle)) / geometry.zoom
    sine = math.sin(math.radians(geometry.angle)) / geometry.zoom
    turned = (height, width) if geometry.quarter_turns % 2 == 0 else (width, height)
    centre_y, centre_x = (turned[0] - 1) / 2, (turned[1] - 1) / 2

    # The way back, from the last step to the first: (a, d) is one pixel to the right in the view, (b, e) one pixel
    # down, (c, f) its first pixel. Resize, crop, shift; scale and rotation about the centre:
    x = left + (step_x - 1) / 2 - geometry.shift[0] - centre_x
    y = top + (step_y - 1) / 2 - geometry.shift[1] - centre_y
    a, b, c = step_x * cosine, -step_y * sine, centre_x + cosine * x - sine * y
    d, e, f = step_x * sine, step_y * cosine, centre_y + sine * x + cosine * y
    # Quarter turns (numpy.rot90: row i, column j of the rotated shows row j, column W-1-i), then flips:
    if geometry.quarter_turns == 1:
        a, b, c, d, e, f = -d, -e, width - 1 - f, a, b, c
    elif geometry.quarter_turns == 2:
        a, b, c, d, e, f = -a, -b, width - 1 - c, -d, -e, height - 1 - f
    elif geometry.quarter_turns == 3:
        a, b, c, d, e, f = d, e, f, -a, -b, height - 1 - c
    if geometry.horizontal_flip:
        a, b, c = -a, -b, width - 1 - c
    if geometry.vertical_flip:
        d, e, f = -d, -e, height - 1 - f
    return a, b, c, d, e, f


def warp(
    image: npt.NDArray[Number],
    matrix: Matrix,
    size: tuple[int, int],
    *,
    interpolation: int = cv2.INTER_LINEAR,
    out: npt.NDArray[Number] | None = None,
) -> npt.NDArray[Number]:
    """Show an image through a matrix; beyond its edge it is mirrored (reflect 101).

    Args:
        image: (H, W) or (H, W, C), any number of channels.
        matrix: From the view's pixels to the image's.
        size: Height and width of the view.
        interpolation: Linear for values, `cv2.INTER_NEAREST` for classes and validity.
        out: Where to write; None: new memory.

    Returns:
        (h, w) or (h, w, C).
    """
    view: npt.NDArray[Number] = cv2.warpAffine(
        image,
        np.array((matrix[:3], matrix[3:]), np.float64),
        (size[1], size[0]),
        dst=out,
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return view.reshape(*size, *image.shape[2:])  # OpenCV drops a single channel's axis


def warp_valid(valid: npt.NDArray[np.bool_], matrix: Matrix, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Show validity (H, W) through a matrix: each pixel of the view takes the nearest chip pixel's, (h, w)."""
    return warp(valid.view(np.uint8), matrix, size, interpolation=cv2.INTER_NEAREST).view(np.bool_)


class ViewWarp(A.DualTransform):
    """All the geometry of a view as one transform of albumentations' kind, for use in `A.Compose`.

    Targets: image (linear) and mask (nearest), of any number of channels.

    Args:
        size: Height and width of the view in pixels.
        scale: Least and greatest share of the image's area that the view covers.
        ratio: Least and greatest width / height of the crop.
        horizontal_flip: Probability.
        vertical_flip: Probability.
        rotate90: Probability of a rotation by 0°, 90°, 180° or 270°, each alike.
        shift_scale_rotate: Probability; limits as `draw_geometry`.
        p: Probability of the whole transform; below 1 the other images keep their size.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    class InitSchema(BaseTransformInitSchema):
        """Types of the arguments, checked by albumentations."""

        size: tuple[int, int]
        scale: tuple[float, float]
        ratio: tuple[float, float]
        horizontal_flip: float
        vertical_flip: float
        rotate90: float
        shift_scale_rotate: float

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.4, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.5,
        rotate90: float = 1.0,
        shift_scale_rotate: float = 0.5,
        p: float = 1.0,
    ):
        super().__init__(p=p)
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.rotate90 = rotate90
        self.shift_scale_rotate = shift_scale_rotate

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the matrix with albumentations' own generator."""
        height, width = params["shape"][:2]
        geometry = draw_geometry(
            self.py_random.random,
            height,
            width,
            scale=self.scale,
            ratio=self.ratio,
            horizontal_flip=self.horizontal_flip,
            vertical_flip=self.vertical_flip,
            rotate90=self.rotate90,
            shift_scale_rotate=self.shift_scale_rotate,
        )
        return {"matrix": view_matrix(geometry, height, width, self.size)}

    def apply(self, img: npt.NDArray[np.float32], matrix: Matrix, **params: Any) -> npt.NDArray[np.float32]:
        """Warp the image."""
        return warp(img, matrix, self.size)

    def apply_to_mask(self, mask: npt.NDArray[Any], matrix: Matrix, **params: Any) -> npt.NDArray[Any]:
        """Warp the mask, of any integer type."""
        return warp(mask, matrix, self.size, interpolation=cv2.INTER_NEAREST)
