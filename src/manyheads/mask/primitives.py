"""Masks that are rules over positions: full, causal, window, sink, periodic, and masks lifted to blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from .base import Box, Coords, Extent, Leaf, Mask, Side, _set, one_sided
from .store import Datum, whole


class Full(Leaf):
    """Every query may attend to every key.

    Example:
        >>> from manyheads.mask import Full
        >>> Full().dense(2, 3)[0, 0].int().tolist()
        [[1, 1, 1], [1, 1, 1]]
    """

    __slots__ = ()
    _one: Full | None = None

    def __new__(cls) -> Full:
        """There is one value of this kind."""
        if cls._one is None:
            self = super().__new__(cls)
            self._finish((1, 1), ())
            cls._one = self
        return cls._one

    def _write(self, name: Callable[[Datum], str]) -> str:
        return "full"

    def _allows(self, q: Coords, k: Coords) -> Any:
        return q["position"] == q["position"]

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        return np.True_, np.True_


class Causal(Leaf):
    r"""A query at position i attends to keys at positions j <= i.

    Positions are logical; by default the last query stands at the last key (bottom-right).

    Example:
        >>> from manyheads.mask import Causal
        >>> Causal().dense(2, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    __slots__ = ()
    _one: Causal | None = None

    def __new__(cls) -> Causal:
        """There is one value of this kind."""
        if cls._one is None:
            self = super().__new__(cls)
            self._finish((1, 1), ())
            cls._one = self
        return cls._one

    def _write(self, name: Callable[[Datum], str]) -> str:
        return "causal"

    def _allows(self, q: Coords, k: Coords) -> Any:
        return q["position"] >= k["position"]

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        (q_lo, q_hi), (k_lo, k_hi) = q["position"], k["position"]
        return q_hi >= k_lo, q_lo >= k_hi


class Window(Leaf):
    r"""A query at position i attends to keys at positions j near it.

    .. math:: \text{Window}(W): |i - j| < W \qquad \text{Window}(left=a, right=b): -b < i - j < a

    Args:
        width: Both reaches at once; self counts, so ``Causal() & Window(W)`` sees W keys and ``Window(W)``
            sees 2W - 1.
        left: Keys seen at and before the query, self included; None for no limit.
        right: Keys seen at and after the query, self included; None for no limit.

    Raises:
        TypeError: Not integers.
        ValueError: A reach below 1, or ``width`` together with ``left`` or ``right``.

    Conventions:
        Elsewhere a window of w often means w neighbours without self, or w keys in all: see
        `manyheads.mask.from_flash_window`, `from_hf_window` and `from_natten`.

    Example:
        >>> from manyheads.mask import Window
        >>> Window(2).dense(4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
        >>> Window(left=3, right=1).dense(4)[0, 0].sum(-1).tolist()
        [1, 2, 3, 3]
    """

    __slots__ = ("left", "right")
    left: int | None
    right: int | None

    def __init__(self, width: int | None = None, *, left: int | None = None, right: int | None = None) -> None:
        if width is not None:
            if left is not None or right is not None:
                raise ValueError("window: give width alone, or left and right")
            left = right = whole(width, "width", 1)
        else:
            if left is None and right is None:
                raise ValueError("window: expected a width, or left= or right=")
            left = None if left is None else whole(left, "left", 1)
            right = None if right is None else whole(right, "right", 1)
        _set(self, "left", left)
        _set(self, "right", right)
        self._finish((1, 1), ())

    def _write(self, name: Callable[[Datum], str]) -> str:
        if self.left == self.right:
            return f"window({self.left})"
        sides = [f"{side}={n}" for side, n in (("left", self.left), ("right", self.right)) if n is not None]
        return f"window({', '.join(sides)})"

    def _allows(self, q: Coords, k: Coords) -> Any:
        ahead = q["position"] - k["position"]
        if self.right is None:
            return ahead < self.left
        if self.left is None:
            return ahead > -self.right
        return (ahead < self.left) & (ahead > -self.right)

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        (q_lo, q_hi), (k_lo, k_hi) = q["position"], k["position"]
        least, most = q_lo - k_hi, q_hi - k_lo
        may: Any = np.True_
        must: Any = np.True_
        if self.left is not None:
            may, must = may & (least < self.left), must & (most < self.left)
        if self.right is not None:
            may, must = may & (most > -self.right), must & (least > -self.right)
        return may, must


class Sink(Leaf):
    """Every query attends to the first keys, at positions j < n.

    Args:
        n: Number of keys.

    Raises:
        TypeError: Not an integer.
        ValueError: ``n`` below 0.

    Example:
        >>> from manyheads.mask import Causal, Sink, Window
        >>> (Causal() & (Window(2) | Sink(1))).dense(4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """

    __slots__ = ("n",)
    n: int
    axes = ("key",)

    def __init__(self, n: int) -> None:
        _set(self, "n", whole(n, "n", 0))
        self._finish((1, 1), ())

    def _write(self, name: Callable[[Datum], str]) -> str:
        return f"sink({self.n})"

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The position of keys; 0 for queries, whose place does not matter."""
        return {"key": one_sided(np.asarray(pos), side, "k")}

    def _allows(self, q: Coords, k: Coords) -> Any:
        return k["key"] < self.n

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        k_lo, k_hi = k["key"]
        return k_lo < self.n, k_hi < self.n


class Periodic(Leaf):
    r"""Keys at regular distances.

    .. math:: (i - j) \bmod stride = offset \bmod stride

    Args:
        stride: The period, at least 1.
        offset: The phase.
        of: What is counted: ``"difference"`` i - j, or the position of the ``"key"`` or of the ``"query"``
            alone.

    Raises:
        TypeError: Not integers.
        ValueError: ``stride`` below 1, or an unknown ``of``.

    Example:
        >>> from manyheads.mask import Periodic
        >>> Periodic(2).dense(3)[0, 0].int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
        >>> Periodic(3, 2, of="key").dense(1, 6)[0, 0].int().tolist()
        [[0, 0, 1, 0, 0, 1]]
    """

    __slots__ = ("axes", "of", "offset", "stride")
    stride: int
    offset: int
    of: str

    def __init__(self, stride: int, offset: int = 0, of: Literal["difference", "key", "query"] = "difference") -> None:
        if of not in ("difference", "key", "query"):
            raise ValueError(f"of: expected 'difference', 'key' or 'query', got {of!r}")
        stride = whole(stride, "stride", 1)
        _set(self, "stride", stride)
        _set(self, "offset", whole(offset, "offset") % stride)
        _set(self, "of", of)
        _set(self, "axes", ("position" if of == "difference" else of,))
        self._finish((1, 1), ())

    def _write(self, name: Callable[[Datum], str]) -> str:
        rest = f", {self.offset}" if self.offset else ""
        return f"periodic({self.stride}{rest}" + (")" if self.of == "difference" else f", of={self.of!r})")

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The position; 0 on the side that is not counted."""
        pos = np.asarray(pos)
        return {self.axes[0]: pos if self.of == "difference" else one_sided(pos, side, self.of[0])}

    def _allows(self, q: Coords, k: Coords) -> Any:
        if self.of == "difference":
            return (q["position"] - k["position"] - self.offset) % self.stride == 0
        return ((k if self.of == "key" else q)[self.of] - self.offset) % self.stride == 0

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        if self.of == "difference":
            least, most = q["position"][0] - k["position"][1], q["position"][1] - k["position"][0]
        else:
            least, most = (k if self.of == "key" else q)[self.of]
        hits = (most - self.offset) // self.stride - (least - self.offset - 1) // self.stride
        return hits > 0, hits == most - least + 1


class Block(Leaf):
    r"""Lifts a mask from tokens to blocks of tokens.

    .. math:: \text{Block}(m, s)(i, j) = m(\lfloor i/s \rfloor, \lfloor j/s \rfloor)

    Args:
        inner: The mask over blocks; its documents and block maps count blocks.
        size: Tokens per block; blocks begin at position 0.

    Raises:
        TypeError: ``inner`` is not a mask, or ``size`` not an integer.
        ValueError: ``size`` below 1, or an inner mask that sets its own positions.

    Example:
        >>> from manyheads.mask import Block, Causal
        >>> Block(Causal(), 2).dense(4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    __slots__ = ("_prefix", "axes", "inner", "keyed", "relative", "size")
    inner: Mask
    size: int
    _prefix: str

    def __init__(self, inner: Mask, size: int) -> None:
        if not isinstance(inner, Mask):
            raise TypeError(f"inner: expected a mask, got {type(inner).__name__}")
        size = whole(size, "size", 1)
        leaves = inner.leaves()
        if any(leaf._sets_positions for leaf in leaves):
            raise ValueError("block: documents with different query and key lengths cannot be lifted to blocks")
        prefix = f"block{size}/"
        _set(self, "inner", inner)
        _set(self, "size", size)
        _set(self, "_prefix", prefix)
        _set(self, "axes", tuple(dict.fromkeys(prefix + axis for leaf in leaves for axis in leaf.axes)))
        _set(self, "relative", all(leaf.relative for leaf in leaves))
        _set(self, "keyed", all(leaf.keyed for leaf in leaves))
        self._finish(inner.shape, inner._data)

    def _children(self) -> tuple[Mask, ...]:
        return (self.inner,)

    def _write(self, name: Callable[[Datum], str]) -> str:
        return f"block({self.inner._write(name)}, {self.size})"

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        return Block(self.inner._narrow(axis, i, j), self.size)

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """See `Mask.coords`; names carry the block size in front."""
        found = self.inner.coords(np.asarray(pos) // self.size, side, -(-size // self.size))
        return {self._prefix + name: values for name, values in found.items()}

    def _inside(self, record: Mapping[str, Any]) -> dict[str, Any]:
        cut = len(self._prefix)
        return {axis[cut:]: record[axis] for axis in self.axes}

    def _allows(self, q: Coords, k: Coords) -> Any:
        return self.inner._allows(self._inside(q), self._inside(k))

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        return self.inner._classify(self._inside(q), self._inside(k))

    def _extents(self) -> tuple[Extent, ...]:
        return tuple([self._scaled(e) for leaf in self.inner.leaves() for e in leaf._extents()])

    def _scaled(self, extent: Extent) -> Extent:
        s = self.size
        q, k = ((low * s, high * s) for low, high in (extent.q, extent.k))
        nq, nk = (None if n is None else ((n[0] - 1) * s + 1, n[1] * s) for n in (extent.nq, extent.nk))
        return Extent((q[0], q[1]), (k[0], k[1]), nq, nk)
