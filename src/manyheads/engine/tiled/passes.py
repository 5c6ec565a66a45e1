"""Any problem, blocked: two products and a few elementwise passes per piece, in PyTorch.

Each row of query tiles visits its keys in chunks that stay in cache, with a running maximum; query heads that share
a key head are stacked as rows of the products. Scores and statistics are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import lowbit, products
from .bias import Block
from .dropout import keep
from .lowbit import Operands
from .plan import Group, Plan, Row, Segment, fetch, kv_heads, plan_of, scatter
from .problem import Grads, Problem

_CHUNK = 1 << 20  # score elements of one chunk: 4 MiB in float32


class Strip(NamedTuple):
    """Some heads of one row of query tiles, and the whole numbers that low-bit scores are made of."""

    b: slice
    h: slice
    kv: slice
    row: Row
    low: Operands | None = None


class Chunk(NamedTuple):
    """Scores of one strip against some of its keys, ``(b, h, M, C)``, and what their gradient needs.

    The scores are ``factor * s``: where nothing but the scale acts on the products, it is left to the exponential.
    """

    s: Tensor
    factor: float
    segments: tuple[Segment, ...]
    k: Tensor
    at: Block | None
    slope: Tensor | None


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser; the second is meaningless for weights that are not normalised."""
    plan = plan_of(p.layout)
    out = p.v.new_empty(*p.q.shape[:3], p.v.shape[3], dtype=p.result(p.v.dtype))
    lse = p.q.new_empty(p.q.shape[:3], dtype=p.accumulate)
    for strip in strips(p, plan):
        at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
        out[at], lse[at] = (_softmax if p.weight.softmax else _kernel)(p, plan, strip)
    return out, lse


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients with scores computed again, query rows outermost."""
    plan = plan_of(p.layout)
    acc = p.accumulate
    dq, dk, dv = (torch.zeros_like(t, dtype=acc) for t in (p.q, p.k, p.v))
    dterms = [torch.zeros_like(t.tensor, dtype=t.total(acc)) for t in p.terms]
    delta = _delta(p, plan, out, lse, dout)
    if dlse is not None:
        delta = delta - dlse.to(acc)
    for strip in strips(p, plan):
        at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
        rows = dout[at], lse[at][..., None], delta[at][..., None]
        kv = (strip.b, strip.kv)
        for chunk in _chunks(p, plan, strip):
            weights, ds = _score_grads(p, strip, chunk, rows, fetch(p.v[kv], chunk.segments))
            for term, grad in zip(p.terms if p.bias_grads else (), dterms, strict=p.bias_grads):
                assert chunk.at is not None
                term.accumulate(grad, ds, chunk.at)
            if chunk.slope is not None:
                ds = ds * chunk.slope
            dq[at] += products.average(stacked(ds, p), chunk.k).view(dq[at].shape).mul_(p.scale)
            scatter(dk[kv], _over_rows(ds, p.q[at], p).mul_(p.scale), chunk.segments)
            scatter(dv[kv], _over_rows(weights, rows[0], p), chunk.segments)
    dsink = None
    if p.sink is not None:
        dsink = -(torch.exp(p.sink.double()[:, None] - lse) * delta).sum((0, 2)).to(p.sink.dtype)
    terms = [g.to(p.term_result(t)) for g, t in zip(dterms, p.terms, strict=True)]
    dq, dk, dv = (g.to(p.result(t.dtype)) for g, t in ((dq, p.q), (dk, p.k), (dv, p.v)))
    return Grads(dq, dk, dv, dsink, terms)


# --- forward of one strip ---------------------------------------------------------------------------------------


def _softmax(p: Problem, plan: Plan, strip: Strip) -> tuple[Tensor, Tensor]:
    shape = _rows_shape(strip)
    best = p.q.new_full(shape, -math.inf, dtype=p.accumulate)
    total = torch.zeros_like(best)
    acc: Tensor | None = None
    for chunk in _chunks(p, plan, strip):
        top = torch.maximum(best, chunk.s.amax(-1).mul_(chunk.factor))
        anchor = top.masked_fill(top == -math.inf, 0.0)
        weights = _exponentials(chunk, anchor[..., None])
        part = _weighted(p, strip, chunk, weights)
        if acc is None:
            acc, total = part, weights.sum(-1)
        else:
            shrink = torch.exp(best - anchor)
            acc = acc.mul_(shrink[..., None]).add_(part)
            total = total.mul_(shrink).add_(weights.sum(-1))
        best = top
    lse = best + torch.log(total)
    if p.sink is not None:
        lse_all = torch.logaddexp(lse, p.sink[strip.h].to(lse.dtype)[:, None])
        total = total * torch.exp(lse_all - lse).masked_fill(lse == -math.inf, 1.0)
        lse = lse_all
    if acc is None:
        return p.v.new_zeros(*shape, p.v.shape[3]), lse
    return acc.div_(total.masked_fill(total == 0, 1.0)[..., None]), lse


def _exponentials(chunk: Chunk, anchor: Tensor) -> Tensor:
    """``exp(factor * s - anchor)`` in place, by the faster of ``exp`` and ``exp2``."""
    hidden = chunk.at is not None or any(segment.mask_id for segment in chunk.segments)
    base = math.log2(math.e) if chunk.s.device.type == "cpu" and products.exp2_wins(hidden) else 1.0
    if chunk.factor == 1.0:  # a difference that was not rounded would be, if its terms were scaled before it
        s = torch.sub(chunk.s, anchor, out=chunk.s)
        return s.exp_() if base == 1.0 else s.mul_(base).exp2_()
    s = torch.sub(anchor * -base, chunk.s, alpha=-base * chunk.factor, out=chunk.s)
    return s.exp_() if base == 1.0 else s.exp2_()


def _kernel(p: Problem, plan: Plan, strip: Strip) -> tuple[Tensor, Tensor]:
    assert p.weight.value is not None
    shape = _rows_shape(strip)
    total = p.q.new_zeros(shape, dtype=p.accumulate)
    acc = p.q.new_zeros(*shape, p.v.shape[3], dtype=p.accumulate)
    for chunk in _chunks(p, plan, strip):
        weights = _kernel_weights(p, chunk)
        total += weights.sum(-1)
        acc += _weighted(p, strip, chunk, weights)
    if p.weight.normalised:
        acc /= total.masked_fill(total == 0, 1.0)[..., None]
    return acc, torch.log(total)


def _kernel_weights(p: Problem, chunk: Chunk) -> Tensor:
    """Weights of a classical kernel; hidden pairs carry the score ``-inf``, where no kernel may be trusted."""
    assert p.weight.value is not None
    hidden = chunk.s == -math.inf
    return p.weight.value(chunk.s.masked_fill(hidden, 0.0)).masked_fill_(hidden, 0.0)


def _weighted(p: Problem, strip: Strip, chunk: Chunk, weights: Tensor) -> Tensor:
    if p.dropout_p:
        weights = weights * _kept(p, strip, chunk)
    v = flat(fetch(p.v[strip.b, strip.kv], chunk.segments))
    if p.wide and p.terms:
        v = v.to(p.accumulate)  # rounded weights would show in the gradients of a bias, which use this output
    return products.average(stacked(weights, p), v).view(*weights.shape[:3], v.shape[2])


def _delta(p: Problem, plan: Plan, out: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
    """``sum_j w_ij (dout_i . v_j)`` for every row: ``dout . out``, unless rounding of ``out`` would show.

    Gradients of a bias or a sink add whole rows up, where the rounding of a half-precision output does not cancel;
    for these the sum is taken over the scores themselves, at the price of one more visit. (Of a part of the keys it
    could not be: who computes in parts brings an output that was not rounded.)
    """
    if out.dtype.itemsize > 2 or not p.weight.softmax or not ((p.terms and p.bias_grads) or p.sink is not None):
        return (dout.double() * out).sum(-1).to(p.accumulate)
    delta = torch.zeros_like(lse)
    for strip in strips(p, plan):
        at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
        rows = dout[at], lse[at][..., None], torch.zeros_like(lse[at])[..., None]
        for chunk in _chunks(p, plan, strip):
            delta[at] += _score_grads(p, strip, chunk, rows, fetch(p.v[strip.b, strip.kv], chunk.segments))[1].sum(-1)
    return delta


# --- backward of one chunk --------------------------------------------------------------------------------------


def _score_grads(
    p: Problem, strip: Strip, chunk: Chunk, rows: tuple[Tensor, Tensor, Tensor], v: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights that multiplied the values, and the gradient of the scores before the cap."""
    dout, lse, delta = rows
    dw = products.scores(stacked(dout, p), flat(v)).view(chunk.s.shape)
    if p.weight.softmax:
        weights = _exponentials(chunk, lse.masked_fill(lse == -math.inf, 0.0))
    else:
        weights = _kernel_weights(p, chunk)
        raw = weights
        if p.weight.normalised:
            inverse = torch.exp(-lse).masked_fill_(lse == -math.inf, 0.0)
            weights, dw = weights * inverse, dw * inverse
            delta = delta * inverse
        else:
            delta = torch.zeros_like(delta)
    used = weights
    if p.dropout_p:
        kept = _kept(p, strip, chunk)
        used, dw = weights * kept, dw * kept
    dw = dw - delta
    if p.weight.softmax:
        return used, dw.mul_(weights)
    assert p.weight.slope is not None
    hidden = chunk.s == -math.inf
    slope = p.weight.slope(chunk.s.masked_fill(hidden, 0.0), raw).masked_fill(hidden, 0.0)
    return used, dw * slope


