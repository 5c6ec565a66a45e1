"""What a mask is: an immutable value that says which query may attend to which key."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn

import numpy as np
import torch

from .store import Datum

if TYPE_CHECKING:
    from .layout import TileLayout

Side = Literal["q", "k"]
Coords = Mapping[str, Any]
Box = Mapping[str, tuple[np.ndarray, np.ndarray]]
Positions = tuple[Any, Any]
MAX_DENSE = 2**36
_CHUNK_PAIRS = 2**21
_set = object.__setattr__
live: weakref.WeakValueDictionary[tuple[str, tuple[int, ...]], Mask] = weakref.WeakValueDictionary()


class Extent(NamedTuple):
    """What a data-indexed leaf covers: half-open ranges of positions, and token counts (least, most)."""

    q: tuple[int, int]
    k: tuple[int, int]
    nq: tuple[int, int] | None
    nk: tuple[int, int] | None


class Mask:
    """Which query may attend to which key: a structure (text) and its data (tensors).

    Masks are values: immutable, hashable, picklable, equal when structure and data are equal. They combine
    with ``&``, ``|`` and ``~``. All work happens on the host, on named integer coordinates of logical
    positions.

    Attributes:
        shape: ``(B|1, H|1)``; ``(1, 1)`` for a mask that is the same for every batch entry and head.
        text: The canonical structure with the data as ``$0``, ``$1``...; `manyheads.mask.parse` reads it.
        data: The data, CPU tensors (int64, or uint8 for packed bits), never written again.

    Example:
        >>> from manyheads.mask import Causal, Document, Window
        >>> m = Causal() & (Window(2) | Document([2, 2]))
        >>> m.text
        'causal & (window(2) | document($0))'
        >>> m
        causal & (window(2) | document([2, 2]))
        >>> m.dense(4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    __slots__ = ("__weakref__", "_data", "_hash", "_key", "_leaves", "_scalars", "data", "shape", "text")

    shape: tuple[int, int]
    text: str
    data: tuple[torch.Tensor, ...]
    _data: tuple[Datum, ...]
    _key: tuple[str, tuple[bytes, ...]]
    _hash: int
    _leaves: tuple[Leaf, ...] | None
    _scalars: dict[tuple[int, int], Mask] | None

    def _finish(self, shape: tuple[int, int], data: tuple[Datum, ...], text: str | None = None) -> None:
        """Freezes the value once the subclass has set its own fields."""
        _set(self, "_data", data)
        if data:
            index = {datum.digest: f"${i}" for i, datum in enumerate(data)}
            text = self._write(lambda datum: index[datum.digest])
        elif text is None:
            text = self._write(Datum.literal)
        key = (text, tuple([datum.digest for datum in data]))
        tensors = tuple([datum.tensor for datum in data])
        _set(self, "shape", shape)
        _set(self, "text", text)
        _set(self, "data", tensors)
        _set(self, "_key", key)
        _set(self, "_hash", hash(key))
        _set(self, "_leaves", None)
        _set(self, "_scalars", None)
        if data:
            live[text, tuple([id(t) for t in tensors])] = self

    # What a kind of mask defines

    def _write(self, name: Callable[[Datum], str]) -> str:
        """The structure as text, each datum written by ``name``."""
        raise NotImplementedError

    def _children(self) -> tuple[Mask, ...]:
        """The masks that this one is made of."""
        return ()

    def _allows(self, q: Coords, k: Coords) -> Any:
        """`allows` without the final broadcast; works on numpy arrays and on torch tensors alike."""
        raise NotImplementedError

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        """`classify` without the final broadcast."""
        raise NotImplementedError

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        """This mask for batch entries (axis 0) or heads (axis 1) ``i`` to ``j``; never called on size one."""
        raise NotImplementedError

    # Algebra

    def __and__(self, other: Mask) -> Mask:
        """Allowed by both."""
        if not isinstance(other, Mask):
            return NotImplemented
        from .algebra import both

        return both(self, other)

    def __or__(self, other: Mask) -> Mask:
        """Allowed by either."""
        if not isinstance(other, Mask):
            return NotImplemented
        from .algebra import either

        return either(self, other)

    def __invert__(self) -> Mask:
        """Allowed where this mask is not; rows and columns beyond the sequence stay invisible."""
        from .algebra import negated

        return negated(self)

    def __eq__(self, other: object) -> bool:
        """Same structure and same data."""
        if self is other:
            return True
        if not isinstance(other, Mask):
            return NotImplemented
        return self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        """Computed once, at construction."""
        return self._hash

    def __repr__(self) -> str:
        """Text that parses back to this mask (large bitmaps are abbreviated, and say so)."""
        return self._write(Datum.literal)

    def __bool__(self) -> NoReturn:
        """A mask has no truth value: ``and``, ``or`` and ``not`` would silently drop a part."""
        raise TypeError("a mask has no truth value: combine with &, | and ~, compare with `is None` or ==")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"masks are immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"masks are immutable: cannot delete {name!r}")

    def __copy__(self) -> Mask:
        """An immutable value is its own copy."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        """An immutable value is its own copy."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as text, data and the functions of predicates."""
        from .text import restore

        named: Iterator[Any] = (node for node in self.walk() if hasattr(node, "token"))
        functions = {node.token: node.fn for node in named}
        return restore, (self.text, self.data, functions)

    # Structure

    def walk(self) -> Iterator[Mask]:
        """Every node, parents before children."""
        yield self
        for child in self._children():
            yield from child.walk()

    def leaves(self) -> tuple[Leaf, ...]:
        """The distinct primitives, in the order of the text."""
        kept = self._leaves
        if kept is None:
            found: dict[Leaf, None] = {}
            for child in self._children():
                found.update(dict.fromkeys(child.leaves()))
            kept = tuple(found)
            _set(self, "_leaves", kept)
        return kept

    def at(self, b: int, h: int) -> Mask:
        """The scalar mask of one batch entry and head.

        Raises:
            ValueError: ``b`` or ``h`` beyond the mask's shape.
        """
        if self.shape == (1, 1):
            return self
        kept = self._scalars
        if kept is None:
            kept = {}
            _set(self, "_scalars", kept)
        place = (b if self.shape[0] > 1 else 0, h if self.shape[1] > 1 else 0)
        found = kept.get(place)
        if found is None:
            found = kept[place] = self.batch(place[0], place[0] + 1).heads(place[1], place[1] + 1)
        return found

    def batch(self, i: int, j: int) -> Mask:
        """The mask of batch entries ``i`` to ``j`` (exclusive); itself when it does not depend on them."""
        return self._narrow(0, i, j)

    def heads(self, i: int, j: int) -> Mask:
        """The mask of heads ``i`` to ``j`` (exclusive); itself when it does not depend on them."""
        return self._narrow(1, i, j)

    def _narrow(self, axis: int, i: int, j: int) -> Mask:
        size = self.shape[axis]
        if size == 1:
            return self
        if not 0 <= i < j <= size:
            what = ("batch", "heads")[axis]
            raise ValueError(f"{what}: expected 0 <= i < j <= {size} of shape {self.shape}, got {i}, {j}")
        return self if j - i == size else self._slice(axis, i, j)

    # Meaning

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """Named integer coordinates of logical positions.

        Args:
            pos: Integer positions of any shape.
            side: ``"q"`` or ``"k"``.
            size: The number of tokens on that side in the call.

        Returns:
            One array of the shape of ``pos`` per coordinate; equal coordinates of several leaves appear once.

        Raises:
            ValueError: A position outside the mask's data, or a mask that differs between batch entries or
                heads.
        """
        self._need_scalar("coords")
        found: dict[str, np.ndarray] = {}
        for leaf in self.leaves():
            if any(axis not in found for axis in leaf.axes):
                found.update(leaf.coords(pos, side, size))
        return found

    def allows(self, q: Coords, k: Coords) -> np.ndarray:
        """Whether each query may attend to each key, exactly.

        Args:
            q: Coordinates of queries, as `coords` returns them, in any shape.
            k: Coordinates of keys, in a shape that broadcasts with it.

        Returns:
            Booleans in the broadcast shape (possibly a read-only view).
        """
        self._need_scalar("allows")
        shape = np.broadcast_shapes(*(np.shape(a) for record in (q, k) for a in record.values()))
        return np.broadcast_to(self._allows(q, k), shape)

    def classify(self, q: Box, k: Box) -> tuple[np.ndarray, np.ndarray]:
        """What is known about all pairs of two boxes of coordinates, conservatively.

        Args:
            q: Inclusive bounds ``(lo, hi)`` per coordinate of the queries, arrays of any shape.
            k: The same of the keys, in a shape that broadcasts with it.

        Returns:
            ``(may, must)`` in the broadcast shape: no pair is allowed where ``may`` is False, every pair
            where ``must`` is True.
        """
        self._need_scalar("classify")
        shape = np.broadcast_shapes(*(np.shape(a) for box in (q, k) for pair in box.values() for a in pair))
        may, must = self._classify(q, k)
        return np.broadcast_to(may, shape), np.broadcast_to(must, shape)

    def _need_scalar(self, what: str) -> None:
        if self.shape != (1, 1):
            raise ValueError(f"{what}: mask of shape (batch, heads) = {self.shape}; take mask.at(b, h) first")

    # Positions

    def default_positions(self, nq: int, nk: int) -> tuple[np.ndarray, np.ndarray]:
        """Logical positions when the caller gives none.

        ``k_pos = arange(nk)`` and ``q_pos = arange(nk - nq, nk)``, unless a `Document` with two sets of
        lengths sets them: then both sides are end-aligned inside each document.

        Returns:
            ``(q_pos, k_pos)``, int64 of shapes ``(nq,)`` and ``(nk,)``; with a leading batch axis when
            documents differ between batch entries.

        Raises:
            ValueError: Documents that do not sum to ``nq`` and ``nk``, or two leaves that disagree.
        """
        if not any(leaf._sets_positions for leaf in self.leaves()):
            return np.arange(nk - nq, nk, dtype=np.int64), np.arange(nk, dtype=np.int64)
        if self.shape == (1, 1):
            own = [leaf._own_positions(nq, nk) for leaf in self.leaves() if leaf._sets_positions]
            if any(not _same(own[0], other) for other in own[1:]):
                raise ValueError("documents with different query and key lengths disagree on positions")
            return own[0]
        rows = []
        for b in range(self.shape[0]):
            found = [self.at(b, h).default_positions(nq, nk) for h in range(self.shape[1])]
            if any(not _same(found[0], other) for other in found[1:]):
                raise ValueError("heads disagree about the positions: give positions=(q_pos, k_pos)")
            rows.append(found[0])
        if all(_same(rows[0], other) for other in rows[1:]):
            return rows[0]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def check(self, nq: int, nk: int, q_pos: Any = None, k_pos: Any = None) -> None:
        """Raises unless the mask fits a call.

        Args:
            nq: Number of queries.
            nk: Number of keys.
            q_pos: Logical positions ``(nq,)`` or ``(B, nq)``, or None for the default.
            k_pos: Logical positions ``(nk,)`` or ``(B, nk)``, or None for the default.

        Raises:
            ValueError: A mask of another length, documents that do not sum, positions out of range.
        """
        for side, pos, n in (("q_pos", q_pos, nq), ("k_pos", k_pos, nk)):
            if pos is not None and np.shape(pos)[-1:] != (n,):
                raise ValueError(f"{side}: expected (..., {n}) positions, got shape {tuple(np.shape(pos))}")
        for leaf in self.leaves():
            extents = leaf._extents()
            for row, extent in enumerate(extents):
                default = q_pos is None and k_pos is None
                leaf._fits("k", extent, nq, nk, _row(k_pos, row, len(extents)), default)
                leaf._fits("q", extent, nq, nk, _row(q_pos, row, len(extents)), default)

    # Forms

    def tiles(
        self,
        nq: int,
        nk: int | None = None,
        *,
        tile: tuple[int, int] = (128, 128),
        positions: Positions | None = None,
        batch: int = 1,
        heads: int = 1,
    ) -> TileLayout:
        """Compiles the mask to the tiles that engines visit.

        Args:
            nq: Number of queries.
            nk: Number of keys; as many as queries by default.
            tile: Queries and keys per tile.
            positions: ``(q_pos, k_pos)``; see `default_positions`.
            batch: Batch size of the call, for counts.
            heads: Number of query heads of the call, for counts.

        Returns:
            The layout, from a cache when this mask was compiled before.
        """
        from .build import build

        nk = nq if nk is None else nk
        return build(self, nq, nk, tile=tile, positions=positions, key_padding=None, batch=batch, heads=heads)

    def dense(self, nq: int, nk: int | None = None, *, positions: Positions | None = None) -> torch.Tensor:
        """The whole mask as booleans; for tests, small inputs and looking at it.

        Args:
            nq: Number of queries.
            nk: Number of keys; as many as queries by default.
            positions: ``(q_pos, k_pos)``, each ``(N,)`` or ``(B, N)``; see `default_positions`.

        Returns:
            ``(B|1, H|1, nq, nk)`` booleans, True where attention is allowed.

        Raises:
            ValueError: The mask does not fit, or has more than 2^36 pairs.
        """
        nk = nq if nk is None else nk
        q_pos, k_pos = resolve(self, nq, nk, positions)
        size = max(self.shape[0], *(p.shape[0] for p in (q_pos, k_pos)))
        if size * self.shape[1] * nq * nk > MAX_DENSE:
            raise ValueError(f"dense: {nq} x {nk} pairs do not fit; tiles() and show() work at any length")
        out = np.empty((size, self.shape[1], nq, nk), dtype=bool)
        for b in range(size):
            for h in range(self.shape[1]):
                _fill(self.at(b, h), out[b, h], q_pos[b % len(q_pos)], k_pos[b % len(k_pos)])
        return torch.from_numpy(out)

    def to_flex(self, nq: int, nk: int | None = None, *, device: Any = "cpu") -> Callable[..., torch.Tensor]:
        """The mask as a ``mask_mod(b, h, q_idx, kv_idx)`` for FlexAttention; see `manyheads.mask.to_flex`."""
        from .adapters import to_flex

        return to_flex(self, nq, nq if nk is None else nk, device=device)

    def show(self, nq: int, nk: int | None = None, **options: Any) -> str:
        """Draws the mask as text; see `manyheads.mask.show` for the options."""
        from .show import show

        return show(self, nq, nk, **options)


class Leaf(Mask):
    """A primitive: a rule over named coordinates.

    Attributes:
        axes: The names of the coordinates that it reads.
        relative: Whether the rule depends only on differences (hence equality and order) of query and key
            coordinates; tiles at equal offsets then hold equal bits.
        keyed: Whether coordinates determine the bits of a tile at all; if not, tiles are evaluated one by
            one.
    """

    __slots__ = ()
    axes: tuple[str, ...] = ("position",)
    relative: bool = True
    keyed: bool = True
    _sets_positions: ClassVar[bool] = False

    def leaves(self) -> tuple[Leaf, ...]:
        """Itself."""
        return (self,)

    def coords(self, pos: np.ndarray, side: Side, size: int) -> dict[str, np.ndarray]:
        """See `Mask.coords`."""
        return {"position": np.asarray(pos)}

    def _extents(self) -> tuple[Extent, ...]:
        """What the data covers, one entry per batch row; empty when any position is legal."""
        return ()

    def _own_positions(self, nq: int, nk: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _in_range(self, pos: np.ndarray, side: Side) -> np.ndarray:
        """The positions as an array, after a check against the data."""
        pos = np.asarray(pos)
        for extent in self._extents():
            self._in_range_of(extent, pos, side)
        return pos

    def _fits(self, side: Side, extent: Extent, nq: int, nk: int, pos: Any, default: bool) -> None:
        """Checks one side of a call against one extent; ``default`` when neither side has positions."""
        if pos is not None:
            self._in_range_of(extent, np.asarray(pos), side)
            return
        want, have = (extent.nq, nq) if side == "q" else (extent.nk, nk)
        if default and want is not None and not want[0] <= have <= want[1]:
            count = str(want[0]) if want[0] == want[1] else f"{want[0]}..{want[1]}"
            what = "queries" if side == "q" else "keys"
            raise ValueError(f"mask: {self._title()} is for {count} {what}, the call has {have}")
        if have and not self._sets_positions:
            self._in_range_of(extent, np.array([nk - have, nk - 1]), side)

    def _in_range_of(self, extent: Extent, pos: np.ndarray, side: Side) -> None:
        low, high = getattr(extent, side)
        if pos.size and (int(pos.min()) < low or int(pos.max()) >= high):
            found = f"{int(pos.min())}..{int(pos.max())}"
            covers = f"{self._title()} covers positions {low}..{high - 1}"
            raise ValueError(f"{side}_pos: {covers}, got {found}")

    def _title(self) -> str:
        return self.text.split("(", 1)[0]


def one_sided(pos: np.ndarray, side: str, own: str) -> np.ndarray:
    """A coordinate that only one side has: the other side's is 0, so that the rule reads a difference."""
    return pos if side == own else np.zeros_like(pos)


def resolve(mask: Mask, nq: int, nk: int, positions: Positions | None) -> tuple[np.ndarray, np.ndarray]:
    """Checked positions ``(1|B, nq)`` and ``(1|B, nk)`` of a call, int64."""
    given_q, given_k = positions if positions is not None else (None, None)
    given_q, given_k = _ints(given_q, "q_pos"), _ints(given_k, "k_pos")
    mask.check(nq, nk, given_q, given_k)
    if given_q is None or given_k is None:
        default_q, default_k = mask.default_positions(nq, nk)
        given_q = default_q if given_q is None else given_q
        given_k = default_k if given_k is None else given_k
    return np.atleast_2d(given_q), np.atleast_2d(given_k)


def _ints(pos: Any, argument: str) -> np.ndarray | None:
    if pos is None:
        return None
    array = pos.detach().cpu().numpy() if isinstance(pos, torch.Tensor) else np.asarray(pos)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise TypeError(f"{argument}: expected integers (N,) or (B, N), got {array.dtype} {array.shape}")
    return array.astype(np.int64, copy=False)


def _row(pos: Any, row: int, rows: int) -> Any:
    return pos[row] if pos is not None and rows > 1 and np.ndim(pos) == 2 and len(pos) == rows else pos


def _same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def _fill(mask: Mask, out: np.ndarray, q_pos: np.ndarray, k_pos: np.ndarray) -> None:
    """Evaluates a scalar mask into ``out`` a band of rows at a time."""
    nq, nk = out.shape
    q = mask.coords(q_pos, "q", nq)
    k = {name: a[None, :] for name, a in mask.coords(k_pos, "k", nk).items()}
    step = max(1, _CHUNK_PAIRS // max(nk, 1))
    for start in range(0, nq, step):
        band = {name: a[start : start + step, None] for name, a in q.items()}
        out[start : start + step] = mask.allows(band, k)
