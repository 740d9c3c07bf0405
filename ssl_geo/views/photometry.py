"""What a view does to values: channel-repeat, blur, solarize, standardizing. All in float32, nothing is clipped.

Reflectance above 1 exists (cloud, snow, sun glint), and so does reflectance a little below 0. albumentations 2.0.8
clips float images to [0, 1] in its GaussianBlur and Solarize, which would turn a cloud into a flat white; the
transforms here are of its kind, with the same draws, without the clip.

Images are (H, W, C) here, as in albumentations and OpenCV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt
from albumentations.core.transforms_interface import BaseTransformInitSchema

from ssl_geo.errors import UserError
from ssl_geo.views.geometry import Uniform

Image = npt.NDArray[np.float32]

# albumentations 1.x GaussianBlur, which the origin's recipe uses as it is: a width drawn from 3 to 7, an even one made
# odd by adding one. Sigma follows from the width as in OpenCV, 0.3·((width - 1)/2 - 1) + 0.8: 0.8, 1.1, 1.4 pixels,
# with OpenCV's fixed kernels 1 2 1 / 4, 1 4 6 4 1 / 16 and 2 7 14 18 14 7 2 / 64.
BLUR_WIDTHS = (3, 5, 5, 7, 7)

_GREATEST = np.float32(1e6)  # reflectance of a valid pixel, see `ssl_geo.imagery.scenes.MEASURABLE`


def draw_band(uniform: Uniform, bands: int) -> int:
    """Draw the position of one of `bands` bands, each alike."""
    return int(uniform() * bands)


def draw_blur(uniform: Uniform) -> int:
    """Draw the width of a Gaussian kernel in pixels: 3, 5 or 7 with probability 1/5, 2/5, 2/5."""
    return BLUR_WIDTHS[int(uniform() * len(BLUR_WIDTHS))]


def repeat_band(image: Image, band: int) -> Image:
    """Show one band of an image (H, W, C) in all its channels."""
    return np.repeat(image[:, :, band : band + 1], image.shape[2], axis=2)


def blur(image: Image, width: int, *, out: Image | None = None) -> Image:
    """Convolve with a Gaussian kernel `width` pixels wide, mirrored at the edge (reflect 101).

    Args:
        image: (H, W) or (H, W, C).
        width: Odd; sigma = 0.3·((width - 1)/2 - 1) + 0.8 pixels.
        out: Where to write, the image itself if you like; None: new memory.

    Returns:
        The same shape.
    """
    blurred: Image = cv2.GaussianBlur(image, (width, width), 0, dst=out)
    return blurred.reshape(image.shape)  # OpenCV drops a single channel's axis


def solarize(image: Image, white: float | Image = 1.0, *, out: Image | None = None) -> Image:
    """Invert what is bright: x from white / 2 upward becomes white - x, which is the lesser of the two everywhere.

    Within [0, 1] that is the usual solarizing with threshold 0.5. Above 1 the line simply goes on: a cloud of
    reflectance 1.2 becomes -0.2. Clipped at 0, all that is brighter than white would be one flat black; so it keeps its
    texture and stays apart from what was white, and standardized values are negative for dark ground anyway.

    Args:
        image: Any shape, in reflectance, or standardized and `white` too.
        white: Twice the value from which on to invert; broadcasts with the image.
        out: Where to write, the image itself if you like; None: new memory.

    Returns:
        The same shape.
    """
    return np.minimum(image, np.subtract(white, image, dtype=np.float32), out=out)


def fill_invalid(image: Image, valid: npt.NDArray[np.bool_], mean: Sequence[float] | Image) -> Image:
    """Put each band's mean where there is no data, so that no interpolation or blur draws dark ground from there.

    Args:
        image: (H, W, C) reflectance; anything, NaN too, where not valid.
        valid: (H, W), True = usable.
        mean: Reflectance of each band.

    Returns:
        (H, W, C), the image itself where all is valid.
    """
    if valid.all():
        return image
    filled = image.copy()
    np.copyto(filled, np.asarray(mean, np.float32), where=~valid[..., None])
    return filled


def standardize_chip(
    reflectance: Image,
    valid: npt.NDArray[np.bool_],
    mean: Sequence[float] | Image,
    std: Sequence[float] | Image,
) -> Image:
    """Standardize a whole chip, channels first, as a backbone takes it outside of training.

    Args:
        reflectance: (C, H, W); anything, NaN too, where not valid.
        valid: (H, W), True = usable.
        mean: (C,) reflectance.
        std: (C,) reflectance.

    Returns:
        (C, H, W) float32, finite; 0, the mean, where not valid.

    Raises:
        UserError: Standardizing with these statistics does not give finite numbers.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    with np.errstate(all="ignore"):
        greatest = (np.abs(mean) + _GREATEST) / std
    if not (np.isfinite(greatest) & np.isfinite(std) & (std > 0)).all():
        raise UserError(
            f"statistics: mean {mean.tolist()}, std {std.tolist()}; standardizing takes finite means and positive "
            "standard deviations: the file that holds them is damaged, take another checkpoint or head"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # where not valid
        result: Image = reflectance - mean[:, None, None]
        result /= std[:, None, None]
    if not valid.all():
        np.copyto(result, 0, where=~valid)
    return result


def standardize(
    image: Image,
    mean: Sequence[float] | Image,
    std: Sequence[float] | Image,
    valid: npt.NDArray[np.bool_] | None = None,
) -> Image:
    """Subtract the mean and divide by the standard deviation of each channel; 0, the mean, where not valid.

    A repeated band is standardized with the statistics of the channel it stands in, as in the origin's recipe.

    Args:
        image: (H, W, C) reflectance.
        mean: Of each channel.
        std: Of each channel.
        valid: (H, W), True = usable; None: everywhere.

    Returns:
        (H, W, C) standardized.
    """
    result = image - np.asarray(mean, np.float32)
    result /= np.asarray(std, np.float32)
    if valid is not None:
        result[~valid] = 0
    return result


class ChannelRepeat(A.ImageOnlyTransform):
    """Show one random band in all channels (the origin's `Channelaug`): what is left is structure, not spectrum.

    Args:
        p: Probability.
    """

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the band with albumentations' own generator."""
        return {"band": draw_band(self.py_random.random, params["shape"][2])}

    def apply(self, img: Image, band: int, **params: Any) -> Image:
        """Repeat the band."""
        return repeat_band(img, band)


class Blur(A.ImageOnlyTransform):
    """Gaussian blur 3 to 7 pixels wide, as in albumentations 1.x, without clipping.

    Args:
        p: Probability.
    """

    def get_params(self) -> dict[str, Any]:
        """Draw the width with albumentations' own generator."""
        return {"width": draw_blur(self.py_random.random)}

    def apply(self, img: Image, width: int, **params: Any) -> Image:
        """Blur the image."""
        return blur(img, width)


class Solarize(A.ImageOnlyTransform):
    """Invert what is bright, from reflectance 0.5 upward, without clipping; see `solarize`.

    Args:
        p: Probability.
    """

    def apply(self, img: Image, **params: Any) -> Image:
        """Solarize the image."""
        return solarize(img)


class Standardize(A.ImageOnlyTransform):
    """Standardize each channel; 0 wherever the sample's `mask`, if it has one, says not valid.

    Args:
        mean: Reflectance of each channel.
        std: Reflectance of each channel.
        p: Probability.
    """

    class InitSchema(BaseTransformInitSchema):
        """Types of the arguments, checked by albumentations."""

        mean: Sequence[float]
        std: Sequence[float]

    def __init__(self, mean: Sequence[float], std: Sequence[float], p: float = 1.0):
        super().__init__(p=p)
        self.mean = mean
        self.std = std

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Take the sample's validity along."""
        mask = data.get("mask")
        return {"valid": None if mask is None else mask.astype(np.bool_)}

    def apply(self, img: Image, valid: npt.NDArray[np.bool_] | None, **params: Any) -> Image:
        """Standardize the image."""
        return standardize(img, self.mean, self.std, valid)
