"""Masks given as a list of typed rectangles: the slice form of benchmarks and context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .base import Box, Coords, Leaf, Side, _set
from .store import Datum, Lookup, integers, whole

FULL, CAUSAL, INVCAUSAL, BICAUSAL = 0, 1, 2, 3
_FAR = 2**40
_CHUNK = 2**21


class Rectangles(Leaf):
    r"""A union of rectangles of positions, each full or cut by diagonals.

    Rectangle n holds the pairs with ``q0 <= i < q1`` and ``k0 <= j < k1``, and by type

    === ========= =================================================================
    0   FULL      all of them
    1   CAUSAL    ``i - q1 >= j - k1``: the diagonal ends in the bottom-right corner
    2   INVCAUSAL ``j - k0 >= i - q0``: the diagonal begins in the top-left corner
    3   BICAUSAL  both
    === ========= =================================================================

    Args:
        q_ranges: ``(n, 2)`` half-open ranges of query positions.
        k_ranges: ``(n, 2)`` half-open ranges of key positions.
        types: ``(n,)`` types, or one int for all.

    Raises:
        TypeError: Not integers.
        ValueError: Shapes that differ, a range that ends before it begins, or an unknown type.

    Source:
        The slice form of MagiAttention and LongCA-bench (arXiv 2510.17896).

    Example:
        >>> from manyheads.mask import Rectangles
        >>> Rectangles([[0, 2], [2, 4]], [[0, 2], [0, 4]], [0, 1]).dense(4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """

    __slots__ = ("_k", "_q", "_strips", "_types", "axes")
    _q: Datum
    _k: Datum
    _types: Datum
    _strips: _Strips | None

    def __init__(self, q_ranges: Any, k_ranges: Any, types: Any = FULL) -> None:
        q, k = _ranges(q_ranges, "q_ranges"), _ranges(k_ranges, "k_ranges")
        n = len(q.array)
        if isinstance(types, (int, np.integer)):
            types = np.full(n, whole(types, "types"), dtype=np.int64)
        kinds = integers(types, "types", ndim=(1,))
        if len(k.array) != n or len(kinds.array) != n:
            raise ValueError(f"rectangles: expected equal lengths, got {n}, {len(k.array)} and {len(kinds.array)}")
        if n and int(kinds.array.max()) > BICAUSAL:
            raise ValueError(f"types: expected 0 to 3, got {int(kinds.array.max())}")
        data = {datum.digest: datum for datum in (q, k, kinds)}
        _set(self, "_q", q)
        _set(self, "_k", k)
        _set(self, "_types", kinds)
        _set(self, "_strips", None)
        _set(self, "axes", ("position", f"strip@{q.short}{k.short}"))
        self._finish((1, 1), tuple(data.values()))

    @property
    def q_ranges(self) -> np.ndarray:
        """``(n, 2)`` half-open ranges of query positions."""
        return self._q.array

    @property
    def k_ranges(self) -> np.ndarray:
        """``(n, 2)`` half-open ranges of key positions."""
        return self._k.array

    @property
    def types(self) -> np.ndarray:
        """``(n,)`` types."""
        return self._types.array

    def areas(self) -> np.ndarray:
        r"""Pairs in each rectangle of q rows and k columns, by closed formulas.

        .. math:: full: qk \qquad causal, invcausal: m(2k - m + 1)/2,\ m = \min(q, k) \qquad
                  bicausal: q\,\max(k - q + 1, 0)

        An INVCAUSAL or CAUSAL rectangle with more rows than columns has only k rows with a visible key.

        Returns:
            ``(n,)`` int64; their sum counts a pair once per rectangle that holds it.

        Example:
            >>> from manyheads.mask import Rectangles
            >>> Rectangles([[0, 4]] * 4, [[0, 6]] * 4, [0, 1, 2, 3]).areas().tolist()
            [24, 18, 18, 12]
        """
        q = self.q_ranges[:, 1] - self.q_ranges[:, 0]
        k = self.k_ranges[:, 1] - self.k_ranges[:, 0]
        m = np.minimum(q, k)
        cut = m * (2 * k - m + 1) // 2
        return np.select([self.types == FULL, self.types == BICAUSAL], [q * k, q * np.maximum(k - q + 1, 0)], cut)

    @property
    def _cuts(self) -> _Strips:
        strips = self._strips
        if strips is None:
            strips = _Strips(self.q_ranges, self.k_ranges, self.types)
            _set(self, "_strips", strips)
        return strips

    def _write(self, name: Callable[[Datum], str]) -> str:
        return f"rectangles({name(self._q)}, {name(self._k)}, {name(self._types)})"

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The position, and which strip between two edges it lies in.

        Strips are numbered so that the difference of a query's and a key's number tells both: bits of a tile
        then depend on differences alone.
        """
        pos = np.asarray(pos)
        strip = np.searchsorted(self._cuts.edges[side], pos, side="right")
        if side == "q":
            strip = strip * self._cuts.count
        return {"position": pos, self.axes[1]: strip}

    def _allows(self, q: Coords, k: Coords) -> Any:
        return self._cuts.allows(q["position"], k["position"], q[self.axes[1]], k[self.axes[1]])

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        return self._cuts.classify(q["position"], k["position"])


def _ranges(values: Any, argument: str) -> Datum:
    datum = integers(values, argument, ndim=(1, 2), low=None)
    if datum.array.size == 0:
        datum = integers(np.zeros((0, 2), dtype=np.int64), argument, ndim=(2,))
    if datum.array.ndim != 2 or datum.array.shape[1] != 2:
        raise ValueError(f"{argument}: expected shape (n, 2), got {tuple(datum.array.shape)}")
    if (datum.array[:, 0] > datum.array[:, 1]).any():
        bad = datum.array[datum.array[:, 0] > datum.array[:, 1]][0].tolist()
        raise ValueError(f"{argument}: expected start <= end, got {bad}")
    if datum.array.size and int(np.abs(datum.array).max()) >= _FAR:
        raise ValueError(f"{argument}: expected positions below 2**40")
    return datum


class _Strips:
    """Rectangles cut into strips along one side, each strip with the list of rectangles that cross it."""

    def __init__(self, q: np.ndarray, k: np.ndarray, types: np.ndarray) -> None:
        causal = (types == CAUSAL) | (types == BICAUSAL)
        inverse = (types == INVCAUSAL) | (types == BICAUSAL)
        least = np.where(causal, q[:, 1] - k[:, 1], -_FAR)  # bounds of i - j
        most = np.where(inverse, q[:, 0] - k[:, 0], _FAR)
        live = (q[:, 0] < q[:, 1]) & (k[:, 0] < k[:, 1]) & (least <= most)
        q, k = self.q, self.k = q[live], k[live]
        self.least, self.most = least[live], most[live]
        self.edges = {"q": np.unique(q), "k": np.unique(k)}
        self.count = len(self.edges["k"]) + 1
        by_q, by_k = _crossing(q, self.edges["q"]), _crossing(k, self.edges["k"])
        self.by_query = by_q.shape[1] <= by_k.shape[1]
        table = by_q if self.by_query else by_k
        self.depths = [Lookup(table[:, depth]) for depth in range(table.shape[1])]
        other = k if self.by_query else q
        # by query: j from max(k0, i - most) to min(k1 - 1, i - least); by key: i from j + least to j + most
        below, above = (-self.most, -self.least) if self.by_query else (self.least, self.most)
        self.start, self.end = Lookup(np.append(other[:, 0], 1)), Lookup(np.append(other[:, 1] - 1, 0))
        self.below, self.above = Lookup(np.append(below, 0)), Lookup(np.append(above, 0))
        self.order = {"q": _Sorted(q), "k": _Sorted(k)}

    def allows(self, i: Any, j: Any, q_strip: Any, k_strip: Any) -> Any:
        """Whether any rectangle holds each pair; numpy or torch."""
        at, across = (i, j) if self.by_query else (j, i)
        strip = q_strip // self.count if self.by_query else k_strip
        result = (across < across) & (at < at)
        for depth in self.depths:
            which = depth[strip]
            low = _larger(self.start[which], at + self.below[which])
            high = _smaller(self.end[which], at + self.above[which])
            result = result | ((across >= low) & (across <= high))
        return result

    def classify(self, q: tuple[Any, Any], k: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes against the rectangles that may meet them, some (box, rectangle) pairs at a time."""
        q_lo, q_hi, k_lo, k_hi = np.broadcast_arrays(*q, *k)
        shape = q_lo.shape
        flat = [a.reshape(-1) for a in (q_lo, q_hi, k_lo, k_hi)]
        spans = [self.order["q"].meeting(flat[0], flat[1]), self.order["k"].meeting(flat[2], flat[3])]
        side = "q" if spans[0][1].sum() <= spans[1][1].sum() else "k"
        first, count = spans[0] if side == "q" else spans[1]
        may, must = np.zeros(len(flat[0]), dtype=bool), np.zeros(len(flat[0]), dtype=bool)
        total = np.cumsum(count)
        begin = 0
        while begin < len(total):
            done = total[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(total, done + _CHUNK, side="right")))
            self._some(side, flat, first, count, slice(begin, end), may, must)
            begin = end
        return may.reshape(shape), must.reshape(shape)

    def _some(
        self,
        side: str,
        flat: list[np.ndarray],
        first: np.ndarray,
        count: np.ndarray,
        part: slice,
        may: np.ndarray,
        must: np.ndarray,
    ) -> None:
        first, count = first[part], count[part]
        box = np.repeat(np.arange(len(count)), count)
        if not len(box):
            return
        nth = np.arange(len(box)) - np.repeat(np.cumsum(count) - count, count)
        which = self.order[side].index[first[box] + nth]
        q_lo, q_hi, k_lo, k_hi = (a[part][box] for a in flat)
        q0, q1 = self.q[which].T
        k0, k1 = self.k[which].T
        least, most = self.least[which], self.most[which]
        a, b = np.maximum(q_lo, q0), np.minimum(q_hi, q1 - 1)
        c, d = np.maximum(k_lo, k0), np.minimum(k_hi, k1 - 1)
        some = (a <= b) & (c <= d) & (b - c >= least) & (a - d <= most)
        inside = (q_lo >= q0) & (q_hi < q1) & (k_lo >= k0) & (k_hi < k1)
        every = inside & (q_lo - k_hi >= least) & (q_hi - k_lo <= most)
        size = len(count)
        may[part] |= np.bincount(box, weights=some, minlength=size) > 0
        must[part] |= np.bincount(box, weights=every, minlength=size) > 0


class _Sorted:
    """Ranges sorted by start, to find a run of them that holds all that meet an interval."""

    def __init__(self, ranges: np.ndarray) -> None:
        self.index = np.argsort(ranges[:, 0], kind="stable")
        self.start = ranges[self.index, 0]
        self.reach = np.maximum.accumulate(ranges[self.index, 1]) if len(ranges) else ranges[:, 1]

    def meeting(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and number of the ranges that may meet each ``[low, high]``."""
        first = np.searchsorted(self.reach, low, side="right")
        count = np.searchsorted(self.start, high, side="right") - first
        return first, np.maximum(count, 0)


def _crossing(ranges: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """``(strips, depth)``: which ranges cross each strip between two edges, padded with their number."""
    first = np.searchsorted(edges, ranges[:, 0], side="right")
    width = np.searchsorted(edges, ranges[:, 1], side="left") + 1 - first
    which = np.repeat(np.arange(len(ranges)), width)
    strip = np.repeat(first, width) + np.arange(len(which)) - np.repeat(np.cumsum(width) - width, width)
    order = np.argsort(strip, kind="stable")
    strip, which = strip[order], which[order]
    count = np.bincount(strip, minlength=len(edges) + 1)
    table = np.full((len(edges) + 1, int(count.max())), len(ranges), dtype=np.int64)
    table[strip, np.arange(len(strip)) - np.repeat(np.cumsum(count) - count, count)] = which
    return table


def _larger(a: Any, b: Any) -> Any:
    return torch.maximum(a, b) if isinstance(a, torch.Tensor) else np.maximum(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return torch.minimum(a, b) if isinstance(a, torch.Tensor) else np.minimum(a, b)
