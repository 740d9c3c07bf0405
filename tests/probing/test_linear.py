import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ssl_geo.errors import UserError
from ssl_geo.probing import linear
from ssl_geo.probing.linear import LinearProbe, choose_penalty, fit_linear, strongest_of_best
from ssl_geo.probing.metrics import confusion, miou


def world(rows: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of unlike scale, some far from zero, and four classes that overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, rows, p=[0.5, 0.3, 0.15, 0.05])
    centres = np.random.default_rng(7).normal(size=(4, 12))
    mix = np.random.default_rng(8).normal(size=(12, 12)) * np.geomspace(1, 0.02, 12)
    features = (rng.normal(size=(rows, 12)) + 0.6 * centres[labels]) @ mix + np.linspace(-3, 3, 12)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-4])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    features, labels = world()
    scaler = StandardScaler().fit(features.astype(np.float64))
    theirs = LogisticRegression(C=1 / (penalty * len(labels)), max_iter=5000, tol=1e-8)
    theirs.fit(scaler.transform(features.astype(np.float64)), labels)
    ours = fit_linear(features, labels, 4, penalty, tolerance=1e-6)
    assert ours.converged
    np.testing.assert_allclose(ours.weight.numpy() * scaler.scale_, theirs.coef_, atol=5e-3)
    probability = ours.logits(features).softmax(1).numpy()
    np.testing.assert_allclose(probability, theirs.predict_proba(scaler.transform(features)), atol=2e-3)


def test_a_limit_of_iterations_is_told() -> None:
    features, labels = world()
    assert not fit_linear(features, labels, 4, 1e-4, max_iterations=2).converged


def test_class_weights_are_scikit_learns() -> None:
    features, labels = world()
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    theirs = LogisticRegression(C=1 / (1e-2 * len(labels)), max_iter=5000, tol=1e-8, class_weight="balanced")
    theirs.fit(scaled, labels)
    weights = len(labels) / (4 * np.bincount(labels))
    ours = fit_linear(features, labels, 4, 1e-2, class_weights=weights, tolerance=1e-6)
    np.testing.assert_allclose(ours.logits(features).softmax(1), theirs.predict_proba(scaled), atol=2e-3)
    plain = fit_linear(features, labels, 4, 1e-2)
    rare = labels == 3
    assert (ours.predict(features).numpy()[rare] == 3).mean() > (plain.predict(features).numpy()[rare] == 3).mean()


def test_penalty_is_the_best_on_validation() -> None:
    # Sixty rows and many features that say nothing: little penalty fits noise.
    rng = np.random.default_rng(0)
    labels, val_labels = rng.integers(0, 2, 60), rng.integers(0, 2, 2000)
    features, val = rng.normal(size=(60, 80)), rng.normal(size=(2000, 80))
    features[:, 0] += 2 * labels
    val[:, 0] += 2 * val_labels
    folds = [(features, labels, val, val_labels)]
    tried = choose_penalty(folds, 2, penalties=[1e-6, 1e-1, 1e-3, 1.0], tolerance=1e-5)
    assert list(tried) == [1.0, 1e-1, 1e-3, 1e-6][: len(tried)]
    assert tried[strongest_of_best(tried)] == max(tried.values())
    assert strongest_of_best(tried) >= 1e-1
    # The first that falls is the last that is tried.
    reached = list(tried.values())
    assert reached[:-1] == sorted(reached[:-1])
    assert reached[-1] < max(reached)
    assert 1e-6 not in tried
    # A warm start ends where a cold one does.
    for penalty, found in tried.items():
        alone = fit_linear(features, labels, 2, penalty, tolerance=1e-5)
        assert found == pytest.approx(float(miou(confusion(val_labels, alone.predict(val).numpy(), 2))), abs=1e-3)


def test_the_counts_of_all_folds_are_pooled_before_the_score_is_taken() -> None:
    features, labels = world()
    # Each fold validates on two of the four classes: the mean of their scores is another number.
    folds = [
        (features[half], labels[half], features[~half & seen], labels[~half & seen])
        for half, seen in ((np.arange(3000) < 1500, labels < 2), (np.arange(3000) >= 1500, labels >= 2))
    ]
    counts = 0
    for one, own, other, truth in folds:
        probe = fit_linear(one, own, 4, 1e-2)
        counts = counts + confusion(truth, probe.predict(other).numpy(), 4)
    tried = choose_penalty(folds, 4, penalties=[1e-2])
    assert tried == {1e-2: pytest.approx(float(miou(counts)))}


