"""Some neighbouring queries of one document, as every way of choosing tokens sees them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyheads.engine.scratch import Scratch

from . import topk
from .scoring import score_piece, score_rows
from .topk import top_tokens

GATHERED = 2**18
"""Keys that are gathered at once for some queries on a GPU."""
SPAN = 2**19
"""Keys whose scores are kept at once."""


@dataclass(frozen=True)
class Tile:
    """Queries ``first`` to ``first + Q - 1`` of a document, and what they may choose from.

    Attributes:
        q: ``(Q, H, D)``, contiguous, in the accumulation dtype.
        w: ``(Q, H)``, in the accumulation dtype.
        k: ``(n, D)``: the keys up to the last query, in the dtype of the inputs.
        first: Position of the first query.
        keep: Tokens to choose for each query.
        scratch: Memory.
    """

    q: Tensor
    w: Tensor
    k: Tensor
    first: int
    keep: int
    scratch: Scratch

    @property
    def queries(self) -> int:
        """Number of queries Q."""
        return self.q.shape[0]

    @property
    def seen(self) -> Tensor:
        """``(Q,)``: how many keys each query sees."""
        return torch.arange(self.first + 1, self.first + 1 + self.queries, device=self.q.device)

    def rows(self, start: int, stop: int) -> Tile:
        """Some of the queries."""
        keys = self.k[: self.first + stop]
        return replace(self, q=self.q[start:stop], w=self.w[start:stop], k=keys, first=self.first + start)

    def flat(self) -> Tensor:
        """``(Q, keep)`` ids: the highest scores of all keys that each query sees.

        Many keys are scored one span after the other, and of each span only what is kept so far goes on.
        """
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, self.k.shape[0], SPAN):
            scores = score_rows(self.q, self.k[start : start + SPAN], self.w, self.scratch)
            stop = start + scores.shape[1]
            if stop > self.first:  # some of these keys lie ahead of some queries
                token = torch.arange(max(self.first, start), stop, device=scores.device)
                scores[:, max(self.first, start) - start :].masked_fill_(token >= self.seen[:, None], -torch.inf)
            ids = top_tokens(scores, self.keep)
            if self.k.shape[0] > SPAN:
                found = ids + start, scores.gather(1, ids.clamp(min=0)).masked_fill_(ids < 0, -torch.inf)
                both = found if best is None else [torch.cat(pair, 1) for pair in zip(best, found, strict=True)]
                at = top_tokens(both[1], self.keep)
                best = both[0].gather(1, at.clamp(min=0)).where(at >= 0, -1), both[1].gather(1, at.clamp(min=0))
                best[1].masked_fill_(at < 0, -torch.inf)
                ids = best[0]
        return ids


def everything(tile: Tile) -> Tensor:
    """``(Q, keep)`` ids of a tile that sees no more keys than it may keep."""
    ids = torch.arange(tile.keep, device=tile.q.device)
    return torch.where(ids < tile.seen[:, None], ids, -1)


def gathered_scores(tile: Tile, ids: Tensor) -> Tensor:
    """Scores of each query against keys of its own.

    Args:
        tile: The queries.
        ids: ``(Q, C)``, -1 for none.

    Returns:
        ``(Q, C)``, ``-inf`` where there is none.
    """
    known, scores = ids.clamp(min=0), tile.q.new_empty(ids.shape)
    some = 1 if topk.on_host(ids) else max(1, GATHERED // ids.shape[1])
    for start in range(0, tile.queries, some):
        at, q, w = (t[start : start + some] for t in (known, tile.q, tile.w))
        if some == 1:
            scores[start] = score_piece(q, tile.k.index_select(0, at[0]), w, tile.scratch)[0]
            continue
        keys = tile.k.index_select(0, at.flatten()).unflatten(0, at.shape).to(q.dtype)
        scores[start : start + some] = torch.bmm(w[:, None], torch.bmm(q, keys.mT).relu_())[:, 0]
    return scores.masked_fill_(ids < 0, -torch.inf)
