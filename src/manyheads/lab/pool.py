"""Compiles many cases in processes of their own, where Triton is not interpreting and a crash hurts nobody."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.common.errors import missing_extra
from manyheads.lab.aot import Compiled, compile_kernel
from manyheads.lab.registry import Case, kernel_named
from manyheads.lab.targets import target_named

LIMIT_S = 120.0
"""Seconds after which a compilation counts as failed."""


@dataclass(frozen=True)
class Made:
    """What became of a case.

    Attributes:
        case: Which.
        compiled: What it needs; None if it did not compile.
        error: Why it did not compile; empty if it did.
        triton: Version of the compiler; empty if it said nothing.
    """

    case: Case
    compiled: Compiled | None
    error: str = ""
    triton: str = ""


def compile_cases(
    cases: Iterable[Case],
    *,
    workers: int | None = None,
    limit_s: float = LIMIT_S,
    triton: Path | None = None,
    progress: Callable[[Made], object] | None = None,
) -> list[Made]:
    """Compiles cases and returns what became of each, in the order given.

    Args:
        cases: What to compile.
        workers: Processes; one for each core, at most 8, by default.
        limit_s: Seconds after which a case is given up.
        triton: Folder that holds another Triton than the installed one (``pip install --target``).
        progress: Called with each result as it comes.

    Returns:
        One result for each case.
    """
    todo = list(cases)
    if not todo:
        return []
    workers = max(1, min(workers or min(os.cpu_count() or 1, 8), len(todo)))
    results: list[Made | None] = [None] * len(todo)
    waiting: queue.SimpleQueue[tuple[int, Case]] = queue.SimpleQueue()
    for entry in enumerate(todo):
        waiting.put(entry)
    said = threading.Lock()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with _Worker(limit_s, triton) as worker:
                while not failures:
                    try:
                        place, case = waiting.get_nowait()
                    except queue.Empty:
                        return
                    made = worker.compile(case)
                    results[place] = made
                    if progress is not None:
                        with said:
                            progress(made)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [made for made in results if made is not None]


def clean_environment(cache: str, triton: Path | None = None) -> dict[str, str]:
    """The environment of a process that compiles: not interpreting, and with a cache of its own.

    Args:
        cache: Folder for what Triton stores.
        triton: Folder that holds another Triton.

    Returns:
        Variables and their values.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(str(p) for p in (triton, package, env.get("PYTHONPATH")) if p)
    return env | {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}


def triton_version(triton: Path | None = None) -> str:
    """The version of the Triton that would compile.

    Args:
        triton: Folder that holds another one than the installed one.

    Returns:
        Its version.

    Raises:
        ImportError: There is none.
    """
    places = None if triton is None else [str(triton)]
    found = (importlib.metadata.distributions(name="triton") if places is None
             else importlib.metadata.distributions(name="triton", path=places))  # fmt: skip
    for one in found:
        return str(one.version)
    if places is not None:
        raise ImportError(f"triton: there is none in {triton}; install one with `pip install --target {triton} triton`")
    raise missing_extra("triton", "compiling kernels")


class _Worker:
    """A process that compiles one case after the other; it is started again when it dies or takes too long."""

    def __init__(self, limit_s: float, triton: Path | None = None) -> None:
        self.limit_s, self.triton = limit_s, triton
        self.process: subprocess.Popen[str] | None = None
        self.cache = tempfile.TemporaryDirectory(prefix="manyheads-kernels-", ignore_cleanup_errors=True)
        self.errors = Path(self.cache.name, "errors")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self.cache.cleanup()

    def compile(self, case: Case) -> Made:
        """Compiles one case."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(self.limit_s, process.kill)
        start = time.monotonic()
        alarm.start()
        try:
            process.stdin.write(json.dumps(job_of(case)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            alarm.cancel()
        if not answer:
            late = time.monotonic() - start >= self.limit_s
            status = process.wait()
            why = f"took longer than {self.limit_s:.0f} s" if late else f"the compiler died (status {status})"
            tail = "" if late else self._tail()
            self._stop()
            return Made(case, None, f"{why}{tail}")
        said = json.loads(answer)
        version = said.pop("triton", "")
        if "error" in said:
            return Made(case, None, said["error"], version)
        return Made(case, Compiled.from_json(said), "", version)

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "manyheads.lab.pool"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=open(self.errors, "w", encoding="utf-8"),  # noqa: SIM115 (the process holds it)
                text=True,
                env=clean_environment(self.cache.name, self.triton),
            )
        return self.process

    def _tail(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return ": " + " / ".join(line.strip() for line in lines[-3:]) if lines else ""
        return ""

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def job_of(case: Case) -> dict[str, Any]:
    """What a compiling process has to be told about a case."""
    return {
        "kernel": case.kernel,
        "constants": dict(case.constants),
        "dtype": case.dtype,
        "target": case.target,
        "warps": case.warps,
        "stages": case.stages,
    }


def serve(lines: Iterable[str]) -> Iterator[str]:
    """Answers each job, a line of JSON, with what the kernel needs or the error, a line of JSON.

    Args:
        lines: Jobs as ``job_of`` makes them.

    Yields:
        Answers.
    """
    for line in lines:
        job = json.loads(line)
        try:
            compiled = compile_kernel(
                kernel_named(job["kernel"]),
                job["constants"],
                job["dtype"],
                target_named(job["target"]),
                warps=job["warps"],
                stages=job["stages"],
            )
            answer = compiled.to_json()
        except Exception as error:  # the compiler raises whatever it likes; the caller gets all of it in words
            words = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {words[0]}"}
        yield json.dumps(answer | {"triton": _installed()})


@functools.cache
def _installed() -> str:
    try:
        return triton_version()
    except ImportError:
        return ""


if __name__ == "__main__":
    # what the compiler prints must not stand between the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    for text in serve(sys.stdin):
        answers.write(text + "\n")
        answers.flush()
