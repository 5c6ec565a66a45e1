"""Compiles a mask to a TileLayout."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from .base import Mask, resolve
from .cache import ByteCache
from .evaluate import TileTable, tile_ids
from .layout import TileLayout, check_tile, from_runs
from .pyramid import TiledSide, full_rows, refine
from .runs import Array, Runs, assemble
from .tilekeys import has_keys

MAX_PAIRS = 1 << 34  # pairs that one build may look at
MAX_TILES = 1 << 26  # partial tiles that one build may hold
layouts: ByteCache[TileLayout] = ByteCache(256 << 20)


def build(
    mask: Mask,
    nq: int,
    nk: int,
    *,
    tile: tuple[int, int] = (128, 128),
    positions: tuple[Any, Any] | None = None,
    key_padding: torch.Tensor | None = None,
    batch: int = 1,
    heads: int = 1,
    cache: bool = True,
    keyed: bool = True,
) -> TileLayout:
    """Compiles a mask to the tiles that engines visit, exactly.

    Coarse boxes of tiles are classified first and split only where they are PARTIAL. Tiles with equal keys
    (for most masks: equal offset) are evaluated once; PARTIAL tiles found empty or full are filed as such.

    Args:
        mask: Any mask; a text or tensor goes through ``as_mask`` first.
        nq: Queries.
        nk: Keys.
        tile: ``(BM, BN)``: queries and keys per tile.
        positions: ``(q_pos, k_pos)``, integers ``(N,)`` or ``(B, N)``, ``None`` for the default of either.
        key_padding: bool ``(nk,)`` or ``(B, nk)``, True for a real key; lies outside the mask's algebra.
        batch: Batch entries of the call.
        heads: Query heads of the call.
        cache: Whether to look for, and keep, the layout in the shared cache of 256 MiB.
        keyed: False evaluates every PARTIAL tile on its own, as for a mask without tile keys.

    Returns:
        The layout in runs storage.

    Raises:
        ValueError: A mask, positions or padding of another size; more than 2^34 pairs to evaluate one by one.

    Example:
        >>> from manyheads.mask import Causal, Window
        >>> layout = build(Causal() & Window(4096), 131072, 131072)
        >>> len(layout.bits), layout.visited, round(layout.density, 4)
        (2, 33264, 0.0317)
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a Mask, got {type(mask).__name__}; as_mask() reads text and tensors")
    for name, n in (("nq", nq), ("nk", nk)):
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"{name}: expected a number of tokens, got {n!r}")
    tile = check_tile(tile)
    real = _padding(key_padding, nk)
    if not cache:
        return _build(mask, nq, nk, tile, positions, real, batch, heads, keyed)
    digests = tuple(_digest(a) for a in (*(positions or (None, None)), real))
    key = (mask, nq, nk, tile, digests, batch, heads, keyed)
    return layouts.get(key, lambda: _build(mask, nq, nk, tile, positions, real, batch, heads, keyed))


def _build(
    mask: Mask,
    nq: int,
    nk: int,
    tile: tuple[int, int],
    positions: tuple[Any, Any] | None,
    real: Array | None,
    batch: int,
    heads: int,
    keyed: bool,
) -> TileLayout:
    q_pos, k_pos = resolve(mask, nq, nk, positions)
    shape = _joint(mask, q_pos, k_pos, real, batch, heads)
    work = _Build(mask, q_pos, k_pos, real, tile, keyed)
    index = np.array([[work.set_of(b, h) for h in range(shape[1])] for b in range(shape[0])], dtype=np.int32)
    given = positions or (None, None)
    usual = not any(leaf._sets_positions for leaf in mask.leaves())
    kept = [
        None if own is None and usual else _kept(pos, start)
        for own, pos, start in zip(given, (q_pos, k_pos), (nk - nq, 0), strict=True)
    ]
    like = TileLayout(
        nq=nq,
        nk=nk,
        tile=tile,
        index=torch.from_numpy(index),
        q_pos=kept[0],
        k_pos=kept[1],
        batch=max(batch, shape[0]),
        heads=max(heads, shape[1]),
        cost_note=work.note(),
    )
    return from_runs(like, work.stacked(), work.table.stack())


