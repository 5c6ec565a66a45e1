"""The chunked form in PyTorch: inside a chunk every pair at once, between chunks one pass over the states.

Tokens go in segments of chunks. All chunks of a segment are computed together, only the pass over their states is
sequential. The state before each segment is all that is kept for the backward, which walks the segments from the
last to the first, computes each again with recording, and differentiates it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autodiff
from .pieces import Carry, Channels, Mix, Pairs
from .problem import Problem, by_token, divide, finite, with_ones

_ROWS = 4096  # tokens times heads of a segment: enough work for each operator, little enough for the caches


def checkpoints(batch: int, heads: int, tokens: int, chunk: int) -> int:
    """An upper bound on the segments of a call; written so that symbolic sizes stay symbolic."""
    return tokens // _segment_tokens(batch, heads, chunk) + 2


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Output, final state and ``m``, and with ``save`` the states and ``m`` before each segment."""
    b, h, n, _ = p.q.shape
    out = p.v.new_empty(b, h, n, p.v.shape[3])
    count = checkpoints(b, h, n, p.chunk) if save else 0
    states = p.state.new_zeros(count, *p.state.shape)
    maxima = p.state.new_zeros(count if p.m is not None else 0, b, h)
    state, m = p.state, p.m
    for i, (at, chunk) in enumerate(_segments(p)):
        if save:
            states[i] = state
            if m is not None:
                maxima[i] = m
        out[:, :, at], state, m = segment(_part(p, at, chunk, state, m))
    return out, state, m, states, maxima


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
    carried = torch.zeros_like(p.state) if dstate is None else dstate
    for i, (at, chunk) in reversed(list(enumerate(_segments(p)))):
        part = _part(p, at, chunk, states[i], maxima[i] if p.m is not None else None)
        seeds = [None if dout is None else dout[:, :, at].to(p.accumulate), carried]
        *found, before = autodiff.gradients(part, lambda fresh: segment(fresh)[:2], seeds, [*wants[:-1], True])
        assert before is not None
        carried = before
        for grad, new in zip(grads[:-1], found, strict=True):
            if grad is not None and new is not None:
                if grad.dim() == 1:
                    grad += new
                else:
                    grad[:, :, at] = new
    if grads[3] is not None and p.decay is not None:
        grads[3] = grads[3].to(p.decay.dtype)
    return [*grads[:-1], carried if wants[-1] else None]


