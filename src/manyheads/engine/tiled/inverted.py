"""Chosen key tiles on a CPU, key tiles outermost: each is met by all the queries that chose it (FSA, 2025).

The queries of a key tile, with all the heads that share their choice, are rows of one product with it, so that no key
is copied for each query. What a query gets from its tiles are partial results, gathered and merged at the end; in the
backward the gradients of keys and values are whole at once, and those of the queries are such partial results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from ..scratch import Scratch, borrowed
from . import products
from .lists import Chunk, Part, lists_of
from .problem import Grads, Problem

_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_SCORES = 1 << 18  # scores that a thread holds at a time


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of a plain problem whose layout has padded ids."""
    fused = p.q.dtype.itemsize == 2 and not p.wide and products.fused_wins(p.q.dtype)
    side = _Side(p, p.q.dtype if fused else p.accumulate)
    dv, each, place = p.v.shape[3], side.each, side.lists.place
    width = max(p.q.shape[3], dv) if fused else dv
    queries = side.rows(p.q if fused else p.q.to(side.dtype) * p.scale)
    keys, values = side.tiles(p.k), side.tiles(p.v)
    out = p.q.new_empty(len(place), each, width, dtype=p.accumulate)
    lse = p.q.new_empty(len(place), each, dtype=p.accumulate)
    with borrowed() as scratch:
        for chunk in side.lists.chunks:
            partial = side.buffer(scratch, "partial", chunk, width)
            top, total = (side.buffer(scratch, name, chunk, 1) for name in ("top", "total"))
            top[-1] = -math.inf
            for some, part, source in side.calls(chunk):
                q = side.taken(scratch, "queries", queries, source, part)
                k, v = (side.taken(scratch, n, t, part.tiles, part) for n, t in (("keys", keys), ("values", values)))
                taken, hidden = (q, k, v), side.hidden(chunk, some, part)
                at = [t[some].view(*q.shape[:2], -1) for t in (partial, top, total)]
                if fused:
                    _by_fused_kernel(taken, hidden, p.scale, at)
                else:
                    _by_products(scratch, taken, hidden, at)
            found = _merged(partial, top[..., 0], total[..., 0], place[chunk.rows])
            out[chunk.rows], lse[chunk.rows] = found
    out, lse = side.whole(out[..., :dv]), side.whole(lse[..., None])[..., 0]
    if p.sink is not None:
        wider = torch.logaddexp(lse, p.sink.to(lse.dtype)[:, None])
        out, lse = out * torch.exp(lse - wider)[..., None], wider
    return out.to(p.result(p.v.dtype)), lse


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients from the saved output and log-normaliser, in the accumulation dtype up to the last cast."""
    if p.sink is not None and out.dtype.itemsize == 2:  # its gradient adds whole rows up: rounding would not cancel
        out = forward(replace(p, wide=True))[0]
    delta = (dout.double() * out).sum(-1)
    delta = delta if dlse is None else delta - dlse
    dsink = None
    if p.sink is not None:
        dsink = -(torch.exp(p.sink.double()[:, None] - lse) * delta).sum((0, 2)).to(p.sink.dtype)
    side = _Side(p, p.accumulate)
    stats = [lse.masked_fill(lse == -math.inf, 0.0), delta]
    given = [p.q.to(side.dtype) * p.scale, dout, *(t[..., None] for t in stats)]
    rows = [side.rows(t) for t in given]
    keys, values = side.tiles(p.k), side.tiles(p.v)
    d, place = p.q.shape[3], side.lists.place
    dq = p.q.new_empty(len(place), side.each, d, dtype=side.dtype)
    dk, dv = (torch.zeros_like(t) for t in (keys, values))
    with borrowed() as scratch:
        for chunk in side.lists.chunks:
            partial = side.buffer(scratch, "partial", chunk, d)
            for some, part, source in side.calls(chunk):
                names = ("queries", "douts", "lses", "deltas")
                q, do, ls, de = (side.taken(scratch, *t, source, part) for t in zip(names, rows, strict=True))
                k, v = (side.taken(scratch, n, t, part.tiles, part) for n, t in (("keys", keys), ("values", values)))
                weights, ds = (scratch(name, (*q.shape[:2], k.shape[1]), q) for name in ("weights", "ds"))
                hidden = side.hidden(chunk, some, part)
                _scores(q, k, hidden, weights).sub_(ls).exp_()
                torch.bmm(do, v.mT, out=ds).sub_(de).mul_(weights)
                torch.bmm(ds, k, out=partial[some].view(q.shape))
                dk.index_add_(0, part.tiles, torch.bmm(ds.mT, q).flatten(1))
                dv.index_add_(0, part.tiles, torch.bmm(weights.mT, do).flatten(1))
            dq[chunk.rows] = _sums(partial, place[chunk.rows], None)
    whole = side.whole(dq).mul_(p.scale), _untiled(dk, p.k), _untiled(dv, p.v)
    gq, gk, gv = (g.to(p.result(t.dtype)) for g, t in zip(whole, (p.q, p.k, p.v), strict=True))
    return Grads(gq, gk, gv, dsink)


# --- one call on a part -------------------------------------------------------------------------------------------


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, out: Tensor) -> Tensor:
    torch.bmm(q, k.mT, out=out)
    return out if hidden is None else out.add_(hidden)


def _by_products(
    scratch: Scratch, taken: tuple[Tensor, Tensor, Tensor], hidden: Tensor | None, at: list[Tensor]
) -> None:
    """Writes averages over one key tile times their normaliser, the highest scores and the normalisers."""
    q, k, v = taken
    partial, top, total = at
    s = _scores(q, k, hidden, scratch("weights", (*q.shape[:2], k.shape[1]), q))
    torch.amax(s, -1, keepdim=True, out=top)
    s.sub_(top if hidden is None else top.masked_fill(top == -math.inf, 0.0)).exp_()
    torch.sum(s, -1, keepdim=True, out=total)
    torch.bmm(s, v, out=partial)


def _by_fused_kernel(
    taken: tuple[Tensor, Tensor, Tensor], hidden: Tensor | None, scale: float, at: list[Tensor]
) -> None:
    """The same with normalised averages, their log-normaliser in the place of the highest score, and ones."""
    partial, top, total = at
    width = partial.shape[2]
    q, k, v = (t[:, None] if t.shape[2] == width else pad(t, (0, width - t.shape[2]))[:, None] for t in taken)
    mask = None if hidden is None else hidden[:, None]
    out, lse = _fused(q, k, v, 0.0, False, attn_mask=mask, scale=scale)  # type: ignore[misc]
    partial.copy_(out[:, 0])
    if hidden is not None:
        lse = lse.masked_fill((hidden == -math.inf).all(-1)[:, None], -math.inf)
    top.copy_(lse[:, 0, :, None])
    total.fill_(1.0)


def _merged(partial: Tensor, top: Tensor, total: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``(rows, each, width)`` and log-normaliser of some rows from their partial results."""
    if not place.shape[1]:
        return partial.new_zeros(len(place), *partial.shape[1:]), top.new_full((len(place), top.shape[1]), -math.inf)
    top = top[place]
    best = top.amax(1)
    weights = top.sub_(best.masked_fill(best == -math.inf, 0.0)[:, None]).exp_()
    norm = (weights * total[place]).sum(1)
    weights /= norm.masked_fill(norm == 0, 1.0)[:, None]
    return _sums(partial, place, weights.transpose(1, 2)), best + norm.log()


