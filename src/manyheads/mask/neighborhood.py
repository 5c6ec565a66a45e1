"""Neighbourhood masks over 1-, 2- and 3-D grids, and the order of tokens that suits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .base import Box, Coords, Extent, Leaf, Side, _set
from .store import Datum, whole


class Neighborhood(Leaf):
    r"""Every query attends to the window of keys nearest to it on each axis of a grid.

    Tokens are the cells of a grid in row-major order. Axes are independent: a key is visible when it is
    visible on every axis. On one axis of length L with window w, stride s and dilation d, coordinate i lies
    in residue class i mod d at place i' = i // d, among :math:`L_g` cells of that class; keys of other
    classes are invisible, and

    .. math::
        leader &= \min(\lfloor i'/s \rfloor s + \lfloor s/2 \rfloor,\ L_g - 1) \\
        c &= clamp(leader,\ left,\ L_g - 1 - right), \quad left = \lfloor w/2 \rfloor,\ right = w - 1 - left
        \\ visible &= [c - left,\ c + right]

    so at edges the window shifts inward and always holds w keys. On a causal axis the leader is the last of
    its stride group, ``min((i'//s)*s + s - 1, L_g - 1)``, and visible are the keys from ``max(0, leader - w +
    1)`` to i'.

    Stride 1 is neighbourhood attention; stride w with L divisible by w is attention within blocks; w = L is
    full.

    Args:
        shape: Grid shape, 1 to 3 ints (an int stands for one axis).
        window: Keys per axis, at least 2; an int stands for all axes.
        stride: Queries per group that share one window, 1 to window.
        dilation: Distance between neighbours, with ``window * dilation <= shape``.
        causal: Whether a query sees only cells up to its own, per axis.

    Raises:
        TypeError: Not integers.
        ValueError: More than three axes, or an argument out of the ranges above.

    Source:
        Faster Neighborhood Attention (arXiv 2403.04690), Generalized Neighborhood Attention (arXiv
        2504.16922).

    Example:
        >>> from manyheads.mask import Neighborhood
        >>> Neighborhood(5, 3).dense(5)[0, 0].int().tolist()
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
        >>> Neighborhood((4, 6), (3, 3)).dense(24).sum(-1).unique().tolist()
        [9]
    """

    __slots__ = ("_rules", "axes", "causal", "dilation", "grid", "stride", "window")
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    _rules: tuple[_Axis, ...]

    def __init__(
        self,
        shape: int | Sequence[int],
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> None:
        grid = grid_shape(shape)
        n = len(grid)
        window, stride, dilation = (
            per_axis(x, n, what) for x, what in ((window, "window"), (stride, "stride"), (dilation, "dilation"))
        )
        flags = [causal] * n if isinstance(causal, (bool, np.bool_)) else list(causal)
        if len(flags) != n or not all(isinstance(c, (bool, np.bool_)) for c in flags):
            raise ValueError(f"causal: expected a bool or {n} of them, got {causal!r}")
        for length, w, s, d in zip(grid, window, stride, dilation, strict=True):
            if w < 2:
                raise ValueError(f"window: expected at least 2 on every axis, got {window}")
            if s > w:
                raise ValueError(f"stride: expected at most the window {window}, got {stride}")
            if w * d > length:
                raise ValueError(f"window * dilation: expected at most the grid {grid}, got {window} * {dilation}")
        _set(self, "grid", grid)
        _set(self, "window", window)
        _set(self, "stride", stride)
        _set(self, "dilation", dilation)
        _set(self, "causal", tuple(bool(c) for c in flags))
        inner = 1
        rules = []
        for a in reversed(range(n)):
            rules.append(_Axis(grid[a], inner, window[a], stride[a], dilation[a], self.causal[a]))
            inner *= grid[a]
        _set(self, "_rules", tuple(reversed(rules)))
        _set(self, "axes", tuple(dict.fromkeys(axis for rule in rules for axis in rule.names)))
        self._finish((1, 1), ())

    def _write(self, name: Callable[[Datum], str]) -> str:
        text = f"neighborhood({self.grid}, {self.window}"
        for what in ("stride", "dilation", "causal"):
            value = getattr(self, what)
            if any(v != (what != "causal") for v in value):
                text += f", {what}={value}"
        return text + ")"

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """Per axis: the centre of a query's window and the place of a key: the rule reads differences."""
        pos = self._in_range(pos, side)
        found: dict[str, np.ndarray] = {}
        for rule in self._rules:
            found.update(rule.coords(pos, side))
        return found

    def _allows(self, q: Coords, k: Coords) -> Any:
        result = self._rules[0].allows(q, k)
        for rule in self._rules[1:]:
            result = result & rule.allows(q, k)
        return result

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        may, must = self._rules[0].classify(q, k)
        for rule in self._rules[1:]:
            other = rule.classify(q, k)
            may, must = may & other[0], must & other[1]
        return may, must

    def _extents(self) -> tuple[Extent, ...]:
        total = int(np.prod(self.grid, dtype=np.int64))
        return (Extent((0, total), (0, total), None, (total, total)),)


class _Axis:
    """The rule on one axis, over up to three coordinates: residue class, window centre, own place."""

    def __init__(self, length: int, inner: int, window: int, stride: int, dilation: int, causal: bool) -> None:
        self.length, self.inner, self.window = length, inner, window
        self.stride, self.dilation, self.causal = stride, dilation, causal
        self.left = window // 2
        self.right = window - 1 - self.left
        grid = f"{length}/{inner}/{dilation}"
        self.residue = f"residue@{grid}" if dilation > 1 else None
        self.centre = f"centre@{grid}/{window}/{stride}/{int(causal)}"
        self.place = f"place@{grid}" if causal else None

    @property
    def names(self) -> tuple[str, ...]:
        """The coordinates in use."""
        return tuple([name for name in (self.residue, self.centre, self.place) if name is not None])

    def coords(self, pos: np.ndarray, side: Side) -> dict[str, np.ndarray]:
        """Coordinates on this axis; `centre` is the first visible key on a causal axis."""
        at = (pos // self.inner) % self.length
        place, residue = at // self.dilation, at % self.dilation
        found = {} if self.residue is None else {self.residue: residue}
        if self.place is not None:
            found[self.place] = place
        if side == "k":
            found[self.centre] = place
            return found
        last = (self.length - 1 - residue) // self.dilation
        head = place - place % self.stride
        if self.causal:
            found[self.centre] = np.minimum(head + self.stride - 1, last) - (self.window - 1)
        else:
            leader = np.minimum(head + self.stride // 2, last)
            found[self.centre] = np.minimum(np.maximum(leader, self.left), last - self.right)
        return found

    def allows(self, q: Coords, k: Coords) -> Any:
        """Visibility on this axis."""
        ahead = q[self.centre] - k[self.centre]
        if self.place is not None:
            result = (ahead <= 0) & (q[self.place] >= k[self.place])
        else:
            result = (ahead <= self.left) & (ahead >= -self.right)
        return result if self.residue is None else result & (q[self.residue] == k[self.residue])

    def classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        """Visibility of boxes on this axis."""
        least, most = q[self.centre][0] - k[self.centre][1], q[self.centre][1] - k[self.centre][0]
        if self.place is not None:
            may = (least <= 0) & (q[self.place][1] >= k[self.place][0])
            must = (most <= 0) & (q[self.place][0] >= k[self.place][1])
        else:
            may = (least <= self.left) & (most >= -self.right)
            must = (most <= self.left) & (least >= -self.right)
        if self.residue is None:
            return may, must
        (q_lo, q_hi), (k_lo, k_hi) = q[self.residue], k[self.residue]
        return may & (q_hi >= k_lo) & (k_hi >= q_lo), must & (q_lo == k_hi) & (q_hi == k_lo)


def grid_shape(shape: Any) -> tuple[int, ...]:
    """A grid shape of 1 to 3 positive ints."""
    axes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not 1 <= len(axes) <= 3:
        raise ValueError(f"shape: expected 1 to 3 axes, got {shape!r}")
    return tuple(whole(n, "shape", 1) for n in axes)


def per_axis(value: Any, n: int, argument: str) -> tuple[int, ...]:
    """One positive int per axis, from an int for all or a sequence."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(values) != n:
        raise ValueError(f"{argument}: expected an int or {n} of them, got {value!r}")
    return tuple(whole(v, argument, 1) for v in values)


def visible_places(cells: int, window: int, stride: int = 1, causal: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last key that each query sees on one axis, in one residue class.

    Args:
        cells: Cells of the class.
        window, stride, causal: As for :class:`Neighborhood`, on this axis.

    Returns:
        Two int64 arrays ``(cells,)``.

    Example:
        >>> [ends.tolist() for ends in visible_places(5, 3)]
        [[0, 0, 1, 2, 2], [2, 2, 3, 4, 4]]
    """
    place = np.arange(cells, dtype=np.int64)
    head = place - place % stride
    if causal:
        return np.maximum(np.minimum(head + stride - 1, cells - 1) - (window - 1), 0), place
    left = window // 2
    leader = np.minimum(head + stride // 2, cells - 1)
    first = np.minimum(np.maximum(leader - left, 0), cells - window)
    return first, first + window - 1


def grid_permutation(
    shape: int | Sequence[int], tile: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> tuple[np.ndarray, np.ndarray]:
    r"""The order of tokens that makes every box of a grid contiguous.

    Cells are grouped by residue class (with dilation), then cut into boxes of shape ``tile``; whole boxes
    come first, so that box t fills tokens ``t * prod(tile)`` to ``(t + 1) * prod(tile)``, and boxes cut short
    by an edge come after them.

    Args:
        shape: Grid shape, 1 to 3 ints.
        tile: Box shape; an int stands for all axes.
        dilation: Dilation of the neighbourhood; an int stands for all axes.

    Returns:
        ``(order, inverse)``, int64 of length prod(shape): ``x[order]`` is the new order and
        ``x[order][inverse]`` is x. Masks need no change: permute q, k and v and call with ``positions=(order,
        order)``.

    Raises:
        TypeError: Not integers.
        ValueError: More than three axes, or sizes below 1.

    Example:
        >>> from manyheads.mask import grid_permutation
        >>> order, inverse = grid_permutation((2, 4), (2, 2))
        >>> order.tolist(), inverse.tolist()
        ([0, 1, 4, 5, 2, 3, 6, 7], [0, 1, 4, 5, 2, 3, 6, 7])
    """
    grid = grid_shape(shape)
    tiles, steps = per_axis(tile, len(grid), "tile"), per_axis(dilation, len(grid), "dilation")
    cell = np.indices(grid).reshape(len(grid), -1)
    short = np.zeros(cell.shape[1], dtype=bool)
    residue, box, inside = [], [], []
    for at, length, size, step in zip(cell, grid, tiles, steps, strict=True):
        place = at // step
        count = (length - 1 - at % step) // step + 1
        short |= (place // size + 1) * size > count
        residue.append(at % step)
        box.append(place // size)
        inside.append(place % size)
    keys = [short, *residue, *box, *inside]
    order = np.lexsort(keys[::-1]).astype(np.int64)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return order, inverse
