"""Neighbourhoods cut into boxes: queries that are neighbours on every axis, and the box of all keys they see.

On a grid a row of neighbouring tokens sees keys scattered over the whole sequence, so tiles of tokens are mostly
hidden pairs. A box of queries sees a box of keys hardly larger than itself, and nearly all boxes are alike: the same
sizes, the same pairs. A plan lists the kinds of boxes; each kind is a regular lattice, so that all its queries and all
its keys are strided views.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...mask.neighborhood import Neighborhood, visible_places
from ...mask.text import parse


class Line(NamedTuple):
    """Intervals of one axis that are alike, ``residues * many`` of them, in cells.

    Interval ``(r, i)`` holds the ``cells`` queries at ``q0 + r + i * q_step + t * step`` and sees keys at
    ``k0 + r + i * k_step + t * step`` for ``t < keys``; query t sees those from ``first[t]`` to ``last[t]``.
    """

    q0: int
    k0: int
    residues: int
    many: int
    q_step: int
    k_step: int
    step: int
    cells: int
    keys: int
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether every query sees every key."""
        return not any(self.first) and min(self.last) == self.keys - 1

    @property
    def seen(self) -> np.ndarray:
        """bool ``(cells, keys)``: which pairs are visible."""
        at = np.arange(self.keys)
        return (at >= np.array(self.first)[:, None]) & (at <= np.array(self.last)[:, None])


class Lattice(NamedTuple):
    """Where boxes lie, in tokens: counts and strides of each dimension that numbers them."""

    q0: int
    k0: int
    counts: tuple[int, ...]
    q_steps: tuple[int, ...]
    k_steps: tuple[int, ...]


class Inside(NamedTuple):
    """The tokens of one box relative to its first: sizes and strides."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many."""
        return math.prod(self.sizes)


