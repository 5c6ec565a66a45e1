"""The masks of the long-context attention benchmark: as compositions, and as slices that agree with them.

The half of that benchmark that spreads a sequence over devices is :mod:`manyheads.parallel`.

Source:
    Long-Context Attention Benchmark, arXiv 2510.17896.

Example:
    >>> from manyheads.mask.longca import longca
    >>> drawn = longca("causal_document", 4096, seed=7)
    >>> drawn.mask.tiles(4096, 4096).pairs < 4096 * 4097 // 2
    True
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..common.errors import unknown
from . import named
from .algebra import PerHead
from .base import Mask
from .data import BlockMap
from .primitives import Causal, Full, Window
from .rectangles import BICAUSAL, CAUSAL, FULL, INVCAUSAL, Rectangles
from .sampling import Histogram, document_lengths, long_document_lengths
from .store import whole

REGULAR = ("full", "causal", "full_document", "causal_document", "sliding_window", "sliding_window_causal")
HETEROGENEOUS = (
    "share_question",
    "causal_blockwise",
    "prefix_lm_causal",
    "prefix_lm_document",
    "global_sliding_window",
    "block_causal_document",
)
LONG = ("full_document_long", "causal_document_long")
STATIC = REGULAR + HETEROGENEOUS
MAX_BLOCKS = 8
Slice = tuple[tuple[int, int], tuple[int, int], int]


class Factors(NamedTuple):
    """What was drawn for a mask; None where a mask does not use it."""

    lengths: tuple[int, ...] | None = None
    prefix: int | None = None
    window: int | None = None
    block: int | None = None


class Flops(NamedTuple):
    """Floating-point operations of one pass of attention over the visible pairs."""

    forward: float
    backward: float
    total: float


@dataclass(frozen=True)
class LongCA:
    """One mask of the benchmark.

    Attributes:
        name: Its name.
        total: Sequence length.
        mask: The composition of primitives.
        slices: The same set of pairs as disjoint typed rectangles.
        factors: What was drawn: lengths, prefix, window, block.
    """

    name: str
    total: int
    mask: Mask
    slices: Rectangles
    factors: Factors

    @property
    def area(self) -> int:
        """Number of visible pairs, by the closed formulas of `Rectangles.areas`."""
        return int(self.slices.areas().sum())

    def flops(self, heads: int, dim: int) -> Flops:
        """Operations for ``heads`` query heads of width ``dim``; see `flops`."""
        return flops(self.area, heads, dim)


def flops(area: float, heads: int, dim: int) -> Flops:
    r"""Operations of attention over visible pairs, as the benchmark counts them.

    .. math:: forward = 4 \cdot area \cdot heads \cdot dim, \qquad backward = 2.5 \cdot forward

    Args:
        area: Visible pairs of one head.
        heads: Query heads.
        dim: Head width.

    Returns:
        Forward, backward (2 for the gradients, 0.5 for recomputing the scores) and their sum.

    Example:
        >>> flops(10, 2, 8)
        Flops(forward=640, backward=1600.0, total=2240.0)
    """
    forward = 4 * area * heads * dim
    return Flops(forward, 2.5 * forward, 3.5 * forward)


def longca(
    name: str,
    total: int,
    *,
    seed: int = 42,
    lengths: Sequence[int] | None = None,
    distribution: str | Histogram | None = None,
    window: int | None = None,
    block: int = 1024,
    prefix: int | None = None,
) -> LongCA:
    """One of the 12 static masks (or the 2 for context parallelism) of LongCA-bench.

    Args:
        name: One of `STATIC` or `LONG`.
        total: Sequence length.
        seed: Seed of what is drawn.
        lengths: Document lengths that sum to ``total``; drawn by default.
        distribution: What lengths are drawn from; see `document_lengths`.
        window: The benchmark's w, which leaves out self: ``|i - j| <= w``, hence ``Window(w + 1)``. 1024 by
            default; drawn from 1 to total/3 - 1 for ``global_sliding_window``.
        block: Block size of ``block_causal_document``, whose documents have 1 to 8 blocks.
        prefix: Prefix length; drawn by default, from 1 to the total or to the first document's length.

    Returns:
        The mask with its slices and factors.

    Raises:
        TypeError: Not integers.
        ValueError: An unknown name, lengths that do not sum to the total, or a total too short for the mask.

    Conventions:
        Prefixes are ``j < prefix``, and both bands of ``global_sliding_window`` are ``2 w`` wide; where the
        benchmark's slices and predicates disagree, slices here follow the predicates. Lengths are drawn from
        approximate histograms, so they differ from the benchmark's own.

    Source:
        LongCA-bench (arXiv 2510.17896).

    Example:
        >>> case = longca("prefix_lm_causal", 7, prefix=3)
        >>> case.mask, case.area, case.slices
        (prefix(3) | causal, 31, rectangles([[0, 3], [3, 7]], [[0, 3], [0, 7]], [0, 1]))
    """
    if name not in _MAKERS:
        raise unknown("mask", name, _MAKERS)
    total = whole(total, "total", 2 if name in LONG else 1)
    rng = random.Random(seed)
    lens: tuple[int, ...] | None = None
    if name in _PACKED:
        lens = _draw_lengths(name, total, rng, lengths, distribution, whole(block, "block", 1))
    draw = Factors(lens, prefix, window, block if name == "block_causal_document" else None)
    mask, slices, factors = _MAKERS[name](total, draw, rng)
    parts = list(zip(*slices, strict=True)) or [(), (), ()]
    return LongCA(name, total, mask, Rectangles(parts[0], parts[1], parts[2]), factors)


def _draw_lengths(
    name: str,
    total: int,
    rng: random.Random,
    lengths: Sequence[int] | None,
    distribution: str | Histogram | None,
    block: int,
) -> tuple[int, ...]:
    if lengths is not None:
        lens = tuple(whole(n, "lengths", 1) for n in lengths)
        if sum(lens) != total:
            raise ValueError(f"lengths: expected a sum of {total}, got {sum(lens)}")
        return lens
    if name in LONG:
        return tuple(long_document_lengths(total, distribution, seed=rng))
    if name == "block_causal_document":
        blocks = document_lengths(-(-total // block), {(1, MAX_BLOCKS): 1.0}, seed=rng)
        lens = tuple(n * block for n in blocks)
        return (*lens[:-1], total - sum(lens[:-1]))
    return tuple(document_lengths(total, distribution, seed=rng))


Made = tuple[Mask, list[Slice], Factors]


def _spans(lens: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(lens).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _full(total: int, draw: Factors, rng: random.Random) -> Made:
    return Full(), [((0, total), (0, total), FULL)], Factors()


def _causal(total: int, draw: Factors, rng: random.Random) -> Made:
    return Causal(), [((0, total), (0, total), CAUSAL)], Factors()


def _full_document(total: int, draw: Factors, rng: random.Random) -> Made:
    lens = draw.lengths or ()
    return named.full_document(lens), [(s, s, FULL) for s in _spans(lens)], Factors(lens)


def _causal_document(total: int, draw: Factors, rng: random.Random) -> Made:
    lens = draw.lengths or ()
    return named.causal_document(lens), [(s, s, CAUSAL) for s in _spans(lens)], Factors(lens)


def _band(start: int, total: int, w: int) -> list[Slice]:
    """``|i - j| <= w`` on the square from ``start`` to ``total``."""
    n = total - start
    if w >= n:
        return [((start, total), (start, total), FULL)] if n else []
    top, low = (
        min(w, n - w),
        max(w, n - w),
    )  # rows before top meet no lower bound, rows from low no upper bound
    slices: list[Slice] = []
    if top:
        slices.append(((start, start + top), (start, start + top + w), CAUSAL))
    if top < low:
        slices.append(((start + top, start + low), (start, total), BICAUSAL if w <= n - w else FULL))
    if top:
        slices.append(((start + low, total), (start + low - w, total), INVCAUSAL))
    return slices


def _sliding_window(total: int, draw: Factors, rng: random.Random) -> Made:
    w = 1024 if draw.window is None else whole(draw.window, "window", 0)
    return Window(w + 1), _band(0, total, w), Factors(window=w)


def _sliding_window_causal(total: int, draw: Factors, rng: random.Random) -> Made:
    w = 1024 if draw.window is None else whole(draw.window, "window", 0)
    mask = Causal() & Window(w + 1)
    if w >= total:
        return mask, [((0, total), (0, total), CAUSAL)], Factors(window=w)
    first: list[Slice] = [((0, w), (0, w), CAUSAL)] if w else []
    return mask, [*first, ((w, total), (0, total), BICAUSAL)], Factors(window=w)


def _share_question(total: int, draw: Factors, rng: random.Random) -> Made:
    lens = draw.lengths or ()
    slices: list[Slice] = [(s, s, CAUSAL) for s in _spans(lens)]
    if len(lens) > 1:
        slices.append(((lens[0], total), (0, lens[0]), FULL))
    return named.shared_question(lens), slices, Factors(lens)


def _causal_blockwise(total: int, draw: Factors, rng: random.Random) -> Made:
    lens = draw.lengths or ()
    spans = _spans(lens)
    slices: list[Slice] = [(s, s, CAUSAL) for s in spans[:-1]]
    return named.causal_blockwise(lens), [*slices, (spans[-1], (0, total), CAUSAL)], Factors(lens)


def _prefixed(start: int, end: int, p: int) -> list[Slice]:
    """The first p columns for all rows, the rest causal, on the square from start to end."""
    if p >= end - start:
        return [((start, end), (start, end), FULL)]
    head: list[Slice] = [((start, start + p), (start, start + p), FULL)] if p else []
    return [*head, ((start + p, end), (start, end), CAUSAL)]


def _prefix_lm_causal(total: int, draw: Factors, rng: random.Random) -> Made:
    p = rng.randint(1, total) if draw.prefix is None else whole(draw.prefix, "prefix", 0)
    return named.prefix_lm_causal(p), _prefixed(0, total, p), Factors(prefix=p)


def _prefix_lm_document(total: int, draw: Factors, rng: random.Random) -> Made:
    lens = draw.lengths or ()
    p = rng.randint(1, lens[0]) if draw.prefix is None else whole(draw.prefix, "prefix", 0)
    slices = [piece for start, end in _spans(lens) for piece in _prefixed(start, end, p)]
    return named.prefix_lm_document(p, lens), slices, Factors(lens, prefix=p)


def _global_sliding_window(total: int, draw: Factors, rng: random.Random) -> Made:
    if draw.window is None and total < 6:
        raise ValueError(f"total: global_sliding_window draws a window up to total/3 - 1, got total {total}")
    w = rng.randint(1, total // 3 - 1) if draw.window is None else whole(draw.window, "window", 0)
    g = min(2 * w, total)
    slices: list[Slice] = [((0, g), (0, total), FULL), ((g, total), (0, g), FULL)]
    slices = [piece for piece in slices if piece[0][0] < piece[0][1] and piece[1][0] < piece[1][1]]
    return named.global_sliding_window(w + 1, 2 * w), slices + _band(g, total, w), Factors(window=w)


def _block_causal_document(total: int, draw: Factors, rng: random.Random) -> Made:
    lens, block = draw.lengths or (), draw.block or 1
    slices: list[Slice] = []
    for start, end in _spans(lens):
        for b in range(start // block, -(-end // block)):
            last = min(end, (b + 1) * block)
            slices.append(((max(start, b * block), last), (start, last), FULL))
    return named.block_causal_document(lens, block), slices, Factors(lens, block=block)


_MAKERS: dict[str, Callable[[int, Factors, random.Random], Made]] = {
    "full": _full,
    "causal": _causal,
    "full_document": _full_document,
    "causal_document": _causal_document,
    "sliding_window": _sliding_window,
    "sliding_window_causal": _sliding_window_causal,
    "share_question": _share_question,
    "causal_blockwise": _causal_blockwise,
    "prefix_lm_causal": _prefix_lm_causal,
    "prefix_lm_document": _prefix_lm_document,
    "global_sliding_window": _global_sliding_window,
    "block_causal_document": _block_causal_document,
    "full_document_long": _full_document,
    "causal_document_long": _causal_document,
}
_PACKED = {name for name in _MAKERS if "document" in name or name in ("share_question", "causal_blockwise")}


def block_sparse(
    total: int,
    *,
    ratio: float,
    heads: int = 1,
    block: int = 64,
    over: str = "row",
    seed: int = 42,
) -> BlockMap:
    """A uniform block-sparse mask: random block scores, the best of which are kept.

    Args:
        total: Sequence length.
        ratio: Share of blocks that is kept, above 0 and at most 1.
        heads: Query heads, each with its own scores.
        block: Tokens per block.
        over: ``"row"`` keeps ``int(ratio * blocks)`` (at least 1) per query block; ``"head"`` keeps that
            share of all blocks of a head, so that a row may be empty.
        seed: Seed of the scores.

    Returns:
        The mask, of shape ``(1, heads)``.

    Raises:
        TypeError: Not integers.
        ValueError: A ratio out of range, or an unknown ``over``.

    Example:
        >>> block_sparse(8, ratio=0.5, block=2).dense(8).sum(-1).unique().tolist()
        [4]
    """
    n = -(-whole(total, "total", 1) // whole(block, "block", 1))
    scores = np.random.default_rng(seed).random((whole(heads, "heads", 1), n, n))
    return BlockMap(_best(scores, ratio, over), block=block, q_len=total, k_len=total)


def variable_block_sparse(
    total: int, *, ratio: float, heads: int = 1, average: int = 128, minimum: int = 128, seed: int = 42
) -> Mask:
    """A block-sparse mask whose blocks differ in size, per head.

    Args:
        total: Sequence length.
        ratio: Share of key blocks that each query block keeps, above 0 and at most 1.
        heads: Query heads, each with its own sizes and scores.
        average: Average tokens per block; there are ``total // average`` blocks (at least 1).
        minimum: Least tokens per block; no more than the average.
        seed: Seed of sizes and scores.

    Returns:
        The mask, of shape ``(1, heads)``.

    Raises:
        TypeError: Not integers.
        ValueError: A ratio out of range, or a minimum above the average.

    Example:
        >>> variable_block_sparse(64, ratio=0.5, average=8, minimum=2, heads=2).shape
        (1, 2)
    """
    total, average = whole(total, "total", 1), whole(average, "average", 1)
    minimum = whole(minimum, "minimum", 1)
    if minimum > average:
        raise ValueError(f"minimum: expected at most the average {average}, got {minimum}")
    n = max(1, total // average)
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(whole(heads, "heads", 1)):
        sizes = [_sizes(rng, total, n, min(minimum, total // n)) for _ in range(2)]
        keep = _best(rng.random((1, n, n)), ratio, "row")[0]
        parts.append(BlockMap(keep, q_sizes=sizes[0], k_sizes=sizes[1]))
    return PerHead(parts)


def _sizes(rng: np.random.Generator, total: int, n: int, minimum: int) -> np.ndarray:
    """n sizes of at least the minimum, by random cuts of what is left."""
    spare = total - n * minimum
    cuts = np.sort(rng.integers(0, spare + 1, n - 1))
    return np.diff(np.concatenate([[0], cuts, [spare]])) + minimum


def _best(scores: np.ndarray, ratio: float, over: str) -> np.ndarray:
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected a kept share above 0 and at most 1, got {ratio}")
    if over not in ("row", "head"):
        raise ValueError(f"over: expected 'row' or 'head', got {over!r}")
    flat = scores if over == "row" else scores.reshape(len(scores), 1, -1)
    keep = max(1, int(ratio * flat.shape[-1]))
    best = np.argpartition(flat, -keep, axis=-1)[..., -keep:]
    out = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(out, best, True, axis=-1)
    return out.reshape(scores.shape)
