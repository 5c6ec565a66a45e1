"""Blocks of keys chosen by every query for itself: choosing in chunks of rows, and the pairs that come of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.common.errors import UnsupportedError
from manyheads.mask import Causal, Mask, TileLayout, as_mask
from manyheads.mechanism.select import Cut, Forced, top_k

_SCORES = 1 << 21  # scores held at a time
_CAUSAL = Causal()


def rows_at_once(entries: int) -> int:
    """How many rows of so many scores each are computed together."""
    return max(16, _SCORES // max(entries, 1))


def choose(
    score: Callable[[slice], Tensor],
    parts: Cut,
    *,
    queries: int,
    keys: int,
    block: int,
    keep: int,
    force: Forced,
    rows: int,
) -> Int[Tensor, "B G Q K"]:
    """The best blocks of each query among those that it sees, without a table of all queries and keys.

    Args:
        score: From a slice of queries to their scores (B, G, rows, T) of the first T blocks, all that they see.
        parts: The documents, cut into whole blocks.
        queries: Queries, the last tokens of ``keys``.
        keys: Keys.
        block: Keys of a block.
        keep: Blocks kept at most.
        force: Blocks that are always kept.
        rows: Queries of a slice.

    Returns:
        int32 (B, G, queries, min(keep, blocks)), ascending, -1 after the last.
    """
    found = []
    width = min(keep, -(-keys // block))
    for start in range(0, queries, rows):
        some = slice(start, min(start + rows, queries))
        scores = score(some)
        seen = visible_blocks(parts, some, queries, keys, block, scores.shape[-1])
        ids = top_k(scores, min(keep, scores.shape[-1]), visible=seen, force=force)
        found.append(torch.nn.functional.pad(ids, (0, width - ids.shape[-1]), value=-1))
    return torch.cat(found, 2)


def visible_blocks(
    parts: Cut, some: slice, queries: int, keys: int, block: int, count: int
) -> Bool[Tensor, "#B 1 rows T"]:
    """Which of the first ``count`` blocks hold a key that some queries see."""
    device = parts.tensors[0].device
    at = torch.arange(some.start, some.stop, device=device) + (keys - queries)
    first = torch.arange(count, device=device) * block
    seen = (first <= at[:, None])[None, None]
    if parts.document is None:
        return seen
    own, theirs = parts.document[:, at], parts.document[:, first]
    return seen & ((own[:, :, None] == theirs[:, None]) & (own >= 0)[:, :, None])[:, None]


def blocks_seen(some: slice, queries: int, keys: int, block: int) -> int:
    """How many blocks, from the first, the queries of a slice may see."""
    return max(1, -(-(some.stop + keys - queries) // block))


def far_apart(parts: Cut, keys: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor] | None:
    """Positions of queries and (some) keys under which ``causal & window(n)`` stays in a document, for any n up to
    the length of the cut; None without documents."""
    if parts.document is None:
        return None
    at = torch.arange(parts.length, device=parts.document.device)
    spread = at + (parts.document + 1) * (parts.length + 1)
    q_pos, k_pos = spread, spread[:, keys]
    return (q_pos[0], k_pos[0]) if len(spread) == 1 else (q_pos, k_pos)


def restored(parts: Cut, out: Tensor) -> Tensor:
    """Without the padding that cutting documents added; queries may be fewer than the keys where there are none."""
    return out if parts.place is None else parts.restore(out)


def layout(ids: Int[Tensor, "B G Q K"], keys: int, block: int, heads: int) -> TileLayout:
    """The causal pairs of chosen blocks, for engines: rows of one query, tiles of one block."""
    return TileLayout.from_ids(ids, nq=ids.shape[2], nk=keys, tile=(1, block), mask=_CAUSAL, heads=heads)


def selected(ids: Int[Tensor, "B G Q K"], parts: Cut, keys: int, heads: int) -> TileLayout | Int[Tensor, "B G N J"]:
    """What a mechanism says that it visits: the layout, or for packed documents the tokens, in their own order."""
    if parts.place is None:
        return layout(ids, keys, parts.block, heads)
    tokens = parts.place.shape[1]
    number = torch.full((parts.place.shape[0], parts.length + parts.block), -1, device=ids.device)
    number.scatter_(1, parts.place, torch.arange(tokens, device=ids.device).expand(parts.place.shape[0], -1))
    spot = ids.long()[..., None] * parts.block + torch.arange(parts.block, device=ids.device)
    spot = torch.where(ids[..., None] < 0, parts.length, spot).flatten(3)  # where no token is
    found = parts.restore(number[:, None, None].expand(*spot.shape[:3], -1).gather(3, spot))
    later = found > torch.arange(tokens, device=ids.device)[:, None]
    return torch.where(later, -1, found).to(torch.int32)


# --- for references, plainly ------------------------------------------------------------------------


def numbered(mask: Mask | str | None, queries: int, keys: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each query sees (B|1, 1, Q, N); each key's place in its document and the number of its block (B|1, N)."""
    whole = as_mask("causal" if mask is None else mask)
    if queries == keys:
        allowed = square = whole.dense(keys, keys)
    else:
        allowed, square = whole.dense(queries, keys), as_mask("causal").dense(keys, keys)
    place = square[:, 0].sum(-1) - 1
    return allowed, place, (place % block == 0).cumsum(-1) - 1


def best_blocks(
    scores: Float[Tensor, "B G Q T"], seen: Bool[Tensor, "#B 1 Q T"], keep: int, first: int, local: int
) -> Bool[Tensor, "B G Q T"]:
    """The blocks of highest score in each row, by their definition: sorted, the forced ones before all others."""
    rank = seen.cumsum(-1)
    forced = seen & ((rank <= first) | (rank > rank[..., -1:] - local))
    scores = scores.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :keep], True)
    return chosen & seen


def by_block(values: Tensor, number: Tensor, reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Reduces (B, G, Q, N) over the keys of each block, (B, G, Q, T)."""
    columns = [reduce(values, (number == b)[:, None, None]) for b in range(int(number.max()) + 1)]
    return torch.stack(columns, -1)


def self_only(lens: Tensor | None, queries: int, keys: int, slug: str) -> None:
    """Refuses packed documents whose queries are not their keys.

    Raises:
        UnsupportedError: Documents, and queries and keys of different lengths.
    """
    if lens is not None and queries != keys:
        raise UnsupportedError(f"{slug}: packed documents whose {queries} queries are not their {keys} keys")
