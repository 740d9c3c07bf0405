import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from ssl_geo.errors import UserError
from ssl_geo.probing.baselines import (
    RandomConvolutions,
    feature_names,
    fit_pixels,
    majority_class,
    pixel_features,
)
from ssl_geo.probing.metrics import confusion, scores

TEN = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
TWELVE = ["B01", *TEN[:8], "B09", *TEN[8:]]


def test_majority_is_what_training_holds_most() -> None:
    labels = np.array([0, 1, 1, 2, 255, 255, 255])
    support = np.bincount(labels[labels != 255], minlength=4)
    assert majority_class(support) == 1
    with pytest.raises(UserError, match="no valid pixel in train"):
        majority_class(np.zeros(3, int))


def test_features_of_a_pixel_are_those_by_hand() -> None:
    values = dict(zip(TEN, [0.05, 0.08, 0.06, 0.1, 0.2, 0.25, 0.3, 0.32, 0.15, 0.1], strict=True))
    features = pixel_features(np.array(list(values.values()), np.float32), TEN)
    got = dict(zip(feature_names(TEN), features.tolist(), strict=True))
    assert got["B8A"] == pytest.approx(0.32)
    assert got["log B04"] == pytest.approx(np.log(0.06))
    assert got["NDVI"] == pytest.approx((0.3 - 0.06) / (0.3 + 0.06), rel=1e-5)
    assert got["NDWI"] == pytest.approx((0.08 - 0.3) / (0.08 + 0.3), rel=1e-5)
    assert got["MNDWI"] == pytest.approx((0.08 - 0.15) / (0.08 + 0.15), rel=1e-5)
    assert got["NDMI"] == pytest.approx((0.32 - 0.15) / (0.32 + 0.15), rel=1e-5)
    assert got["NBR"] == pytest.approx((0.32 - 0.1) / (0.32 + 0.1), rel=1e-5)
    assert len(got) == len(features) == 25


def test_bands_are_found_by_name_in_any_order_and_number() -> None:
    reflectance = np.random.default_rng(0).uniform(0.01, 0.5, (10, 4, 5)).astype(np.float32)
    whole = dict(zip(feature_names(TEN), pixel_features(reflectance, TEN), strict=True))
    order = [7, 2, 8, 1, 9]
    some = [TEN[i] for i in order]
    part = dict(zip(feature_names(some), pixel_features(reflectance[order], some), strict=True))
    assert {"NDMI", "NBR", "MNDWI"} <= set(part)
    for name in set(part) - {"NDVI", "NDWI"}:  # without B08 these take B8A
        np.testing.assert_array_equal(part[name], whole[name])
    assert feature_names(["VV", "VH"]) == ["VV", "VH", "log VV", "log VH"]
    with pytest.raises(ValueError, match="2 band names for 3 channels"):
        pixel_features(reflectance[:3], ["B02", "B03"])


def test_zero_and_negative_reflectance_stay_finite() -> None:
    features = pixel_features(np.array([[-0.1], [0.0], [0.0], [0.0]], np.float32), ["B03", "B04", "B08", "B11"])
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 10


def test_pixels_are_classified_and_ignored_ones_are_not_read() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (40, 50)).astype(np.uint8)
    reflectance = np.stack([0.1 + 0.1 * labels, 0.5 - 0.1 * labels]) + rng.normal(0, 0.01, (2, 40, 50))
    features = pixel_features(reflectance.astype(np.float32), ["B03", "B08"])
    hidden = labels.copy()
    hidden[:, :10] = 255
    model = fit_pixels(np.where(hidden == 255, np.nan, features), hidden + (hidden < 255), 5, penalty=1e-3)
    assert scores(confusion(labels, model.predict(features) - 1, 3)).overall_accuracy > 0.99
    probabilities = model.probabilities(features)
    assert probabilities.shape == (5, 40, 50)
    np.testing.assert_array_equal(probabilities.argmax(0), model.predict(features))
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    assert (probabilities[[0, 4]] == 0).all()
    with pytest.raises(UserError, match="no valid pixel in train"):
        fit_pixels(features, np.full((40, 50), 255), 3)


