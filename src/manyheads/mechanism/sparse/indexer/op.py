"""The operator behind the indexers: what a compiler sees, and the loop over documents and tiles of queries."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from manyheads.engine.scratch import Scratch, borrowed

from . import hierarchical, routed
from .crossing import crossing
from .pooled import block_means
from .tile import Tile, everything

_library = torch.library.Library("manyheads", "FRAGMENT")
_library.define(
    "index_tokens(Tensor q, Tensor k, Tensor w, Tensor? means, Tensor? lens, int keep, str how, int[] options)"
    " -> Tensor"
)

SCORES = 2**22
"""Scores (of a query and a key) of one tile of queries at most, where that leaves enough queries."""
TILE = {"flat": (32, 8), "hisa": (128, 64), "misa": (128, 8)}
"""Queries of a tile: at most, and at least."""


def _forward(
    q: Tensor, k: Tensor, w: Tensor, means: Tensor | None, lens: Tensor | None, keep: int, how: str, options: list[int]
) -> Tensor:
    (batch, _, nq, _), before = q.shape, k.shape[1] - q.shape[2]
    out = torch.full((batch, nq, keep), -1, dtype=torch.int32, device=q.device)
    with borrowed() as scratch:
        for b in range(batch):
            pooled = None if means is None else means[b]
            for start, stop in _documents(lens, b, k.shape[1]):
                rows = slice(max(0, start - before), max(0, stop - before))
                found = out[b, rows]
                _document(q[b, :, rows], k[b, start:stop], w[b, :, rows], pooled, found, how, options, scratch)
                if start:
                    found += start * (found >= 0)
    return out


def _documents(lens: Tensor | None, entry: int, tokens: int) -> list[tuple[int, int]]:
    """Where the documents of a batch entry begin and end."""
    if lens is None:
        return [(0, tokens)]
    own = lens if lens.dim() == 1 else lens[min(entry, lens.shape[0] - 1)]
    ends = [0, *own.cumsum(0).tolist()]
    return [(a, b) for a, b in pairwise(ends) if b > a]


def _document(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    means: Tensor | None,
    out: Tensor,
    how: str,
    options: list[int],
    scratch: Scratch,
) -> None:
    """Fills ``out (Nq, keep)`` for queries ``(H, Nq, D)`` that stand last among keys ``(n, D)``."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    first, keep = k.shape[0] - q.shape[1], out.shape[1]
    border = crossing(how, keep, options)
    if means is None and k.shape[0] > max(border, keep):
        means = block_means(k, options[0], wide, scratch)
    for start, stop in _tiles(how, q.shape[1], first, keep, border):
        rows, weights = (t[:, start:stop].transpose(0, 1).to(wide).contiguous() for t in (q, w))
        tile = Tile(rows, weights, k[: first + stop], first + start, keep, scratch)
        out[start:stop] = _select(tile, means, how if first + start >= border else "flat", options)


def _select(tile: Tile, means: Tensor | None, how: str, options: list[int]) -> Tensor:
    if tile.first + tile.queries <= tile.keep:
        return everything(tile)
    if how == "flat" or means is None:
        return tile.flat()
    means = means[: -(-tile.k.shape[0] // options[0])]
    return (hierarchical if how == "hisa" else routed).select(tile, means, *options[:-1])


def _tiles(how: str, queries: int, first: int, keep: int, border: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries that are chosen for together; none spans the border between two ways of choosing."""
    start, cuts = 0, [c - first for c in (keep, border) if first < c < first + queries]
    most, least = TILE[how]
    while start < queries:
        rows = max(least, min(most, SCORES // (first + start + 1)))
        stop = min([start + rows, queries, *(c for c in cuts if c > start)])
        yield start, stop
        start = stop


def _fake(
    q: Tensor, k: Tensor, w: Tensor, means: Tensor | None, lens: Tensor | None, keep: int, how: str, options: list[int]
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], keep, dtype=torch.int32)


_library.impl("index_tokens", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("manyheads::index_tokens", _fake)
op = torch.ops.manyheads.index_tokens.default
