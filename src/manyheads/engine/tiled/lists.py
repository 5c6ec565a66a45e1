"""Lists of key tiles for each query tile, turned into lists of query tiles for each key tile by one sort.

Nothing here knows tensors: it is done once for each layout, on the host, without a loop over queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...mask.evaluate import unpack
from ...mask.layout import TileLayout
from .order import sharing

_TALL = 1024  # rows of a piece of a list: products are slower for fewer
_SHORT = 16  # rows of the shortest piece
_PARTIAL = 16 << 20  # bytes of partial results of a chunk: what stays in cache


class Part(NamedTuple):
    """Pieces of lists, of equal size, that lie one after the other among the entries of a chunk.

    Attributes:
        first: Entry at which the first piece begins.
        size: Entries of a piece.
        tiles: int64 ``(P,)``: the key tile of each piece, numbered over all key heads.
        masked: Whether its entries have tile masks.
    """

    first: int
    size: int
    tiles: Tensor
    masked: bool


class Chunk(NamedTuple):
    """Some rows of query tiles, and the entries that belong to them: an entry is one row's choice of one key tile."""

    rows: slice
    entries: slice
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Lists:
    """A layout of padded ids by key tile, for one number of batch entries and heads.

    A *row* is a row of query tiles of one list; rows are numbered over all lists.

    Attributes:
        heads: Query heads that share each list.
        source: int32 ``(E,)``: the row of each entry, and one beyond the last where an entry only fills a piece up.
        mask: int32 ``(E,)``: the tile mask of each entry; read where a part is masked.
        place: int32 ``(rows, k)``: the entries of each row, counted from the first one of its chunk; where there is
            none, one beyond the last entry of the chunk.
        chunks: Every entry once.
        masks: bool ``(U, BM, BN)``, True where a pair is hidden.
    """

    heads: int
    source: Tensor
    mask: Tensor
    place: Tensor
    chunks: tuple[Chunk, ...]
    masks: Tensor


def lists_of(layout: TileLayout, batch: int, heads: int, kv_heads: int, width: int) -> Lists:
    """A layout by key tile; kept with it.

    Args:
        layout: Of padded ids, on a CPU.
        batch: Batch entries of the call.
        heads: Its query heads.
        kv_heads: Its key heads.
        width: Larger of the two head widths; decides how many rows make a chunk.

    Returns:
        The lists.

    Example:
        >>> ids = torch.tensor([[[[0, -1], [1, 0], [0, 1]]]])
        >>> found = lists_of(TileLayout.from_ids(ids, nq=3, nk=4, tile=(1, 2)), 1, 16, 1, 64)
        >>> [(part.size, part.tiles.tolist()) for part in found.chunks[0].parts]
        [(2, [0, 1]), (1, [0])]
        >>> found.source.tolist(), found.place.tolist()
        ([0, 1, 1, 2, 2], [[0, 5], [2, 1], [4, 3]])
    """
    known = layout.__dict__.setdefault("_lists", {})
    key = batch, heads, kv_heads, width
    if key not in known:
        known[key] = _inverted(layout, batch, heads, kv_heads, width)
    found: Lists = known[key]
    return found


