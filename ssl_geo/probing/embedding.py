"""Principal components of a layer's features over scenes: one basis for all of them, kept in a file.

BASIS.safetensors holds the tensors of `PrincipalComponents`; its metadata: ``format`` 1, ``layer``, ``backbone`` (a
digest), ``checkpoint`` (for people), ``made_from``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssl_geo.errors import UserError
from ssl_geo.files import written_whole
from ssl_geo.probing.tiling import Axis, Model, NotFiniteError, ReadRows, any_within
from ssl_geo.weights import read_tensors

FORMAT = "1"
SAMPLED_TILES = 256
_SHOWN = (2, 98)  # percentiles
_MOST_KEPT = 4096  # samples that these are of


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions in which features vary most.

    Attributes:
        mean: (D,) subtracted first.
        axes: (K, D) of length 1, by falling variance; the entry of greatest magnitude of each is positive.
        low: (K,) what a display shows darkest, so that the same feature has the same colour: percentile 2.
        high: (K,) what it shows brightest: percentile 98.
        explained: (K,) share of the total variance.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor
    explained: Tensor

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
    kept, step = np.empty((0, 0)), 1  # of all samples every step-th
    shift: npt.NDArray[np.float64] | None = None  # by the first portion's mean, against cancellation
    for portion in samples:
        rows = np.asarray(portion, np.float64)
        shift = rows.mean(axis=0) if shift is None and len(rows) else shift
        if shift is None:
            continue
        rows = rows - shift
        number, total, square = number + len(rows), total + rows.sum(axis=0), square + rows.T @ rows
        kept = np.concatenate([kept.reshape(-1, len(shift)), rows[::step]])
        while len(kept) > _MOST_KEPT:
            kept, step = kept[::2], 2 * step
    if shift is None or number < 2:
        raise EmptySceneError("fewer than 2 places have a valid pixel, and so no principal components (--data.nodata)")
    if count > len(shift):
        raise UserError(f"--components {count}: the layer has {len(shift)} channels; ask for so many at most")
    centre = total / number
    covariance = square / number - np.outer(centre, centre)
    variances, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1].T[:count]
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    variances = variances.clip(0)
    explained = variances[::-1][:count] / max(variances.sum(), np.finfo(np.float64).tiny)
    low, high = np.percentile((kept - centre) @ axes.T, _SHOWN, axis=0)
    found = (shift + centre, axes.copy(), low, high, explained)
    return PrincipalComponents(*(torch.from_numpy(values).float() for values in found))


def save_basis(path: Path, components: PrincipalComponents, about: Mapping[str, str]) -> None:
    """Write components for use with other scenes.

    Args:
        path: The file to write, in a folder that exists.
        components: The basis.
        about: ``layer``, ``backbone``, ``checkpoint``, ``made_from``.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with written_whole(path) as partial:
            save_file(vars(components), partial, {"format": FORMAT, **about})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be written ({error}); make room, or name another --out") from error


def load_basis(path: Path) -> tuple[PrincipalComponents, dict[str, str]]:
    """Read what `save_basis` wrote: the components, and what it was told about them.

    Raises:
        UserError: No such file, or it is torn or another.
    """
    tensors = read_tensors(path)
    with safe_open(path, "np") as file:
        about = dict(file.metadata() or {})
    axes = tensors.get("axes", torch.empty(0))
    rows, channels = axes.shape if axes.ndim == 2 else (0, 0)
    shapes = {"mean": (channels,), "axes": (rows, channels), "low": (rows,), "high": (rows,), "explained": (rows,)}
    fits = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes and rows and channels
    fits = fits and all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values())
    if not fits or about.get("format") != FORMAT or not {"layer", "backbone", "checkpoint"} <= about.keys():
        raise UserError(f"{path} is no basis that ssl_geo.predict --embed pca leaves: name its pca.safetensors")
    return PrincipalComponents(**tensors), about


def sampled_features(
    read: ReadRows,
    model: Model,
    rows: Axis,
    columns: Axis,
    reduction: int,
    batch_size: int,
    device: torch.device,
    tiles: int = SAMPLED_TILES,
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield features (N, D) of the places with a valid pixel, of some tiles spread evenly over a scene.

    Args:
        read: As for `blended`.
        model: Tiles (B, bands, h, w) → features (B, D, size, size).
        rows: Tiles along the scene's height.
        columns: Along its width.
        reduction: Pixels per place.
        batch_size: Tiles shown at once.
        device: Where to compute.
        tiles: About so many.

    Raises:
        NotFiniteError: The model's features are not finite, although what it is shown is.
    """
    cells, side = rows.size, rows.size * reduction
    step = max(1, math.ceil(math.sqrt(len(rows.starts) * len(columns.starts) / tiles)))
    while step:  # twice as dense where none of those was valid: the edge of a swath
        empty = True
        for top in rows.starts[step // 2 :: step] or rows.starts[:1]:
            image, valid = read(top * reduction)
            places = any_within(valid, reduction)
            chosen = columns.starts[step // 2 :: step] or columns.starts[:1]
            used = [left for left in chosen if places[:, left : left + cells].any()]
            empty = empty and not used
            for first in range(0, len(used), batch_size):
                part = used[first : first + batch_size]
                images = np.stack([image[:, :, left * reduction : left * reduction + side] for left in part])
                found = model(torch.from_numpy(images).to(device)).movedim(1, -1).cpu().numpy()
                if not np.isfinite(found).all():
                    raise NotFiniteError(f", first in rows {top * reduction} to {top * reduction + side}")
                yield found[np.stack([places[:, left : left + cells] for left in part])]
        if not empty:
            return
        step //= 2
