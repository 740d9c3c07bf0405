import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_geo.errors import UserError
from ssl_geo.training.feeding import allow_open_files

TRAINER = """
import os, time
from ssl_geo.training.feeding import feed
from ssl_geo.training.sampling import StepBatches
class Slow:
    def __getitem__(self, keys):
        if keys[0][1] != first:
            time.sleep(600)  # blocked: it does not look whether the run is still there
        return os.getpid()
order = StepBatches(chips=8, batch_size=1, start=0, stop=8, seed=0, rank=0, world=1)
first = next(iter(order))[0][1]
for loader in feed(Slow(), order, workers=1, pinned=False):
    print(loader, flush=True)
"""


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_blocked_loader_does_not_outlive_a_run_that_was_killed():
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True)
    with trainer:
        assert trainer.stdout is not None
        loader = int(trainer.stdout.readline())
        assert lives(loader)
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while lives(loader) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(loader)


def test_too_few_open_files_are_refused_before_they_hang_the_loaders(monkeypatch):
    """`ulimit -n 24` with two workers waited for ever for a tensor that could not be handed over."""
    limits = [(24, 24)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    with pytest.raises(UserError, match=r"limit of open files is 24 \(ulimit -n\) and 2 loader .* need (\d+): .*"):
        allow_open_files(workers=2, tensors=3)
    allow_open_files(workers=0, tensors=3)
    assert limits == [(24, 24)]


@pytest.mark.parametrize(
    ("limit", "raised"), [((64, 4096), True), ((64, resource.RLIM_INFINITY), True), ((1024, 4096), False)]
)
def test_the_limit_is_raised_where_the_machine_allows_it(monkeypatch, limit, raised):
    limits = [limit]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    allow_open_files(workers=2, tensors=10)
    assert (len(limits) == 2) == raised
    assert limits[-1][1] == limit[1]
    assert limits[-1][0] >= 2 * 2 * 10
