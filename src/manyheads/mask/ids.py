"""Padded ids: chosen key tiles per query tile, on any device, with static shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from .runs import Runs, assemble

if TYPE_CHECKING:
    from .layout import TileLayout

MAX_TABLE = 1 << 12  # pairs of bitmaps that are combined whether they meet or not


def check(ids: torch.Tensor, counts: torch.Tensor | None, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks and tidies ids: chosen tiles first, -1 after them.

    Returns:
        ids int32 ``(B, H, Tq, kmax)`` and counts int32 ``(B, H, Tq)``.

    Raises:
        ValueError: A wrong shape; on the CPU also an id out of range or twice in a row.
    """
    if ids.dim() != 4 or ids.shape[2] != grid[0] or ids.is_floating_point():
        raise ValueError(f"ids: expected integers (B, H, {grid[0]}, kmax), got {ids.dtype} {tuple(ids.shape)}")
    ids = ids.to(torch.int32)
    if counts is not None:
        if counts.shape != ids.shape[:3]:
            raise ValueError(f"counts: expected shape {tuple(ids.shape[:3])}, got {tuple(counts.shape)}")
        slot = torch.arange(ids.shape[3], device=ids.device)
        ids = torch.where(slot < counts.to(ids.device)[..., None], ids, -1)
    ids = ids.clamp(min=-1)
    if ids.device.type == "cpu" and ids.numel():
        if int(ids.max()) >= grid[1]:
            raise ValueError(f"ids: expected key tiles 0 to {grid[1] - 1}, got {int(ids.max())}")
        ordered = ids.sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("ids: a key tile is chosen twice in one row")
    ids, counts = settle(ids)
    return ids, counts


def settle(ids: torch.Tensor, *along: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Moves negative ids to the end of their rows, keeping order; carries ``along`` with them.

    Returns:
        ids, counts, and the tensors carried.
    """
    order = (ids < 0).to(torch.int8).sort(dim=-1, stable=True).indices
    counts = (ids >= 0).sum(-1, dtype=torch.int32)
    return (ids.gather(-1, order).contiguous(), counts, *(t.gather(-1, order).contiguous() for t in along))


def to_runs(ids: torch.Tensor, ids_mask: torch.Tensor | None, grid: tuple[int, int]) -> Runs:
    """The runs of all (batch, head) row sets, on the host."""
    chosen = ids.cpu().numpy().reshape(ids.shape[:3].numel(), ids.shape[-1])
    row, slot = np.nonzero(chosen >= 0)
    column = chosen[row, slot].astype(np.int64)
    id = np.zeros(len(row), dtype=np.int64)
    if ids_mask is not None:
        id = ids_mask.cpu().numpy().reshape(chosen.shape)[row, slot].astype(np.int64)
    return assemble(row, column, np.ones_like(column), id, len(chosen), grid[1])


def restrict(layout: TileLayout, other: TileLayout) -> TileLayout:
    """Drops the ids that ``other`` (runs, same tiles) does not visit, and gives the rest its bitmaps.

    Shapes stay static. Where ids have no bitmaps yet nothing waits for the device once ``other`` is there.
    """
    assert layout.ids is not None
    ids, masks, group = layout.ids, layout.ids_mask, layout.index.shape[1] // max(1, layout.ids.shape[1])
    if group > 1 and other.index.shape[1] > 1:  # the mask differs between the heads that share ids
        ids = ids.repeat_interleave(group, 1)
        masks, group = None if masks is None else masks.repeat_interleave(group, 1), 1
    shape = torch.broadcast_shapes(ids.shape[:2], other.index.shape)
    ids = ids.expand(*shape, -1, -1)
    found = _visited(ids, other)
    if masks is None:
        id, bits = found, other.to(ids.device).bits
    else:
        pair = (masks.expand_as(ids) * (len(other.bits) + 1) + found).long()
        id, bits = _pair_ids(pair, found >= 0, layout, other.bits.numpy())
    ids = torch.where(id < 0, -1, ids)
    ids, counts, id = settle(ids, id.clamp(min=0))
    return replace(
        layout,
        index=index_of(shape, group).to(layout.index.device),
        ids=ids,
        ids_count=counts,
        ids_mask=id,
        bits=bits,
        q_pos=other.q_pos,
        k_pos=other.k_pos,
        batch=max(layout.batch, shape[0]),
        heads=max(layout.heads, shape[1] * group),
    )


def index_of(shape: Sequence[int], group: int) -> torch.Tensor:
    """The index of one id list for each batch entry and key head: every list serves ``group`` query heads."""
    lists = torch.arange(math.prod(shape), dtype=torch.int32).reshape(tuple(shape))
    return lists if group == 1 else lists.repeat_interleave(group, 1)


def _pair_ids(
    pair: torch.Tensor, visited: torch.Tensor, layout: TileLayout, bits: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of ids (numbered row by row) its new id, -1 for none; and the new bitmaps."""
    from .retiling import pair_bits

    width = len(bits) + 1
    total = (len(layout.bits) + 1) * width
    pair = torch.where(visited, pair, 0)
    used = torch.arange(total)
    if total > MAX_TABLE:
        used = pair[visited].unique().cpu()
        pair = torch.searchsorted(used.to(pair.device), pair).clamp(max=max(len(used) - 1, 0))
    id_a, id_b = np.divmod(used.numpy(), width)
    ids, bits = pair_bits(layout.bits.cpu().numpy(), bits, id_a, id_b, layout.tile)
    table = torch.from_numpy(np.append(ids, -1).astype(np.int32)).to(pair.device)
    return torch.where(visited, table[pair], -1), torch.from_numpy(bits).to(pair.device)


def _visited(ids: torch.Tensor, other: TileLayout) -> torch.Tensor:
    """The id that ``other`` gives to each chosen tile, -1 where it does not visit it."""
    if not len(other.first):
        return torch.full_like(ids, -1)
    base, end, id, index = _search(other, ids.device)
    row = index.expand(ids.shape[:2])[..., None] * other.grid[0] + torch.arange(other.grid[0], device=ids.device)
    place = row[..., None] * other.grid[1] + ids
    at = (torch.searchsorted(base, place, right=True) - 1).clamp(min=0)
    inside = (ids >= 0) & (base[at] <= place) & (place < end[at])
    return torch.where(inside, id[at], -1)


def _search(layout: TileLayout, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Begin, end and id of every run, numbered over the whole plane, and the index; kept per device."""
    known = layout.__dict__.setdefault("_searched", {})
    if device not in known:
        runs = layout.runs
        begin = runs.row * runs.width + runs.first
        parts = (begin, begin + runs.count, runs.id.astype(np.int32))
        known[device] = (*(torch.from_numpy(a).to(device) for a in parts), layout.index.to(device).long())
    return known[device]
