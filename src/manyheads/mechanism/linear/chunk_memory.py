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
    wide, (batch, heads), (width, out_width) = state.now.dtype, q.shape[:2], state.now.shape[2:]

    def folded(x: Tensor | None) -> Tensor | None:
        return None if x is None else chunks.split(x.to(wide)).transpose(1, 2).flatten(0, 1)

    queries, keys, values, g, b = (folded(t) for t in (q, k, v, decay, beta))
    assert queries is not None and keys is not None and values is not None
    sides = queries.shape[0]
    unit = torch.eye(width, dtype=wide, device=q.device).expand(sides, heads, -1, -1)
    found = engine.scan(
        queries,
        keys,
        torch.cat([values, torch.zeros_like(keys)], -1),
        decay=g,
        beta=b,
        state=State(torch.cat([unit.new_zeros(sides, heads, width, out_width), unit], -1)),
        return_state=True,
        chunk=chunks.size,
        backend=backend,
    )
    assert isinstance(found, tuple)
    outs, ends = (t.unflatten(0, (batch, chunks.count)).transpose(1, 2) for t in (found[0], found[1].S))
    (own, passed), (writes, maps) = (t.split([out_width, width], -1) for t in (outs, ends))
    whole = outs.new_zeros(batch, heads, chunks.count) if g is None else chunks.split(_wide(decay, wide)).sum(-1)
    starts, state = _chain(maps, writes, whole, _gate(types, both), chunks, state, fade)
    return chunks.join(own + passed @ starts).to(v.dtype), state


def _chain(
    maps: Tensor, writes: Tensor, decay: Tensor, write: Tensor, chunks: Chunks, state: MemoryState, fade: bool
) -> tuple[Tensor, MemoryState]:
    """The memory before each chunk, (B, H, M, D, Dv), and the state after the last."""
    base, now, faded, starts = state.start, state.now, state.decay, []
    fresh = None if chunks.document is None else (chunks.rank == 0)[..., None, None, None]
    for c in range(chunks.count):
        if fresh is not None:
            base, now = (torch.where(fresh[:, c], 0.0, t) for t in (base, now))
        starts.append(now)
        faded = faded + decay[:, :, c]
        after = maps[:, :, c] @ now + writes[:, :, c]
        if c == chunks.count - 1 and (chunks.offset + chunks.tokens) % chunks.size:
            return torch.stack(starts, 2), MemoryState(base, after, faded)
        kept = faded.exp()[..., None, None] * base if fade else base
        now = base = kept + write[:, :, c, None, None] * (after - kept)
        faded = torch.zeros_like(faded)
    return torch.stack(starts, 2), MemoryState(base, now, faded)


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


def _wide(t: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert t is not None
    return t.to(dtype)
