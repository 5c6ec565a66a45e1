"""Timing on a device is told by its own marks, and the little that differs between devices is checked or refused."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench import device, memory
from manyheads.bench.timing import HostWatch, interleave


class Queue:
    """A device that works through a queue later, with a clock of its own beside that of the caller."""

    def __init__(self):
        self.caller, self.busy, self.delays = 0.0, 0.0, 0

    def launch(self, ms, work):
        """Takes the caller some time, and the device some more once it is free."""
        self.caller += ms
        self.busy = max(self.busy, self.caller) + work

    def delay(self):
        self.delays += 1
        self.launch(0.0, 1.0)

    def wait(self):
        self.caller = max(self.caller, self.busy)

    def event(self):
        return Mark(self)

    def clock(self):
        return int(self.caller * 1e6)


class Mark:
    """An event in the queue."""

    def __init__(self, queue):
        self.queue = queue

    def record(self):
        self.queue.launch(0.0, 0.0)
        self.at = self.queue.busy

    def synchronize(self):
        self.queue.caller = max(self.queue.caller, self.at)

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def queue():
    return Queue()


@pytest.fixture
def watch(queue):
    return device.EventWatch(queue.event, queue.wait, queue.delay, queue.clock)


def test_work_is_timed_on_the_device_and_launches_are_hidden(queue, watch):
    assert watch.sample(lambda: queue.launch(0.2, 0.05), 1) == pytest.approx(0.05)
    assert watch.sample(lambda: queue.launch(0.1, 0.3), 4) == pytest.approx(0.3)
    assert queue.delays == 2


def test_a_caller_slower_than_the_head_start_shows(queue, watch):
    # five milliseconds of launching cannot hide behind one of delay
    assert watch.sample(lambda: queue.launch(5.0, 0.1), 1) == pytest.approx(4.1)


def test_the_first_call_is_what_its_caller_waits_for(queue, watch):
    queue.launch(0.0, 50.0)  # earlier work is not its own
    assert watch.first(lambda: queue.launch(7.0, 2.0)) == pytest.approx(9.0)


def test_launches_are_timed_without_the_work(queue):
    watch = device.LaunchWatch(queue.wait, queue.clock)
    assert watch.sample(lambda: queue.launch(0.02, 3.0), 10) == pytest.approx(0.02, abs=1e-5)
    assert queue.caller == queue.busy


def test_rounds_go_through_the_watch_and_the_eviction_is_not_timed(queue, watch):
    order = []

    def call(name, ms):
        def run():
            order.append(name)
            queue.launch(0.0, ms)

        return run

    times = interleave(
        {"a": call("a", 2.0), "b": call("b", 3.0)},
        budget_s=0.0,
        rounds=(3, 3),
        watch=watch,
        before=call("flush", 40.0),
        clock=queue.clock,
    )
    assert times["a"].samples == pytest.approx((2.0, 2.0, 2.0))
    assert times["b"].samples == pytest.approx((3.0, 3.0, 3.0))
    assert order == ["a", "b"] * 2 + ["flush", "a", "flush", "b"] * 3


@pytest.mark.parametrize("text", ["tpu", "cpu:1", "cuda:x", ""])
def test_other_devices_are_refused(text):
    with pytest.raises(ValueError, match=f"unknown device '{text}'"):
        device.resolve(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="device: cuda was asked for, but torch"):
        device.resolve("cuda")


def test_a_processor_needs_no_marks():
    assert isinstance(device.stopwatch("cpu"), HostWatch)
    assert device.describe("cpu") == {}
    assert device.label("cpu") == "cpu"


def test_the_eviction_streams_through_more_than_the_cache(monkeypatch):
    monkeypatch.setattr(device, "cache_bytes", lambda where: 2**16)
    device.eviction.cache_clear()
    buffer = device.eviction("cpu")()
    device.eviction.cache_clear()
    assert buffer.nbytes > 2**16
    assert buffer.unique().tolist() == [1.0]


def test_the_cache_of_this_machine_has_a_size():
    assert device.cache_bytes("cpu") >= 2**20


def test_sizes_are_read_as_the_kernel_writes_them(tmp_path):
    for text, size in (("48K\n", 48 * 2**10), ("32M", 2**25), ("512", 512), ("", 0), ("many", 0)):
        (tmp_path / "size").write_text(text)
        assert device._bytes(tmp_path / "size") == size
    assert device._bytes(tmp_path / "none") == 0


@pytest.mark.gpu
def test_the_gpu_describes_itself_and_its_allocator_knows_peaks(device):
    from manyheads.bench import device as here

    where = here.resolve(device)
    found = here.describe(where)
    assert found["gpu"] == here.label(where) and found["gpu_l2_mib"] > 0
    peak = memory.peak_here(lambda: torch.ones(2**24, device=where).sum(), device=where)
    assert 60 < peak.beyond_mib < 80
    watch = here.stopwatch(where)
    x = torch.ones(2048, 2048, device=where)
    assert 0 < watch.sample(lambda: x @ x, 3) < watch.first(lambda: x @ x) + 1000
    here.eviction(where)()
