"""Masks given as bits: a boolean matrix, and a boolean map of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .base import Box, Coords, Extent, Leaf, Mask, Side, _set
from .store import INLINE_LIMIT, Datum, Lookup, integers, intern, to_array, whole

_CELLS = 2**20


class _Bitmap(Leaf):
    """Bits ``(B, H, rows, columns)``, packed along columns, looked up by row and column coordinates."""

    __slots__ = ("_bits", "_columns", "_sums", "_table", "axes")
    keyed = False
    relative = False
    _bits: Datum
    _columns: int
    _sums: _Sums | None
    _table: Lookup | None

    def _keep(self, bits: Datum, columns: int) -> None:
        _set(self, "_bits", bits)
        _set(self, "_columns", columns)
        _set(self, "_sums", None)
        _set(self, "_table", None)

    @property
    def _dims(self) -> tuple[int, int, int, int]:
        b, h, rows, _ = self._bits.array.shape
        return b, h, rows, self._columns

    def bits(self) -> np.ndarray:
        """The bits, bool ``(B, H, rows, columns)``, unpacked into new memory."""
        return np.unpackbits(self._bits.array, axis=-1, count=self._columns, bitorder="little").view(bool)

    def _part(self, axis: int, i: int, j: int) -> Datum:
        array = self._bits.array[i:j] if axis == 0 else self._bits.array[:, i:j]
        return intern(np.ascontiguousarray(array))

    def _literal(self) -> str:
        """The bits as text when small, otherwise what they are."""
        shape = [n for n in self._dims if n] if self._dims[:2] != (1, 1) else list(self._dims[2:])
        if np.prod(self._dims) <= INLINE_LIMIT:
            return repr(self.bits().astype(int).reshape(shape).tolist())
        return f"<abbreviated: {'x'.join(map(str, shape))} bits #{self._bits.short}>"

    def _allows(self, q: Coords, k: Coords) -> Any:
        return self._unpacked()[q[self.axes[0]], k[self.axes[0]]]

    def _unpacked(self) -> Lookup:
        table = self._table
        if table is None:
            table = Lookup(self.bits()[0, 0])
            _set(self, "_table", table)
        return table

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        sums = self._sums
        if sums is None:
            sums = _Sums(self._unpacked().array)
            _set(self, "_sums", sums)
        return sums.classify(q[self.axes[0]], k[self.axes[0]])


class _Sums:
    """Summed tables over square cells of a bit matrix: any and all over a box in constant time."""

    def __init__(self, bits: np.ndarray) -> None:
        cell = 1
        while bits.size > _CELLS * cell * cell:
            cell *= 2
        self.cell = cell
        if cell == 1:
            some = every = bits
        else:
            cuts = [np.arange(0, n, cell) for n in bits.shape]
            some = np.logical_or.reduceat(np.logical_or.reduceat(bits, cuts[1], axis=1), cuts[0], axis=0)
            every = np.logical_and.reduceat(np.logical_and.reduceat(bits, cuts[1], axis=1), cuts[0], axis=0)
        self.some, self.every = _summed(some), _summed(every)

    def classify(self, rows: tuple[Any, Any], columns: tuple[Any, Any]) -> tuple[Any, Any]:
        """``(may, must)`` of boxes of rows and columns."""
        a, b, c, d = (np.asarray(x) // self.cell for x in (*rows, *columns))
        b, d = b + 1, d + 1

        def total(table: np.ndarray) -> np.ndarray:
            return table[b, d] - table[a, d] - table[b, c] + table[a, c]

        return total(self.some) > 0, total(self.every) == (b - a) * (d - c)


def _summed(bits: np.ndarray) -> np.ndarray:
    out = np.zeros((bits.shape[0] + 1, bits.shape[1] + 1), dtype=np.int32)
    np.cumsum(bits, axis=0, dtype=np.int32, out=out[1:, 1:])
    np.cumsum(out[1:, 1:], axis=1, out=out[1:, 1:])
    return out


def _packed(values: Any, argument: str, low: int) -> tuple[Datum, int]:
    """Booleans (or zeros and ones) as packed bits ``(B, H, rows, ceil(columns / 8))``, and the columns."""
    array = to_array(values, argument)
    kind = array.dtype.kind
    if kind not in "biu" or (kind != "b" and array.size and (array.min() < 0 or array.max() > 1)):
        what = f"{array.dtype} beyond 0 and 1" if kind in "iu" else str(array.dtype)
        raise TypeError(f"{argument}: expected booleans, got {what}")
    if not low <= array.ndim <= 4:
        raise ValueError(f"{argument}: expected {low}-D to 4-D, got shape {tuple(array.shape)}")
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if array.size == 0:
        raise ValueError(f"{argument}: expected at least one bit, got shape {tuple(array.shape)}")
    return intern(np.packbits(array.astype(bool, copy=False), axis=-1, bitorder="little")), array.shape[-1]


def _unpacked_arguments(packed: Any, meta: Any) -> tuple[Datum, list[int]]:
    """Reads back the packed form that canonical text refers to."""
    bits = intern(to_array(packed, "packed"))
    if bits.array.dtype != np.uint8 or bits.array.ndim != 4:
        got = f"{bits.array.dtype} {bits.array.shape}"
        raise ValueError(f"packed: expected uint8 (B, H, rows, bytes), got {got}")
    return bits, integers(meta, "meta", ndim=(1,), low=None).array.tolist()


class Dense(_Bitmap):
    """A boolean matrix, for masks without a rule.

    Args:
        allowed: Booleans, or zeros and ones, ``(Nq, Nk)``, ``(H, Nq, Nk)`` or ``(B, H, Nq, Nk)``, on any
            device; True where attention is allowed. Sizes 1 of B and H broadcast.

    Raises:
        TypeError: Not booleans.
        ValueError: Fewer than two or more than four axes, or no bits.

    Conventions:
        Rows are queries end-aligned with the keys: row ``r`` is position ``r + Nk - Nq``, as by default
        everywhere. It costs its area; a rule or a `BlockMap` does not.

    Example:
        >>> import torch
        >>> from manyheads.mask import Dense
        >>> Dense(torch.eye(2, dtype=torch.bool))
        dense([[1, 0], [0, 1]])
    """

    __slots__ = ()

    def __init__(self, allowed: Any) -> None:
        self._setup(*_packed(allowed, "allowed", 2))

    def _setup(self, bits: Datum, columns: int) -> None:
        self._keep(bits, columns)
        b, h, rows, _ = self._dims
        _set(self, "axes", (f"bit@{rows}x{columns}",))
        self._finish((b, h), (bits, integers([columns], "meta")))

    @classmethod
    def read(cls, allowed: Any = None, *, packed: Any = None, meta: Any = None) -> Dense:
        """Builds the mask from what `parse` found in text."""
        if packed is None:
            return cls(allowed)
        bits, (columns,) = _unpacked_arguments(packed, meta)
        return _bare(cls, bits, columns)

    def _write(self, name: Callable[[Datum], str]) -> str:
        if name is Datum.literal:
            return f"dense({self._literal()})"
        return f"dense(packed={name(self._data[0])}, meta={name(self._data[1])})"

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        return _bare(Dense, self._part(axis, i, j), self._columns)

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The row of a query, the column of a key."""
        pos = self._in_range(pos, side)
        return {self.axes[0]: pos if side == "k" else pos - (self._columns - self._dims[2])}

    def _extents(self) -> tuple[Extent, ...]:
        rows, columns = self._dims[2:]
        return (Extent((columns - rows, columns), (0, columns), None, (columns, columns)),)