def _inverted(layout: TileLayout, batch: int, heads: int, kv_heads: int, width: int) -> Lists:
    shared, ids, mask, masks = ids_of(layout, batch, heads, kv_heads)
    n_rows, slots = ids.shape
    each = layout.tile[0] * shared
    n_chunks = max(1, -(-4 * n_rows * slots * each * width // _PARTIAL))
    step = max(1, -(-n_rows // n_chunks))  # rows of a chunk
    # sorted by chunk, by whether there is a tile mask, by key head and tile, and then by row
    ids, mask = ids.flatten(), mask.flatten()
    chosen = (ids >= 0).nonzero()[:, 0]
    row = chosen // max(1, slots)
    n_own = batch * kv_heads * layout.grid[1]
    own = row // max(1, layout.grid[0]) * shared // (heads // kv_heads) * layout.grid[1] + ids[chosen]
    key, order = ((row // step * 2 + (mask[chosen] > 0)) * n_own + own).sort(stable=True)
    chosen, row = chosen[order], row[order]
    key, length = torch.unique_consecutive(key, return_counts=True)
    start, size, owner = _pieces(length, each)
    group = key[owner] // max(1, n_own)
    rank = (group * (_TALL + 1) - size).sort(stable=True).indices
    start, size, owner, group = (t[rank] for t in (start, size, owner, group))
    piece = torch.repeat_interleave(size)
    entry = torch.arange(len(piece)) - (size.cumsum(0) - size)[piece] + start[piece]
    real = entry < length.cumsum(0)[owner][piece]  # the others only fill a piece up
    entry = entry.where(real, 0)
    bounds = torch.searchsorted(group[piece], 2 * torch.arange(n_chunks + 1))
    place = bounds.diff()[torch.arange(n_rows) // step][:, None].repeat(1, slots)
    own_place = torch.arange(len(piece)) - bounds[(group // 2)[piece]]
    place.view(-1)[chosen[entry[real]]] = own_place[real]
    chunks = _chunks(group, size, key[owner] % max(1, n_own), bounds.tolist(), step, n_rows)
    source, kind = row[entry].where(real, n_rows), (mask[chosen[entry]] - 1).clamp(min=0)
    source, kind, place = (t.to(torch.int32) for t in (source, kind, place))
    return Lists(shared, source, kind, place, chunks, masks)


def ids_of(layout: TileLayout, batch: int, heads: int, kv_heads: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Query heads of a list, ids and tile masks ``(lists * Tq, k)`` of every list, and what is hidden in each mask."""
    assert layout.ids is not None
    tail, shared = layout.nk % layout.tile[1], sharing(layout, heads, kv_heads)
    lists = layout.index.expand(batch, heads)[:, ::shared].flatten()
    ids = layout.ids.flatten(0, 1)[lists].flatten(0, 1)
    mask = torch.zeros_like(ids)
    if layout.ids_mask is not None:
        mask = layout.ids_mask.flatten(0, 1)[lists].flatten(0, 1)
    masks = torch.from_numpy(~unpack(layout.bits.numpy(), layout.tile[1]))
    if tail:  # the last key tile is filled up with keys that nobody sees
        beyond = (torch.arange(layout.tile[1]) >= tail).expand(1, *layout.tile)
        masks = torch.cat([masks, beyond]) if len(masks) else beyond
        mask = torch.where((ids == layout.grid[1] - 1) & (mask == 0), len(masks), mask)
    return shared, ids, mask, masks


def _pieces(length: Tensor, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists cut into pieces of a few sizes, of which only the last one of a list may be too long.

    Args:
        length: Entries of each list, which lie one after the other.
        each: Rows of a product for each entry.

    Returns:
        First entry, size and list of every piece.

    Example:
        >>> _pieces(torch.tensor([37, 3]), 64)
        (tensor([ 0, 16, 32, 37, 36, 39]), tensor([16, 16,  4,  2,  1,  1]), tensor([0, 0, 0, 1, 0, 1]))
    """
    least = _power(max(1, _SHORT // each))
    sizes = [_power(max(least, _TALL // each))]
    while sizes[-1] > least:
        sizes.append(sizes[-1] // 2)
    begin, rest, found = length.cumsum(0) - length, length, []
    for n in sizes:
        count = (rest + (n - 1 if n == least else 0)) // n
        owner = torch.repeat_interleave(count)
        nth = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
        start = (begin + length - rest)[owner] + nth * n
        found.append((start, torch.full_like(start, n), owner))
        rest = rest % n
    start, size, owner = (torch.cat(t) for t in zip(*found, strict=True))
    return start, size, owner


def _power(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _chunks(
    group: Tensor, size: Tensor, tiles: Tensor, bounds: list[int], step: int, rows: int
) -> tuple[Chunk, ...]:
    """Pieces that are sorted by group (two for each chunk) and size, as parts of equal ones."""
    runs, count = torch.unique_consecutive(group * (_TALL + 1) + size, return_counts=True)
    parts: list[list[Part]] = [[] for _ in bounds[1:]]
    piece, entry = 0, 0
    for run, n in zip(runs.tolist(), count.tolist(), strict=True):
        (chunk, masked), height = divmod(run // (_TALL + 1), 2), run % (_TALL + 1)
        parts[chunk].append(Part(entry - bounds[chunk], height, tiles[piece : piece + n], bool(masked)))
        piece, entry = piece + n, entry + n * height
    return tuple(
        Chunk(slice(n * step, min((n + 1) * step, rows)), slice(bounds[n], bounds[n + 1]), tuple(some))
        for n, some in enumerate(parts)
    )
