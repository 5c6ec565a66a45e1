"""Suite ``overhead``: what ``attention`` costs above the bare call, where the work takes microseconds.

On a GPU it is the caller's time until the call returns; what the device does afterwards is the same for all.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.bench.device import label, launch_watch
from manyheads.bench.environment import version
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.timing import Timing, interleave
from manyheads.bench.workload import Problem
from manyheads.mask import Causal

SHAPE = (1, 8, 64, 64)
BARE, BARE_GRAD = "sdpa", "sdpa with gradients"
INNER = 10
"""Calls per sample: the clock is then no part of what is read, and few samples are interrupted."""
ROUNDS = {"quick": 300, "default": 1500, "full": 5000}


@dataclass(frozen=True)
class Path:
    """One way through the library.

    Attributes:
        provider: Name of the row.
        backend: What is asked of ``attention``.
        grad: Whether the inputs need gradients; only the forward call is timed.
    """

    provider: str
    backend: str
    grad: bool = False


PATHS = (
    Path("delegated", "auto"),
    Path("engine op", "blocked"),
    Path("with gradients", "blocked", grad=True),
)


def cases(options: Options) -> list[Case]:
    """The shape of the bar, and in ``--full`` two more."""
    shapes = [SHAPE] if options.level != "full" else [SHAPE, (1, 8, 1, 64), (4, 2, 48, 40)]
    return [case(shape, options) for shape in shapes]


def case(shape: tuple[int, int, int, int], options: Options) -> Case:
    """All ways at one shape, interleaved.

    Args:
        shape: Batch, heads, tokens, width.
        options: For the number of rounds.

    Returns:
        The case; its rows say what each way costs above the bare call.
    """
    name = "causal-" + "x".join(map(str, shape))
    return Case("overhead", name, lambda c: _run(c, name, shape), 5.0, (BARE, *(p.provider for p in PATHS)))


def overhead_us(way: Timing, bare: Timing) -> float:
    """Microseconds that a way costs above the bare call, each round compared with itself.

    Args:
        way: Rounds of a way through the library.
        bare: The same rounds of the bare call.

    Returns:
        The median of the differences.

    Example:
        >>> overhead_us(Timing((0.03, 0.05, 0.04)), Timing((0.02, 0.03, 0.03)))
        10.0
    """
    return round(statistics.median(a - b for a, b in zip(way.samples, bare.samples, strict=True)) * 1e3, 6)


def _run(context: Context, name: str, shape: tuple[int, int, int, int]) -> list[Row]:
    from manyheads import attention

    batch, heads, tokens, width = shape
    options = context.options
    problem = Problem(
        Causal(), tokens, batch=batch, heads=heads, width=width, seed=options.seed, device=options.device
    )
    q, k, v = problem.tensors()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    bare: Callable[..., Tensor] = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    mask = Causal()
    calls: dict[str, Callable[[], object]] = {
        BARE: lambda: bare(q, k, v),
        BARE_GRAD: lambda: bare(*leaves),
    }
    for path in PATHS:
        calls[path.provider] = functools.partial(
            attention, *(leaves if path.grad else (q, k, v)), mask=mask, backend=path.backend
        )
    context.say(f"overhead/{name}: {len(calls)} ways, interleaved")
    budget = max(options.seconds, 0.05)
    most = ROUNDS[options.level]
    with torch.enable_grad():
        watch = launch_watch(options.device)
        times = interleave(calls, budget_s=budget, rounds=(5, most), inner=INNER, warmup=20, watch=watch)
    rows = []
    for provider, found in times.items():
        row = _row(context, name, problem, provider, found)
        if provider not in (BARE, BARE_GRAD):
            against = BARE_GRAD if "gradients" in provider else BARE
            row = row.replace(baseline=against, overhead_us=overhead_us(found, times[against]))
        rows.append(row)
    return rows


def _row(context: Context, name: str, problem: Problem, provider: str, found: Timing) -> Row:
    return Row(
        "overhead",
        name,
        provider,
        shape=problem.shape,
        length=problem.queries,
        dtype=problem.dtype,
        layout=problem.layout,
        mask=problem.mask.text,
        device=label(problem.device),
        threads=torch.get_num_threads(),
        cache="warm",
        version=version("torch" if provider in (BARE, BARE_GRAD) else "manyheads"),
        seed=context.options.seed,
        **found.fields(),
    )


SUITE = Suite(
    "overhead",
    "What attention() costs above the bare torch call at a tiny shape.",
    cases,
    (BARE, *(path.provider for path in PATHS)),
)