class _Build:
    """The distinct row sets of one build, and the bitmaps they share."""

    def __init__(
        self, mask: Mask, q_pos: Array, k_pos: Array, real: Array | None, tile: tuple[int, int], keyed: bool
    ) -> None:
        self.mask, self.tile, self.keyed = mask, tile, keyed
        self.q_pos, self.k_pos, self.real = q_pos, k_pos, real
        self.size = (q_pos.shape[1], k_pos.shape[1])
        self.same_q, self.same_k, self.same_real = (_first_equal(a) for a in (q_pos, k_pos, real))
        self.table = TileTable(tile)
        self.patterns: dict[bytes, int] = {}
        self.sets: list[Runs] = []
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.sides: dict[tuple[Any, ...], tuple[TiledSide, TiledSide]] = {}
        self.partial = self.evaluated = 0

    def set_of(self, b: int, h: int) -> int:
        """The number of the row set of one batch entry and head, built if it is new."""
        mask = self.mask.at(b, h)
        at = (mask, self.same_q[b % len(self.same_q)], self.same_k[b % len(self.same_k)])
        row = self.same_real[b % len(self.same_real)] if self.real is not None else -1
        if (*at, row) not in self.numbers:
            q, k = self._sides(*at)
            if self.real is not None and min(self.size) > 0 and not self.real[row].all():
                k = k.with_padding(self.real[row], self.patterns)
            self.numbers[(*at, row)] = len(self.sets)
            self.sets.append(self._rows(mask, q, k))
        return self.numbers[(*at, row)]

    def _sides(self, mask: Mask, q: int, k: int) -> tuple[TiledSide, TiledSide]:
        if (mask, q, k) not in self.sides:
            nq, nk = self.size
            at_q, at_k = mask.coords(self.q_pos[q], "q", nq), mask.coords(self.k_pos[k], "k", nk)
            side = TiledSide(at_q, nq, self.tile[0])
            same = (nq, self.tile[0]) == (nk, self.tile[1]) and all(
                np.array_equal(at_q[name], at_k[name]) for name in at_q
            )
            self.sides = {(mask, q, k): (side, side if same else TiledSide(at_k, nk, self.tile[1]))}
        return self.sides[mask, q, k]

    def _rows(self, mask: Mask, q: TiledSide, k: TiledSide) -> Runs:
        keyed = self.keyed and has_keys(mask, q, k)
        budget = max(1, MAX_PAIRS // (self.tile[0] * self.tile[1]))
        full, i, j = refine(mask, q, k, MAX_TILES if keyed else min(budget, MAX_TILES))
        ids, evaluated = tile_ids(mask, q, k, (i, j), self.table, keyed=keyed, budget=budget)
        self.partial += len(i)
        self.evaluated += evaluated
        row, first, count = full_rows(full, q, k)
        pieces = (
            np.concatenate([row, i]),
            np.concatenate([first, j]),
            np.concatenate([count, np.ones_like(j)]),
            np.concatenate([np.zeros_like(row), ids]),
        )
        return assemble(*pieces, q.tiles, k.tiles)

    def stacked(self) -> Runs:
        """The runs of all sets."""
        sizes = [len(s.first) for s in self.sets]
        offsets = np.cumsum([0, *sizes])
        starts = [s.start[:-1] + offset for s, offset in zip(self.sets, offsets, strict=False)]
        start = np.append(np.concatenate(starts), offsets[-1])
        first, count, id = (np.concatenate([getattr(s, name) for s in self.sets]) for name in ("first", "count", "id"))
        return Runs(start, first, count, id, self.sets[0].width)

    def note(self) -> str | None:
        """What made the build expensive, if anything did."""
        area = self.tile[0] * self.tile[1]
        if self.evaluated <= 64 or self.evaluated * 4 < self.partial:
            return None
        return (
            f"{self.evaluated} of {self.partial} tiles ({self.evaluated * area} pairs) were looked at "
            "one by one: no coarse structure or no tile keys (a predicate, dense bits, scrambled positions)"
        )


def _padding(key_padding: torch.Tensor | None, nk: int) -> Array | None:
    if key_padding is None:
        return None
    real = torch.as_tensor(key_padding)
    if real.dtype != torch.bool or real.dim() not in (1, 2) or real.shape[-1] != nk:
        raise ValueError(
            f"key_padding: expected bool (B, {nk}), True for a real key, got {real.dtype} {tuple(real.shape)}"
        )
    return np.atleast_2d(real.detach().cpu().numpy())


def _joint(mask: Mask, q_pos: Array, k_pos: Array, real: Array | None, batch: int, heads: int) -> tuple[int, int]:
    """The ``(B|1, H|1)`` over which the layout differs."""
    sizes = {"mask": mask.shape[0], "q_pos": len(q_pos), "k_pos": len(k_pos), "batch": batch}
    if real is not None:
        sizes["key_padding"] = len(real)
    largest = max(sizes.values())
    for name, size in sizes.items():
        if size not in (1, largest):
            raise ValueError(f"{name}: expected batch size 1 or {largest}, got {size} (sizes: {sizes})")
    if mask.shape[1] not in (1, heads) and heads != 1:
        raise ValueError(f"mask: expected 1 or {heads} heads, got {mask.shape[1]}")
    sizes.pop("batch")
    return max(sizes.values()), mask.shape[1]


def _kept(pos: Array, start: int) -> torch.Tensor | None:
    """Positions for the layout: ``None`` for consecutive ones from ``start``, one row when all rows are equal."""
    if len(pos) == 1 or (pos == pos[:1]).all():
        usual = np.array_equal(pos[0], np.arange(start, start + pos.shape[1]))
        return None if usual else torch.from_numpy(pos[0].copy())
    return torch.from_numpy(pos.copy())


def _first_equal(rows: Array | None) -> list[int]:
    """For each row the first row that equals it."""
    if rows is None:
        return [0]
    if len(rows) == 1:
        return [0]
    seen: dict[bytes, int] = {}
    return [seen.setdefault(row.tobytes(), b) for b, row in enumerate(rows)]


def _digest(values: Any) -> bytes | None:
    if values is None:
        return None
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    array = np.ascontiguousarray(array)
    return hashlib.blake2b(f"{array.dtype}{array.shape}".encode() + array.tobytes(), digest_size=16).digest()