def test_classes_weigh_in_the_baseline_as_in_the_heads_that_are_to_beat_it() -> None:
    """Heads with --class_weights were held against baselines without: +0.08 of landcover's gain was the loss alone."""
    rng = np.random.default_rng(0)
    labels = (rng.random(4000) < 0.1).astype(np.uint8)
    features = (rng.normal(0, 1, (2, 4000)) + labels).astype(np.float32)
    plain, weighted = (fit_pixels(features, labels, 2, class_weights=w) for w in (None, np.array([1 / 0.9, 1 / 0.1])))
    recall = [(model.predict(features)[labels == 1] == 1).mean() for model in (plain, weighted)]
    assert recall[0] < 0.5 < 0.7 < recall[1]
    repeated = np.repeat(np.arange(4000), np.where(labels == 1, 9, 1))  # a chip of weight 9 is nine chips
    nine = fit_pixels(features, labels, 2, class_weights=np.array([1.0, 9.0]), penalty=1e-3)
    standardized = (features - features.mean(axis=1, keepdims=True)) / features.std(axis=1, keepdims=True)
    scaler, logistic = nine.model[0], nine.model[1]
    np.testing.assert_allclose(scaler.mean_, features.mean(axis=1), rtol=1e-4)
    other = LogisticRegression(C=1 / (1e-3 * len(repeated)), max_iter=3000, tol=1e-6)
    other.fit(standardized[:, repeated].T, labels[repeated])
    np.testing.assert_allclose(logistic.coef_, other.coef_, rtol=0.02)


def test_one_class_in_training_is_predicted_everywhere() -> None:
    features = np.random.default_rng(0).random((3, 20)).astype(np.float32)
    model = fit_pixels(features, np.full(20, 2), 4)
    assert (model.predict(features) == 2).all()
    np.testing.assert_array_equal(model.probabilities(features)[:, 0], [0, 0, 1, 0])


def test_random_convolutions_are_the_slow_ones() -> None:
    module = RandomConvolutions(3, filters=2, scales=(1, 2), seed=4)
    image = np.random.default_rng(0).normal(size=(3, 12, 16)).astype(np.float32)
    got = module(torch.from_numpy(image)[None])[0].numpy()
    np.testing.assert_array_equal(got[:3], image)
    assert got.shape == (module.width, 12, 16)
    kernels, biases = module.filters[0].numpy(), module.biases[0].numpy()
    for index in range(2):
        answer = sum(ndimage.correlate(image[c], kernels[index, c], mode="nearest") for c in range(3))
        for channel, rectified in ((index, answer + biases[index]), (2 + index, biases[index] - answer)):
            padded = np.pad(np.maximum(rectified, 0), 1, constant_values=np.nan)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
            np.testing.assert_allclose(got[3 + channel], np.nanmean(windows, axis=(2, 3)), atol=1e-5)


def test_random_convolutions_are_fixed_by_their_seed() -> None:
    image = torch.randn(2, 4, 30, 37, generator=torch.Generator().manual_seed(0))
    module = RandomConvolutions(4, seed=1)
    features = module(image)
    assert features.shape == (2, module.width, 30, 37)
    assert not features.requires_grad
    assert list(module.parameters()) == []
    assert torch.equal(RandomConvolutions(4, seed=1)(image), features)
    assert not torch.equal(RandomConvolutions(4, seed=2)(image), features)
    # A chip's features do not depend on its neighbours in the batch.
    torch.testing.assert_close(module(image[1:]), features[1:])
    # Nearly every filter says something on standardized imagery, which is smooth, at every scale.
    smooth = torch.nn.functional.interpolate(image, scale_factor=8, mode="bilinear")
    spread = module(smooth).std((0, 2, 3))[4:].view(4, -1)
    assert ((spread > 0.02).float().mean(1) > 0.9).all()


def test_pixels_beat_the_majority_on_real_land_cover(shared_data) -> None:
    # Issue figure for this protocol (five places, 56-px blocks, two folds, all bands): mIoU 0.487, accuracy 0.792.
    import rasterio

    reflectance, labels = [], []
    for path in sorted((shared_data / "landcover" / "images_l2a").glob("*.tif")):
        with rasterio.open(path) as source:
            reflectance.append(source.read() / np.float32(10_000))
        with rasterio.open(shared_data / "landcover" / "labels" / path.name) as source:
            labels.append(source.read(1) - 1)
    truth = np.stack(labels)
    fold = np.broadcast_to(np.add.outer(np.arange(224) // 56, np.arange(224) // 56) % 2, truth.shape)
    features = pixel_features(np.stack(reflectance, axis=1), TWELVE)
    total = np.zeros((9, 9), np.int64)
    for held in (0, 1):
        rows = np.random.default_rng(0).choice(np.flatnonzero(fold != held), 10_000, replace=False)
        model = fit_pixels(features.reshape(len(features), -1)[:, rows], truth.ravel()[rows], 9)
        test = fold == held
        total += confusion(truth[test], model.predict(features[:, test]), 9)
    got = scores(total)
    assert 0.46 < got.miou < 0.56
    assert 0.78 < got.overall_accuracy < 0.82
