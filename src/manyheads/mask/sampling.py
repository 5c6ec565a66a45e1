"""Random document lengths with the shape of real corpora."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Mapping

from ..common.errors import unknown
from .store import whole

Histogram = Mapping[tuple[int, int], float]

_EDGES = (
    0, 10, 50, 100, 200, 500, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536,
    131072, 196608, 393216,
)  # fmt: skip
_SHARES = {
    "pile": (0.72, 5.99, 10.2, 22, 32.6, 12.9, 7.2, 4.3, 3, 0.67, 0.19, 0.1, 0.03, 0.02, 0.01, 0.02),
    "prolong64k": (0.06, 2.1, 8.3, 17, 32.9, 23.4, 10.1, 3.5, 1.3, 0.32, 0.14, 0.24, 0.13, 0.2, 0.21),
    "prolong512k": (
        0.06, 2.5, 8.9, 18.5, 33.8, 22.2, 9.1, 3, 1, 0.24, 0.09, 0.17, 0.09, 0.16, 0.17, 0.01, 0.01, 0.03
    ),
}  # fmt: skip


def histogram(name: str) -> dict[tuple[int, int], float]:
    """Shares of documents by length, in tokens.

    These approximate the shapes published with LongCA-bench (arXiv 2510.17896): the same kind of intervals
    with rounded shares and without the last ten-thousandth of the documents. They are not the official files,
    so sampled lengths differ from the benchmark's own.

    Args:
        name: ``"pile"`` (median about 270 tokens), ``"prolong64k"`` or ``"prolong512k"`` (medians about 400,
            with a longer tail).

    Returns:
        ``{(first, last): percent}``, both bounds inclusive.

    Raises:
        ValueError: Another name.

    Example:
        >>> histogram("pile")[201, 500]
        32.6
    """
    if name not in _SHARES:
        raise unknown("length distribution", name, _SHARES)
    shares = _SHARES[name]
    bounds = [(low + (low > 0), high) for low, high in zip(_EDGES, _EDGES[1:], strict=False)]
    return dict(zip(bounds, shares, strict=False))


def default_distribution(total: int) -> str:
    """The distribution that the benchmark uses at a length: Pile to 12K, ProLong64K to 64K, ProLong512K
    above.

    Example:
        >>> default_distribution(8192), default_distribution(65536), default_distribution(2**20)
        ('pile', 'prolong64k', 'prolong512k')
    """
    limits = (12 * 1024, 64 * 1024)
    return ("pile", "prolong64k", "prolong512k")[bisect_left(limits, total)]


def document_lengths(
    total: int, distribution: str | Histogram | None = None, *, seed: int | random.Random = 42
) -> list[int]:
    """Samples document lengths that sum to a total.

    An interval is drawn by weight, then a length uniformly in it, clipped to what remains; again until the
    sum is reached.

    Args:
        total: The sum, at least 1.
        distribution: A name for `histogram`, or ``{(first, last): weight}``; by default by
            `default_distribution`.
        seed: A seed, or a ``random.Random`` to go on with.

    Returns:
        Lengths of at least 1, the same for the same seed.

    Raises:
        TypeError: ``total`` is not an integer.
        ValueError: ``total`` below 1, or an empty distribution.

    Example:
        >>> lens = document_lengths(1000, "pile", seed=1)
        >>> sum(lens), lens == document_lengths(1000, "pile", seed=1)
        (1000, True)
    """
    total = whole(total, "total", 1)
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    name = default_distribution(total) if distribution is None else distribution
    shares = histogram(name) if isinstance(name, str) else dict(name)
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError("distribution: expected intervals with weights >= 0, not all 0")
    intervals, weights = list(shares), list(shares.values())
    lens: list[int] = []
    left = total
    while left:
        first, last = rng.choices(intervals, weights)[0]
        lens.append(max(1, min(left, rng.randint(int(first), int(last)))))
        left -= lens[-1]
    return lens


def long_document_lengths(
    total: int, distribution: str | Histogram | None = None, *, seed: int | random.Random = 42
) -> list[int]:
    """Samples lengths of which 40% of the tokens follow a distribution and the rest are documents of 8K to
    30K.

    Args:
        total: The sum, at least 2.
        distribution: As in `document_lengths`.
        seed: As in `document_lengths`.

    Returns:
        Shuffled lengths that sum to ``total``.

    Raises:
        TypeError: ``total`` is not an integer.
        ValueError: ``total`` below 2.

    Example:
        >>> sum(long_document_lengths(65536))
        65536
    """
    total = whole(total, "total", 2)
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    name = default_distribution(total) if distribution is None else distribution
    short = max(1, int(total * 0.4))
    lens = document_lengths(short, name, seed=rng)
    lens += document_lengths(total - short, {(8 * 1024, 30 * 1024): 1.0}, seed=rng)
    rng.shuffle(lens)
    return lens