def test_of_equal_penalties_the_strongest_is_taken() -> None:
    assert strongest_of_best({1e-3: 0.5, 1e-1: 0.4, 1e-2: 0.5}) == 1e-2


def test_features_are_read_in_chunks_from_a_memory_map(tmp_path, monkeypatch) -> None:
    features, labels = world()
    labels[::7] = 255
    stored = np.memmap(tmp_path / "features.f16", dtype=np.float16, mode="w+", shape=features.shape)
    stored[:] = features
    stored.flush()
    stored = np.memmap(tmp_path / "features.f16", dtype=np.float16, mode="r", shape=features.shape)
    whole = fit_linear(np.asarray(stored, dtype=np.float32), labels, 4, 1e-2)
    monkeypatch.setattr(linear, "CHUNK", 100)
    monkeypatch.setattr(linear, "MEMORY", 0)
    chunked = fit_linear(stored, labels.astype(np.uint8), 4, 1e-2)
    np.testing.assert_allclose(chunked.logits(stored), whole.logits(features.astype(np.float16)), atol=2e-3)
    tensor = fit_linear(torch.from_numpy(np.array(stored)), torch.from_numpy(labels), 4, 1e-2)
    assert torch.equal(tensor.weight, chunked.weight)


def test_ignored_pixels_change_nothing() -> None:
    features, labels = world()
    kept = np.random.default_rng(1).random(len(labels)) < 0.5
    ignored = np.where(kept, labels, 255)
    poisoned = np.where(kept[:, None], features, np.nan).astype(np.float32)
    probe = fit_linear(poisoned, ignored, 4, 1e-2)
    expected = fit_linear(features[kept], labels[kept], 4, 1e-2)
    assert torch.equal(probe.weight, expected.weight)


def test_classes_that_training_lacks_are_never_predicted() -> None:
    features, labels = world()
    probe = fit_linear(features, labels * 2 + 1, 9, 1e-2)
    assert set(probe.predict(features).tolist()) <= {1, 3, 5, 7}
    assert probe.weight.shape == (9, 12)
    assert (probe.bias[::2] == linear.NEVER).all()
    few = fit_linear(features, labels, 4, 1e-2)
    np.testing.assert_allclose(probe.logits(features)[:, 1::2][:, :4], few.logits(features), atol=1e-4)
    single = fit_linear(features, np.full(len(labels), 2), 3, 1e-2)
    assert set(single.predict(features).tolist()) == {2}


def test_a_constant_feature_does_no_harm() -> None:
    features, labels = world()
    more = np.concatenate([features, np.full((len(features), 1), 0.1, np.float32)], axis=1)
    probe, expected = (fit_linear(x, labels, 4, 1e-2) for x in (more, features))
    np.testing.assert_allclose(probe.logits(more), expected.logits(features), atol=5e-3)


def test_no_rows_give_no_logits() -> None:
    probe = LinearProbe(torch.zeros(3, 5), torch.zeros(3), 1.0, True)
    assert probe.logits(np.zeros((0, 5), np.float32)).shape == (0, 3)


def test_what_cannot_be_fitted_is_told_in_one_line() -> None:
    features, labels = world(50)
    with pytest.raises(UserError, match="no valid pixel in train"):
        fit_linear(features, np.full(50, 255), 4, 1.0)
    with pytest.raises(UserError, match="no valid pixel in val"):
        choose_penalty([(features, labels, features, labels), (features, labels, features, np.full(50, 255))], 4)
    with pytest.raises(ValueError, match="greater than 0"):
        fit_linear(features, labels, 4, 0.0)
    with pytest.raises(UserError, match=r"labels hold 3, allowed are 0 \.\.\. 1"):
        fit_linear(features, labels, 2, 1.0)
    with pytest.raises(UserError, match="NaN or infinity"):
        fit_linear(np.where(features > 3, np.inf, features), labels, 4, 1.0)
    with pytest.raises(ValueError, match="50 rows of features, 49 labels"):
        fit_linear(features, labels[:-1], 4, 1.0)
