"""Rounds are interleaved, counted and summed up as they should be; no test looks at a real clock."""

from __future__ import annotations

import itertools

import pytest

from manyheads.bench.timing import Timing, interleave, percentile


class Clock:
    """A clock that moves only when a call says so."""

    def __init__(self):
        self.now, self.order = 0, []

    def __call__(self):
        return self.now

    def call(self, name, ms):
        costs = itertools.chain(ms, itertools.repeat(ms[-1])) if isinstance(ms, list) else itertools.repeat(ms)

        def run():
            self.order.append(name)
            self.now += int(next(costs) * 1e6)

        return run


def test_rounds_are_interleaved_after_a_first_call_and_a_warm_up():
    clock = Clock()
    calls = {name: clock.call(name, 1.0) for name in "ABC"}
    times = interleave(calls, budget_s=0.0, rounds=(3, 3), warmup=2, clock=clock)
    assert clock.order == list("ABC") * 6
    assert {t.rounds for t in times.values()} == {3}


def test_the_first_call_is_told_apart():
    clock = Clock()
    found = interleave({"a": clock.call("a", [500.0, 2.0])}, budget_s=0.0, rounds=(5, 5), clock=clock)["a"]
    assert (found.first_ms, found.median_ms, found.rounds) == (500.0, 2.0, 5)


def test_calls_that_are_warm_are_counted_from_the_first():
    clock = Clock()
    found = interleave(
        {"a": clock.call("a", [5.0, 2.0])}, budget_s=0.0, rounds=(3, 3), warmup=0, warm=True, clock=clock
    )
    assert (found["a"].samples, found["a"].first_ms) == ((5.0, 2.0, 2.0), None)


def test_the_budget_decides_the_rounds_within_their_limits():
    clock = Clock()

    def rounds(budget):
        return interleave({"a": clock.call("a", 10.0)}, budget_s=budget, rounds=(5, 20), clock=clock)["a"].rounds

    assert [rounds(b) for b in (0.0, 0.1, 60.0)] == [5, 10, 20]


def test_a_sample_of_short_calls_is_their_mean():
    clock = Clock()
    found = interleave({"a": clock.call("a", 1.0)}, budget_s=0.0, rounds=(2, 2), inner=7, warmup=0, clock=clock)
    assert found["a"].samples == (1.0, 1.0)
    assert len(clock.order) == 1 + 2 * 7


def test_a_wide_spread_is_marked():
    assert not Timing((10.0, 10.1, 10.2, 10.1, 10.0)).noisy
    assert Timing((10.0, 10.0, 20.0, 30.0, 5.0)).noisy
    assert not Timing((10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 90.0)).noisy  # one outlier is none


def test_percentiles_interpolate():
    assert [percentile((1.0, 2.0, 3.0, 4.0, 5.0), p) for p in (0.0, 0.2, 0.5, 1.0)] == [1.0, 1.8, 3.0, 5.0]
    assert percentile((7.0,), 0.8) == 7.0


@pytest.mark.parametrize(("calls", "rounds"), [({}, (5, 5)), ({"a": int}, (0, 5)), ({"a": int}, (6, 5))])
def test_nothing_to_time_is_an_error(calls, rounds):
    with pytest.raises(ValueError, match="interleave"):
        interleave(calls, rounds=rounds)
