"""A few heads for each query, chosen by what they contribute to the means of blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .pooled import running_means
from .tile import Tile, gathered_scores
from .topk import top_tokens


def contributions(tile: Tile, means: Tensor, block: int) -> Tensor:
    """``(Q, H)``: the mean absolute contribution of each head over the blocks up to the own one.

    The own block of a query is the mean of its tokens so far, so that no later token has a say.

    Args:
        tile: The queries.
        means: ``(M, D)``: means of the blocks.
        block: Tokens of a block.
    """
    own, (queries, heads, _) = (tile.seen - 1) // block, tile.q.shape
    products = torch.mm(tile.q.flatten(0, 1), means.mT).relu_().view(queries, heads, -1)
    earlier = (torch.arange(means.shape[0], device=own.device) < own[:, None]).to(products.dtype)
    total = torch.bmm(products, earlier[..., None])[..., 0]
    running = running_means(tile.k, block, tile.first, tile.q.dtype)
    total += torch.bmm(tile.q, running[..., None])[..., 0].relu_()
    return total * tile.w.abs() / (own[:, None] + 1)


def active_heads(tile: Tile, means: Tensor, block: int, heads: int) -> Tensor:
    """``(Q, heads)``: the heads with the highest contribution, ascending; those without weight come last."""
    energy = contributions(tile, means, block).masked_fill_(tile.w == 0, -1.0)
    return top_tokens(energy, min(heads, energy.shape[1]))


def select(tile: Tile, means: Tensor, block: int, heads: int, rerank: int) -> Tensor:
    """``(Q, keep)`` ids by the scores of the active heads, or by all heads among the ``rerank`` best of those."""
    active = active_heads(tile, means, block, heads)
    width = tile.q.shape[2]
    q = tile.q.gather(1, active[..., None].expand(-1, -1, width))
    some = replace(tile, q=q, w=tile.w.gather(1, active))
    if not rerank:
        return some.flat()
    listed = replace(some, keep=max(rerank, tile.keep)).flat()
    at = top_tokens(gathered_scores(tile, listed), tile.keep)
    return listed.gather(1, at.clamp(min=0)).where(at >= 0, -1)
