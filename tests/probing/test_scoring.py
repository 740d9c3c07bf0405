import numpy as np
import torch
from torch import nn

from ssl_geo.probing import pace
from ssl_geo.probing.fit import Fitted
from ssl_geo.probing.metrics import confusion
from ssl_geo.probing.pace import Laps, Pace
from ssl_geo.probing.rivals import RivalChip, score_rivals
from ssl_geo.probing.scoring import Tally, TestChips, score_heads
from ssl_geo.probing.store import FeatureStore


class Table(nn.Module):
    """Logits that are the features themselves."""

    def forward(self, features, height, width):
        return features[0]


def test_heads_are_counted_by_block_on_the_test_chips_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (6, 8, 8)).astype(np.uint8)
    labels[:, 0] = 255
    logits = rng.normal(size=(6, 3, 8, 8)).astype(np.float32)
    store = FeatureStore({"x": logits}, labels, passes=6)
    test = TestChips(np.array([5, 1, 2]), np.array([40, 7, 40]), 3)
    fitted = {"table": Fitted(Table(), ["x"], best_epoch=2, validation_miou=[0.1, 0.4])}
    (result,) = score_heads(fitted, store, test, 2, torch.device("cpu"), prefix="random, ", seed=1)
    predicted = logits.argmax(axis=1)
    expected = np.stack(
        [confusion(labels[[1]], predicted[[1]], 3), confusion(labels[[2, 5]], predicted[[2, 5]], 3)]  # blocks 7 and 40
    )
    np.testing.assert_array_equal(result.blocks, expected)
    assert (result.name, result.group, result.seed) == ("random, table, seed 1", "random, table", 1)
    assert (result.best_epoch, result.validation_miou, result.kind) == (2, 0.4, "head")


def test_without_a_confidence_there_is_no_calibration():
    test = TestChips(np.array([0]), np.array([0]), 2)
    tally = Tally(test)
    truth = np.zeros((4, 4), np.uint8)
    tally.add(0, truth, truth)
    assert tally.result("a", "a", "baseline").calibration is None
    tally.add(0, truth, truth, np.full((4, 4), 0.9, np.float32))
    assert tally.result("a", "a", "baseline").calibration is not None


def test_rivals_are_fitted_on_train_and_validation_and_scored_on_test():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (9, 16, 16)).astype(np.uint8)
    labels[:4, :6], labels[4:6, :14] = 0, 1  # most of train is 0, most of train and validation is 1
    images = np.where(labels[:, None], 0.4, 0.1) + rng.normal(0, 0.01, (9, 2, 16, 16))
    images[6:] = 0.5 - images[6:]  # on the test chips bright and dark are exchanged: what was fitted elsewhere fails
    images = images.astype(np.float32)
    counts = np.stack([np.bincount(chip.ravel(), minlength=2) for chip in labels])
    results = score_rivals(
        lambda number: RivalChip(images[number], (images[number] - 0.25) / 0.15, labels[number]),
        ["B04", "B08"],
        counts,
        [(np.arange(4), np.arange(4, 6))],
        TestChips(np.arange(6, 9), np.arange(3), 2),
        rows=400,
    )
    by_name = {result.name: result for result in results}
    assert by_name.keys() == {"pixels", "random convolutions", "majority class"}
    for result in results:
        np.testing.assert_array_equal(result.blocks.sum(axis=2), counts[6:])
    pixels = by_name["pixels"].blocks.sum(axis=0)
    assert np.trace(pixels) < 0.05 * pixels.sum()
    majority = by_name["majority class"].blocks.sum(axis=0)
    assert counts[:4].sum(axis=0).argmax() == 0
    assert majority[:, 0].sum() == 0


def test_expected_time_grows_with_chips_epochs_and_rows():
    measured = Pace(features=0.1, training=0.02, prediction=0.005, linear=0.01)
    assert measured.heads(train=60, validation=20, test=20, epochs=3) == 3 * 60 * 0.02 + (4 * 20 + 20) * 0.005
    assert measured.linear_probe(20_000) == 2 * measured.linear_probe(10_000)


def test_laps_add_up_by_name():
    laps = Laps()
    laps.lap("a")
    laps.lap("b")
    first = laps.seconds["a"]
    laps.lap("a")
    assert list(laps.seconds) == ["a", "b"]
    assert laps.seconds["a"] >= first > 0


def test_expected_time_holds_the_baselines(monkeypatch):
    """With 255 classes they took as long as what was foreseen for everything else."""
    monkeypatch.setattr(pace, "_seconds", lambda part, device: (part(), 2.0)[1])
    seconds = pace.baseline_seconds(torch.rand(1, 3, 16, 16), ["B02", "B03", "B04"], 255, rows=5_000, chips=7)
    assert seconds == pace.LINEAR_PASSES * (2 + 2) / 2 + 7 * 2
