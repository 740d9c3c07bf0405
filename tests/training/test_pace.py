import time

import pytest
import torch

from ssl_geo.training import pace
from ssl_geo.training.pace import data_pace
from ssl_geo.training.progress import Progress


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
            "20 chips/s (10 ms reading, 40 ms preparing a chip; --data.workers 1)",
        ),
        (0.010, 0.040, 4, True, "about 80 chips/s"),
        (
            0.040,
            0.010,
            0,
            True,
            "20 chips/s (40 ms reading, 10 ms preparing a chip; --data.workers 0)",
        ),
        (0.040, 0.010, 2, False, "about 40 chips/s"),
    ],
)
def test_the_line_says_the_pace_and_what_limits_it(monkeypatch, read, views, workers, packed, words):
    clock = Clock(monkeypatch, read, views)
    line, limit = data_pace(clock.read, clock.prepare, range(5), workers=workers, packed=packed)
    assert words in line
    assert "limited" not in line
    assert f"limited by {'reading' if read > views else 'preparing'}" in limit
    assert ("ssl_geo.pack" in limit) == (not packed and read > views)


@pytest.mark.parametrize(("share", "told"), [(0.01, False), (0.3, True)])
def test_what_limits_the_data_is_told_where_the_run_waits_for_it(monkeypatch, tmp_path, capsys, share, told):
    """ "limited by preparing" was said of a run that waited 1 % of its time."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def batches():
        while True:
            now[0] += share
            yield None

    with Progress(tmp_path, start=0, steps=6, batch_size=4, main=True, data_limit="limited by preparing") as progress:
        for step, _ in zip(range(1, 7), progress.timed(batches()), strict=False):
            now[0] += 1 - share
            progress.record(step, torch.tensor(1.0), {})
            if step == 1:
                assert "limited" not in capsys.readouterr().out  # the loader had to start
    assert capsys.readouterr().out.count("waiting for data, limited by preparing") == told


def test_slow_chips_end_the_measuring_early(monkeypatch):
    clock = Clock(monkeypatch, 3.0, 1.0)
    assert "about 0.25 chips/s" in data_pace(clock.read, clock.prepare, range(100), workers=1, packed=True).line
    assert clock.calls == 6  # one to warm up and one that took longer than enough, three reads each
    assert pace.ENOUGH < 4


def test_one_chip_is_too_few(monkeypatch):
    clock = Clock(monkeypatch, 1.0, 1.0)
    assert "too few chips" in data_pace(clock.read, clock.prepare, [0], workers=1, packed=True).line
