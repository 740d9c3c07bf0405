"""Scores of a segmentation, all from one confusion matrix over every valid pixel (rows = label, columns = prediction).

Counts are streamed and added up; a score is computed once, at the end, from the sum. A class that the labels do not
hold has no score: it is NaN and takes no part in a mean, it is never a zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from ssl_geo.errors import UserError

IGNORED = 255  # the label of a pixel without one

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
IntegerArray = npt.NDArray[np.integer] | Tensor


def confusion(labels: IntegerArray, predictions: IntegerArray, num_classes: int) -> Counts:
    """Count the labelled pixels of every (label, prediction) pair.

    Args:
        labels: Class ids of any shape, `IGNORED` where a pixel has no label.
        predictions: Class ids of the same shape, 0 ... num_classes - 1 where there is a label. Both arrays numpy, or
            both tensors on one device.
        num_classes: Number of classes C.

    Returns:
        (C, C) int64; entry (i, j) counts the pixels labelled i and predicted j.

    Raises:
        UserError: A label is neither a class nor `IGNORED`.
        ValueError: Shapes differ, or a prediction is no class.
    """
    label, prediction = as_tensor(labels), as_tensor(predictions)
    if label.shape != prediction.shape:
        raise ValueError(f"labels {tuple(label.shape)} and predictions {tuple(prediction.shape)} differ in shape")
    used = label != IGNORED
    label, prediction = label[used].long(), prediction[used].long()
    if label.numel() == 0:
        return np.zeros((num_classes, num_classes), dtype=np.int64)
    refuse_other_labels(label, num_classes)
    if prediction.min().item() < 0 or prediction.max().item() >= num_classes:
        raise ValueError(f"predictions go beyond 0 ... {num_classes - 1}")
    counts = torch.bincount(label * num_classes + prediction, minlength=num_classes**2)
    return np.asarray(counts.reshape(num_classes, num_classes).cpu(), dtype=np.int64)


def refuse_other_labels(labels: Tensor, num_classes: int) -> None:
    """Raise a UserError where labels, of which there is at least one, are no classes."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"labels hold {low if low < 0 else high}, allowed are 0 ... {num_classes - 1} and {IGNORED} (no label): "
            "set --classes to the values there are, or --ignore"
        )


def as_tensor(array: npt.NDArray[np.generic] | Tensor) -> Tensor:
    """The array as a tensor where it is; a numpy array is copied only where torch must (read-only, strided)."""
    return array if isinstance(array, Tensor) else torch.from_numpy(np.require(array, requirements=["C", "W"]))


# --- scores: each takes (..., C, C) counts or their marginals, so that a bootstrap computes all draws in one call -----


def _share(part: Floats, whole: Floats, where: npt.NDArray[np.bool_]) -> Floats:
    """Quotient part / whole where `where` holds (0 for 0/0 there, as in scikit-learn), NaN elsewhere."""
    quotient = np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)
    return np.where(where, quotient, np.nan)


def _mean_present(per_class: Floats) -> Floats:
    """Mean over the last axis without its NaN; NaN where nothing is left."""
    known = ~np.isnan(per_class)
    number = known.sum(-1)
    total = np.where(known, per_class, 0.0).sum(-1)
    mean: Floats = np.divide(total, number, out=np.full(np.shape(number), np.nan), where=number > 0)
    return mean


class Marginals(NamedTuple):
    """What every score here needs of (..., C, C) counts, for C times less memory; (..., C) each, linear in the counts.

    Attributes:
        hit: Pixels rightly predicted of each class.
        labelled: Pixels labelled as it.
        predicted: Pixels predicted as it.
    """

    hit: Floats
    labelled: Floats
    predicted: Floats


Counted = npt.NDArray[np.number] | Marginals


def marginals(counts: Counted) -> Marginals:
    """Diagonal, row and column sums of (..., C, C) counts; marginals are returned as they are."""
    if isinstance(counts, Marginals):
        return counts
    counts = np.asarray(counts, dtype=np.float64)
    return Marginals(np.einsum("...ii->...i", counts), counts.sum(-1), counts.sum(-2))


def class_iou(matrix: Counted) -> Floats:
    """Intersection over union of each class, (..., C); NaN for a class that the labels do not hold."""
    hit, labelled, predicted = marginals(matrix)
    return _share(hit, labelled + predicted - hit, labelled > 0)


def class_f1(matrix: Counted) -> Floats:
    """F1 (Dice) of each class, (..., C); NaN for a class that the labels do not hold."""
    hit, labelled, predicted = marginals(matrix)
    return _share(2 * hit, labelled + predicted, labelled > 0)


