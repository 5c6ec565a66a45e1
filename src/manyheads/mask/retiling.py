"""The same visible pairs in other tiles, and two layouts overlaid: exact, from runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .evaluate import TileTable, pack, unpack
from .runs import MAX_RUNS, Array, Runs, assemble, expand, group_candidates, intersect, lookup
from .tilekeys import unique_rows

if TYPE_CHECKING:
    from .layout import TileLayout

CELLS = 1 << 22  # looked-up fine tiles in memory together
Size = tuple[int, int]


def retile(layout: TileLayout, tile: Size) -> TileLayout:
    """The same pairs in tiles of another size: split to the greatest common divisor, then merged."""
    from .layout import from_runs

    fine = (math.gcd(layout.tile[0], tile[0]), math.gcd(layout.tile[1], tile[1]))
    out = layout
    for step, act in ((fine, split), (tile, merge)):
        if step != out.tile:
            runs, bits = act(out.runs, out.sets, out.bits.numpy(), (layout.nq, layout.nk), out.tile, step)
            out = from_runs(replace(out, tile=step), runs, bits)
    return out


def merge(runs: Runs, n_sets: int, bits: Array, size: Size, old: Size, new: Size) -> tuple[Runs, Array]:
    """Merges tiles ``old`` into multiples ``new``.

    Args:
        runs: Runs of ``n_sets`` stacked row sets.
        n_sets: Row sets.
        bits: Bitmaps of the old tiles.
        size: ``(nq, nk)``.
        old: Old tile.
        new: New tile, a multiple of the old one.

    Returns:
        New runs and bitmaps.
    """
    factor = (new[0] // old[0], new[1] // old[1])
    n_rows, width = -(-size[0] // old[0]), runs.width
    coarse_rows, coarse_width = -(-size[0] // new[0]), -(-size[1] // new[1])
    row, column, count = group_candidates(runs, n_sets, factor, size[1] % new[1] != 0)
    group, inner = np.divmod(row, max(coarse_rows, 1))
    high = np.minimum(size[0] - inner * new[0], new[0])
    wide = np.minimum(size[1] - column * new[1], new[1])
    table = TileTable(new)
    ids = np.empty(len(row), dtype=np.int64)
    step = max(1, CELLS // (factor[0] * factor[1]))
    down, right = np.arange(factor[0])[:, None], np.arange(factor[1])
    for lo in range(0, len(row), step):
        part = slice(lo, lo + step)
        fine_row = inner[part, None, None] * factor[0] + down
        fine_column = column[part, None, None] * factor[1] + right
        inside = (fine_row < n_rows) & (fine_column < width)
        at = (
            group[part, None, None] * n_rows + np.minimum(fine_row, n_rows - 1),
            np.minimum(fine_column, width - 1),
        )
        cells = np.where(inside, lookup(runs, *at), -1).reshape(-1, factor[0] * factor[1])
        head, number = unique_rows([*cells.T, high[part], wide[part]])
        area = high[part][head] * wide[part][head]
        unique = np.concatenate(
            [
                _join(cells[h], bits, factor, old, (high[part][h], wide[part][h]), new)
                for h in np.split(head, range(64, len(head), 64))
            ]
        )
        ids[part] = table.add(unique, area)[number]
    return assemble(row, column, count, ids, n_sets * coarse_rows, coarse_width), table.stack()


def _join(cells: Array, bits: Array, factor: Size, old: Size, inside: tuple[Array, Array], new: Size) -> Array:
    """Bitmaps of new tiles from the ids of their old tiles."""
    used, at = np.unique(cells, return_inverse=True)
    table = np.zeros((len(used), *old), dtype=bool)
    table[used == 0] = True
    table[used > 0] = unpack(bits[used[used > 0] - 1], old[1])
    tiles = table[at.reshape(-1, *factor)].transpose(0, 1, 3, 2, 4).reshape(-1, *new)
    tiles &= (np.arange(new[0])[:, None] < inside[0][:, None, None]) & (np.arange(new[1]) < inside[1][:, None, None])
    return pack(tiles)


def split(runs: Runs, n_sets: int, bits: Array, size: Size, old: Size, new: Size) -> tuple[Runs, Array]:
    """Splits tiles ``old`` into divisors ``new``; arguments and result as in :func:`merge`.

    Raises:
        ValueError: If that makes more than 2^28 runs.
    """
    factor = (old[0] // new[0], old[1] // new[1])
    n_rows = -(-size[0] // old[0])
    fine_rows, fine_width = -(-size[0] // new[0]), -(-size[1] // new[1])
    full, partial = runs.id == 0, runs.id > 0
    cells = int(full.sum()) * factor[0] + int(runs.count[partial].sum()) * factor[0] * factor[1]
    if cells > MAX_RUNS:
        raise ValueError(f"tile: splitting {old} to {new} makes {cells} runs, more than {MAX_RUNS}; use larger tiles")
    row = runs.row
    down = np.arange(factor[0])

    def fine_row(row: Array) -> tuple[Array, Array]:
        group, inner = np.divmod(row, max(n_rows, 1))
        inner = inner[:, None] * factor[0] + down
        return group[:, None] * fine_rows + inner, inner < fine_rows

    at, inside = fine_row(row[full])
    first = np.broadcast_to(runs.first[full, None] * factor[1], at.shape)
    end = np.minimum((runs.first[full] + runs.count[full]) * factor[1], fine_width)
    pieces = [
        (
            at[inside],
            first[inside],
            (end[:, None] - first)[inside],
            np.zeros(int(inside.sum()), dtype=np.int64),
        )
    ]

    column, owner = expand(runs.first[partial], runs.count[partial])
    row, id = row[partial][owner], runs.id[partial][owner]
    high = np.minimum(size[0] - row % max(n_rows, 1) * old[0], old[0])
    wide = np.minimum(size[1] - column * old[1], old[1])
    table = TileTable(new)
    if len(row):
        head, number = unique_rows([id, high, wide])
        parts = [
            _cut(bits[id[h] - 1], table, (high[h], wide[h]), old, new) for h in np.split(head, range(64, len(head), 64))
        ]
        fine = np.concatenate(parts)[number]
        at, inside = fine_row(row)
        right = column[:, None, None] * factor[1] + np.arange(factor[1])
        at, inside, right = np.broadcast_arrays(at[:, :, None], inside[:, :, None] & (right < fine_width), right)
        keep = inside & (fine >= 0)
        pieces.append((at[keep], right[keep], np.ones(int(keep.sum()), dtype=np.int64), fine[keep]))
    row, first, count, id = (np.concatenate(p) for p in zip(*pieces, strict=True))
    return assemble(row, first, count, id, n_sets * fine_rows, fine_width), table.stack()


def _cut(bits: Array, table: TileTable, inside: tuple[Array, Array], old: Size, new: Size) -> Array:
    """Ids ``(n, rows, columns)`` of the pieces of old tiles."""
    factor = (old[0] // new[0], old[1] // new[1])
    tiles = unpack(bits, old[1]).reshape(-1, factor[0], new[0], factor[1], new[1]).transpose(0, 1, 3, 2, 4)
    high = np.clip(inside[0][:, None] - np.arange(factor[0]) * new[0], 0, new[0])
    wide = np.clip(inside[1][:, None] - np.arange(factor[1]) * new[1], 0, new[1])
    area = high[:, :, None] * wide[:, None, :]
    return table.add(pack(tiles.reshape(-1, *new)), area.reshape(-1)).reshape(area.shape)


def pair_bits(a: Array, b: Array, id_a: Array, id_b: Array, tile: Size) -> tuple[Array, Array]:
    """Bitmaps of overlaid tiles: ids -1 (nothing left), 0 or new per pair of ids, and the new table."""
    table = TileTable(tile)
    ones = pack(np.ones((1, *tile), dtype=bool))
    ids = np.zeros(len(id_a), dtype=np.int64)
    at = np.flatnonzero((id_a > 0) | (id_b > 0))
    both = np.concatenate([ones, a])[id_a[at]] & np.concatenate([ones, b])[id_b[at]]
    ids[at] = table.add(both, np.full(len(at), -1))
    return ids, table.stack()


def overlay(a: TileLayout, b: TileLayout) -> TileLayout:
    """Two layouts of equal tiles: the pairs that both show."""
    from .layout import from_runs

    shape = np.broadcast_shapes(tuple(a.index.shape), tuple(b.index.shape))
    index = [np.broadcast_to(x.index.numpy(), shape).reshape(-1) for x in (a, b)]
    sets, number = np.unique(np.stack(index, 1), axis=0, return_inverse=True)
    picked = [_pick(x.runs, sets[:, i], a.grid[0]) for i, x in enumerate((a, b))]
    runs, id_a, id_b = intersect(*picked)
    ids, bits = pair_bits(a.bits.numpy(), b.bits.numpy(), id_a, id_b, a.tile)
    final = ids[runs.id] if len(runs.id) else runs.id
    runs = assemble(runs.row, runs.first, runs.count, final, len(runs.start) - 1, runs.width)
    like = replace(
        a,
        index=a.index.new_tensor(number.reshape(shape)),
        batch=max(a.batch, b.batch),
        heads=max(a.heads, b.heads),
    )
    return from_runs(replace(like, q_pos=b.q_pos, k_pos=b.k_pos), runs, bits)


def _pick(runs: Runs, sets: Array, n_rows: int) -> Runs:
    """The rows of the chosen sets, stacked."""
    row = (sets[:, None] * n_rows + np.arange(n_rows)).reshape(-1)
    size = np.diff(runs.start)[row]
    at, _ = expand(runs.start[:-1][row], size)
    start = np.append(0, np.cumsum(size))
    return Runs(start, runs.first[at], runs.count[at], runs.id[at], runs.width)
