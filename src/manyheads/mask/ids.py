"""Padded ids: chosen key tiles per query tile, on any device, with static shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from .runs import Runs, assemble

if TYPE_CHECKING:
    from .layout import TileLayout


def check(
    ids: torch.Tensor, counts: torch.Tensor | None, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks and tidies ids: chosen tiles first, -1 after them.

    Returns:
        ids int32 ``(B, H, Tq, kmax)`` and counts int32 ``(B, H, Tq)``.

    Raises:
        ValueError: A wrong shape; on the CPU also an id out of range or twice in a row.
    """
    if ids.dim() != 4 or ids.shape[2] != grid[0] or ids.is_floating_point():
        raise ValueError(
            f"ids: expected integers (B, H, {grid[0]}, kmax), got {ids.dtype} {tuple(ids.shape)}"
        )
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
    chosen = ids.cpu().numpy().reshape(-1, ids.shape[-1])
    row, slot = np.nonzero(chosen >= 0)
    column = chosen[row, slot].astype(np.int64)
    id = np.zeros(len(row), dtype=np.int64)
    if ids_mask is not None:
        id = ids_mask.cpu().numpy().reshape(chosen.shape)[row, slot].astype(np.int64)
    return assemble(row, column, np.ones_like(column), id, len(chosen), grid[1])


def restrict(layout: TileLayout, other: TileLayout) -> TileLayout:
    """Drops the ids that ``other`` (runs, same tiles) does not visit, and gives the rest its bitmaps."""
    from .retiling import pair_bits

    assert layout.ids is not None
    ids, device = layout.ids, layout.ids.device
    found = _visited(ids, other)
    width = len(other.bits) + 1
    own = torch.zeros_like(ids) if layout.ids_mask is None else layout.ids_mask
    id_a, id_b = (a.reshape(-1) for a in np.indices((len(layout.bits) + 1, width)))
    pairs, bits = pair_bits(layout.bits.cpu().numpy(), other.bits.numpy(), id_a, id_b, layout.tile)
    table = torch.from_numpy(pairs.astype(np.int32)).to(device)
    id = torch.where(found < 0, -1, table[(own * width + found.clamp(min=0)).long()])
    ids = torch.where(id < 0, -1, ids)
    ids, counts, id = settle(ids, id.clamp(min=0))
    return replace(
        layout,
        ids=ids,
        ids_count=counts,
        ids_mask=id,
        bits=torch.from_numpy(bits).to(device),
        q_pos=other.q_pos,
        k_pos=other.k_pos,
    )


def _visited(ids: torch.Tensor, other: TileLayout) -> torch.Tensor:
    """The id that ``other`` gives to each chosen tile, -1 where it does not visit it."""
    device, runs = ids.device, other.runs
    if not len(runs.first):
        return torch.full_like(ids, -1)
    width = runs.width
    start = runs.row * width + runs.first
    parts = (start, start + runs.count, runs.id.astype(np.int32))
    base, end, id = (torch.from_numpy(a).to(device) for a in parts)
    index = other.index.to(device).expand(ids.shape[:2]).long()
    row = index[..., None] * other.grid[0] + torch.arange(other.grid[0], device=device)
    place = row[..., None] * width + ids
    at = (torch.searchsorted(base, place, right=True) - 1).clamp(min=0)
    inside = (ids >= 0) & (base[at] <= place) & (place < end[at])
    return torch.where(inside, id[at], -1)
