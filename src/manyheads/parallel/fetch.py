"""Keys and values that are fetched at once: all of them, or only the rows that the mask needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .collectives import Link
from .ring import Grads, Result
from .steps import Call, Partial, Shared, packed, placed, unpacked


class Gather:
    """All keys and values come to every rank; gradients go back in one reduce-scatter.

    Args:
        link: The ranks.
        index: For each of them the tokens that it holds.
    """

    def __init__(self, link: Link, index: Sequence[Tensor]) -> None:
        self.link, self.index = link, tuple(index)
        every = torch.cat(self.index)
        self.order = torch.argsort(every)
        self.tokens = every[self.order]
        # where the tokens of each rank are among all, in order
        self.places = torch.argsort(self.order).split([len(i) for i in self.index])

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Result:
        """This rank's output and log-normaliser over all keys, in the accumulation dtype, without the sink."""
        keys, values = self._keys(k, v)
        return call.forward(q, keys, values, self.index[self.link.rank], self.tokens)

    def backward(
        self, call: Call, tensors: Grads, result: Result, grads: tuple[Tensor, Tensor | None], shared: Shared
    ) -> Grads:
        """Gradients of this rank's queries, keys and values; keys and values are gathered again."""
        q, k, v = tensors
        index = self.index[self.link.rank], self.tokens
        every = (q, *self._keys(k, v))
        found = call.backward(every, index, result, grads, shared) or call.nothing(*every)
        parts = [packed([g.index_select(2, placed(at, g.device)) for g in found[1:]]) for at in self.places]
        dk, dv = unpacked(self.link.summed(parts, "the sum of gradients of keys and values").wait(), k.shape, v.shape)
        return found[0], dk, dv

    def _keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shapes = [((*k.shape[:2], len(i), k.shape[3]), (*v.shape[:2], len(i), v.shape[3])) for i in self.index]
        sizes = [(sum(torch.Size(s).numel() for s in both),) for both in shapes]
        flats = self.link.everyone(packed((k, v)), sizes, "the gathering of keys and values").wait()
        order = placed(self.order, k.device)
        pairs = [unpacked(flat, *both) for flat, both in zip(flats, shapes, strict=True)]
        return _joined(pairs, order)


class GroupCast:
    """Every rank gets the rows of keys and values that its queries may see, and no others.

    Args:
        link: The ranks.
        index: For each of them the tokens that it holds.
        rows: ``rows(rank, source)``: int64, ascending, which of the tokens of ``source`` some query of ``rank`` sees.

    Source:
        Group-cast and group-reduce of MagiAttention.
    """

    def __init__(self, link: Link, index: Sequence[Tensor], rows: Callable[[int, int], Tensor]) -> None:
        self.link, self.index = link, tuple(index)
        me, others = link.rank, [r for r in range(link.world) if r != link.rank]
        none = torch.zeros(0, dtype=torch.int64)
        self.given = [none if r == me else rows(r, me) for r in range(link.world)]  # mine, that others need
        self.taken = [none if r == me else rows(me, r) for r in range(link.world)]  # of others, that I need
        every = torch.cat([none, *(self.index[r][self.taken[r]] for r in others)])
        self.order = torch.argsort(every)
        self.tokens = every[self.order]
        self.places = torch.argsort(self.order).split([len(t) for t in self.taken])

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Result:
        """This rank's output and log-normaliser over all keys, in the accumulation dtype, without the sink."""
        own, total = self.index[self.link.rank], Partial()
        coming = self._cast(k, v)
        total.add(*call.forward(q, k, v, own, own))
        keys, values = coming()
        if len(self.tokens):
            total.add(*call.forward(q, keys, values, own, self.tokens))
        return total.whole()

    def backward(
        self, call: Call, tensors: Grads, result: Result, grads: tuple[Tensor, Tensor | None], shared: Shared
    ) -> Grads:
        """Gradients of this rank's queries, keys and values; rows are fetched again."""
        q, k, v = tensors
        own = self.index[self.link.rank]
        coming = self._cast(k, v)
        near = call.backward(tensors, (own, own), result, grads, shared) or call.nothing(q, k, v)
        others = (q, *coming())
        far = call.backward(others, (own, self.tokens), result, grads, shared) or call.nothing(*others)
        parts = [packed([g.index_select(2, placed(at, g.device)) for g in far[1:]]) for at in self.places]
        sizes = [(self._size(rows, k, v),) for rows in self.given]
        dq, dk, dv = near[0] + far[0], near[1], near[2]
        flats = self.link.exchange(parts, sizes, "the return of gradients of keys and values").wait()
        for rows, flat in zip(self.given, flats, strict=True):
            if len(rows):
                at = placed(rows, dk.device)
                more = unpacked(flat, *self._shapes(rows, k, v))
                dk.index_add_(2, at, more[0])
                dv.index_add_(2, at, more[1])
        return dq, dk, dv

    def _cast(self, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Starts the exchange of rows; the result waits for it."""
        parts = [packed([t.index_select(2, placed(rows, t.device)) for t in (k, v)]) for rows in self.given]
        sizes = [(self._size(rows, k, v),) for rows in self.taken]
        pending = self.link.exchange(parts, sizes, "the casting of keys and values")

        def wait() -> tuple[Tensor, Tensor]:
            order = placed(self.order, k.device)
            pairs = [
                unpacked(flat, *self._shapes(rows, k, v))
                for flat, rows in zip(pending.wait(), self.taken, strict=True)
            ]
            return _joined(pairs, order)

        return wait

    def _shapes(self, rows: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (*k.shape[:2], len(rows), k.shape[3]), (*v.shape[:2], len(rows), v.shape[3])

    def _size(self, rows: Tensor, k: Tensor, v: Tensor) -> int:
        return len(rows) * k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])


def _joined(pairs: Sequence[tuple[Tensor, ...]], order: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks put together in the order of tokens."""
    keys, values = (torch.cat(some, 2).index_select(2, order) for some in zip(*pairs, strict=True))
    return keys, values
