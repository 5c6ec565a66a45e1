"""A packing: which sequences share a row, checked when it is made."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def as_lengths(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Checks the lengths of sequences against the capacity of a row.

    Args:
        lengths: One length per sequence, at least 1.
        capacity: Tokens in a row, at least 1.

    Returns:
        The lengths as an int64 array.

    Raises:
        ValueError: The capacity is not positive, or a length is below 1 or above the capacity.
        TypeError: The lengths are not whole numbers.
    """
    if capacity < 1:
        raise ValueError(f"capacity: expected at least 1 token, got {capacity}")
    found = np.asarray(lengths)
    if found.ndim != 1:
        raise ValueError(f"lengths: expected one dimension (sequences,), got shape {found.shape}")
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"lengths: expected whole numbers, got {found.dtype}")
    if found.size and (found.min() < 1 or found.max() > capacity):
        raise ValueError(f"lengths: expected 1 to capacity={capacity}, got {found.min()} to {found.max()}")
    return found.astype(np.int64)


def histogram(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Counts the sequences of each length.

    Args:
        lengths: One length per sequence, from 1 to ``capacity``.
        capacity: Tokens in a row.

    Returns:
        ``(capacity + 1,)`` int64: entry ``l`` is the number of sequences of length ``l``; entry 0 is 0.

    Raises:
        ValueError: A length is out of range.

    Example:
        >>> histogram([2, 3, 2], 4).tolist()
        [0, 0, 2, 1, 0]
    """
    return np.bincount(as_lengths(lengths, capacity), minlength=capacity + 1)


@dataclass(frozen=True, eq=False)
class Packing:
    """Sequences assigned to rows of one capacity.

    Attributes:
        packs: For each row, the indices of its sequences, in the order in which they lie in it.
        lengths: The length of every sequence, by index.
        capacity: Tokens in a row.
        depth: Most sequences in a row; ``None`` for no limit.
        algorithm: Name of the algorithm that made it.

    Raises:
        ValueError: A sequence is packed twice or never, or a pack is empty, longer than the capacity, or deeper
            than the depth.

    Example:
        >>> packing = Packing(((0, 2), (1,)), (3, 4, 1), capacity=4)
        >>> packing.efficiency, packing.factor
        (1.0, 1.5)
    """

    packs: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    capacity: int
    depth: int | None = None
    algorithm: str = "given"

    def __post_init__(self) -> None:
        """Holds the promise of the class."""
        sizes = as_lengths(self.lengths, self.capacity)
        where = np.fromiter((i for pack in self.packs for i in pack), dtype=np.int64)
        if where.size and (where.min() < 0 or where.max() >= sizes.size):
            raise ValueError(f"packs: indices must be from 0 to {sizes.size - 1}, got {where.min()} to {where.max()}")
        times = np.bincount(where, minlength=sizes.size)
        if (times != 1).any():
            wrong = int(np.flatnonzero(times != 1)[0])
            raise ValueError(f"packs: sequence {wrong} is packed {times[wrong]} times, expected once")
        deep = np.fromiter(map(len, self.packs), dtype=np.int64, count=len(self.packs))
        used = np.diff(np.append(0, sizes[where].cumsum())[np.append(0, deep.cumsum())])
        if (bad := (deep == 0) | (used > self.capacity)).any():
            row = int(bad.argmax())
            raise ValueError(f"packs: row {row} has {used[row]} tokens, expected 1 to {self.capacity}")
        if self.depth is not None and (bad := deep > self.depth).any():
            row = int(bad.argmax())
            raise ValueError(f"packs: row {row} has {deep[row]} sequences, expected at most depth={self.depth}")

    @property
    def tokens(self) -> int:
        """Real tokens in all rows."""
        return sum(self.lengths)

    @property
    def efficiency(self) -> float:
        """Real tokens over the tokens of all rows; 1.0 when there are none."""
        return self.tokens / (len(self.packs) * self.capacity) if self.packs else 1.0

    @property
    def factor(self) -> float:
        """The packing factor: sequences per row on average; 1.0 when there are no rows."""
        return len(self.lengths) / len(self.packs) if self.packs else 1.0

    def strategies(self) -> Counter[tuple[int, ...]]:
        """Counts the rows by their multiset of lengths, each written from longest to shortest.

        Example:
            >>> Packing(((0, 1), (3, 2)), (1, 2, 1, 2), capacity=3).strategies()
            Counter({(2, 1): 2})
        """
        return Counter(tuple(sorted((self.lengths[i] for i in pack), reverse=True)) for pack in self.packs)


def draw(groups: Iterable[tuple[tuple[int, ...], int]], lengths: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Turns strategies on lengths into packs of sequences.

    A slot takes the first sequence of its length that is left, or else of the next shorter length: a strategy may
    offer more slots of a length than there are sequences. Rows that stay empty are dropped.

    Args:
        groups: Pairs of a multiset of slot lengths and how many rows follow it.
        lengths: The length of every sequence.

    Returns:
        The packs, as tuples of sequence indices.
    """
    order = np.argsort(lengths, kind="stable")
    pools = {
        int(size): order[start : start + count].tolist()[::-1]
        for size, start, count in zip(*np.unique(lengths[order], return_index=True, return_counts=True), strict=True)
    }
    sizes = sorted(pools)
    packs: list[tuple[int, ...]] = []
    for slots, count in groups:
        for _ in range(count):
            if not sizes:
                return tuple(packs)
            pack: list[int] = []
            for slot in slots:
                at = bisect.bisect_right(sizes, slot) - 1
                if at < 0:
                    continue
                pack.append(pools[sizes[at]].pop())
                if not pools[sizes[at]]:
                    del sizes[at]
            if pack:
                packs.append(tuple(pack))
    return tuple(packs)