def _sums(partial: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """The partial results of every row, weighted and added: ``(rows, each, width)``."""
    rows, slots, each, width = *place.shape, *partial.shape[1:]
    if not slots:
        return partial.new_zeros(rows, each, width)
    at = (place[:, None] * each + torch.arange(each, dtype=place.dtype)[:, None]).view(-1, slots)
    weights = None if weights is None else weights.reshape(-1, slots)
    return embedding_bag(at, partial.view(-1, width), per_sample_weights=weights, mode="sum").view(rows, each, width)


# --- operands by rows and tiles -----------------------------------------------------------------------------------


class _Side:
    """A problem by key tile: its lists, and its tensors as rows and tiles."""

    def __init__(self, p: Problem, dtype: torch.dtype) -> None:
        self.p, self.tile, self.grid, self.dtype = p, p.layout.tile, p.layout.grid, dtype
        self.lists = lists_of(p.layout, p.q.shape[0], p.q.shape[1], p.k.shape[1], max(p.q.shape[3], p.v.shape[3]))
        self.each = self.tile[0] * self.lists.heads  # rows of a product for each entry
        self.additive = torch.zeros(self.lists.masks.shape, dtype=dtype).masked_fill_(self.lists.masks, -math.inf)

    def rows(self, t: Tensor) -> Tensor:
        """Queries ``(B, H, Nq, X)`` as ``(rows + 1, each * X)``, heads of a query side by side; zeros at last."""
        filled = pad(t, (0, 0, 0, -t.shape[2] % self.tile[0]))
        split = filled.reshape(-1, self.lists.heads, self.grid[0], self.tile[0], t.shape[3]).permute(0, 2, 3, 1, 4)
        out = t.new_zeros(len(self.lists.place) + 1, self.each * t.shape[3], dtype=self.dtype)
        out[:-1].view(split.shape).copy_(split)
        return out

    def whole(self, t: Tensor) -> Tensor:
        """Rows ``(rows, each, X)`` as ``(B, H, Nq, X)`` again."""
        split = t.reshape(-1, self.grid[0], self.tile[0], self.lists.heads, t.shape[-1]).permute(0, 3, 1, 2, 4)
        return split.reshape(*self.p.q.shape[:2], -1, t.shape[-1])[:, :, : self.p.q.shape[2]]

    def tiles(self, t: Tensor) -> Tensor:
        """Keys or values ``(B, G, Nk, X)`` as tiles ``(B * G * Tk, BN * X)``, the last one filled with zeros."""
        filled = pad(t.to(self.dtype), (0, 0, 0, -t.shape[2] % self.tile[1]))
        return filled.contiguous().view(-1, self.tile[1] * t.shape[3])

    def calls(self, chunk: Chunk) -> Iterator[tuple[slice, Part, Tensor]]:
        """Parts of a chunk in pieces whose scores stay in cache: their entries, themselves, the entries' rows."""
        for part in chunk.parts:
            step = max(1, _SCORES * torch.get_num_threads() // (part.size * self.each * self.tile[1]))
            for at in range(0, len(part.tiles), step):
                tiles, first = part.tiles[at : at + step], part.first + at * part.size
                some = slice(first, first + len(tiles) * part.size)
                yield some, part._replace(tiles=tiles), self.lists.source[chunk.entries][some]

    def buffer(self, scratch: Scratch, name: str, chunk: Chunk, width: int) -> Tensor:
        """Room for a result of each entry of a chunk, ``(entries + 1, each, width)``, the last one zero."""
        shape = (chunk.entries.stop - chunk.entries.start + 1, self.each, width)
        found = scratch(name, shape, self.p.q, self.p.accumulate)
        found[-1] = 0
        return found

    def taken(self, scratch: Scratch, name: str, t: Tensor, at: Tensor, part: Part) -> Tensor:
        """Some rows or tiles of each piece of a part: ``(pieces, rows | BN, X)``."""
        found = torch.index_select(t, 0, at, out=scratch(name, (len(at), t.shape[1]), t))
        own = self.tile[1] if at is part.tiles else part.size * self.each
        return found.view(len(part.tiles), own, -1)

    def hidden(self, chunk: Chunk, some: slice, part: Part) -> Tensor | None:
        """The additive mask ``(pieces, rows, BN)`` of a part."""
        if not part.masked:
            return None
        masks = self.additive[self.lists.mask[chunk.entries][some]]
        if self.lists.heads > 1:
            masks = masks.repeat_interleave(self.lists.heads, 1)
        return masks.view(len(part.tiles), -1, self.tile[1])


def _untiled(t: Tensor, like: Tensor) -> Tensor:
    return t.view(*like.shape[:2], -1, like.shape[3])[:, :, : like.shape[2]]
