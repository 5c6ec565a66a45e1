"""A plan cut into calls of a dense kernel: few, large, and without a mask wherever possible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .plan import Plan, Row, Segment

_TALL = 1024  # queries of a piece that many rows share: the fused kernel is faster for tall pieces
_SHARED = 512  # keys from which a shared piece pays for one more merge
_SPLIT = 2048  # unmasked keys of a row from which they are worth a call of their own


class Piece(NamedTuple):
    """Queries ``q0`` to ``q1`` against some keys; ``first`` says that nothing was computed for them before."""

    q0: int
    q1: int
    segments: tuple[Segment, ...]
    first: bool

    @property
    def masked(self) -> bool:
        """Whether some pair is hidden."""
        return any(s.mask_id for s in self.segments)


def pieces_of(plan: Plan, row_set: int) -> tuple[Piece, ...]:
    """Pieces that hold every visible pair of a row set once, each query's pieces in the order of ``first``.

    A row that sees nothing gets one piece without keys.
    """
    found = plan.pieces.get(row_set)
    if found is None:
        found = plan.pieces[row_set] = tuple(_cut(plan.rows[row_set], max(1, _TALL // plan.tile[0])))
    return found


def _cut(rows: tuple[Row, ...], height: int) -> Iterator[Piece]:
    for start in range(0, len(rows), height):
        bundle = rows[start : start + height]
        shared = _shared(bundle) if len(bundle) > 1 else ()
        if shared:
            yield Piece(bundle[0].q0, bundle[-1].q1, shared, True)
        for row in bundle:
            rest = _without(row.segments, shared)
            parts = _parts(rest) if rest else [] if shared else [()]
            for n, segments in enumerate(parts):
                yield Piece(row.q0, row.q1, segments, n == 0 and not shared)


def _parts(segments: tuple[Segment, ...]) -> list[tuple[Segment, ...]]:
    """Keys that need no mask apart from the rest, when there are enough of them."""
    free = tuple(s for s in segments if not s.mask_id)
    if len(free) == len(segments) or _width(free) < _SPLIT:
        return [segments]
    return [free, tuple(s for s in segments if s.mask_id)]


def _shared(rows: tuple[Row, ...]) -> tuple[Segment, ...]:
    """Keys that every row of a bundle sees whole, when there are enough of them."""
    common = [(s.k0, s.k1) for s in rows[0].segments if not s.mask_id]
    for row in rows[1:]:
        free = [(s.k0, s.k1) for s in row.segments if not s.mask_id]
        common = [(max(a, c), min(b, d)) for a, b in common for c, d in free if max(a, c) < min(b, d)]
    found = tuple(Segment(a, b, 0) for a, b in common)
    return found if _width(found) >= _SHARED else ()


def _without(segments: tuple[Segment, ...], taken: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Segments less what a shared piece holds; only unmasked segments can overlap it."""
    left = []
    for s in segments:
        k0 = s.k0
        for t in taken if not s.mask_id else ():
            if k0 < t.k1 and t.k0 < s.k1:
                if k0 < t.k0:
                    left.append(Segment(k0, t.k0, 0))
                k0 = t.k1
        if k0 < s.k1:
            left.append(Segment(k0, s.k1, s.mask_id))
    return tuple(left)


def _width(segments: tuple[Segment, ...]) -> int:
    return sum(s.k1 - s.k0 for s in segments)
