"""Batch normalization takes the statistics of images; weights stay."""

import numpy as np
import pytest
import torch
from torch import nn

from ssl_geo.probing.normalizing import CHIPS, chips_to_normalize, normalize


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()


@pytest.fixture
def images():
    return 5 + 2 * np.random.default_rng(0).standard_normal((129, 2, 4, 4)).astype(np.float32)


def test_batch_norm_has_the_statistics_of_the_images_and_no_weight_has_changed(network, images):
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    momentum = network[1].momentum
    assert normalize(network, images.__getitem__, np.arange(128)) is network
    maps = network[0](torch.from_numpy(images[:128])).detach()
    assert not any(layer.training for layer in network.modules())
    assert network[1].momentum == momentum
    torch.testing.assert_close(network[1].running_mean, maps.mean((0, 2, 3)))
    # Two batches of 64: the mean of their variances.
    variances = torch.stack([half.transpose(0, 1).flatten(1).var(1) for half in maps.split(64)])
    torch.testing.assert_close(network[1].running_var, variances.mean(0))
    assert all(torch.equal(*pair) for pair in zip(weights, network.parameters(), strict=True))


def test_without_images_the_statistics_stay(network, images):
    normalize(network, images.__getitem__, np.arange(64))
    before = [buffer.clone() for buffer in network.buffers()]
    normalize(network, images.__getitem__, np.arange(0))
    assert all(torch.equal(*pair) for pair in zip(before, network.buffers(), strict=True))


def test_no_batch_is_left_with_a_single_image_of_one_place(images):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2)).eval()
    normalize(network, images.__getitem__, np.arange(129))
    means = torch.from_numpy(images).mean((2, 3))
    torch.testing.assert_close(network[1].running_mean, torch.stack([means[:65].mean(0), means[65:].mean(0)]).mean(0))


def test_a_batch_of_one_image_is_made_two(images):
    """A probe with --batch_size 1 ended in a traceback where a layer has one place."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2)).eval()
    normalize(network, images.__getitem__, np.arange(4), batch_size=1)
    torch.testing.assert_close(network[1].running_mean, torch.from_numpy(images[:4]).mean((0, 2, 3)))


def test_a_network_without_batch_norm_asks_for_no_image():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3)).eval()
    chips = chips_to_normalize(network, np.arange(1000))
    assert chips.size == 0

    def read(number):
        raise AssertionError(number)

    assert normalize(network, read, chips) is network


def test_chips_are_drawn_from_those_given_always_the_same(network):
    given = np.arange(5000, 7000)
    drawn = chips_to_normalize(network, given)
    assert len(set(drawn.tolist())) == CHIPS
    assert np.isin(drawn, given).all()
    assert (drawn == chips_to_normalize(network, given)).all()
    assert set(chips_to_normalize(network, given[:10]).tolist()) == set(range(5000, 5010))
