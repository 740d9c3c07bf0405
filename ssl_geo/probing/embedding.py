"""Principal components of a layer's features over a scene."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_geo.errors import UserError
from ssl_geo.probing.tiling import Axis, Model, ReadRows, any_within

SAMPLED_TILES = 256


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions in which features vary most.

    Attributes:
        mean: (D,) subtracted first.
        axes: (K, D) of length 1, by falling variance; the entry of greatest magnitude of each is positive.
        explained: (K,) share of the total variance.
    """

    mean: Tensor
    axes: Tensor
    explained: tuple[float, ...]

    def project(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) → components (B, K, h, w)."""
        centred = features - self.mean.to(features)[:, None, None]
        components: Tensor = torch.einsum("kd,bdhw->bkhw", self.axes.to(features), centred)
        return components


class EmptySceneError(UserError):
    """A scene has no pixel to embed; others of a batch are gone on with."""


def principal_components(samples: Iterable[npt.NDArray[np.floating]], count: int) -> PrincipalComponents:
    """Principal components of features, from their covariance.

    Args:
        samples: Features (N, D) in portions.
        count: K.

    Raises:
        EmptySceneError: Fewer than two samples in all.
        UserError: Fewer dimensions than components.
    """
    number, total, square = 0, np.zeros(()), np.zeros(())
    shift: npt.NDArray[np.float64] | None = None  # by the first portion's mean, against cancellation
    for portion in samples:
        rows = np.asarray(portion, np.float64)
        shift = rows.mean(axis=0) if shift is None and len(rows) else shift
        if shift is None:
            continue
        rows = rows - shift
        number, total, square = number + len(rows), total + rows.sum(axis=0), square + rows.T @ rows
    if shift is None or number < 2:
        raise EmptySceneError("fewer than 2 places have a valid pixel, and so no principal components (--data.nodata)")
    if count > len(shift):
        raise UserError(f"--components {count}: the layer has {len(shift)} channels; ask for so many at most")
    centre = total / number
    covariance = square / number - np.outer(centre, centre)
    variances, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1].T[:count]
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    explained = variances[::-1][:count].clip(0) / max(variances.clip(0).sum(), np.finfo(np.float64).tiny)
    mean = torch.from_numpy(shift + centre).float()
    return PrincipalComponents(mean, torch.from_numpy(axes.copy()).float(), tuple(float(share) for share in explained))


def sampled_features(
    read: ReadRows,
    model: Model,
    rows: Axis,
    columns: Axis,
    reduction: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield features (N, D) of the places with a valid pixel, of some hundred tiles spread evenly over a scene.

    Args:
        read: As for `blended`.
        model: Tiles (B, bands, h, w) → features (B, D, size, size).
        rows: Tiles along the scene's height.
        columns: Along its width.
        reduction: Pixels per place.
        batch_size: Tiles shown at once.
        device: Where to compute.
    """
    cells, side = rows.size, rows.size * reduction
    sparse = max(1, math.ceil(math.sqrt(len(rows.starts) * len(columns.starts) / SAMPLED_TILES)))
    for step in dict.fromkeys([sparse, 1]):  # all tiles where none of those was valid: the edge of a swath
        empty = True
        for top in rows.starts[step // 2 :: step] or rows.starts[:1]:
            image, valid = read(top * reduction)
            places = any_within(valid, reduction)
            chosen = columns.starts[step // 2 :: step] or columns.starts[:1]
            used = [left for left in chosen if places[:, left : left + cells].any()]
            empty = empty and not used
            for first in range(0, len(used), batch_size):
                part = used[first : first + batch_size]
                tiles = np.stack([image[:, :, left * reduction : left * reduction + side] for left in part])
                found = model(torch.from_numpy(tiles).to(device)).movedim(1, -1).cpu().numpy()
                yield found[np.stack([places[:, left : left + cells] for left in part])]
        if not empty:
            return
