"""Where a benchmark runs: the little that differs between a processor and a GPU."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from manyheads.bench.timing import HostWatch, Stopwatch
from manyheads.common.errors import unknown

KINDS = ("cpu", "cuda")
MIB = 2**20
AHEAD = 2_000_000
"""Cycles (about a millisecond) that a GPU is kept busy before a sample, so that its launches are queued in time."""
CACHE = 32 * MIB
"""Bytes of the last-level cache where the system does not say."""


def resolve(text: str) -> str:
    """Checks a device that somebody asked for and makes it the current one.

    Args:
        text: ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``.

    Returns:
        The same text.

    Raises:
        ValueError: Another kind of device, or a GPU that is not there; says why.

    Example:
        >>> resolve("cpu")
        'cpu'
        >>> resolve("cdua")
        Traceback (most recent call last):
        ValueError: unknown device 'cdua': did you mean 'cuda'? known: cpu, cuda
    """
    kind, _, number = text.partition(":")
    if kind not in KINDS or (number and not (kind == "cuda" and number.isdigit())):
        raise unknown("device", text, KINDS)
    if kind == "cuda":
        if (reason := no_gpu()) is not None:
            raise ValueError(f"device: {text} was asked for, but {reason}")
        if int(number or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: {text} was asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(int(number or 0))
    return text


def no_gpu() -> str | None:
    """Why there is no GPU to measure on, ``None`` if there is one."""
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"torch {torch.__version__} is built without support for GPUs"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def label(device: str) -> str:
    """The device in the rows: ``"cpu"``, or the name of the GPU."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def wait(device: str) -> None:
    """Returns when everything that was started on the device is over."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def stopwatch(device: str) -> Stopwatch:
    """How calls on the device are timed: by the clock of the processor, or by events on the GPU."""
    if device == "cpu":
        return HostWatch()
    return EventWatch(
        event=lambda: torch.cuda.Event(enable_timing=True),
        wait=lambda: wait(device),
        delay=lambda: torch.cuda._sleep(AHEAD),
    )


def launch_watch(device: str) -> Stopwatch:
    """Times what the caller spends in a call, not what the device does afterwards."""
    return HostWatch() if device == "cpu" else LaunchWatch(wait=lambda: wait(device))


class Event(Protocol):
    """A mark in the queue of a device."""

    def record(self) -> object:
        """Puts the mark into the queue."""

    def synchronize(self) -> object:
        """Returns when the device has passed the mark."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this mark to a later one."""


@dataclass(frozen=True)
class EventWatch:
    """Times calls by marks in the queue of the device.

    Before the first mark the device is kept busy for a moment, so that the processor has queued the whole call when the
    device comes to it: what is read is the work, and not the pace of the launches. A call that takes its caller longer
    than that moment, or that waits for the device itself, shows these waits, as it would anywhere.

    Attributes:
        event: Makes a mark.
        wait: Returns when the device is idle.
        delay: Keeps the device busy for a moment without waiting.
        clock: Nanoseconds of the processor, for first calls.
    """

    event: Callable[[], Event]
    wait: Callable[[], object]
    delay: Callable[[], object]
    clock: Callable[[], int] = time.perf_counter_ns

    def first(self, call: Callable[[], object]) -> float:
        """Milliseconds until the work of one call is over, compilation included."""
        self.wait()
        start = self.clock()
        call()
        self.wait()
        return (self.clock() - start) / 1e6

    def sample(self, call: Callable[[], object], inner: int) -> float:
        """Milliseconds of one call on the device, the mean over ``inner`` of them."""
        start, end = self.event(), self.event()
        self.delay()
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / inner


@dataclass(frozen=True)
class LaunchWatch:
    """Times calls until they return, and lets the device finish between samples.

    Attributes:
        wait: Returns when the device is idle.
        clock: Nanoseconds of the processor.
    """

    wait: Callable[[], object]
    clock: Callable[[], int] = time.perf_counter_ns

    def first(self, call: Callable[[], object]) -> float:
        """Milliseconds until one call returns."""
        return self.sample(call, 1)

    def sample(self, call: Callable[[], object], inner: int) -> float:
        """Milliseconds until one call returns, the mean over ``inner`` of them."""
        self.wait()
        start = self.clock()
        for _ in range(inner):
            call()
        took = self.clock() - start
        self.wait()
        return took / inner / 1e6


@functools.lru_cache(maxsize=1)
def eviction(device: str) -> Callable[[], object]:
    """A call that empties the caches by streaming through a buffer larger than the last of them.

    Args:
        device: Whose caches.

    Returns:
        The call; it holds the buffer, one and a half times as large as the last-level cache.
    """
    buffer = torch.zeros(int(1.5 * cache_bytes(device)) // 4, dtype=torch.float32, device=device)
    # an addition in place reads and writes every line through the caches, which plain stores may pass by
    return lambda: buffer.add_(1.0)


def cache_bytes(device: str) -> int:
    """Size of the last-level cache, as the system says.

    Args:
        device: ``"cpu"``, or a GPU, whose last level is L2.
    """
    if device != "cpu":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 2 * CACHE
    sizes = [_bytes(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=0) or CACHE


def describe(device: str) -> dict[str, Any]:
    """What the environment says about the GPU, nothing for a processor.

    Args:
        device: Where the benchmark runs.

    Returns:
        Name, compute capability, multiprocessors, memory, L2, driver, and the versions of CUDA and cuDNN.
    """
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_count": torch.cuda.device_count(),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_processors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_l2_mib": round(cache_bytes(device) / MIB, 1),
        "gpu_driver": driver(),
        "cuda": torch.version.cuda or getattr(torch.version, "hip", None),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    }


def driver() -> str | None:
    """Version of the kernel's GPU driver, ``None`` where the system does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return driver_version(text)


def driver_version(text: str) -> str | None:
    """Finds the version in what the kernel module says of itself.

    Example:
        >>> driver_version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build")
        '580.65.06'
    """
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else None


def _bytes(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number = text.rstrip("KMG")
    return int(number) * units.get(text[-1:], 1) if number.isdigit() else 0
