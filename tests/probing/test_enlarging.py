"""Features of enlarged images, back on the grid of the image."""

import pytest
import timm
import torch
import torch.nn.functional as F

from ssl_geo.probing.enlarging import dense_features
from ssl_geo.probing.features import FeatureExtractor


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", in_chans=3, num_classes=0).eval()


def test_once_as_large_is_the_extractor_itself(model):
    assert isinstance(dense_features(model, [0, 1], side=32), FeatureExtractor)


@pytest.mark.parametrize(("enlarge", "reduction"), [(2, [1, 2, 4]), (4, [1, 1, 2])])
def test_features_are_those_of_the_enlarged_image_and_never_finer_than_its_pixels(model, enlarge, reduction):
    images = torch.randn(2, 3, 32, 48)
    plain = FeatureExtractor(model, [0, 1, 2], input_size=32)
    finer = dense_features(model, [0, 1, 2], side=32, enlarge=enlarge)
    larger = F.interpolate(images, scale_factor=enlarge, mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected, found = plain.as_list(larger), finer.as_list(images)
    assert (finer.names, finer.channels, finer.reduction) == (plain.names, plain.channels, reduction)
    for features, direct, pixels in zip(found, expected, reduction, strict=True):
        assert features.shape[-2:] == (32 // pixels, 48 // pixels)
        times = direct.shape[-1] // features.shape[-1]
        assert torch.allclose(features, F.avg_pool2d(direct, times), atol=1e-6)


def test_a_single_pixel_is_told_from_its_neighbours_at_twice_the_size(model):
    """Two neighbours that a stride of 2 pixels cannot tell apart."""
    images = torch.zeros(1, 3, 32, 32)
    images[0, :, 16, 16] = 5
    with torch.no_grad():
        finest = dense_features(model, [0], side=32, enlarge=2).as_list(images)[0]
    assert finest.shape[-2:] == (32, 32)
    assert not torch.allclose(finest[..., 16, 16], finest[..., 17, 17])