@dataclass(eq=False)
class Kind:
    """Boxes that are alike: a product of intervals, one of each axis.

    Attributes:
        lattice: Where they lie.
        queries, keys: Their tokens.
        classes: For each dimension of the lattice, how many boxes on share a key with one of them.
        seen: bool ``(M, K)``, or None when every query of a box sees all its keys.
        lines: The intervals.
    """

    lattice: Lattice
    queries: Inside
    keys: Inside
    classes: tuple[int, ...]
    seen: Tensor | None
    lines: tuple[Line, ...]
    _added: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @property
    def boxes(self) -> int:
        """How many boxes there are."""
        return math.prod(self.lattice.counts)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """``(M, K)`` to add to scores: 0 or ``-inf``; None when nothing is hidden."""
        if self.seen is None:
            return None
        if dtype not in self._added:
            self._added[dtype] = torch.zeros(self.seen.shape, dtype=dtype).masked_fill_(~self.seen, -math.inf)
        return self._added[dtype]

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Queries ``(boxes, M)`` and keys ``(boxes, K)`` of every box, as indices of tokens."""
        at = self.lattice
        sides = ((at.q0, at.q_steps, self.queries), (at.k0, at.k_steps, self.keys))
        queries, keys = (
            start + _grid(at.counts, steps)[:, None] + _grid(inside.sizes, inside.steps)
            for start, steps, inside in sides
        )
        return queries, keys


@dataclass(eq=False)
class BoxPlan:
    """All boxes of a neighbourhood.

    Attributes:
        box: Queries of a box along each axis.
        kinds: The kinds of boxes; together they hold every query once.
        tokens: Cells of the grid.
        pairs: Pairs of a query and a key that are computed, for one head.
        fetched: Keys that are copied, for one head.
    """

    box: tuple[int, ...]
    kinds: tuple[Kind, ...]
    tokens: int
    pairs: int
    fetched: int

    def __str__(self) -> str:
        sides = " x ".join(map(str, self.box))
        most = " x ".join(map(str, max((kind.keys.sizes for kind in self.kinds), key=math.prod)))
        return (
            f"boxes of {sides} queries against boxes of up to {most} keys: "
            f"{self.pairs / self.tokens**2:.2%} of all pairs are computed"
        )


def plan_for(text: str, q: Tensor, k: Tensor, v: Tensor) -> BoxPlan | None:
    """The boxes of a mask, or None where tiles of tokens are no worse, or the call has none.

    Args:
        text: Text of the mask.
        q, k, v: As for :func:`manyheads.engine.tiled.tiled`.

    Returns:
        The plan, kept from the first call on.
    """
    if not text.startswith(_NAME) or q.device.type != "cpu" or q.shape[2] != k.shape[2] or not q.shape[3] * v.shape[3]:
        return None
    heads = q.shape[0] * q.shape[1]
    half = q.dtype.itemsize == 2
    return _plan_for(text, q.shape[2], 1 << max(heads - 1, 0).bit_length(), half) if heads else None


_NAME = "neighborhood("


@functools.lru_cache(maxsize=256)
def _plan_for(text: str, tokens: int, heads: int, half: bool) -> BoxPlan | None:
    mask = parse(text)
    if not isinstance(mask, Neighborhood) or math.prod(mask.grid) != tokens:
        return None
    cost, box = cheapest_box(mask, heads, half)
    return None if box is None or cost > _CLEARLY * _tiles_cost(mask, heads, half) else make_plan(mask, box)


@functools.lru_cache(maxsize=64)
def make_plan(mask: Neighborhood, box: tuple[int, ...]) -> BoxPlan:
    """Cuts a neighbourhood into boxes of a given size.

    Args:
        mask: The neighbourhood.
        box: Queries of a box along each axis; those at an edge or of another residue class may have fewer.

    Returns:
        The plan.

    Example:
        >>> plan = make_plan(Neighborhood((96, 96), 13), (8, 8))
        >>> len(plan.kinds), max(kind.keys.sizes for kind in plan.kinds)
        (9, (20, 20))
    """
    axes = [cut_axis(*axis, size) for axis, size in zip(axes_of(mask), box, strict=True)]
    kinds = tuple(_kind(lines, mask.grid) for lines in itertools.product(*axes))
    return BoxPlan(
        box,
        kinds,
        math.prod(mask.grid),
        sum(kind.boxes * kind.queries.tokens * kind.keys.tokens for kind in kinds),
        sum(kind.boxes * kind.keys.tokens for kind in kinds),
    )


Axis = tuple[int, int, int, int, bool]


def axes_of(mask: Neighborhood) -> list[Axis]:
    """Length, window, stride, dilation and order of each axis."""
    return list(zip(mask.grid, mask.window, mask.stride, mask.dilation, mask.causal, strict=True))


@functools.lru_cache(maxsize=1024)
def cut_axis(length: int, window: int, stride: int, dilation: int, causal: bool, size: int) -> tuple[Line, ...]:
    """Cuts one axis into intervals of ``size`` cells of a residue class, and gathers those that are alike."""
    found: list[Line] = []
    long = length % dilation  # residue classes with one cell more
    for residues, start in ((long, 0), (dilation - long, long)):
        cells = (length - 1 - start) // dilation + 1 if residues else 0
        if not cells:
            continue
        first, last = visible_places(cells, window, stride, causal)
        alike: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
        for q0 in range(0, cells, size):
            part = slice(q0, min(q0 + size, cells))
            k0, k1 = int(first[part].min()), int(last[part].max()) + 1
            kind = (part.stop - q0, k1 - k0, tuple((first[part] - k0).tolist()), tuple((last[part] - k0).tolist()))
            alike.setdefault(kind, []).append((q0, k0))
        for kind, starts in alike.items():
            for q0, k0, many, q_step, k_step in _progressions(starts):
                at = (start + q0 * dilation, start + k0 * dilation, residues, many)
                found.append(Line(*at, q_step * dilation, k_step * dilation, dilation, *kind))
    return tuple(found)


def _progressions(starts: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, int, int]]:
    """Cuts a list of pairs into runs with constant steps: first pair, count, steps."""
    at = 0
    while at < len(starts):
        q0, k0 = starts[at]
        end, step = at + 1, (0, 0)
        while end < len(starts):
            ahead = starts[end][0] - starts[end - 1][0], starts[end][1] - starts[end - 1][1]
            if end > at + 1 and ahead != step:
                break
            step, end = ahead, end + 1
        yield q0, k0, end - at, *step
        at = end


def _kind(lines: tuple[Line, ...], grid: tuple[int, ...]) -> Kind:
    inner = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    pairs = list(zip(lines, inner, strict=True))
    lattice = Lattice(
        sum(line.q0 * one for line, one in pairs),
        sum(line.k0 * one for line, one in pairs),
        tuple(n for line in lines for n in (line.residues, line.many)),
        tuple(n * one for line, one in pairs for n in (1, line.q_step)),
        tuple(n * one for line, one in pairs for n in (1, line.k_step)),
    )
    steps = tuple(line.step * one for line, one in pairs)
    seen = functools.reduce(np.kron, [line.seen.astype(np.uint8) for line in lines]).astype(bool)
    return Kind(
        lattice,
        Inside(tuple(line.cells for line in lines), steps),
        Inside(tuple(line.keys for line in lines), steps),
        tuple(n for line in lines for n in (1, _shared(line))),
        None if seen.all() else torch.from_numpy(seen),
        lines,
    )


def _grid(sizes: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    """Every sum of steps, the last dimension fastest."""
    at = np.zeros(1, dtype=np.int64)
    for size, step in zip(sizes, steps, strict=True):
        at = (at[:, None] + np.arange(size) * step).ravel()
    return at


def _shared(line: Line) -> int:
    """Every so many-th interval of a line shares no key with another of them."""
    if not line.k_step:
        return line.many
    return min(line.many, -(-line.keys * line.step // line.k_step))


# --- which box ----------------------------------------------------------------------------------------------------


class _Cost(NamedTuple):
    """Nanoseconds of a computed pair, a key copied for a box, a query, and a call of the kernel."""

    pair: float
    key: float
    query: float
    call: float


_COSTS = {False: _Cost(1.5, 32.0, 70.0, 75_000.0), True: _Cost(0.8, 27.0, 75.0, 40_000.0)}
"""By half precision, fitted to twenty plans at head width 32 on one core; only their ratios matter."""


def cheapest_box(mask: Neighborhood, heads: int, half: bool = False) -> tuple[float, tuple[int, ...] | None]:
    """The box size of the lowest predicted time.

    Args:
        mask: The neighbourhood.
        heads: Batch entries times query heads.
        half: Whether the inputs are of half precision.

    Returns:
        Predicted nanoseconds of a forward call and the box; infinity and None where every box is too large.
    """
    axes = [[(size, cut_axis(*axis, size)) for size in _sizes(*axis)] for axis in axes_of(mask)]
    cost_of = _COSTS[half]
    key = cost_of.key if len(axes) > 1 else cost_of.key / 2  # boxes of a line are views of it in the forward
    best: tuple[float, tuple[int, ...] | None] = (math.inf, None)
    for choice in itertools.product(*axes):
        queries = math.prod(max(line.cells for line in lines) for _, lines in choice)
        keys = math.prod(max(line.keys for line in lines) for _, lines in choice)
        whole = all(line.whole for _, lines in choice for line in lines)
        if queries * keys > (_MOST_WHOLE if whole else _MOST_PAIRS):
            continue
        kinds = math.prod(len(lines) for _, lines in choice)
        pairs, fetched = (
            math.prod(sum(line.residues * line.many * worth(line) for line in lines) for _, lines in choice)
            for worth in (lambda line: line.cells * line.keys, lambda line: line.keys)
        )
        row = cost_of.pair * pairs + key * fetched + cost_of.query * math.prod(mask.grid)
        cost = heads * row + cost_of.call * max(kinds, heads * fetched / _FETCHED)
        best = min(best, (cost, tuple(size for size, _ in choice)), key=lambda found: found[0])
    return best


def _sizes(length: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """Box sizes worth trying on an axis: whole stride groups, up to all cells of a residue class."""
    most = -(-length // dilation)
    tried = {stride * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)}
    return sorted({min(size, most) for size in tried if length // 1024 <= size <= 256 or size == stride})


def _tiles_cost(mask: Neighborhood, heads: int, half: bool) -> float:
    """Nanoseconds that tiles of tokens would take at best: they see whole rows of all axes but the first."""
    tokens, inner = math.prod(mask.grid), math.prod(mask.grid[1:])
    rows = -(-tokens // _ROW)
    keys = min(tokens, (mask.window[0] * mask.dilation[0] - 1) * inner + min(_ROW, tokens))
    return heads * tokens * keys * _COSTS[half].pair + _COSTS[half].call * rows


_MOST_PAIRS = 1 << 22  # of one box: the mask of a kind stays within 16 MiB;
_MOST_WHOLE = 1 << 24  # where boxes need none
_FETCHED = 16_384  # keys that one call takes, about
_ROW = 256  # queries of a row of tiles
_CLEARLY = 0.85  # where both take about as long, tiles have the faster backward
