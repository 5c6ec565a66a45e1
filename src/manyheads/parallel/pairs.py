"""What one rank's queries see of every other rank's keys: exact areas and rows, from layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..mask import Mask, TileLayout
from ..mask.cache import ByteCache
from ..mask.runs import expand
from .areas import Array, key_uses
from .deal import Deal

_RANKS = 8  # ranks above which one layout is cheaper than a layout per rank
_GRAIN = 16  # smallest tile for which that holds


@dataclass(frozen=True, eq=False)
class Seen:
    """What the queries of one rank see.

    Attributes:
        area: int64 ``(world,)``: visible pairs with keys of every rank, over batch entries and heads of the mask.
        bits: uint8 ``(ceil(n / 8),)``: whether any query sees each token as a key.
    """

    area: Array
    bits: Array

    @property
    def held_bytes(self) -> int:
        """Bytes kept alive."""
        return self.area.nbytes + self.bits.nbytes


_known: ByteCache[Seen] = ByteCache(64 << 20)


def seen(mask: Mask, deal: Deal, rank: int) -> Seen:
    """What the queries of ``rank`` see; kept in a cache of 64 MiB."""

    def make() -> Seen:
        layout = mask.tiles(
            deal.counts[rank],
            deal.n,
            positions=(deal.index(rank), torch.arange(deal.n)),
            batch=mask.shape[0],
            heads=mask.shape[1],
        )
        uses = key_uses(layout)
        area = np.zeros(deal.world, dtype=np.int64)
        np.add.at(area, deal.owner.numpy(), uses)
        return Seen(area, np.packbits(uses > 0, bitorder="little"))

    return _known.get((mask, deal, rank), make)


def needed_rows(mask: Mask, deal: Deal, rank: int, source: int) -> Tensor:
    """The keys of ``source`` that some query of ``rank`` may see, in any batch entry and head.

    Args:
        mask: The mask over the whole sequence.
        deal: How tokens are dealt.
        rank: Whose queries.
        source: Whose keys.

    Returns:
        int64 ``(m,)`` ascending indices into ``deal.index(source)``; empty when nothing of it is needed.

    Example:
        >>> from manyheads.mask import Causal, Window
        >>> from manyheads.parallel.deal import contiguous
        >>> needed_rows(Causal() & Window(3), contiguous(8, 2), 1, 0)
        tensor([2, 3])
    """
    bits = np.unpackbits(seen(mask, deal, rank).bits, count=deal.n, bitorder="little")
    return torch.from_numpy(np.flatnonzero(bits[deal.index(source).numpy()]))


def pair_areas(mask: Mask, deal: Deal) -> Array:
    """Visible pairs by the rank of the query and the rank of the key, exactly.

    Args:
        mask: The mask over the whole sequence.
        deal: How tokens are dealt.

    Returns:
        int64 ``(world, world)``, over batch entries and heads of the mask.

    Example:
        >>> from manyheads.mask import Causal
        >>> from manyheads.parallel.deal import zigzag
        >>> pair_areas(Causal(), zigzag(8, 2)).tolist()
        [[10, 8], [8, 10]]
    """
    return pairs(mask, deal)[0]


def pairs(mask: Mask, deal: Deal) -> tuple[Array, Array]:
    """`pair_areas`, and how many keys of each rank the queries of each rank need: both int64 ``(world, world)``."""
    if deal.world > _RANKS and mask.shape == (1, 1) and _grain(deal) >= _GRAIN:
        return coarse(mask, deal)
    owner = deal.owner.numpy()
    found = [seen(mask, deal, rank) for rank in range(deal.world)]
    rows = [
        np.bincount(owner[np.unpackbits(part.bits, count=deal.n, bitorder="little") > 0], minlength=deal.world)
        for part in found
    ]
    return np.stack([part.area for part in found]), np.stack(rows)


def coarse(mask: Mask, deal: Deal) -> tuple[Array, Array]:
    """`pairs` for very many ranks: one layout with tiles that divide chunks, and one walk over its runs.

    Args:
        mask: A mask that is the same for all batch entries and heads.
        deal: How tokens are dealt.

    Returns:
        Areas and needed rows, as in `pairs`.

    Raises:
        ValueError: A mask that differs between batch entries or heads.
    """
    if mask.shape != (1, 1):
        raise ValueError(f"mask: expected one for all batch entries and heads, got shape {mask.shape}")
    tile, world = _grain(deal), deal.world
    layout = mask.tiles(deal.n, deal.n, tile=(tile, tile))
    walk = _Walk(layout, deal.owner[::tile].numpy(), world)
    rows_of = np.argsort(walk.owner, kind="stable")
    bounds = np.searchsorted(walk.owner[rows_of], np.arange(world + 1))
    found = [walk.of(rows_of[bounds[rank] : bounds[rank + 1]]) for rank in range(world)]
    return np.stack([area for area, _ in found]), np.stack([rows for _, rows in found])


class _Walk:
    """The runs of a layout and what their tiles hold, to be summed over the tile rows of a rank."""

    def __init__(self, layout: TileLayout, owner: Array, world: int) -> None:
        self.runs, self.owner, self.world = layout.runs, owner, world
        self.tiles = layout.grid[0]
        self.length = np.full(self.tiles, layout.tile[0])
        self.length[-1] = layout.nq - (self.tiles - 1) * layout.tile[0]
        self.jump, self.total = np.zeros(self.tiles + 1), np.empty(self.tiles)
        bits = layout.bits.cpu().numpy()
        self.pairs = np.append(0, np.bitwise_count(bits).sum((1, 2), dtype=np.int64))
        self.any = np.concatenate([np.zeros_like(bits[:1, 0]), np.bitwise_or.reduce(bits, 1)]) if len(bits) else bits

    def of(self, tile_rows: Array) -> tuple[Array, Array]:
        """Areas and needed rows of the queries in some tile rows, by the rank of the key."""
        runs = self.runs
        at, row = expand(runs.start[tile_rows], runs.start[tile_rows + 1] - runs.start[tile_rows])
        first, count, id, high = runs.first[at], runs.count[at], runs.id[at], self.length[tile_rows[row]]
        full = id == 0
        area, rows, covered = self._of_full(first[full], count[full], high[full])
        column, which = expand(first[~full], count[~full])
        ids = id[~full][which]
        area += self._by_owner(column, self.pairs[ids])
        left = ~covered(column)
        if left.any():
            order = np.argsort(column[left], kind="stable")
            column, starts = np.unique(column[left][order], return_index=True)
            keys = np.bitwise_count(np.bitwise_or.reduceat(self.any[ids[left][order]], starts)).sum(1, dtype=np.int64)
            rows += self._by_owner(column, keys)
        return area, rows

    def _of_full(self, first: Array, count: Array, high: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
        """Areas and rows of whole tiles, and which key tiles some query tile sees whole."""
        if count.sum() * 8 < self.tiles:
            column, which = expand(first, count)
            area = self._by_owner(column, high[which] * self.length[column])
            column = np.unique(column)
            return area, self._by_owner(column, self.length[column]), lambda some: np.isin(some, column)
        np.add.at(self.jump, first, high)
        np.subtract.at(self.jump, first + count, high)
        total = np.cumsum(self.jump[:-1], out=self.total)  # queries that see all of each key tile
        self.jump[first] = 0
        self.jump[first + count] = 0
        tile, short = self.length[0], self.length[0] - self.length[-1]
        area = np.bincount(self.owner, total, self.world).astype(np.int64) * tile
        rows = np.bincount(self.owner, total > 0, self.world).astype(np.int64) * tile
        area[self.owner[-1]] -= int(total[-1]) * short
        rows[self.owner[-1]] -= int(total[-1] > 0) * short
        return area, rows, lambda some: total[some] > 0

    def _by_owner(self, column: Array, value: Array) -> Array:
        return np.bincount(self.owner[column], value, self.world).astype(np.int64)  # exact in float64 below 2^53


def _grain(deal: Deal) -> int:
    """The largest divisor of the chunk that is not above the usual tile."""
    return max(size for size in range(1, min(deal.chunk, 128) + 1) if deal.chunk % size == 0)
