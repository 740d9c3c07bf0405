"""What dense features say, as maps: principal components, similarity, segments, neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans

Array = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PCABasis:
    """Three directions of feature space that are shown as red, green and blue.

    Attributes:
        mean: (D,).
        directions: (D, 3), of length 1; the largest entry of each is positive, so that colours do not flip by chance.
        limits: (3, 2) values along the directions that become 0 and 1.
    """

    mean: Floats
    directions: Floats
    limits: Floats

    def colours(self, features: Array) -> Floats:
        """Features (D, h, w) as colours (h, w, 3) in 0 … 1; the same feature has the same colour in every chip."""
        low, high = self.limits.T
        along = (features.transpose(1, 2, 0) - self.mean) @ self.directions
        colours: Floats = np.clip((along - low) / (high - low), 0, 1)
        return colours


def pca_basis(features: Array) -> PCABasis:
    """The three directions in which features vary most, over all places of all chips.

    Args:
        features: (N, D, h, w), of D ≥ 1; of less than three directions the others are 0.

    Returns:
        A basis to colour any chip's features with; limits are the percentiles 2 and 98.
    """
    rows = np.asarray(features, np.float64).transpose(0, 2, 3, 1).reshape(-1, features.shape[1])
    mean = rows.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False, ddof=0).reshape(rows.shape[1], -1))
    directions = np.zeros((rows.shape[1], 3))
    leading = vectors[:, ::-1][:, :3]
    directions[:, : leading.shape[1]] = leading * np.sign(leading[np.abs(leading).argmax(0), range(leading.shape[1])])
    low, high = np.percentile((rows - mean) @ directions, [2, 98], axis=0)
    limits = np.stack([low, np.where(high > low, high, low + 1)], axis=1)
    return PCABasis(mean, directions, limits)


def cosine_similarity(features: Array, place: tuple[int, int], query: Array | None = None) -> Floats:
    """How alike every place is to a chosen one.

    Args:
        features: (D, h, w).
        place: Row and column of the chosen place in the query's grid.
        query: (D, h, w) of another chip that the place lies in; None: of the same.

    Returns:
        (h, w), -1 … 1.
    """
    chosen = (features if query is None else query)[:, place[0], place[1]].astype(np.float64)
    lengths = np.linalg.norm(features, axis=0) * np.linalg.norm(chosen)
    similar: Floats = np.tensordot(chosen, features.astype(np.float64), 1) / np.maximum(lengths, 1e-12)
    return similar


def valid_share(valid: npt.NDArray[np.bool_], shape: tuple[int, int]) -> Floats:
    """Which share of the pixels behind each place of a coarser grid is valid.

    Args:
        valid: (H, W).
        shape: (h, w) of the grid that the same ground is cut into.

    Returns:
        (h, w) in 0 … 1.
    """
    rows, columns = (np.arange(size) * places // size for size, places in zip(valid.shape, shape, strict=True))
    flat = (rows[:, None] * shape[1] + columns).ravel()
    pixels = np.bincount(flat, minlength=shape[0] * shape[1])
    share: Floats = np.bincount(flat, valid.ravel(), len(pixels)) / np.maximum(pixels, 1)
    return share.reshape(shape)


def central_place(valid: npt.NDArray[np.bool_], shape: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the place nearest the middle, of those with the most valid pixels.

    Args:
        valid: (H, W).
        shape: (h, w) of the features' grid.
    """
    share = valid_share(valid, shape)
    places = np.argwhere(share == share.max())
    row, column = places[np.abs(places - (np.array(shape) - 1) / 2).sum(axis=1).argmin()]
    return int(row), int(column)


def readable_layer(layers: Mapping[str, Array], least: int = 8) -> str:
    """The deepest layer whose grid still shows where things are, the finest one where no grid does.

    Args:
        layers: Features (N, D, h, w) by layer, from the first to the last.
        least: Places a side.
    """
    sides = {name: min(features.shape[2:]) for name, features in layers.items()}
    deepest = [name for name, side in sides.items() if side >= least][-1:]
    return deepest[0] if deepest else max(sides, key=lambda name: sides[name])


def kmeans_segments(features: Array, clusters: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Group the places of several chips by their features, by k-means on vectors of length 1.

    Args:
        features: (N, D, h, w).
        clusters: Number of groups.
        seed: Of the first centres.

    Returns:
        (N, h, w) groups, numbered from the most frequent one on.
    """
    number, dimensions, height, width = features.shape
    rows = features.transpose(0, 2, 3, 1).reshape(-1, dimensions).astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found = KMeans(clusters, n_init=4, random_state=seed).fit_predict(rows)
    rank = np.empty(clusters, np.int64)
    rank[np.argsort(-np.bincount(found, minlength=clusters), kind="stable")] = np.arange(clusters)
    groups: npt.NDArray[np.int64] = rank[found].reshape(number, height, width)
    return groups


def nearest_chips(embeddings: Array, query: int, count: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """The chips whose embeddings are most like that of one, itself left out.

    Args:
        embeddings: (N, D).
        query: Number of the chip.
        count: How many at most.

    Returns:
        Their numbers and cosine similarities, the most similar first.
    """
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    similarity = (unit @ unit[query]).astype(np.float64)
    order = np.argsort(-similarity, kind="stable")
    order = order[order != query][:count]
    return order, similarity[order]
