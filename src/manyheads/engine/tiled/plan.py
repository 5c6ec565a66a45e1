"""A layout read as a list of dense pieces: for each row of query tiles, which keys to fetch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...mask.layout import TileLayout


class Segment(NamedTuple):
    """A run of neighbouring keys under one tile mask, in tokens; ``mask_id`` 0 is FULL."""

    k0: int
    k1: int
    mask_id: int


class Row(NamedTuple):
    """One row of query tiles and the keys that it visits."""

    q0: int
    q1: int
    segments: tuple[Segment, ...]
    width: int


class Group(NamedTuple):
    """Batches and query heads that share a row set."""

    b: slice
    h: slice
    row_set: int


@dataclass(eq=False)
class Plan:
    """What the blocked backend derives from a layout once and reads on every call."""

    tile: tuple[int, int]
    rows: list[tuple[Row, ...]]
    index: list[list[int]]
    layout: weakref.ref[TileLayout]
    pieces: dict[int, Any] = field(default_factory=dict)
    _masks: dict[int, Tensor] = field(default_factory=dict)
    _patterns: dict[tuple[object, ...], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _last: tuple[Any, ...] = (None, None, None)
    _groups: dict[tuple[int, int, int], list[Group]] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        """Whether one row of tiles serves every batch entry and head."""
        return len(self.rows) == 1 and len(self.rows[0]) == 1

    def groups(self, batch: int, heads: int, per_kv: int) -> list[Group]:
        """The largest rectangles of batches and heads that share a row set and whole groups of key heads."""
        key = (batch, heads, per_kv)
        if key not in self._groups:
            self._groups[key] = list(_rectangles(self.index, batch, heads, per_kv))
        return self._groups[key]

    def hidden(self, mask_id: int) -> Tensor:
        """bool ``(BM, BN)``, True where a pair is not allowed."""
        if mask_id not in self._masks:
            layout = self.layout()
            assert layout is not None
            self._masks[mask_id] = ~layout.tile_mask(mask_id)
        return self._masks[mask_id]

    def pattern(self, segments: tuple[Segment, ...], rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Additive mask ``(rows, width)`` of neighbouring segments, and which rows it leaves empty (None: no row).

        Rows of a regular mask repeat the same pattern, so each distinct one is made once; a byte bound keeps
        irregular masks from hoarding memory.
        """
        if self._last[0] is segments and self._last[1] is dtype:
            return self._last[2]
        key = (tuple((s.k1 - s.k0, s.mask_id) for s in segments), rows, dtype)
        found = self._patterns.get(key)
        if found is None:
            width = sum(s.k1 - s.k0 for s in segments)
            hidden = torch.zeros(rows, width, dtype=torch.bool)
            self.hide(hidden, segments, True)
            empty = hidden.all(-1)
            additive = torch.zeros(rows, width, dtype=dtype).masked_fill_(hidden, float("-inf"))
            found = additive, empty if bool(empty.any()) else None
            if sum(t[0].nbytes for t in self._patterns.values()) > _PATTERN_BYTES:
                self._patterns.clear()
            self._patterns[key] = found
        self._last = segments, dtype, found
        return found

    def hide(self, s: Tensor, segments: tuple[Segment, ...], value: float | bool) -> None:
        """Writes ``value`` where the tile masks forbid, into ``s (..., rows, width)`` over those segments."""
        at = 0
        bn = self.tile[1]
        for k0, k1, mask_id in segments:
            if mask_id:
                hidden = self.hidden(mask_id)[: s.shape[-2]]
                for t0 in range(0, k1 - k0, bn):
                    t1 = min(t0 + bn, k1 - k0)
                    s[..., at + t0 : at + t1].masked_fill_(hidden[:, : t1 - t0], value)
            at += k1 - k0


_PATTERN_BYTES = 16 << 20
_plans: weakref.WeakKeyDictionary[TileLayout, Plan] = weakref.WeakKeyDictionary()


def plan_of(layout: TileLayout) -> Plan:
    """The plan of a layout, made once for as long as the layout lives.

    Args:
        layout: Any layout; padded ids are turned into runs first.

    Returns:
        Its plan.
    """
    plan = _plans.get(layout)
    if plan is None:
        runs = layout.to_runs() if layout.ids is not None else layout
        bm, bn = runs.tile
        rows = [tuple(_rows(runs, s, bm, bn)) for s in range(runs.rows.shape[0])]
        plan = Plan(runs.tile, rows, runs.index.tolist(), weakref.ref(runs))
        _plans[layout] = plan
        if runs is not layout:
            plan.layout = lambda: runs  # type: ignore[assignment]
    return plan


def _rows(layout: TileLayout, row_set: int, bm: int, bn: int) -> Iterator[Row]:
    for i, spans in enumerate(layout.spans(row_set)):
        segments = tuple(Segment(f * bn, min((f + c) * bn, layout.nk), m) for f, c, m in spans)
        q0 = i * bm
        yield Row(q0, min(q0 + bm, layout.nq), segments, sum(s.k1 - s.k0 for s in segments))


