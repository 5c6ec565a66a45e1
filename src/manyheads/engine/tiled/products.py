"""Which way of multiplying wins on this processor, found by measurement at first use.

Two questions differ between processors by more than any tuning could make up for:

- how to get float32 scores: BLAS or oneDNN for float32 inputs; for bfloat16 inputs either an upcast, or oneDNN's
  bfloat16 product with a float32 result, which torch reaches only through a process-wide precision flag;
- whether torch's fused CPU kernel, called on each dense piece and merged, beats separate products and passes.

Neither is guessed: a probe of some milliseconds decides once per process and dtype.
"""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_flag_lock = threading.Lock()
_ONEDNN_MIN = 128 * 1024  # scores below which oneDNN's call overhead exceeds its gain


def scores(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` in float32 (float64 for float64), whatever the input dtype.

    Args:
        a: ``(Z, M, D)``.
        b: ``(Z, C, D)``, any strides.

    Returns:
        ``(Z, M, C)``.
    """
    if a.dtype == torch.float64:
        return torch.bmm(a, b.transpose(1, 2))
    if a.device.type != "cpu":
        return torch.bmm(a.float(), b.float().transpose(1, 2))
    return _METHODS[_scores_method(a.dtype)](a, b)


def average(p: Tensor, v: Tensor) -> Tensor:
    """``p v`` with ``p`` cast to the dtype of the values, returned in the dtype of ``p``.

    Args:
        p: Weights ``(Z, M, C)`` in the accumulation dtype.
        v: ``(Z, C, Dv)``.

    Returns:
        ``(Z, M, Dv)``.
    """
    return torch.bmm(p.to(v.dtype), v).to(p.dtype)


def fused_wins(dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel on dense pieces beats products and passes for this dtype."""
    return _fused_ratio(dtype) > 1.0


def exp2_wins(hidden: bool = False) -> bool:
    """Whether ``exp2`` is the faster exponential.

    Args:
        hidden: Of numbers some of which are minus infinity or give 0, which some libraries' ``exp`` is slow for.
    """
    return _exp2_ratio() > 1.0 or (hidden and _hidden_ratio() > 1.0)


def describe() -> dict[str, str]:
    """What the probes chose, in words, for the report and the doctor."""
    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rows[f"scores in {name}"] = _scores_method(dtype)
        rows[f"fused kernel over passes in {name}"] = f"{_fused_ratio(dtype):.2f}x"
    rows["exp2 over exp"] = f"{_exp2_ratio():.2f}x"
    rows["exp2 over exp of hidden pairs"] = f"{_hidden_ratio():.2f}x"
    return rows


# --- ways to multiply -------------------------------------------------------------------------------------------


def _by_blas(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.float(), b.float().transpose(1, 2))


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[0] > 1 or a.shape[1] * b.shape[1] < _ONEDNN_MIN:
        return _by_blas(a, b)
    assert _linear is not None
    return _linear(a[0].float(), b[0].float(), None, "none", [], "")[None]


def _by_bf16_product(a: Tensor, b: Tensor) -> Tensor:
    with reduced_precision():
        return _by_blas(a, b)


_METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "blas": _by_blas,
    "onednn": _by_onednn,
    "bf16 product, float32 result": _by_bf16_product,
}


@contextmanager
def reduced_precision() -> Iterator[bool]:
    """Lets oneDNN multiply float32 operands in bfloat16: exact when they hold bfloat16 values.

    The flag is process-wide, so it is raised only while this is the only Python thread, and always lowered again;
    otherwise nothing changes and the product is a float32 one.
    """
    if not _alone() or not _flag_lock.acquire(blocking=False):
        yield False
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set torch's newer switches, beside which this one may not be read
        _flag_lock.release()
        yield False
        return
    try:
        torch.set_float32_matmul_precision("medium")
        yield True
    finally:
        torch.set_float32_matmul_precision(before)
        _flag_lock.release()


def _alone() -> bool:
    """Whether no other Python thread could multiply meanwhile; a progress bar's monitor never does."""
    return all(t is threading.current_thread() or type(t).__module__.startswith("tqdm") for t in threading.enumerate())


# --- probes -----------------------------------------------------------------------------------------------------


def race(first: Callable[[], object], second: Callable[[], object], rounds: int = 5) -> float:
    """Median time of the first over that of the second, interleaved."""
    times: tuple[list[float], list[float]] = ([], [])
    for r in range(rounds + 1):
        for f, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            f()
            if r:
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


@functools.cache
def _scores_method(dtype: torch.dtype) -> str:
    with torch.inference_mode():
        a, b = (torch.ones(1, n, 64, dtype=dtype) for n in (256, 1024))
        if dtype == torch.bfloat16:
            rival = "bf16 product, float32 result"
        elif dtype == torch.float32 and _linear is not None:
            rival = "onednn"
        else:
            return "blas"
        try:
            gain = race(lambda: _by_blas(a, b), lambda: _METHODS[rival](a, b))
        except (RuntimeError, AttributeError):
            return "blas"
    return rival if gain > 1.0 else "blas"


@functools.cache
def _exp2_ratio() -> float:
    with torch.inference_mode():
        x = torch.linspace(-8.0, 0.0, 256 * 1024).view(256, 1024)
        y = torch.empty_like(x)
        return race(lambda: torch.exp(x, out=y), lambda: torch.exp2(x, out=y))


@functools.cache
def _hidden_ratio() -> float:
    with torch.inference_mode():
        x = torch.linspace(-8.0, 0.0, 256 * 1024).view(256, 1024)
        x[:, ::4] = float("-inf")
        y = torch.empty_like(x)
        return race(lambda: torch.exp(x, out=y), lambda: torch.exp2(torch.mul(x, 1.4427, out=y), out=y))


@functools.cache
def _fused_ratio(dtype: torch.dtype) -> float:
    from . import flash

    if not flash.available(dtype):
        return 0.0
    with torch.inference_mode():
        q = torch.linspace(-1.0, 1.0, 4 * 256 * 64).to(dtype).view(1, 4, 256, 64)
        k = torch.linspace(1.0, -1.0, 4 * 1024 * 64).to(dtype).view(1, 4, 1024, 64)

        def passes() -> Tensor:
            s = scores(q[0], k[0])
            s.sub_(s.amax(-1, keepdim=True)).exp_()
            total = s.sum(-1, keepdim=True)
            return average(s, k[0]).div_(total)

        return race(passes, lambda: flash.piece(q, k, k, None, 0.125))
