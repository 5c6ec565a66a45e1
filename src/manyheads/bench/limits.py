"""The measured limits of this machine: what no kernel can beat here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from manyheads.bench.device import cache_bytes, label, stopwatch
from manyheads.bench.environment import memory_gib
from manyheads.bench.timing import Stopwatch, interleave
from manyheads.bench.workload import human

SIZES = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the products by kind of device."""
IN_CACHE = 2**16
"""Numbers for each thread: with the results 512 KiB, which stay in the second level."""
IN_REGISTERS = 2**24
"""Numbers for a GPU, each of which goes through a chain of exponentials."""
CHAIN = 128
"""Exponentials in a chain."""


@dataclass(frozen=True)
class Limits:
    """Rates that fractions in the rows refer to.

    Attributes:
        matrix: Best product rate by dtype, in 1e9 floating-point operations per second.
        copy: Memory copied, read plus written, in 1e9 bytes per second.
        exp_rate: Exponentials of float32 over an array that stays in cache, in 1e9 per second; what fused attention
            can hope for.
        exp_memory: The same over an array that is larger than every cache; what unfused attention gets.
        method: How: by dtype the product that was the fastest, under ``"exp"`` and ``"exp memory"`` function and size
            of the array.
        device: ``"cpu"`` or the name of the GPU.
        threads: Threads of the CPU that were allowed.
    """

    matrix: dict[str, float] = field(default_factory=dict)
    copy: float | None = None
    exp_rate: float | None = None
    exp_memory: float | None = None
    method: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Limits:
        """Reads limits from the header of a results file, old or new; what is unknown is left out.

        Args:
            values: The header's ``"limits"``.

        Example:
            >>> Limits.from_dict({"matrix": {"float32": 320.0}, "exp": 2.0}).exp_rate
            2.0
        """
        given = {"exp_rate": values.get("exp"), **values}  # "exp" in files of the first version
        return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})

    def line(self) -> str:
        """One line for people.

        Example:
            >>> Limits({"float32": 320.0}, 22.0, 9.0, method={"float32": "oneDNN"}).line()
            'float32 320 GFLOP/s (oneDNN) · copy 22 GB/s · exp 9.0 G/s'
        """
        parts = [f"{dtype} {rate:.0f} GFLOP/s ({self.method.get(dtype, 'mm')})" for dtype, rate in self.matrix.items()]
        if self.copy is not None:
            parts.append(f"copy {self.copy:.0f} GB/s")
        if self.exp_rate is not None:
            parts.append(f"exp {self.exp_rate:.1f} G/s")
        return " · ".join(parts)


def measure(
    dtypes: tuple[str, ...] = ("float32", "bfloat16"), *, size: int | None = None, device: str = "cpu"
) -> Limits:
    """Measures the limits: square products by every method at hand, a large copy, exponentials.

    The best sample counts, not the median: a limit is what the machine can do.

    Args:
        dtypes: Names of torch dtypes.
        size: Rows and columns of the products; 2048 by default, 8192 on a GPU.
        device: What is measured.

    Returns:
        The limits, for the threads that torch may use now.

    Example:
        >>> measure(("float32",), size=64).matrix["float32"] > 0
        True
    """
    small = size is not None and size < SIZES["cpu"]
    size = SIZES["cpu" if device == "cpu" else "cuda"] if size is None else size
    watch = stopwatch(device)
    matrix: dict[str, float] = {}
    method: dict[str, str] = {}
    for name in dtypes:
        calls = _products(getattr(torch, name), size, device)
        best, ms = _fastest(calls, watch)
        matrix[name] = 2 * size**3 / ms / 1e6
        method[name] = best
    count = _beyond_cache(device) if not small else size * size * 8
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    _, copied = _fastest({"copy": lambda: target.copy_(source)}, watch)
    unfused = {"exp": lambda: torch.exp(source, out=target), "exp2": lambda: torch.exp2(source, out=target)}
    slow_name, slow_ms = _fastest(unfused, watch)
    fast_name, fast_rate = _exp_rate(device, watch)
    method["exp"] = fast_name
    beyond = " out of cache" if source.nbytes > cache_bytes(device) else ""
    method["exp memory"] = f"{slow_name} of {human(source.nbytes)}{beyond}"
    return Limits(
        matrix=matrix,
        copy=2 * source.nbytes / copied / 1e6,
        exp_rate=fast_rate,
        exp_memory=count / slow_ms / 1e6,
        method=method,
        device=label(device),
        threads=torch.get_num_threads(),
    )


def _fastest(
    calls: Mapping[str, Callable[[], object]], watch: Stopwatch, inner: int = 1, budget_s: float = 0.3
) -> tuple[str, float]:
    """The fastest of several calls and the milliseconds of its best sample."""
    times = interleave(calls, budget_s=budget_s, rounds=(3, 50), inner=inner, watch=watch)
    best = min(times, key=lambda key: min(times[key].samples))
    return best, min(times[best].samples)


def _products(dtype: torch.dtype, size: int, device: str) -> dict[str, Callable[[], object]]:
    """Ways to multiply two square matrices on this machine; those that do not work here are left out."""
    x, y = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    ways: dict[str, Callable[[], object]] = {"mm": lambda: torch.mm(x, y)}
    if device == "cpu":
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return {name: call for name, call in ways.items() if _works(call)}


def _exp_rate(device: str, watch: Stopwatch) -> tuple[str, float]:
    """The method and 1e9 exponentials a second, as near to the arithmetic units as torch comes."""
    if device != "cpu" and (chain := _chained(device)) is not None:
        work = torch.rand(IN_REGISTERS, device=device)
        if _works(lambda: chain(work)):
            _, ms = _fastest({"chain": lambda: chain(work)}, watch)
            return f"{CHAIN} in a row in registers", work.numel() * CHAIN / ms / 1e6
    count = IN_CACHE * torch.get_num_threads() if device == "cpu" else cache_bytes(device) // 16
    work = torch.rand(count, device=device)
    out = torch.empty_like(work)
    calls = {"exp": lambda: torch.exp(work, out=out), "exp2": lambda: torch.exp2(work, out=out)}
    name, ms = _fastest(calls, watch, inner=20, budget_s=0.1)
    return f"{name} of {human(work.nbytes)} in cache", count / ms / 1e6


def _chained(device: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A kernel of many exponentials per element read: an array in L2 would measure L2 instead."""
    jiterator = getattr(torch.cuda, "jiterator", None)
    if jiterator is None:
        return None
    code = f"""
    template <typename T> T chained(T x) {{
        for (int i = 0; i < {CHAIN}; ++i) x = __expf(-x);
        return x;
    }}"""
    made: Callable[[torch.Tensor], torch.Tensor] = jiterator._create_jit_fn(code)
    return made


def _beyond_cache(device: str) -> int:
    """Elements of float32 in an array that no cache holds and that a machine has room for."""
    if device != "cpu":
        return int(min(2**30, torch.cuda.mem_get_info(device)[0] / 8)) // 4
    return int(min(max(2 * cache_bytes(device), 2**26), (memory_gib() or 8.0) * 2**30 / 8, 2**30)) // 4


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