def _rectangles(index: list[list[int]], batch: int, heads: int, per_kv: int) -> Iterator[Group]:
    same_heads = all(len(set(line)) == 1 for line in index)
    if same_heads and len({line[0] for line in index}) == 1:
        yield Group(slice(0, batch), slice(0, heads), index[0][0])
        return
    for b in range(batch):
        line = index[b if len(index) > 1 else 0]
        at = slice(b, b + 1) if len(index) > 1 else slice(0, batch)
        h = 0
        while h < heads:
            end = heads if len(line) == 1 else h + 1
            while end < heads and len(line) > 1 and line[end] == line[h]:
                end += 1
            yield from (Group(at, part, line[h]) for part in _whole_groups(h, end, per_kv))
            h = end
        if len(index) == 1:
            return


def _whole_groups(h0: int, h1: int, per_kv: int) -> Iterator[slice]:
    """Cuts a range of query heads so that each part holds whole key heads, or stays inside one."""
    first, last = -(-h0 // per_kv) * per_kv, h1 // per_kv * per_kv
    if first >= last:
        cut = first if h0 < first < h1 else h1
        yield slice(h0, cut)
        if cut < h1:
            yield slice(cut, h1)
        return
    if h0 < first:
        yield slice(h0, first)
    yield slice(first, last)
    if last < h1:
        yield slice(last, h1)


def cheapest(
    made: Callable[[tuple[int, int]], TileLayout], nq: int, half: bool = False, backward: bool = False
) -> TileLayout:
    """The layout that the blocked backend should visit, among tiles of several sizes.

    Large tiles run faster for each pair, small ones visit fewer pairs that nobody sees: short documents and narrow
    windows want small tiles, long rows large ones.

    Args:
        made: Builds the layout of a tile size (cheap: layouts are cached).
        nq: Queries.
        half: Whether the inputs are of half precision, where products gain more from large tiles.
        backward: Whether the choice is for the gradients, which favour large tiles more.

    Returns:
        The layout of the lowest predicted cost.
    """
    if nq <= 64:
        return made((max(nq, 1) if nq <= 16 else 64, 64))
    if nq <= _TILES[0][0]:
        return made(_TILES[0])  # one row of tiles: a second call would cost more than it saves
    best: tuple[float, TileLayout] | None = None
    for size, penalty in zip(_TILES, _PENALTIES[half, backward], strict=True):
        layout = made(size)
        cost = layout.visited * size[0] * size[1] * penalty
        if best is None or cost < best[0]:
            best = cost, layout
        if layout.density * layout.nk > _LONG_ROW and layout.density < _WASTE * layout.area:
            break
    assert best is not None
    return best[1]


_TILES = ((256, 64), (128, 64), (64, 32))
_PENALTIES = {  # measured time of a visited pair for each tile, by (half precision, backward)
    (False, False): (1.0, 1.08, 1.25),
    (False, True): (1.0, 1.2, 1.4),
    (True, False): (1.0, 1.22, 1.3),
    (True, True): (1.0, 1.3, 1.5),
}
_LONG_ROW = 2048  # keys of an average row from which small tiles cannot pay,
_WASTE = 1.5  # unless large ones visit so many times the pairs that are visible (blocks chosen at random do)


def visible_rows(layout: TileLayout, rows: list[int]) -> Tensor:
    """What some queries see: bool ``(B|1, H|1, len(rows), Nk)``, without making the other rows."""
    plan = plan_of(layout)
    out = torch.zeros(*layout.index.shape, len(rows), layout.nk, dtype=torch.bool)
    for b, line in enumerate(plan.index):
        for h, row_set in enumerate(line):
            for r, i in enumerate(rows):
                for k0, k1, mask_id in plan.rows[row_set][i // plan.tile[0]].segments:
                    out[b, h, r, k0:k1] = True
                    for t0 in range(k0, k1 if mask_id else k0, plan.tile[1]):
                        t1 = min(t0 + plan.tile[1], k1)
                        out[b, h, r, t0:t1] = ~plan.hidden(mask_id)[i % plan.tile[0], : t1 - t0]
    return out


def fetch(t: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """Keys or values of some segments: a view where they are neighbours, a copy otherwise."""
    if len(segments) == 1:
        return t if segments[0].k1 - segments[0].k0 == t.shape[2] else t[:, :, segments[0].k0 : segments[0].k1]
    if all(a.k1 == b.k0 for a, b in zip(segments, segments[1:], strict=False)):
        return t[:, :, segments[0].k0 : segments[-1].k1]
    return torch.cat([t[:, :, s.k0 : s.k1] for s in segments], dim=2)


def scatter(target: Tensor, part: Tensor, segments: tuple[Segment, ...]) -> None:
    """Adds what belongs to some segments back into the full ``(b, h, Nk, X)`` tensor."""
    at = 0
    for k0, k1, _ in segments:
        target[:, :, k0:k1] += part[:, :, at : at + k1 - k0]
        at += k1 - k0


def kv_heads(h: slice, per_kv: int) -> slice:
    """The key heads that a range of query heads reads."""
    return slice(h.start // per_kv, -(-h.stop // per_kv))
