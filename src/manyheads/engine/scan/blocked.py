"""The chunked form in PyTorch: inside a chunk every pair at once, between chunks one pass over the states.

Heads go one after the other where sequences are long, so that a segment of some chunks is a run of memory that the
caches hold; short sequences go many heads at a time. All chunks of a segment are computed together. The state before
each segment is all that is kept for the backward, which walks the segments from the last to the first, computes each
again with recording, and differentiates it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..scratch import Scratch, borrowed
from . import autodiff
from .pieces import Carry, Mix, rows_of
from .problem import Problem, divide, with_ones
from .weights import Weights, exact, factored

_ALL = (slice(None), slice(None))
_ROWS = 4096  # tokens times heads of a segment: enough work for each operator, little enough for the caches


def checkpoints(batch: int, heads: int, tokens: int, chunk: int) -> int:
    """An upper bound on the segments of a row; written so that symbolic sizes stay symbolic."""
    return tokens // _segment_tokens(chunk) + 2


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Output, final state and ``m``, and with ``save`` the states and ``m`` before each segment."""
    b, h, n, _ = p.q.shape
    out = p.v.new_empty(b, h, n, p.v.shape[3])
    count = checkpoints(b, h, n, p.chunk) if save else 0
    states = p.state.new_zeros(count, *p.state.shape)
    maxima = p.state.new_zeros(count if p.m is not None else 0, b, h)
    state, m = p.state.clone(), None if p.m is None else p.m.clone()
    with borrowed() as scratch:
        for span in _spans(p):
            # of all heads at once, but for a decay per channel, whose factors are as large as the queries
            by_channel = p.decay is not None and p.decay.dim() == 4
            shared = None if by_channel else _factored(p, span, (slice(0, b), slice(0, h)))
            for rows in _groups(p, span.longest, 1):
                found = _factored(p, span, rows) if shared is None else shared
                weights = _chosen(found, _ALL if shared is None else rows)
                for i, at in enumerate(span.segments):
                    if save:
                        states[(span.first + i, *rows)] = state[rows]
                        if m is not None:
                            maxima[(span.first + i, *rows)] = m[rows]
                    part = _part(p, rows, at, span.chunk, state, m)
                    target = out[(*rows, at)]
                    w = None if weights is None else weights[i]
                    result, state[rows], end = segment(part, w, target, scratch)
                    if result is not target:
                        target.copy_(result)
                    if m is not None and end is not None:
                        m[rows] = end
    return out, state, m, states, maxima


