"""Principal components as scikit-learn has them, from portions."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from ssl_geo.errors import UserError
from ssl_geo.probing.embedding import principal_components, sampled_features
from ssl_geo.probing.tiling import lay_tiles


def test_portions_give_scikit_learns_components():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(500, 6)) * [5, 3, 2, 1, 0.5, 0.1]) @ rng.normal(size=(6, 6)) + 1000
    found = principal_components([features[:10], features[10:10], features[10:]], 3)
    reference = PCA(3).fit(features)
    signs = np.sign((found.axes.numpy() * reference.components_).sum(axis=1))
    np.testing.assert_allclose(found.axes.numpy() * signs[:, None], reference.components_, atol=1e-4)
    np.testing.assert_allclose(found.explained, reference.explained_variance_ratio_, rtol=1e-6)
    places = torch.from_numpy(features.T[None, :, :, None]).float()
    np.testing.assert_allclose(
        found.project(places)[0, :, :, 0].numpy().T * signs, reference.transform(features), atol=0.01
    )
    low, high = np.percentile(reference.transform(features) * signs, [2, 98], axis=0)
    np.testing.assert_allclose(found.low, np.minimum(low, high), atol=0.01)
    np.testing.assert_allclose(found.high, np.maximum(low, high), atol=0.01)
    assert (np.take_along_axis(found.axes.numpy(), np.abs(found.axes.numpy()).argmax(1)[:, None], 1) > 0).all()


def test_too_little_to_tell_is_one_line():
    with pytest.raises(UserError, match="fewer than 2"):
        principal_components([], 3)
    with pytest.raises(UserError, match="--components 3"):
        principal_components([np.ones((9, 2))], 3)


def test_a_corner_that_no_sparse_tile_meets_is_found():
    """A scene with the edge of a swath was said to have no valid pixel, and ended the batch."""
    axis = lay_tiles(750, 8, 0.0)

    def read(top):
        valid = np.zeros((32, axis.length * 4), bool)
        valid[:, :20] = top < 20
        return np.full((1, 32, axis.length * 4), top, np.float32), valid

    parts = sampled_features(read, lambda i: i[:, :, ::4, ::4], axis, axis, 4, batch_size=5, device=torch.device("cpu"))
    assert sum(map(len, parts)) >= 5


@pytest.mark.parametrize("length", [40, 3000])
def test_sampled_features_are_of_valid_places_all_over_the_scene(length):
    axis = lay_tiles(length // 4, 8, 0.0)
    width = axis.length * 4

    def read(top):
        rows = np.arange(top, top + 32.0, dtype=np.float32)[:, None] + np.zeros((32, width), np.float32)
        valid = np.zeros((32, width), bool)
        valid[:, : width // 2] = True
        return rows[None], valid

    tiles = 0

    def model(images):
        nonlocal tiles
        tiles += len(images)
        return images[:, :, ::4, ::4]

    samples = np.concatenate(
        list(sampled_features(read, model, axis, axis, 4, batch_size=5, device=torch.device("cpu")))
    )
    assert samples.shape[1] == 1
    assert samples.max() - samples.min() > length * 0.75
    assert 1 <= tiles <= 300
    assert len(samples) <= tiles * 64


def test_what_a_display_shows_comes_of_few_samples_spread_over_all():
    features = np.random.default_rng(0).normal(size=(50_000, 3)) * [9, 2, 1]
    features[40_000:, 0] += 100
    found = principal_components(np.array_split(features, 500), 1)
    low, high = np.percentile(features[:, 0] - features[:, 0].mean(), [2, 98])
    sign = np.sign(found.axes[0, 0].item())
    np.testing.assert_allclose(sorted(sign * np.array([found.low.item(), found.high.item()])), [low, high], atol=2)
