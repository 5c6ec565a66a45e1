"""What is in a layout, counted and written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .evaluate import unpack
from .runs import lookup

if TYPE_CHECKING:
    from .layout import TileLayout

MAX_DENSE = 1 << 34


def counts(layout: TileLayout) -> tuple[int, int]:
    """Visible pairs and visited tiles of a layout in runs storage, over batch and heads."""
    rows = layout.runs
    n_rows = layout.grid[0]
    height = np.minimum(layout.nq - np.arange(n_rows) * layout.tile[0], layout.tile[0])
    wide = np.minimum((rows.first + rows.count) * layout.tile[1], layout.nk) - rows.first * layout.tile[1]
    bits = np.bitwise_count(layout.bits.cpu().numpy()).sum((1, 2), dtype=np.int64)
    area = np.append(0, bits)[rows.id] * rows.count
    row = rows.row
    area = np.where(rows.id == 0, wide * height[row % n_rows] if n_rows else wide, area)
    owner = row // max(n_rows, 1)
    uses = np.bincount(layout.index.reshape(-1).cpu().numpy(), minlength=layout.sets)
    share = layout.batch * layout.heads // max(layout.index.numel(), 1)
    pairs = _sum_by(owner, area, layout.sets)
    visited = _sum_by(owner, rows.count, layout.sets)
    return int(pairs @ uses) * share, int(visited @ uses) * share


def dense(layout: TileLayout) -> torch.Tensor:
    """The visible pairs as bool ``(B|1, H|1, nq, nk)``.

    Raises:
        ValueError: Beyond 2^34 pairs.
    """
    size = layout.index.numel() * layout.nq * layout.nk
    if size > MAX_DENSE:
        raise ValueError(f"dense: {size} pairs would not fit; expected at most {MAX_DENSE}")
    (tq, tk), (bm, bn) = layout.grid, layout.tile
    masks = [
        np.ones((1, bm, bn), dtype=bool),
        unpack(layout.bits.cpu().numpy(), bn),
        np.zeros((1, bm, bn), dtype=bool),
    ]
    table = np.concatenate(masks)
    out = np.empty((layout.sets, layout.nq, layout.nk), dtype=bool)
    for s in range(layout.sets):
        row, column = np.indices((tq, tk))
        plane = table[lookup(layout.runs, s * tq + row, column)]
        out[s] = plane.transpose(0, 2, 1, 3).reshape(tq * bm, tk * bn)[: layout.nq, : layout.nk]
    return torch.from_numpy(out)[layout.index.cpu().long()]


def _sum_by(owner: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    total = np.zeros(n, dtype=np.int64)
    np.add.at(total, owner, value)
    return total
