"""One attention problem through several providers: same inputs, interleaved, each result judged first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyheads.bench import device, memory, oracle, providers
from manyheads.bench.limits import Limits
from manyheads.bench.row import Row, against
from manyheads.bench.suite import Context
from manyheads.bench.timing import Stopwatch, interleave
from manyheads.bench.workload import Problem
from manyheads.common.errors import UnsupportedError
from manyheads.mask import Full, Mask

DENSITY_TILE = (128, 64)
"""Density is the share of tiles of this size that hold a visible pair."""

LONG_MS = 20_000.0
"""First calls that take longer than this together have warmed the machine enough."""

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Area:
    """What a mask lets see, counted exactly over batch and heads."""

    pairs: int
    density: float
    area: float


def area(mask: Mask, nq: int, nk: int, *, batch: int = 1, heads: int = 1) -> Area:
    """Counts visible pairs and visited tiles.

    Args:
        mask: The mask.
        nq: Query tokens.
        nk: Key tokens.
        batch: Batch size.
        heads: Query heads.

    Returns:
        Pairs over batch and heads, and the shares of tiles and of pairs.
    """
    layout = mask.tiles(nq, nk, tile=DENSITY_TILE, batch=batch, heads=heads)
    return Area(int(layout.pairs), float(layout.density), layout.pairs / (batch * heads * nq * nk))


def attention_rows(
    context: Context,
    base: Row,
    problem: Problem,
    chosen: Sequence[str],
    *,
    volunteers: Sequence[str] = (),
    inputs: Inputs | None = None,
    with_memory: Sequence[str] = (),
    rounds: tuple[int, int] = (5, 50),
) -> list[Row]:
    """Measures one problem.

    Args:
        context: The running benchmark.
        base: A row with suite and case filled in, and whatever else all rows share.
        problem: What is computed, and where.
        chosen: Names of providers, in order.
        volunteers: Providers that join if they refuse nothing about the problem.
        inputs: q, k, v to use instead of drawn ones.
        with_memory: Providers whose peak memory is measured too, each in another process.
        rounds: Fewest and most rounds.

    Returns:
        One row for each provider, refused and failed ones included.
    """
    q, k, v = problem.tensors() if inputs is None else inputs
    base = _described(base, problem, context.options.cache)
    known = oracle.truth(problem, q, k, v)
    watch = device.stopwatch(problem.device)
    joining = [n for n in volunteers if n not in chosen and providers.get(n).refuse(problem) is None]
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in (*chosen, *joining):
        context.say(f"{base.suite}/{base.case}: {name}, first call")
        rows[name], call = _first(base.replace(provider=name), problem, (q, k, v), known, watch)
        if call is not None:
            calls[name] = call
        elif name in joining and rows[name].status == "failed":
            rows[name] = rows[name].replace(status="refused", reason=f"broke: {rows[name].reason}")
    if calls:
        context.say(f"{base.suite}/{base.case}: timing {', '.join(calls)}")
        slow = sum(rows[name].first_ms or 0.0 for name in calls) > LONG_MS
        cold = context.options.cache == "cold"
        with torch.set_grad_enabled(problem.backward):
            times = interleave(
                calls,
                budget_s=context.options.seconds,
                rounds=rounds,
                warmup=0 if slow else 1,
                warm=True,
                watch=watch,
                before=device.eviction(problem.device) if cold else None,
            )
        for name, timing in times.items():
            timed = rows[name].replace(**{**timing.fields(), "first_ms": rows[name].first_ms})
            rows[name] = _rated(timed, problem, context.limits)
    for name in with_memory:
        if name in calls and inputs is None:
            context.say(f"{base.suite}/{base.case}: peak memory of {name}")
            rows[name] = with_peak(rows[name], problem)
    return compare(list(rows.values()))


def compare(rows: list[Row]) -> list[Row]:
    """Sets each row's ratio to the fastest way to do the same work that is not ours.

    Args:
        rows: Rows of one case.

    Returns:
        The rows, with ``baseline`` and ``ratio`` where both sides may be believed.
    """
    peers = [r for r in rows if not providers.is_ours(r.provider) and r.gate == "green" and r.median_ms]
    if not peers:
        return rows
    fastest = min(peers, key=lambda r: r.median_ms or 0.0)
    return [r if r.median_ms is None else against(r, fastest) for r in rows]


def with_peak(row: Row, problem: Problem) -> Row:
    """Adds the peak memory of one call, measured in a fresh process."""
    if (reason := memory.available(problem.device)) is not None:
        return row.replace(note=reason)
    try:
        with memory.Worker() as worker:
            peak = worker.ask("manyheads.bench.measure:peak_of", problem, row.provider, torch.get_num_threads())
    except (RuntimeError, TypeError, AttributeError) as error:
        return row.replace(note=f"peak memory not measured: {error}")
    return row.replace(peak_mib=peak.beyond_mib, process_mib=peak.process_mib)


def peak_of(problem: Problem, provider: str, threads: int | None = None) -> memory.Peak:
    """Runs in the measuring process: one call of one provider, its mask tensors and layouts included.

    Args:
        problem: What is computed.
        provider: Name of the provider.
        threads: Threads of the processor; torch's own choice by default.

    Returns:
        The peak beyond inputs, output and gradients, and of the process.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    adapter = providers.get(provider)
    small = replace(problem, mask=Full(), queries=64, keys=64, batch=1)
    inputs = small.tensors()
    bound(adapter.prepare(small), small, inputs, upstream(small, inputs))()  # libraries and probes are no part of it
    inputs = problem.tensors()
    dout = upstream(problem, inputs)

    def call() -> tuple[Tensor, ...]:
        return bound(adapter.prepare(problem), problem, inputs, dout)()

    if provider == "flex":
        call = bound(adapter.prepare(problem), problem, inputs, dout)
        call()  # compilation is timed apart, so its memory is too
    return memory.peak_here(call, results=lambda found: sum(t.nbytes for t in found), device=problem.device)


