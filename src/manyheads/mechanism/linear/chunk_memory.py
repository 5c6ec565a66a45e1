"""A delta-rule memory that takes back what some chunks wrote: one branch of NAtS-L."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.engine import scan as engine
from manyheads.engine.scan import State

from .chunks import Chunks


class MemoryState(NamedTuple):
    """What the memory branch remembers, in float32 (float64 for float64).

    Attributes:
        start: (B, H, D, Dv) the memory before the current chunk.
        now: (B, H, D, Dv) the memory after the last token, which the current chunk may still lose.
        decay: (B, H) log decay of the current chunk so far.
    """

    start: Tensor
    now: Tensor
    decay: Tensor


def empty(k: Tensor, v: Tensor) -> MemoryState:
    """The state before the first token, for keys (B, H, [N,] D) and values (B, H, [N,] Dv)."""
    wide = torch.promote_types(k.dtype, torch.float32)
    zero = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=wide)
    return MemoryState(zero, zero, k.new_zeros(k.shape[:2], dtype=wide))


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    types: Tensor,
    chunks: Chunks,
    state: MemoryState,
    *,
    fade: bool,
    both: bool,
    backend: str,
) -> tuple[Tensor, MemoryState]:
    r"""Reads the memory at every token.

    A chunk maps the memory before it, $S$, to $A S + W$ behind it, and its t-th output is $\tilde q_t^\top S + w_t$:
    one call of the scan engine for all chunks side by side finds $A$ and $\tilde q$ (from the identity, without
    values) along with $W$ and $w$ (from nothing). What remains is a chain over chunks, where the type decides between
    $A S + W$ and the memory that only faded.

    Args:
        q, k, v: (B, H, N, D), (B, H, N, D), (B, H, N, Dv); queries are scaled.
        decay, beta: (B, H, N) or None.
        types: (B, H, M) 1.0 for chunks whose writes are taken back, else 0.0.
        chunks: Where tokens lie.
        state: What came before.
        fade: Whether chunks whose writes are taken back still fade the memory.
        both: Whether types learn where nothing was written, too.
        backend: Of the scan engine.

    Returns:
        (B, H, N, Dv) in the dtype of ``v``, and the state after the last token.
    """
    wide, (width, out_width) = state.now.dtype, state.now.shape[2:]

    def side_by_side(x: Tensor) -> Tensor:
        return chunks.split(x.to(wide)).flatten(1, 2)  # chunks as heads

    queries, keys, values = side_by_side(q), side_by_side(k), side_by_side(v)
    unit = torch.eye(width, dtype=wide, device=q.device).expand(*queries.shape[:2], -1, -1)
    found = engine.scan(
        queries,
        keys,
        torch.cat([values, torch.zeros_like(keys)], -1),
        decay=None if decay is None else side_by_side(decay),
        beta=None if beta is None else side_by_side(beta),
        state=State(torch.cat([unit.new_zeros(*unit.shape[:3], out_width), unit], -1)),
        return_state=True,
        chunk=chunks.size,
        backend=backend,
    )
    assert isinstance(found, tuple)
    outs, ends = (t.unflatten(1, (-1, chunks.count)) for t in (found[0], found[1].S))
    (own, passed), (writes, maps) = (t.split([out_width, width], -1) for t in (outs, ends))
    whole = outs.new_zeros(outs.shape[:3]) if decay is None else chunks.split(decay.to(wide)).sum(-1)
    starts, state = _chain(maps, writes, whole, _gate(types, both), chunks, state, fade)
    return chunks.join(own + passed @ starts).to(v.dtype), state


def _chain(
    maps: Tensor, writes: Tensor, decay: Tensor, write: Tensor, chunks: Chunks, state: MemoryState, fade: bool
) -> tuple[Tensor, MemoryState]:
    """The memory before each chunk, (B, H, M, D, Dv), and the state after the last.

    A chunk whose writes stay with weight w turns S into ``(w A + (1 - w) f) S + w W``, f what it fades by.
    """
    factor = decay.exp() if fade else torch.ones_like(decay)
    idle = torch.diag_embed(factor[..., None].expand(*factor.shape, maps.shape[-1]))
    moves, gains = torch.lerp(idle, maps, write[..., None, None].to(maps.dtype)), write[..., None, None] * writes
    fresh = None if chunks.document is None else (chunks.rank == 0)[..., None, None, None]
    now, starts, last = state.now, [], chunks.count - 1
    for c in range(chunks.count):
        now = now if fresh is None else torch.where(fresh[:, c], 0.0, now)
        starts.append(now)
        if c == last and (chunks.offset + chunks.tokens) % chunks.size:
            after = maps[:, :, c] @ now + writes[:, :, c]
            begun = (state.start, state.decay) if c == 0 else (now, torch.zeros_like(state.decay))
            return torch.stack(starts, 2), MemoryState(begun[0], after, begun[1] + decay[:, :, c])
        if c == 0 and chunks.offset:  # what is taken back began before this call
            after = maps[:, :, c] @ now + writes[:, :, c]
            kept = (state.decay + decay[:, :, c]).exp()[..., None, None] * state.start if fade else state.start
            now = kept + write[:, :, c, None, None] * (after - kept)
        else:
            now = moves[:, :, c] @ now + gains[:, :, c]
    return torch.stack(starts, 2), MemoryState(now, now, torch.zeros_like(state.decay))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MemoryState,
    decay: Tensor | None,
    beta: Tensor | None,
    types: Tensor | None,
    *,
    fade: bool,
) -> tuple[Tensor, MemoryState]:
    """One token: updates the memory and reads it; where it completes a chunk, the type decides what stays.

    Args:
        q, k, v: (B, H, D), (B, H, D), (B, H, Dv); the query is scaled.
        state: What came before.
        decay, beta: (B, H) or None.
        types: (B, H) of the chunk, when the token completes it; else None.
        fade: As in :func:`read`.

    Returns:
        (B, H, Dv) in the dtype of ``v``, and the new state.
    """
    wide = state.now.dtype
    g, b = (None if t is None else t.to(wide) for t in (decay, beta))
    out, after = engine.step(q.to(wide), k.to(wide), v.to(wide), State(state.now), decay=g, beta=b)
    total = state.decay if g is None else state.decay + g
    if types is None:
        return out.to(v.dtype), MemoryState(state.start, after.S, total)
    kept = total.exp()[..., None, None] * state.start if fade else state.start
    now = kept + (1 - (types > 0.5).to(wide))[..., None, None] * (after.S - kept)
    return out.to(v.dtype), MemoryState(now, now, torch.zeros_like(total))


def _gate(types: Tensor, both: bool) -> Tensor:
    """What multiplies the writes: 1 where they stay, else 0, with the gradient that is asked for."""
    hard = types.detach() <= 0.5
    soft = types.detach() - types  # 0, with the gradient of one less the type
    return hard.to(types.dtype) + (soft if both else torch.where(hard, soft, 0.0))
