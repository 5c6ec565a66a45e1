"""Neighbourhood attention taken apart: scores of every window, their bias, averages over windows.

Between the two steps stands a tensor ``(B, H, N, P)`` with one entry for each place of a window, for whatever a fused
softmax cannot do: a learned bias for relative positions, another normalisation, weights that come from elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.common.tracing import constant
from manyheads.engine.tiled.boxing import axes_of, cheapest_box, make_plan
from manyheads.mask import Neighborhood
from manyheads.mask.neighborhood import visible_places

from .neighborhood import PerAxis, grid_mask


def neighborhood_scores(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    *,
    shape: Sequence[int],
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
    table: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B Hq N P"]:
    r"""Scores of each query against the places of its window, P the product of the windows.

    $$s_{i,t} = \mathrm{scale}\; q_i \cdot k_{j(i,t)} + \mathrm{table}_{h,\; j(i,t) - i + w - 1}$$

    Places of a window are counted along the last axis first. On a causal axis, places beyond the query hold ``-inf``.

    Args:
        q: ``(B, Hq, N, D)``, N the product of ``shape``, last axis fastest.
        k: ``(B, Hkv, N, D)``.
        shape, window, stride, dilation, causal: As for :func:`neighborhood_attention`.
        table: ``(Hq, 2 w - 1, ...)`` with one dimension for each axis: what is added for each distance of key and
            query, counted in steps of the dilation; differentiable.
        scale: Multiplies the dot products; default D ** -0.5.

    Returns:
        ``(B, Hq, N, P)``, float32 (float64 for float64).

    Raises:
        ValueError: As :func:`neighborhood_attention`, or a table of another shape.

    Source:
        Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143, equation 2.

    Example:
        >>> from manyheads.mechanism.sparse import neighborhood_attention
        >>> q = k = v = torch.randn(1, 2, 20, 8)
        >>> grid = {"shape": (4, 5), "window": 3}
        >>> weights = neighborhood_scores(q, k, **grid, table=torch.zeros(2, 5, 5)).softmax(-1)
        >>> out = neighborhood_average(weights, v, **grid)
        >>> weights.shape, torch.allclose(out, neighborhood_attention(q, k, v, **grid), atol=1e-5)
        (torch.Size([1, 2, 20, 9]), True)
    """
    mask = grid_mask(q, shape, window, stride, dilation, causal)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: expected the N={q.shape[2]} tokens of q, got {k.shape[2]}")
    steps = _plan(shape, window, stride, dilation, causal)
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    parts = []
    for step in steps.parts:
        rows = q.index_select(2, step.queries.to(q.device)).to(wide).unflatten(2, step.split)
        keys = k.index_select(2, step.keys.to(k.device)).to(wide).unflatten(2, (step.split[0], -1))
        s = rows.unflatten(1, (-1, groups)) @ keys.mT[:, :, None]
        slots = step.slots.to(q.device).expand(*s.shape[:4], -1, -1)
        parts.append(s.gather(-1, slots).flatten(3, 4).flatten(1, 2))
    s = torch.cat(parts, dim=2).index_select(2, steps.inverse.to(q.device))
    s = s * (q.shape[3] ** -0.5 if scale is None else scale)
    if table is not None:
        _check_table(table, q, mask)
        index = _away(shape, window, stride, dilation, causal).to(table.device)
        s = s + table.flatten(1).index_select(1, index.flatten()).unflatten(1, tuple(index.shape))
    return s if steps.seen is None else s.masked_fill(~steps.seen.to(q.device), -math.inf)


def neighborhood_average(
    weights: Float[Tensor, "B Hq N P"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    shape: Sequence[int],
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
) -> Float[Tensor, "B Hq N Dv"]:
    r"""Values of each window, weighted: $o_i = \sum_t w_{i,t}\, v_{j(i,t)}$.

    Args:
        weights: ``(B, Hq, N, P)`` as :func:`neighborhood_scores` orders them; entries of places beyond a causal query
            do not count.
        v: ``(B, Hkv, N, Dv)``.
        shape, window, stride, dilation, causal: As for :func:`neighborhood_attention`.

    Returns:
        ``(B, Hq, N, Dv)`` in the dtype of the values.

    Raises:
        ValueError: As :func:`neighborhood_attention`, or weights for another window.

    Example:
        >>> v = torch.arange(5.0).view(1, 1, 5, 1)
        >>> neighborhood_average(torch.full((1, 1, 5, 3), 1 / 3), v, shape=(5,), window=3).flatten().tolist()
        [1.0, 1.0, 2.0, 3.0, 3.0]
    """
    mask = grid_mask(v, shape, window, stride, dilation, causal)
    if weights.shape[2:] != (v.shape[2], math.prod(mask.window)) or weights.shape[1] % v.shape[1]:
        want = f"(B, Hq, N={v.shape[2]}, P={math.prod(mask.window)}), Hq a multiple of {v.shape[1]}"
        raise ValueError(f"weights: expected {want}, got {tuple(weights.shape)}")
    steps = _plan(shape, window, stride, dilation, causal)
    if steps.seen is not None:
        weights = weights.masked_fill(~steps.seen.to(weights.device), 0.0)
    groups = weights.shape[1] // v.shape[1]
    parts = []
    for step in steps.parts:
        rows = weights.index_select(2, step.queries.to(v.device)).unflatten(2, step.split).unflatten(1, (-1, groups))
        values = v.index_select(2, step.keys.to(v.device)).to(rows.dtype).unflatten(2, (step.split[0], -1))
        slots = step.slots.to(v.device).expand(rows.shape)
        dense = rows.new_zeros(*rows.shape[:-1], values.shape[3]).scatter_add(-1, slots, rows)
        parts.append((dense @ values[:, :, None]).flatten(3, 4).flatten(1, 2))
    return torch.cat(parts, dim=2).index_select(2, steps.inverse.to(v.device)).to(v.dtype)


class _Step(NamedTuple):
    """Boxes that are alike: their queries, their keys, and where in a box of keys each place of a window lies."""

    queries: Tensor
    keys: Tensor
    split: tuple[int, int]
    slots: Tensor


class _Steps(NamedTuple):
    """The boxes of a grid, the order that undoes theirs, and which places ``(N, P)`` are seen (None: all)."""

    parts: tuple[_Step, ...]
    inverse: Tensor
    seen: Tensor | None


@constant
def _plan(
    shape: Sequence[int], window: PerAxis, stride: PerAxis, dilation: PerAxis, causal: bool | Sequence[bool]
) -> _Steps:
    return _made(Neighborhood(shape, window, stride, dilation, causal))


@functools.lru_cache(maxsize=32)
def _made(mask: Neighborhood) -> _Steps:
    box = cheapest_box(mask, _HEADS)[1] or mask.stride
    parts = []
    for kind in make_plan(mask, box).kinds:
        queries, keys = (torch.from_numpy(t) for t in kind.tokens())
        slots = np.zeros((1, 1), dtype=np.int64)
        for line, window in zip(kind.lines, mask.window, strict=True):  # beyond the box: hidden by `seen`
            place = np.minimum(np.array(line.first)[:, None] + np.arange(window), line.keys - 1)
            slots = _outer(slots * line.keys, place)
        parts.append(_Step(queries.flatten(), keys.flatten(), tuple(queries.shape), torch.from_numpy(slots)))  # type: ignore[arg-type]
    inverse = torch.cat([part.queries for part in parts]).argsort()
    if not any(mask.causal):
        return _Steps(tuple(parts), inverse, None)
    hidden = np.zeros((1, 1), dtype=np.int64)
    for _, last, place in _windows(mask):
        hidden = _outer(hidden, (place > last[:, None]).astype(np.int64))
    return _Steps(tuple(parts), inverse, torch.from_numpy(hidden == 0))


_HEADS = 4  # that boxes are chosen for; any choice is right


def _check_table(table: Tensor, q: Tensor, mask: Neighborhood) -> None:
    want = (q.shape[1], *(2 * w - 1 for w in mask.window))
    if not isinstance(table, Tensor) or tuple(table.shape) != want:
        got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"table: expected shape (Hq, 2 window - 1 per axis) = {want}, got {got}")


@constant
def _away(
    shape: Sequence[int], window: PerAxis, stride: PerAxis, dilation: PerAxis, causal: bool | Sequence[bool]
) -> Tensor:
    return _distances(Neighborhood(shape, window, stride, dilation, causal))


@functools.lru_cache(maxsize=32)
def _distances(mask: Neighborhood) -> Tensor:
    """int64 ``(N, P)``: which entry of a flattened table belongs to each query and place."""
    index = np.zeros((1, 1), dtype=np.int64)
    for window, (own, _, place) in zip(mask.window, _windows(mask), strict=True):
        away = np.clip(place - own[:, None] + window - 1, 0, 2 * window - 2)
        index = _outer(index * (2 * window - 1), away)
    return torch.from_numpy(index)


def _windows(mask: Neighborhood) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each axis, of each coordinate: its place in its residue class, the last place seen, its window ``(L, w)``."""
    for length, window, stride, dilation, causal in axes_of(mask):
        own, last = (np.zeros(length, dtype=np.int64) for _ in range(2))
        first = np.zeros(length, dtype=np.int64)
        for residue in range(dilation):
            cells = (length - 1 - residue) // dilation + 1
            first[residue::dilation], last[residue::dilation] = visible_places(cells, window, stride, causal)
            own[residue::dilation] = np.arange(cells)
        yield own, last, first[:, None] + np.arange(window)


def _outer(rows: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Sums over two axes: ``(M, P)`` and ``(m, p)`` to ``(M m, P p)``, the second counted faster."""
    both = rows[:, None, :, None] + more[None, :, None, :]
    return both.reshape(len(rows) * len(more), -1)
