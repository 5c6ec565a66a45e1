"""Runs cases one after another, records them, and keeps what it has when it is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from manyheads.bench import limits
from manyheads.bench.limits import Limits
from manyheads.bench.measure import brief
from manyheads.bench.row import Row
from manyheads.bench.store import Store
from manyheads.bench.suite import Case, Options


class Display(Protocol):
    """Where progress is shown; see ``manyheads.bench.display``."""

    def say(self, text: str) -> None:
        """What is going on now."""

    def done(self, case: Case, rows: list[Row], seconds: float) -> None:
        """A case has ended."""


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        rows: All rows of the file.
        interrupted: The number of the signal that stopped it, 0 if none did.
        failed: Rows whose provider broke.
        missed: Rows of ``targets`` whose bar was missed.
    """

    rows: list[Row] = field(default_factory=list)
    interrupted: int = 0

    @property
    def failed(self) -> list[Row]:
        """Rows whose provider broke."""
        return [r for r in self.rows if r.status == "failed"]

    @property
    def missed(self) -> list[Row]:
        """Bars that were missed, or could not be measured; bars for another device are neither."""
        return [r for r in self.rows if r.verdict not in (None, "met") and r.status != "refused"]

    def status(self, *, verdict: bool = True) -> int:
        """The exit status of the command.

        Args:
            verdict: Whether a missed bar counts.

        Returns:
            130 or 143 after an interruption, 1 for a failure or a missed bar, else 0.

        Example:
            >>> Outcome([Row("targets", "dense", "manyheads", verdict="missed")]).status()
            1
        """
        if self.interrupted:
            return 128 + self.interrupted
        return int(bool(self.failed) or (verdict and bool(self.missed)))


class Run:
    """A benchmark in progress: the context that its cases see.

    Args:
        options: What was asked.
        store: Where rows go.
        display: Where progress goes.
        rows: Rows that the file has already.
        finished: Cases that the file has already.
        limits: The machine's limits, if the file has them already.
    """

    def __init__(
        self,
        options: Options,
        store: Store,
        display: Display,
        *,
        rows: Sequence[Row] = (),
        finished: Sequence[tuple[str, str]] = (),
        machine: Limits | None = None,
    ) -> None:
        self.options = options
        self._store = store
        self._display = display
        self._rows: dict[tuple[str, str], list[Row]] = {key: [] for key in finished}
        for row in rows:
            self._rows.setdefault((row.suite, row.case), []).append(row)
        self._limits = machine

    @property
    def limits(self) -> Limits:
        """The measured limits of this machine, measured at first use if the file did not have them."""
        if self._limits is None:
            self._limits = limits.measure(device=self.options.device)
        return self._limits

    def say(self, text: str) -> None:
        """Shows what is going on."""
        self._display.say(text)

    def rows(self, case: Case) -> list[Row]:
        """Rows of a case, run now unless this file has it."""
        if case.key not in self._rows:
            start = time.perf_counter()
            try:
                found = case.run(self)
            except Exception as error:  # one broken case must not cost the others
                found = [Row(case.suite, case.name, "-", status="failed", reason=brief(error))]
            seconds = time.perf_counter() - start
            self._store.case(*case.key, found, seconds)
            self._rows[case.key] = found
            self._display.done(case, found, seconds)
        return self._rows[case.key]

    def all(self, cases: Sequence[Case]) -> Outcome:
        """Runs the cases and closes the file, whatever happens.

        Args:
            cases: What to run, in order.

        Returns:
            The rows, and whether the run was stopped.
        """
        stopped = 0
        with _stoppable():
            try:
                for case in cases:
                    self.rows(case)
            except Stopped as stop:
                stopped = stop.signal
                done = sum(case.key in self._rows for case in cases)
                self._store.note(f"interrupted after {done} of {len(cases)} cases")
        self._store.close()
        return Outcome([row for rows in self._rows.values() for row in rows], stopped)


class Stopped(BaseException):
    """The process was asked to stop; not an ``Exception``, so that no case swallows it.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        """Remembers the signal."""
        super().__init__(number)
        self.signal = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into ``Stopped``; while rows are being saved, more are ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before: dict[signal.Signals, Callable[..., object] | int | None] = {}
    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            before[each] = signal.signal(each, stop)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
