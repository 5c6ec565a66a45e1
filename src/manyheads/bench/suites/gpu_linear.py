"""The bars of recurrences on a GPU: the own kernels against those of flash-linear-attention on the same inputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manyheads.bench import device
from manyheads.bench.environment import version
from manyheads.bench.measure import brief, compare
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options
from manyheads.bench.suites import bars, linear
from manyheads.bench.suites.bars import Bar
from manyheads.bench.suites.linear import Inputs, Shape
from manyheads.bench.timing import interleave

OWN, PEER = "manyheads-triton", "fla"
TARGET = 1.0
KINDS = {
    "head": "one decay a head",
    "token": "a decay a token",
    "mlstm": "mLSTM over their plain decay, which does less",
}
"""Kinds that have kernels here, in words. They have none for mLSTM."""
LENGTHS = (4096, 16_384, 65_536)
PHASES = ("forward", "backward")
"""Forward alone, and forward and backward together."""
HEADS, WIDTH = 16, 128


def made(options: Options) -> list[Bar]:
    """Every bar, at its own lengths and at one that the seed draws.

    Args:
        options: Level, seed and device.

    Returns:
        The bars.
    """
    drawn = int(bars.draw(options, "gpu-linear").integers(5_000, 60_000))
    return [_bar(kind, n, phase, options) for kind in KINDS for n in (*LENGTHS, drawn) for phase in PHASES]


def _bar(kind: str, tokens: int, phase: str, options: Options) -> Bar:
    shape = Shape(tokens, HEADS, WIDTH, "bfloat16", options.seed, options.device)
    name = f"gpu-scan-{kind}-{tokens}-{phase}"
    both = "forward" if phase == "forward" else "forward and backward"
    words = f"{KINDS[kind]}, {both}, over flash-linear-attention's kernels, N = {tokens}, bfloat16"
    base = bars.promise(name, words, dtype="bfloat16", length=tokens, phase=phase, shape=str(shape))

    def judge(found: list[list[Row]]) -> list[Row]:
        (rows,) = found or [[]]
        ratio, reason = ratio_of(rows)
        return [bars.at_least(base.replace(note=reason), ratio, TARGET)]

    case = Case("linear", name, functools.partial(measured, name, kind, shape, phase), 4.0, (OWN, PEER))
    return Bar(f"bar-{name}", (case,), judge)


def ratio_of(rows: Sequence[Row]) -> tuple[float | None, str | None]:
    """Their time over ours if our result is right and theirs is not wrong, else the reason why there is none.

    Args:
        rows: Rows of one case.

    Returns:
        The ratio and None, or None and the reason.
    """
    if reason := bars.doubt(rows, OWN):
        return None, reason
    mine, theirs = bars.one(rows, OWN), bars.one(rows, PEER)
    if theirs is None or theirs.gate == "red":
        return None, bars.doubt(rows, PEER)
    assert mine is not None and mine.median_ms is not None and theirs.median_ms is not None
    return theirs.median_ms / mine.median_ms, None


def measured(name: str, kind: str, shape: Shape, phase: str, context: Context) -> list[Row]:
    """Both sides on the same inputs, interleaved.

    Args:
        name: Of the case.
        kind: One of ``KINDS``.
        shape: Its size.
        phase: One of ``PHASES``.
        context: Of the run.

    Returns:
        A row of each side.
    """
    base = Row("linear", name, "-", phase=phase, shape=str(shape), dtype=shape.dtype, length=shape.tokens)
    base = base.replace(seed=shape.seed, device=device.label(shape.device), input="normal", cache=context.options.cache)
    inputs = shape.drawn()
    context.say(f"linear/{name}: float64")
    exact, limits = known(kind, inputs, phase)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    for provider in context.options.chosen((OWN, PEER)):
        context.say(f"linear/{name}: {provider}, first call")
        row = base.replace(provider=provider, version=version("manyheads" if provider == OWN else _PACKAGE))
        try:
            run = functools.partial(linear.ours, kind, backend="triton") if provider == OWN else peer(kind)
            calls[provider] = functools.partial(results, run, inputs, phase)
            found = results(run, inputs, phase)
        except ImportError:
            rows[provider] = row.replace(status="refused", reason=f"{_PACKAGE} is not installed")
        except Exception as error:  # a peer that breaks is a row, not the end of the benchmark
            rows[provider] = row.replace(status="failed", reason=brief(error))
        else:
            rows[provider] = row
            if provider == OWN or kind != "mlstm":
                rows[provider] = _judged(row, found, exact, limits)
            else:
                rows[provider] = row.replace(gate="unchecked", note="their plain decay: another result")
        if rows[provider].status in ("refused", "failed"):
            calls.pop(provider, None)
    if calls:
        watch = device.stopwatch(shape.device)
        for provider, timing in interleave(calls, budget_s=context.options.seconds, warm=True, watch=watch).items():
            rows[provider] = rows[provider].replace(**timing.fields())
    return compare(list(rows.values()))


def known(kind: str, inputs: Inputs, phase: str) -> tuple[list[Tensor], list[float]]:
    """Results in float64, and by how much each may be off: twice what the same chunks err in the dtype of the inputs.

    Args:
        kind: One of ``KINDS``.
        inputs: As ``Shape.drawn`` makes them.
        phase: One of ``PHASES``.

    Returns:
        The output, or the gradients of q, k and v; and a limit for each.
    """
    run = functools.partial(linear.ours, kind, backend="blocked")
    exact = results(run, {n: t.double() for n, t in inputs.items()}, phase)
    limits = []
    for plain, right in zip(results(run, inputs, phase), exact, strict=True):
        eps = torch.finfo(plain.dtype).eps
        limits.append(2 * float((plain.double() - right).abs().max()) + 2 * eps * float(right.abs().max()))
    return exact, limits


def results(run: Callable[[Inputs], Tensor], inputs: Inputs, phase: str) -> list[Tensor]:
    """What one side gives: its output, or the gradients of q, k and v of the sum of its output."""
    if phase == "forward":
        with torch.no_grad():
            return [run(inputs)]
    leaves = {n: inputs[n].detach().requires_grad_() for n in "qkv"}
    out = run(inputs | leaves)
    return list(torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)))


def peer(kind: str) -> Callable[[Inputs], Tensor]:
    """The kernels of flash-linear-attention, which take ``(B, N, H, D)``.

    Args:
        kind: One of ``KINDS``.

    Returns:
        A function of the inputs to ``(B, H, N, D)``.

    Raises:
        ImportError: The package is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.simple_gla import chunk_simple_gla

    def run(inputs: Inputs) -> Tensor:
        q, k, v = (inputs[n].transpose(1, 2).contiguous() for n in "qkv")
        if kind == "head":
            out = chunk_simple_gla(q, k, v, g_gamma=inputs["head"], scale=q.shape[-1] ** -0.5)[0]
        else:
            decay = inputs["token"].transpose(1, 2).contiguous()
            out = chunk_simple_gla(q, k, v, g=decay, scale=q.shape[-1] ** -0.5)[0]
        return linear.only(out).transpose(1, 2)

    return run


def _judged(row: Row, found: Sequence[Tensor], exact: Sequence[Tensor], limits: Sequence[float]) -> Row:
    errors = [float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True)]
    worst = max(range(len(errors)), key=lambda i: errors[i] / limits[i])
    gate = "green" if errors[worst] <= limits[worst] else "red"
    return row.replace(gate=gate, error=errors[worst], error_limit=limits[worst])


_PACKAGE = "flash-linear-attention"
