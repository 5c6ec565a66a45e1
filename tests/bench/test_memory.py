"""Peak memory is that of the call: more for what takes more, and nothing for the results."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench import memory
from manyheads.bench.measure import with_peak
from manyheads.bench.row import Row
from manyheads.bench.workload import Problem
from manyheads.mask import Window

pytestmark = pytest.mark.skipif(memory.available() is not None, reason=str(memory.available()))


def scratch(mib):
    """Touches some memory and returns a little."""
    return memory.peak_here(lambda: torch.ones(mib * 2**18).sum())


def kept(mib):
    """Returns what it touches."""
    return memory.peak_here(lambda: torch.ones(mib * 2**18), results=lambda t: t.nbytes)


def test_scratch_memory_is_seen_and_results_are_not_counted():
    assert 60 < scratch(64).beyond_mib < 80
    assert kept(64).beyond_mib < 16


def test_a_worker_measures_in_a_process_of_its_own():
    problem = Problem(Window(16), 3000, heads=2, width=16)
    with memory.Worker() as worker:
        ours = worker.ask("manyheads.bench.measure:peak_of", problem, "manyheads")
        theirs = worker.ask("manyheads.bench.measure:peak_of", problem, "sdpa")
    assert theirs.beyond_mib > 8  # at least the mask
    assert ours.beyond_mib < theirs.beyond_mib
    assert ours.process_mib > 50


def test_what_fails_there_is_told_here():
    with (
        memory.Worker() as worker,
        pytest.raises(RuntimeError, match="ValueError: unknown provider 'nobody'"),
    ):
        worker.ask("manyheads.bench.providers:get", "nobody")


def test_a_process_that_dies_is_an_error_not_a_hang():
    with memory.Worker() as worker, pytest.raises(RuntimeError, match="ended with status 3"):
        worker.ask("os:_exit", 3)


def test_a_row_says_when_nothing_could_be_measured():
    row = with_peak(Row("masks", "x", "nobody"), Problem(Window(16), 64))
    assert row.peak_mib is None
    assert "not measured: ValueError: unknown provider" in (row.note or "")
