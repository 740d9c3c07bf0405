"""What the data side of a run can give, foreseen before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")

ENOUGH = 0.5  # seconds of measuring


class DataPace(NamedTuple):
    """How fast the loader is.

    Attributes:
        line: How many chips a second it will give. A run that wants more than that many waits for its data.
        limit: What limits it, and what makes it faster: for a run that does wait. Empty where that is not known.
    """

    line: str
    limit: str


def data_pace(
    read: Callable[[Key], object], prepare: Callable[[Key], object], keys: Iterable[Key], *, workers: int, packed: bool
) -> DataPace:
    """Read and prepare a few chips, and foresee how many a second the loader will give and which of the two limits it.

    Args:
        read: Reads a chip.
        prepare: Reads a chip and makes of it what the loader hands out: its views, or their draws.
        keys: Of chips; the first warms up and does not count.
        workers: Loader processes; 0 for none, where training and loading take turns.
        packed: Whether the chips are packed.
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
        return DataPace("data: too few chips to foresee its pace", "")
    reading, preparing = reading / counted, preparing / counted
    rate = max(1, workers) / max(reading + preparing, 1e-9)
    line = (
        f"data: about {rate:.3g} chips/s ({1e3 * reading:.2g} ms reading, {1e3 * preparing:.2g} ms preparing a chip; "
        f"--data.workers {workers})"
    )
    limit = f"limited by {'preparing' if preparing >= reading else 'reading'}: give more --data.workers"
    if reading > preparing and not packed:
        limit += ", or pack the chips (python -m ssl_geo.pack)"
    return DataPace(line, limit)
