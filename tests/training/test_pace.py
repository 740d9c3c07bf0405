import time

import pytest

from ssl_geo.training import pace
from ssl_geo.training.pace import data_pace


class Clock:
    """Time that passes only where chips are read and prepared."""

    def __init__(self, monkeypatch, read, views):
        self.now, self.cached, self.calls = 0.0, None, 0
        self.costs = read, views
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def read(self, key):
        self.calls += 1
        self.now += 0.001 if key == self.cached else self.costs[0]
        self.cached = key

    def prepare(self, key):
        self.read(key)
        self.now += self.costs[1]


@pytest.mark.parametrize(
    ("read", "views", "workers", "packed", "words"),
    [
        (
            0.010,
            0.040,
            1,
            False,
            "20 chips/s (10 ms reading, 40 ms preparing a chip; --data.workers 1), limited by preparing",
        ),
        (0.010, 0.040, 4, True, "about 80 chips/s"),
        (
            0.040,
            0.010,
            0,
            True,
            "20 chips/s (40 ms reading, 10 ms preparing a chip; --data.workers 0), limited by reading",
        ),
        (0.040, 0.010, 2, False, "limited by reading; python -m ssl_geo.pack"),
    ],
)
def test_the_line_says_the_pace_and_what_limits_it(monkeypatch, read, views, workers, packed, words):
    clock = Clock(monkeypatch, read, views)
    line = data_pace(clock.read, clock.prepare, range(5), workers=workers, packed=packed)
    assert words in line
    assert ("ssl_geo.pack" in line) == (not packed and read > views)


def test_slow_chips_end_the_measuring_early(monkeypatch):
    clock = Clock(monkeypatch, 3.0, 1.0)
    assert "about 0.25 chips/s" in data_pace(clock.read, clock.prepare, range(100), workers=1, packed=True)
    assert clock.calls == 6  # one to warm up and one that took longer than enough, three reads each
    assert pace.ENOUGH < 4


def test_one_chip_is_too_few(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 1.0)
    assert "too few chips" in data_pace(clock.read, clock.prepare, [0], workers=1, packed=True)
