"""Keys of tiles, from coordinates alone: tiles with equal keys hold equal bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .pyramid import SAMPLES, TiledSide, mixed, odd_weights
from .runs import Array

if TYPE_CHECKING:
    from .base import Leaf, Mask


def tile_keys(mask: Mask, q: TiledSide, k: TiledSide, i: Array, j: Array) -> tuple[list[Array], Array]:
    """Columns of a table whose equal rows are tiles with equal bits, and which tiles have no key.

    A leaf that hides or shows a whole tile adds nothing but that fact. Otherwise it adds the shapes of both
    sides along each axis it reads, and their distance (a relative leaf) or their places (an absolute one).
    """
    columns = [(q.lengths(i) != q.block) * 2 + (k.lengths(j) != k.block)]
    if k.patterns is not None:
        columns.append(k.patterns[j])
    lonely = np.zeros(len(i), dtype=bool)
    for leaf in mask.leaves():
        may, must = leaf.classify(q.boxes(0, i), k.boxes(0, j))
        may, must = np.broadcast_to(may, i.shape), np.broadcast_to(must, i.shape)
        columns.append(may.astype(np.int64) + must)
        partial = may & ~must
        if not partial.any():
            continue
        if not leaf.keyed:
            sample, known = _samples(leaf, q, k, i, j, partial)
            columns += sample
            lonely |= partial & ~known
            continue
        for axis in leaf.axes:
            at_q, at_k = q.coords[axis][i, 0], k.coords[axis][j, 0]
            own = [q.shapes(axis)[i], k.shapes(axis)[j]]
            own += [at_q - at_k] if leaf.relative else [at_q, at_k]
            columns += [np.where(partial, column, 0) for column in own]
    return columns, lonely


def has_keys(mask: Mask, q: TiledSide, k: TiledSide) -> bool:
    """Whether any PARTIAL tile may turn out equal to another before it is looked at."""

    def few(leaf: Leaf) -> bool:
        axes = leaf.axes
        return len(axes) == 1 and all(bool(side.changes(axes[0])[1].any()) for side in (q, k))

    return any(leaf.keyed or few(leaf) for leaf in mask.leaves())


def _samples(leaf: Leaf, q: TiledSide, k: TiledSide, i: Array, j: Array, partial: Array) -> tuple[list[Array], Array]:
    """Key columns for a leaf without keys, where its coordinate takes few values: its bits at one token of each.

    Returns:
        The columns, and which tiles they decide.
    """
    if len(leaf.axes) != 1:
        return [], np.zeros(len(i), dtype=bool)
    axis = leaf.axes[0]
    (at_q, few_q), (at_k, few_k) = q.changes(axis), k.changes(axis)
    known = partial & few_q[i] & few_k[j]
    ti, tj = i[known], j[known]
    there, here = np.take_along_axis(q.coords[axis], at_q, 1), np.take_along_axis(k.coords[axis], at_k, 1)
    seen = leaf.allows({axis: there[ti][:, :, None]}, {axis: here[tj][:, None, :]})
    bits = np.zeros(len(i), dtype=np.int64)
    seen = np.broadcast_to(np.asarray(seen, dtype=bool), (len(ti), SAMPLES, SAMPLES))
    bits[known] = np.packbits(seen.reshape(-1)).view(np.uint16)
    shapes = (np.where(known, side.shapes(axis)[at], 0) for side, at in ((q, i), (k, j)))
    return [bits, *shapes], known


def unique_rows(columns: list[Array]) -> tuple[Array, Array]:
    """Finds equal rows of a table given by int columns, by hash, confirmed value by value.

    Returns:
        ``(head, number)``: the first row of each distinct value, in order, and for every row which it equals.
    """
    code = np.zeros(len(columns[0]), dtype=np.uint64)
    for column, weight in zip(columns, odd_weights(len(columns)), strict=True):
        code += mixed(column.astype(np.int64, copy=False).view(np.uint64)) * weight
    _, head, number = np.unique(code, return_index=True, return_inverse=True)
    if not all(np.array_equal(column, column[head][number]) for column in columns):
        table = np.stack(columns, 1)
        _, head, number = np.unique(table, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(head)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return head[order], rank[number.reshape(-1)]
