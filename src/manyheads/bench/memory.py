"""Peak memory of one call, in a process where nothing else has been."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """What a call took at most.

    Attributes:
        beyond_mib: Above what was there before the call, without the call's results.
        process_mib: Of the whole process, libraries included; on a GPU all that torch had allocated.
    """

    beyond_mib: float
    process_mib: float


def available(device: str = "cpu") -> str | None:
    """Why peaks cannot be measured here, ``None`` if they can.

    Args:
        device: Whose memory; the allocator of a GPU always knows.
    """
    if device != "cpu":
        return None
    try:
        _reset()
        _status("VmHWM")
    except (OSError, AttributeError):
        return "peak memory needs Linux's /proc/self/clear_refs"
    return None


def peak_here(call: Callable[[], Any], *, results: Callable[[Any], int] = lambda _: 0, device: str = "cpu") -> Peak:
    """Measures one call in this process: high-water mark after it less memory before it.

    Memory that the allocator had kept from earlier work would hide the peak; it is given back first. Call
    this in a process of its own (see ``Worker``) for numbers that are worth printing.

    Args:
        call: What to measure.
        results: Bytes that the call's result holds, not counted in ``beyond_mib``.
        device: Whose memory. On a GPU it is what torch's allocator had given out at most.

    Returns:
        The peak.

    Raises:
        OSError: The system keeps no resettable high-water mark.

    Example:
        >>> import torch
        >>> peak = peak_here(lambda: torch.ones(2**22).sum().item()) if available() is None else None
        >>> peak is None or peak.beyond_mib > 8
        True
    """
    gc.collect()
    if device != "cpu":
        return _peak_of_gpu(call, results, device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    earlier = _status("VmHWM")
    _reset()
    before = _status("VmRSS")
    result = call()
    high = _status("VmHWM")
    return Peak((high - before - results(result)) / MIB, max(earlier, high) / MIB)


class Worker:
    """A fresh process that measures peaks, one request after another.

    Example:
        >>> with Worker() as worker:
        ...     worker.ask("builtins:len", "abc")
        3
    """

    def __init__(self) -> None:
        """Starts the process."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "manyheads.bench.memory"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def ask(self, function: str, *args: Any) -> Any:
        """Calls a function there.

        Args:
            function: ``"module:name"``.
            args: Its arguments; they are pickled.

        Returns:
            What it returns.

        Raises:
            RuntimeError: It raised, or the process died (out of memory, most likely).
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump((function, args), self._process.stdin)
            self._process.stdin.flush()
            ok, value = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait(timeout=30)
            raise RuntimeError(f"the measuring process ended with status {code}; out of memory?") from None
        if not ok:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError, OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Worker:
        """Returns the worker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process."""
        if kind is not None:
            self._process.kill()
        self.close()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until the other side closes.

    Args:
        requests: Pickled ``(function, args)``.
        answers: Pickled ``(True, value)`` or ``(False, message)``.
    """
    import importlib

    while True:
        try:
            function, args = pickle.load(requests)
        except EOFError:
            return
        module, _, name = function.partition(":")
        try:
            answer = (True, getattr(importlib.import_module(module), name)(*args))
        except Exception as error:  # whatever it was, the other side is told
            answer = (False, f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def _peak_of_gpu(call: Callable[[], Any], results: Callable[[Any], int], device: str) -> Peak:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    high = torch.cuda.max_memory_allocated(device)
    return Peak((high - before - results(result)) / MIB, high / MIB)


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(rf"^{key}:\s+(\d+) kB", file.read(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024


def _reset() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _main() -> None:
    """The measuring process: interrupts are the parent's business, and prints must not reach the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
