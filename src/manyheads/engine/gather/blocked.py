"""Blocks of queries: rows are fetched once for all query heads that read them, then multiplied.

Queries that list much the same keys share their rows: what any of them lists is fetched once, and one large product
with a mask replaces many thin ones. Memory is bounded by the block, whatever the number of ids. Scores and statistics
are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..scratch import Scratch, borrowed
from ..tiled import flash, products
from .problem import Grads, Problem
from .rows import Block, blocks, columns_inside, live_rows, put, query_rows, table

_ROWS = 1 << 23  # bytes of rows that are fetched at once where a single query lists more than fit a block
_THIN = 16  # query rows of a product
_LOG2E = math.log2(math.e)


class Chunk(NamedTuple):
    """Some of the keys of a block: ``(M, C)`` for its ``M`` queries, or ``(1, C)`` for all of them.

    Attributes:
        k, v: Fetched rows ``(M|1, C, D)``, ``(M|1, C, Dv)``.
        ids: Which keys these are, ``(M|1, C)``.
        bias: ``(M, 1, C)``, ``-inf`` for what a query does not list; None if all list all.
    """

    k: Tensor
    v: Tensor
    ids: Tensor
    bias: Tensor | None


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of a problem."""
    b, h, nq, _ = p.q.shape
    out = p.v.new_zeros(b, h, nq, p.v.shape[3])
    lse = p.q.new_full((b, h, nq, 1), -math.inf, dtype=p.accumulate)
    attend = _fused if _takes_fused(p) else _passes
    with borrowed() as scratch:
        source = _Source(p, scratch)
        for block in blocks(p):
            found = _attend(p, source, block, attend)
            if found is not None:
                put(out, p, block, found[0])
                put(lse, p, block, found[1])
    return (out, lse[..., 0]) if p.sink is None else _with_sink(out, lse[..., 0], p.sink)


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients with scores computed again; those of keys and values are added up in the order of the queries."""
    (b, hkv, nk, dv), acc = p.v.shape, p.accumulate
    dq = torch.zeros_like(p.q, memory_format=torch.contiguous_format)
    # one row more, for what padding adds
    dk, dvs = (torch.zeros(b * hkv * nk + 1, w, dtype=acc, device=p.q.device) for w in (p.k.shape[3], dv))
    # a sink's gradient adds whole rows up, where the rounding of a narrow output would show; and in float32 the fused
    # kernel's statistics and the weights computed here differ in their last bits
    exact = out.dtype == torch.float32 or (p.sink is not None and out.dtype.itemsize == 2)
    delta = torch.zeros_like(lse) if exact else (dout.double() * out).sum(-1).to(acc)
    less = torch.zeros_like(lse) if dlse is None else dlse.to(acc).masked_fill(lse == -math.inf, 0.0)
    known = lse.masked_fill(lse == -math.inf, math.inf)
    with borrowed() as scratch:
        source = _Source(p, scratch)
        for block in blocks(p):
            q, g = (live_rows(t, p, block).contiguous() for t in (p.q, dout))
            stats, minus, sums = (query_rows(t[..., None], p, block) for t in (known, less, delta))
            if exact:
                for _, w, dw, _ in _weights(p, source, block, q, g, stats):
                    sums.add_((w * dw).sum(-1, keepdim=True))
                put(delta[..., None], p, block, sums)
            total: Tensor | float = 0.0
            for chunk, w, dw, slope in _weights(p, source, block, q, g, stats):
                ds = dw.sub_(sums - minus).mul_(w)
                ds = ds if slope is None else ds.mul_(slope)
                at = _gradient_rows(p, block, chunk, len(dk) - 1)
                total = _times(ds, chunk.k, products.average) + total
                dk.index_add_(0, at, source.over_rows(ds, q, chunk))
                dvs.index_add_(0, at, source.over_rows(w, g, chunk))
            if isinstance(total, Tensor):
                put(dq, p, block, total.mul_(p.scale))
    dsink = None
    if p.sink is not None:
        share = torch.exp(p.sink.double()[:, None] - known)
        dsink = -(share * (delta - less)).sum((0, 2)).to(p.sink.dtype)
    dk = dk[:-1].mul_(p.scale).view(p.k.shape).to(p.k.dtype)
    return Grads(dq, dk, dvs[:-1].view(p.v.shape).to(p.v.dtype), dsink)


# --- rows of one block ------------------------------------------------------------------------------------------


class _Source:
    """Where the rows of a call come from."""

    def __init__(self, p: Problem, scratch: Scratch) -> None:
        self.p, self.scratch = p, scratch
        self.inside = columns_inside(p)
        self.k = table(p.k)
        self.v = self.k if self.inside is not None else table(p.v)
        self.columns = _columns(p)

    def step(self, block: Block) -> int:
        """How many keys of a block are fetched at once."""
        return self.columns if len(block.ids) == 1 else max(64, self.columns // len(block.ids))

    def chunks(self, block: Block) -> Iterator[Chunk]:
        """The keys of a block, all at once but for very many."""
        step = self.step(block)
        for c in range(0, block.ids.shape[1], step):
            ids = block.ids[:, c : c + step]
            at = block.rows(self.k.steps, self.p, ids)
            k = self._fetch("k", self.k.rows, at)
            if self.inside is None:
                at = at if self.k.steps == self.v.steps else block.rows(self.v.steps, self.p, ids)
                v = self._fetch("v", self.v.rows, at)
            else:
                v = k[..., self.inside : self.inside + self.p.v.shape[3]]
            if block.empty is not None and len(ids) == block.size:
                k, v = (t.masked_fill_(block.empty[:, None, None], 0.0) for t in (k, v))
            yield Chunk(k, v, ids, None if block.bias is None else block.bias[:, None, c : c + step])

    def widened(self, q: Tensor, chunk: Chunk) -> tuple[Tensor, Chunk]:
        """Query rows and keys for products: so few rows in half precision are multiplied faster in float32."""
        if q.dtype.itemsize > 2 or q.numel() > _THIN * q.shape[2] * len(chunk.k):
            return q, chunk
        k = self.scratch("wide k", chunk.k.shape, chunk.k, torch.float32).copy_(chunk.k)
        if self.inside is None:
            v = self.scratch("wide v", chunk.v.shape, chunk.v, torch.float32).copy_(chunk.v)
        else:
            v = k[..., self.inside : self.inside + chunk.v.shape[2]]
        return q.float(), chunk._replace(k=k, v=v)

    def over_rows(self, x: Tensor, y: Tensor, chunk: Chunk) -> Tensor:
        """``sum_i x_ij y_i`` over the query rows of each key, one row for each id of a chunk."""
        x, y = (t.reshape(chunk.k.shape[0], -1, t.shape[2]) for t in (x, y.to(chunk.k.dtype)))
        if x.dtype != y.dtype:
            return products.average(x.mT, y).flatten(0, 1)
        out = self.scratch("sums", (len(x), x.shape[2], y.shape[2]), x)
        return torch.bmm(x.mT, y, out=out).flatten(0, 1)

    def _fetch(self, name: str, rows: Tensor, at: Tensor) -> Tensor:
        out = self.scratch(name, (at.numel(), rows.shape[1]), rows)
        return torch.index_select(rows, 0, at.reshape(-1), out=out).view(*at.shape, rows.shape[1])


def _columns(p: Problem) -> int:
    """How many keys are fetched at once where a single query lists more than fit a block."""
    return max(64, _ROWS // max(1, (p.k.shape[3] + p.v.shape[3]) * p.k.element_size()))


def _gradient_rows(p: Problem, block: Block, chunk: Chunk, last: int) -> Tensor:
    """Rows of the gradients of keys that a chunk adds to; those of padding are the last one."""
    hkv, nk = p.k.shape[1:3]
    at = block.rows((hkv * nk, nk, 1), p, chunk.ids)
    if chunk.bias is not None and len(chunk.ids) == len(chunk.bias):
        at = at.masked_fill(chunk.bias[:, 0] == -math.inf, last)
    return at.reshape(-1)


def _times(x: Tensor, rows: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A product of ``x (M, G, X)`` with the rows of each query, or with those of all of them."""
    stacked = x.reshape(rows.shape[0], -1, x.shape[2])
    return multiply(stacked, rows).view(*x.shape[:2], -1)


