"""Softmax over masked scores on a CPU: torch's fused kernel on each dense piece, partial results merged exactly.

The backward needs no merging: with the final ``out`` and ``lse`` of a row, the gradient of every piece is exact
on its own, and a gradient of ``lse`` enters as one more value column whose output is ``-dlse``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .plan import Plan, Row, Segment, fetch, kv_heads, plan_of, scatter
from .problem import Grads, Problem

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_SPLIT = 1024  # unmasked keys of a row from which they are worth a call without a mask


def available(dtype: torch.dtype) -> bool:
    """Whether this torch has the fused CPU kernel for a dtype."""
    return _forward is not None and dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One dense piece: ``(out, lse)`` of queries against keys under an additive mask."""
    return _forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)  # type: ignore[misc]


def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A dense or square causal call with its log-normaliser; no gradient flows through the second."""
    return _forward(q, k, v, 0.0, causal, scale=scale)  # type: ignore[misc]


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser, row of tiles by row of tiles."""
    plan = plan_of(p.layout)
    b, h, nq, dv = *p.q.shape[:3], p.v.shape[3]
    q, k, v = _equal_widths(p.q, p.k, p.v)
    groups = plan.groups(b, h, p.group)
    if len(groups) == 1 and len(groups[0].rows) == 1:  # a small call: no copies
        out, lse = _row(plan, groups[0].rows[0], q, k, v, p.scale)
        return _with_sink(p, out[..., :dv], lse)
    out = p.v.new_empty(b, h, nq, dv)
    lse = p.q.new_empty(b, h, nq, dtype=p.accumulate)
    for group in groups:
        kv = kv_heads(group.h, p.group)
        for row in group.rows:
            at = (group.b, group.h, slice(row.q0, row.q1))
            part, stats = _row(plan, row, q[at], k[group.b, kv], v[group.b, kv], p.scale)
            out[at] = part[..., :dv]
            lse[at] = stats
    return _with_sink(p, out, lse)


def _with_sink(p: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """A sink only widens the normaliser."""
    if p.sink is None:
        return out, lse
    wider = torch.logaddexp(lse, p.sink.to(lse.dtype)[:, None])
    return out.mul_(torch.exp(lse - wider)[..., None]), wider


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients from the saved output and log-normaliser."""
    plan = plan_of(p.layout)
    d, dv = p.q.shape[3], p.v.shape[3]
    v = p.v
    if dlse is not None:
        head = dlse.to(out.dtype)
        rest = (dlse - head).to(out.dtype)  # what a half-precision column would lose
        out = torch.cat([out, -torch.stack([head, rest], -1)], -1)
        dout = pad(dout, (0, 2), value=1.0)
        v = pad(v, (0, 2))
    q, k, v = _equal_widths(p.q, p.k, v)
    out, dout = pad(out, (0, q.shape[3] - out.shape[3])), pad(dout, (0, q.shape[3] - dout.shape[3]))
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    dq = torch.zeros_like(q)
    dk, dv_ = (torch.zeros_like(t, dtype=p.accumulate) for t in (k, v))
    for group in plan.groups(p.q.shape[0], p.q.shape[1], p.group):
        kv = kv_heads(group.h, p.group)
        for row in group.rows:
            at = (group.b, group.h, slice(row.q0, row.q1))
            saved = (dout[at], q[at], out[at], lse[at])
            for segments in _pieces(row):
                grads = _piece_grads(plan, row, segments, saved, k[group.b, kv], v[group.b, kv], p.scale)
                dq[at] += grads[0]
                scatter(dk[group.b, kv], grads[1], segments)
                scatter(dv_[group.b, kv], grads[2], segments)
    return Grads(dq[..., :d], dk[..., :d].to(p.k.dtype), dv_[..., :dv].to(p.v.dtype))


def _row(plan: Plan, row: Row, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not row.width:
        acc = torch.promote_types(q.dtype, torch.float32)
        return v.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -math.inf, dtype=acc)
    out: Tensor | None = None
    for segments in _pieces(row):
        mask, empty = None, None
        if any(s.mask_id for s in segments):
            mask, empty = plan.pattern(segments, row.q1 - row.q0, q.dtype)
        part, stats = piece(q, fetch(k, segments), fetch(v, segments), mask, scale)
        if empty is not None:
            stats = stats.masked_fill(empty, -math.inf)
        if out is None:
            out, lse = part, stats
        else:
            out, lse = _merge(out, lse, part, stats)
    return out, lse  # type: ignore[return-value]


def _merge(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint keys as one."""
    top = torch.maximum(l1, l2)
    top = top.masked_fill(top == -math.inf, 0.0)
    w1, w2 = torch.exp(l1 - top), torch.exp(l2 - top)
    total = w1 + w2
    share = (w2 / total.masked_fill(total == 0, 1.0))[..., None]
    return torch.lerp(o1.to(share.dtype), o2.to(share.dtype), share).to(o1.dtype), top + torch.log(total)


def _pieces(row: Row) -> list[tuple[Segment, ...]]:
    """Keys that need no mask apart from the rest, when there are enough of them."""
    if not row.width:
        return []
    free = tuple(s for s in row.segments if not s.mask_id)
    width = sum(s.k1 - s.k0 for s in free)
    if width == row.width or width < _SPLIT:
        return [row.segments]
    return [free, tuple(s for s in row.segments if s.mask_id)]


def _piece_grads(
    plan: Plan,
    row: Row,
    segments: tuple[Segment, ...],
    saved: tuple[Tensor, ...],
    k: Tensor,
    v: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, out, lse = saved
    mask = plan.pattern(segments, row.q1 - row.q0, q.dtype)[0] if any(s.mask_id for s in segments) else None
    keys, values = fetch(k, segments), fetch(v, segments)
    return _backward(dout, q, keys, values, out, lse, 0.0, False, attn_mask=mask, scale=scale)  # type: ignore[misc]


def _equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernel wants one head width: zeros change neither scores nor the columns that are kept."""
    d, dv = q.shape[3], v.shape[3]
    if d == dv:
        return q, k, v
    if d < dv:
        return pad(q, (0, dv - d)), pad(k, (0, dv - d)), v
    return q, k, pad(v, (0, d - dv))
