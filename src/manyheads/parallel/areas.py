"""Exact areas of a mask, from its layout: visible pairs per query, and per pair of ranks."""

from __future__ import annotations

import numpy as np

from ..mask import Mask, TileLayout

Array = np.ndarray
_CELLS = 1 << 22  # numbers in flight


def query_areas(layout: TileLayout) -> Array:
    """Counts the keys that every query sees, summed over batch entries and heads.

    Args:
        layout: Any layout; only its runs and bitmaps are read, never single pairs.

    Returns:
        int64 ``(nq,)``; its sum is ``layout.pairs``.

    Example:
        >>> from manyheads.mask import Causal, Window
        >>> query_areas((Causal() & Window(3)).tiles(5)).tolist()
        [1, 2, 3, 3, 3]
    """
    runs, (bm, bn), n_rows = layout.runs, layout.tile, layout.grid[0]
    uses = np.bincount(layout.index.reshape(-1).cpu().numpy(), minlength=layout.sets)
    uses = uses * (layout.batch * layout.heads // max(layout.index.numel(), 1))
    wide = np.minimum((runs.first + runs.count) * bn, layout.nk) - runs.first * bn
    out = np.zeros((n_rows, bm), dtype=np.int64)
    seen = np.bitwise_count(layout.bits.cpu().numpy()).sum(-1, dtype=np.int64)
    row, weight = runs.row % max(n_rows, 1), uses[runs.row // max(n_rows, 1)]
    full = runs.id == 0
    np.add.at(out, row[full], (wide * weight)[full][:, None])
    partial = np.flatnonzero(~full)
    for lo in range(0, len(partial), max(1, _CELLS // bm)):
        part = partial[lo : lo + max(1, _CELLS // bm)]
        times = runs.count[part] * weight[part]
        np.add.at(out, row[part], seen[runs.id[part] - 1] * times[:, None])
    return out.reshape(-1)[: layout.nq]


def key_uses(layout: TileLayout) -> Array:
    """Counts the queries that see every key, summed over batch entries and heads: int64 ``(nk,)``.

    Example:
        >>> from manyheads.mask import Causal, Window
        >>> key_uses((Causal() & Window(3)).tiles(5)).tolist()
        [3, 3, 3, 2, 1]
    """
    return query_areas(layout.transpose())


def layout_of(mask: Mask | TileLayout, n: int, tile: int = 128) -> TileLayout:
    """The layout of a mask over ``n`` queries and keys; a layout is checked and passed on.

    Raises:
        TypeError: Neither a mask nor a layout.
        ValueError: A layout of another size.
    """
    if isinstance(mask, TileLayout):
        if (mask.nq, mask.nk) != (n, n):
            raise ValueError(f"mask: expected a layout of {n} x {n}, got {mask.nq} x {mask.nk}")
        return mask
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a Mask or a TileLayout, got {type(mask).__name__}")
    return mask.tiles(n, n, tile=(tile, tile), batch=mask.shape[0], heads=mask.shape[1])
