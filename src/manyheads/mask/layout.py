"""What a mask or a selector compiles to, and all that an engine sees: tiles to visit, and their bitmaps."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import flat, inside, retiling
from . import ids as padded
from .deferred import Deferred
from .evaluate import pack, unpack
from .runs import Runs, transpose

if TYPE_CHECKING:
    from .base import Mask


def _empty() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int32)


@dataclass(frozen=True, eq=False, repr=False)
class TileLayout:
    """Which tiles of the (query, key) plane to visit, and which pairs of each are visible.

    Made by `manyheads.mask.Mask.tiles` from a mask (*runs* storage) or by `from_ids` from a selector's choice
    of key tiles (*ids* storage). A tile is all visible (id 0), or has the bitmap ``bits[id - 1]``, or is not
    visited. Bits outside ``[0, nq) x [0, nk)`` are zero; an edge tile that is all visible in range has id 0.

    Attributes:
        nq: Queries.
        nk: Keys.
        tile: ``(BM, BN)``: queries and keys per tile.
        index: int32 ``(B|1, H|1)``: which row set a batch entry and head use.
        rows: int32 ``(S, Tq + 1)``: row ``r`` of set ``s`` owns runs ``rows[s, r]`` to ``rows[s, r + 1]``.
        first: int32 ``(R,)``: first key tile of each run; runs are sorted and disjoint within a row.
        count: int32 ``(R,)``: key tiles of each run.
        mask_id: int32 ``(R,)``: id of all tiles of the run.
        bits: uint8 ``(U, BM, ceil(BN / 8))``: unique bitmaps, first key in the lowest bit.
        q_pos: int64 ``(nq,)`` or ``(B, nq)`` logical positions; ``None``: ``arange(nk - nq, nk)``.
        k_pos: int64 ``(nk,)`` or ``(B, nk)``; ``None``: ``arange(nk)``.
        ids: int32 ``(B, H, Tq, kmax)`` chosen key tiles, -1 after the last; ``None`` in runs storage.
        ids_count: int32 ``(B, H, Tq)``: how many tiles each row has.
        ids_mask: int32 like ``ids``: the id of each; ``None`` when all are 0.
        batch: Batch entries that the index stands for.
        heads: Query heads that the index stands for.
        cost_note: What made the build expensive, in words; ``None`` when nothing did.

    Example:
        >>> from manyheads.mask import Causal
        >>> layout = Causal().tiles(256, tile=(64, 64))
        >>> layout.spans(0)[2]
        [(0, 2, 0), (2, 1, 1)]
        >>> layout.pairs, layout.visited, len(layout.bits)
        (32896, 10, 1)
        >>> layout.transpose().spans(0)[2]
        [(2, 1, 1), (3, 1, 0)]
    """

    nq: int
    nk: int
    tile: tuple[int, int]
    index: torch.Tensor
    rows: torch.Tensor = field(default_factory=_empty)
    first: torch.Tensor = field(default_factory=_empty)
    count: torch.Tensor = field(default_factory=_empty)
    mask_id: torch.Tensor = field(default_factory=_empty)
    bits: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))
    q_pos: torch.Tensor | None = None
    k_pos: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    ids_count: torch.Tensor | None = None
    ids_mask: torch.Tensor | None = None
    batch: int = 1
    heads: int = 1
    cost_note: str | None = None

    def __repr__(self) -> str:
        """One line of sizes."""
        size = f"{self.nq} x {self.nk} in tiles of {self.tile[0]} x {self.tile[1]}"
        rows = f"{len(self.first)} runs" if self.ids is None else f"ids {tuple(self.ids.shape)}"
        return f"TileLayout({size}, {self.sets} row sets, {rows}, {len(self.bits)} bitmaps)"

    # Sizes and counts

    @property
    def grid(self) -> tuple[int, int]:
        """Tile rows and tile columns."""
        return -(-self.nq // self.tile[0]), -(-self.nk // self.tile[1])

    @property
    def sets(self) -> int:
        """Number of distinct row sets."""
        return self.rows.shape[0] if self.ids is None else self.ids.shape[:2].numel()

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """Visible pairs and visited tiles, over batch and heads."""
        if self.ids is not None:
            runs = self.to_runs()
            return runs._counts
        return inside.counts(self)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs, exactly, over ``batch * heads``."""
        return self._counts[0]

    @property
    def visited(self) -> int:
        """Tiles that an engine computes, over ``batch * heads``."""
        return self._counts[1]

    @property
    def density(self) -> float:
        """Share of all tiles that is visited."""
        return self.visited / max(1, self.grid[0] * self.grid[1] * self.batch * self.heads)

    @property
    def area(self) -> float:
        """Share of all pairs that is visible."""
        return self.pairs / max(1, self.nq * self.nk * self.batch * self.heads)

    @property
    def ideal_speedup(self) -> float:
        """How much less work than dense the visible pairs are: what no engine can beat."""
        return 1 / self.area if self.pairs else math.inf

    @property
    def tile_speedup(self) -> float:
        """How much less work than dense the visited tiles are: what an engine of this tile can reach."""
        return 1 / self.density if self.visited else math.inf

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for t in self._tensors().values())

    @property
    def held_bytes(self) -> int:
        """Bytes kept alive, with room for the transpose."""
        lists = 160 * len(self.first) if "_spans" in self.__dict__ else 0
        explicit = 8 * (self.nq + self.nk) if self.nq != self.nk else 0
        return 2 * self.nbytes + explicit + lists

    @property
    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logical positions of queries and keys, the default ones written out."""
        q_pos = torch.arange(self.nk - self.nq, self.nk) if self.q_pos is None else self.q_pos
        return q_pos, torch.arange(self.nk) if self.k_pos is None else self.k_pos

    # Looking inside

    @cached_property
    def runs(self) -> Runs:
        """The runs as numpy arrays, rows of all sets stacked."""
        rows = self.to_runs() if self.ids is not None else self
        start = np.append(rows.rows[:, :-1].reshape(-1).cpu().numpy(), len(rows.first))
        first, count, id = (t.cpu().numpy() for t in (rows.first, rows.count, rows.mask_id))
        return Runs(start, first, count, id, self.grid[1])

    def spans(self, s: int) -> list[list[tuple[int, int, int]]]:
        """The runs of row set ``s``, per tile row a list of Python ints ``(first_tile, count, mask_id)``."""
        if self.ids is not None:
            return self.to_runs().spans(s)
        known = self.__dict__.setdefault("_spans", {})
        if s not in known:
            bounds = self.rows[s].tolist()
            part = slice(bounds[0], bounds[-1])
            triples = list(
                zip(
                    self.first[part].tolist(),
                    self.count[part].tolist(),
                    self.mask_id[part].tolist(),
                    strict=True,
                )
            )
            known[s] = [
                triples[lo - bounds[0] : hi - bounds[0]] for lo, hi in zip(bounds[:-1], bounds[1:], strict=True)
            ]
        return known[s]

    def tile_mask(self, id: int) -> torch.Tensor:
        """Bool ``(BM, BN)`` of one id; id 0 is all True.

        Raises:
            ValueError: If there is no such id.
        """
        if id == 0:
            return torch.ones(self.tile, dtype=torch.bool)
        if not 0 < id <= len(self.bits):
            raise ValueError(f"id: expected 0 to {len(self.bits)}, got {id}")
        return torch.from_numpy(unpack(self.bits[id - 1].cpu().numpy(), self.tile[1]))

    def dense(self) -> torch.Tensor:
        """The visible pairs as bool ``(B|1, H|1, nq, nk)``.

        Raises:
            ValueError: Beyond 2^34 pairs.
        """
        return inside.dense(self)

    # Other forms of the same layout

    def transpose(self) -> TileLayout:
        """The layout of (key, query), which the backward for keys and values walks; kept once made."""
        known = self.__dict__.get("_transposed")
        known = known() if isinstance(known, weakref.ref) else known
        if known is None:
            known = self._transpose()
            self.__dict__["_transposed"] = known
            known.__dict__["_transposed"] = weakref.ref(self)
        return known

    def _transpose(self) -> TileLayout:
        if self.ids is not None:
            return self.to_runs()._transpose()
        bits = self.bits.cpu().numpy()
        turned = [pack(unpack(part, self.tile[1]).transpose(0, 2, 1).copy()) for part in _parts(bits)]
        shape = (0, self.tile[1], -(-self.tile[0] // 8))
        q_pos, k_pos = (self.q_pos, self.k_pos) if self.nq == self.nk else self.positions
        return from_runs(
            replace(self, nq=self.nk, nk=self.nq, tile=self.tile[::-1], q_pos=k_pos, k_pos=q_pos),
            transpose(self.runs, self.sets),
            np.concatenate(turned) if turned else np.zeros(shape, dtype=np.uint8),
        )

    def retile(self, tile: tuple[int, int]) -> TileLayout:
        """The same visible pairs in tiles of another size, exactly.

        Args:
            tile: The new ``(BM, BN)``: tiles are split to the greatest common divisor, then merged.

        Raises:
            ValueError: If a size is not positive, or the split would make more than 2^28 runs.
        """
        tile = check_tile(tile)
        if tile == self.tile:
            return self
        if self.ids is not None:
            return self.to_runs().retile(tile)
        return retiling.retile(self, tile)

    def to_runs(self) -> TileLayout:
        """The same layout in runs storage; itself when it already is."""
        if self.ids is None:
            return self
        if "_as_runs" not in self.__dict__:
            self.__dict__["_as_runs"] = from_runs(
                replace(
                    self,
                    ids=None,
                    ids_count=None,
                    ids_mask=None,
                    bits=self.bits.cpu(),
                    index=self.index.cpu(),
                ),
                padded.to_runs(self.ids, self.ids_mask, self.grid),
                self.bits.cpu().numpy(),
            )
        return self.__dict__["_as_runs"]

    def to(self, device: torch.device | str) -> TileLayout:
        """The layout with its tensors on ``device``; kept once made."""
        device = torch.device(device)
        known = self.__dict__.setdefault("_moved", {})
        if device not in known:
            moved: dict[str, Any] = {name: t.to(device) for name, t in self._tensors().items()}
            known[device] = replace(self, **moved)
        return known[device]

    def __and__(self, mask: Mask) -> TileLayout:
        """Keeps what ``mask`` also allows, exactly: tiles are dropped or given bitmaps.

        In ids storage this happens where the ids are, with static shapes; the first mask does not wait for
        the device either, once its layout is there.
        """
        return self._and(mask, None)

    def without(self, key_padding: torch.Tensor) -> TileLayout:
        """Hides padded keys from every query.

        Args:
            key_padding: bool ``(nk,)`` or ``(B, nk)``, True for a real key.
        """
        from .primitives import Full

        return self._and(Full(), key_padding)

    def _and(self, mask: Mask, key_padding: torch.Tensor | None) -> TileLayout:
        from .build import build

        other = build(
            mask,
            self.nq,
            self.nk,
            tile=self.tile,
            positions=(self.q_pos, self.k_pos),
            key_padding=key_padding,
            batch=self.batch,
            heads=self.heads,
        )
        return retiling.overlay(self, other) if self.ids is None else padded.restrict(self, other)

    @classmethod
    def from_ids(
        cls,
        ids: torch.Tensor,
        counts: torch.Tensor | None = None,
        *,
        nq: int,
        nk: int,
        tile: int | tuple[int, int],
        mask: Mask | None = None,
        positions: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        batch: int | None = None,
        heads: int | None = None,
    ) -> TileLayout:
        """Makes a layout from chosen key tiles, wherever they are, without waiting for the device.

        Args:
            ids: Integers ``(B|1, H|G|1, Tq, kmax)``: key tiles per query tile in any order, negative for none. With
                ids for ``G`` key heads, each serves ``heads / G`` neighbouring query heads.
            counts: Integers like ``ids`` without ``kmax``: how many ids of a row count; all that are >= 0 by default.
            nq: Queries.
            nk: Keys.
            tile: ``(BM, BN)``, or one number for both.
            mask: What else must hold, exactly.
            positions: ``(q_pos, k_pos)`` as for the mask.
            batch: Batch entries of the call, for counts, when the ids are shared by them.
            heads: Query heads of the call, likewise; needed when ids are those of key heads.

        Raises:
            ValueError: A wrong shape; on the CPU also an id out of range or twice in a row (elsewhere these
                are the caller's to avoid).

        Example:
            >>> ids = torch.tensor([[[[0, -1], [1, 0]]]])
            >>> TileLayout.from_ids(ids, nq=4, nk=4, tile=2).dense()[0, 0].int().tolist()
            [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        """
        size = check_tile((tile, tile) if isinstance(tile, int) else tile)
        if torch.compiler.is_compiling():  # ids have no values yet: an operator will make the layout
            q_pos, k_pos = positions if positions is not None else (None, None)
            named = {"counts": counts, "q_pos": q_pos, "k_pos": k_pos}
            text, data = ("", ()) if mask is None else (mask.text, mask.data)
            return Deferred(nq, nk, size, ids, named, text, data)  # type: ignore[return-value]
        ids, ids_count = padded.check(ids, counts, (-(-nq // size[0]), -(-nk // size[1])))
        own = ids.shape[:2]
        if batch is not None and own[0] not in (1, batch):
            raise ValueError(f"batch: expected {own[0]} as in ids, got {batch}")
        if heads is not None and (not own[1] or heads % own[1]):
            raise ValueError(f"heads: expected {own[1]} as in ids, or a multiple, got {heads}")
        q_pos, k_pos = positions if positions is not None else (None, None)
        layout = cls(
            nq=nq,
            nk=nk,
            tile=size,
            index=padded.index_of(own, 1 if own[1] == 1 or heads is None else heads // own[1]),
            bits=torch.zeros((0, size[0], -(-size[1] // 8)), dtype=torch.uint8),
            q_pos=q_pos,
            k_pos=k_pos,
            ids=ids,
            ids_count=ids_count,
            batch=batch or own[0],
            heads=heads or own[1],
        )
        return layout if mask is None else layout & mask

    @classmethod
    def from_blocks(cls, map: Any, *, q_sizes: Any, k_sizes: Any, tile: tuple[int, int] = (128, 128)) -> TileLayout:
        """Makes a layout from a map of blocks of any sizes; tiles get bitmaps where a block ends inside them.

        Args:
            map: Booleans ``(Tq, Tk)``, ``(H, Tq, Tk)`` or ``(B, H, Tq, Tk)``.
            q_sizes: Queries of each query block, ``(Tq,)``.
            k_sizes: Keys of each key block, ``(Tk,)``.
            tile: ``(BM, BN)``.

        Example:
            >>> layout = TileLayout.from_blocks([[1, 0], [1, 1]], q_sizes=[3, 1], k_sizes=[1, 3], tile=(2, 2))
            >>> layout.dense()[0, 0].int().tolist()
            [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
        """
        from .data import BlockMap

        blocks = BlockMap(map, q_sizes=q_sizes, k_sizes=k_sizes)
        nq, nk = (int(torch.as_tensor(sizes).sum()) for sizes in (q_sizes, k_sizes))
        return blocks.tiles(nq, nk, tile=tile)

    # For engine ops, which take only text and tensors

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the fields, nothing that was computed from them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in flat.FIELDS if getattr(self, name) is not None}

    def flatten(self) -> tuple[str, tuple[torch.Tensor, ...]]:
        """The layout as ``(text, tensors)``: the text holds no size, so that a new length compiles nothing.

        Returns:
            What `unflatten` takes: one int64 tensor of sizes, then the layout's own tensors, not copies.
        """
        return flat.flatten(self)

    @classmethod
    def unflatten(cls, text: str, data: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> TileLayout:
        """The layout that `flatten` took apart: the very object, with its kept transpose, while it lives.

        Raises:
            ValueError: If text and tensors do not belong together.
        """
        return flat.unflatten(text, data)


def from_runs(like: TileLayout, runs: Runs, bits: np.ndarray) -> TileLayout:
    """A layout with the sizes and index of ``like`` and the given runs."""
    sets = max(1, int(like.index.max()) + 1 if like.index.numel() else 1)
    n_rows = like.grid[0]
    start = runs.start
    rows = np.stack([start[s * n_rows : (s + 1) * n_rows + 1] for s in range(sets)])
    tensors = (
        torch.from_numpy(np.ascontiguousarray(a, dtype=np.int32)) for a in (rows, runs.first, runs.count, runs.id)
    )
    rows_t, first, count, mask_id = tensors
    return replace(
        like,
        rows=rows_t,
        first=first,
        count=count,
        mask_id=mask_id,
        bits=torch.from_numpy(np.ascontiguousarray(bits)),
    )


def check_tile(tile: tuple[int, int]) -> tuple[int, int]:
    """Checks a tile size.

    Raises:
        ValueError: If it is not two positive numbers.
    """
    if (
        not isinstance(tile, (tuple, list))
        or len(tile) != 2
        or any(not isinstance(n, (int, np.integer)) or n < 1 for n in tile)
    ):
        raise ValueError(f"tile: expected two positive ints (queries, keys), got {tile!r}")
    return int(tile[0]), int(tile[1])


def _parts(bits: np.ndarray, step: int = 1024) -> list[np.ndarray]:
    return [bits[lo : lo + step] for lo in range(0, len(bits), step)]
