"""Weights from files, never unpickled, and an input layer carried over from some bands to others."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_geo.errors import UserError

RGB = ("B04", "B03", "B02")  # the Sentinel-2 bands that red, green and blue filters suit


def adapt_input_weights(weight: Tensor, bands: Sequence[str], given_bands: Sequence[str] = RGB) -> Tensor:
    """Carry the filters of an input layer over to other bands, by name.

    A band that the layer knows keeps its own filter, any other gets the mean of all filters; all are scaled by
    (bands before) / (bands after). Standardized bands are much alike, so that what counts is a filter's response to an
    image that is the same in all bands, its sum over channels. It is kept: exactly where all or none of the known bands
    are among the new ones, else as far as the known filters are alike. timm's `adapt_input_conv` scales so, too, but
    repeats red, green and blue in turn whatever the bands are, and so loses that sum where C is no multiple of 3.

    Args:
        weight: (O, len(given_bands), k, k).
        bands: Names in the order wanted.
        given_bands: Names in the order of the weight's channels; by default red, green, blue.

    Returns:
        (O, len(bands), k, k).
    """
    assert weight.shape[1] == len(given_bands)
    mean = weight.mean(dim=1)
    channel = {band: weight[:, position] for position, band in enumerate(given_bands)}
    filters = torch.stack([channel.get(band, mean) for band in bands], dim=1)
    return filters * (len(given_bands) / len(bands))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a .safetensors file.

    Raises:
        UserError: No such file, or it is torn.
    """
    _must_exist(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error


def named_tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Find the weights in what `read_torch` read from `path`: on top, or under `state_dict`, `model` or `backbone`.

    Raises:
        UserError: There are none.
    """
    for key in ("state_dict", "model", "backbone"):
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no named tensors; it has {', '.join(map(str, content)) or 'nothing'}")
    return tensors


def read_torch(path: Path) -> dict[str, Any]:
    """Read what torch wrote with names on top: tensors and plain values alone, onto the CPU.

    Raises:
        UserError: No such file, or it is torn, or holds other than tensors and plain values.
    """
    _must_exist(path)
    try:
        if not zipfile.is_zipfile(path):  # anything else, such as a bare pickle, is not even opened
            raise zipfile.BadZipFile("not a readable file of tensors of torch 1.6 or later")
        check_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make zipfile and the unpickler fail in ways that no list is complete of
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is torn, or holds other than tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where named tensors were expected")
    return content


def check_whole(path: Path) -> None:
    """Compare every record of a file that torch wrote with its CRC-32, which `torch.load` does not.

    Raises:
        zipfile.BadZipFile: The file is torn or damaged.
    """
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise zipfile.BadZipFile("its records are compressed, as torch never writes them")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} does not have its checksum")


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder, a checkpoint or a file of weights")
