"""Random weights whose batch normalization has seen imagery: what normalizing alone is worth, and no learning.

Pretraining gives a network statistics of its imagery as well as weights. An untrained network whose batch normalization
still has means of 0 and variances of 1 is therefore too easy a rival.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

CHIPS = 256  # enough for means and variances


def chips_to_normalize(model: nn.Module, chips: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Draw the chips (N,) that a model's batch normalization is to see: always the same, none if it has none.

    A single chip is none: its deepest features may be one value, which has no variance.
    """
    if len(chips) < 2 or not any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        return chips[:0]
    return np.random.default_rng(0).permutation(chips)[:CHIPS]


def normalize(
    model: nn.Module,
    read_image: Callable[[int], npt.NDArray[np.float32]],
    chips: npt.NDArray[np.int64],
    *,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> nn.Module:
    """Give batch normalization the mean and variance of images, averaged over batches; no weight changes.

    Args:
        model: In eval mode, as it will be afterwards.
        read_image: Gives a chip's standardized image (C, H, W).
        chips: Their numbers; with none the statistics stay.
        batch_size: Images a batch; the last ones are spread, as a batch of one image may have no variance.
        device: Where the model is.

    Returns:
        The model.
    """
    if len(chips):  # without images it would forget what it has seen
        batches = np.array_split(chips, max(1, len(chips) // max(2, batch_size)))
        images = (torch.from_numpy(np.stack([read_image(int(chip)) for chip in batch])) for batch in batches)
        update_bn(tqdm(images, "batch normalization", len(batches), unit="batch"), model, device)
    return model
