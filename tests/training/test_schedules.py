import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_geo.training.schedules import cosine, linear, warmup_cosine


def reference_cosine(start: float, end: float, steps: int) -> np.ndarray:
    """The array of facebookresearch/dino's cosine_scheduler, without warm-up."""
    i = np.arange(steps)
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * i / steps))


def test_cosine_equals_the_reference_array():
    expected = reference_cosine(0.996, 1.0, 50)
    assert [cosine(s, steps=50, start=0.996, end=1.0) for s in range(50)] == pytest.approx(expected)
    assert cosine(50, steps=50, start=0.996, end=1.0) == 1.0
    assert cosine(51, steps=50, start=0.996, end=1.0) == 1.0


def test_warmup_then_cosine_equals_the_reference_array():
    expected = np.concatenate([np.linspace(0, 2e-3, 10, endpoint=False), reference_cosine(2e-3, 1e-6, 40)])
    values = [warmup_cosine(s, steps=50, warmup_steps=10, peak=2e-3, end=1e-6) for s in range(50)]
    assert values == pytest.approx(expected)


@given(st.integers(1, 200), st.integers(0, 300), st.floats(-1, 1), st.floats(-1, 1))
def test_values_stay_between_start_and_end(steps, step, start, end):
    for schedule in (cosine, linear):
        value = schedule(step, steps=steps, start=start, end=end)
        assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


def test_a_warmup_as_long_as_the_run_is_all_warmup():
    values = [warmup_cosine(s, steps=4, warmup_steps=4, peak=1.0, end=0.0) for s in range(4)]
    assert values == pytest.approx([0, 0.25, 0.5, 0.75])


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 11 steps does not fit a run of 10"):
        warmup_cosine(0, steps=10, warmup_steps=11, peak=1.0, end=0.0)
