"""Chosen key tiles on a CPU: rows of query tiles that visit equally many are one batch of torch's fused kernel.

The tiles of a row are copied side by side, so that a row is one dense call however scattered its keys are, and the
query heads that share a choice are rows of one product. Tiles with bitmaps go in a call of their own and are merged
while the rows are still in cache: a mask slows every key of its call down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask.layout import TileLayout
from ..scratch import Scratch, borrowed
from .lists import ids_of

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

_GATHERED = 8 << 20  # bytes of keys and values that are copied side by side at a time
_MASKS = 64 << 20  # bytes of tile masks written out
_LEAST = 32  # queries of a tile (with the heads that share it) and keys of a tile from which rows are worth a call


class Part(NamedTuple):
    """Rows of query tiles with equally many tiles of each kind.

    Attributes:
        list, row: int64 ``(R,)``: which list of ids each row is in, and which row of query tiles it is.
        free: int64 ``(R, c)``: tiles without a bitmap, numbered over the key tiles of all key heads.
        masked: int64 ``(R, m)``: the others.
        mask: int64 ``(R, m)``: which tile mask they have.
    """

    list: Tensor
    row: Tensor
    free: Tensor
    masked: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Rows:
    """A layout of padded ids, sorted for one number of batch entries and heads.

    Attributes:
        heads: Query heads that share each list.
        parts: Every row of every list once.
        masks: bool ``(U, BM, BN)``, True where a pair is hidden.
    """

    heads: int
    parts: tuple[Part, ...]
    masks: Tensor


def rows_of(layout: TileLayout, batch: int, heads: int, kv_heads: int) -> Rows | None:
    """The rows of a layout as this way of computing takes them; None where it cannot or does not pay.

    Args:
        layout: Any layout.
        batch: Batch entries of the call.
        heads: Its query heads.
        kv_heads: Its key heads.

    Returns:
        The rows, kept with the layout.
    """
    if layout.ids is None or not layout.ids.numel() or layout.ids.device.type != "cpu":
        return None
    bm, bn = layout.tile
    if min(bn, 2 * bm) < _LEAST or (len(layout.bits) + 1) * bm * bn > _MASKS:
        return None
    known = layout.__dict__.setdefault("_chosen", {})
    key = batch, heads, kv_heads
    if key not in known:
        known[key] = _sorted(layout, batch, heads, kv_heads)
    rows: Rows = known[key]
    return rows if bm * rows.heads >= _LEAST else None


def forward(
    layout: TileLayout, rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, Nq, D)`` in ``dtype`` and log-normaliser, for queries, keys and values of one width."""
    keys, values, queries = _tiles(k, layout.tile[1]), _tiles(v, layout.tile[1]), _rows(q, layout, rows)
    out = torch.empty_like(queries, dtype=dtype)
    acc = torch.promote_types(q.dtype, torch.float32)
    lse = queries.new_empty(queries.shape[:-1], dtype=acc)
    hidden = _additive(rows.masks, q.dtype), rows.masks.all(-1)
    with borrowed() as scratch:
        for part in _chunks(rows, layout, keys, values):
            at, found = _place(part), []
            own = _read(queries, at)
            if part.free.shape[1]:
                stacked = own.reshape(len(own), 1, -1, own.shape[-1])
                o, stats = _forward(  # type: ignore[misc]
                    stacked, *_taken(scratch, part.free, keys, values, k.shape[3]), 0.0, False, scale=scale
                )
                found.append((o.view(own.shape), stats.view(own.shape[:-1])))
            if part.masked.shape[1]:
                side_by_side = _taken(scratch, part.masked, keys, values, k.shape[3])
                mask, empty = _mask_of(part.mask, *hidden)
                o, stats = _forward(  # type: ignore[misc]
                    own, *(t.expand(-1, rows.heads, -1, -1) for t in side_by_side), 0.0, False, attn_mask=mask,
                    scale=scale,
                )  # fmt: skip
                found.append((o, stats.masked_fill(empty, -math.inf)))
            _write(out, lse, at, found, scratch)
    return tuple(_whole(t, q) for t in (out, lse))  # type: ignore[return-value]


