"""What teaches an index of keys: how far its weights are from those of attention, over the keys that were chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from manyheads.mechanism.select import Cut

from .per_query import rows_at_once


def index_loss(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B G N D"],
    index_q: Float[Tensor, "B G N Di"],
    index_k: Float[Tensor, "B N Di"],
    lse: Float[Tensor, "B Hq N"],
    ids: Int[Tensor, "B G N K"] | None = None,
    *,
    parts: Cut,
    scale: float | None = None,
    index_scale: float | None = None,
) -> Float[Tensor, ""]:
    r"""The divergence of an index from attention, averaged over key heads and real tokens.

    $$L = \mathrm{mean}_{b,g,t}\; \mathrm{KL}(\bar p \,\|\, \hat p), \qquad \bar p_j = \mathrm{mean}_h e^{s_{hj} -
    \mathrm{lse}_h}, \quad \hat p = \mathrm{softmax}_j(\gamma\, u_{g,t} \cdot z_j)$$

    Over the causal tokens of the chosen blocks, or over all. Its gradient, $\hat p - \bar p$ for every score of the
    index, is computed beside the value, in slices of queries: no table of all pairs is held.

    Args:
        q: (B, Hq, N, D), and the other tensors, cut into whole blocks of a document each; no gradient flows to q, k
            and lse.
        k: (B, G, N, D).
        index_q: (B, G, N, Di).
        index_k: (B, N, Di).
        lse: (B, Hq, N), the log-normaliser of attention over the same keys.
        ids: (B, G, N, K) chosen blocks, -1 for none; None for all keys that a query sees.
        parts: How the documents were cut; its block is that of the ids.
        scale: Multiplies the scores of attention; D ** -0.5 by default.
        index_scale: Multiplies those of the index; Di ** -0.5 by default.

    Returns:
        A scalar, in float32 (float64 for float64).

    Example:
        >>> q = k = torch.randn(1, 1, 6, 4)
        >>> lse = (q @ k.mT / 2).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf).logsumexp(-1)
        >>> index_loss(q, k, q, k[:, 0], lse, parts=Cut((q,), 2, 6)).abs() < 1e-6     # an index that is attention
        tensor(True)
    """
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    gamma = index_q.shape[3] ** -0.5 if index_scale is None else float(index_scale)
    fixed = (q.detach(), k.detach(), lse.detach(), ids)
    loss: Tensor = _Divergence.apply(index_q, index_k, fixed, parts, scale, gamma)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    """The value, and beside it the gradients, which a scalar loss only scales."""

    @staticmethod
    def forward(
        ctx: Any, index_q: Tensor, index_k: Tensor, fixed: tuple[Any, ...], parts: Cut, scale: float, gamma: float
    ) -> Tensor:
        q, k, lse, ids = fixed
        real = None if parts.real is None else parts.real.expand(q.shape[0], -1)
        rows = q.shape[0] * q.shape[2] if real is None else real.sum()
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk = (torch.zeros_like(t, dtype=wide) for t in (index_q, index_k))
        total = q.new_zeros((), dtype=wide)
        keys = _All(k, index_k, parts) if ids is None else _Blocks(k, index_k, ids, parts)
        for some in keys.slices(q):
            teacher = keys.teacher(q, lse, some, scale)
            logits = (keys.student(index_q, some) * gamma).masked_fill(~keys.seen(some), -torch.inf)
            student = logits.log_softmax(-1).nan_to_num(nan=0.0)  # a query that sees nothing
            if real is not None:
                teacher = teacher * real[:, None, some, None]
            total += (torch.xlogy(teacher, teacher) - (teacher * student.clamp(min=_LEAST))).sum()
            if wanted:
                slope = logits.softmax(-1).nan_to_num(nan=0.0)
                slope = slope if real is None else slope * real[:, None, some, None]
                keys.backward((slope - teacher) * gamma, index_q, some, dq, dk)
        share = 1.0 / (rows * k.shape[1])
        ctx.save_for_backward((dq * share).to(index_q.dtype), (dk * share).to(index_k.dtype))
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dq, dk = ctx.saved_tensors
        return grad.to(dq.dtype) * dq, grad.to(dk.dtype) * dk, None, None, None, None


_LEAST = torch.finfo(torch.float32).min


class _All(NamedTuple):
    """Every key that a query sees: one product for all queries of a slice."""

    k: Tensor
    index_k: Tensor
    parts: Cut

    def slices(self, q: Tensor) -> list[slice]:
        return _slices(q.shape[2], rows_at_once(q.shape[0] * q.shape[1] * q.shape[2]))

    def teacher(self, q: Tensor, lse: Tensor, some: slice, scale: float) -> Tensor:
        own, sums = (t[:, :, some].unflatten(1, (self.k.shape[1], -1)) for t in (q, lse))
        wide = sums.dtype
        scores = own.to(wide).flatten(2, 3) @ self.k[:, :, : some.stop].to(wide).mT * scale
        weights = (scores.unflatten(2, own.shape[2:4]) - sums[..., None]).exp()
        return weights.masked_fill(~self.seen(some)[:, :, None], 0.0).mean(2)

    def student(self, index_q: Tensor, some: slice) -> Tensor:
        wide = torch.promote_types(index_q.dtype, torch.float32)
        return index_q[:, :, some].to(wide) @ self.index_k[:, None, : some.stop].to(wide).mT

    def seen(self, some: slice) -> Tensor:
        at = torch.arange(some.start, some.stop, device=self.k.device)
        earlier = (torch.arange(some.stop, device=at.device) <= at[:, None])[None, None]
        document = self.parts.document
        if document is None:
            return earlier
        return earlier & (document[:, some, None] == document[:, None, : some.stop])[:, None]

    def backward(self, slope: Tensor, index_q: Tensor, some: slice, dq: Tensor, dk: Tensor) -> None:
        dq[:, :, some] = slope @ self.index_k[:, None, : some.stop].to(slope.dtype)
        dk[:, : some.stop] += slope.flatten(1, 2).mT @ index_q[:, :, some].to(slope.dtype).flatten(1, 2)


class _Blocks(NamedTuple):
    """The keys of chosen blocks, brought to each query."""

    k: Tensor
    index_k: Tensor
    ids: Tensor
    parts: Cut

    def slices(self, q: Tensor) -> list[slice]:
        tokens = self.ids.shape[1] * self.ids.shape[3] * self.parts.block
        return _slices(q.shape[2], rows_at_once(q.shape[0] * tokens * (q.shape[3] + self.index_k.shape[2])))

    def teacher(self, q: Tensor, lse: Tensor, some: slice, scale: float) -> Tensor:
        own, sums = (t[:, :, some].unflatten(1, (self.k.shape[1], -1)).transpose(2, 3) for t in (q, lse))
        wide = sums.dtype
        scores = own.to(wide) @ self._taken(self.k, some).to(wide).mT * scale
        weights = (scores - sums[..., None]).exp()
        return weights.masked_fill(~self.seen(some)[:, :, :, None], 0.0).mean(3)

    def student(self, index_q: Tensor, some: slice) -> Tensor:
        wide = torch.promote_types(index_q.dtype, torch.float32)
        keys = self._taken(self.index_k[:, None], some).to(wide)
        return (keys @ index_q[:, :, some, :, None].to(wide))[..., 0]

    def seen(self, some: slice) -> Tensor:
        at = torch.arange(some.start, some.stop, device=self.k.device)
        ids, inside = self.ids[:, :, some, :, None], torch.arange(self.parts.block, device=at.device)
        return ((ids >= 0) & (ids * self.parts.block + inside <= at[:, None, None])).flatten(3)

    def backward(self, slope: Tensor, index_q: Tensor, some: slice, dq: Tensor, dk: Tensor) -> None:
        keys = self._taken(self.index_k[:, None], some).to(slope.dtype)
        dq[:, :, some] = (slope[..., None, :] @ keys)[..., 0, :]
        size, width = self.parts.block, dk.shape[2]
        grads = slope[..., None] * index_q[:, :, some, None].to(slope.dtype)
        whole = pad(dk, (0, 0, 0, -dk.shape[1] % size))
        blocks = whole.reshape(-1, size * width)
        blocks.index_add_(0, self._rows(some, 1).flatten(), grads.reshape(-1, size * width))
        dk.copy_(blocks.view(whole.shape)[:, : dk.shape[1]])

    def _rows(self, some: slice, heads: int) -> Tensor:
        """Chosen blocks, numbered over the blocks of all batch entries and heads; the first for none."""
        count = -(-self.k.shape[2] // self.parts.block)
        own = torch.arange(self.k.shape[0] * heads, device=self.k.device).view(-1, heads, 1, 1) * count
        return self.ids[:, :, some].clamp(min=0) + own

    def _taken(self, t: Tensor, some: slice) -> Tensor:
        """Tokens (B, H, N, D) of the chosen blocks, (B, G, rows, K * block, D)."""
        size = self.parts.block
        blocks = pad(t, (0, 0, 0, -t.shape[2] % size)).reshape(-1, size * t.shape[3])
        rows = self._rows(some, t.shape[1])
        return blocks.index_select(0, rows.flatten()).view(*rows.shape[:3], -1, t.shape[3])


def _slices(tokens: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