# --- forward of one block ---------------------------------------------------------------------------------------


def _takes_fused(p: Problem) -> bool:
    """Whether torch's fused kernel serves a call better than products and passes."""
    if p.q.device.type != "cpu" or p.softcap or p.q.shape[3] < p.v.shape[3] or not flash.available(p.q.dtype):
        return False
    if p.q.shape[3] > p.v.shape[3] and columns_inside(p) is None:
        return False
    if p.q.dtype.itemsize > 2 and (p.sink is not None or p.ids.shape[3] > _columns(p)):
        return False  # the backward could not make up for how the kernel rounds
    return products.fused_wins(p.q.dtype)


_Attend = Callable[[Problem, "_Source", Tensor, Chunk], tuple[Tensor, Tensor]]


def _attend(p: Problem, source: _Source, block: Block, attend: _Attend) -> tuple[Tensor, Tensor] | None:
    """Output ``(M, G, Dv)`` and lse ``(M, G, 1)`` of a block; None if it lists nothing."""
    q, done = live_rows(p.q, p, block), None
    for chunk in source.chunks(block):
        part = attend(p, source, q, chunk)
        done = part if done is None else _merged(done, part)
    return done


def _fused(p: Problem, source: _Source, q: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Output and lse of a chunk by torch's fused kernel: queries are batch entries, or share the rows."""
    q, scale = flash.folded(q, p.scale)
    k, v, bias = chunk.k[:, None], chunk.v[:, None], chunk.bias
    v = v if k.shape == v.shape else k
    alone = len(k) == len(q)
    q = q[:, None] if alone else q.transpose(0, 1)[None]
    if bias is not None:
        bias = bias[:, None] if alone else bias.transpose(0, 1)[None]
    out, lse = flash.piece(q, k, v, bias, scale)
    out, lse = (out[:, 0], lse[:, 0]) if alone else (out[0].transpose(0, 1), lse[0].transpose(0, 1))
    if source.inside is not None:
        out = out[..., source.inside : source.inside + p.v.shape[3]]
    lse = lse[..., None]
    if chunk.bias is not None:
        empty = chunk.bias.amax(2, keepdim=True) == -math.inf
        out, lse = out.masked_fill(empty, 0.0), lse.masked_fill(empty, -math.inf)
    return out, lse


def _passes(p: Problem, source: _Source, q: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Output and lse of a chunk by two products and a softmax."""
    q, chunk = source.widened(q, chunk)
    s, _ = _scores(p, q, chunk)
    top = s.amax(-1, keepdim=True)
    anchor = top.masked_fill(top == -math.inf, 0.0)
    w = _exponential(s.sub_(anchor))
    total = w.sum(-1, keepdim=True)
    out = _times(w, chunk.v, products.average).div_(total.masked_fill(total == 0, 1.0))
    if chunk.bias is not None:  # padding repeats whatever stands in some row
        out = out.masked_fill_(total == 0, 0.0)
    return out, anchor + torch.log(total)


def _scores(p: Problem, q: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
    """Scores ``(M, G, C)``, ``-inf`` where nothing is listed, and the slope of the cap."""
    s, slope = _times(q, chunk.k, products.scores).mul_(p.scale), None
    if p.softcap:
        s = s.div_(p.softcap).tanh_()
        slope = 1.0 - s * s
        s = s.mul_(p.softcap)
    return s if chunk.bias is None else s.add_(chunk.bias), slope


def _exponential(s: Tensor) -> Tensor:
    """``exp`` in place; by powers of 2, which have no slow path for ``-inf`` and results close to 0."""
    return s.mul_(_LOG2E).exp2_()


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Results over two parts of the ids as one over both."""
    both = torch.logaddexp(first[1], second[1])
    share = torch.exp(second[1] - both.masked_fill(both == -math.inf, 0.0))
    return torch.lerp(first[0].to(share.dtype), second[0].to(share.dtype), share), both


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """A sink only widens the normaliser."""
    wider = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    return (out * torch.exp(lse - wider)[..., None]).to(out.dtype), wider


# --- backward of one block --------------------------------------------------------------------------------------


def _weights(
    p: Problem, source: _Source, block: Block, q: Tensor, g: Tensor, lse: Tensor
) -> Iterator[tuple[Chunk, Tensor, Tensor, Tensor | None]]:
    """Chunks with their weights, the gradients of these, ``(M, G, C)``, and the slope of the cap."""
    # thin products are rounded otherwise than in the fused kernel, whose lse they do not quite fit
    one_lse = _takes_fused(p) and p.q.dtype.itemsize > 2 and block.ids.shape[1] <= source.step(block)
    for fetched in source.chunks(block):
        rows, chunk = source.widened(q, fetched)
        s, slope = _scores(p, rows, chunk)
        w = _exponential(s.sub_(lse))
        if one_lse:
            total = w.sum(-1, keepdim=True)
            w = w.div_(total.masked_fill_(total == 0, 1.0))
        yield chunk, w, _times(g.to(rows.dtype), chunk.v, products.scores), slope
