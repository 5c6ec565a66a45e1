"""The average corrected along a probe, in blocks: forward and backward without a matrix of pairs.

``o = (1 + c) v_mean - sum_j p_j s_j v_j`` with ``s_j = r . k_j`` and ``c = sum_j p_j s_j``. Scores of queries and of
probes come from one product, with the probes as more rows.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..scratch import Scratch
from ..tiled import products
from ..tiled.passes import Strip, cut, flat, stacked, strips
from ..tiled.plan import Plan, Segment, fetch, plan_of, scatter
from ..tiled.problem import Problem
from ..tiled.products import race, reduced_precision

_WHOLE = 1 << 22  # pairs of a strip whose rows are weighed at once, which saves one product
_CHUNK = 1 << 20  # pairs of a chunk otherwise


class Stats(NamedTuple):
    """What one call keeps of each row.

    Attributes:
        out: ``(B, H, Nq, Dv)``.
        lse: ``(B, H, Nq)``; empty when not asked for.
        mean: Average of the values ``(B, H, Nq, Dv)`` in the accumulation dtype; empty when nothing is recorded.
        level: Average of the probe's products, ``c``, ``(B, H, Nq)``; empty likewise.
    """

    out: Tensor
    lse: Tensor
    mean: Tensor
    level: Tensor


def forward(p: Problem, r: Tensor, keep: int) -> Stats:
    """The output and what ``keep`` asks for.

    Args:
        p: Queries, keys, values, layout and scale.
        r: Probes ``(B, Hq, Nq, D)``.
        keep: 0 for the output alone, 1 for ``lse``, 2 for everything.

    Returns:
        The statistics.
    """
    plan, acc = plan_of(p.layout), p.accumulate
    shape = p.q.shape[:3]
    found = Stats(
        p.v.new_empty(*shape, p.v.shape[3]),
        p.q.new_empty(shape if keep else (0,), dtype=acc),
        p.q.new_empty((*shape, p.v.shape[3]) if keep > 1 else (0,), dtype=acc),
        p.q.new_empty(shape if keep > 1 else (0,), dtype=acc),
    )
    scratch = Scratch()
    for strip in strips(p, plan):
        at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
        whole = keep < 2 and 0 < pairs(strip) <= _WHOLE
        got = _whole(p, plan, strip, r, keep, scratch) if whole else _streamed(p, plan, strip, r, scratch)
        for target, value in zip(found, got, strict=True):
            if target.dim() > 1 and value is not None:
                target[at] = value.view(target[at].shape)
    return found


def backward(
    p: Problem, r: Tensor, stats: Stats, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, probes, keys and values, in the accumulation dtype."""
    plan, acc = plan_of(p.layout), p.accumulate
    dq, dr, dk, dv = (torch.zeros_like(t, dtype=acc) for t in (p.q, r, p.k, p.v))
    height, delta = heights(stats, dout, dlse, acc)
    for strip in strips(p, plan):
        at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
        kv = (strip.b, strip.kv)
        g, queries, probes = (stacked(t[at], p) for t in (dout, p.q, r))
        lse, top, drop, level = (stacked(t[at][..., None], p) for t in (stats.lse, height, delta, stats.level))
        both = torch.cat([queries, probes], dim=1)
        for segments in chunks(plan, strip):
            k, v = flat(fetch(p.k[kv], segments)), flat(fetch(p.v[kv], segments))
            s, t = halves(products.scores(both, k))
            weights = exponentials(hidden(p, plan, strip, s, segments), p.scale, lse)
            gain = products.scores(g, v)
            lift = (1.0 + level) - t
            scatter(dv[kv], _back(weights * lift, g).view(_heads(kv, dv, -1)), segments)
            ds = torch.cat([lift.mul_(gain).add_(t.mul_(top)).sub_(drop), top - gain], dim=1)
            for half, factor in zip(halves(ds), (p.scale, 1.0), strict=True):
                half.mul_(weights).mul_(factor)
            rows = products.average(ds, k)
            for target, half in zip((dq, dr), halves(rows), strict=True):
                target[at] += half.reshape(target[at].shape)
            scatter(dk[kv], _back(ds, both).view(_heads(kv, dk, -1)), segments)
    return dq, dr, dk, dv


