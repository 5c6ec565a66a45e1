"""Softmax attention to chosen chunks and to the own one: the other branch of NAtS-L."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.attention import attention
from manyheads.engine.merge import merge
from manyheads.engine.tiled import PerKey

from .chunks import Chunks, earlier

Part = tuple[Tensor, Tensor]


class KeptState(NamedTuple):
    """What the attention branch remembers.

    Attributes:
        keys, values: (B, H, S, D), (B, H, S, Dv) of the chunks that were kept, the first ``kept`` of every row.
        kept: int64 (B, H) tokens that were kept.
        k, v: (B, H, p, D), (B, H, p, Dv) of the current chunk, whose type is not known yet.
    """

    keys: Tensor
    values: Tensor
    kept: Tensor
    k: Tensor
    v: Tensor


def empty(k: Tensor, v: Tensor) -> KeptState:
    """The state before the first token, for keys (B, H, [N,] D) and values (B, H, [N,] Dv)."""
    keys, values = (t.new_zeros(*t.shape[:2], 0, t.shape[-1]) for t in (k, v))
    return KeptState(keys, values, torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device), keys, values)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    types: Tensor,
    chunks: Chunks,
    state: KeptState,
    *,
    both: bool,
    backend: str,
) -> tuple[Tensor, KeptState]:
    """Attends to the own chunk up to the token, to earlier chunks that are kept, and to those kept before the call.

    Args:
        q, k, v: (B, H, N, D), (B, H, N, D), (B, H, N, Dv).
        types: (B, H, M) 1.0 for chunks that are kept, else 0.0; its gradient is that of a factor of their weights.
        chunks: Where tokens lie.
        state: What came before.
        both: Whether types learn where nothing is kept, too.
        backend: As in :func:`manyheads.attention`.

    Returns:
        (B, H, N, Dv) in the dtype of ``v``, and the state after the last token.
    """
    queries, keys, values = (chunks.split(t) for t in (q, k, v))
    if chunks.offset:
        keys, values = _begun(keys, state.k), _begun(values, state.v)
    hard, nudge = types.detach() > 0.5, types - types.detach()
    parts = [_own(queries, keys, values, backend)]
    chosen = _earlier(queries, keys, values, hard, nudge, chunks, backend)
    if chosen is not None:
        parts.append(chosen)
    found = merge(*parts)
    out, lse = chunks.join(found.out), chunks.join(found.lse)
    if state.keys.shape[2]:
        out, lse = merge((out, lse), _cached(q, state, backend))
    if both and types.requires_grad:
        closed = ~hard & ~chunks.empty[:, None, :, -1]
        rest = _earlier(queries.detach(), keys.detach(), values.detach(), closed, nudge, chunks, backend)
        if rest is not None:
            out = out + _first_order(out.detach(), lse.detach(), chunks.join(rest[0]), chunks.join(rest[1]))
    return out, _after(keys, values, hard, chunks, state)


def step(q: Tensor, k: Tensor, v: Tensor, state: KeptState, types: Tensor | None) -> tuple[Tensor, KeptState]:
    """One token; where it completes a chunk, the type decides whether its keys and values are kept.

    Args:
        q, k, v: (B, H, D), (B, H, D), (B, H, Dv).
        state: What came before.
        types: (B, H) of the chunk, when the token completes it; else None.

    Returns:
        (B, H, Dv) in the dtype of ``v``, and the new state.
    """
    keys, values = (torch.cat([old, t[:, :, None]], 2) for old, t in ((state.k, k), (state.v, v)))
    query = q[:, :, None]
    parts: list[Part] = [attention(query, keys, values, return_lse=True)]
    if state.keys.shape[2]:
        parts.append(_cached(query, state, "auto"))
    out = merge(*parts).out[:, :, 0]
    if types is None:
        return out, state._replace(k=keys, v=values)
    return out, _kept(state, keys[:, :, None], values[:, :, None], (types > 0.5)[..., None])


def _begun(slots: Tensor, old: Tensor) -> Tensor:
    """Puts the begun chunk into the empty slots before the first token."""
    first = torch.cat([old, slots[:, :, 0, old.shape[2] :]], 2)
    return torch.cat([first[:, :, None], slots[:, :, 1:]], 2)


def _own(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Part:
    """Causal attention inside every chunk, all side by side."""
    folded = (t.flatten(1, 2) for t in (q, k, v))
    found = attention(*folded, mask="causal", return_lse=True, backend=backend)
    out, lse = (t.unflatten(1, q.shape[1:3]) for t in found)
    return out, lse


def _earlier(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, nudge: Tensor, chunks: Chunks, backend: str
) -> Part | None:
    """Attention to the chosen chunks before the own one; None when there are none.

    The chosen chunks of every head are moved together, so that what was not chosen costs nothing.
    """
    batch, heads, count, size = q.shape[:4]
    if count == 1:
        return None
    most = count if torch.compiler.is_compiling() else int(chosen.sum(-1).max())
    if not most:
        return None
    index = (~chosen).to(torch.int8).sort(dim=-1, stable=True).indices[..., :most]
    valid = chosen.gather(-1, index)
    mask, positions = earlier(chunks)
    here = torch.arange(count, device=q.device) if positions is None else positions[0]
    beyond = count * (count + 2)  # behind every document
    place = here.expand(batch * heads, -1) if here.dim() == 1 else here.repeat_interleave(heads, 0)
    at = place.gather(1, index.flatten(0, 1)).masked_fill(~valid.flatten(0, 1), beyond).repeat_interleave(size, 1)
    keys, values = (_moved(t, index).flatten(0, 1).flatten(1, 2)[:, None] for t in (k, v))
    bias = None
    if nudge.requires_grad:
        bias = PerKey(nudge.gather(-1, index).flatten(0, 1).repeat_interleave(size, 1)[:, None])
    queries = q.flatten(0, 1).flatten(1, 2)[:, None]
    positions = place.repeat_interleave(size, 1), at
    found = attention(
        queries, keys, values, mask=mask, positions=positions, bias=bias, return_lse=True, backend=backend
    )
    out, lse = (t[:, 0].unflatten(0, (batch, heads)).unflatten(2, (count, size)) for t in found)
    return out, lse


def _cached(q: Tensor, state: KeptState, backend: str) -> Part:
    """Attention to what was kept before the call, every head with keys of its own number."""
    most = state.keys.shape[2]
    real = torch.arange(most, device=q.device) < state.kept.flatten()[:, None]
    folded = (t.flatten(0, 1)[:, None] for t in (q, state.keys, state.values))
    found = attention(*folded, key_padding=real, return_lse=True, backend=backend)
    out, lse = (t[:, 0].unflatten(0, q.shape[:2]) for t in found)
    return out, lse


def _first_order(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """0, with the gradient of letting other keys in: by their weight, towards what they hold."""
    moved = (other_lse - lse).exp()[..., None].to(out.dtype) * (other - out)
    return moved - moved.detach()


def _after(k: Tensor, v: Tensor, hard: Tensor, chunks: Chunks, state: KeptState) -> KeptState:
    whole, left = divmod(chunks.offset + chunks.tokens, chunks.size)
    if chunks.document is not None:  # nothing continues packed documents
        return state
    begun = [t[:, :, whole, :left] if left else t[:, :, 0, :0] for t in (k, v)]
    kept = _kept(state, k[:, :, :whole], v[:, :, :whole], hard[:, :, :whole]) if whole else state
    return kept._replace(k=begun[0], v=begun[1])


def _kept(state: KeptState, k: Tensor, v: Tensor, chosen: Tensor) -> KeptState:
    """The state with more chunks (B, H, m, C, ...), those that are chosen (B, H, m), and no begun chunk."""
    size = k.shape[3]
    old = torch.arange(state.keys.shape[2], device=k.device) < state.kept[..., None]
    real = torch.cat([old, chosen.repeat_interleave(size, -1)], -1)
    count = real.sum(-1)
    most = real.shape[-1] if torch.compiler.is_compiling() else int(count.max())
    index = (~real).to(torch.int8).sort(dim=-1, stable=True).indices[..., :most]
    both = [torch.cat([a, b.flatten(2, 3)], 2) for a, b in ((state.keys, k), (state.values, v))]
    keys, values = (_moved(t, index) for t in both)
    return KeptState(keys, values, count, k[:, :, 0, :0], v[:, :, 0, :0])


def _moved(x: Tensor, index: Tensor) -> Tensor:
    """Entries of axis 2 of (B, H, n, ...) by an index (B, H, m)."""
    wanted = index.view(*index.shape, *(1,) * (x.dim() - 3)).expand(*index.shape, *x.shape[3:])
    return x.gather(2, wanted)
