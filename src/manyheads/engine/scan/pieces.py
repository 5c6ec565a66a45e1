"""The differentiable pieces of a chunk: decays between pairs, scores under a decay per channel, the pass over states.

Exponents are sums of log decays over the tokens between two places, never differences of longer sums: those would
lose their digits next to a decay of -1e4, and overflow where ``exp(-sum)`` is taken. With a decay per channel a
chunk's sums are built by doubling: what crosses the middle of a block is a suffix of its left half and a prefix of
its right half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .problem import Problem

_BITS = math.log2(math.e)  # exponents in powers of two: the exponential that is several times as fast on a CPU
_NEVER = -1e30  # a log weight of nothing that may be multiplied by zero


class Pairs(torch.autograd.Function):
    r"""``exp(L - r)`` for the pairs of a chunk, with ``L_ij = sum_{j<t<=i} g_t + i_j`` for ``j <= i``, else ``-inf``.

    Takes log decays ``g (..., C)``, and with an input gate ``i (..., C)`` and the log weight ``before (..., C)``
    that the state has at each token. Returns the weights ``(..., C, C)`` and the row maxima ``r (..., C)``, which are
    finite, take no gradient, and are a 0 without a gate.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, gate: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and row maxima."""
        rows = g.new_zeros(())
        if gate is None or before is None:
            weights = without_tiny(sums_between(g * _BITS).exp2_()).tril_()
        else:  # large gates would lose digits by the change of base
            log = logs_between(g).add_(gate[..., None, :])
            rows = torch.maximum(log.amax(-1), before)
            rows.masked_fill_(rows == -torch.inf, 0.0)
            weights = without_tiny(log.sub_(rows[..., None]).exp_())
        ctx.save_for_backward(weights)
        ctx.mark_non_differentiable(rows)
        return weights, rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of ``g`` and of the gate."""
        (weights,) = ctx.saved_tensors
        dlog = grads[0] * weights
        dgate = dlog.sum(-2) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dgate, None
        lower = _lower(weights)
        passed = torch.matmul(dlog, lower.tril(-1).T)  # at (i, t): what row i sees of the tokens before t
        return passed.mul_(lower).sum(-2), dgate, None


def sums_between(g: Tensor) -> Tensor:
    """``sum_{j<t<=i} g_t`` for ``g (..., C)`` and ``j <= i``, else 0: a product with zeros and ones.

    Only what lies between two places is added, so nothing is lost next to a large term. ``-inf`` counts as -1e30.
    """
    lower = _lower(g)
    return torch.matmul(lower * g.clamp(min=_NEVER)[..., None, :], lower.tril(-1))


def logs_between(g: Tensor) -> Tensor:
    """The same, ``-inf`` above the diagonal and where a ``-inf`` lies between."""
    log = sums_between(g)
    return log.masked_fill_((log < _NEVER / 2) | ~_lower(g).bool(), -torch.inf)


def without_tiny(weights: Tensor) -> Tensor:
    """Weights with 0 where products with them could be subnormal numbers, which take many times as long."""
    return F.threshold(weights, 1e8 * torch.finfo(weights.dtype).tiny, 0.0)