def upstream(problem: Problem, inputs: Inputs) -> Tensor | None:
    """Draws the gradient of the output; ``None`` if the problem has no gradients."""
    if not problem.backward:
        return None
    q, _, v = inputs
    generator = torch.Generator(q.device).manual_seed(problem.seed + 2)
    return torch.randn(*q.shape[:3], v.shape[3], generator=generator, device=q.device).to(q.dtype)


def bound(
    forward: providers.Forward, problem: Problem, inputs: Inputs, dout: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    """Binds inputs to a call: the output, with gradients also those of q, k and v, backward these alone.

    Args:
        forward: What a provider prepared.
        problem: Says whether gradients are part of the work.
        inputs: q, k, v.
        dout: Gradient of the output; see ``upstream``.

    Returns:
        A function without arguments. For the backward phase the forward pass is run here, once, and kept.
    """
    q, k, v = inputs
    if not problem.backward:

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(q, k, v),)

        return run
    leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
    if problem.phase == "backward":
        with torch.enable_grad():
            kept = forward(*leaves)
        return lambda: torch.autograd.grad(kept, leaves, dout, retain_graph=True)

    def run_both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = forward(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    return run_both


def _described(base: Row, problem: Problem, cache: str) -> Row:
    """Fills in what all rows of a case share."""
    seen = area(problem.mask, problem.queries, problem.nk, batch=problem.batch, heads=problem.heads)
    return base.replace(
        phase=problem.phase,
        shape=problem.shape,
        length=problem.queries,
        dtype=problem.dtype,
        layout=problem.layout,
        mask=problem.mask.text,
        input=base.input or f"normal, logit deviation {problem.deviation:g}",
        device=device.label(problem.device),
        threads=torch.get_num_threads(),
        cache=cache,
        pairs=seen.pairs,
        flops=problem.flops(seen.pairs),
        density=seen.density,
        area=seen.area,
        seed=problem.seed,
    )


def _first(
    row: Row, problem: Problem, inputs: Inputs, known: oracle.Truth, watch: Stopwatch
) -> tuple[Row, Callable[[], object] | None]:
    """Prepares a provider, times its first call and judges the result; no call to time if it refuses."""
    adapter = providers.get(row.provider)
    row = row.replace(version=providers.version(adapter))
    if (reason := adapter.refuse(problem)) is not None:
        return row.replace(status="refused", reason=reason), None
    whole = replace(problem, phase="forward+backward") if problem.backward else problem
    prepared: list[providers.Forward] = []
    found: list[Tensor] = []

    def begin() -> None:
        prepared.append(adapter.prepare(problem))
        found.extend(bound(prepared[0], whole, inputs, known.dout)())

    try:
        first_ms = watch.first(begin)
        sampled = tuple(t[:, :, known.rows] if i < 2 else t for i, t in enumerate(found))
        call = bound(prepared[0], problem, inputs, upstream(problem, inputs))
    except (UnsupportedError, NotImplementedError) as error:
        return row.replace(status="refused", reason=brief(error, kind=False)), None
    except Exception as error:  # a provider that breaks is a row, not the end of the benchmark
        return row.replace(status="failed", reason=brief(error)), None
    allowed = oracle.PLAIN if row.provider == "reference" else oracle.ALLOWED
    verdict = oracle.judge(sampled, known, allowed=allowed, lossy=providers.is_lossy(adapter))
    if verdict.gate == "lossy" and verdict.norm >= 1.0:
        row = row.replace(note="its error is as large as the result: zeros would do as well")
    return row.replace(first_ms=first_ms, **verdict.fields()), call


def _rated(row: Row, problem: Problem, limits: Limits) -> Row:
    """Adds the rates that follow from the time."""
    assert row.median_ms is not None and row.flops is not None and row.pairs is not None
    gflops = row.flops / row.median_ms / 1e6
    matrix = limits.matrix.get(problem.dtype)
    return row.replace(
        gflops=gflops,
        of_matrix_rate=gflops / matrix if matrix else None,
        of_copy_rate=problem.bytes() / row.median_ms / 1e6 / limits.copy if limits.copy else None,
        of_exp_rate=problem.exps(row.pairs) / row.median_ms / 1e6 / limits.exp_rate if limits.exp_rate else None,
    )


def brief(error: BaseException, *, kind: bool = True) -> str:
    """The first line of an error that says something, after the kind of the error.

    Example:
        >>> brief(RuntimeError("no kernel")), brief(ValueError("too long"), kind=False)
        ('RuntimeError: no kernel', 'too long')
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0][:200]}" if kind else lines[0][:200]
