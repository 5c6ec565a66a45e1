"""The measured limits of this machine: what no kernel can beat here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from manyheads.bench.timing import interleave


@dataclass(frozen=True)
class Limits:
    """Rates that fractions in the rows refer to.

    Attributes:
        matrix: Best product rate by dtype, in 1e9 floating-point operations per second.
        copy: Memory copied, read plus written, in 1e9 bytes per second.
        exp: Exponentials of float32, in 1e9 per second.
        method: By dtype, which product was the fastest.
    """

    matrix: dict[str, float] = field(default_factory=dict)
    copy: float | None = None
    exp: float | None = None
    method: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """One line for people.

        Example:
            >>> Limits({"float32": 320.0}, 22.0, 9.0, {"float32": "oneDNN"}).line()
            'float32 320 GFLOP/s (oneDNN) · copy 22 GB/s · exp 9.0 G/s'
        """
        parts = [f"{dtype} {rate:.0f} GFLOP/s ({self.method.get(dtype, 'mm')})" for dtype, rate in self.matrix.items()]
        if self.copy is not None:
            parts.append(f"copy {self.copy:.0f} GB/s")
        if self.exp is not None:
            parts.append(f"exp {self.exp:.1f} G/s")
        return " · ".join(parts)


def measure(dtypes: tuple[str, ...] = ("float32", "bfloat16"), *, size: int = 2048) -> Limits:
    """Measures the limits: square products by every method at hand, a large copy, an exponential.

    Args:
        dtypes: Names of torch dtypes.
        size: Rows and columns of the products.

    Returns:
        The limits.

    Example:
        >>> measure(("float32",), size=64).matrix["float32"] > 0
        True
    """
    matrix: dict[str, float] = {}
    method: dict[str, str] = {}
    for name in dtypes:
        calls = _products(getattr(torch, name), size)
        times = interleave(calls, budget_s=0.3, rounds=(3, 20))
        best = min(times, key=lambda key: min(times[key].samples))
        matrix[name] = 2 * size**3 / min(times[best].samples) / 1e6
        method[name] = best
    source = torch.ones(max(size * size * 8, 1))
    target = torch.empty_like(source)
    work = torch.rand(max(size * size // 16, 1))
    out = torch.empty_like(work)
    times = interleave(
        {"copy": lambda: target.copy_(source), "exp": lambda: torch.exp2(work, out=out)},
        budget_s=0.2,
        rounds=(3, 50),
    )
    return Limits(
        matrix=matrix,
        copy=2 * source.nbytes / min(times["copy"].samples) / 1e6,
        exp=work.numel() / min(times["exp"].samples) / 1e6,
        method=method,
    )


def _products(dtype: torch.dtype, size: int) -> dict[str, Callable[[], object]]:
    """Ways to multiply two square matrices on this machine; those that do not work here are left out."""
    x, y = torch.randn(2, size, size).to(dtype).unbind(0)
    ways: dict[str, Callable[[], object]] = {
        "mm": lambda: torch.mm(x, y),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], ""),
    }
    return {name: call for name, call in ways.items() if _works(call)}


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