def _factored(p: Problem, span: _Span, rows: tuple[slice, slice]) -> tuple[list[Weights], list[list[bool]]] | None:
    """Factored weights of some rows over the whole chunks of a span."""
    if not span.whole:
        return None
    at = slice(span.segments[0].start, span.segments[-1].stop)
    return factored(_part(p, rows, at, span.chunk, p.state, p.m), span.longest // span.chunk)


def _chosen(
    found: tuple[list[Weights], list[list[bool]]] | None, rows: tuple[slice, slice]
) -> list[Weights] | None:
    """The factored weights of some of these rows, if all of them have small exponents."""
    if found is None or not all(all(heads[rows[1]]) for heads in found[1][rows[0]]):
        return None
    return [w.of(rows) for w in found[0]]


def backward(
    p: Problem, saved: tuple[Tensor, Tensor], dout: Tensor | None, dstate: Tensor | None, wants: list[bool]
) -> list[Tensor | None]:
    """Gradients of the tensors of a problem from the states before its segments."""
    states, maxima = saved
    grads: list[Tensor | None] = [
        torch.zeros_like(t, dtype=p.accumulate if t.dim() == 1 else t.dtype, memory_format=torch.contiguous_format)
        if t is not None and w
        else None
        for t, w in zip(p.tensors, wants, strict=True)
    ]
    carried = torch.zeros_like(p.state) if dstate is None else dstate.clone()
    for span in reversed(list(_spans(p))):
        for rows in _groups(p, span.longest, p.group):
            for i, at in reversed(list(enumerate(span.segments))):
                before = states[span.first + i], maxima[span.first + i] if p.m is not None else None
                part = _part(p, rows, at, span.chunk, *before)
                seeds = [None if dout is None else dout[(*rows, at)].to(p.accumulate), carried[rows]]
                *found, start = autodiff.gradients(part, lambda fresh: segment(fresh)[:2], seeds, [*wants[:-1], True])
                assert start is not None
                carried[rows] = start
                for place, new in zip(_part_of(grads, rows, at, p.group), found, strict=True):
                    if place is not None and new is not None:
                        if place.dim() == 1:
                            place += new
                        else:
                            place.copy_(new)
    if grads[3] is not None and p.decay is not None:
        grads[3] = grads[3].to(p.decay.dtype)
    return [*grads[:-1], carried if wants[-1] else None]


def segment(
    p: Problem, w: Weights | None = None, target: Tensor | None = None, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A problem of a few chunks.

    Args:
        p: The problem.
        w: Its weights; by default they are computed, in the exact form.
        target: Where the output belongs, ``(B, H, N, Dv)``; used where it can be written to directly.
        scratch: Memory for what is needed meanwhile; fresh memory by default, as recording needs it.

    Returns:
        Output ``(B, H, N, Dv)``, final state, final ``m``.
    """
    b, h, tokens, d = p.q.shape
    n, e = -(-tokens // p.chunk), p.state.shape[-1]
    lead = (b, h, n)
    q, k, v = (rows_of(t, p) for t in (p.q, p.k, p.v))
    if p.normalise:
        v = with_ones(v)
    if w is None:
        w = exact(p, q, k)

    def place(name: str, *shape: int) -> Tensor | None:
        return None if scratch is None else scratch(name, shape, q)

    read = _scaled(q, w.read, lead, place("read", *q.shape))
    write = _scaled(k, w.write, lead, place("write", *k.shape))
    scores = w.scores
    if scores is None:
        left, right = (read, write) if w.factored else (q, k)
        scores = torch.bmm(left, right.mT, out=place("scores", *q.shape[:2], p.chunk))
        scores = _weighted(scores, w.pairs, lead)
    start = p.state.reshape(b * h, d, e)
    enter = start if w.enter is None else _by_row(w.enter, (b, h)) * start
    keep = None if w.keep is None else _by_row(w.keep, lead).unflatten(0, (b * h, n))
    if p.beta is not None:
        states, state, v = _overwritten(p, w, k, v, write, enter, keep)
    elif w.carry is not None:
        update = torch.bmm(write.mT, v, out=place("update", b * h * n, d, e)).view(b * h, n, d * e)
        update[:, 0] += (start if w.first is None else _by_row(w.first, (b, h)) * start).flatten(1)
        carry, before = w.carry.expand(b, h, n, n).reshape(b * h, n, n), enter.flatten(1)
        states, state = _passed(carry, update, before, place("states", b * h, n + 1, d * e))
        states, state = states.unflatten(-1, (d, e)), state.unflatten(-1, (d, e))
    else:
        assert keep is not None
        update = torch.bmm(write.mT, v).view(b * h, n, d, e)
        states, state = Carry.apply(keep, update.mul_(keep) if w.factored else update, enter)
    direct = _direct(target, p, tokens, e)
    base = v.new_empty(1, 1, 1) if direct is None else direct
    total = torch.baddbmm(base, scores, v, beta=0, alpha=p.scale, out=direct)
    total = torch.baddbmm(total, read, states.flatten(0, 1), alpha=p.scale, out=direct)
    state = state.view(b, h, d, e)
    if target is not None and direct is not None:
        return target, state, w.end
    out = divide(total.view(b, h, n, p.chunk, e), p.normalise, w.rows)
    return out.flatten(2, 3)[:, :, :tokens], state, w.end


def _overwritten(
    p: Problem, w: Weights, k: Tensor, v: Tensor, write: Tensor, enter: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The delta rule: states before the chunks, the last one, and the values that are really written.

    What a token writes is its value less what stands under its key: within a chunk a triangular system, whose solution
    is linear in the state before the chunk. So a chunk maps states by ``keep * I - write^T erase``.
    """
    lead, (d, e) = (*p.q.shape[:2], -(-p.q.shape[2] // p.chunk)), enter.shape[1:]
    size = (enter.shape[0], lead[2])
    beta = rows_of(p.beta[..., None], p) if p.beta is not None else k.new_ones(1)
    key = k * beta
    read = _scaled(key, w.read, lead)
    system = _weighted(torch.bmm(*((read, write.mT) if w.factored else (key, k.mT))), w.pairs, lead)
    solved = torch.linalg.solve_triangular(system, torch.cat([v * beta, read], -1), upper=False, unitriangular=True)
    v, erase = solved.split([e, d], -1)
    update = torch.bmm(write.mT, v).unflatten(0, size)
    mix = torch.bmm(write.mT, erase).neg_().unflatten(0, size)
    mix.diagonal(dim1=-2, dim2=-1).add_(1.0 if keep is None or w.factored else keep[..., 0])
    if w.factored and keep is not None:
        mix, update = mix.mul_(keep), update.mul_(keep)
    states, state = Mix.apply(mix, update, enter)
    return states, state, torch.baddbmm(v, erase, states.flatten(0, 1), alpha=-1)


def _passed(carry: Tensor, update: Tensor, enter: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before the chunks of each row and after the last, from what each chunk writes, ``(R, n, D * E)``."""
    if states is None:
        later = torch.bmm(carry, update)
        return torch.cat([enter[:, None], later[:, :-1]], 1), later[:, -1]
    states[:, 0] = enter
    torch.bmm(carry, update, out=states[:, 1:])
    return states[:, :-1], states[:, -1]


def _direct(target: Tensor | None, p: Problem, tokens: int, width: int) -> Tensor | None:
    """The target as chunks ``(R, C, Dv)``, where products can be written into it."""
    if target is None or tokens % p.chunk or target.dtype != p.accumulate or p.normalise or p.gate is not None:
        return None
    return target.view(-1, p.chunk, width) if target.is_contiguous() else None


def _weighted(scores: Tensor, weights: Tensor | None, lead: tuple[int, int, int]) -> Tensor:
    """Fresh scores ``(R, C, C)`` times weights, nothing above the diagonal; in place where nothing is recorded."""
    blocks = scores.unflatten(0, lead)
    if scores.requires_grad or (weights is not None and weights.requires_grad):
        return scores.tril() if weights is None else (blocks * weights).flatten(0, 2)
    if weights is None:
        scores.tril_()
    else:
        blocks.mul_(weights)
    return scores


def _scaled(t: Tensor, weights: Tensor | None, lead: tuple[int, int, int], place: Tensor | None = None) -> Tensor:
    """Rows of ``(R, C, W)`` times weights ``(..., n, C, 1|W)``."""
    if weights is None:
        return t
    out = None if place is None else place.unflatten(0, lead)
    return torch.mul(t.unflatten(0, lead), weights, out=out).flatten(0, 2)


def _by_row(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """``(..., 1|D)`` as factors ``(R, 1|D, 1)`` of the rows of a state."""
    return t.expand(*lead, t.shape[-1]).reshape(-1, t.shape[-1], 1)


class _Span(NamedTuple):
    """Segments whose chunks have one length: all whole chunks, or what is left over."""

    chunk: int
    segments: list[slice]
    first: int  # number of the first segment
    whole: bool

    @property
    def longest(self) -> int:
        """Tokens of a segment, the last one left out."""
        return self.segments[0].stop - self.segments[0].start


def _segment_tokens(chunk: int) -> int:
    return chunk * (1 + (_ROWS - 1) // chunk)


def _spans(p: Problem) -> Iterator[_Span]:
    """The segments of a row of tokens: whole chunks together, what is left over in a chunk of its own."""
    b, h, n, _ = p.q.shape
    if not b * h:
        return
    size, whole = _segment_tokens(p.chunk), n - n % p.chunk
    segments = [slice(start, min(start + size, whole)) for start in range(0, whole, size)]
    if segments:
        yield _Span(p.chunk, segments, 0, True)
    if n > whole:
        yield _Span(1 << (n - whole - 1).bit_length(), [slice(whole, n)], len(segments), False)


def _groups(p: Problem, tokens: int, least: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and the heads that go together: as many rows as a segment should have.

    Args:
        p: The problem.
        tokens: Of a segment.
        least: Heads that may not be parted: one, or those that share a key head.
    """
    b, h = p.q.shape[:2]
    rows = max(_ROWS // tokens, 1)
    fits = [x for x in range(1, h + 1) if h % x == 0 and x % least == 0 and (x % p.group == 0 or x == 1)]
    heads = max([x for x in fits if x <= rows], default=least)
    batch = max(rows // h, 1) if heads == h else 1
    for i in range(0, b, batch):
        for j in range(0, h, heads):
            yield slice(i, i + batch), slice(j, j + heads)


def _part(
    p: Problem, rows: tuple[slice, slice], at: slice, chunk: int, state: Tensor, m: Tensor | None
) -> Problem:
    """The problem of some rows and tokens."""
    q, k, v, decay, beta, gate = _part_of(p.tensors, rows, at, p.group)
    assert q is not None and k is not None and v is not None
    starts = None if p.starts is None else p.starts[rows[0] if p.starts.shape[0] > 1 else slice(None), at]
    before = None if m is None else m[rows]
    return replace(
        p, q=q, k=k, v=v, decay=decay, beta=beta, gate=gate, starts=starts, chunk=chunk, state=state[rows], m=before
    )


def _part_of(
    tensors: list[Tensor | None], rows: tuple[slice, slice], at: slice, group: int
) -> list[Tensor | None]:
    """Views of tensors in the order of ``Problem.tensors``; the state is left out."""
    batch, heads = rows
    shared = slice(heads.start // group, -(-heads.stop // group))
    out: list[Tensor | None] = []
    for i, t in enumerate(tensors[:-1]):
        if t is not None:
            t = t[heads] if t.dim() == 1 else t[batch, shared if i in (1, 2) else heads, at]
        out.append(t)
    return out
