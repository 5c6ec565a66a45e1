"""Runs of equal tiles: the piecewise-constant rows of a layout, and exact operations on them.

A row of tiles is stored as runs ``(first column, count, id)``, sorted, disjoint; touching runs differ in id.
Rows of several row sets are stacked: row ``r`` of set ``s`` has the flat number ``s * n_rows + r``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray
MAX_RUNS = 1 << 28


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of all rows: row ``r`` owns ``first[start[r]:start[r + 1]]`` and so on; ``width`` columns."""

    start: Array
    first: Array
    count: Array
    id: Array
    width: int

    @property
    def row(self) -> Array:
        """The flat row number of every run."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))


def expand(first: Array, count: Array) -> tuple[Array, Array]:
    """Lists every member of the ranges ``first[i] .. first[i] + count[i]``.

    Returns:
        The members in order, and for each the number ``i`` of its range.
    """
    owner = np.repeat(np.arange(len(first)), count)
    offset = np.cumsum(count) - count
    return np.arange(len(owner)) - offset[owner] + first[owner], owner


def assemble(row: Array, first: Array, count: Array, id: Array, n_rows: int, width: int) -> Runs:
    """Sorts disjoint pieces of rows into runs and merges neighbours of equal id; negative ids are dropped."""
    if len(id) and id.min() < 0:
        keep = id >= 0
        row, first, count, id = row[keep], first[keep], count[keep], id[keep]
    place = row.astype(np.int64) * width + first
    if len(place) > 1 and not (place[1:] > place[:-1]).all():
        order = np.argsort(place)
        row, first, count, id = row[order], first[order], count[order], id[order]
    if not len(row):
        none = np.zeros(0, dtype=np.int64)
        return Runs(np.zeros(n_rows + 1, dtype=np.int64), none, none, none, width)
    opens = np.ones(len(row), dtype=bool)
    touches = (row[1:] == row[:-1]) & (id[1:] == id[:-1]) & (first[1:] == first[:-1] + count[:-1])
    opens[1:] = ~touches
    heads = np.flatnonzero(opens)
    tails = np.append(heads[1:], len(row)) - 1
    count = first[tails] + count[tails] - first[heads]
    start = np.zeros(n_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row[heads], minlength=n_rows), out=start[1:])
    return Runs(start, first[heads], count, id[heads], width)


def _steps(events_at: list[Array], jumps: list[Array]) -> tuple[Array, list[Array]]:
    """Sums step functions given by their jumps: sorted places, and each function's value from there on."""
    at = np.concatenate(events_at)
    order = np.argsort(at)
    at = at[order]
    last = np.ones(len(at), dtype=bool)
    last[:-1] = at[1:] != at[:-1]
    values = []
    bounds = np.cumsum([0] + [len(e) for e in events_at])
    for i, jump in enumerate(jumps):
        full = np.zeros(len(at), dtype=np.int64)
        full[bounds[i] : bounds[i + 1]] = jump
        values.append(np.cumsum(full[order])[last])
    return at[last], values


def transpose(runs: Runs, n_sets: int) -> Runs:
    """Turns rows into columns, exactly, touching only the places where a row differs from the one above it.

    A row is a step function of the column. Subtracting the row above leaves the changes; each change at a
    column closes one run of that column and opens another. Cost: runs before plus runs after.
    """
    n_rows = (len(runs.start) - 1) // n_sets
    width = runs.width
    row = runs.row
    tall = row + row // n_rows  # one virtual empty row below every set closes what is still open
    ends = runs.first + runs.count
    here = np.concatenate([tall * (width + 1) + runs.first, tall * (width + 1) + ends])
    jump = np.concatenate([runs.id + 1, -(runs.id + 1)]).astype(np.int64)
    at, (new, old) = _steps([here, here + (width + 1)], [jump, jump])
    changed = np.flatnonzero(new != old)
    if not len(changed):
        return Runs(np.zeros(n_sets * width + 1, dtype=np.int64), *(np.zeros(0, dtype=np.int64),) * 3, n_rows)
    cells, owner = expand(at[changed], at[changed + 1] - at[changed])
    tall, column = np.divmod(cells, width + 1)
    group, level = np.divmod(tall, n_rows + 1)
    place = (group * width + column) * (n_rows + 1) + level
    order = np.argsort(place)
    place, owner = place[order], owner[order]
    is_open = new[changed][owner] > 0
    opened, closed = place[is_open], place[old[changed][owner] > 0]
    column, level = np.divmod(opened, n_rows + 1)
    start = np.zeros(n_sets * width + 1, dtype=np.int64)
    np.cumsum(np.bincount(column, minlength=n_sets * width), out=start[1:])
    return Runs(start, level, closed - opened, new[changed][owner[is_open]] - 1, n_rows)


