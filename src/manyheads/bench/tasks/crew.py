"""Trains several small models at once, one process each: a small model does not keep two cores busy."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import TASKS
from .train import Protocol, Trained, train

_PATIENCE = 2.0
"""Seconds between two looks at what is still running."""


@dataclass(frozen=True)
class Job:
    """One model to train; only names and numbers, so that it can be sent to a process.

    Attributes:
        task: A name in ``TASKS``, made with its defaults.
        mixers: As in ``Config``.
        protocol: Sizes and steps.
        seed: Of weights and examples.
        rate: Learning rate.
    """

    task: str
    mixers: str
    protocol: Protocol
    seed: int
    rate: float


def do(job: Job, say: Callable[[str], None] = lambda text: None) -> Trained:
    """Trains one model here."""
    return train(TASKS[job.task](), job.mixers, job.protocol, seed=job.seed, rate=job.rate, say=say)


def do_all(
    jobs: Sequence[Job], say: Callable[[str], None] = lambda text: None, *, workers: int | None = None
) -> list[Trained]:
    """Trains several models, each in a process of its own as far as there are cores.

    Results do not depend on the number of processes: every model is trained on one thread.

    Args:
        jobs: What to train.
        say: Told now and then how far it is.
        workers: Processes; by default up to two for each core, and none where there is one core only.

    Returns:
        What each came to, in order.

    Raises:
        Exception: Whatever a training raised.
    """
    # three models that share two cores end sooner than two and then one
    most = cores() if cores() == 1 else 2 * cores()
    workers = min(len(jobs), most if workers is None else workers)
    if workers < 2:
        return [do(job, say) for job in jobs]
    start = time.perf_counter()
    # a pool that is left with an exception, an interruption for one, ends its processes
    with multiprocessing.get_context("spawn").Pool(workers, _begin) as pool:
        found = [pool.apply_async(do, (job,)) for job in jobs]
        while not all(each.ready() for each in found):
            done = sum(each.ready() for each in found)
            say(f"{done} of {len(jobs)} models trained, {time.perf_counter() - start:.0f} s")
            next(each for each in found if not each.ready()).wait(_PATIENCE)
        return [each.get() for each in found]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """The process that asked is the one that is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