def backward(
    layout: TileLayout,
    rows: Rows,
    tensors: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor],
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (in ``dtype``), keys and values (in the accumulation dtype).

    Args:
        layout: The layout.
        rows: What :func:`rows_of` made of it.
        tensors: Queries, keys and values of one width.
        saved: ``out``, ``lse`` (0 in rows that see nothing) and the gradient of ``out``.
        scale: Of the scores.
        dtype: Of the gradient of the queries.
    """
    q, k, v = tensors
    acc, width = torch.promote_types(q.dtype, torch.float32), q.shape[3]
    keys, values = (_tiles(t, layout.tile[1]) for t in (k, v))
    queries, outs, douts = (_rows(t, layout, rows) for t in (q, saved[0], saved[2]))
    lses = _rows(saved[1][..., None], layout, rows)[..., 0]
    dq = torch.zeros_like(queries, dtype=dtype)
    dk, dv = (torch.zeros_like(t, dtype=acc) for t in (keys, values))
    additive = _additive(rows.masks, q.dtype)
    with borrowed() as scratch:
        for part in _chunks(rows, layout, keys, values):
            at = _place(part)
            own = tuple(_read(t, at) for t in (douts, queries, outs, lses))
            total = queries.new_zeros(own[1].shape, dtype=acc)
            for tiles, ids in ((part.free, None), (part.masked, part.mask)):
                if not tiles.shape[1]:
                    continue
                dout, query, out, lse = own
                if ids is None:
                    dout, query, out, lse = (t.reshape(len(t), 1, -1, *t.shape[3:]) for t in own)
                mask = None if ids is None else _mask_of(ids, additive, None)[0]
                side_by_side = [
                    t.expand(-1, query.shape[1], -1, -1) for t in _taken(scratch, tiles, keys, values, width)
                ]
                grads = _backward(  # type: ignore[misc]
                    dout, query, *side_by_side, out, lse, 0.0, False, attn_mask=mask, scale=scale
                )
                total += grads[0].reshape(total.shape)
                for target, grad in ((dk, grads[1]), (dv, grads[2])):
                    target.index_add_(0, tiles.flatten(), grad.to(acc).sum(1).reshape(-1, target.shape[1]))
            _put(dq, at, total)
    whole = [t.view(*k.shape[:2], -1, width)[:, :, : k.shape[2]] for t in (dk, dv)]
    return _whole(dq, q), whole[0], whole[1]


# --- sorting, once for each layout -------------------------------------------------------------------------------


def _sorted(layout: TileLayout, batch: int, heads: int, kv_heads: int) -> Rows:
    shared, ids, mask, masks = ids_of(layout, batch, heads, kv_heads)
    ids, mask = (t.long().view(-1, layout.grid[0], t.shape[-1]) for t in (ids, mask))
    kind = torch.where(ids < 0, 2, (mask > 0).long())
    order = kind.argsort(dim=-1, stable=True)
    ids, mask = ids.gather(-1, order), mask.gather(-1, order) - 1
    ids = ids + (torch.arange(len(ids)) * shared // (heads // kv_heads) * layout.grid[1])[:, None, None]
    counts = (kind == 0).sum(-1) * (ids.shape[-1] + 1) + (kind == 1).sum(-1)
    parts = []
    for count in counts.unique(sorted=True).tolist():
        own, row = (counts == count).nonzero(as_tuple=True)
        free, masked = divmod(count, ids.shape[-1] + 1)
        both = slice(free, free + masked)
        parts.append(Part(own, row, ids[own, row, :free], ids[own, row, both], mask[own, row, both]))
    return Rows(shared, tuple(parts), masks)


def _chunks(rows: Rows, layout: TileLayout, *sides: Tensor) -> Iterator[Part]:
    """Parts of so few rows that what is copied for them stays in cache."""
    tile_bytes = sum(t.shape[1] * t.itemsize for t in sides)
    for part in rows.parts:
        most = max(part.free.shape[1], part.masked.shape[1], 1) * tile_bytes
        step = max(_GATHERED // most, torch.get_num_threads())
        for start in range(0, len(part.row), step):
            yield Part(*(t[start : start + step] for t in part))


# --- tensors as rows and tiles -----------------------------------------------------------------------------------


def _tiles(t: Tensor, size: int) -> Tensor:
    """Keys or values ``(B, G, Nk, D)`` as tiles ``(B * G * Tk, size * D)``, the last one filled with zeros."""
    filled = pad(t, (0, 0, 0, -t.shape[2] % size))
    return filled.contiguous().view(-1, size * t.shape[3])


def _rows(t: Tensor, layout: TileLayout, rows: Rows) -> Tensor:
    """Queries ``(B, H, Nq, D)`` as ``(lists, heads, rows, BM, D)``."""
    filled = pad(t, (0, 0, 0, -t.shape[2] % layout.tile[0]))
    return filled.reshape(-1, rows.heads, layout.grid[0], layout.tile[0], t.shape[3])


def _whole(t: Tensor, q: Tensor) -> Tensor:
    """Rows as ``(B, H, Nq, ...)`` again."""
    return t.reshape(*q.shape[:2], -1, *t.shape[4:])[:, :, : q.shape[2]]


def _taken(scratch: Scratch, tiles: Tensor, keys: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The keys and values of some tiles of each row, side by side: ``(R, 1, c * BN, D)``."""
    found = []
    for name, t in (("keys", keys), ("values", values)):
        taken = scratch(name, (tiles.numel(), t.shape[1]), t)
        torch.index_select(t, 0, tiles.flatten(), out=taken)
        found.append(taken.view(len(tiles), 1, -1, width))
    return found[0], found[1]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)


