"""Which tiles a skip threshold keeps, found before anything is averaged; what is left is a plain block-sparse call.

A tile is skipped when no row's best score in it comes within ``-log(threshold)`` of that row's best score so far. Where
torch's fused kernel is the fastest way to average, tiles cannot be dropped inside it, so they are decided first:

1. One row of each query tile is scored exactly against all keys. A tile that this row needs is kept, whatever the
   other rows say; with a threshold at which nothing can be skipped, this is all that happens.
2. For the tiles still open, the best score of every row is taken from bfloat16 products rounded to bfloat16, keys
   outermost: the cheapest way to maxima. Two more columns of the product lift each row so that whatever could be
   needed is positive, where the bits of bfloat16 are ordered like those of 16-bit integers, whose maximum is ten times
   as fast. Bounds of the rounding decide most tiles. Where tiles that step 1 kept are left out, the best score so far
   is known from below only: that can prove a tile skipped, never kept.
3. What lies between the bounds is decided by scoring those rows exactly.

The result is the rule itself, not an approximation of it, in every dtype: wider inputs only widen the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask.evaluate import unpack
from ...mask.ids import index_of, settle
from ...mask.layout import TileLayout
from ...mask.runs import expand
from ..scratch import borrowed
from . import flash, products
from .problem import Problem

_CHUNK = 1 << 20  # exact scores in memory together
_KEYS = 1024  # keys of one rounded product
_MASK_BYTES = 64 << 20  # bitmaps written out
_ROUNDING = 2.0**-8  # of a bfloat16 result, twice over,
_CANCELLED = 2.0**-16  # and of the float32 terms that it sums
_FEW = 4  # open tiles are scored alone where they are fewer than one in so many
_ROUNDS = 2  # exact rows tried for a tile before all tiles of its row are scored


def serves(p: Problem) -> bool:
    """Whether a problem skips tiles that can be decided here: softmax scores with nothing but a scale, on a CPU."""
    if not p.skip_threshold or p.scale <= 0 or p.q.device.type != "cpu" or not replace(p, skip_threshold=0.0).plain:
        return False
    return len(p.layout.bits) * p.layout.tile[0] * p.layout.tile[1] <= _MASK_BYTES


def narrowed(p: Problem) -> Problem:
    """The problem on the tiles that it keeps, without a threshold.

    Args:
        p: A problem that :func:`serves`.

    Returns:
        A problem of the same result.
    """
    return replace(p, layout=kept_layout(p), skip_threshold=0.0)


def whole(p: Problem) -> tuple[Tensor, Tensor] | None:
    """Output and log-normaliser in one call of the fused kernel, where every pair or every earlier one is visible."""
    causal = _shape_of(p.layout)
    if causal is None or p.sink is not None or p.skip_threshold or p.q.shape[3] != p.v.shape[3]:
        return None
    out, lse = flash.whole(p.q, p.k, p.v, causal, p.scale)
    return out.to(p.result(p.v.dtype)), lse


def kept_layout(p: Problem) -> TileLayout:
    """The layout of the tiles that a problem keeps: its own where that is all of them."""
    return only(p.layout, kept_tiles(p, _tile_ids(p.layout)))


def only(layout: TileLayout, kept: Tensor) -> TileLayout:
    """Some tiles of a layout.

    Args:
        layout: On the CPU.
        kept: bool ``(B, Hq, Tq, Tk)``, True for visited tiles only.

    Returns:
        Them with their bitmaps; the same layout where that is all of them.
    """
    tiles, sets = _tile_ids(layout), layout.index.expand(kept.shape[:2]).long()
    if torch.equal(kept, (tiles >= 0)[sets]):
        return layout
    ids, counts, masks = settle(torch.where(kept, torch.arange(kept.shape[3], dtype=torch.int32), -1), tiles[sets])
    most = max(1, int(counts.max()))
    return replace(
        layout,
        index=index_of(kept.shape[:2], 1),
        ids=ids[..., :most].contiguous(),
        ids_count=counts,
        ids_mask=masks[..., :most].clamp(min=0).contiguous(),
        batch=kept.shape[0],
        heads=kept.shape[1],
    )


def gaps(q: Tensor, k: Tensor, layout: TileLayout, scale: float) -> Tensor:
    """How far each tile's best score lies below the best one so far, in the row where that is least.

    A threshold skips the tiles whose gap is below its logarithm; so one pass tells what every threshold would skip.

    Args:
        q: ``(B, Hq, Nq, D)``.
        k: ``(B, Hkv, Nk, D)``.
        layout: The tiles of a call, visited in the order of their keys.
        scale: Multiplies the products.

    Returns:
        ``(B, Hq, Tq, Tk)`` in float32 (float64 for float64), at most 0; ``-inf`` for tiles that nobody sees, and NaN
        for tiles that are not visited.
    """
    (bm, bn), (batch, heads), group = layout.tile, q.shape[:2], q.shape[1] // max(1, k.shape[1])
    tiles, masks = _tile_ids(layout).to(q.device), _hidden_pairs(layout).to(q.device)
    sets, tail = layout.index.expand(batch, heads).tolist(), k.shape[2] % bn
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = q.new_full((batch, heads, *layout.grid), math.nan, dtype=wide)
    for b, h, row in np.ndindex(batch, heads, layout.grid[0]):
        ids = tiles[sets[b][h], row]
        at = (ids >= 0).nonzero()[:, 0]
        if not len(at):
            continue
        keys = pad(k[b, h // group], (0, 0, 0, -k.shape[2] % bn)).unflatten(0, (-1, bn))[at].flatten(0, 1)
        s = products.scores(q[b, h, row * bm : (row + 1) * bm][None], keys[None])[0].unflatten(1, (-1, bn)) * scale
        if tail and int(at[-1]) == layout.grid[1] - 1:
            s[:, -1, tail:] = -math.inf
        for x in (ids[at] > 0).nonzero()[:, 0].tolist():
            s[:, x].masked_fill_(masks[int(ids[at[x]]) - 1, : len(s)], -math.inf)
        top = s.amax(-1)
        found[b, h, row, at] = (top - top.cummax(-1).values).nan_to_num(nan=-math.inf).amax(0)
    return found


def kept_tiles(p: Problem, tiles: Tensor | None = None) -> Tensor:
    """Which tiles are kept: bool ``(B, Hq, Tq, Tk)``.

    Args:
        p: A problem with a threshold.
        tiles: The tile ids of its layout, when known.
    """
    tiles = _tile_ids(p.layout) if tiles is None else tiles
    kept = torch.zeros(*p.q.shape[:2], *p.layout.grid, dtype=torch.bool)
    for b, heads, group in _groups(p, tiles, _hidden_pairs(p.layout)):
        kept[b, heads] = group.decide()
    return kept


def _groups(p: Problem, tiles: Tensor, masks: Tensor) -> Iterator[tuple[int, slice, _Group]]:
    """Every batch entry and key head with what there is to decide; none where there are no pairs."""
    sets = p.layout.index.expand(p.q.shape[:2]).long()
    for b in range(p.q.shape[0] if p.q.shape[2] and p.k.shape[2] else 0):
        for g in range(p.k.shape[1]):
            heads = slice(g * p.group, (g + 1) * p.group)
            yield b, heads, _Group(p, b, g, tiles[sets[b, heads]], masks)


class _Open(NamedTuple):
    """Tiles of one row of query tiles that are not decided, and which rows may need them.

    ``margin`` is ``(tiles, G, rows)``, ``-inf`` for the rows that do not; ``all`` says that every tile was scored.
    """

    tile_row: int
    tiles: Tensor
    margin: Tensor
    all: bool


class _Group:
    """The query heads of one key head."""

    def __init__(self, p: Problem, b: int, g: int, tiles: Tensor, masks: Tensor) -> None:
        group = p.group
        self.bm, self.bn = p.layout.tile
        self.q = p.q[b, g * group : (g + 1) * group]
        self.tail = p.k.shape[2] % self.bn
        self.keys = pad(p.k[b, g], (0, 0, 0, -p.k.shape[2] % self.bn)).unflatten(0, (-1, self.bn))
        self.scale, self.floor = p.scale, math.log(p.skip_threshold)
        self.tiles, self.masks = tiles, masks  # (G, Tq, Tk); hidden pairs (U, BM, BN)
        self.kept = torch.zeros_like(tiles, dtype=torch.bool)
        self.open = tiles >= 0

    def decide(self) -> Tensor:
        """Kept tiles ``(G, Tq, Tk)``."""
        heads, rows = self.tiles.shape[:2]
        self.certify()
        if not self.open.any():
            return self.kept
        self.lifted = pad(self.keys.to(torch.bfloat16), (0, 2), value=1.0)
        self.reach = float(self.keys.float().norm(dim=-1).amax())
        step = max(1, (1 << 24) // (self.tiles.shape[2] * heads * self.bm))
        for start in range(0, rows, step):
            todo = self.open[:, start : start + step].any(0).any(-1).nonzero()[:, 0] + start
            left = self._rounds([self._screen(r, False) for r in todo.tolist()], _ROUNDS)
            self._rounds([o if o.all else self._screen(o.tile_row, True) for o in left], self.bm)
        return self.kept

    def certify(self) -> bool:
        """Keeps what the last query of each tile needs; whether nothing is left open."""
        heads, rows = self.tiles.shape[:2]
        last = (torch.arange(1, rows + 1) * self.bm).clamp(max=self.q.shape[1]) - 1
        self._settle_exactly(torch.arange(heads).repeat(rows), last.repeat_interleave(heads))
        return not self.open.any()

    def _screen(self, row: int, everything: bool) -> _Open:
        """Decides what bounds can decide about the open tiles of one row of query tiles."""
        need, visited = self.open[:, row].any(0), (self.tiles[:, row] >= 0).any(0)
        everything = everything or bool(need.sum() * _FEW > visited.sum())
        need[int(visited.int().argmax())] = True  # the first tile: the best score so far
        at = (visited if everything else need).nonzero()[:, 0]
        top, slack = self._tops(row, at)
        best, floor = _running(top), self.floor / self.scale
        before = best - best.abs().nan_to_num_(posinf=0.0).mul_(_ROUNDING) - slack
        spread = top.abs().nan_to_num_(posinf=0.0).mul_(_ROUNDING) + slack
        here = self.open[:, row, at]
        if everything:
            after = best + best.abs().nan_to_num_(posinf=0.0).mul_(_ROUNDING) + slack
            sure = (top - spread - after >= floor).any(-1).T & here
            self.kept[:, row, at] |= sure
            here &= ~sure
        margin = top + spread - before
        maybe = (margin >= floor) & here.T[..., None]
        here = maybe.any(-1).T
        self.open[:, row, at] = here
        some = here.any(0)
        return _Open(row, at[some], margin.masked_fill_(~maybe, -math.inf)[some], everything)

    def _rounds(self, found: list[_Open], most: int) -> list[_Open]:
        """Scores the most promising row of each open tile exactly, until none is open or ``most`` times."""
        for _ in range(most):
            found = [o for o in found if len(o.tiles)]
            if not found:
                return []
            places = []
            for o in found:
                best, row = o.margin.max(-1)
                tile, head = (best > -math.inf).nonzero(as_tuple=True)
                places.append(torch.stack([head, row[tile, head] + o.tile_row * self.bm]).unique(dim=1))
            self._settle_exactly(*torch.cat(places, 1))
            found = [self._without(o, place) for o, place in zip(found, places, strict=True)]
        return [o for o in found if len(o.tiles)]

    def _without(self, o: _Open, done: Tensor) -> _Open:
        """What is left when some rows have been scored: tiles that no other row may need are skipped."""
        margin = o.margin
        margin[:, done[0], done[1] - o.tile_row * self.bm] = -math.inf
        here = self.open[:, o.tile_row, o.tiles]
        still = here & (margin > -math.inf).any(-1).T
        self.open[:, o.tile_row, o.tiles] = still
        margin.masked_fill_(~still.T[..., None], -math.inf)
        some = still.any(0)
        return _Open(o.tile_row, o.tiles[some], margin[some], o.all)

    def _settle_exactly(self, h: Tensor, i: Tensor) -> None:
        """Keeps the open tiles that some rows need, found from their exact scores."""
        near = self._near(h, i)
        row = i // self.bm
        needed = torch.zeros_like(self.kept)
        flat = needed.view(-1, needed.shape[2])
        flat.index_add_(0, h * needed.shape[1] + row, near)
        needed &= self.open
        self.kept |= needed
        self.open &= ~needed

    def _near(self, h: Tensor, i: Tensor) -> Tensor:
        """Which tiles some rows need: bool ``(R, Tk)``."""
        out = torch.zeros(len(h), len(self.keys), dtype=torch.bool)
        step = max(1, _CHUNK // (len(self.keys) * self.bn))
        for start in range(0, len(h), step):
            part = slice(start, start + step)
            tiles = self.tiles[h[part], i[part] // self.bm]
            if not (tiles >= 0).any():
                continue
            n = int((tiles >= 0).any(0).nonzero().amax()) + 1
            tiles, keys = tiles[:, :n], self.keys[:n].flatten(0, 1)
            s = products.scores(self.q[h[part], i[part]][None], keys[None])[0].view(-1, n, self.bn)
            if self.tail and n == len(self.keys):
                s[:, -1, self.tail :] = -math.inf
            r, t = (tiles > 0).nonzero(as_tuple=True)
            s[r, t] = s[r, t].masked_fill_(self.masks[tiles[r, t].long() - 1, i[part][r] % self.bm], -math.inf)
            top = s.amax(-1).masked_fill_(tiles < 0, -math.inf).mul_(self.scale)
            out[part, :n] = (top - top.cummax(-1).values >= self.floor) & (top > -math.inf)
        return out

    def _tops(self, row: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Best products of every row in some tiles, lifted row by row, ``(n, G, rows)``; and by how much they may err.

        What is negative after lifting cannot be needed and is ``-inf``.
        """
        q0 = row * self.bm
        q = self.q[:, q0 : q0 + self.bm].to(torch.bfloat16)
        heads, m = q.shape[:2]
        first = self._hidden(torch.matmul(self.lifted[at[:1], :, :-2].flatten(0, 1), q.flatten(0, 1).T), row, at[:1])
        seen = first.amax(1)[0].float()
        length = q.float().norm(dim=-1) * self.reach
        slack = _CANCELLED * (2 * length - self.floor / self.scale)
        if self.q.dtype != torch.bfloat16:
            slack += 1.01 * _ROUNDING * length  # of the inputs
        lift = 2 * slack - self.floor / self.scale - (seen - seen.abs() * _ROUNDING)
        lift = torch.where(seen == -math.inf, length + 2 * slack, lift)
        coarse = lift.to(q.dtype)
        lifted = torch.cat([q, torch.stack([coarse, (lift - coarse).to(q.dtype)], -1)], -1).flatten(0, 1).T
        parts = at.split(max(1, _KEYS // self.bn))
        found = torch.empty(len(at), heads, m, dtype=torch.int16)
        with borrowed() as scratch:
            for some, top in zip(parts, found.split(len(parts[0])), strict=True):
                span = slice(int(some[0]), int(some[-1]) + 1)
                keys = self.lifted[span if span.stop - span.start == len(some) else some].flatten(0, 1)
                s = torch.mm(keys, lifted, out=scratch("products", (len(keys), lifted.shape[1]), keys))
                torch.amax(self._hidden(s, row, some).view(torch.int16), 1, out=top)
        return found.view(torch.bfloat16).float().masked_fill_(found < 0, -math.inf), slack

    def _hidden(self, s: Tensor, row: int, at: Tensor) -> Tensor:
        """Products of keys and queries as ``(n, BN, G, rows)``, ``-inf`` where a pair is hidden."""
        heads = len(self.tiles)
        s = s.view(len(at), self.bn, heads, -1)
        if self.tail and int(at[-1]) == len(self.keys) - 1:
            s[-1, self.tail :] = -math.inf
        tiles = self.tiles[:, row, at]
        if bool(tiles.any()):
            for h, x in (tiles != 0).nonzero().tolist():
                hidden = self.masks[int(tiles[h, x]) - 1, : s.shape[3]].T if tiles[h, x] > 0 else True
                s[x, :, h] = s[x, :, h].masked_fill(torch.as_tensor(hidden), -math.inf)
        return s


def _running(x: Tensor) -> Tensor:
    """The largest so far along the first dimension, by doubling steps."""
    step = 1
    while step < len(x):
        x = torch.cat([x[:step], torch.maximum(x[step:], x[:-step])])
        step *= 2
    return x


def _hidden_pairs(layout: TileLayout) -> Tensor:
    """Its bitmaps written out: bool ``(U, BM, BN)``, True where a pair is hidden."""
    return torch.from_numpy(~unpack(layout.bits.cpu().numpy(), layout.tile[1]))


def _tile_ids(layout: TileLayout) -> Tensor:
    """The id of every tile of every row set, int32 ``(S, Tq, Tk)``; -1 where it is not visited. Kept once made."""
    known: Tensor | None = layout.__dict__.get("_tile_ids")
    if known is None:
        runs = layout.runs
        found = np.full((len(runs.start) - 1) * runs.width, -1, dtype=np.int32)
        column, owner = expand(runs.first, runs.count)
        found[runs.row[owner] * runs.width + column] = runs.id[owner]
        known = layout.__dict__["_tile_ids"] = torch.from_numpy(found).view(-1, *layout.grid)
    return known


def _shape_of(layout: TileLayout) -> bool | None:
    """Whether a layout is causal over equally many queries and keys (True), everything (False), or else (None)."""
    if "_shape" not in layout.__dict__:
        one, n = layout.ids is None and layout.sets == 1, layout.nq
        pairs = layout.pairs // max(1, layout.batch * layout.heads) if one else -1
        found = False if pairs == n * layout.nk else None
        if n == layout.nk and pairs == n * (n + 1) // 2 and _sees_nothing_later(layout):
            found = True
        layout.__dict__["_shape"] = found
    shape: bool | None = layout.__dict__["_shape"]
    return shape


def _sees_nothing_later(layout: TileLayout) -> bool:
    bm, bn = layout.tile
    tiles, hidden = _tile_ids(layout)[0], _hidden_pairs(layout)
    row, column = (tiles >= 0).nonzero(as_tuple=True)
    later = ((column + 1) * bn).clamp(max=layout.nk) - 1 > row * bm
    kinds = torch.stack([tiles[row, column].long(), column * bn - row * bm])[:, later].unique(dim=1)
    for id, ahead in kinds.T.tolist():
        beyond = torch.arange(bn) + ahead > torch.arange(bm)[:, None]
        if not id or not (hidden[id - 1] | ~beyond).all():
            return False
    return True
