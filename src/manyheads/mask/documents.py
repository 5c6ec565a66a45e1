"""Masks over packed documents: same document, earlier document, the first keys of each document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from .base import Box, Coords, Extent, Leaf, Mask, Side, _set, one_sided
from .store import Datum, integers


class _PerDocument(Leaf):
    """A leaf that looks positions up in document lengths ``(n,)`` or ``(B, n)``."""

    __slots__ = ("_ends", "axes")
    _ends: np.ndarray

    def _measure(self, *lens: Datum) -> tuple[int, int]:
        """Keeps where each document's span ends; a span holds the longer of the two sides."""
        if any(d.array.shape != lens[0].array.shape for d in lens):
            shapes = " and ".join(str(tuple(d.array.shape)) for d in lens)
            raise ValueError(f"k_lens: expected as many documents as q_lens, got shapes {shapes}")
        if lens[0].array.shape[-1] == 0:
            raise ValueError("lens: expected at least one document")
        spans = lens[0].array if len(lens) == 1 else np.maximum(*[d.array for d in lens])
        _set(self, "_ends", np.cumsum(spans, -1))
        return (len(spans) if spans.ndim == 2 else 1), 1

    def _tag(self, *lens: Datum) -> str:
        return "+".join(d.short for d in lens)

    def _extents(self) -> tuple[Extent, ...]:
        totals = np.atleast_2d(self._ends)[:, -1]
        return tuple([Extent((0, int(t)), (0, int(t)), None, (int(t), int(t))) for t in totals])

    def _rank(self, pos: np.ndarray, side: Side) -> np.ndarray:
        self._need_scalar("coords")
        pos = self._in_range(pos, side)
        return np.searchsorted(self._ends, pos, side="right").astype(pos.dtype, copy=False)


def _lens(values: Any, argument: str) -> Datum:
    datum = integers(values, argument)
    return integers(datum.array[0], argument) if datum.array.ndim == 2 and len(datum.array) == 1 else datum


