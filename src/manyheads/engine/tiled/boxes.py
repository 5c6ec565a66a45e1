"""Attention over neighbourhoods by boxes: the keys of many boxes gathered, one batched product for all of them.

Queries and results are strided views of the tensors, so each token is read and written where it is. In the backward
boxes that share keys add to them in turns, never two at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import flash, products
from .boxing import BoxPlan, Inside, Kind, Lattice
from .problem import Grads, Problem

_ELEMENTS = 1 << 20  # of the keys and values of one call
_SCORES = 1 << 20  # of one call where scores are kept: 4 MiB in float32


class Part(NamedTuple):
    """Some boxes of a kind for some batch entries and key heads."""

    b: slice
    h: slice
    kv: slice
    lattice: Lattice


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser, for a softmax without options."""
    assert p.boxes is not None
    out = p.v.new_empty(*p.q.shape[:3], p.v.shape[3], dtype=p.result(p.v.dtype))
    lse = p.q.new_empty(p.q.shape[:3], dtype=p.accumulate)
    fused = _fused_wins(p.q.dtype)
    way, dtype = (_fused, p.q.dtype) if fused else (_passes, p.accumulate)
    for kind in p.boxes.kinds:
        for part in _parts(p, kind, 0 if fused else p.group * kind.queries.tokens):
            o, stats = way(*_inputs(p, kind, part), kind.added(dtype), p.scale)
            for whole, piece in ((out, o), (lse[..., None], stats[..., None])):
                place = _queries_of(whole[part.b, part.h], part.lattice, kind.queries)
                place.copy_(piece.reshape(place.shape))
    return out, lse


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients with scores computed again, in the dtype of the scores."""
    assert p.boxes is not None
    acc = p.accumulate
    delta = (dout.double() * out).sum(-1).to(acc)
    if dlse is not None:
        delta -= dlse
    dq = torch.empty(p.q.shape, dtype=p.result(p.q.dtype))
    dk, dv = (torch.zeros(t.shape, dtype=acc) for t in (p.k, p.v))
    for kind in p.boxes.kinds:
        for part in _parts(p, kind, 2 * p.group * kind.queries.tokens):
            at = (part.b, part.h)
            dy, stats, inner = (
                _boxes(t[at], part.lattice, kind.queries, part.lattice.q0, part.lattice.q_steps)
                for t in (dout, lse[..., None], delta[..., None])
            )
            grads = _gradients(p, kind, *_inputs(p, kind, part), dy.to(acc), stats, inner)
            place = _queries_of(dq[at], part.lattice, kind.queries)
            place.copy_(grads[0].reshape(place.shape))
            for whole, piece in ((dk, grads[1]), (dv, grads[2])):
                _add(whole[part.b, part.kv], piece, kind, part.lattice)
    return Grads(dq, dk.to(p.result(p.k.dtype)), dv.to(p.result(p.v.dtype)))


# --- one call -----------------------------------------------------------------------------------------------------


def _fused(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    width = v.shape[3]
    if q.shape[3] != width:  # the kernel wants one width: zeros change neither scores nor the columns that are kept
        q, k, v = (pad(t, (0, max(q.shape[3], width) - t.shape[3])) for t in (q, k, v))
    out, lse = flash.piece(q, k, v, hidden, scale)
    return out[..., :width], lse


def _passes(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    s, factor = _scores(q, k, hidden, scale)
    top = s.amax(-1, keepdim=True).mul_(factor)
    weights = _exponentials(s, factor, top)
    total = weights.sum(-1, keepdim=True)
    out = products.average(weights, v.flatten(0, 1)).div_(total)
    return out.view(*q.shape[:3], v.shape[3]), (top + total.log()).view(q.shape[:3])


@functools.cache
def _fused_wins(dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel beats separate passes on boxes of usual sizes, half of their pairs hidden."""
    if not flash.available(dtype):
        return False
    with torch.inference_mode():
        q, k = (torch.linspace(-1.0, 1.0, 16 * n * 32).to(dtype).view(8, 2, n, 32) for n in (64, 400))
        hidden = torch.zeros(64, 400)
        hidden[:, ::2] = -math.inf
        call = q, k, k, hidden.to(dtype), 0.125
        slow = q, k, k, hidden, 0.125
        return products.race(lambda: _passes(*slow), lambda: _fused(*call), rounds=11) > 1.0


