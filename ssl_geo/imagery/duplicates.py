"""Scenes that show the same: equal pixels, nearly equal pictures, shared ground; within and across splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.fft import dctn
from scipy.spatial import KDTree

from ssl_geo.imagery.findings import Finding, counted

_HASH_SIDE = 8  # cosines a direction
_HASH_DISTANCE = 4  # bits of 63 in which near-duplicates may differ
_SAME_PICTURE = 0.99  # correlation of thumbnails
_HASHED = 4096  # thumbnails at a time
_SHRUNK = 0.95  # footprints are compared at this share of their size, so that neighbours may touch

Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sighting:
    """What is kept of a scene to recognise it.

    Attributes:
        path: The scene.
        date: ISO 8601, or None.
        split: Its split where one is given.
        digest: Of its pixels, or None.
        thumbnail: (s, s), or None.
    """

    path: str
    date: str | None
    split: str | None
    digest: str | None
    thumbnail: npt.NDArray[np.float64] | None


def check_duplicates(scenes: Sequence[Sighting]) -> list[Finding]:
    """Scenes of the same pixels, shape and type, by a 128-bit digest (BLAKE2b) of all blocks."""
    groups: dict[str, list[int]] = {}
    for k, scene in enumerate(scenes):
        if scene.digest is not None:
            groups.setdefault(scene.digest, []).append(k)
    pairs = [(group[0], other) for group in groups.values() for other in group[1:]]
    return _pair_findings("duplicates", scenes, pairs, "the same pixels", "each scene once")


def check_near_duplicates(scenes: Sequence[Sighting]) -> list[Finding]:
    """Scenes that look the same: another processing level, encoding or a shift of few pixels of one acquisition.

    Candidates differ in at most 4 of the 63 bits of a perceptual hash (signs of the lowest cosines of the brightness
    against their median; Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section
    3.2.1), and their thumbnails correlate by 0.99 or more. Two dates that are both known and differ make a series, not
    a duplicate.
    """
    members = [k for k, scene in enumerate(scenes) if scene.thumbnail is not None and _has_contrast(scene.thumbnail)]
    if len(members) < 2:
        return []
    parts = [members[first : first + _HASHED] for first in range(0, len(members), _HASHED)]
    hashes = [perceptual_hashes(np.stack([_filled(scenes[k].thumbnail) for k in part])) for part in parts]
    pairs = []
    for i, j in _within_distance(np.concatenate(hashes), _HASH_DISTANCE):
        one, other = scenes[members[i]], scenes[members[j]]
        is_series = one.date is not None and other.date is not None and one.date != other.date
        if is_series or (one.digest is not None and one.digest == other.digest):
            continue
        if np.corrcoef(_filled(one.thumbnail).ravel(), _filled(other.thumbnail).ravel())[0, 1] >= _SAME_PICTURE:
            pairs.append((members[i], members[j]))
    expected = f"pictures that correlate by less than {_SAME_PICTURE}"
    return _pair_findings("near-duplicates", scenes, pairs, "nearly the same picture", expected)


def perceptual_hashes(images: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Hashes (N,) of 63 bits of images (N, s, s): which of the 8×8 lowest cosines but the mean exceed their median."""
    low = dctn(images, axes=(1, 2), norm="ortho")[:, :_HASH_SIDE, :_HASH_SIDE].reshape(len(images), -1)[:, 1:]
    bits = low > np.median(low, axis=1, keepdims=True)
    weights = np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64)
    return np.asarray((bits * weights).sum(axis=1, dtype=np.uint64))


def _has_contrast(thumbnail: npt.NDArray[np.float64]) -> bool:
    seen = thumbnail[np.isfinite(thumbnail)]
    return seen.size * 2 > thumbnail.size and float(seen.std()) > 0


def _filled(thumbnail: Any) -> npt.NDArray[np.float64]:
    return np.asarray(np.where(np.isfinite(thumbnail), thumbnail, np.nanmean(thumbnail)))


