"""The bars of sparse attention on a GPU: the two orders of loops against each other, block selectors against dense."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from manyheads.bench import device
from manyheads.bench.environment import version
from manyheads.bench.measure import brief
from manyheads.bench.row import Row
from manyheads.bench.structure import Shape, draw
from manyheads.bench.suite import Case, Context, Options
from manyheads.bench.suites import bars, sparse
from manyheads.bench.suites.bars import Bar
from manyheads.bench.timing import interleave
from manyheads.engine.tiled import tiled
from manyheads.mask import Causal, TileLayout
from manyheads.mechanism import select

ORDERS = ("keys", "queries")
GROUPS = (1, 2, 4)
"""Query heads for each key head."""
KV_HEADS, WIDTH, BLOCK, KEEP = 4, 128, 64, 16
LENGTH, LONG = 16_384, 65_536
FASTER, OVER_DENSE = 1.0, 5.0
KEPT = 0.1
ALLOWED = 2.0
"""How much more the two orders may differ than one unit of rounding of the largest value."""


def made(options: Options) -> list[Bar]:
    """Every bar, at its own shape and at one that the seed draws.

    Args:
        options: Seed and device.

    Returns:
        The bars.
    """
    rng = bars.draw(options, "gpu-sparse-orders")
    n, long = int(rng.integers(6000, 14_000)), int(rng.integers(40_000, 60_000))
    found = [_orders(tokens, group, options) for tokens in (LENGTH, n) for group in GROUPS]
    return found + [_selectors(tokens, options) for tokens in (LONG, long)]


def orders(tokens: int, group: int, options: Options) -> Case:
    """Attention to 16 blocks of each query, by blocks of keys and by queries, on the same choice.

    Args:
        tokens: Tokens.
        group: Query heads for each key head.
        options: Device, budget and seed.
    """
    name = f"gpu-orders-{tokens}-group{group}"
    shape = Shape(tokens, KV_HEADS * group, KV_HEADS, WIDTH, "bfloat16", options.seed)

    def run(context: Context) -> list[Row]:
        base = Row("targets", name, "-", shape=str(shape), length=tokens, dtype=shape.dtype, seed=shape.seed)
        base = base.replace(device=device.label(options.device), version=version("manyheads"), input="document")
        q, k, v = (t.to(options.device) for t in draw("document", shape)[:3])
        layout = chosen(q, k)
        calls: dict[str, Callable[[], torch.Tensor]] = {}
        for order in ORDERS:
            calls[order] = functools.partial(tiled, q, k, v, layout, order=order, backend="triton")  # type: ignore[assignment]
        context.say(f"targets/{name}: both orders")
        with torch.no_grad():
            try:
                results = [call().float() for call in calls.values()]
            except Exception as error:  # a kernel fails in many ways, and the other bars go on
                return [base.replace(provider=order, status="failed", reason=brief(error)) for order in ORDERS]
            off = float((results[0] - results[1]).abs().max())
            limit = ALLOWED * torch.finfo(torch.bfloat16).eps * float(results[1].abs().max())
            watch = device.stopwatch(options.device)
            times = interleave(calls, budget_s=context.options.seconds, warm=True, watch=watch)
        gate = "green" if off <= limit else "red"
        found = base.replace(gate=gate, error=off, error_limit=limit)
        return [found.replace(provider=order, **times[order].fields()) for order in ORDERS]

    return Case("targets", name, run, 4.0, ORDERS)


def chosen(q: torch.Tensor, k: torch.Tensor) -> TileLayout:
    """Blocks of keys for each query, by the product of each query, summed over its group, with mean keys."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (k.shape[1], group)).float().sum(2)
    scores = queries @ select.pool(k, BLOCK).mT
    seen = select.block_causal(n, n, 1, BLOCK, q.device)
    ids = select.top_k(scores, min(KEEP, scores.shape[-1]), visible=seen, force=select.Forced(first=1, local=1))
    return TileLayout.from_ids(ids, nq=n, nk=n, tile=(1, BLOCK), mask=Causal(), heads=q.shape[1])


def _orders(tokens: int, group: int, options: Options) -> Bar:
    name = f"gpu-orders-{tokens}-group{group}"
    words = f"loop over keys against loop over queries, {KEEP} blocks of each query, group {group}, N = {tokens}"
    base = bars.promise(name, words, dtype="bfloat16", length=tokens)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group_ in measured for row in group_]
        mine, other = (bars.one(rows, order) for order in ORDERS)
        reason = bars.doubt(rows, "keys") or bars.doubt(rows, "queries") if rows else None
        ratio = None
        if not reason and mine and other and mine.median_ms and other.median_ms:
            ratio = other.median_ms / mine.median_ms
        return [bars.at_least(bars.cautioned(base.replace(note=reason), mine, other), ratio, FASTER)]

    return Bar(f"bar-{name}", (orders(tokens, group, options),), judge)


def _selectors(tokens: int, options: Options) -> Bar:
    name = f"gpu-blocks-{tokens}"
    shape = Shape(tokens, 16, 4, WIDTH, "bfloat16", options.seed)
    words = f"{KEPT:.0%} of the key blocks, choosing included, over dense attention, N = {tokens}, 16:4 heads of 128"
    base = bars.promise(name, words, dtype="bfloat16", length=tokens)

    def some(of: Shape) -> list[sparse.Way]:
        return [sparse.pooled(of, KEPT), sparse.pooled(of, KEPT, "head")]

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        out = []
        for who, told in (("pooled-topk", "shared in a group"), ("pooled-topk-heads", "by each head")):
            row = next((r for r in rows if r.provider == who and r.status == "measured"), None)
            one = bars.worded(base, told).replace(note=None if row is None else row.note)
            out.append(bars.at_least(one, None if row is None else row.speed, OVER_DENSE))
        return out

    return Bar(f"bar-{name}", (sparse.plane("targets", name, "document", shape, options, some),), judge)
