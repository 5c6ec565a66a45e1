"""Coordinates cut into tiles, and the coarse-to-fine search for EMPTY, PARTIAL and FULL pairs of tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .runs import Array

if TYPE_CHECKING:
    from .base import Mask

FACTOR = 4  # how much coarser the next level is, per side
TOP = 64  # the coarsest level has at most this many boxes per side
SAMPLES = 4  # values of a coordinate within a tile that still count as few (their bits fit a uint16)
CHUNK = 1 << 16  # boxes split at a time
Boxes = dict[str, tuple[Array, Array]]


def cut(values: Array, block: int) -> Array:
    """Views ``(n,)`` values as ``(tiles, block)``; a short last tile repeats its last value."""
    rest = -len(values) % block
    if rest:
        values = np.concatenate([values, np.full(rest, values[-1], dtype=values.dtype)])
    return values.reshape(-1, block)


class TiledSide:
    """The queries, or the keys, of one build: named coordinates per tile and their boxes at every level.

    Attributes:
        n: Tokens.
        block: Tokens per tile.
        tiles: Number of tiles.
        coords: ``(tiles, block)`` per name.
        visible: uint8 ``(tiles, ceil(block / 8))`` bits of real tokens; ``None`` when all are.
        patterns: Number of the way in which each tile is padded, 0 for not at all; ``None`` without padding.
    """

    def __init__(self, coords: Mapping[str, Array], n: int, block: int) -> None:
        self.n, self.block, self.tiles = n, block, -(-n // block)
        self.coords = {name: cut(np.asarray(values).reshape(n), block) for name, values in coords.items()}
        self.levels: list[Boxes] = [{name: (c.min(1), c.max(1)) for name, c in self.coords.items()}]
        self.real_levels: list[tuple[Array, Array]] = []
        self.patterns: Array | None = None
        self.visible: Array | None = self._bits(np.ones(n, dtype=bool)) if n % block else None
        self._shapes: dict[str, Array] = {}
        self._changes: dict[str, tuple[Array, Array]] = {}

    def lengths(self, tile: Array) -> Array:
        """How many tokens of each tile exist."""
        return np.minimum(self.n - tile * self.block, self.block)

    def deepen(self, depth: int) -> None:
        """Adds coarser boxes until there are ``depth`` levels."""
        while len(self.levels) < depth:
            finer = self.levels[-1]
            self.levels.append(
                {name: (cut(lo, FACTOR).min(1), cut(hi, FACTOR).max(1)) for name, (lo, hi) in finer.items()}
            )
        while self.real_levels and len(self.real_levels) < depth:
            some, every = self.real_levels[-1]
            self.real_levels.append((cut(some, FACTOR).max(1), cut(every, FACTOR).min(1)))

    def _bits(self, real: Array) -> Array:
        whole = np.zeros(self.tiles * self.block, dtype=bool)
        whole[: self.n] = real
        return np.packbits(whole.reshape(self.tiles, self.block), axis=-1, bitorder="little")

    def with_padding(self, real: Array, patterns: dict[bytes, int]) -> TiledSide:
        """The same side with some keys padded away; ``patterns`` numbers the ways to pad a tile."""
        side = object.__new__(TiledSide)
        side.__dict__.update(self.__dict__)
        side.visible = self._bits(real)
        found = np.bitwise_count(side.visible).sum(1)
        some, every = found > 0, found == self.lengths(np.arange(self.tiles))
        side.real_levels = [(some, every)]
        side.deepen(len(self.levels))
        side.patterns = np.zeros(self.tiles, dtype=np.int64)
        for tile in np.flatnonzero(some & ~every):
            side.patterns[tile] = patterns.setdefault(side.visible[tile].tobytes(), len(patterns) + 1)
        return side

    def boxes(self, level: int, at: Array) -> Boxes:
        """The boxes of the given tiles of one level."""
        return {name: (lo[at], hi[at]) for name, (lo, hi) in self.levels[level].items()}

    def shapes(self, name: str) -> Array:
        """Numbers tiles by their values relative to the first one: equal numbers are equal up to a shift."""
        if name not in self._shapes:
            self._shapes[name] = _shape_numbers(self.coords[name], self.n % self.block != 0)
        return self._shapes[name]

    def changes(self, name: str) -> tuple[Array, Array]:
        """Where in each tile the first few values begin, and which tiles have no more than these."""
        if name not in self._changes:
            tiles = self.coords[name]
            new = np.ones(tiles.shape, dtype=bool)
            np.not_equal(tiles[:, 1:], tiles[:, :-1], out=new[:, 1:])
            rank = np.cumsum(new, axis=1, dtype=np.int32)
            at = np.stack([np.argmax(rank == n, axis=1) for n in range(1, SAMPLES + 1)], 1)
            self._changes[name] = at, rank[:, -1] <= SAMPLES
        return self._changes[name]


def _shape_numbers(tiles: Array, ragged: bool) -> Array:
    """Numbers tiles by shape, found by hash and confirmed value by value; most often all have the first one's."""
    tiles = np.ascontiguousarray(tiles, dtype=np.int64)
    origin = tiles[:, 0].copy()
    number = np.zeros(len(tiles), dtype=np.int64)
    whole = len(tiles) - ragged
    if not _confirmed(tiles[:whole], origin[:whole], number[:whole]):
        weights = odd_weights(tiles.shape[1])
        code = np.einsum("tb,b->t", tiles.view(np.uint64), weights) - origin.view(np.uint64) * weights.sum()
        _, head, number = np.unique(code, return_index=True, return_inverse=True)
        if not _confirmed(tiles, origin, head[number]):
            number = np.unique(tiles - origin[:, None], axis=0, return_inverse=True)[1].reshape(-1)
    if ragged:
        number[-1] = number.max() + 1
    return number


