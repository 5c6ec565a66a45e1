"""Packing by non-negative least squares over all ways to fill a row with a few sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manyheads.common.errors import missing_extra
from manyheads.method.packing.result import Packing, as_lengths, draw

LARGEST = 1 << 27
"""Most entries of the strategy matrix (1 GiB of float64)."""


def strategies(slots: int, depth: int = 3) -> NDArray[np.int64]:
    """Enumerates the multisets of at most three lengths that fill a row exactly.

    Args:
        slots: Length of the row.
        depth: Most lengths in a multiset, 1 to 3.

    Returns:
        ``(n, depth)`` int64, each row from longest to shortest, filled with zeros; ``n`` is about
        ``slots**2 / 12`` for depth 3.

    Raises:
        ValueError: The depth is not 1, 2 or 3.

    Example:
        >>> strategies(4).tolist()
        [[4, 0, 0], [3, 1, 0], [2, 2, 0], [2, 1, 1]]
    """
    if depth not in (1, 2, 3):
        raise ValueError(f"depth: expected 1, 2 or 3 (the enumeration grows with every length), got {depth}")
    shortest = np.arange(1, slots // 2 + 1)
    found = [np.array([[slots, 0, 0]])]
    if depth >= 2:
        found.append(np.stack([slots - shortest, shortest, np.zeros_like(shortest)], axis=1))
    if depth >= 3:
        low, middle = np.meshgrid(shortest, shortest, indexing="ij")
        high = slots - low - middle
        kept = (low <= middle) & (middle <= high)
        found.append(np.stack([high[kept], middle[kept], low[kept]], axis=1))
    return np.concatenate(found)[:, :depth]


def nnlshp(
    lengths: Sequence[int] | NDArray[np.int64],
    capacity: int,
    *,
    depth: int = 3,
    resolution: int = 1,
    short: int = 8,
    short_weight: float = 0.09,
) -> Packing:
    """Non-negative least squares histogram packing.

    With ``A[l, s]`` the number of slots of length ``l`` in strategy ``s`` and ``h`` the histogram, solves

    ``x = argmin over x >= 0 of |w * (A x - h)|``

    rounds ``x`` up, and covers what is still missing by rows of one sequence and padding, so that the residual
    ``A x - h`` (empty slots) is never negative. Rows of short lengths weigh little: short sequences fit into any
    slot that stays empty, and do. Made for large data sets, where rounding costs nothing; with few sequences, the
    rows that rounding adds and nobody needs are dropped.

    Args:
        lengths: One length per sequence, from 1 to ``capacity``.
        capacity: Tokens in a row.
        depth: Most sequences in a row, 1 to 3.
        resolution: Slot lengths are multiples of this many tokens, which divides ``capacity``. 1 is exact; 512
            tokens then take some 20 seconds, at resolution 8 milliseconds.
        short: Lengths up to this weigh ``short_weight`` instead of 1.
        short_weight: The weight of short lengths.

    Returns:
        The packing.

    Raises:
        ValueError: A length, the depth or the resolution is out of range, or the problem is too large.
        ImportError: scipy is not installed.

    Source:
        Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027, section 3.

    Example:
        >>> nnlshp([6, 2, 2, 5, 5], 10).packs
        ((3, 4), (0, 1, 2))
    """
    sizes = as_lengths(lengths, capacity)
    if resolution < 1 or capacity % resolution:
        raise ValueError(f"resolution: expected a divisor of capacity={capacity}, got {resolution}")
    slots, counts = solve(
        -(-sizes // resolution),
        capacity // resolution,
        depth=depth,
        short=short // resolution,
        short_weight=short_weight,
    )
    used = counts > 0
    rows = [tuple((row[row > 0] * resolution).tolist()) for row in slots[used]]
    groups = zip(rows, counts[used].tolist(), strict=True)
    return Packing(draw(groups, sizes), tuple(sizes.tolist()), capacity, depth, "nnlshp")


def solve(
    sizes: NDArray[np.int64], capacity: int, *, depth: int = 3, short: int = 8, short_weight: float = 0.09
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chooses how many rows follow each strategy, so that every sequence has a slot of its length.

    Args:
        sizes: One length per sequence, from 1 to ``capacity``.
        capacity: Length of a row.
        depth: Most sequences in a row, 1 to 3.
        short: Lengths up to this weigh ``short_weight`` instead of 1.
        short_weight: The weight of short lengths.

    Returns:
        The strategies used, ``(m, depth)`` int64, and the number of rows of each, ``(m,)`` int64, the rows that
        the solution holds whole before those that rounding up added.

    Raises:
        ValueError: The strategy matrix would be too large.
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise missing_extra("packing", "packing by non-negative least squares") from error
    if capacity**3 // 12 > LARGEST:
        raise ValueError(f"capacity: {capacity} slots have too many strategies, raise resolution")
    slots = strategies(capacity, depth)
    matrix = np.zeros((capacity + 1, len(slots)))
    for column in slots.T:
        np.add.at(matrix, (column, np.arange(len(slots))), 1.0)
    matrix = matrix[1:]
    wanted = np.bincount(sizes, minlength=capacity + 1)[1:]
    weight = np.where(np.arange(1, capacity + 1) <= short, short_weight, 1.0)
    solution, _ = nnls(weight[:, None] * matrix, weight * wanted)
    whole = np.floor(solution + 1e-6).astype(np.int64)
    extra = np.ceil(solution - 1e-6).astype(np.int64) - whole
    missing = np.maximum(wanted - (matrix @ (whole + extra)).astype(np.int64), 0)
    padded = np.zeros((np.count_nonzero(missing), depth), dtype=np.int64)
    padded[:, 0] = np.flatnonzero(missing) + 1
    if depth > 1:
        padded[:, 1] = capacity - padded[:, 0]
    fullest = np.argsort(whole - solution, kind="stable")
    rows = np.concatenate([slots, slots[fullest], padded])
    return rows, np.concatenate([whole, extra[fullest], missing[missing > 0]])