def rows_of(t: Tensor, p: Problem) -> Tensor:
    """``(B, H|Hkv, N, W)`` as chunks of every query head, ``(B * H * n, C, W)``, zeros behind the last token."""
    b, h, tokens, _ = p.q.shape
    t = t.to(p.accumulate)
    if t.shape[1] != h:  # of one segment only: never of the whole sequence
        t = t[:, :, None].expand(b, t.shape[1], h // t.shape[1], tokens, t.shape[3]).flatten(1, 2)
    if tokens % p.chunk:
        t = F.pad(t, (0, 0, 0, -tokens % p.chunk))
    return t.reshape(-1, p.chunk, t.shape[3])


class Channels(torch.autograd.Function):
    """Scores ``A_ij = sum_d q_id k_jd exp(sum_{j<t<=i} g_td)`` for ``j <= i``, and the sums from and to the borders.

    Takes ``q, k, g (R, C, D)``. Returns ``A (R, C, C)``, and in powers of two the inclusive prefix sums and the
    exclusive suffix sums of ``g``, each ``(R, C, D)``. At every level of the doubling the queries of right halves
    decay from the middle of their block and the keys of left halves decay up to it, so both factors lie in [0, 1].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, prefix sums, suffix sums."""
        scores = q.new_zeros(*q.shape[:2], q.shape[1])
        scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
        bits = g * _BITS
        prefix, suffix = bits, torch.zeros_like(g)  # of a chunk of one token
        for s, prefix, suffix in _levels(bits):
            read = prefix[:, :, 1].exp2().mul_(_halves(q, s)[:, :, 1])
            write = suffix[:, :, 0].exp2().mul_(_halves(k, s)[:, :, 0])
            block = torch.bmm(read.flatten(0, 1), write.flatten(0, 1).mT)
            _crossing(scores, s).copy_(block.unflatten(0, read.shape[:2]).movedim(1, -1))
        ctx.save_for_backward(q, k, g)
        return scores, prefix.reshape(g.shape), suffix.reshape(g.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q``, ``k`` and ``g``."""
        (q, k, g), (dscores, dprefix, dsuffix) = ctx.saved_tensors, grads
        dq, dk, parts = torch.zeros_like(q), torch.zeros_like(k), []
        for s, prefix, suffix in _levels(g * _BITS):
            from_middle, to_middle = prefix[:, :, 1].exp2(), suffix[:, :, 0].exp2()
            block = _crossing(dscores, s).movedim(-1, 1).flatten(0, 1)
            read, write = _halves(q, s)[:, :, 1] * from_middle, _halves(k, s)[:, :, 0] * to_middle
            dread = torch.bmm(block, write.flatten(0, 1)).view_as(read)
            dwrite = torch.bmm(block.mT, read.flatten(0, 1)).view_as(write)
            _halves(dq, s)[:, :, 1].addcmul_(dread, from_middle)
            _halves(dk, s)[:, :, 0].addcmul_(dwrite, to_middle)
            parts.append((s, dread.mul_(read), dwrite.mul_(write)))
        dg = _gradient_of_levels(dprefix * _BITS, dsuffix * _BITS, parts)
        diagonal = dscores.diagonal(dim1=1, dim2=2)[..., None]
        return dq.addcmul_(diagonal, k), dk.addcmul_(diagonal, q), dg


class Carry(torch.autograd.Function):
    """``S_{c+1} = keep_c * S_c + write_c`` over chunks.

    Takes ``keep (R, n, 1|D, 1)`` or None for 1, ``write (R, n, D, E)``, ``S_0 (R, D, E)``. Returns the states before
    each chunk ``(R, n, D, E)`` and the last one ``(R, D, E)``.
    """

    @staticmethod
    def forward(ctx: Any, keep: Tensor | None, write: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """States before the chunks, and after the last."""
        states, end = torch.empty_like(write), torch.empty_like(start)
        n = write.shape[1]
        states[:, 0] = start
        for c in range(n):
            after = states[:, c + 1] if c + 1 < n else end
            if keep is None:
                torch.add(write[:, c], states[:, c], out=after)
            else:
                torch.addcmul(write[:, c], keep[:, c], states[:, c], out=after)
        ctx.save_for_backward(keep, states)
        return states, end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of all three, from the last chunk to the first."""
        (keep, states), (dstates, dend) = ctx.saved_tensors, grads
        n = states.shape[1]
        dwrite, dstart = torch.empty_like(states), torch.empty_like(dend)
        dwrite[:, n - 1] = dend
        for c in reversed(range(n)):
            before = dwrite[:, c - 1] if c else dstart
            if keep is None:
                torch.add(dstates[:, c], dwrite[:, c], out=before)
            else:
                torch.addcmul(dstates[:, c], keep[:, c], dwrite[:, c], out=before)
        dkeep = None
        if keep is not None and ctx.needs_input_grad[0]:
            dkeep = (dwrite * states).sum((-2, -1) if keep.shape[-2] == 1 else -1).view_as(keep)
        return dkeep, dwrite, dstart


class Mix(torch.autograd.Function):
    """``S_{c+1} = M_c S_c + write_c`` over chunks: the delta rule, in one product a chunk.

    Takes ``M (R, n, D, D)``, ``write (R, n, D, E)``, ``S_0 (R, D, E)``; returns what :class:`Carry` does.
    """

    @staticmethod
    def forward(ctx: Any, mix: Tensor, write: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """States before the chunks, and after the last."""
        states, state = torch.empty_like(write), start
        for c in range(write.shape[1]):
            states[:, c] = state
            state = torch.baddbmm(write[:, c], mix[:, c], state)
        ctx.save_for_backward(mix, states)
        return states, state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all three, from the last chunk to the first."""
        (mix, states), (dstates, dstate) = ctx.saved_tensors, grads
        dwrite = torch.empty_like(states)
        for c in reversed(range(states.shape[1])):
            dwrite[:, c] = dstate
            dstate = torch.baddbmm(dstates[:, c], mix[:, c].mT, dstate)
        return dwrite @ states.mT, dwrite, dstate


def _sizes(chunk: int) -> Iterator[int]:
    """Half sizes 1, 2, ... of the blocks that tile a chunk."""
    return iter([1 << i for i in range(chunk.bit_length() - 1)])


def _levels(g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sums of ``g (..., C, W)`` inside the halves of blocks, level by level.

    Yields the half size ``s`` and, as ``(..., blocks, 2, s, W)``, the inclusive prefix and the exclusive suffix sums of
    each half. When the levels end, the last ones hold the sums inside the whole chunk.
    """
    prefix, suffix = g.clone(memory_format=torch.contiguous_format), torch.zeros_like(g).contiguous()
    for s in _sizes(g.shape[-2]):
        p, x = _halves(prefix, s), _halves(suffix, s)
        yield s, p, x
        x[..., 0, :, :] += p[..., 1, -1:, :]
        p[..., 1, :, :] += p[..., 0, -1:, :]


def _gradient_of_levels(dprefix: Tensor, dsuffix: Tensor, parts: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """The gradient of ``g`` from those of all that :func:`_levels` gave.

    Args:
        dprefix, dsuffix: ``(..., C, W)``, of the sums inside the whole chunk.
        parts: For each level ``s`` and the gradients ``(..., blocks, s, W)`` of the prefix sums of right halves and of
            the suffix sums of left halves. Walking the levels back adds up only what really passed a token; a
            difference of row and column sums would leave rounding noise behind every border.
    """
    prefix, suffix = (t.clone(memory_format=torch.contiguous_format) for t in (dprefix, dsuffix))
    for s, right, left in reversed(parts):
        p, x = _halves(prefix, s), _halves(suffix, s)
        p[..., 0, -1:, :] += p[..., 1, :, :].sum(-2, keepdim=True)
        p[..., 1, -1:, :] += x[..., 0, :, :].sum(-2, keepdim=True)
        p[..., 1, :, :] += right
        x[..., 0, :, :] += left
    return prefix


def _halves(t: Tensor, s: int) -> Tensor:
    """``(..., C, W)`` as ``(..., blocks, 2, s, W)``."""
    return t.unflatten(-2, (-1, 2, s))


def _crossing(square: Tensor, s: int) -> Tensor:
    """A view ``(..., s, s, blocks)`` of ``(..., C, C)``: rows in right halves and columns in left halves of blocks."""
    blocks = square.unflatten(-1, (-1, 2 * s)).unflatten(-3, (-1, 2 * s))
    return blocks.diagonal(dim1=-4, dim2=-2)[..., s:, :s, :]


def _lower(like: Tensor) -> Tensor:
    """Ones on and below the diagonal of a square of the last dimension."""
    return like.new_ones(like.shape[-1], like.shape[-1]).tril_()
