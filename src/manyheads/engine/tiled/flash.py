"""Softmax over masked scores on a CPU: torch's fused kernel on each dense piece, partial results merged exactly.

The backward needs no merging: with the final ``out`` and ``lse`` of a row, the gradient of every piece is exact
on its own, and a gradient of ``lse`` enters as one more value column whose output is ``-dlse``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import chosen
from .pieces import Piece, pieces_of
from .plan import Plan, fetch, kv_heads, plan_of, scatter
from .problem import Grads, Problem

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def available(dtype: torch.dtype) -> bool:
    """Whether this torch has the fused CPU kernel for a dtype."""
    return _forward is not None and dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One dense piece: ``(out, lse)`` of queries against keys under an additive mask."""
    return _forward(*_dense(q, k, v), 0.0, False, attn_mask=mask, scale=scale)  # type: ignore[misc]


def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A dense or square causal call with its log-normaliser; no gradient flows through the second."""
    return _forward(*_dense(q, k, v), 0.0, causal, scale=scale)  # type: ignore[misc]


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose last dimension is contiguous: the fused kernel reads values as if it were."""
    return tuple([t if t.stride(-1) == 1 else t.contiguous() for t in tensors])


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser, piece by piece."""
    b, h, nq, d = p.q.shape
    dv = p.v.shape[3]
    q, k, v = (p.q, p.k, p.v) if d == dv else _equal_widths(p.q, p.k, p.v)
    q, scale = folded(q, p.scale)
    q, k, v = _dense(q, k, v)
    rows = None if p.layout.ids is None else chosen.rows_of(p.layout, b, h, p.k.shape[1])
    if rows is not None:
        out, lse = chosen.forward(p.layout, rows, q, k, v, scale, p.result(p.v.dtype))
        return _with_sink(p, out[..., :dv], lse)
    plan = plan_of(p.layout)
    if plan.single:  # a small call: no copies
        out, lse = _piece(plan, pieces_of(plan, 0)[0], q, k, v, scale)
        return _with_sink(p, (out if d <= dv else out[..., :dv]).to(p.result(p.v.dtype)), lse)
    out = p.v.new_empty(b, h, nq, v.shape[3], dtype=p.result(p.v.dtype))
    lse = p.q.new_empty(b, h, nq, dtype=p.accumulate)
    for group in plan.groups(b, h, p.group):
        keys, values = k[group.b, kv_heads(group.h, p.group)], v[group.b, kv_heads(group.h, p.group)]
        for part in pieces_of(plan, group.row_set):
            at = (group.b, group.h, slice(part.q0, part.q1))
            o, stats = _piece(plan, part, q[at], keys, values, scale)
            if part.first:
                out[at], lse[at] = o, stats
            else:
                _merge_into(out[at], lse[at], o, stats)
    return _with_sink(p, out[..., :dv], lse)


def folded(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries that carry the scale, where that loses nothing, and what is left of it.

    The fused kernel rounds ``scale * s`` differently in its forward and backward; a scale that is a power of two
    rounds nothing, and half-precision queries could not hold another one.
    """
    if q.dtype.itemsize == 2 or abs(math.frexp(scale)[0]) in (0.0, 0.5):
        return q, scale
    return q * scale, 1.0


def _with_sink(p: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """A sink only widens the normaliser."""
    if p.sink is None:
        return out, lse
    wider = torch.logaddexp(lse, p.sink.to(lse.dtype)[:, None])
    return out.mul_(torch.exp(lse - wider)[..., None]), wider


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients from the saved output and log-normaliser."""
    d, dv = p.q.shape[3], p.v.shape[3]
    out, v = out.to(p.v.dtype), p.v
    if dlse is not None:
        head = dlse.to(out.dtype)
        rest = (dlse - head).to(out.dtype)  # what a half-precision column would lose
        out = torch.cat([out, -torch.stack([head, rest], -1)], -1)
        dout = pad(dout, (0, 2), value=1.0)
        v = pad(v, (0, 2))
    q, k, v = _equal_widths(p.q, p.k, v)
    q, scale = folded(q, p.scale)
    if q.shape[3] > out.shape[3]:
        out, dout = (pad(t, (0, q.shape[3] - t.shape[3])) for t in (out, dout))
    q, k, v, out, dout = _dense(q, k, v, out, dout)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    rows = None if p.layout.ids is None else chosen.rows_of(p.layout, p.q.shape[0], p.q.shape[1], p.k.shape[1])
    if rows is not None:
        dq, dk, dv_ = chosen.backward(p.layout, rows, (q, k, v), (out, lse, dout), scale, p.result(q.dtype))
    else:
        dq, dk, dv_ = _by_pieces(p, (q, k, v), (out, lse, dout), scale)
    if scale != p.scale:
        dq.mul_(p.scale)
    return Grads(dq[..., :d], dk[..., :d].to(p.result(p.k.dtype)), dv_[..., :dv].to(p.result(p.v.dtype)))


def _by_pieces(
    p: Problem, tensors: tuple[Tensor, Tensor, Tensor], saved: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan_of(p.layout)
    (q, k, v), (out, lse, dout) = tensors, saved
    dq = torch.zeros_like(q, dtype=p.result(q.dtype))
    dk, dv = (torch.zeros_like(t, dtype=p.accumulate) for t in (k, v))
    for group in plan.groups(p.q.shape[0], p.q.shape[1], p.group):
        kv = kv_heads(group.h, p.group)
        for part in pieces_of(plan, group.row_set):
            if not part.segments:
                continue
            at = (group.b, group.h, slice(part.q0, part.q1))
            keys, values = fetch(k[group.b, kv], part.segments), fetch(v[group.b, kv], part.segments)
            mask = plan.pattern(part.segments, part.q1 - part.q0, q.dtype)[0] if part.masked else None
            grads = _backward(  # type: ignore[misc]
                dout[at], q[at], keys, values, out[at], lse[at], 0.0, False, attn_mask=mask, scale=scale
            )
            dq[at] += grads[0]
            scatter(dk[group.b, kv], grads[1], part.segments)
            scatter(dv[group.b, kv], grads[2], part.segments)
    return dq, dk, dv


def _piece(plan: Plan, part: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not part.segments:
        acc = torch.promote_types(q.dtype, torch.float32)
        return v.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -math.inf, dtype=acc)
    mask, empty = plan.pattern(part.segments, part.q1 - part.q0, q.dtype) if part.masked else (None, None)
    out, lse = piece(q, fetch(k, part.segments), fetch(v, part.segments), mask, scale)
    return out, lse if empty is None else lse.masked_fill(empty, -math.inf)


def _merge_into(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Adds a partial result over other keys to what was computed before."""
    both = torch.logaddexp(lse, more_lse)
    share = torch.exp(more_lse - both.masked_fill(both == -math.inf, 0.0))[..., None]
    if out.dtype == share.dtype:
        out.lerp_(more.to(out.dtype), share)
    else:
        out.copy_(out.to(share.dtype).lerp_(more.to(share.dtype), share))
    lse.copy_(both)


def _equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernel wants one head width: zeros change neither scores nor the columns that are kept."""
    d, dv = q.shape[3], v.shape[3]
    if d == dv:
        return q, k, v
    if d < dv:
        return pad(q, (0, dv - d)), pad(k, (0, dv - d)), v
    return q, k, pad(v, (0, d - dv))
