"""Ulysses: tokens are exchanged for heads, so that some heads see many tokens; alone, or around a ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .collectives import Link
from .ring import Grads, Result
from .steps import Call, Shared, packed, placed, unpacked


class Scheme(Protocol):
    """How keys and values meet the queries of other ranks."""

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Result:
        """This rank's output and log-normaliser over all keys, in the accumulation dtype, without the sink."""

    def backward(
        self, call: Call, tensors: Grads, result: Result, grads: tuple[Tensor, Tensor | None], shared: Shared
    ) -> Grads:
        """Gradients of this rank's queries, keys and values, in the accumulation dtype."""


def refuse(heads: int, kv_heads: int, degree: int) -> list[str]:
    """Why heads cannot be divided among some ranks; empty when they can.

    Args:
        heads: Query heads.
        kv_heads: Key heads.
        degree: Ranks.

    Example:
        >>> refuse(6, 3, 4)
        ['6 query heads over 3 key heads cannot be divided among 4 ranks: each needs equally many, in whole groups ...
    """
    own, group = heads // degree, heads // max(1, kv_heads)
    if heads % degree or not own or (own % group and group % own):
        return [
            f"{heads} query heads over {kv_heads} key heads cannot be divided among {degree} ranks: each needs equally "
            "many, in whole groups or within one; take a scheme that divides only tokens (ring, gather, groupcast), or "
            "a smaller degree"
        ]
    return []


class Heads:
    """The exchange of tokens for heads among some ranks, and back.

    Key heads that several ranks read are sent to each of them: they are repeated on the wire only.

    Args:
        link: The ranks that divide the heads.
        index: For each of them the tokens that it holds.
    """

    def __init__(self, link: Link, index: Sequence[Tensor]) -> None:
        self.link, self.index = link, tuple(index)
        every = torch.cat(self.index)
        self.order = torch.argsort(every)
        self.tokens = every[self.order]
        self.places = torch.argsort(self.order).split([len(i) for i in self.index])

    def parts(self, heads: int, kv_heads: int) -> list[tuple[range, range]]:
        """Query heads and the key heads that they read, for each rank."""
        own, group = heads // self.link.world, heads // kv_heads
        starts = range(0, heads, own)
        return [(range(h, h + own), range(h // group, -(-(h + own) // group))) for h in starts]

    def divide(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """All heads of this rank's tokens against some heads of all tokens, which then ascend."""
        division = self.parts(q.shape[1], k.shape[1])
        sent = [packed([q[:, h.start : h.stop], *(t[:, g.start : g.stop] for t in (k, v))]) for h, g in division]
        h, g = division[self.link.rank]
        shapes = [
            tuple((t.shape[0], len(some), len(i), t.shape[3]) for t, some in ((q, h), (k, g), (v, g)))
            for i in self.index
        ]
        sizes = [(sum(torch.Size(s).numel() for s in three),) for three in shapes]
        flats = self.link.exchange(sent, sizes, "the exchange of tokens for heads").wait()
        split = [unpacked(flat, *three) for flat, three in zip(flats, shapes, strict=True)]
        return [self._joined(some) for some in zip(*split, strict=True)]

    def divide_one(self, t: Tensor) -> Tensor:
        """The same for one tensor of all query heads, ``(B, H, n, ...)``."""
        sent = list(t.chunk(self.link.world, 1))
        shapes = [(*sent[0].shape[:2], len(i), *t.shape[3:]) for i in self.index]
        return self._joined(self.link.exchange(sent, shapes, "the exchange of tokens for heads").wait())

    def unite(self, t: Tensor) -> Tensor:
        """Some heads of all tokens against all heads of this rank's tokens: the way back."""
        return torch.cat(self._back(t), 1)

    def unite_summed(self, dk: Tensor, dv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """The way back of gradients of keys and values; those of heads that several ranks read are added up."""
        division = self.parts(heads, kv_heads)
        sent = [packed([t.index_select(2, placed(at, t.device)) for t in (dk, dv)]) for at in self.places]
        n = len(self.index[self.link.rank])
        shapes = [tuple((t.shape[0], len(g), n, t.shape[3]) for t in (dk, dv)) for _, g in division]
        sizes = [(sum(torch.Size(s).numel() for s in both),) for both in shapes]
        flats = self.link.exchange(sent, sizes, "the return of gradients of keys and values").wait()
        whole = [t.new_zeros(t.shape[0], kv_heads, n, t.shape[3]) for t in (dk, dv)]
        for (_, g), flat, both in zip(division, flats, shapes, strict=True):
            for total, part in zip(whole, unpacked(flat, *both), strict=True):
                total[:, g.start : g.stop] += part
        return whole[0], whole[1]

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), 2).index_select(2, placed(self.order, parts[0].device))

    def _back(self, t: Tensor) -> list[Tensor]:
        sent = [t.index_select(2, placed(at, t.device)) for at in self.places]
        shape = tuple(sent[self.link.rank].shape)
        return self.link.exchange(sent, [shape] * self.link.world, "the exchange of heads for tokens").wait()