def _confirmed(tiles: Array, origin: Array, like: Array) -> bool:
    """Whether every tile has the shape of tile ``like``."""
    for lo in range(0, len(tiles), 512):
        part = slice(lo, lo + 512)
        other = like[part][:1] if (like[part] == like[lo]).all() else like[part]
        shape = tiles[other] - origin[other, None]
        if not (tiles[part] - origin[part, None] == shape).all():
            return False
    return True


def odd_weights(n: int) -> Array:
    """Fixed odd uint64 weights: their dot product with a mixed vector is its hash."""
    return np.random.default_rng(0x5EED).integers(0, 1 << 63, size=n, dtype=np.uint64) | np.uint64(1)


def mixed(words: Array) -> Array:
    """Unsigned numbers, one to one, so that equal differences of high bits do not cancel in a sum."""
    return words ^ (words >> (29 if words.dtype == np.uint64 else 3))


def classify(mask: Mask, q: TiledSide, k: TiledSide, level: int, i: Array, j: Array) -> tuple[Array, Array]:
    """``(may, must)`` for pairs of boxes of one level, padding included."""
    may, must = mask.classify(q.boxes(level, i), k.boxes(level, j))
    may, must = np.broadcast_to(may, i.shape), np.broadcast_to(must, i.shape)
    if k.real_levels:
        some, every = k.real_levels[level]
        may, must = may & some[j], must & every[j]
    return may, must


def refine(mask: Mask, q: TiledSide, k: TiledSide, limit: int) -> tuple[list[tuple[int, Array, Array]], Array, Array]:
    """Sorts all tile pairs, splitting only boxes that are PARTIAL.

    Args:
        mask: A scalar mask.
        q: Query side.
        k: Key side.
        limit: The most PARTIAL tiles to accept.

    Returns:
        The FULL boxes as ``(level, i, j)``, and the PARTIAL tiles ``i, j`` of the finest level.

    Raises:
        ValueError: If more than ``limit`` tiles are PARTIAL.
    """
    depth = 1
    while -(-max(q.tiles, k.tiles) // FACTOR ** (depth - 1)) > TOP:
        depth += 1
    q.deepen(depth)
    k.deepen(depth)
    sizes = [(-(-q.tiles // FACTOR**level), -(-k.tiles // FACTOR**level)) for level in range(depth)]
    i, j = (a.reshape(-1) for a in np.indices(sizes[-1]))
    full: list[tuple[int, Array, Array]] = []
    for level in range(depth - 1, -1, -1):
        parts, found = [], 0
        step = CHUNK if level < depth - 1 else len(i)
        for lo in range(0, len(i), max(step, 1)):
            ci, cj = i[lo : lo + step], j[lo : lo + step]
            if level < depth - 1:
                ci, cj = _children(ci, cj, sizes[level])
            may, must = classify(mask, q, k, level, ci, cj)
            if must.any():
                full.append((level, ci[must], cj[must]))
            partial = may & ~must
            parts.append((ci[partial], cj[partial]))
            found += len(parts[-1][0])
            if level == 0 and found > limit:
                raise ValueError(too_many(mask, q, k, limit))
        i = np.concatenate([p[0] for p in parts]) if parts else i[:0]
        j = np.concatenate([p[1] for p in parts]) if parts else j[:0]
    return full, i, j


def _children(i: Array, j: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    step = np.arange(FACTOR)
    i, j = np.broadcast_arrays(i[:, None, None] * FACTOR + step[:, None], j[:, None, None] * FACTOR + step)
    i, j = i.reshape(-1), j.reshape(-1)
    inside = (i < size[0]) & (j < size[1])
    return (i, j) if inside.all() else (i[inside], j[inside])


def full_rows(full: list[tuple[int, Array, Array]], q: TiledSide, k: TiledSide) -> tuple[Array, Array, Array]:
    """Spreads FULL boxes over the rows they cover: ``(row, first, count)``."""
    rows, firsts, counts = [], [], []
    for level, i, j in full:
        scale = FACTOR**level
        order = np.argsort(i * (k.tiles + 1) + j)
        i, j = i[order], j[order]
        opens = np.ones(len(i), dtype=bool)
        opens[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1] + 1)
        heads = np.flatnonzero(opens)
        length = np.diff(np.append(heads, len(i)))
        i, j = i[heads], j[heads]
        row = (i[:, None] * scale + np.arange(scale)).reshape(-1)
        first = np.repeat(j * scale, scale)
        count = np.minimum(np.repeat((j + length) * scale, scale), k.tiles) - first
        inside = row < q.tiles
        rows.append(row[inside])
        firsts.append(first[inside])
        counts.append(count[inside])
    if not rows:
        return (np.zeros(0, dtype=np.int64),) * 3
    return np.concatenate(rows), np.concatenate(firsts), np.concatenate(counts)


def too_many(mask: Mask, q: TiledSide, k: TiledSide, limit: int) -> str:
    """The refusal of a mask that would cost its area."""
    tile = (q.block, k.block)
    return (
        f"mask: {mask.text!r} over {q.n} x {k.n} tokens leaves more than {limit} tiles of {tile} to look at "
        "one by one; it has no coarse structure (scrambled positions, a predicate, or a fine pattern). "
        "Order the tokens by position, write the pattern with masks that classify boxes, or split the call"
    )