class Document(_PerDocument):
    r"""Tokens attend within their own document of a packed sequence.

    Args:
        q_lens: Document lengths, ``(n,)`` or ``(B, n)``; zeros are legal. They sum to the number of tokens.
        k_lens: Lengths on the key side when they differ (cross attention, continued documents). Document d
            then owns a span of ``max(q_lens[d], k_lens[d])`` positions, both sides end-aligned in it, so
            ``Causal()`` is bottom-right inside each document.

    Raises:
        TypeError: Not integers.
        ValueError: Negative lengths, no document, or sides with different numbers of documents.

    Example:
        >>> from manyheads.mask import Causal, Document
        >>> Document([2, 1]).dense(3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
        >>> (Causal() & Document([1, 2], [3, 2])).dense(3, 5)[0, 0].int().tolist()
        [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    """

    __slots__ = ("_lens",)
    _lens: tuple[Datum, ...]

    def __init__(self, q_lens: Any, k_lens: Any = None) -> None:
        lens: tuple[Datum, ...] = (_lens(q_lens, "q_lens"),)
        if k_lens is not None:
            other = _lens(k_lens, "k_lens")
            lens = lens if other.digest == lens[0].digest else (lens[0], other)
        _set(self, "_lens", lens)
        shape = self._measure(*lens)
        _set(self, "axes", (f"document@{self._tag(*lens)}",))
        self._finish(shape, lens)

    @property
    def q_lens(self) -> np.ndarray:
        """Lengths on the query side, ``(n,)`` or ``(B, n)``."""
        return self._lens[0].array

    @property
    def k_lens(self) -> np.ndarray:
        """Lengths on the key side, ``(n,)`` or ``(B, n)``."""
        return self._lens[-1].array

    @property
    def _sets_positions(self) -> bool:  # type: ignore[override]
        return len(self._lens) > 1

    def _write(self, name: Callable[[Datum], str]) -> str:
        return f"document({', '.join([name(d) for d in self._lens])})"

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        return Document(*[d.array[i:j] for d in self._lens])

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The document of each position."""
        return {self.axes[0]: self._rank(pos, side)}

    def _allows(self, q: Coords, k: Coords) -> Any:
        return q[self.axes[0]] == k[self.axes[0]]

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        (q_lo, q_hi), (k_lo, k_hi) = q[self.axes[0]], k[self.axes[0]]
        return (q_hi >= k_lo) & (k_hi >= q_lo), (q_lo == k_hi) & (q_hi == k_lo)

    def _extents(self) -> tuple[Extent, ...]:
        found = super()._extents()
        if len(self._lens) == 1:
            return found
        sums = [np.atleast_2d(d.array.sum(-1, keepdims=True))[:, 0].tolist() for d in self._lens]
        return tuple([Extent(e.q, e.k, (a, a), (b, b)) for e, a, b in zip(found, *sums, strict=True)])

    def _own_positions(self, nq: int, nk: int) -> tuple[np.ndarray, np.ndarray]:
        self.check(nq, nk)
        sides = []
        for datum in self._lens:
            lens = datum.array
            shift = self._ends - np.cumsum(lens)
            sides.append(np.arange(int(lens.sum()), dtype=np.int64) + np.repeat(shift, lens))
        return sides[0], sides[1]


class Earlier(_PerDocument):
    """Keys of documents strictly before the query's.

    ``Document(lens) | Earlier(lens)`` is causal by document: every document sees itself and all before it.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``.

    Raises:
        TypeError: Not integers.
        ValueError: Negative lengths or no document.

    Example:
        >>> from manyheads.mask import Earlier
        >>> Earlier([1, 2]).dense(3)[0, 0].int().tolist()
        [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    """

    __slots__ = ()

    def __init__(self, lens: Any) -> None:
        datum = _lens(lens, "lens")
        shape = self._measure(datum)
        _set(self, "axes", (f"document@{self._tag(datum)}",))
        self._finish(shape, (datum,))

    def _write(self, name: Callable[[Datum], str]) -> str:
        return f"earlier({name(self._data[0])})"

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        return Earlier(self._data[0].array[i:j])

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The document of each position."""
        return {self.axes[0]: self._rank(pos, side)}

    def _allows(self, q: Coords, k: Coords) -> Any:
        return q[self.axes[0]] > k[self.axes[0]]

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        (q_lo, q_hi), (k_lo, k_hi) = q[self.axes[0]], k[self.axes[0]]
        return q_hi > k_lo, q_lo > k_hi


class Prefix(_PerDocument):
    r"""The first tokens of the sequence, or of every document, on one side.

    .. math:: j - start(j) < length

    where start is 0, or the first position of the key's document when ``lens`` is given. The mask does not
    ask for the same document: combine it with `Document` for that.

    Args:
        length: Number of tokens, or one per batch entry ``(B,)``.
        side: ``"key"``: every query sees the first keys. ``"query"``: the first queries see every key.
        lens: Document lengths, ``(n,)`` or ``(B, n)``, to count from each document's start.

    Raises:
        TypeError: Not integers.
        ValueError: A negative length, an unknown side, or batch sizes that differ.

    Example:
        >>> from manyheads.mask import Causal, Document, Prefix
        >>> (Prefix(2) | Causal()).dense(3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
        >>> (Document([1, 3]) & Prefix(2, lens=[1, 3])).dense(4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    """

    __slots__ = ("_length", "_lens", "_limit", "side")
    side: str
    _length: Datum
    _limit: int  # a plain number, which a compiler can read; of a batch of lengths, never used
    _lens: Datum | None

    def __init__(self, length: Any, side: Literal["key", "query"] = "key", lens: Any = None) -> None:
        if side not in ("key", "query"):
            raise ValueError(f"side: expected 'key' or 'query', got {side!r}")
        datum = integers(length, "length", ndim=(0, 1))
        if datum.array.ndim and datum.array.size == 1:
            datum = integers(datum.array[0], "length", ndim=(0,))
        batch = datum.array.size
        found = None if lens is None else _lens(lens, "lens")
        if found is not None:
            rows = self._measure(found)[0]
            if batch != 1 and rows not in (1, batch):
                raise ValueError(f"lens: expected {batch} rows like length, got {rows}")
            batch = max(batch, rows)
        elif datum.array.size == 0:
            raise ValueError("length: expected at least one length")
        _set(self, "side", side)
        _set(self, "_length", datum)
        _set(self, "_limit", int(datum.array) if datum.array.ndim == 0 else -1)
        _set(self, "_lens", found)
        _set(self, "axes", (side if found is None else f"{side}@{found.short}",))
        self._finish((batch, 1), (datum,) if found is None else _unique(datum, found))

    def _write(self, name: Callable[[Datum], str]) -> str:
        side = "" if self.side == "key" else f", side={self.side!r}"
        lens = "" if self._lens is None else f", lens={name(self._lens)}"
        return f"prefix({name(self._length)}{side}{lens})"

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        length, lens = self._length.array, None if self._lens is None else self._lens.array
        side: Any = self.side
        return Prefix(
            length[i:j] if length.ndim else length,
            side,
            lens[i:j] if lens is not None and lens.ndim == 2 else lens,
        )

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The position, or the place within its document; 0 on the other side."""
        place = np.asarray(pos)
        if self._lens is not None:
            rank = self._rank(pos, side)
            place = place - (self._ends - self._lens.array)[rank].astype(rank.dtype, copy=False)
        return {self.axes[0]: one_sided(place, side, self.side[0])}

    def _allows(self, q: Coords, k: Coords) -> Any:
        return (k if self.side == "key" else q)[self.axes[0]] < self._limit

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        low, high = (k if self.side == "key" else q)[self.axes[0]]
        return low < self._limit, high < self._limit

    def _extents(self) -> tuple[Extent, ...]:
        return () if self._lens is None else super()._extents()


def _unique(a: Datum, b: Datum) -> tuple[Datum, ...]:
    return (a,) if a.digest == b.digest else (a, b)