def segment(p: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """A problem of a few chunks: output ``(B, H, N, Dv)`` in the accumulation dtype, final state, final ``m``."""
    b, h, tokens, d = p.q.shape
    n, e = -(-tokens // p.chunk), p.state.shape[-1]
    decay = by_token(p)
    q, k, v = (_rows(t, p) for t in (p.q, p.k, p.v))
    if p.scale != 1.0:
        q = q * p.scale
    if p.normalise:
        v = with_ones(v)
    if decay is not None and decay.dim() == 4:
        scores, prefix, suffix = Channels.apply(q, k, _rows(decay, p))
        read, write = q * prefix.exp2(), k * suffix.exp2()
        keep: Tensor | None = prefix[:, -1].exp2().view(b * h, n, d, 1)
        m, end, weights, since = None, None, None, None
    else:
        found = _decays(p, decay, n)
        weights, since, m, end = found.pairs, found.since, found.rows, found.end
        scores = _weighted(torch.bmm(q, k.mT), weights, (b, h, n))
        read, write = _scaled(q, since, (b, h, n)), _scaled(k, found.until, (b, h, n))
        keep = None if found.keep is None else found.keep.expand(b, h, n).reshape(b * h, n, 1, 1)
    start = p.state.reshape(b * h, d, e)
    if p.beta is None:
        update = torch.bmm(write.mT, v).view(b * h, n, d, e)
        states, state = Carry.apply(keep, update, start)
    else:
        beta = _rows(p.beta[..., None], p)
        system = _weighted(torch.bmm(k * beta, k.mT), weights, (b, h, n))
        right = torch.cat([v * beta, _scaled(k * beta, since, (b, h, n))], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        v, erase = solved.split([e, d], -1)
        mix = torch.bmm(write.mT, erase).neg().view(b * h, n, d, d)
        same = torch.eye(d, dtype=q.dtype, device=q.device)
        mix = mix + (same if keep is None else keep * same)
        states, state = Mix.apply(mix, torch.bmm(write.mT, v).view(b * h, n, d, e), start)
        v = torch.baddbmm(v, erase, states.flatten(0, 1), alpha=-1)
    total = torch.baddbmm(torch.bmm(scores, v), read, states.flatten(0, 1))
    out = divide(total.view(b, h, n, p.chunk, e), p.normalise, m)
    return out.flatten(2, 3)[:, :, :tokens], state.view(b, h, d, e), end


@dataclass(slots=True)
class _Decays:
    """Weights by which tokens and states are seen; each broadcasts over ``(B, H, n)`` chunks, None stands for 1."""

    pairs: Tensor | None = None  # (..., C, C): a token at another; 0 above the diagonal
    since: Tensor | None = None  # (..., C): the state before the chunk at a token
    until: Tensor | None = None  # (..., C): a token at the end of the chunk
    keep: Tensor | None = None  # (...): the state before the chunk at its end
    rows: Tensor | None = None  # (..., C): the log by which a token's sums are divided, with a gate
    end: Tensor | None = None  # (B, H): m after the last chunk, with a gate


def _decays(p: Problem, decay: Tensor | None, n: int) -> _Decays:
    """Decays per head or per token, with or without an input gate."""
    tokens, c = p.q.shape[2], p.chunk
    if decay is None:
        if p.gate is None:
            return _Decays()
        decay = p.state.new_zeros(1)
    if decay.dim() == 1:
        decay = decay[None, :, None].expand(1, -1, c if tokens % c == 0 else tokens)
    g = F.pad(decay, (0, -decay.shape[-1] % c)).unflatten(-1, (-1, c))
    if p.gate is None or p.m is None:
        prefix, suffix = _sums(g)
        pairs, _ = Pairs.apply(g, None, None)
        return _Decays(pairs, prefix.exp(), suffix.exp(), prefix[..., -1].exp())
    gate = F.pad(p.gate.to(p.accumulate), (0, -tokens % c), value=-torch.inf).unflatten(-1, (-1, c))
    g = g.expand(gate.shape)
    prefix, suffix = _sums(g)
    reach, whole = suffix + gate, prefix[..., -1]
    maxima = [p.m]
    for total, peak in zip(whole.detach().unbind(-1), reach.detach().amax(-1).unbind(-1), strict=True):
        maxima.append(torch.maximum(total + maxima[-1], peak))
    before, after = torch.stack(maxima[:-1], -1), finite(torch.stack(maxima[1:], -1))
    since = prefix + before[..., None]
    pairs, rows = Pairs.apply(g, gate, since.detach())
    return _Decays(
        pairs,
        (since - rows).exp(),
        (reach - after[..., None]).exp(),
        (whole + before - after).exp(),
        rows,
        maxima[-1],
    )


def _sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Inclusive prefix and exclusive suffix sums over the last dimension."""
    return g.cumsum(-1), F.pad(g.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))


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


def _scaled(t: Tensor, weights: Tensor | None, lead: tuple[int, int, int]) -> Tensor:
    """Rows of ``(R, C, W)`` times weights."""
    return t if weights is None else (t.unflatten(0, lead) * weights[..., None]).flatten(0, 2)


def _rows(t: Tensor, p: Problem) -> Tensor:
    """``(B, H|Hkv, N, W)`` as chunks of every query head, ``(B * H * n, C, W)``, zeros behind the last token."""
    b, h, tokens, _ = p.q.shape
    t = t.to(p.accumulate)
    if t.shape[1] != h:  # of one segment only: never of the whole sequence
        t = t[:, :, None].expand(b, t.shape[1], h // t.shape[1], tokens, t.shape[3]).flatten(1, 2)
    if tokens % p.chunk:
        t = F.pad(t, (0, 0, 0, -tokens % p.chunk))
    return t.reshape(-1, p.chunk, t.shape[3])


def _segment_tokens(batch: int, heads: int, chunk: int) -> int:
    return chunk * (1 + (_ROWS - 1) // (torch.sym_max(batch * heads, 1) * chunk))


def _segments(p: Problem) -> Iterator[tuple[slice, int]]:
    """Tokens of each segment and its chunk: whole chunks together, what is left over in a chunk of its own."""
    b, h, n, _ = p.q.shape
    if not b * h:
        return
    size, whole = _segment_tokens(b, h, p.chunk), n - n % p.chunk
    for start in range(0, whole, size):
        yield slice(start, min(start + size, whole)), p.chunk
    if n > whole:
        yield slice(whole, n), 1 << (n - whole - 1).bit_length()


def _part(p: Problem, at: slice, chunk: int, state: Tensor, m: Tensor | None) -> Problem:
    """The problem of some tokens."""
    decay = p.decay if p.decay is None or p.decay.dim() == 1 else p.decay[:, :, at]
    beta, gate = (None if t is None else t[:, :, at] for t in (p.beta, p.gate))
    starts = None if p.starts is None else p.starts[:, at]
    q, k, v = (t[:, :, at] for t in (p.q, p.k, p.v))
    return replace(p, q=q, k=k, v=v, decay=decay, beta=beta, gate=gate, state=state, m=m, starts=starts, chunk=chunk)
