"""Exact evaluation of PARTIAL tiles: equal tiles are looked at once, unique bitmaps are kept once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .pyramid import TiledSide, mixed, odd_weights, too_many
from .runs import Array
from .tilekeys import tile_keys, unique_rows

if TYPE_CHECKING:
    from .base import Mask

Coords = dict[str, Array]
PARTS = 8  # pieces per side of a tile that are told apart before looking at pairs
FEW = 32  # tiles that are not worth splitting
GROUP = 256  # tiles evaluated, packed and compared together
WORKING_SET = 1 << 17  # pairs in flight: their int32 temporaries stay in an L2 cache
KEY_CHUNK = 1 << 18  # tiles whose keys are in memory together


def pack(tiles: Array) -> Array:
    """Packs bool ``(n, BM, BN)`` into uint8 ``(n, BM, ceil(BN / 8))``, first key in the lowest bit."""
    if tiles.shape[-1] % 8 == 0:
        return np.packbits(tiles.reshape(-1), bitorder="little").reshape(*tiles.shape[:-1], -1)
    return np.packbits(tiles, axis=-1, bitorder="little")


def unpack(bits: Array, width: int) -> Array:
    """Inverse of :func:`pack`."""
    return np.unpackbits(bits, axis=-1, count=width, bitorder="little").view(bool)


class TileTable:
    """Unique bit-packed tiles, numbered from 1; 0 is a tile that is all visible, -1 a hidden one."""

    def __init__(self, tile: tuple[int, int]) -> None:
        self.tile = tile
        self._ids: dict[bytes, int] = {}
        width = tile[0] * (-(-tile[1] // 8))
        self._wide = width % 8 == 0
        self._weights = odd_weights(width // 8 if self._wide else width)

    def add(self, packed: Array, area: Array) -> Array:
        """Ids of packed tiles ``(n, BM, nb)``; ``area`` is how many pairs each has in range."""
        if not len(packed):
            return np.zeros(0, dtype=np.int64)
        flat = np.ascontiguousarray(packed).reshape(len(packed), -1)
        words = flat.view(np.uint64) if self._wide else flat
        bits = np.bitwise_count(words).sum(1, dtype=np.int64)
        code = np.einsum("tb,b->t", mixed(words), self._weights)
        _, head, number = np.unique(code, return_index=True, return_inverse=True)
        if not np.array_equal(words, words[head[number]] if len(head) > 1 else np.broadcast_to(words[0], words.shape)):
            _, head, number = np.unique(flat, axis=0, return_index=True, return_inverse=True)
            number = number.reshape(-1)
        ids = np.where(bits == 0, -1, np.where(bits == area, 0, 1))
        new = np.flatnonzero(ids == 1)
        final = np.zeros(len(head), dtype=np.int64)
        used = np.unique(number[new])
        for n in used[np.argsort(head[used])]:
            final[n] = self._ids.setdefault(flat[head[n]].tobytes(), len(self._ids) + 1)
        ids[new] = final[number[new]]
        return ids

    def stack(self) -> Array:
        """All bitmaps, uint8 ``(U, BM, ceil(BN / 8))``."""
        shape = (len(self._ids), self.tile[0], -(-self.tile[1] // 8))
        return np.frombuffer(b"".join(self._ids), dtype=np.uint8).reshape(shape).copy()


class Work(NamedTuple):
    """What deciding the PARTIAL tiles of one mask took."""

    ids: Array
    evaluated: int


def tile_ids(
    mask: Mask,
    q: TiledSide,
    k: TiledSide,
    at: tuple[Array, Array],
    table: TileTable,
    *,
    keyed: bool,
    budget: int,
) -> Work:
    """Ids of PARTIAL tiles, each distinct key evaluated once.

    Args:
        mask: A scalar mask.
        q: Query side.
        k: Key side.
        at: Query tile and key tile of each pair.
        table: Where bitmaps are numbered.
        keyed: False to look at every tile even where the mask has keys.
        budget: The most tiles to evaluate.

    Returns:
        One id per pair, and how many tiles were evaluated.

    Raises:
        ValueError: If more than ``budget`` tiles are distinct.
    """
    i, j = at
    if not keyed:
        return Work(evaluate(mask, q, k, i, j, table), len(i))
    out = np.empty(len(i), dtype=np.int64)
    known: dict[bytes, int] = {}
    evaluated = 0
    for lo in range(0, len(i), KEY_CHUNK):
        part = np.arange(lo, min(lo + KEY_CHUNK, len(i)))
        columns, lonely = tile_keys(mask, q, k, i[part], j[part])
        alone = part[lonely]
        if len(alone):
            part, columns = part[~lonely], [column[~lonely] for column in columns]
        head, number = unique_rows(columns)
        names = [row.tobytes() for row in np.stack([column[head] for column in columns], 1)]
        fresh = np.array([n for n, name in enumerate(names) if name not in known], dtype=np.int64)
        distinct = len(alone) + len(fresh)
        evaluated += distinct
        rest = distinct * (len(i) - lo - KEY_CHUNK) / KEY_CHUNK if 2 * distinct > KEY_CHUNK else 0
        if evaluated + rest > budget:
            raise ValueError(too_many(mask, q, k, budget))
        out[alone] = evaluate(mask, q, k, i[alone], j[alone], table)
        at_fresh = part[head[fresh]]
        ids = evaluate(mask, q, k, i[at_fresh], j[at_fresh], table)
        known.update((names[n], int(id)) for n, id in zip(fresh, ids, strict=True))
        out[part] = np.array([known[name] for name in names], dtype=np.int64)[number]
    return Work(out, evaluated)


def evaluate(mask: Mask, q: TiledSide, k: TiledSide, i: Array, j: Array, table: TileTable) -> Array:
    """Ids of tiles by asking the mask about every pair, a cache-sized piece at a time."""
    out = np.empty(len(i), dtype=np.int64)
    ours = all(type(leaf).__module__.startswith(f"{__package__}.") for leaf in mask.leaves())
    dtype: type = np.int32 if ours else np.int64  # rules of this library add and compare; others may multiply
    for lo in range(0, len(i), GROUP):
        part = slice(lo, lo + GROUP)
        ti, tj = i[part], j[part]
        size = (len(ti), q.block, k.block)
        try:
            packed = _bits(mask, _gather(q, ti, dtype), _gather(k, tj, dtype), size)
        except OverflowError:  # a number inside the mask that int32 cannot hold
            dtype = np.int64
            packed = _bits(mask, _gather(q, ti, dtype), _gather(k, tj, dtype), size)
        short = q.lengths(ti) < q.block
        if short.any():
            packed[short, q.n % q.block :] = 0
        if k.visible is not None:
            packed &= k.visible[tj][:, None, :]
        out[part] = table.add(packed, q.lengths(ti) * k.lengths(tj))
    return out


def _gather(side: TiledSide, tiles: Array, dtype: type) -> Coords:
    """Coordinates ``(n, block)`` of some tiles, int64 where differences might not fit."""
    out = {}
    for name, values in side.coords.items():
        lo, hi = side.levels[-1][name]
        small = lo.min() > -(1 << 30) and hi.max() < 1 << 30
        out[name] = values[tiles].astype(dtype if small else np.int64, copy=False)
    return out


def _bits(mask: Mask, q: Coords, k: Coords, size: tuple[int, int, int]) -> Array:
    """Packed bits of ``n`` tiles of ``size = (n, BM, BN)``, as if all tokens were there.

    Many tiles are first classified in PARTS x PARTS pieces each, and only the PARTIAL ones looked at, when that
    leaves less than half.
    """
    n, bm, bn = size
    if n < FEW or bm % PARTS or bn // PARTS not in (8, 16, 32, 64) or bn % PARTS:
        return _plain(mask, q, k, size)
    high, wide = bm // PARTS, bn // PARTS
    part_q = {name: c.reshape(n, PARTS, high) for name, c in q.items()}
    part_k = {name: c.reshape(n, PARTS, wide) for name, c in k.items()}
    may, must = mask.classify(
        {name: (c.min(-1)[:, :, None], c.max(-1)[:, :, None]) for name, c in part_q.items()},
        {name: (c.min(-1)[:, None, :], c.max(-1)[:, None, :]) for name, c in part_k.items()},
    )
    may, must = np.broadcast_to(may, (n, PARTS, PARTS)), np.broadcast_to(must, (n, PARTS, PARTS))
    tile, row, column = np.nonzero(may & ~must)
    if 2 * len(tile) > n * PARTS * PARTS:
        return _plain(mask, q, k, size)
    word = np.dtype(f"u{wide // 8}")
    words = np.repeat((must * word.type(np.iinfo(word).max)).reshape(-1, PARTS), high, axis=0)
    words = words.reshape(n, PARTS, high, PARTS)
    found = _abreast(
        mask,
        {name: c[tile, row] for name, c in part_q.items()},
        {name: c[tile, column] for name, c in part_k.items()},
        (len(tile), high, wide),
    )
    words.transpose(0, 1, 3, 2)[tile, row, column] = found.view(word)[:, :, 0]
    return words.reshape(n, bm, PARTS).view(np.uint8)


def _plain(mask: Mask, q: Coords, k: Coords, size: tuple[int, int, int]) -> Array:
    """Packed bits, some tiles at a time."""
    n, bm, bn = size
    packed = np.empty((n, bm, -(-bn // 8)), dtype=np.uint8)
    step = max(1, WORKING_SET // (bm * bn))
    for lo in range(0, n, step):
        part = slice(lo, min(lo + step, n))
        there = {name: c[part, :, None] for name, c in q.items()}
        here = {name: c[part, None, :] for name, c in k.items()}
        allowed = np.asarray(mask.allows(there, here), dtype=bool)
        packed[part] = pack(np.broadcast_to(allowed, (part.stop - lo, bm, bn)))
    return packed


def _abreast(mask: Mask, q: Coords, k: Coords, size: tuple[int, int, int]) -> Array:
    """Packed bits, some rows of all tiles at a time: tiles along the last axis make the loops long."""
    n, bm, bn = size
    packed = np.empty((n, bm, bn // 8), dtype=np.uint8)
    there = {name: np.ascontiguousarray(c.T)[:, None, :] for name, c in q.items()}
    here = {name: np.ascontiguousarray(c.T)[None, :, :] for name, c in k.items()}
    step = max(1, WORKING_SET // max(n * bn, 1))
    for lo in range(0, bm if n else 0, step):
        part = slice(lo, min(lo + step, bm))
        allowed = np.asarray(mask.allows({name: c[part] for name, c in there.items()}, here), dtype=bool)
        byte = np.broadcast_to(allowed, (part.stop - lo, bn, n)).view(np.uint8).reshape(-1, bn // 8, 8, n)
        out = byte[:, :, 7].copy()
        for bit in range(6, -1, -1):
            out += out
            out |= byte[:, :, bit]
        packed[:, part] = out.transpose(2, 0, 1)
    return packed
