"""Which rows a block of queries reads: keys and values of all heads as tables, ids as rows of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem, listed

_BYTES = 1 << 23  # fetched rows of a block: smaller ones cost more in calls than they win in the cache
_SCORES = 1 << 20  # scores of a block
_TOGETHER = 64  # queries that may share the rows that any of them lists


class Table(NamedTuple):
    """``(B, H, N, W)`` as one table of rows, whatever the strides of its first dimensions.

    Attributes:
        rows: ``(R, W)``, a view; rows may overlap.
        steps: Rows between batch entries, heads and tokens.
    """

    rows: Tensor
    steps: tuple[int, int, int]


def table(t: Tensor) -> Table:
    """Keys or values as a table."""
    if not t.numel():
        return Table(t.new_zeros(1, t.shape[3]), (0, 0, 0))
    if t.stride(3) != 1 and t.shape[3] > 1:
        t = t.contiguous()
    steps = [step if size > 1 else 0 for step, size in zip(t.stride()[:3], t.shape, strict=False)]
    width = math.gcd(*steps) or t.shape[3]
    b, h, n = (step // width for step in steps)
    count = 1 + sum((size - 1) * step for size, step in zip(t.shape, (b, h, n), strict=False))
    return Table(t.as_strided((count, t.shape[3]), (width, 1)), (b, h, n))


def columns_inside(p: Problem) -> int | None:
    """The first column of the keys that are the values, if these are a view of those."""
    k, v = p.k, p.v
    if k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr() or not v.numel():
        return None
    strides = [(a, b) for a, b, size in zip(k.stride(), v.stride(), k.shape, strict=True) if size > 1]
    first = int(v.storage_offset() - k.storage_offset())
    inside = 0 <= first <= k.shape[3] - v.shape[3] and k.stride(3) == v.stride(3) == 1
    return first if inside and all(a == b for a, b in strides) else None


@dataclass(slots=True)
class Block:
    """Some queries of some units, and what they read.

    Attributes:
        first: Batch entry and unit of the first of the ``n`` units.
        batch, unit: Those of each of them, int64 ``(n,)``.
        queries: Which queries of each, ``m``.
        ids: ``(n * m, K)``, every one that of a key; padding repeats a key that the same query lists. If the queries
            share their rows, ``(1, U)``: whatever any of them lists, once.
        bias: ``(n * m, K)`` or ``(m, U)`` in the accumulation dtype, the logarithm of how often each is listed; None
            if all are, once.
        empty: bool ``(n * m,)``, queries that list nothing; None if there are none. Their ids name a key all the same.
    """

    first: tuple[int, int]
    batch: Tensor
    unit: Tensor
    queries: slice
    ids: Tensor
    bias: Tensor | None
    empty: Tensor | None = None

    @property
    def size(self) -> int:
        """Queries of all units together."""
        return len(self.batch) * (self.queries.stop - self.queries.start)

    def rows(self, steps: tuple[int, int, int], p: Problem, ids: Tensor) -> Tensor:
        """The row of a table that each of some of the ids names."""
        b, h, n = steps
        base = self.batch * b + self.unit // (p.units // p.k.shape[1]) * h
        if len(base) > 1:
            base = base.repeat_interleave(len(ids) // len(base))
        return torch.add(base[:, None], ids, alpha=n)


def blocks(p: Problem) -> Iterator[Block]:
    """All queries in blocks whose rows fit the cache; queries of several units together where a unit has few."""
    b, nq, units, count = p.q.shape[0], p.q.shape[2], p.units, p.ids.shape[3]
    width = (p.k.shape[3] + p.v.shape[3]) * p.k.element_size()
    size = max(1, min(_BYTES // max(1, count * width), _SCORES // max(1, count * p.group)))
    shares = p.q.device.type == "cpu" and nq >= _TOGETHER // 4 and sharing_cost(p) < 1.0
    most = max(size, _TOGETHER) if shares else size
    several = max(1, size // max(1, nq)) if not shares else 1
    every = torch.arange(b * units, device=p.q.device)
    for first in range(0, b * units, several):
        some = every[first : first + several]
        at = (some // units, some % units)
        for q0 in range(0, nq if count else 0, most):
            block, seen = _block(p, *at, slice(q0, min(nq, q0 + most)), divmod(first, units))
            shared = _shared(p, block, seen) if shares else None
            yield from [shared] if shared is not None else _parts(block, size)


def sharing_cost(p: Problem) -> float:
    """What a row costs that a query reads together with others, in units of one that it fetches for itself.

    Fetched rows move at the speed of memory and make thin products; a shared row costs its part of one large product,
    once for every query head of the unit, seen or not.
    """
    width, half = p.k.shape[3] + p.v.shape[3], p.k.element_size() == 2
    moved, thin = p.k.element_size() / 12.0, 2.0 / (13.0 * min(p.group, 12))  # ns a column: fetched, and multiplied
    wide = 2.0 / (400.0 if half else 200.0) + 0.6 / width  # and in a large product, with its part of the softmax
    return 0.08 + p.group * wide / (moved + p.group * thin)


def _parts(block: Block, size: int) -> Iterator[Block]:
    """A block cut into smaller ones."""
    if block.size <= size or len(block.batch) > 1:
        yield block
        return
    start, stop = block.queries.start, block.queries.stop
    for q0 in range(start, stop, size):
        some = slice(q0 - start, q0 - start + size)
        bias = None if block.bias is None else block.bias[some]
        empty = None if block.empty is None else block.empty[some]
        queries = slice(q0, min(stop, q0 + size))
        yield replace(block, queries=queries, ids=block.ids[some], bias=bias, empty=empty)


def _block(
    p: Problem, batch: Tensor, unit: Tensor, queries: slice, first: tuple[int, int]
) -> tuple[Block, Tensor | None]:
    """A block whose queries fetch their own rows, and which of its ids are listed (None: all)."""
    own_batch, own_unit = p.ids.shape[0] > 1, p.ids.shape[1] > 1
    if len(batch) == 1 or not (own_batch or own_unit):
        ids = p.ids[first[0] if own_batch else 0, first[1] if own_unit else 0, queries]
        ids = ids.expand(len(batch), *ids.shape)
    else:
        ids = p.ids[batch if own_batch else batch * 0, unit if own_unit else unit * 0, queries]
    ids = ids.reshape(ids.shape[0] * ids.shape[1], ids.shape[2]).long()
    if ids.device.type == "cpu" and ids.amin() >= 0:  # looking at them is cheap there
        return Block(first, batch, unit, queries, ids, None), None
    seen = listed(ids, p.k.shape[2])
    if ids.device.type == "cpu":
        width = int((seen.any(0) * torch.arange(1, ids.shape[1] + 1)).amax())
        ids, seen = ids[:, :width], seen[:, :width]
    if ids.shape[1]:
        ids = torch.where(seen, ids, ids.where(seen, -1).amax(1, keepdim=True).clamp_min_(0))
    bias = torch.zeros(seen.shape, dtype=p.accumulate, device=ids.device).masked_fill_(~seen, -math.inf)
    none = ~seen.any(1)
    empty = None if ids.device.type == "cpu" and not none.any() else none
    return Block(first, batch, unit, queries, ids, bias, empty), seen


def _shared(p: Problem, block: Block, seen: Tensor | None) -> Block | None:
    """The same queries reading whatever any of them lists, where that is cheaper."""
    every = block.ids.flatten() if seen is None else block.ids[seen]
    most = len(every) / (block.size * sharing_cost(p))
    some = torch.zeros(p.k.shape[2], dtype=torch.bool)
    some[every] = True
    ids = some.nonzero()[:, 0]
    if len(ids) > most or not len(ids):
        return None
    place = torch.zeros(p.k.shape[2], dtype=torch.int64)
    place[ids] = torch.arange(len(ids))
    times = torch.ones((), dtype=p.accumulate).expand(block.ids.shape) if seen is None else seen.to(p.accumulate)
    counts = torch.zeros(block.size, len(ids), dtype=p.accumulate)
    counts.scatter_add_(1, place[block.ids], times)
    # the logarithm is slow, and one of 0 slower
    bias = counts.clamp_min(1.0).log_() if counts.amax() > 1 else torch.zeros_like(counts)
    return replace(block, ids=ids[None], bias=bias.masked_fill_(counts == 0, -math.inf))


def query_rows(t: Tensor, p: Problem, block: Block) -> Tensor:
    """What ``t (B, Hq, Nq, W)`` holds for a block, ``(n * m, G, W)``."""
    if len(block.batch) == 1:
        b, u = block.first
        return t[b, u * p.group : (u + 1) * p.group, block.queries].transpose(0, 1)
    parts = t.unflatten(1, (p.units, p.group))[block.batch, block.unit, :, block.queries]
    return parts.transpose(1, 2).reshape(block.size, p.group, t.shape[3])


def live_rows(t: Tensor, p: Problem, block: Block) -> Tensor:
    """The same, zeros for queries that list nothing: whatever they hold, no product may see it."""
    rows = query_rows(t, p, block)
    return rows if block.empty is None else rows.masked_fill(block.empty[:, None, None], 0.0)


def put(t: Tensor, p: Problem, block: Block, rows: Tensor) -> None:
    """Writes rows ``(n * m, G, W)`` of a block to where they stand in ``t (B, Hq, Nq, W)``."""
    if len(block.batch) == 1:
        query_rows(t, p, block).copy_(rows)
        return
    parts = t.unflatten(1, (p.units, p.group))
    given = rows.view(len(block.batch), block.queries.stop - block.queries.start, p.group, t.shape[3])
    parts[block.batch, block.unit, :, block.queries] = given.transpose(1, 2).to(t.dtype)
