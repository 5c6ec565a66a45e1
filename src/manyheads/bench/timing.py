"""Honest timing: interleaved rounds, medians, and a mark on what is too noisy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

NOISE = 0.25
"""A spread (p80 - p20) above this share of the median marks a row as noisy."""


@dataclass(frozen=True)
class Timing:
    """What interleaved rounds of one call gave.

    Attributes:
        samples: Milliseconds of each round, in order.
        first_ms: The first call, which pays for compilation, layouts and caches; ``None`` if it was not
            timed.
    """

    samples: tuple[float, ...]
    first_ms: float | None = None

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.samples)

    @property
    def median_ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples)

    @property
    def p20_ms(self) -> float:
        """20th percentile over the rounds."""
        return percentile(self.samples, 0.2)

    @property
    def p80_ms(self) -> float:
        """80th percentile over the rounds."""
        return percentile(self.samples, 0.8)

    @property
    def noisy(self) -> bool:
        """Whether the spread is too large for the median to be trusted."""
        return self.p80_ms - self.p20_ms > NOISE * self.median_ms

    def fields(self) -> dict[str, Any]:
        """The fields of a ``Row`` that say this.

        Example:
            >>> Timing((1.0, 2.0, 3.0)).fields()["median_ms"]
            2.0
        """
        return {
            "median_ms": self.median_ms,
            "p20_ms": self.p20_ms,
            "p80_ms": self.p80_ms,
            "rounds": self.rounds,
            "noisy": self.noisy,
            "first_ms": self.first_ms,
        }


def percentile(samples: tuple[float, ...], share: float) -> float:
    """Interpolates linearly between the two samples around a share of the order.

    Example:
        >>> percentile((3.0, 1.0, 2.0), 0.25)
        1.5
    """
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Stopwatch(Protocol):
    """How one sample is taken; a GPU has its own, see ``manyheads.bench.device``."""

    def first(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call as its caller feels them, compilation and launches included."""

    def sample(self, call: Callable[[], object], inner: int) -> float:
        """Milliseconds of one call, the mean over ``inner`` of them."""


@dataclass(frozen=True)
class HostWatch:
    """Reads the clock of the processor around calls that are over when they return.

    Attributes:
        clock: Nanoseconds; replaced in tests.
    """

    clock: Callable[[], int] = time.perf_counter_ns

    def first(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        return self.sample(call, 1)

    def sample(self, call: Callable[[], object], inner: int) -> float:
        """Milliseconds of one call, the mean over ``inner`` of them."""
        start = self.clock()
        for _ in range(inner):
            call()
        return (self.clock() - start) / inner / 1e6


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = 2.0,
    rounds: tuple[int, int] = (5, 50),
    warmup: int = 1,
    inner: int = 1,
    warm: bool = False,
    watch: Stopwatch | None = None,
    before: Callable[[], object] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Times several calls in turn: A, B, C, A, B, C, ...

    What the machine does meanwhile then falls on all alike. After the first call of each, which is timed
    apart, come ``warmup`` more untimed rounds; then rounds until the budget is spent, within the limits on
    rounds.

    Args:
        calls: What to time, by name, in order.
        budget_s: Time for the rounds, in seconds, per call; what ``before`` takes counts.
        rounds: Fewest and most rounds; the fewest are run whatever the budget.
        warmup: Untimed rounds after the first call.
        inner: Calls per sample, for calls of microseconds; a sample is their mean.
        warm: Whether every call has been made before, so that none is a first one.
        watch: How a sample is taken; by the clock of the processor by default.
        before: Run before each sample and not timed: what empties the caches.
        clock: Nanoseconds; replaced in tests.

    Returns:
        A ``Timing`` for each name.

    Raises:
        ValueError: ``calls`` is empty or ``rounds`` is not an increasing pair of positive numbers.

    Example:
        >>> times = interleave({"a": lambda: sum(range(100)), "b": lambda: None}, budget_s=0.01)
        >>> times["a"].rounds >= 5
        True
    """
    fewest, most = rounds
    if not calls or not 1 <= fewest <= most:
        raise ValueError(f"interleave: expected calls and 1 <= fewest <= most rounds, got {len(calls)}, {rounds}")
    watch = HostWatch(clock) if watch is None else watch
    first = {name: None if warm else watch.first(call) for name, call in calls.items()}
    for _ in range(warmup):
        for call in calls.values():
            watch.sample(call, 1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = clock() + budget_s * 1e9 * len(calls)
    for done in range(most):
        if done >= fewest and clock() >= end:
            break
        for name, call in calls.items():
            if before is not None:
                before()
            samples[name].append(watch.sample(call, inner))
    return {name: Timing(tuple(samples[name]), first[name]) for name in calls}
