"""What the data side of a run can give, told before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

Key = TypeVar("Key")

ENOUGH = 0.5  # seconds of measuring


def data_pace(
    read: Callable[[Key], object], prepare: Callable[[Key], object], keys: Iterable[Key], *, workers: int, packed: bool
) -> str:
    """Read and prepare a few chips, and say how many a second the loader will give and which of the two limits it.

    Args:
        read: Reads a chip.
        prepare: Reads a chip and makes of it what the loader hands out: its views, or their draws.
        keys: Of chips; the first warms up and does not count.
        workers: Loader processes; 0 for none, where training and loading take turns.
        packed: Whether the chips are packed.

    Returns:
        One line. A run that wants more than that many chips a second waits for its data.
    """
    reading = preparing = 0.0
    counted = -1
    for key in keys:
        began = time.perf_counter()
        read(key)
        between = time.perf_counter()
        prepare(key)
        ended = time.perf_counter()
        # What was just read lies in memory: what `prepare` takes is near that of the views alone.
        read(key)
        again = time.perf_counter() - ended
        counted += 1
        if counted:
            reading += between - began
            preparing += max(0.0, ended - between - again)
            if reading + preparing > ENOUGH:
                break
    if counted < 1:
        return "data: too few chips to foresee its pace"
    reading, preparing = reading / counted, preparing / counted
    rate = max(1, workers) / max(reading + preparing, 1e-9)
    limit = "preparing" if preparing >= reading else "reading"
    line = (
        f"data: about {rate:.3g} chips/s ({1e3 * reading:.2g} ms reading, {1e3 * preparing:.2g} ms preparing a chip; "
        f"--data.workers {workers}), limited by {limit}"
    )
    if limit == "reading" and not packed:
        line += "; python -m ssl_geo.pack makes that faster"
    return line