def class_precision(matrix: Counted) -> Floats:
    """Share of the pixels *predicted* as a class that bear its label, (..., C); 0 for a class never predicted."""
    hit, labelled, predicted = marginals(matrix)
    return _share(hit, predicted, labelled > 0)


def class_recall(matrix: Counted) -> Floats:
    """Share of the pixels *labelled* as a class that are predicted so, (..., C)."""
    hit, labelled, _ = marginals(matrix)
    return _share(hit, labelled, labelled > 0)


def miou(matrix: Counted) -> Floats:
    """Mean IoU over the classes present in the labels, (...,)."""
    return _mean_present(class_iou(matrix))


def macro_f1(matrix: Counted) -> Floats:
    """Mean F1 over the classes present in the labels, (...,)."""
    return _mean_present(class_f1(matrix))


def micro_iou(matrix: Counted) -> Floats:
    """IoU of all classes pooled, (...,): Σ intersections / Σ unions = hits / (2 · pixels - hits)."""
    hit, labelled, _ = marginals(matrix)
    hits, pixels = hit.sum(-1), labelled.sum(-1)
    return _share(hits, 2 * pixels - hits, pixels > 0)


def frequency_weighted_iou(matrix: Counted) -> Floats:
    """IoU of the present classes, each weighted by its share of the labelled pixels, (...,)."""
    _, labelled, _ = marginals(matrix)
    pixels = labelled.sum(-1)
    weighted = (np.nan_to_num(class_iou(matrix)) * labelled).sum(-1)
    return _share(weighted, pixels, pixels > 0)


def overall_accuracy(matrix: Counted) -> Floats:
    """Share of the valid pixels that are predicted rightly, (...,)."""
    hit, labelled, _ = marginals(matrix)
    pixels = labelled.sum(-1)
    return _share(hit.sum(-1), pixels, pixels > 0)


@dataclass(frozen=True)
class Scores:
    """What one confusion matrix says; means run over the classes present in the labels.

    Attributes:
        miou: Mean (macro) IoU.
        micro_iou: hits / (2 · pixels - hits).
        frequency_weighted_iou: IoU weighted by the share of labelled pixels.
        overall_accuracy: Share of pixels right.
        macro_f1: Mean F1.
        iou: (C,) IoU of each class, NaN where the labels do not hold it, as in the three below.
        f1: (C,).
        precision: (C,).
        recall: (C,).
        support: (C,) labelled pixels of each class.
        predicted: (C,) predicted pixels of each class.
    """

    miou: float
    micro_iou: float
    frequency_weighted_iou: float
    overall_accuracy: float
    macro_f1: float
    iou: Floats
    f1: Floats
    precision: Floats
    recall: Floats
    support: Counts
    predicted: Counts


def scores(matrix: Counts) -> Scores:
    """All scores of a (C, C) confusion matrix; every one NaN where it counts no pixel."""
    return Scores(
        miou=float(miou(matrix)),
        micro_iou=float(micro_iou(matrix)),
        frequency_weighted_iou=float(frequency_weighted_iou(matrix)),
        overall_accuracy=float(overall_accuracy(matrix)),
        macro_f1=float(macro_f1(matrix)),
        iou=class_iou(matrix),
        f1=class_f1(matrix),
        precision=class_precision(matrix),
        recall=class_recall(matrix),
        support=matrix.sum(1),
        predicted=matrix.sum(0),
    )


# --- boundary IoU --------------------------------------------------------------------------------------------------


def boundary_counts(
    labels: npt.NDArray[np.integer],
    predictions: npt.NDArray[np.integer],
    num_classes: int,
    distance: int = 2,
) -> Counts:
    """Counts of boundary IoU (Cheng et al. 2021, arXiv:2103.16562, eq. 3), to be added up over chips.

    The boundary of a class are its pixels with another class within `distance` (a square window, as the d-fold 3×3
    erosion of the authors' code). Chips are cut out of larger land, so the edge of an image is no boundary (the authors
    pad with background, which makes it one), and neither is the border to pixels without a label.

    Args:
        labels: (..., H, W) class ids, `IGNORED` where there is none.
        predictions: (..., H, W) class ids.
        num_classes: Number of classes C.
        distance: Width d of the boundary in pixels.

    Returns:
        (3, C) int64: intersection, union, and boundary pixels of the labels, of each class.
    """
    valid = labels != IGNORED
    on_label, on_prediction = (_on_boundary(array, valid, distance) for array in (labels, predictions))
    both = on_label & on_prediction & (labels == predictions)
    in_label, in_prediction, intersection = (
        np.bincount(array[where].astype(np.int64), minlength=num_classes)
        for array, where in ((labels, on_label), (predictions, on_prediction), (labels, both))
    )
    return np.stack([intersection, in_label + in_prediction - intersection, in_label]).astype(np.int64)