# --- scores of one strip, chunk by chunk ------------------------------------------------------------------------


def strips(p: Problem, plan: Plan) -> Iterator[Strip]:
    """All heads at once while their scores stay in cache, one key head after another when they do not."""
    low = None if p.qk == "exact" else lowbit.operands(p)
    for group in plan.groups(p.q.shape[0], p.q.shape[1], p.group):
        for row in plan.rows[group.row_set]:
            for b, h in _parts(p, group, row):
                yield Strip(b, h, kv_heads(h, p.group), row, low)


def _parts(p: Problem, group: Group, row: Row) -> Iterator[tuple[slice, slice]]:
    batch, heads = group.b.stop - group.b.start, group.h.stop - group.h.start
    if batch * heads * (row.q1 - row.q0) * row.width <= _CHUNK:
        yield group.b, group.h
        return
    for b in range(group.b.start, group.b.stop):
        for h in _by_kv_head(group, p.group):
            yield slice(b, b + 1), h


def _by_kv_head(group: Group, per_kv: int) -> Iterator[slice]:
    h = group.h.start
    while h < group.h.stop:
        end = min((h // per_kv + 1) * per_kv, group.h.stop)
        yield slice(h, end)
        h = end


def _chunks(p: Problem, plan: Plan, strip: Strip) -> Iterator[Chunk]:
    q = stacked(p.q[strip.b, strip.h, strip.row.q0 : strip.row.q1], p)
    shape = _rows_shape(strip)
    skipper = _Skipper(p.skip_threshold, plan.tile[1]) if p.skip_threshold else None
    alone = skipper is not None and not p.plain_but_skipping  # what depends on the keys is made for one tile at a time
    columns = plan.tile[1] if alone else max(plan.tile[1], _CHUNK // max(1, math.prod(shape)))
    for segments in cut(strip.row.segments, columns, plan.tile[1], aligned=alone):
        k = flat(fetch(p.k[strip.b, strip.kv], segments))
        s = products.scores(q, k).view(*shape, k.shape[1]) if strip.low is None else _low_scores(strip, segments)
        slope, factor = None, p.scale
        if p.scale <= 0 or p.softcap or p.terms or alone or not p.weight.softmax:
            s, factor = s.mul_(p.scale), 1.0
        if p.softcap:
            s = s.div_(p.softcap).tanh_()
            slope = 1.0 - s * s
            s = s.mul_(p.softcap)
        at = _block(p, strip, segments) if p.terms or p.dropout_p else None
        for term in p.terms:
            assert at is not None
            term.add(s, at)
        plan.hide(s, segments, -math.inf)
        if skipper is not None:
            s, segments, fewer = skipper.visited(s, factor, segments)
            if not segments:
                continue
            k = flat(fetch(p.k[strip.b, strip.kv], segments)) if fewer else k
        yield Chunk(s, factor, segments, k, at, slope)


def _low_scores(strip: Strip, segments: tuple[Segment, ...]) -> Tensor:
    assert strip.low is not None
    at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
    keys = torch.cat([torch.arange(k0, k1, device=strip.low.k.device) for k0, k1, _ in segments])
    return strip.low.part(at, strip.kv, keys).scores()


class _Skipper:
    """Drops tiles whose scores lie below the running maximum of every row by more than ``-log(threshold)``."""

    def __init__(self, threshold: float, width: int) -> None:
        self.floor = math.log(threshold)
        self.width = width
        self.best: Tensor | None = None

    def visited(
        self, s: Tensor, factor: float, segments: tuple[Segment, ...]
    ) -> tuple[Tensor, tuple[Segment, ...], bool]:
        """The scores ``factor * s`` and keys of the tiles that some head needs, and whether these are not all.

        Heads that do not need one of them have its scores set to ``-inf``.
        """
        top = self._tops(s) * factor
        start = top.new_full((), -math.inf) if self.best is None else self.best[..., None]
        new = torch.maximum(start, top.cummax(-1).values)
        needed = ((top - new >= self.floor) & (top > -math.inf)).any(2)
        self.best = new[..., -1]
        some = needed.flatten(0, 1).any(0)
        if not some.all():
            kept = some.tolist()
            places = [Segment(t, t + self.width, 0) for t in range(0, s.shape[-1], self.width)]
            parts = [s[..., k0:k1] for k0, k1, _ in _joined([t for t, x in zip(places, kept, strict=True) if x])]
            tiles = [t for t, x in zip(_tiles_of(segments, self.width), kept, strict=True) if x]
            segments, needed = tuple(_joined(tiles)), needed[..., some]
            s = parts[0] if len(parts) == 1 else torch.cat(parts, -1) if parts else s
        if not needed.all():
            hidden = ~needed.repeat_interleave(self.width, dim=-1)[..., : s.shape[-1]]
            s.masked_fill_(hidden[:, :, None], -math.inf)
        return s, segments, not bool(some.all())

    def _tops(self, s: Tensor) -> Tensor:
        """The best score of every row in every tile; only the last tile may be narrower."""
        whole = s.shape[-1] // self.width * self.width
        tops = [s[..., :whole].unflatten(-1, (-1, self.width)).amax(-1)] if whole else []
        return torch.cat([*tops, *([s[..., whole:].amax(-1, keepdim=True)] if whole < s.shape[-1] else [])], -1)


def _tiles_of(segments: tuple[Segment, ...], width: int) -> Iterator[Segment]:
    for k0, k1, mask_id in segments:
        for t in range(k0, k1, width):
            yield Segment(t, min(t + width, k1), mask_id)


def _joined(tiles: list[Segment]) -> Iterator[Segment]:
    """Neighbouring tiles under one mask as one segment."""
    last: Segment | None = None
    for tile in tiles:
        if last is not None and last.k1 == tile.k0 and last.mask_id == tile.mask_id:
            last = last._replace(k1=tile.k1)
            continue
        if last is not None:
            yield last
        last = tile
    if last is not None:
        yield last


def cut(segments: tuple[Segment, ...], columns: int, bn: int, aligned: bool) -> Iterator[tuple[Segment, ...]]:
    """Groups segments into chunks of at most ``columns`` keys, cutting long ones at tile borders."""
    step = max(bn, columns // bn * bn)
    chunk: list[Segment] = []
    room = step
    for k0, k1, mask_id in segments:
        while k0 < k1:
            take = min(k1 - k0, room)
            if take < k1 - k0:
                take = take // bn * bn
            if take:
                chunk.append(Segment(k0, k0 + take, mask_id))
                k0 += take
                room -= take
            if (room < bn or aligned or not take) and chunk:
                yield tuple(chunk)
                chunk, room = [], step
    if chunk:
        yield tuple(chunk)


def _block(p: Problem, strip: Strip, segments: tuple[Segment, ...]) -> Block:
    cols = torch.cat([torch.arange(k0, k1, device=p.q.device) for k0, k1, _ in segments])
    rows = slice(strip.row.q0, strip.row.q1)
    q_pos = p.q_pos[strip.b] if p.q_pos.shape[0] > 1 else p.q_pos
    k_pos = p.k_pos[strip.b] if p.k_pos.shape[0] > 1 else p.k_pos
    return Block(strip.b, strip.h, rows, cols, q_pos[:, rows], k_pos[:, cols])


def _kept(p: Problem, strip: Strip, chunk: Chunk) -> Tensor:
    assert chunk.at is not None
    batch, head = (
        torch.arange(first + s.start, first + s.stop, device=p.q.device)
        for first, s in zip(p.origin, (strip.b, strip.h), strict=True)
    )
    kept = keep(p.seed, batch, head, chunk.at.q_pos, chunk.at.k_pos, p.dropout_p)
    return kept.to(p.accumulate) / (1.0 - p.dropout_p)


def _rows_shape(strip: Strip) -> tuple[int, int, int]:
    return strip.b.stop - strip.b.start, strip.h.stop - strip.h.start, strip.row.q1 - strip.row.q0


def stacked(t: Tensor, p: Problem) -> Tensor:
    """``(b, h, M, X)`` as ``(b * hkv, G * M, X)``: the query heads of a key head are rows of one product."""
    b, h, m, x = t.shape
    g = min(h, p.group)
    return t.reshape(b * (h // g), g * m, x)


def flat(t: Tensor) -> Tensor:
    """Batch and heads as one dimension."""
    return t.reshape(t.shape[0] * t.shape[1], *t.shape[2:])


def _over_rows(x: Tensor, y: Tensor, p: Problem) -> Tensor:
    """``sum_i x_ij y_i`` for every key, summed over the query heads of a key head: ``(b, hkv, C, X)``."""
    g = min(x.shape[1], p.group)
    per_head = products.average(flat(x).transpose(1, 2), flat(y))
    return per_head.view(x.shape[0], x.shape[1] // g, g, *per_head.shape[1:]).sum(2)
