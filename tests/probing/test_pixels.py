"""Pixels beside the features of a backbone."""

import numpy as np
import timm
import torch

from ssl_geo.probing.baselines import feature_names, pixel_features
from ssl_geo.probing.features import FeatureExtractor
from ssl_geo.probing.pixels import PIXELS, BesidePixels

BANDS = ("B03", "B04", "B08")


def test_the_last_layer_is_what_single_pixels_tell_and_the_others_are_the_backbones():
    model = timm.create_model("resnet10t", in_chans=3, num_classes=0).eval()
    extractor = FeatureExtractor(model, [1, 2], input_size=32)
    mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([0.05, 0.06, 0.07])
    beside = BesidePixels(extractor, mean, std, BANDS)
    reflectance = np.random.default_rng(0).uniform(0.01, 0.5, (3, 2, 32, 24)).astype(np.float32)
    images = torch.from_numpy((reflectance - mean[:, None, None, None]) / std[:, None, None, None]).transpose(0, 1)
    with torch.no_grad():
        found, plain = beside(images), extractor(images)
    assert beside.names == [*extractor.names, PIXELS]
    assert beside.channels == [*extractor.channels, len(feature_names(BANDS))]
    assert beside.reduction[-1] == 1
    for name in extractor.names:
        assert torch.equal(found[name], plain[name])
    for number in range(2):
        expected = pixel_features(reflectance[:, number], BANDS)
        np.testing.assert_allclose(found[PIXELS][number].numpy(), expected, rtol=1e-3, atol=1e-4)
