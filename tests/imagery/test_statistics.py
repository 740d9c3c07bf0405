"""Streamed statistics equal those of all values at once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geo.imagery.statistics import BandStatistics


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=8), st.floats(-1e6, 1e6), st.floats(0.01, 1e4))
def test_merged_parts_equal_the_whole(sizes: list[int], center: float, spread: float) -> None:
    rng = np.random.default_rng(len(sizes))
    parts = [center + spread * rng.normal(size=(3, size)) for size in sizes]
    merged = BandStatistics.empty(3)
    for part in parts:
        merged = merged.merge(BandStatistics.of(part))
    whole = np.concatenate([np.empty((3, 0)), *parts], axis=1)
    assert merged.count == whole.shape[1]
    if merged.count:
        np.testing.assert_allclose(merged.mean, whole.mean(axis=1), rtol=1e-9, atol=1e-9 * (abs(center) + spread))
        np.testing.assert_allclose(merged.std, whole.std(axis=1), rtol=1e-6, atol=1e-9 * (abs(center) + spread))
        reflectance = merged.to_reflectance(1e-4, -1000)
        np.testing.assert_allclose(reflectance.mean, ((whole - 1000) * 1e-4).mean(axis=1), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(reflectance.std, (whole * 1e-4).std(axis=1), rtol=1e-6, atol=1e-9)
    else:
        assert (merged.std == 0).all()


def test_large_dn_do_not_lose_precision() -> None:
    values = np.array([[60_000.0, 60_001.0] * 500_000], np.float32)
    np.testing.assert_allclose(BandStatistics.of(values).std, 0.5, rtol=1e-12)
