"""What a person and a log see of a run: progress bar, log lines, speed, the share of time spent waiting for data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from ssl_geo.errors import UserError, printable
from ssl_geo.training.health import collapse_warning
from ssl_geo.training.runs import RunLog

Batch = TypeVar("Batch")

WAITING = 0.1  # share of the time from which waiting for data is reported


class Progress:
    """Progress bar on stderr, RUN/log.jsonl and TensorBoard; on ranks other than the main one it is silent.

    Args:
        run: The run folder.
        start: Steps done.
        steps: Of the whole run.
        batch_size: Chips a step.
        main: Whether this is the main rank.
        data_limit: What limits the loader (`DataPace.limit`), said once where the run waits for it.
    """

    def __init__(self, run: Path, *, start: int, steps: int, batch_size: int, main: bool, data_limit: str = "") -> None:
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=not main, dynamic_ncols=True)
        self._log = RunLog(run, start) if main else None
        self._batch_size = batch_size
        self._waited, self._since, self._logged_at = 0.0, time.perf_counter(), start
        self._start, self._data_limit = start, data_limit

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on and add up the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            tqdm.write(printable(line))

    def record(self, step: int, loss: Tensor, measures: Mapping[str, float | Tensor]) -> None:
        """Write a log line; reading tensors here is the loop's only wait for the device.

        Args:
            step: Updates done.
            loss: Scalar, already the mean over ranks.
            measures: Learning rate, health and the like.
        """
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in measures.items()}
        record = {
            "step": step,
            "loss": float(loss),
            **values,
            "samples_per_s": round((step - self._logged_at) * self._batch_size / elapsed, 2),
            "data_wait": round(self._waited / elapsed, 4),
        }
        is_first = self._logged_at == self._start  # in which the loader starts
        if record["data_wait"] >= WAITING and not is_first and self._data_limit:
            self.say(
                f"step {step}: {record['data_wait']:.0%} of the time goes into waiting for data, {self._data_limit}"
            )
            self._data_limit = ""  # once is enough
        self._waited, self._since, self._logged_at = 0.0, now, step
        if self._log:
            self._log.write({k: v if math.isfinite(v) else None for k, v in record.items()})
        self._bar.set_postfix(
            loss=f"{record['loss']:.3f}",
            chips_per_s=f"{record['samples_per_s']:.0f}",
            data_wait=f"{record['data_wait']:.0%}",
            refresh=False,
        )
        warning = collapse_warning(values)
        if warning:
            self.say(f"step {step}: WARNING the representation has collapsed: {warning}")

    def advance(self) -> None:
        """Move the bar on by one step."""
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.close()
        if self._log:
            try:
                self._log.close()
            except UserError:
                if kind is None:  # else what ended the loop is what the user must hear of
                    raise