class BlockMap(_Bitmap):
    """A boolean map of blocks: a query block attends to a key block entirely or not at all.

    Args:
        map: Booleans ``(Tq, Tk)``, ``(H, Tq, Tk)`` or ``(B, H, Tq, Tk)``; sizes 1 of B and H broadcast.
        block: Tokens per block, an int or ``(query, key)``. The last block may be shorter.
        q_sizes: Tokens of each query block ``(Tq,)``, instead of ``block``.
        k_sizes: Tokens of each key block ``(Tk,)``, instead of ``block``.
        q_len: Number of queries, when the last block is shorter and queries and keys differ in number.
        k_len: Number of keys, likewise.

    Raises:
        TypeError: Not booleans, or not integers.
        ValueError: Sizes that do not match the map, or neither or both of ``block`` and sizes.

    Conventions:
        Queries are end-aligned with the keys, as by default everywhere.

    Example:
        >>> from manyheads.mask import BlockMap
        >>> BlockMap([[1, 0], [1, 1]], block=2).dense(4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        >>> BlockMap([[1, 0]], q_sizes=[2], k_sizes=[1, 2]).dense(2, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 0, 0]]
    """

    __slots__ = ("_ends", "_lens", "_sizes", "block")
    block: tuple[int, int] | None
    _sizes: tuple[Datum, Datum] | None
    _lens: tuple[int | None, int | None]
    _ends: tuple[np.ndarray, np.ndarray] | None

    def __init__(
        self,
        map: Any,
        block: int | tuple[int, int] | None = None,
        *,
        q_sizes: Any = None,
        k_sizes: Any = None,
        q_len: int | None = None,
        k_len: int | None = None,
    ) -> None:
        bits, columns = _packed(map, "map", 2)
        given = ((q_len, "q_len"), (k_len, "k_len"))
        lens = tuple(-1 if n is None else whole(n, what, 0) for n, what in given)
        if (block is None) == (q_sizes is None and k_sizes is None):
            raise ValueError("block_map: give block, or q_sizes and k_sizes")
        sizes = None
        if block is None:
            if q_sizes is None or k_sizes is None or lens != (-1, -1):
                raise ValueError("block_map: expected both q_sizes and k_sizes, without q_len and k_len")
            sizes = (integers(q_sizes, "q_sizes", ndim=(1,)), integers(k_sizes, "k_sizes", ndim=(1,)))
        self._setup(bits, columns, None if block is None else _pair(block), sizes, lens)

    def _setup(
        self,
        bits: Datum,
        columns: int,
        block: tuple[int, int] | None,
        sizes: tuple[Datum, Datum] | None,
        lens: tuple[int, ...],
    ) -> None:
        self._keep(bits, columns)
        b, h, rows, _ = self._dims
        if sizes is not None:
            for datum, count, what in zip(sizes, (rows, columns), ("q_sizes", "k_sizes"), strict=True):
                if len(datum.array) != count:
                    raise ValueError(f"{what}: expected {count} sizes, got {len(datum.array)}")
        if block is not None:
            for n, count, size, what in zip(lens, (rows, columns), block, ("q_len", "k_len"), strict=True):
                if n >= 0 and not (count - 1) * size < n <= count * size:
                    range_ = f"{(count - 1) * size + 1}..{count * size}"
                    raise ValueError(f"{what}: {count} blocks of {size} hold {range_} tokens, got {n}")
        _set(self, "block", block)
        _set(self, "_sizes", sizes)
        _set(self, "_ends", None if sizes is None else tuple(np.cumsum(d.array) for d in sizes))
        _set(self, "_lens", tuple(None if n < 0 else n for n in lens))
        meta = integers([columns, *lens], "meta", low=None)
        data = {datum.digest: datum for datum in (bits, meta, *(sizes or ()))}
        form = f"{block}{rows}x{columns}{lens}" if sizes is None else "+".join(d.short for d in sizes)
        _set(self, "axes", (f"block@{form}",))
        self._finish((b, h), tuple(data.values()))

    @classmethod
    def read(cls, *args: Any, packed: Any = None, meta: Any = None, **kwargs: Any) -> BlockMap:
        """Builds the mask from what `parse` found in text."""
        if packed is None:
            return cls(*args, **kwargs)
        bits, (columns, *lens) = _unpacked_arguments(packed, meta)
        block = kwargs.get("block")
        sizes = None
        if block is None:
            q, k = (integers(kwargs[name], name, ndim=(1,)) for name in ("q_sizes", "k_sizes"))
            sizes = (q, k)
        return _bare(cls, bits, columns, None if block is None else _pair(block), sizes, tuple(lens))

    def _write(self, name: Callable[[Datum], str]) -> str:
        if self._sizes is not None:
            rest = f"q_sizes={name(self._sizes[0])}, k_sizes={name(self._sizes[1])}"
        else:
            bq, bk = self.block or (1, 1)
            rest = f"block={bq}" if bq == bk else f"block={self.block}"
        if name is not Datum.literal:
            return f"block_map(packed={name(self._bits)}, meta={name(self._meta())}, {rest})"
        for what, n in zip(("q_len", "k_len"), self._lens, strict=True):
            rest += f", {what}={n}" if n is not None else ""
        return f"block_map({self._literal()}, {rest})"

    def _meta(self) -> Datum:
        return integers([self._columns, *(-1 if n is None else n for n in self._lens)], "meta", low=None)

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        lens = tuple(-1 if n is None else n for n in self._lens)
        return _bare(BlockMap, self._part(axis, i, j), self._columns, self.block, self._sizes, lens)

    def _totals(self) -> tuple[int, int]:
        if self._ends is not None:
            return int(self._ends[0][-1]), int(self._ends[1][-1])
        bq, bk = self.block or (1, 1)
        q, k = self._lens
        return (self._dims[2] * bq if q is None else q), (self._columns * bk if k is None else k)

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """The block of each position."""
        pos = self._in_range(pos, side)
        q, k = self._totals()
        place = pos if side == "k" else pos - (k - q)
        n = "qk".index(side)
        if self._ends is not None:
            return {self.axes[0]: np.searchsorted(self._ends[n], place, side="right")}
        return {self.axes[0]: place // (self.block or (1, 1))[n]}

    def _extents(self) -> tuple[Extent, ...]:
        q, k = self._totals()
        if self._ends is not None or self._lens[1] is not None:
            least = k
        else:
            least = k - (self.block or (1, 1))[1] + 1
        return (Extent((k - q, k), (0, k), None, (least, k)),)

    def _fits(self, side: Side, extent: Extent, nq: int, nk: int, pos: Any, default: bool) -> None:
        """Refuses a call whose alignment the map leaves open."""
        super()._fits(side, extent, nq, nk, pos, default)
        q, k = self._totals()
        if side == "q" and pos is None and default and self.block is not None and None in self._lens:
            ragged = (self._dims[2] - 1) * self.block[0] < nq < q
            if nk - nq != k - q and (nk != k or ragged):
                raise ValueError(
                    f"mask: block_map covers {q} queries and {k} keys, the call has {nq} and {nk}: "
                    "where its rows lie is open; give q_len and k_len"
                )


def _pair(block: Any) -> tuple[int, int]:
    if isinstance(block, (tuple, list)):
        if len(block) != 2:
            raise ValueError(f"block: expected an int or (query, key), got {block!r}")
        return whole(block[0], "block", 1), whole(block[1], "block", 1)
    return whole(block, "block", 1), whole(block, "block", 1)


def _bare(cls: type[Dense] | type[BlockMap], *arguments: Any) -> Any:
    mask: Any = object.__new__(cls)
    mask._setup(*arguments)
    return mask
