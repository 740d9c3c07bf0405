import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_geo.probing.fit import Recipe, class_weights, evaluate, predict, train_heads
from ssl_geo.probing.heads import build_head
from ssl_geo.probing.linear import choose_penalty, fit_linear, strongest_of_best
from ssl_geo.probing.metrics import miou
from ssl_geo.probing.pixels import LinearOnLayers, fit_linear_chosen, fit_linear_on_layers, sample_rows, stored_rows
from ssl_geo.probing.scoring import TestChips, score_heads
from ssl_geo.probing.store import FeatureStore

CLASSES = 3


@pytest.fixture(scope="module")
def store() -> FeatureStore:
    """Chips whose class is a linear function of the fine layer; some pixels and one whole chip have no label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, (60, 4, 4)).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    fine = F.one_hot(torch.from_numpy(labels[:, ::4, ::4].astype(np.int64)), 6).permute(0, 3, 1, 2).numpy()
    fine = (fine + 0.3 * rng.standard_normal(fine.shape)).astype(np.float16)
    coarse = rng.standard_normal((60, 5, 2, 2)).astype(np.float16)
    labels[:, 0, :3] = 255
    labels[7] = 255
    return FeatureStore({"coarse": coarse, "fine": fine}, labels, 0)


TRAIN, VALIDATION, TEST = np.arange(40), np.arange(40, 50), np.arange(50, 60)
RECIPE = Recipe(epochs=12, batch_size=8, lr=0.05, warmup=0.1, seed=0)


def heads(*layers: str):
    torch.manual_seed(0)
    channels = {"coarse": 5, "fine": 6}
    return {
        f"linear @ {name}": (build_head("linear", [channels[name]], CLASSES, reduction=[4]), [name]) for name in layers
    }


def test_a_head_learns_what_its_layer_holds_and_no_more(store):
    fitted = train_heads(heads("coarse", "fine"), store, TRAIN, VALIDATION, CLASSES, RECIPE, say=lambda line: None)
    scores = {name: miou(matrix) for name, matrix in evaluate(fitted, store, TEST, CLASSES, 8).items()}
    assert scores["linear @ fine"] > 0.7
    assert scores["linear @ coarse"] < 0.5
    assert len(fitted["linear @ fine"].validation_miou) == RECIPE.epochs


def test_heads_trained_together_are_the_heads_trained_alone(store):
    together = train_heads(heads("coarse", "fine"), store, TRAIN, VALIDATION, CLASSES, RECIPE, say=lambda line: None)
    both = heads("coarse", "fine")
    alone = train_heads(
        {"linear @ fine": both["linear @ fine"]}, store, TRAIN, VALIDATION, CLASSES, RECIPE, say=lambda line: None
    )
    a, b = together["linear @ fine"], alone["linear @ fine"]
    assert a.train_loss == pytest.approx(b.train_loss, abs=1e-4)
    for name, value in b.head.state_dict().items():
        torch.testing.assert_close(a.head.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_the_best_epoch_on_validation_is_kept(store):
    fitted = train_heads(heads("fine"), store, TRAIN, VALIDATION, CLASSES, RECIPE, say=lambda line: None)
    item = fitted["linear @ fine"]
    assert item.best_epoch == int(np.argmax(item.validation_miou)) + 1
    kept = miou(evaluate(fitted, store, VALIDATION, CLASSES, 8)["linear @ fine"])
    assert kept == pytest.approx(max(item.validation_miou))


def test_ignored_pixels_change_nothing(store):
    noisy = copy.deepcopy(store)
    changed = FeatureStore(
        {
            name: np.where(np.arange(60)[:, None, None, None] == 7, 99, array).astype(np.float16)
            for name, array in noisy.layers.items()
        },
        noisy.labels,
        0,
    )
    # Chip 7 has no label at all: what its features are must not reach the loss. (Batch norm would see it in a batch.)
    only = np.array([7])
    fitted = train_heads(heads("fine"), changed, only, VALIDATION, CLASSES, RECIPE, say=lambda line: None)
    fresh = heads("fine")["linear @ fine"][0]
    for name, value in fresh.named_parameters():
        assert torch.equal(dict(fitted["linear @ fine"].head.named_parameters())[name], value)


def test_defect_10_a_collapsed_head_is_retried_and_said(store):
    said = []
    lost = Recipe(epochs=2, batch_size=8, lr=1e-9, warmup=0.1, seed=0)
    both = heads("coarse")
    with torch.no_grad():
        head = both["linear @ coarse"][0]
        for parameter in head.parameters():
            parameter.zero_()
    fitted = train_heads(both, store, TRAIN, VALIDATION, CLASSES, lost, say=said.append)
    assert fitted["linear @ coarse"].retried
    assert "predicted everywhere" in fitted["linear @ coarse"].collapsed
    assert any("trained once more" in line for line in said)


def test_predictions_come_chip_by_chip_with_confidence(store):
    fitted = train_heads(heads("fine"), store, TRAIN, VALIDATION, CLASSES, RECIPE, say=lambda line: None)
    for name, part, classes, confidence in predict(fitted, store, TEST, 4):
        assert name == "linear @ fine"
        assert classes.shape == confidence.shape == (len(part), 16, 16)
        assert ((confidence > 1 / CLASSES - 1e-6) & (confidence <= 1)).all()


def test_class_weights_have_mean_one_over_pixels(store):
    chips = np.stack([np.bincount(chip[chip != 255], minlength=CLASSES + 1) for chip in store.labels])
    weights, counts = class_weights(chips), chips.sum(axis=0)
    assert float((weights.numpy() * counts).sum() / counts.sum()) == pytest.approx(1)
    assert weights[CLASSES] == 0
    assert weights[counts[:CLASSES].argmin()] == weights[:CLASSES].max()


def test_rows_of_stored_layers_are_those_of_the_upsampled_maps(store):
    chips, names = np.array([3, 0, 7]), ["coarse", "fine"]

    def upsampled(number):
        maps = [torch.from_numpy(store.layers[name][number]).float()[None] for name in names]
        dense = [F.interpolate(m, size=(16, 16), mode="bilinear", align_corners=False)[0] for m in maps]
        return torch.cat(dense).numpy(), store.labels[number]

    features, labels = stored_rows(store, names, chips, rows=120, seed=4)
    expected, expected_labels = sample_rows(upsampled, chips, rows=120, seed=4)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert len(labels) <= 120


def test_a_linear_probe_on_layers_equals_upsampling_first(store):
    torch.manual_seed(0)
    weight, bias = torch.randn(CLASSES, 11), torch.randn(CLASSES)
    features = [torch.from_numpy(store.layers[name][:2]).float() for name in ("coarse", "fine")]
    dense = torch.cat([F.interpolate(f, size=(16, 16), mode="bilinear", align_corners=False) for f in features], 1)
    expected = F.conv2d(dense, weight[:, :, None, None], bias)
    found = LinearOnLayers(weight, bias, [5, 6])(features, 16, 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_chose_the_penalty_is_fitted_on_as_well(store):
    drawn = []

    def draw(chips, rows):
        drawn.append((chips.tolist(), rows))
        return stored_rows(store, ["fine"], chips, rows, seed=0)

    probe, reached = fit_linear_chosen(draw, [(TRAIN, VALIDATION)], CLASSES, rows=2000)
    assert drawn == [(TRAIN.tolist(), 2000), (VALIDATION.tolist(), 1000), ([*TRAIN, *VALIDATION], 2000)]
    tried = choose_penalty([(*draw(TRAIN, 2000), *draw(VALIDATION, 1000))], CLASSES)
    both = fit_linear(*draw(np.arange(50), 2000), CLASSES, probe.penalty)
    # The score by which it was chosen is of a probe that had not seen validation.
    assert (probe.penalty, reached) == (strongest_of_best(tried), [max(tried.values())])
    assert torch.equal(probe.weight, both.weight)
    assert not torch.allclose(probe.weight, fit_linear(*draw(TRAIN, 2000), CLASSES, probe.penalty).weight, rtol=1e-3)


def test_several_folds_choose_together_each_from_as_many_rows_as_the_last_fit(store):
    drawn = []

    def draw(chips, rows):
        drawn.append((chips.tolist(), rows))
        return stored_rows(store, ["fine"], chips, rows, seed=0)

    halves = (np.arange(0, 50, 2), np.arange(1, 50, 2))
    probe, reached = fit_linear_chosen(draw, [halves, halves[::-1]], CLASSES, rows=2000)
    odd, even = halves[1].tolist(), halves[0].tolist()
    assert drawn == [(even, 2000), (odd, 1000), (odd, 2000), (even, 1000), ([*range(50)], 2000)]
    folds = [(*draw(a, 2000), *draw(b, 1000)) for a, b in (halves, halves[::-1])]
    assert [choose_penalty(folds, CLASSES)[probe.penalty]] == reached


def test_a_single_penalty_is_taken_and_all_ground_trains_at_once(store):
    drawn = []

    def draw(chips, rows):
        drawn.append(chips.tolist())
        return stored_rows(store, ["fine"], chips, rows, seed=0)

    probe, reached = fit_linear_chosen(draw, [(TRAIN, VALIDATION)], CLASSES, rows=2000, penalties=[0.02])
    assert (probe.penalty, reached, drawn) == (0.02, [], [[*TRAIN, *VALIDATION]])
    expected = fit_linear(*draw(np.arange(50), 2000), CLASSES, 0.02)
    assert torch.equal(probe.weight, expected.weight)
    item = fit_linear_on_layers(store, ["fine"], [(TRAIN, VALIDATION)], CLASSES, rows=2000, penalties=[0.02])
    (result,) = score_heads({"probe": item}, store, TestChips(VALIDATION, VALIDATION, CLASSES), 8, torch.device("cpu"))
    assert result.validation_miou is None


def test_the_linear_probe_answers_like_a_trained_head(store):
    item = fit_linear_on_layers(store, ["coarse", "fine"], [(TRAIN, VALIDATION)], CLASSES, rows=4000)
    assert max(item.validation_miou) > 0.7
    assert (item.kind, item.layers) == ("linear probe", ["coarse", "fine"])
    reached = miou(evaluate({"probe": item}, store, VALIDATION, CLASSES, 8)["probe"])
    assert reached == pytest.approx(item.validation_miou[0], abs=0.02)


def test_rows_are_labelled_pixels_and_depend_on_the_seed_alone(store):
    def read(number):
        return np.broadcast_to(np.float32(number), (2, 16, 16)).copy(), store.labels[number]

    features, labels = sample_rows(read, np.array([3, 7, 9]), 60, seed=0)
    assert set(features[:, 0].tolist()) == {3.0, 9.0}  # chip 7 has no label
    assert (labels != 255).all()
    again, _ = sample_rows(read, np.array([3, 7, 9]), 60, seed=0)
    np.testing.assert_array_equal(features, again)
