"""Batches for the steps of a run, whatever happens to the processes that make them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from ssl_geo.errors import UserError
from ssl_geo.training.sampling import StepBatches

Batch = TypeVar("Batch")

PATIENCE = 3  # deaths of loader processes in a row, with no batch between them


def feed(
    dataset: Dataset[Batch], order: StepBatches, *, workers: int, pinned: bool, say: Callable[[str], None] = print
) -> Iterator[Batch]:
    """Pass on the batches of the steps, in order.

    A loader process that is killed (by the kernel for want of memory, most often) is said, and all of them are started
    anew with the batch that is missing. As a batch is a function of its step, nothing else changes.

    Args:
        dataset: Gives the batch of a list of keys.
        order: The keys of each step.
        workers: Loader processes; 0: this one makes the batches.
        pinned: Put them into pinned memory, from which a GPU copies by itself.
        say: Takes a line.

    Raises:
        UserError: What the data set raised, as it was raised; or loader processes die again and again.
    """
    step, deaths = order.start, 0
    while step < order.stop:
        others = multiprocessing.active_children()
        loader = DataLoader(
            _Told(dataset),
            sampler=dataclasses.replace(order, start=step),
            batch_size=None,  # a key of the data set is a batch
            num_workers=workers,
            pin_memory=pinned,
            worker_init_fn=_leave_signals_to_the_run,
        )
        batches: Iterator[Any] = iter(loader)
        if workers:
            # torch raises at the death of a process wherever the run is then, be it in the middle of an update; without
            # its handler it notices when it waits for a batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        loaders = [child for child in multiprocessing.active_children() if child not in others]
        try:
            while (batch := next(batches, None)) is not None:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
                step, deaths = step + 1, 0
        except (RuntimeError, OSError, EOFError) as error:
            died = _dead(loaders)
            if died is None:
                raise
            deaths += 1
            if deaths == PATIENCE:
                raise UserError(
                    f"{deaths} times in a row a loader process was killed ({died}): the machine may be short of "
                    f"memory, lower --data.workers from {workers}"
                ) from error
            say(f"a loader process was killed ({died}): starting them anew at step {step}")
        finally:
            for process in loaders:  # at the end they have left by themselves, else they may be blocked
                process.kill()


def _dead(processes: list[BaseProcess]) -> str | None:
    """How a process ended by itself, None where all are at work; a dying one has ten seconds to be gone."""
    ending = wait([process.sentinel for process in processes], timeout=10)
    for process in processes:
        if process.sentinel in ending:
            process.join()  # what it held is closed, and its sentinel with it, before its exit code is there
    codes = [process.exitcode for process in processes if process.exitcode is not None]
    if not codes:
        return None
    return signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"


def _leave_signals_to_the_run(worker: int) -> None:
    """Schedulers signal all processes of a job: the run saves and leaves, and takes its loaders with it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Told(Dataset[Any], Generic[Batch]):
    """Hands over what the user can mend as a value: raised in a loader process it would come with that one's stack."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: Any) -> Batch | UserError:
        try:
            return self.dataset[keys]
        except UserError as error:
            return error
