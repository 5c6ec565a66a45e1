"""Keys and values that travel: the ring, and the ring of rings.

Every rank keeps its queries; blocks of keys and values visit all ranks while each computes on the block it has.
What is left to decide is the order of visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import Link, Pending
from .steps import Call, Partial, Shared, accumulation, packed, unpacked

Result = tuple[Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Move:
    """One block on its way: sent at the beginning of a step, needed at the beginning of another.

    Attributes:
        post, use: Steps.
        to, frm: Ranks that this rank sends to and receives from.
        sent, got: Whose blocks these are.
    """

    post: int
    use: int
    to: int
    frm: int
    sent: int
    got: int


@dataclass(frozen=True)
class Order:
    """In which order the blocks of all ranks visit one rank.

    Attributes:
        visits: Whose block is there at each step, for every rank: ``visits[rank][step]``.
        moves: Of this rank.
        rank: This rank.
    """

    visits: tuple[tuple[int, ...], ...]
    moves: tuple[Move, ...]
    rank: int

    def onward(self, step: int) -> tuple[int, int, int]:
        """Where gradients go after a step: the rank they are sent to, the one others come from, and whose they are.

        The gradients of a block follow it from visit to visit and are brought home after the last.
        """
        own, last = self.visits[self.rank][step], step == len(self.visits) - 1
        if last:
            return own, next(r for r, line in enumerate(self.visits) if line[step] == self.rank), self.rank
        to = next(r for r, line in enumerate(self.visits) if line[step + 1] == own)
        got = self.visits[self.rank][step + 1]
        return to, next(r for r, line in enumerate(self.visits) if line[step] == got), got


def around(world: int, rank: int) -> Order:
    """One ring: every block moves to the next rank after each step.

    Example:
        >>> around(4, 1).visits[1]
        (1, 0, 3, 2)
    """
    return windows(world, rank, world)


def windows(world: int, rank: int, size: int) -> Order:
    """A ring of rings: blocks go round inside a window of ranks while the next window's are on their way.

    Args:
        world: Ranks.
        rank: This rank.
        size: Ranks of a window, a divisor of ``world``; neighbours, such as those of one node.

    Source:
        LoongTrain (arXiv 2406.18485), double-ring attention.

    Example:
        >>> windows(4, 1, 2).visits[1]
        (1, 0, 3, 2)
        >>> windows(6, 0, 3).visits[0]
        (0, 2, 1, 3, 5, 4)
    """
    if size < 1 or world % size:
        raise ValueError(f"window: expected a divisor of {world} ranks, got {size}")
    count = world // size

    def name(window: int, place: int) -> int:
        return window % count * size + place % size

    visits = tuple(
        tuple(name(r // size - a, r % size - b) for a in range(count) for b in range(size)) for r in range(world)
    )
    own, (window, place) = visits[rank], divmod(rank, size)
    moves = []
    for a in range(count):
        for b in range(size):
            t = a * size + b
            if not b and a < count - 1:
                ends = name(window + 1, place), name(window - 1, place)
                moves.append(Move(t, t + size, *ends, own[t], own[t + size]))
            if b < size - 1:
                moves.append(Move(t, t + 1, name(window, place + 1), name(window, place - 1), own[t], own[t + 1]))
    return Order(visits, tuple(moves), rank)


class Ring:
    """Blocks of keys and values visit every rank in an order; the next ones travel while one is computed on.

    Args:
        link: The ranks of the ring.
        index: For each of them the tokens that it holds.
        order: Of visits.
    """

    def __init__(self, link: Link, index: Sequence[Tensor], order: Order) -> None:
        self.link, self.index, self.order = link, tuple(index), order

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Result:
        """This rank's output and log-normaliser over all keys, in the accumulation dtype, without the sink."""
        total, me = Partial(), self.link.rank
        visits = self.order.visits[me]
        block, pending = packed((k, v)), dict[int, Pending]()
        for step, source in enumerate(visits):
            self._post(step, block, pending, k, v)
            keys, values = unpacked(block, *self._shapes(source, k, v))
            total.add(*call.forward(q, keys, values, self.index[me], self.index[source]))
            if step + 1 < len(visits):
                block = pending.pop(step + 1).wait()
        return total.whole()

    def backward(
        self, call: Call, tensors: Grads, result: Result, grads: tuple[Tensor, Tensor | None], shared: Shared
    ) -> Grads:
        """Gradients of this rank's queries, keys and values; those of keys and values follow their block home."""
        (q, k, v), me = tensors, self.link.rank
        acc, visits = accumulation(q), self.order.visits[me]
        dq = torch.zeros_like(q, dtype=acc)
        block, pending, carried = packed((k, v)), dict[int, Pending](), None
        for step, source in enumerate(visits):
            self._post(step, block, pending, k, v)
            keys, values = unpacked(block, *self._shapes(source, k, v))
            part = call.backward((q, keys, values), (self.index[me], self.index[source]), result, grads, shared)
            sums = torch.zeros_like(block, dtype=acc) if carried is None else carried.wait()
            if part is not None:
                dq += part[0]
                sums = sums + packed(part[1:])
            to, frm, got = self.order.onward(step)
            carried = self.link.move(sums, to, (self._size(got, k, v),), frm, f"gradients of ring step {step}")
            if step + 1 < len(visits):
                block = pending.pop(step + 1).wait()
        assert carried is not None
        dk, dv = unpacked(carried.wait(), k.shape, v.shape)
        return dq, dk, dv

    def _post(self, step: int, block: Tensor, pending: dict[int, Pending], k: Tensor, v: Tensor) -> None:
        """Starts what leaves at a step."""
        for move in self.order.moves:
            if move.post == step:
                what, size = f"keys and values of ring step {step}", (self._size(move.got, k, v),)
                pending[move.use] = self.link.move(block, move.to, size, move.frm, what)

    def _shapes(self, source: int, k: Tensor, v: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n = len(self.index[source])
        return (*k.shape[:2], n, k.shape[3]), (*v.shape[:2], n, v.shape[3])

    def _size(self, source: int, k: Tensor, v: Tensor) -> int:
        return len(self.index[source]) * k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