def _mask_of(ids: Tensor, additive: Tensor, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    """The additive masks ``(R, 1, BM, m * BN)`` of some tiles of each row, and which of its queries see none."""
    if bool((ids == ids[:1]).all()):  # the usual case: the diagonal tile of a causal mask
        ids, count = ids[:1], len(ids)
    else:
        count = -1
    mask = additive[ids].transpose(1, 2).flatten(2)[:, None].expand(count, -1, -1, -1)
    return mask, ids.new_zeros(1) if empty is None else empty[ids].all(1)[:, None]


Place = tuple[Tensor, Tensor] | tuple[int, slice]


def _place(part: Part) -> Place:
    """Where rows lie: neighbours in one list as a slice, which costs no copy."""
    first, last, n = int(part.row[0]), int(part.row[-1]), len(part.row)
    if last - first + 1 == n and int(part.list[0]) == int(part.list[-1]):
        return int(part.list[0]), slice(first, last + 1)
    return part.list, part.row


def _read(t: Tensor, at: Place) -> Tensor:
    """Rows ``(R, heads, BM, ...)`` out of ``(lists, heads, rows, BM, ...)``."""
    return t[at[0], :, at[1]].transpose(0, 1) if isinstance(at[1], slice) else t[at[0], :, at[1]]


def _put(t: Tensor, at: Place, rows: Tensor) -> None:
    if isinstance(at[1], slice):
        t[at[0], :, at[1]].copy_(rows.transpose(0, 1))
    else:
        t[at[0], :, at[1]] = rows.to(t.dtype)


def _write(out: Tensor, lse: Tensor, at: Place, found: list[tuple[Tensor, Tensor]], scratch: Scratch) -> None:
    """Puts the result of one or two calls where it belongs, merged in the accumulation dtype."""
    if not found:
        out[at[0], :, at[1]], lse[at[0], :, at[1]] = 0.0, -math.inf
        return
    (o, stats), *rest = found
    for more, more_stats in rest:
        both = torch.logaddexp(stats, more_stats)
        share = torch.exp(more_stats - both.masked_fill(both == -math.inf, 0.0))[..., None]
        wide = [scratch(name, t.shape, lse).copy_(t) for name, t in (("first", o), ("second", more))]
        o, stats = wide[0].lerp_(wide[1], share), both
    _put(out, at, o)
    _put(lse, at, stats)
