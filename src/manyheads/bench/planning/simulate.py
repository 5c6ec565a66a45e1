"""Plans before anything is run: what a mask costs in tiles of several sizes, and how evenly its rows load a machine."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from manyheads.bench.suites.patterns import DRAWN, MASKS, resolve
from manyheads.common.errors import unknown
from manyheads.mask import Mask, TileLayout
from manyheads.mask.longca import LONG, longca
from manyheads.mask.runs import Runs, intersect
from manyheads.mask.sampling import histogram

MAX_ROWS = 1 << 20
"""Above this many rows of tiles no schedule is simulated."""

PACKED = (*DRAWN, *LONG)
"""Masks of the long-context benchmark whose documents are drawn from a distribution of lengths."""

Array = np.ndarray


@dataclass(frozen=True)
class Tiling:
    """A mask in tiles of one size.

    Attributes:
        tile: Queries and keys of a tile.
        grid: Rows and columns of tiles.
        visited: Tiles that hold a visible pair, over batch and heads.
        partial: Of these, tiles in which some pair is hidden, which cost a bitmap and a masking.
        pairs: Visible pairs, exactly, over batch and heads.
        density: Share of all tiles that is visited.
        area: Share of all pairs that is visible.
        ideal_speedup: All pairs over visible pairs: what no engine can beat.
        tile_speedup: All tiles over visited tiles: what an engine of this tile can reach.
        bitmaps: Distinct bitmaps of partial tiles.
        layout_bytes: Bytes of the layout.
        rows: Rows of tiles over batch and heads: the pieces of work that a machine shares out.
        row_tiles: Tiles visited by the longest row.
        imbalance: Tiles of the longest row over those of an average row.
        units: Units (cores, multiprocessors) that share the rows.
        in_order: Tiles that the busiest unit visits when each idle unit takes the next row.
        longest_first: The same when rows are taken longest first.
        balance: Tiles of an average unit over those of the busiest one, rows taken in order; 1 is perfect.
        balance_longest_first: The same, rows taken longest first.
    """

    tile: tuple[int, int]
    grid: tuple[int, int]
    visited: int
    partial: int
    pairs: int
    density: float
    area: float
    ideal_speedup: float
    tile_speedup: float
    bitmaps: int
    layout_bytes: int
    rows: int
    row_tiles: int
    imbalance: float
    units: int
    in_order: int | None
    longest_first: int | None
    balance: float | None
    balance_longest_first: float | None


def tiles(
    mask: Mask | str,
    length: int,
    keys: int | None = None,
    *,
    tile: Iterable[tuple[int, int]] = ((128, 128),),
    batch: int = 1,
    heads: int = 1,
    units: int = 1,
    lengths: str | None = None,
    seed: int = 42,
) -> list[Tiling]:
    """Counts what a mask costs in tiles of several sizes.

    Args:
        mask: A mask, its text, or the name of a mask of the long-context benchmark, whose documents are drawn.
        length: Queries.
        keys: Keys; as many as queries by default.
        tile: Queries and keys of each tile size.
        batch: Batch entries.
        heads: Query heads.
        units: Cores or multiprocessors that share the rows of tiles.
        lengths: What document lengths are drawn from, for masks that draw them: ``"pile"``, ``"prolong64k"``,
            ``"prolong512k"``.
        seed: Seed of what is drawn.

    Returns:
        One entry for each tile size.

    Raises:
        ValueError: A length, tile or number of units below 1, or a mask that does not exist or does not fit.

    Example:
        >>> (found,) = tiles("causal & window(512)", 4096, tile=[(128, 128)], units=8)
        >>> found.visited, found.partial, round(found.ideal_speedup, 2), round(found.tile_speedup, 2)
        (150, 60, 8.53, 6.83)
        >>> found.bitmaps, found.row_tiles, found.balance
        (2, 5, 0.9375)
    """
    for name, value in (("length", length), ("keys", length if keys is None else keys)):
        if value < 1:
            raise ValueError(f"{name}: expected at least one token, got {value}")
    if units < 1:
        raise ValueError(f"units: expected at least one core or multiprocessor, got {units}")
    drawn = named(mask, length, seed=seed, lengths=lengths, heads=heads) if isinstance(mask, str) else mask
    nk = length if keys is None else keys
    return [_tiling(drawn.tiles(length, nk, tile=size, batch=batch, heads=heads), units) for size in tile]


def named(mask: str, length: int, *, seed: int = 42, lengths: str | None = None, heads: int = 1) -> Mask:
    """Builds a mask from its name or text; what it draws is drawn for this length.

    Args:
        mask: Name of a mask of the long-context benchmark, or the text of any mask.
        length: Tokens.
        seed: Seed of what is drawn.
        lengths: What document lengths are drawn from; by default as the benchmark does at this length.
        heads: Query heads, for masks that differ from head to head.

    Returns:
        The mask.

    Raises:
        ValueError: No such mask or distribution; the nearest name is suggested. Or a distribution for a mask that
            draws no documents.

    Example:
        >>> named("causal_document", 1000, lengths="pile", seed=3)
        causal & document([170, 89, 498, 11, 232])
    """
    if lengths is None:
        return resolve(mask, length, seed, heads)
    histogram(lengths)
    if mask in PACKED:
        return longca(mask, length, seed=seed, distribution=lengths).mask
    if mask.isidentifier() and mask not in MASKS:
        raise unknown("mask", mask, PACKED)
    raise ValueError(f"lengths: {mask!r} draws no documents from a distribution; these do: {', '.join(PACKED)}")


class Visits(NamedTuple):
    """What the rows of tiles of a layout visit, per distinct row set.

    Attributes:
        tiles: ``(sets, rows)`` tiles visited.
        keys: ``(sets, rows)`` keys inside them, cut at the last key.
        fresh: ``(sets, rows)`` those of the keys that the row before did not visit.
        distinct: ``(sets,)`` keys that any row visits.
        height: ``(rows,)`` queries, cut at the last query.
        uses: ``(sets,)`` batch entries and heads that share a row set.
    """

    tiles: Array
    keys: Array
    fresh: Array
    distinct: Array
    height: Array
    uses: Array

    @property
    def computed(self) -> int:
        """Pairs inside visited tiles over batch and heads, edge tiles cut."""
        return int(((self.keys * self.height).sum(1) * self.uses).sum())


def visits(layout: TileLayout) -> Visits:
    """Counts what each row of tiles visits.

    Args:
        layout: Any layout.

    Returns:
        The counts.

    Example:
        >>> from manyheads.mask import Causal
        >>> found = visits(Causal().tiles(300, tile=(128, 128)))
        >>> found.tiles.tolist(), found.keys.tolist(), found.fresh.tolist(), found.computed
        ([[1, 2, 3]], [[128, 256, 300]], [[128, 128, 44]], 62352)
    """
    layout = layout.to_runs()
    runs, (rows, columns), sets = layout.runs, layout.grid, layout.sets
    shape = (sets, rows)

    def of_rows(row: Array, amount: Array) -> Array:
        return np.bincount(row, amount, minlength=sets * rows).astype(np.int64).reshape(shape)

    def in_keys(part: Runs) -> Array:
        return np.minimum((part.first + part.count) * layout.tile[1], layout.nk) - part.first * layout.tile[1]

    keys = of_rows(runs.row, in_keys(runs))
    again = _shared_with_the_row_before(runs, sets)
    edges = np.zeros((sets, columns + 1), dtype=np.int64)
    owner = runs.row // max(rows, 1)
    np.add.at(edges, (owner, runs.first), 1)
    np.add.at(edges, (owner, runs.first + runs.count), -1)
    wide = np.minimum(layout.tile[1], layout.nk - np.arange(columns) * layout.tile[1])
    counted = np.bincount(layout.index.reshape(-1).cpu().numpy(), minlength=sets)
    return Visits(
        of_rows(runs.row, runs.count),
        keys,
        keys - of_rows(again.row, in_keys(again)),
        ((edges.cumsum(1)[:, :-1] > 0) * wide).sum(1),
        np.minimum(layout.tile[0], layout.nq - np.arange(rows) * layout.tile[0]),
        counted * (layout.batch * layout.heads // max(layout.index.numel(), 1)),
    )


def busiest(costs: Sequence[int] | Array, units: int, *, longest_first: bool = False) -> int:
    """Shares work out: each unit that becomes idle takes the next piece.

    Args:
        costs: Cost of each piece, in order.
        units: How many work at once.
        longest_first: Whether the pieces are taken longest first.

    Returns:
        What the busiest unit has done when all is done.

    Example:
        >>> busiest([1, 1, 2], 2), busiest([1, 1, 2], 2, longest_first=True)
        (3, 2)
    """
    order = np.sort(costs)[::-1] if longest_first else np.asarray(costs)
    if len(order) <= units:
        return int(order.max(initial=0))
    load = [0] * units
    for cost in order.tolist():
        heapq.heapreplace(load, load[0] + cost)
    return max(load)


def _shared_with_the_row_before(runs: Runs, sets: int) -> Runs:
    """The tiles of each row that the row before visits too."""
    rows = (len(runs.start) - 1) // sets
    plain = Runs(runs.start, runs.first, runs.count, np.zeros_like(runs.id), runs.width)
    last = int(runs.start[-2]) if len(runs.start) > 1 else 0
    below = np.concatenate([[0], runs.start[:-1]])
    shifted = Runs(below, runs.first[:last], runs.count[:last], plain.id[:last], runs.width)
    found, _, _ = intersect(plain, shifted)
    if sets == 1:
        return found
    keep = found.row % rows != 0  # the first row of a set has no row before it
    start = np.zeros_like(runs.start)
    np.cumsum(np.bincount(found.row[keep], minlength=len(start) - 1), out=start[1:])
    return Runs(start, found.first[keep], found.count[keep], found.id[keep], found.width)


def _tiling(layout: TileLayout, units: int) -> Tiling:
    found = visits(layout)
    runs = layout.to_runs().runs
    hidden = np.bincount(runs.row // max(layout.grid[0], 1), runs.count * (runs.id > 0), minlength=layout.sets)
    longest = int(found.tiles.max(initial=0))
    rows = int(found.uses.sum()) * layout.grid[0]
    average = layout.visited / max(rows, 1)
    loads: list[int | None] = [None, None]
    if rows <= MAX_ROWS:
        costs = np.concatenate([found.tiles[s] for s in _sets_in_order(layout)])
        loads = [busiest(costs, units, longest_first=first) for first in (False, True)]
    shares = [None if load is None else layout.visited / units / load if load else 1.0 for load in loads]
    return Tiling(
        tile=layout.tile,
        grid=layout.grid,
        visited=layout.visited,
        partial=int(hidden.astype(np.int64) @ found.uses),
        pairs=layout.pairs,
        density=layout.density,
        area=layout.area,
        ideal_speedup=layout.ideal_speedup,
        tile_speedup=layout.tile_speedup,
        bitmaps=len(layout.bits),
        layout_bytes=layout.nbytes,
        rows=rows,
        row_tiles=longest,
        imbalance=longest / average if average else math.nan,
        units=units,
        in_order=loads[0],
        longest_first=loads[1],
        balance=shares[0],
        balance_longest_first=shares[1],
    )


def _sets_in_order(layout: TileLayout) -> list[int]:
    """The row set of every batch entry and head, batch first: the order in which a kernel's programs start."""
    index = layout.index.cpu().numpy()
    return [int(s) for s in np.broadcast_to(index, (layout.batch, layout.heads)).reshape(-1)]
