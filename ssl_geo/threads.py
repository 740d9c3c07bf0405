"""Work shared out among threads, where none of them keeps the process from ending."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = 2.0  # seconds that threads have to finish what they are at when the rest is given up


class _Worker(threading.Thread):
    """Takes tasks until it is given None. A daemon: nobody waits for one that hangs in the file system."""

    def __init__(self, tasks: SimpleQueue[Any]) -> None:
        super().__init__(daemon=True)
        self._tasks = tasks

    def run(self) -> None:
        for future, function, item in iter(self._tasks.get, None):
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)
            del future, item  # or a result would stay in memory while this thread waits


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Apply `function` to the items by threads and give the results in order, with few in flight at a time.

    Rasterio releases Python's lock while it reads, so threads read in parallel. Where an error, a signal or the end of
    the iteration cuts it short, threads that do not finish within two seconds are left behind.

    Args:
        function: Called in several threads at once.
        items: Taken by the calling thread, one after another.
        workers: Number of threads.
    """
    tasks: SimpleQueue[Any] = SimpleQueue()
    pending: deque[Future[Result]] = deque()
    threads = [_Worker(tasks) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        for item in items:
            pending.append(Future())
            tasks.put((pending[-1], function, item))
            if len(pending) > 2 * workers:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    finally:
        for future in pending:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


def _result(future: Future[Result]) -> Result:
    """Wait a second at a time: Python misses a signal that comes just before it waits, until that wait is over."""
    while not wait([future], timeout=1).done:
        pass
    return future.result()


def leave_hanging(code: int | str | None) -> None:
    """End the process with an exit code where a thread was left behind; the exit itself may wait for it in GDAL.

    Args:
        code: As `SystemExit` takes it.
    """
    if any(isinstance(thread, _Worker) for thread in threading.enumerate()):
        if isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