def intersect(a: Runs, b: Runs) -> tuple[Runs, Array, Array]:
    """Overlays two lists of rows: runs where both are present, whose id numbers the pair of ids found there.

    Returns:
        The runs, and for every run id of them the id in ``a`` and the id in ``b``.
    """
    width = a.width
    places, jumps = [], []
    for side in (a, b):
        base = side.row * (width + 1) + side.first
        places.append(np.concatenate([base, base + side.count]))
        jumps.append(np.concatenate([side.id + 1, -(side.id + 1)]).astype(np.int64))
    at, (in_a, in_b) = _steps(places, jumps)
    both = np.flatnonzero((in_a > 0) & (in_b > 0))
    if not len(both):
        return (
            replace(a, start=np.zeros_like(a.start), first=a.first[:0], count=a.count[:0], id=a.id[:0]),
            both,
            both,
        )
    pair = in_a[both] * (int(in_b.max()) + 1) + in_b[both]
    values, pair = np.unique(pair, return_inverse=True)
    row, first = np.divmod(at[both], width + 1)
    out = assemble(row, first, at[both + 1] - at[both], pair, len(a.start) - 1, width)
    ids = np.divmod(values, int(in_b.max()) + 1)
    return out, ids[0] - 1, ids[1] - 1


def lookup(runs: Runs, row: Array, column: Array) -> Array:
    """The id at each (row, column), -1 where no run covers it."""
    if not len(runs.first):
        return np.full(np.broadcast_shapes(row.shape, column.shape), -1, dtype=np.int64)
    base = runs.row * runs.width + runs.first
    at = np.searchsorted(base, row * runs.width + column, side="right") - 1
    inside = at >= 0
    at = np.maximum(at, 0)
    inside &= row * runs.width + column < base[at] + runs.count[at]
    return np.where(inside, runs.id[at], -1)


def group_candidates(runs: Runs, n_sets: int, factor: tuple[int, int], ragged: bool) -> tuple[Array, Array, Array]:
    """Where a row of coarser tiles may change its composition.

    Args:
        runs: Fine runs.
        n_sets: Row sets stacked in ``runs``.
        factor: How many fine rows and columns make one coarse tile.
        ragged: Whether the last coarse column is cut short, and so differs from its neighbour.

    Returns:
        ``(row, column, count)``: from that coarse tile on, ``count`` coarse tiles have the same composition.
    """
    n_rows = (len(runs.start) - 1) // n_sets
    coarse_rows, coarse_width = -(-n_rows // factor[0]), -(-runs.width // factor[1])
    group, inner = np.divmod(runs.row, n_rows)
    row = group * coarse_rows + inner // factor[0]
    edges = [runs.first, runs.first + runs.count]
    columns = [e // factor[1] for e in edges] + [-(-e // factor[1]) for e in edges]
    if ragged:
        columns.append(np.full(len(row), coarse_width - 1))
    place = np.concatenate([row * (coarse_width + 1) + c for c in columns])
    place = np.unique(place)
    row, column = np.divmod(place, coarse_width + 1)
    count = np.empty_like(column)
    count[:-1] = np.where(row[1:] == row[:-1], column[1:], coarse_width) - column[:-1]
    count[-1:] = coarse_width - column[-1:]
    keep = column < coarse_width
    return row[keep], column[keep], count[keep]