def probe_gradient(p: Problem, stats: Stats, dout: Tensor) -> Tensor:
    """The gradient of the probe alone: minus the covariance of the keys with what the values give to the output."""
    plan, acc = plan_of(p.layout), p.accumulate
    dr = torch.zeros_like(p.q, dtype=acc)
    height = (dout.to(acc) * stats.mean).sum(-1)
    for strip in strips(p, plan):
        at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
        kv = (strip.b, strip.kv)
        g, queries = (stacked(t[at], p) for t in (dout, p.q))
        lse, top = (stacked(t[at][..., None], p) for t in (stats.lse, height))
        for segments in chunks(plan, strip):
            k, v = flat(fetch(p.k[kv], segments)), flat(fetch(p.v[kv], segments))
            s = hidden(p, plan, strip, products.scores(queries, k), segments)
            ds = torch.sub(top, products.scores(g, v)).mul_(exponentials(s, p.scale, lse))
            dr[at] += products.average(ds, k).reshape(dr[at].shape)
    return dr


def heights(stats: Stats, dout: Tensor, dlse: Tensor | None, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """For every row ``dout . v_mean``, and what its scores' gradients have in common."""
    height = (dout.to(acc) * stats.mean).sum(-1)
    delta = (dout.to(acc) * stats.out.to(acc)).sum(-1) + stats.level * height
    return height, delta if dlse is None else delta - dlse.to(acc).masked_fill(stats.lse == -math.inf, 0.0)


# --- pieces that the solver shares --------------------------------------------------------------------------------


def pairs(strip: Strip) -> int:
    """Pairs that a strip computes."""
    heads = (strip.b.stop - strip.b.start) * (strip.h.stop - strip.h.start)
    return heads * (strip.row.q1 - strip.row.q0) * strip.row.width


def chunks(plan: Plan, strip: Strip, columns: int | None = None) -> Iterator[tuple[Segment, ...]]:
    """The keys of a strip in portions."""
    rows = pairs(strip) // max(1, strip.row.width)
    most = _CHUNK // max(1, rows) if columns is None else columns
    return cut(strip.row.segments, max(plan.tile[1], most), plan.tile[1], aligned=False)


def hidden(p: Problem, plan: Plan, strip: Strip, s: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """Stacked scores ``(Z, R, C)`` with minus infinity, in place, where the mask forbids.

    Scores whose scale is not positive are scaled first, so that minus infinity stays what it is.
    """
    if p.scale <= 0:
        s.mul_(p.scale)
    plan.hide(s.unflatten(1, (-1, strip.row.q1 - strip.row.q0)), segments, -math.inf)
    return s


def exponentials(s: Tensor, scale: float, anchor: Tensor) -> Tensor:
    """``exp(scale * s - anchor)`` in place; rows anchored at minus infinity hold nothing but hidden pairs."""
    anchor = anchor.masked_fill(anchor == -math.inf, 0.0)
    base = math.log2(math.e) if s.device.type == "cpu" and products.exp2_wins() else 1.0
    s = torch.sub(anchor * -base, s, alpha=-base * (scale if scale > 0 else 1.0), out=s)
    return s.exp_() if base == 1.0 else s.exp2_()


def halves(t: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the queries and those of the probes."""
    return t[:, : t.shape[1] // 2], t[:, t.shape[1] // 2 :]


def _back(ds: Tensor, rows: Tensor) -> Tensor:
    """``ds^T rows``: what the stacked rows, and with them the query heads of a key head, give to every key."""
    return products.average(ds.mT, rows)


def _heads(at: tuple[slice, slice], like: Tensor, tokens: int) -> tuple[int, int, int, int]:
    """The shape of a part of the keys or values, its heads apart."""
    b, h = at
    return b.stop - b.start, h.stop - h.start, tokens, like.shape[3]


# --- forward of one strip -----------------------------------------------------------------------------------------


def _scores(scratch: Scratch, name: str, a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """``a b^T`` as :func:`products.scores` gives it, in memory that is there already where that is faster."""
    if not _fills(a.dtype, a.device.type):
        return products.scores(a, b)
    target = scratch(name, (*a.shape[:2], b.shape[1]), a, acc)
    if a.dtype == acc:
        return torch.bmm(a, b.mT, out=target)
    with reduced_precision() if a.dtype == torch.bfloat16 else contextlib.nullcontext():
        return torch.bmm(a.to(acc), b.to(acc).mT, out=target)


def _fills(dtype: torch.dtype, device: str) -> bool:
    """Whether products into memory that is there beat those that bring their own, which may be oneDNN's."""
    return device != "cpu" or dtype != torch.float32 or _filling_wins()


@functools.cache
def _filling_wins() -> bool:
    with torch.inference_mode():
        a, b = (torch.ones(1, n, 64) for n in (512, 2048))
        target = torch.empty(1, 512, 2048)
        return race(lambda: torch.bmm(a, b.mT, out=target), lambda: products.scores(a, b)) < 1.2


def _whole(p: Problem, plan: Plan, strip: Strip, r: Tensor, keep: int, scratch: Scratch) -> tuple[Tensor | None, ...]:
    """All keys of the rows at once: with ``c`` known before the values are read, one product of them is enough."""
    segments, kv = strip.row.segments, (strip.b, strip.kv)
    at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
    q, rest = _folded(p.q[at], p.scale)
    k, v = flat(fetch(p.k[kv], segments)), flat(fetch(p.v[kv], segments))
    rows = stacked(q, p), stacked(r[at], p)
    if k.shape[0] == 1:
        s, t = halves(_scores(scratch, "scores", torch.cat(rows, dim=1), k, p.accumulate))
    else:  # halves of several heads would not be contiguous
        names = ("scores", "probes")
        s, t = (_scores(scratch, name, one, k, p.accumulate) for name, one in zip(names, rows, strict=True))
    if rest != 1.0:
        s.mul_(rest)
    plan.hide(s.unflatten(1, (-1, strip.row.q1 - strip.row.q0)), segments, -math.inf)
    shares = torch._softmax(s, -1, False, out=scratch("shares", tuple(s.shape), s))
    lse = None
    if all(m for *_, m in segments) or keep:
        top = s.amax(-1)
        empty = top == -math.inf
        shares.masked_fill_(empty[..., None], 0.0)
        lse = (top - torch.log(shares.amax(-1).masked_fill(empty, 1.0))).masked_fill(empty, -math.inf)
    # the softmax's own derivative is what is sought: p * (t - sum p t)
    torch.ops.aten._softmax_backward_data.out(t, shares, -1, shares.dtype, grad_input=s)
    tilted = shares.sub_(s)
    if v.dtype != tilted.dtype:
        tilted = scratch("tilted", tuple(s.shape), v).copy_(tilted)
    return torch.bmm(tilted, v), lse, None, None


def _folded(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries that carry the scale where half precision would not round it, and what is left of it."""
    if q.dtype.itemsize == 2 and abs(math.frexp(scale)[0]) not in (0.0, 0.5):
        return q, scale
    return q * scale, 1.0


def _streamed(p: Problem, plan: Plan, strip: Strip, r: Tensor, scratch: Scratch) -> tuple[Tensor, ...]:
    """Some keys at a time, with a running maximum; both averages are kept apart until the end."""
    at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
    kv = (strip.b, strip.kv)
    both = torch.cat([stacked(p.q[at], p), stacked(r[at], p)], dim=1)
    size, acc = (both.shape[0], both.shape[1] // 2), p.accumulate
    best = both.new_full(size, -math.inf, dtype=acc)
    totals = both.new_zeros(size[0], 2 * size[1], dtype=acc)
    sums = both.new_zeros(*totals.shape, p.v.shape[3], dtype=acc)
    for segments in chunks(plan, strip):
        k, v = flat(fetch(p.k[kv], segments)), flat(fetch(p.v[kv], segments))
        scores = _scores(scratch, "scores", both, k, acc)
        s, t = halves(scores)
        top = torch.maximum(best, hidden(p, plan, strip, s, segments).amax(-1).mul_(max(p.scale, 0.0) or 1.0))
        anchor = top.masked_fill(top == -math.inf, 0.0)
        t.mul_(exponentials(s, p.scale, anchor[..., None]))
        shrink = torch.exp(best - anchor).repeat(1, 2)
        totals = totals.mul_(shrink).add_(scores.sum(-1))
        sums = sums.mul_(shrink[..., None]).add_(products.average(scores, v))
        best = top
    (weight, level), (mean, turned) = halves(totals), halves(sums)
    whole = weight.masked_fill(weight == 0, 1.0)
    level, mean, turned = level / whole, mean / whole[..., None], turned / whole[..., None]
    out = torch.addcmul(mean, level[..., None], mean).sub_(turned)
    return out, best + torch.log(weight), mean, level
