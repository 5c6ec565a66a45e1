"""Packing algorithms that work on the histogram of lengths, and the baseline that does not.

The two histogram algorithms move whole groups of equal rows at a time, so that their cost follows the number of
distinct lengths and not the number of sequences: a data set of a hundred million sequences packs in the time of
a small one.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from manyheads.common.errors import unknown
from manyheads.method.packing.nonnegative import nnlshp
from manyheads.method.packing.result import Packing, as_lengths, draw, histogram

Lengths = Sequence[int] | NDArray[np.int64]


def pack(lengths: Lengths, capacity: int, *, algorithm: str = "spfhp", depth: int | None = None) -> Packing:
    """Packs sequences into rows with an algorithm chosen by name.

    Args:
        lengths: One length per sequence, from 1 to ``capacity``.
        capacity: Tokens in a row.
        algorithm: ``"spfhp"``, ``"lpfhp"``, ``"nnlshp"`` or ``"greedy"``.
        depth: Most sequences in a row; ``None`` for the algorithm's own (no limit, or 3 for ``"nnlshp"``).

    Returns:
        The packing.

    Raises:
        ValueError: No algorithm has this name, or its own checks fail.

    Example:
        >>> pack([3, 1, 2], 4, algorithm="lpfhp").packs
        ((2,), (0, 1))
    """
    if algorithm not in ALGORITHMS:
        raise unknown("algorithm", algorithm, ALGORITHMS)
    chosen = ALGORITHMS[algorithm]
    return chosen(lengths, capacity) if depth is None else chosen(lengths, capacity, depth=depth)


def spfhp(lengths: Lengths, capacity: int, *, depth: int | None = None) -> Packing:
    """Shortest-pack-first histogram packing.

    Lengths are visited from longest to shortest. The ``n`` sequences of a length go to the open group of rows
    with the most room, as many as the group has rows; a group that takes only some of them is split. What fits
    nowhere opens new rows. The result is that of worst-fit decreasing, sequence by sequence.

    Args:
        lengths: One length per sequence, from 1 to ``capacity``.
        capacity: Tokens in a row.
        depth: Most sequences in a row; ``None`` for no limit.

    Returns:
        The packing.

    Raises:
        ValueError: A length or the depth is out of range.

    Source:
        Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027, section 3 and appendix.

    Example:
        >>> spfhp([5, 5, 3, 3, 2, 2], 10).packs
        ((0, 1), (2, 3, 4, 5))
    """
    sizes = as_lengths(lengths, capacity)
    groups = _Groups(capacity, depth)
    for size, count in _longest_first(sizes, capacity):
        left = count
        while left and (key := groups.roomiest(size)) is not None:
            left -= groups.put(key, size, each=1, rows=left)
        groups.open(size, left)
    return Packing(draw(groups.all(), sizes), tuple(sizes.tolist()), capacity, depth, "spfhp")


def lpfhp(lengths: Lengths, capacity: int, *, depth: int | None = None) -> Packing:
    """Longest-pack-first histogram packing: best fit instead of worst fit.

    As ``spfhp``, but sequences go to the fullest group that still has room, which they fill before they go on.
    The result is that of best-fit decreasing, sequence by sequence.

    Args:
        lengths: One length per sequence, from 1 to ``capacity``.
        capacity: Tokens in a row.
        depth: Most sequences in a row; ``None`` for no limit.

    Returns:
        The packing.

    Raises:
        ValueError: A length or the depth is out of range.

    Source:
        Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027, appendix.

    Example:
        >>> lpfhp([6, 5, 4, 3, 2], 10).packs
        ((0, 2), (1, 3, 4))
    """
    sizes = as_lengths(lengths, capacity)
    groups = _Groups(capacity, depth)
    for size, count in _longest_first(sizes, capacity):
        left = count
        while left and (key := groups.tightest(size)) is not None:
            each = min(groups.fits(key, size), left)
            left -= each * groups.put(key, size, each=each, rows=left // each)
        groups.open(size, left)
    return Packing(draw(groups.all(), sizes), tuple(sizes.tolist()), capacity, depth, "lpfhp")


def greedy(lengths: Lengths, capacity: int, *, depth: int | None = None) -> Packing:
    """First fit in the given order: the baseline.

    Each sequence goes to the first open row that has room for it. The cost is sequences times open rows.

    Args:
        lengths: One length per sequence, from 1 to ``capacity``.
        capacity: Tokens in a row.
        depth: Most sequences in a row; ``None`` for no limit.

    Returns:
        The packing.

    Raises:
        ValueError: A length or the depth is out of range.

    Example:
        >>> greedy([3, 3, 1, 1], 4).packs
        ((0, 2), (1, 3))
    """
    sizes = as_lengths(lengths, capacity)
    most = _check_depth(depth, capacity)
    packs: list[list[int]] = []
    room = np.zeros(max(1, sizes.size), dtype=np.int64)
    for index, size in enumerate(sizes.tolist()):
        row = int(np.argmax(room[: len(packs)] >= size)) if packs else 0
        if not packs or room[row] < size:
            row = len(packs)
            packs.append([])
            room[row] = capacity
        packs[row].append(index)
        room[row] = room[row] - size if len(packs[row]) < most else 0
    return Packing(tuple(map(tuple, packs)), tuple(sizes.tolist()), capacity, depth, "greedy")


ALGORITHMS: dict[str, Callable[..., Packing]] = {"spfhp": spfhp, "lpfhp": lpfhp, "nnlshp": nnlshp, "greedy": greedy}
"""Packing algorithms by name."""


def _check_depth(depth: int | None, capacity: int) -> int:
    if depth is not None and depth < 1:
        raise ValueError(f"depth: expected at least 1 sequence in a row, got {depth}")
    return capacity if depth is None else depth


def _longest_first(sizes: NDArray[np.int64], capacity: int) -> list[tuple[int, int]]:
    counts = histogram(sizes, capacity)
    return [(int(size), int(counts[size])) for size in np.flatnonzero(counts)[::-1]]


class _Groups:
    """Rows grouped by what lies in them: ``room -> (lengths, number of rows)``, open groups sorted by room."""

    def __init__(self, capacity: int, depth: int | None) -> None:
        self.capacity = capacity
        self.depth = _check_depth(depth, capacity)
        self.serial = 0
        self.keys: list[tuple[int, int]] = []
        self.held: dict[int, tuple[tuple[int, ...], int]] = {}

    def roomiest(self, size: int) -> tuple[int, int] | None:
        return self.keys[-1] if self.keys and self.keys[-1][0] >= size else None

    def tightest(self, size: int) -> tuple[int, int] | None:
        at = bisect.bisect_left(self.keys, (size, -1))
        return self.keys[at] if at < len(self.keys) else None

    def fits(self, key: tuple[int, int], size: int) -> int:
        return min(key[0] // size, self.depth - len(self.held[key[1]][0]))

    def put(self, key: tuple[int, int], size: int, *, each: int, rows: int) -> int:
        """Adds ``each`` sequences to at most ``rows`` rows of a group, splitting it; returns the number of rows."""
        lengths, count = self.held[key[1]]
        moved = min(rows, count)
        del self.keys[bisect.bisect_left(self.keys, key)]
        del self.held[key[1]]
        if count > moved:
            self._add(lengths, count - moved)
        self._add((*lengths, *(size,) * each), moved)
        return moved

    def open(self, size: int, count: int) -> None:
        """Opens rows for sequences that fit nowhere else, each row filled before the next."""
        each = min(self.capacity // size, self.depth)
        self._add((size,) * each, count // each)
        self._add((size,) * (count % each), 1)

    def _add(self, lengths: tuple[int, ...], count: int) -> None:
        if not lengths or not count:
            return
        self.serial += 1
        self.held[self.serial] = (lengths, count)
        room = self.capacity - sum(lengths)
        if room and len(lengths) < self.depth:
            bisect.insort(self.keys, (room, self.serial))

    def all(self) -> list[tuple[tuple[int, ...], int]]:
        return list(self.held.values())
