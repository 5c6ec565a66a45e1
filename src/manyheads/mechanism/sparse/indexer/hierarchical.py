"""Blocks first, then tokens of the best blocks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import topk
from .scoring import score_piece, score_rows
from .tile import Tile, gathered_scores
from .topk import top_tokens

FEW = 4
"""Up to so many queries on a CPU, the blocks that any of them chose are scored for all."""
SHARED = 0.6
"""Beyond so many queries: so are blocks that this share of them chose."""
STEP = 16
"""What one product and its passes cost beside their work, in blocks scored for one query."""
RUN = 32
"""Blocks that are scored in one step at most: their keys are to stay in cache."""
STRIP = 256
"""Blocks times queries that are scored in one step, where more than one block is."""


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
    if tile.keep >= chosen.shape[1] * block:  # blocks alone decide
        tokens = _tokens(tile, chosen, block)
        return torch.nn.functional.pad(tokens, (0, tile.keep - tokens.shape[1]), value=-1)
    if topk.on_host(chosen):
        scores = _by_blocks(tile, chosen, block)
    else:
        scores = gathered_scores(tile, _tokens(tile, chosen, block))
    at = top_tokens(scores, tile.keep)
    ids = chosen.gather(1, (at // block).clamp(min=0)) * block + at % block
    return ids.where(at >= 0, -1)


def _tokens(tile: Tile, chosen: Tensor, block: int) -> Tensor:
    """``(Q, m * block)``: the tokens of each query's blocks that it sees, ascending, -1 after them."""
    tokens = (chosen[..., None] * block + torch.arange(block, device=chosen.device)).flatten(1)
    listed = (chosen >= 0).repeat_interleave(block, 1) & (tokens < tile.seen[:, None])
    return tokens.where(listed, -1)


def _by_blocks(tile: Tile, chosen: Tensor, block: int) -> Tensor:
    """``(Q, m * block)``: scores of the tokens of each query's blocks, in the order of the list."""
    queries, slots = chosen.shape
    rest = queries * slots  # a row for what nobody wants
    scores = tile.scratch("candidates", (rest + 1, block), tile.q).fill_(-torch.inf)
    place = np.full((queries, -(-tile.k.shape[0] // block)), rest)  # where the scores of a block go, for each query
    row, slot = np.nonzero(chosen.numpy() >= 0)
    place[row, chosen.numpy()[row, slot]] = row * slots + slot
    order, steps = plan(place < rest)
    place, keys = place[:, order], _Blocks(tile, block)
    for start, stop, rows in steps:
        q, w, to = tile.q, tile.w, place[:, start:stop]
        if rows is not None:
            some = tile.scratch("some queries", (len(rows), *q.shape[1:]), q)
            torch.index_select(q.flatten(1), 0, torch.from_numpy(rows), out=some.flatten(1))
            q, w, to = some, w.index_select(0, torch.from_numpy(rows)), to[rows]
        found = score_piece(q, keys(order[start:stop]), w, tile.scratch)
        if found.shape[1] < (stop - start) * block:  # the last block of all has fewer tokens
            found = torch.nn.functional.pad(found, (0, (stop - start) * block - found.shape[1]), value=-torch.inf)
        scores.index_copy_(0, torch.from_numpy(to.reshape(-1)), found.view(-1, block))
    last = (chosen >= 0).sum(1) - 1  # the own block is the last of the list
    own = torch.arange(queries) * slots + last
    ahead = torch.arange(block) > ((tile.seen - 1) % block)[:, None]
    scores.index_copy_(0, own, scores[own].masked_fill_(ahead, -torch.inf))
    return scores[:rest].view(queries, slots * block)


class _Blocks:
    """The keys of some blocks one after the other; neighbours are not copied."""

    def __init__(self, tile: Tile, block: int) -> None:
        whole = tile.k.shape[0] // block
        self.block, self.k, self.scratch = block, tile.k, tile.scratch
        self.wide = tile.k[: whole * block].reshape(whole, -1)

    def __call__(self, numbers: np.ndarray) -> Tensor:
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first == len(numbers) - 1:
            return self.k[first * self.block : (last + 1) * self.block]
        some = self.scratch("some keys", (len(numbers), self.wide.shape[1]), self.k)
        torch.index_select(self.wide, 0, torch.from_numpy(numbers), out=some)
        return some.view(-1, self.k.shape[1])


def plan(wanted: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, np.ndarray | None]]]:
    """Which blocks to score for which queries, step by step.

    Blocks that most queries chose are scored for all of them. Others are put together with their neighbours while
    that wastes less than a step costs. The last block, which may have fewer tokens, has a step of its own.

    Args:
        wanted: bool ``(Q, M)``.

    Returns:
        The order of blocks, int64; and steps: begin and end in that order, and the queries or None for all.
    """
    queries, blocks = wanted.shape
    count = wanted.sum(0)
    shared = count > (0 if queries <= FEW else SHARED * queries)
    shared[-1] = False
    others = np.flatnonzero(~shared & (count > 0))
    order, border = np.concatenate((np.flatnonzero(shared), others)), int(shared.sum())
    most = min(RUN, max(1, STRIP // queries))
    steps: list[tuple[int, int, np.ndarray | None]] = [
        (start, min(start + most, border), None) for start in range(0, border, most)
    ]
    packed = np.packbits(wanted[:, others], axis=0).T
    sets = [int.from_bytes(column.tobytes()) for column in packed]
    start = 0
    while start < len(sets):
        rows, stop = sets[start], start + 1
        while stop < len(sets) and others[stop] < blocks - 1:
            both, size = rows | sets[stop], stop - start
            units = both.bit_count() * (size + 1)
            if units > STRIP or units - rows.bit_count() * size - sets[stop].bit_count() > STEP:
                break
            rows, stop = both, stop + 1
        steps.append((border + start, border + stop, np.flatnonzero(wanted[:, others[start:stop]].any(1))))
        start = stop
    return order, steps
