"""A layout as the kernels read it: tensors on the device, and the order in which rows of tiles are taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ...mask.ids import index_of, settle
from ...mask.layout import TileLayout
from .order import same

_L2_BYTES = 32 << 20  # keys and values of neighbouring programs should stay in a cache of about this size


@dataclass(frozen=True, slots=True)
class Rows:
    """Runs or padded ids of every row of tiles.

    Attributes:
        tile: Tokens of a tile, the owner's side first.
        rows, first, count, mask_id, bits, index: As in ``TileLayout``; for ids, ``rows`` holds the counts. ``bits``
            are words of up to 32 columns.
        width: Ids of a row, 0 for runs.
        masked: Whether ids have bitmaps.
        steps: Strides ``(batch, head)`` of the index, 0 where it is shared.
    """

    tile: tuple[int, int]
    rows: Tensor
    first: Tensor
    count: Tensor
    mask_id: Tensor
    bits: Tensor
    index: Tensor
    width: int
    masked: bool
    steps: tuple[int, int]


def fitting(layout: TileLayout, tile: tuple[int, int], own: bool, skips: bool = False) -> TileLayout:
    """The layout in tiles that a kernel can take. Padded ids are cut where they are, without waiting for the device.

    Args:
        layout: Any layout.
        tile: Queries and keys of the configuration's tile.
        own: Whether the layout's tiles are the caller's choice, and so kept where they fit into the configuration's.
        skips: Whether tiles are skipped, and so cannot be cut and are taken in ascending order.

    Returns:
        The layout itself, or an exact rearrangement, kept with it.

    Raises:
        UnsupportedError: Tiles that are skipped and do not fit.
    """
    (bm, bn), (most_m, most_n) = layout.tile, tile
    powers = bm & (bm - 1) == 0 and bn & (bn - 1) == 0
    if layout.tile == tile or (own and powers and bm <= most_m and 16 <= bn <= most_n):
        if skips and layout.ids is not None:
            return kept(layout, ("ascending",), lambda: _ascending(layout))
        return layout
    if skips:
        raise UnsupportedError(
            f"tile: where tiles are skipped the triton backend needs powers of two up to {most_m} x {most_n}, keys "
            f"from 16, for these head widths and options; got {bm} x {bn}"
        )
    if own and powers:
        tile = min(bm, most_m), max(16, min(bn, most_n))
    cuts = own and powers and layout.ids is not None and bn >= 16
    return kept(layout, ("fitted", tile), lambda: _cut(layout, tile) if cuts else layout.retile(tile))


def _cut(layout: TileLayout, tile: tuple[int, int]) -> TileLayout:
    """Padded ids in tiles that divide theirs; parts beyond the keys and parts that see nothing are dropped."""
    assert layout.ids is not None
    ids, device = layout.ids, layout.ids.device
    up, across = layout.tile[0] // tile[0], layout.tile[1] // tile[1]
    rows, columns = torch.arange(up, device=device)[:, None, None], torch.arange(across, device=device)
    parts = ids[..., None, :, None] * across + columns
    parts = torch.where((ids[..., None, :, None] >= 0) & (parts < -(-layout.nk // tile[1])), parts, -1)
    parts = parts.expand(*ids.shape[:3], up, ids.shape[3], across).to(torch.int32)
    bits = layout.bits.to(device).unflatten(1, (up, tile[0])).unflatten(3, (across, tile[1] // 8))
    bits = bits.permute(0, 1, 3, 2, 4).flatten(0, 2)
    shape = (*ids.shape[:2], ids.shape[2] * up, ids.shape[3] * across)
    tq = -(-layout.nq // tile[0])
    masks = None
    if layout.ids_mask is not None:
        masks = layout.ids_mask[..., None, :, None].long()
        masks = torch.where(masks == 0, 0, ((masks - 1) * up + rows) * across + columns + 1)
        empty = torch.cat([torch.zeros(1, dtype=torch.bool, device=device), (bits == 0).all(-1).all(-1)])
        parts = torch.where(empty[masks], -1, parts)
        masks = masks.to(torch.int32).reshape(shape)[:, :, :tq]
    parts = parts.reshape(shape)[:, :, :tq]
    parts, counts, *rest = settle(parts, *([] if masks is None else [masks]))
    return replace(
        layout, tile=tile, ids=parts, ids_count=counts, ids_mask=rest[0] if rest else None, bits=bits.contiguous()
    )


def _ascending(layout: TileLayout) -> TileLayout:
    """Padded ids in the order of the keys: what is skipped depends on the order."""
    assert layout.ids is not None
    order = torch.where(layout.ids < 0, layout.grid[1], layout.ids).argsort(-1)
    masks = None if layout.ids_mask is None else layout.ids_mask.gather(-1, order)
    return replace(layout, ids=layout.ids.gather(-1, order), ids_mask=masks)


def by_queries(layout: TileLayout, device: torch.device) -> Rows:
    """What each row of query tiles visits."""
    return kept(
        layout, ("q", device), lambda: _listed(layout, device) if layout.ids is not None else _runs(layout, device)
    )


def by_keys(layout: TileLayout, device: torch.device) -> Rows:
    """What visits each row of key tiles. Padded ids are inverted where they are, without waiting for the device."""
    if layout.ids is not None and layout.ids.device.type != "cpu":
        return kept(layout, ("k", device), lambda: _inverted(layout, device))
    return kept(layout, ("k", device), lambda: _runs(layout.transpose(), device))


def kept(layout: TileLayout, key: tuple[Any, ...], make: Any) -> Any:
    """What was made of a layout, kept with it."""
    known = layout.__dict__.setdefault("_rows", {})
    if key not in known:
        known[key] = make()
    return known[key]


def _runs(layout: TileLayout, device: torch.device) -> Rows:
    some = [t if t.numel() else t.new_zeros(1) for t in (layout.first, layout.count, layout.mask_id)]
    first, count, mask_id, rows, index = (t.to(device).contiguous() for t in (*some, layout.rows, layout.index))
    return Rows(layout.tile, rows, first, count, mask_id, words(layout, device), index, 0, True, _steps(index))


def _listed(layout: TileLayout, device: torch.device) -> Rows:
    assert layout.ids is not None and layout.ids_count is not None
    ids, counts = layout.ids.to(device), layout.ids_count.to(device).contiguous()
    # a width of 0 would read as runs
    ids = ids.contiguous() if ids.shape[-1] else ids.new_full((*ids.shape[:3], 1), -1)
    masked = layout.ids_mask is not None and layout.ids_mask.shape == ids.shape
    mask_id = layout.ids_mask.to(device).contiguous() if masked and layout.ids_mask is not None else ids
    bits, index = words(layout, device), _index(layout, device)
    return Rows(layout.tile, counts, ids, counts, mask_id, bits, index, ids.shape[-1], masked, _steps(index))


def _index(layout: TileLayout, device: torch.device) -> Tensor:
    """The index of padded ids on their device; the usual one is made there, because a copy would wait for it."""
    index = layout.index
    assert layout.ids is not None
    shape = layout.ids.shape[:2]
    usual = (index.shape[1] // max(1, shape[1])) if shape[0] == index.shape[0] else 0
    if index.device.type == "cpu" and device.type != "cpu" and usual and torch.equal(index, index_of(shape, usual)):
        made = torch.arange(shape.numel(), dtype=torch.int32, device=device).view(shape)
        return made.repeat_interleave(usual, 1).contiguous()
    return index.to(device).contiguous()


def _inverted(layout: TileLayout, device: torch.device) -> Rows:
    """Padded ids by key tile: one run of one tile for each id, sorted by key tile; unused ones lie at the end."""
    assert layout.ids is not None
    ids = layout.ids.to(device)
    tq, tk = layout.grid
    sets = ids.shape[0] * ids.shape[1]
    own = torch.arange(sets * tq, device=device).view(sets, tq, 1)
    place = ((own // tq) * tk + ids.view(sets, tq, -1)) * tq + own % tq
    place = torch.where(ids.view(sets, tq, -1) >= 0, place, sets * tk * tq).flatten()
    place, order = place.sort()
    edges = torch.arange(tk + 1, device=device) * tq + torch.arange(sets, device=device)[:, None] * tk * tq
    rows = torch.searchsorted(place, edges).to(torch.int32)
    first = (place % tq).to(torch.int32)
    mask_id = torch.zeros_like(first) if layout.ids_mask is None else layout.ids_mask.to(device).reshape(-1)[order]
    bits, index = _turned(layout.bits.to(device), layout.tile), _index(layout, device)
    turned = (layout.tile[1], layout.tile[0])
    found = _as_words(bits, turned)
    return Rows(turned, rows, first, torch.ones_like(first), mask_id, found, index, 0, True, _steps(index))


def _turned(bits: Tensor, tile: tuple[int, int]) -> Tensor:
    """Bitmaps with rows and columns exchanged, where they are."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    dense = (bits[..., None] >> shifts & 1).flatten(-2)[..., : tile[1]].transpose(1, 2)
    dense = torch.nn.functional.pad(dense, (0, -tile[0] % 8))
    return (dense.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def words(layout: TileLayout, device: torch.device) -> Tensor:
    """The bitmaps of a layout as the kernels read them."""
    return _as_words(layout.bits.to(device), layout.tile)


def _as_words(bits: Tensor, tile: tuple[int, int]) -> Tensor:
    """Bitmaps in words of up to 32 columns; at least one, so that there is something to point at."""
    row = -(-tile[1] // 8)
    if not len(bits):
        bits = torch.zeros(1, tile[0], row, dtype=torch.uint8, device=bits.device)
    kind = {1: torch.uint8, 2: torch.int16}.get(row, torch.int32)
    return bits.contiguous().view(kind)


def _steps(index: Tensor) -> tuple[int, int]:
    b, h = index.shape
    return (h if b > 1 else 0), (1 if h > 1 else 0)


def packs(layout: TileLayout, group: int) -> int:
    """How many query heads of a key head a program takes as rows: more than one only where query tiles are small."""
    bm = layout.tile[0]
    if bm >= 16 or group == 1:
        return 1
    most = max(n for n in range(1, group + 1) if group % n == 0 and n * bm <= 128)
    heads = layout.index.shape[1]
    return most if heads == 1 else kept(layout, ("packs", group), lambda: most if same(layout, group) else 1)


def work_of(
    layout: TileLayout,
    packs: int,
    batch: int,
    key_bytes: int,
    device: torch.device,
    *,
    keys: bool = False,
    turn: int = 0,
) -> Tensor:
    """The rows of tiles of all batch entries and heads, in the order in which programs take them.

    The longest come first, so that no program starts a long row when the others are done; heads whose keys and values
    fill the cache together are finished before the next ones begin.

    Args:
        layout: Whose rows.
        packs: Heads, or packs of heads, of a batch entry.
        batch: Batch entries.
        key_bytes: Bytes of the keys and values of one pack.
        device: Where the list goes.
        keys: Rows of key tiles rather than of query tiles.
        turn: Programs that share the list, taking every ``turn``-th entry; every other round is reversed, so that
            nobody gets the longest of each. 0: one entry a program.

    Returns:
        int32 ``(batch * packs * rows,)``: ``(b * packs + pack) * rows + row``.
    """
    name = ("work", packs, batch, key_bytes, device, keys, turn)
    return kept(layout, name, lambda: _ordered(layout, packs, batch, key_bytes, device, keys, turn))


def _ordered(
    layout: TileLayout, packs: int, batch: int, key_bytes: int, device: torch.device, keys: bool, turn: int
) -> Tensor:
    if layout.ids is not None and layout.ids.device.type != "cpu":
        return _counted(layout, packs, batch, device, keys)
    costs = row_costs(layout.transpose() if keys else layout)
    index = layout.index.cpu().numpy()
    index = np.broadcast_to(index, (batch, index.shape[1]))
    index = index if index.shape[1] >= packs else np.repeat(index, packs, axis=1)
    each = costs[index].reshape(batch * packs, -1, costs.shape[1])
    # the rows of keys are visited by every head of a group, those of queries once for all heads of a pack
    costs = each.sum(1) if keys else each[:, 0]
    order = longest_first(costs, max(1, _L2_BYTES // max(1, key_bytes)))
    if turn:
        order = dealt(order, turn)
    return torch.from_numpy(order.astype(np.int32)).to(device)


def _counted(layout: TileLayout, packs: int, batch: int, device: torch.device, keys: bool) -> Tensor:
    """The order of padded ids that nobody on the host has seen; what visits a row of keys is not counted."""
    n_rows = layout.grid[1 if keys else 0]
    if keys or layout.ids_count is None:
        return torch.arange(batch * packs * n_rows, dtype=torch.int32, device=device)
    counts = layout.ids_count
    lists = counts.shape[1]  # each for some packs, or several of them to a pack
    counts = counts[:, :: lists // packs] if lists > packs else counts.repeat_interleave(packs // lists, 1)
    spread = counts.expand(batch, packs, n_rows).flatten()
    return spread.argsort(descending=True, stable=True).to(torch.int32)


def row_costs(layout: TileLayout) -> np.ndarray:
    """Tiles that each row of tiles visits: int64 ``(row sets, rows)``."""
    runs = layout.to_runs()
    counts = np.concatenate([[0], np.cumsum(runs.count.cpu().numpy().astype(np.int64))])
    bounds = runs.rows.cpu().numpy()
    return counts[bounds[:, 1:]] - counts[bounds[:, :-1]]


def longest_first(costs: np.ndarray, together: int) -> np.ndarray:
    """Items in descending cost, some heads after the others.

    Args:
        costs: ``(heads, rows)``.
        together: Heads that are worked on at the same time.

    Returns:
        int64 item numbers ``head * rows + row``.

    Example:
        >>> longest_first(np.array([[1, 3], [2, 3]]), 2).tolist()
        [1, 3, 2, 0]
    """
    heads, rows = costs.shape
    parts = []
    for start in range(0, heads, together):
        some = costs[start : start + together].reshape(-1)
        parts.append(start * rows + np.argsort(-some, kind="stable"))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def dealt(order: np.ndarray, workers: int) -> np.ndarray:
    """Reverses every other round of ``workers`` items, so that strided workers get equal shares.

    Example:
        >>> dealt(np.arange(7), 3).tolist()
        [0, 1, 2, 5, 4, 3, 6]
    """
    out = order.copy()
    for start in range(workers, len(order) - workers + 1, 2 * workers):
        out[start : start + workers] = order[start : start + workers][::-1]
    return out


def makespan(costs: np.ndarray, workers: int) -> int:
    """Time until all is done when each of some workers takes the next item as soon as it is free.

    Args:
        costs: Of the items, in order.
        workers: How many.

    Returns:
        The time, in the unit of the costs.

    Example:
        >>> makespan(np.array([1, 1, 1, 3]), 2), makespan(np.array([3, 1, 1, 1]), 2)
        (4, 3)
    """
    import heapq

    free = [0] * workers
    for cost in costs.tolist():
        heapq.heapreplace(free, free[0] + cost)
    return max(free)