def _on_boundary(
    classes: npt.NDArray[np.integer], valid: npt.NDArray[np.bool_], distance: int
) -> npt.NDArray[np.bool_]:
    """Valid pixels with another class among the valid pixels of their (2·distance + 1)² window."""
    window = (1,) * (classes.ndim - 2) + (2 * distance + 1,) * 2
    # Nothing outside the image or without a label is least or greatest, so it never makes a boundary.
    signed = classes.astype(np.int16)
    greatest = ndimage.maximum_filter(np.where(valid, signed, np.int16(-1)), window, mode="nearest")
    least = ndimage.minimum_filter(np.where(valid, signed, np.int16(32767)), window, mode="nearest")
    result: npt.NDArray[np.bool_] = valid & (greatest != least)
    return result


def boundary_iou(counts: Counts) -> Floats:
    """Boundary IoU of each class, (C,), from summed `boundary_counts`; NaN where the labels hold no boundary of it."""
    intersection, union, in_label = counts.astype(np.float64)
    return _share(intersection, union, in_label > 0)


# --- calibration ---------------------------------------------------------------------------------------------------


def calibration_counts(
    confidence: npt.NDArray[np.floating],
    predictions: npt.NDArray[np.integer],
    labels: npt.NDArray[np.integer],
    bins: int = 15,
) -> Floats:
    """Counts of the expected calibration error, to be added up over chips.

    torchmetrics' MulticlassCalibrationError gives the same number (a test holds it), but keeps all confidences.

    Args:
        confidence: Greatest class probability of each pixel, in [0, 1].
        predictions: Its class, same shape.
        labels: Class ids, same shape; `IGNORED` where there is none.
        bins: Number of equal bins of confidence.

    Returns:
        (3, bins) float64: pixels, summed confidence, pixels predicted rightly, of each bin.
    """
    valid = labels != IGNORED
    sure = confidence[valid].astype(np.float64)
    right = (predictions[valid] == labels[valid]).astype(np.float64)
    place = np.clip((sure * bins).astype(np.int64), 0, bins - 1)
    return np.stack([np.bincount(place, weight, bins) for weight in (np.ones_like(sure), sure, right)])


def expected_calibration_error(counts: Floats) -> float:
    """Mean gap of confidence and accuracy over the bins, weighted by their pixels (Guo et al. 2017, eq. 3)."""
    pixels, confidence, right = counts
    return float(np.abs(confidence - right).sum() / pixels.sum()) if pixels.sum() else float("nan")


# --- collapse ------------------------------------------------------------------------------------------------------


def collapse(
    matrix: Counts,
    *,
    majority: int | None = None,
    losses: Iterable[float] = (),
    tolerance: float = 1e-3,
) -> str | None:
    """Say whether a head has learnt nothing.

    Args:
        matrix: (C, C) confusion matrix of its predictions.
        majority: Most frequent class of the training labels; default: that of this matrix' labels.
        losses: Training losses, looked through for values that are not finite.
        tolerance: Largest difference, in mIoU and in overall accuracy, from the majority class that counts as equal.

    Returns:
        One plain sentence, None where nothing is wrong.
    """
    broken = [step for step, loss in enumerate(losses) if not np.isfinite(loss)]
    if broken:
        return f"the training loss is not finite from step {broken[0]} on ({len(broken)} steps)"
    support, predicted = matrix.sum(1), matrix.sum(0)
    if support.sum() == 0:
        return "no valid pixel was scored"
    present = np.flatnonzero(support)
    if len(present) == 1:
        return None  # one class in the labels: predicting it everywhere is right
    if np.count_nonzero(predicted) == 1:
        return f"class {predicted.argmax()} is predicted everywhere, the labels hold {len(present)} classes"
    constant = int(support.argmax()) if majority is None else majority
    flat = np.zeros_like(matrix)
    flat[:, constant] = support
    gaps = [abs(float(score(matrix)) - float(score(flat))) for score in (miou, overall_accuracy)]
    if max(gaps) <= tolerance:
        return (
            f"no different from predicting the majority class {constant} everywhere "
            f"(mIoU and accuracy within {tolerance:g})"
        )
    return None
