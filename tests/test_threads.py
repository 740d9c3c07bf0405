import os
import signal
import subprocess
import sys
import threading

import pytest

from ssl_geo import threads
from ssl_geo.errors import UserError, interrupt_on_termination
from ssl_geo.threads import in_order


def test_results_come_in_order_with_few_in_flight():
    begun: list[int] = []
    taken = iter(range(100))
    results = in_order(lambda item: begun.append(item) or item * item, taken, 3)
    assert next(results) == 0
    assert max(begun) <= 7
    assert [0, *results] == [item * item for item in range(100)]
    assert not any(isinstance(thread, threads._Worker) for thread in threading.enumerate())


def test_an_error_is_raised_where_its_result_would_come():
    def odd(item: int) -> int:
        if item == 5:
            raise UserError("five")
        return item

    results = in_order(odd, range(50), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="five"):
        next(results)


def test_a_thread_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(threads, "PATIENCE", 0.1)
    answer = threading.Event()
    results = in_order(lambda item: item == 0 or answer.wait(), range(50), 2)
    next(results)
    results.close()  # returns, where the end of a ThreadPoolExecutor waits
    left = [thread for thread in threading.enumerate() if isinstance(thread, threads._Worker)]
    assert left
    assert all(thread.daemon for thread in left)
    answer.set()
    for thread in left:
        thread.join(60)
        assert not thread.is_alive()


HANGING = """
import os, sys, threading
import rasterio
from ssl_geo.errors import interrupt_on_termination, one_line_errors
from ssl_geo.threads import in_order
silent, _ = os.pipe()
def read(item):
    print("reading", flush=True)
    os.read(silent, 1)  # as a file system does whose server is gone
interrupt_on_termination()
with one_line_errors("hanging"):
    raise SystemExit(list(in_order(read, range(9), 1)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_whose_thread_hangs_in_the_file_system_stops_when_told(number):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "hanging: stopped\n"


def test_under_nohup_a_hangup_does_not_stop_a_command():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupt_on_termination()
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
