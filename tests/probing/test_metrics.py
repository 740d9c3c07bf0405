import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, precision_score, recall_score
from torchmetrics.classification import MulticlassCalibrationError

from ssl_geo.errors import UserError
from ssl_geo.probing import metrics
from ssl_geo.probing.metrics import (
    boundary_counts,
    boundary_iou,
    calibration_counts,
    collapse,
    confusion,
    expected_calibration_error,
    scores,
)


def maps(seed: int = 0, classes: int = 5, shape: tuple[int, ...] = (3, 40, 50)) -> tuple[np.ndarray, np.ndarray]:
    """Labels with nodata and predictions that are right two times out of three."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    predictions = np.where(rng.random(shape) < 0.67, labels, rng.integers(0, classes, shape)).astype(np.uint8)
    labels[rng.random(shape) < 0.2] = 255
    return labels, predictions


pairs = st.integers(1, 6).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        hnp.arrays(np.uint8, 40, elements=st.one_of(st.integers(0, classes - 1), st.just(255))),
        hnp.arrays(np.int64, 40, elements=st.integers(0, classes - 1)),
    )
)


@given(pairs)
@settings(deadline=None)
def test_every_score_is_scikit_learns(pair: tuple[int, np.ndarray, np.ndarray]) -> None:
    classes, labels, predictions = pair
    matrix = confusion(labels, predictions, classes)
    valid = labels != 255
    y, p = labels[valid].astype(int), predictions[valid]
    if not valid.any():
        assert matrix.sum() == 0
        assert np.isnan(scores(matrix).miou)
        assert np.isnan(scores(matrix).overall_accuracy)
        return
    if classes > 1:  # scikit-learn warns of a 1×1 matrix
        np.testing.assert_array_equal(matrix, confusion_matrix(y, p, labels=range(classes)))
    got, present = scores(matrix), np.unique(y)
    absent = np.setdiff1d(np.arange(classes), present)
    for name, theirs in (
        ("iou", jaccard_score),
        ("f1", f1_score),
        ("precision", precision_score),
        ("recall", recall_score),
    ):
        expected = theirs(y, p, labels=present, average=None, zero_division=0)
        np.testing.assert_allclose(getattr(got, name)[present], expected)
        assert np.isnan(getattr(got, name)[absent]).all()
    assert got.miou == pytest.approx(jaccard_score(y, p, labels=present, average="macro", zero_division=0))
    assert got.micro_iou == pytest.approx(jaccard_score(y, p, labels=range(classes), average="micro"))
    assert got.frequency_weighted_iou == pytest.approx(jaccard_score(y, p, average="weighted", zero_division=0))
    assert got.macro_f1 == pytest.approx(f1_score(y, p, labels=present, average="macro", zero_division=0))
    assert got.overall_accuracy == pytest.approx(accuracy_score(y, p))
    np.testing.assert_array_equal(got.support, np.bincount(y, minlength=classes))
    np.testing.assert_array_equal(got.predicted, np.bincount(p, minlength=classes))


def test_precision_and_recall_are_the_right_way_round() -> None:
    # 100 pixels of class 0, 10 of class 1; 20 of the former are predicted 1, 1 of the latter 0.
    labels = np.repeat([0, 1], [100, 10])
    predictions = np.concatenate([np.repeat([0, 1], [80, 20]), np.repeat([0, 1], [1, 9])])
    matrix = confusion(labels, predictions, 2)
    np.testing.assert_array_equal(matrix, [[80, 20], [1, 9]])
    got = scores(matrix)
    np.testing.assert_allclose(got.precision, [80 / 81, 9 / 29])
    np.testing.assert_allclose(got.recall, [80 / 100, 9 / 10])
    np.testing.assert_allclose(got.iou, [80 / 101, 9 / 30])


def test_a_class_that_is_predicted_but_not_there_counts_against_the_others_only() -> None:
    got = scores(np.array([[6, 0, 2], [0, 4, 0], [0, 0, 0]]))
    assert np.isnan([got.iou[2], got.f1[2], got.precision[2], got.recall[2]]).all()
    assert got.miou == pytest.approx((6 / 8 + 1) / 2)
    assert got.predicted[2] == 2


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_confusions_add_up_over_chips(convert: object) -> None:
    labels, predictions = maps()
    whole = confusion(convert(labels), convert(predictions), 5)
    assert whole.sum() == (labels != 255).sum()
    assert whole.dtype == np.int64
    total = sum(confusion(label, prediction, 5) for label, prediction in zip(labels, predictions, strict=True))
    np.testing.assert_array_equal(total, whole)


def test_confusion_reads_memory_maps_and_reversed_views() -> None:
    labels, predictions = maps()
    expected = confusion(labels, predictions, 5)
    labels.flags.writeable = False
    np.testing.assert_array_equal(confusion(labels[:, ::-1], predictions[:, ::-1], 5), expected)


def test_labels_out_of_range_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"labels hold 9, allowed are 0 \.\.\. 4 and 255"):
        confusion(np.array([0, 9, 255]), np.array([0, 1, 1]), 5)
    with pytest.raises(UserError, match="labels hold -1"):
        confusion(np.array([0, -1]), np.array([0, 1]), 5)
    with pytest.raises(ValueError, match="predictions go beyond"):
        confusion(np.array([0, 1]), np.array([0, 5]), 5)
    with pytest.raises(ValueError, match="differ in shape"):
        confusion(np.zeros((2, 3), int), np.zeros((3, 2), int), 5)


# --- boundary IoU


def slow_boundary_counts(labels: np.ndarray, predictions: np.ndarray, classes: int, distance: int) -> np.ndarray:
    """Pixel by pixel: a pixel is on the boundary where its window holds another valid class."""
    height, width = labels.shape
    regions = np.zeros((2, classes, height, width), bool)
    for index, array in enumerate((labels, predictions)):
        for row in range(height):
            for column in range(width):
                if labels[row, column] == 255:
                    continue
                rows = slice(max(row - distance, 0), row + distance + 1)
                columns = slice(max(column - distance, 0), column + distance + 1)
                around = array[rows, columns][labels[rows, columns] != 255]
                regions[index, array[row, column], row, column] = (around != array[row, column]).any()
    both, either = (regions[0] & regions[1]).sum((1, 2)), (regions[0] | regions[1]).sum((1, 2))
    return np.stack([both, either, regions[0].sum((1, 2))])


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_boundary_counts_are_those_of_the_slow_definition(distance: int) -> None:
    rng = np.random.default_rng(distance)
    labels = rng.integers(0, 3, (2, 5, 6)).repeat(5, 1).repeat(5, 2).astype(np.uint8)
    predictions = np.roll(labels, (1, 2), (1, 2))
    labels[rng.random(labels.shape) < 0.03] = 255
    expected = sum(slow_boundary_counts(*pair, 4, distance) for pair in zip(labels, predictions, strict=True))
    counts = boundary_counts(labels, predictions, 4, distance)
    np.testing.assert_array_equal(counts, expected)
    got = boundary_iou(counts)
    assert ((got[:3] > 0) & (got[:3] < 1)).all()
    assert np.isnan(got[3])


def test_boundary_iou_is_the_papers_by_erosion() -> None:
    # The authors' boundary: the mask less its d-fold erosion, on masks away from the image's edge.
    from scipy.ndimage import binary_erosion

    masks = np.zeros((2, 40, 40), np.uint8)
    masks[0, 8:25, 7:30] = 1
    masks[1, 10:28, 8:33] = 1
    label, prediction = (mask.astype(bool) & ~binary_erosion(mask, np.ones((3, 3)), iterations=3) for mask in masks)
    got = boundary_iou(boundary_counts(*masks, 2, distance=3))
    assert got[1] == pytest.approx((label & prediction).sum() / (label | prediction).sum())


def test_the_edge_of_an_image_and_of_nodata_is_no_boundary() -> None:
    labels = np.zeros((12, 12), np.uint8)
    labels[3:6, 3:6] = 255
    assert boundary_counts(labels, np.zeros_like(labels), 2).sum() == 0


# --- calibration


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_is_torchmetrics(bins: int) -> None:
    generator = torch.Generator().manual_seed(bins)
    probabilities = torch.randn(4, 5, 30, 30, generator=generator).mul(2).softmax(1)
    labels, _ = maps(classes=5, shape=(4, 30, 30))
    reference = MulticlassCalibrationError(5, n_bins=bins, ignore_index=255)
    expected = reference(probabilities, torch.as_tensor(labels).long()).item()
    confidence, prediction = (array.numpy() for array in probabilities.max(1))
    counts = sum(calibration_counts(confidence[i], prediction[i], labels[i], bins) for i in range(4))
    assert expected_calibration_error(counts) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.05
    assert counts[0].sum() == (labels != 255).sum()


def test_confidence_of_exactly_one_is_counted() -> None:
    counts = calibration_counts(np.ones(4, np.float32), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 255]))
    assert expected_calibration_error(counts) == pytest.approx(1 / 3)
    assert np.isnan(expected_calibration_error(np.zeros((3, 15))))


# --- collapse


def test_collapse_is_told_in_a_sentence() -> None:
    good = np.array([[60, 5, 2], [3, 40, 1], [2, 2, 9]])
    assert collapse(good, losses=[1.0, 0.5]) is None
    flat = np.zeros((3, 3), np.int64)
    flat[:, 2] = [100, 50, 20]
    assert collapse(flat) == "class 2 is predicted everywhere, the labels hold 3 classes"
    almost = np.array([[99_990, 10, 0], [49_995, 5, 0], [20_000, 0, 0]])
    assert "majority class 0" in (collapse(almost) or "")
    assert collapse(almost, majority=1) is None
    assert "not finite from step 1 on (2 steps)" in (collapse(good, losses=[1.0, float("nan"), float("inf")]) or "")
    assert collapse(np.zeros((3, 3), np.int64)) == "no valid pixel was scored"


def test_one_class_in_the_labels_is_no_collapse() -> None:
    assert collapse(np.array([[0, 0], [0, 80]])) is None


def test_scores_of_a_stack_are_the_scores_of_each() -> None:
    stack = np.random.default_rng(0).integers(0, 30, (6, 4, 4))
    stack[0, 1] = 0
    for score in (
        metrics.miou,
        metrics.macro_f1,
        metrics.micro_iou,
        metrics.frequency_weighted_iou,
        metrics.overall_accuracy,
    ):
        np.testing.assert_allclose(score(stack), [score(matrix) for matrix in stack])
