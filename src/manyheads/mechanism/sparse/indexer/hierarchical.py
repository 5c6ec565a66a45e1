"""Blocks first, then tokens of the best blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .scoring import score_piece, score_rows
from .tile import Tile, gathered_scores
from .topk import top_tokens

FEW = 4
"""Up to so many queries on a CPU, the blocks that any of them chose are gathered and scored for all."""
STEP = 5
"""What one product and its passes cost beside their work, in blocks scored for one query."""
RUN = 8
"""Blocks that are scored at once, at most."""


def candidates(tile: Tile, means: Tensor, block: int, blocks: int) -> Tensor:
    """The blocks with the highest score of their mean, the first and the own one always among them.

    Args:
        tile: The queries.
        means: ``(M, D)``: means of the blocks, the last of which may lie ahead of some queries.
        block: Tokens of a block.
        blocks: Blocks to choose.

    Returns:
        int64 ``(Q, min(blocks, M))``, ascending, -1 after the last.
    """
    scores = score_rows(tile.q, means, tile.w, tile.scratch, "block scores")
    own, number = (tile.seen - 1) // block, torch.arange(means.shape[0], device=scores.device)
    scores.masked_fill_(number > own[:, None], -torch.inf)
    if blocks > 1:
        scores[:, 0] = torch.inf
    scores.scatter_(1, own[:, None], torch.inf)
    return top_tokens(scores, min(blocks, means.shape[0]))


def select(tile: Tile, means: Tensor, block: int, blocks: int) -> Tensor:
    """``(Q, keep)`` ids: the highest scores in the best blocks of each query."""
    chosen = candidates(tile, means, block, blocks)
    if tile.q.device.type != "cpu":
        inside = torch.arange(block, device=chosen.device)
        tokens = (chosen[..., None] * block + inside).flatten(1)
        listed = (chosen >= 0).repeat_interleave(block, 1) & (tokens < tile.seen[:, None])
        scores = gathered_scores(tile, tokens.where(listed, -1))
    else:
        scores = _by_blocks(tile, chosen, block)
    at = top_tokens(scores, tile.keep)
    ids = chosen.gather(1, (at // block).clamp(min=0)) * block + at % block
    return ids.where(at >= 0, -1)


def _by_blocks(tile: Tile, chosen: Tensor, block: int) -> Tensor:
    """``(Q, m * block)``: scores of the tokens of each query's blocks, in the order of the list."""
    queries, slots = chosen.shape
    scores = tile.scratch("candidates", (queries * slots, block), tile.q).fill_(-torch.inf)
    # where the scores of a block go, by query: its place in the list
    place = np.full((queries, -(-tile.k.shape[0] // block)), -1)
    row, slot = np.nonzero(chosen.numpy() >= 0)
    place[row, chosen.numpy()[row, slot]] = row * slots + slot
    wanted = place >= 0
    for numbers, rows in _together(wanted):
        q, w = tile.q, tile.w
        if len(rows) < queries:
            which = torch.from_numpy(rows)
            q = tile.scratch("some queries", (len(rows), *q.shape[1:]), q)
            torch.index_select(tile.q.flatten(1), 0, which, out=q.flatten(1))
            w = w.index_select(0, which)
        keys = _keys(tile, numbers, block)
        found = score_piece(q, keys, w, tile.scratch)
        if keys.shape[0] < len(numbers) * block:  # the last block of all has fewer tokens
            whole = tile.scratch("whole blocks", (len(rows), len(numbers) * block), q).fill_(-torch.inf)
            whole[:, : keys.shape[0]] = found
            found = whole
        to = place[np.ix_(rows, numbers)].reshape(-1)
        found = found.view(-1, block)
        if (to < 0).any():
            found, to = found[torch.from_numpy(to >= 0)], to[to >= 0]
        scores.index_copy_(0, torch.from_numpy(to), found)
    last = (chosen >= 0).sum(1) - 1  # the own block is the last of the list
    ends = (tile.seen - 1) % block
    ahead = torch.arange(block) > ends[:, None]
    own = torch.arange(queries) * slots + last
    scores.index_copy_(0, own, scores[own].masked_fill_(ahead, -torch.inf))
    return scores.view(queries, slots * block)


def _keys(tile: Tile, numbers: np.ndarray, block: int) -> Tensor:
    """The keys of some blocks one after the other; neighbours are not copied."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first == len(numbers) - 1:
        return tile.k[first * block : (last + 1) * block]
    tokens = torch.from_numpy((numbers[:, None] * block + np.arange(block)).reshape(-1))
    return tile.k.index_select(0, tokens[tokens < tile.k.shape[0]])


def _together(wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which blocks to score for which queries in one step, given ``(Q, M)`` what each query wants."""
    queries = len(wanted)
    if queries <= FEW:
        numbers = np.flatnonzero(wanted.any(0))
        for start in range(0, len(numbers), 2 * RUN):
            yield numbers[start : start + 2 * RUN], np.arange(queries)
        return
    count, start = wanted.sum(0), 0
    while start < len(count):
        if not count[start]:
            start += 1
            continue
        rows, stop = wanted[:, start], start + 1
        for stop in range(start + 1, min(start + RUN, len(count)) + 1):
            if stop == len(count) or stop == start + RUN:
                break
            both = rows | wanted[:, stop]
            wasted = both.sum() * (stop - start + 1) - rows.sum() * (stop - start) - count[stop]
            if wasted > STEP:
                break
            rows = both
        yield np.arange(start, stop), np.flatnonzero(rows)
        start = stop


def steps(wanted: np.ndarray) -> int:
    """Products that scoring takes, for reports and tests."""
    return sum(1 for _ in itertools.chain(_together(wanted)))
