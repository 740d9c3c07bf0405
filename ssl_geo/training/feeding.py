"""Batches for the steps of a run, whatever happens to the processes that make them."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from ssl_geo.errors import UserError, tell
from ssl_geo.training.sampling import StepBatches

Batch = TypeVar("Batch")

PATIENCE = 3  # deaths of loader processes in a row, with no batch between them
AHEAD = 2  # batches that a loader process makes before they are asked for
OTHER_FILES = 96  # that a process may have open: 64 scenes (ssl_geo.imagery.gdal), a checkpoint, modules, ...
PIPES = 8  # of each loader process, at either end
_PR_SET_PDEATHSIG = 1  # prctl(2)


def allow_open_files(*, workers: int, tensors: int) -> None:
    """Raise this process's limit of open files where its loaders may need more than it is.

    A tensor of a batch is handed over as an open file, and where one too many is opened torch waits for ever.

    Args:
        workers: Loader processes.
        tensors: Of a batch.

    Raises:
        UserError: The machine does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OTHER_FILES + workers * (PIPES + AHEAD * tensors)
    if workers == 0 or soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"the limit of open files is {hard} (ulimit -n) and {workers} loader processes may need {needed}: raise it "
            f"with ulimit -n {needed}, or lower --data.workers (0: no loader processes)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def feed(
    dataset: Dataset[Batch], order: StepBatches, *, workers: int, pinned: bool, say: Callable[[str], None] = tell
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
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=partial(_stay_with_the_run, os.getpid()),
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


def _stay_with_the_run(run: int, worker: int) -> None:
    """Leave signals to the run, and end where it has ended.

    Schedulers signal all processes of a job: the run saves and leaves, and takes its loaders with it. Where it was
    killed (SIGKILL), the kernel ends them (Linux), also while they are blocked.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != run:
        os._exit(1)


class _Told(Dataset[Any], Generic[Batch]):
    """Hands over what the user can mend as a value: raised in a loader process it would come with that one's stack."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: Any) -> Batch | UserError:
        try:
            return self.dataset[keys]
        except UserError as error:
            return error