def _gradients(
    p: Problem, kind: Kind, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq (n, Hq, M, D)``, ``dk (n, Hkv, K, D)`` and ``dv (n, Hkv, K, Dv)`` of n boxes."""
    q, k, v = (t.to(p.accumulate) for t in (q, k, v))
    rows, keys = _stacked(q, k), k.flatten(0, 1)
    dout, lse, delta = (_stacked(t, k) for t in (dout, lse, delta))
    weights = _exponentials(*_scores(q, k, kind.added(q.dtype), p.scale), lse)
    dv = torch.bmm(weights.mT, dout)
    ds = torch.bmm(dout, v.flatten(0, 1).mT).sub_(delta).mul_(weights)
    dq = torch.bmm(ds, keys).mul_(p.scale)
    dk = torch.bmm(ds.mT, rows).mul_(p.scale)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, float]:
    """``q k^T (n * Hkv, G * M, K)``, ``-inf`` for hidden pairs, and what is left to multiply it with."""
    s = products.scores(_stacked(q, k), k.flatten(0, 1))
    if scale <= 0:
        s, scale = s.mul_(scale), 1.0
    if hidden is not None:
        s.view(s.shape[0], -1, *hidden.shape).add_(hidden)
    return s, scale


def _exponentials(s: Tensor, factor: float, anchor: Tensor) -> Tensor:
    """``exp(factor * s - anchor)`` in place; ``exp`` itself is many times slower where its result is zero.

    The difference is taken first: numbers near zero lose nothing when they are multiplied.
    """
    return torch.sub(anchor, s, alpha=factor, out=s).mul_(-_LOG2E).exp2_()


_LOG2E = math.log2(math.e)


def _stacked(t: Tensor, k: Tensor) -> Tensor:
    """``(n, Hq, M, X)`` as ``(n * Hkv, G * M, X)``: query heads of a key head are rows of one product."""
    return t.reshape(k.shape[0] * k.shape[1], -1, t.shape[3])


# --- from tokens to boxes and back --------------------------------------------------------------------------------


def _inputs(p: Problem, kind: Kind, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some boxes, ``(n, heads, tokens, width)``."""
    lattice = part.lattice
    q = _boxes(p.q[part.b, part.h], lattice, kind.queries, lattice.q0, lattice.q_steps)
    k, v = (_boxes(t[part.b, part.kv], lattice, kind.keys, lattice.k0, lattice.k_steps) for t in (p.k, p.v))
    return q, k, v


def _boxes(t: Tensor, lattice: Lattice, inside: Inside, start: int, steps: tuple[int, ...]) -> Tensor:
    """The tokens of some boxes of ``t (b, h, N, X)`` as ``(b * boxes, h, M, X)``; a view where that is possible."""
    found = _view(t, lattice.counts, steps, inside, start)
    return found.reshape(-1, t.shape[1], inside.tokens, t.shape[3])


def _queries_of(t: Tensor, lattice: Lattice, inside: Inside) -> Tensor:
    """Where the queries of some boxes lie in ``t (b, h, N, X)``: ``(b, counts, h, sizes, X)``."""
    return _view(t, lattice.counts, lattice.q_steps, inside, lattice.q0)


def _view(t: Tensor, counts: tuple[int, ...], steps: tuple[int, ...], inside: Inside, start: int) -> Tensor:
    b, h, _, x = t.shape
    sb, sh, sn, sx = t.stride()
    size = (b, *counts, h, *inside.sizes, x)
    stride = (sb, *[n * sn for n in steps], sh, *[n * sn for n in inside.steps], sx)
    return t.as_strided(size, stride, t.storage_offset() + start * sn)


def _add(target: Tensor, piece: Tensor, kind: Kind, lattice: Lattice) -> None:
    """Adds what keys of boxes receive to ``target (b, h, N, X)``, boxes that share keys one after the other."""
    b, h, _, x = target.shape
    piece = piece.view(b, *lattice.counts, h, *kind.keys.sizes, x)
    classes = [min(n, count) for n, count in zip(kind.classes, lattice.counts, strict=True)]
    steps = tuple(n * step for n, step in zip(classes, lattice.k_steps, strict=True))
    for first in itertools.product(*map(range, classes)):
        some = piece[(slice(None), *[slice(at, None, n) for at, n in zip(first, classes, strict=True)])]
        start = lattice.k0 + sum(at * step for at, step in zip(first, lattice.k_steps, strict=True))
        _view(target, tuple(some.shape[1 : 1 + len(classes)]), steps, kind.keys, start).add_(some)


# --- which boxes at a time ----------------------------------------------------------------------------------------


def _parts(p: Problem, kind: Kind, rows: int) -> Iterator[Part]:
    """Cuts the boxes of a kind so that what one call fetches stays in cache; ``rows`` of scores are kept for a key."""
    batch, kv_heads = p.k.shape[:2]
    width, keys = p.q.shape[3] + p.v.shape[3], kind.keys.tokens
    most = max(1, min(_ELEMENTS // (keys * width), _SCORES // max(1, rows * keys)))  # boxes of a head
    heads = min(kv_heads, most)
    most //= heads
    entries = max(1, min(batch, most // kind.boxes))
    for b in range(0, batch, entries):
        for h in range(0, kv_heads, heads):
            kv = slice(h, min(h + heads, kv_heads))
            at = (slice(b, min(b + entries, batch)), slice(kv.start * p.group, kv.stop * p.group), kv)
            for lattice in _cut(kind.lattice, max(1, most // entries)):
                yield Part(*at, lattice)


def _cut(lattice: Lattice, most: int, axis: int = 0) -> Iterator[Lattice]:
    """Cuts a lattice into parts of at most ``most`` boxes, along its first dimensions."""
    inner = math.prod(lattice.counts[axis + 1 :])
    if lattice.counts[axis] * inner <= most:
        yield lattice
        return
    take = max(1, most // inner)
    for at in range(0, lattice.counts[axis], take):
        counts = list(lattice.counts)
        counts[axis] = min(take, counts[axis] - at)
        some = Lattice(
            lattice.q0 + at * lattice.q_steps[axis],
            lattice.k0 + at * lattice.k_steps[axis],
            tuple(counts),
            *lattice[3:],
        )
        yield from _cut(some, most, axis + 1) if inner > most else (some,)


__all__ = ["BoxPlan", "backward", "forward"]