def _within_distance(hashes: npt.NDArray[np.uint64], distance: int) -> list[tuple[int, int]]:
    """Pairs of hashes that differ in at most `distance` bits.

    Cut in distance + 1 pieces, two such hashes agree in one piece at least (pigeonhole): only those that share a piece
    are compared.
    """
    pieces = distance + 1
    width = -(-64 // pieces)
    found: set[tuple[int, int]] = set()
    for piece in range(pieces):
        keys = (hashes >> np.uint64(piece * width)) & np.uint64((1 << width) - 1)
        order = np.argsort(keys, kind="stable")
        for apart in range(1, len(hashes)):
            one, other = order[:-apart], order[apart:]
            alike = keys[one] == keys[other]
            if not alike.any():
                break
            one, other = one[alike], other[alike]
            near = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
            found.update(zip(np.minimum(one, other)[near].tolist(), np.maximum(one, other)[near].tolist(), strict=True))
    return sorted(found)


def check_overlaps(scenes: Sequence[Sighting], corners: npt.NDArray[np.float64]) -> list[Finding]:
    """Scenes on shared ground: information, but an error across splits, where the test then knows the training ground.

    Args:
        scenes: N scenes.
        corners: (N, 4, 2) longitude and latitude, NaN where unknown.
    """
    known = np.flatnonzero(np.isfinite(corners).all(axis=(1, 2)))
    if len(known) < 2:
        return []
    _, first, place = np.unique(corners[known].round(7).reshape(-1, 8), axis=0, return_index=True, return_inverse=True)
    place = place.reshape(-1)
    pairs = _overlapping(corners[known[first]])
    shared = np.bincount(place) > 1  # places of several scenes
    shared[pairs.ravel()] = True
    members = known[shared[place]]
    if not len(members):
        return []
    ground = counted(int(shared.sum()), "different footprint")
    findings = [
        Finding(
            "shared ground",
            "info",
            tuple(scenes[k].path for k in members),
            f"{len(members)} of {len(scenes)} scenes overlap another ({ground})",
            "each place once, or splits by place",
            "none needed for pretraining; the probe keeps places together (--split.block, --split.gap)",
            len(members),
        )
    ]
    across = _across_splits(scenes, known, place, pairs)
    if across:
        one, other = across[0]
        findings.append(
            Finding(
                "splits share ground",
                "error",
                tuple(scenes[k].path for pair in across for k in pair),
                f"{scenes[one].split} and {scenes[other].split} overlap: {scenes[one].path} and {scenes[other].path}",
                "no ground in two splits",
                "move one of each pair in the file of splits, or let the probe split by place (leave --split.file out)",
                len(across),
            )
        )
    return findings


def _across_splits(scenes: Sequence[Sighting], known: Pairs, place: Pairs, pairs: Pairs) -> list[tuple[int, int]]:
    """One pair of scenes for each two splits that share a footprint or overlapping ones."""
    by_place: dict[int, dict[str, int]] = {}
    for k, p in zip(known.tolist(), place.tolist(), strict=True):
        if (split := scenes[k].split) is not None:
            by_place.setdefault(p, {}).setdefault(split, k)
    found = []
    for a, b in [*((p, p) for p in by_place), *map(tuple, pairs.tolist())]:
        for split, one in by_place.get(a, {}).items():
            for other_split, other in by_place.get(b, {}).items():
                if split < other_split or (a != b and split != other_split):
                    found.append((one, other))
    return found


def _overlapping(corners: npt.NDArray[np.float64]) -> Pairs:
    """Pairs (P, 2), the smaller number first, of footprints (N, 4, 2) in degrees whose inner parts intersect."""
    lonlat = np.radians(corners)
    points = np.stack(
        [
            np.cos(lonlat[..., 1]) * np.cos(lonlat[..., 0]),
            np.cos(lonlat[..., 1]) * np.sin(lonlat[..., 0]),
            np.sin(lonlat[..., 1]),
        ],
        axis=-1,
    )  # on the unit sphere: no antimeridian there
    middle = points.mean(axis=1)
    reach = np.linalg.norm(points - middle[:, None], axis=2).max(axis=1)
    found = [pairs[_intersect(points[pairs[:, 0]], points[pairs[:, 1]])] for pairs in _candidates(middle, reach)]
    return np.concatenate([np.empty((0, 2), np.int64), *found])


def _candidates(middle: npt.NDArray[np.float64], reach: npt.NDArray[np.float64]) -> Iterator[Pairs]:
    """Pairs of footprints near each other, between classes of size, so that a large one does not widen all searches."""
    size = np.floor(np.log2(np.maximum(reach, 1e-12)) / 2).astype(int)
    classes = np.unique(size)
    trees = {s: (KDTree(middle[size == s]), np.flatnonzero(size == s)) for s in classes.tolist()}
    for s in classes.tolist():
        for other in classes[classes >= s].tolist():
            (tree, own), (other_tree, others) = trees[s], trees[other]
            radius = float(reach[own].max() + reach[others].max())
            if s == other:
                near = tree.query_pairs(radius, output_type="ndarray")
                pairs = own[near].reshape(-1, 2)
            else:
                lists = tree.query_ball_tree(other_tree, radius)
                pairs = np.array([(own[i], others[j]) for i, hits in enumerate(lists) for j in hits], np.int64).reshape(
                    -1, 2
                )
            if len(pairs):
                yield np.sort(pairs, axis=1)


def _intersect(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether convex quadrilaterals (P, 4, 3), shrunk a little, intersect: no side's direction separates them.

    Separating axis theorem (Gottschalk 1996, "Separating axis theorem", UNC TR96-024), in the plane that touches the
    sphere between their middles.
    """
    normal = one.mean(axis=1) + other.mean(axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    axis = np.eye(3)[np.abs(normal).argmin(axis=1)]
    east = np.cross(normal, axis)
    east /= np.linalg.norm(east, axis=1, keepdims=True)
    basis = np.stack([east, np.cross(normal, east)], axis=2)  # (P, 3, 2)
    flat = []
    for quad in (one, other):
        plane = quad @ basis
        centre = plane.mean(axis=1, keepdims=True)
        flat.append(centre + _SHRUNK * (plane - centre))
    is_apart = np.zeros(len(one), np.bool_)
    for quad in flat:
        sides = np.roll(quad, -1, axis=1) - quad
        normals = np.stack([-sides[..., 1], sides[..., 0]], axis=-1)  # (P, 4, 2)
        a, b = (np.einsum("pkc,pnc->pnk", points, normals) for points in flat)
        is_apart |= ((a.max(axis=2) <= b.min(axis=2)) | (b.max(axis=2) <= a.min(axis=2))).any(axis=1)
    return ~is_apart


def _pair_findings(
    check: str, scenes: Sequence[Sighting], pairs: Sequence[tuple[int, int]], same: str, expected: str
) -> list[Finding]:
    """A warning for the pairs within a split or without splits, an error for those across two splits."""
    found = []
    for is_across in (False, True):
        chosen = [
            (one, other)
            for one, other in pairs
            if (None not in (scenes[one].split, scenes[other].split) and scenes[one].split != scenes[other].split)
            == is_across
        ]
        if not chosen:
            continue
        one, other = chosen[0]
        where = f" in {scenes[one].split} and {scenes[other].split}" if is_across else ""
        found.append(
            Finding(
                check + (" across splits" if is_across else ""),
                "error" if is_across else "warning",
                tuple(dict.fromkeys(scenes[k].path for pair in chosen for k in pair)),
                f"{same}{where}: {scenes[one].path} and {scenes[other].path}",
                expected,
                "give one of each pair: name folders or files that leave the other out",
                len(chosen),
            )
        )
    return found
