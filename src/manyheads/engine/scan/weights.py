"""By how much tokens, states and chunks are seen from elsewhere: the decays of some chunks, in one of two forms.

*Exact*: the weight between two tokens of a chunk is the exponential of the sum of the log decays between them. This
is the form that is differentiated, and the one that bears any decay, borders of documents among them.

*Factored*: each token counts from the middle of its chunk, and the weight between two tokens is the product of their
factors. It saves the weights of all pairs, and both factors go into the products with keys, queries and states. A
factor above 1 grows with the decay of half a chunk, and the rounding of its exponent with it: so it is used where all
exponents are small, which is known once they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .pieces import Channels, Pairs, logs_between, rows_of, sums_between, without_tiny
from .problem import Problem, by_token, finite

_RANGE = 8.0  # of exponents in the factored form: they are rounded to half a millionth of this, in float32


@dataclass(slots=True)
class Weights:
    """Factors of the ``n`` chunks of a segment; each broadcasts over ``(B, H, n, ...)``, and None stands for 1.

    Attributes:
        read: ``(..., n, C, 1|D)``, the state before the chunk at a token; factored, from the middle of the chunk.
        write: ``(..., n, C, 1|D)``, a token at the end of the chunk; factored, at its middle.
        pairs: ``(..., n, C, C)``, a token at another one, if that is not the product of ``read`` and ``write``.
        scores: ``(B * H * n, C, C)``, finished scores, of the exact form with a decay per channel.
        keep: ``(..., n, 1|D)``, the state before a chunk at the next one; factored, from middle to middle.
        carry: ``(..., n, n)``, what chunk ``j`` wrote after chunk ``i``, of additive updates with one decay per token.
        enter: ``(..., 1|D)``, the state before the segment as its first chunk reads it.
        first: ``(..., 1)``, the state before the segment as if the first chunk had written it.
        rows: ``(..., n, C)``, the log by which the sums of a token are divided, with an input gate.
        end: ``(B, H)``, ``m`` after the segment, with an input gate.
        factored: The form; then ``keep`` acts on what a chunk writes too.
    """

    read: Tensor | None = None
    write: Tensor | None = None
    pairs: Tensor | None = None
    scores: Tensor | None = None
    keep: Tensor | None = None
    carry: Tensor | None = None
    enter: Tensor | None = None
    first: Tensor | None = None
    rows: Tensor | None = None
    end: Tensor | None = None
    factored: bool = False

    def of(self, rows: tuple[slice, slice]) -> Weights:
        """Those of some batch entries and heads."""
        parts = {name: getattr(self, name) for name in ("read", "write", "keep", "carry", "enter", "first")}
        some = {name: t[rows] if t is not None and t.dim() > 2 else t for name, t in parts.items()}
        return Weights(**some, factored=self.factored)


def factored(p: Problem, segment: int) -> tuple[list[Weights], list[list[bool]]] | None:
    """The factored form of whole chunks.

    Args:
        p: A problem whose tokens are whole chunks.
        segment: Chunks of a segment; the last one may have fewer.

    Returns:
        Weights of each segment, and for each batch entry and head whether all exponents are small enough. None with an
        input gate, and where looking at the exponents would wait for a device.
    """
    if p.gate is not None or p.q.device.type != "cpu":
        return None
    (b, h, tokens, _), decay = p.q.shape, by_token(p)
    n, starts = tokens // p.chunk, range(0, tokens // p.chunk, segment)
    if decay is None:
        carry = p.state.new_ones(segment, segment).tril_()
        return [Weights(carry=carry[: n - at, : n - at], factored=True) for at in starts], [[True] * h] * b
    if decay.dim() == 1:
        decay = decay[None, :, None].expand(1, -1, tokens)
    g = decay.expand(b, h, *decay.shape[2:]).reshape(b, h, n, p.chunk, -1)
    total = g.cumsum(3)
    middle, last = total[:, :, :, (p.chunk - 1) // 2].clone(), total[:, :, :, -1].clone()
    total -= middle[:, :, :, None]
    small = (total.abs().amax((2, 3, 4)) <= _RANGE).tolist()  # not with NaN, from a decay of -inf
    rest, following = last - middle, F.pad(middle[:, :, 1:], (0, 0, 0, 1))
    following[:, :, segment - 1 :: segment] = 0.0  # a state leaves its segment as it is
    read, write, keep, enter = total.exp(), total.neg_().exp_(), (following + rest).exp_(), middle.exp()
    between: Tensor | None = None
    if p.beta is None and g.shape[-1] == 1:
        steps, into, out = (
            F.pad(t[..., 0], (0, -n % segment)).unflatten(2, (-1, segment)) for t in (last, following, rest)
        )
        between = without_tiny((sums_between(steps) + into[..., None] + out[..., None, :]).exp_()).tril_()
    found = []
    for i, at in enumerate(starts):
        span, size = slice(at, at + segment), min(segment, n - at)
        first = None if between is None else enter[:, :, at]
        passed = None if between is None else between[:, :, i, :size, :size]
        found.append(
            Weights(
                read[:, :, span], write[:, :, span], keep=keep[:, :, span], carry=passed,
                enter=enter[:, :, at], first=first, factored=True,
            )  # fmt: skip
        )
    return found, small


def exact(p: Problem, q: Tensor, k: Tensor) -> Weights:
    """The exact form of one segment, differentiable.

    Args:
        p: The problem of a segment; its last chunk may be short.
        q, k: Its queries and keys as ``(B * H * n, C, D)``, for a decay per channel.

    Returns:
        Its weights.
    """
    tokens, c = p.q.shape[2], p.chunk
    n, decay = -(-tokens // c), by_token(p)
    if decay is None:
        if p.gate is None:
            return Weights(carry=p.state.new_ones(n, n).tril_())
        decay = p.state.new_zeros(1)
    if decay.dim() == 4:
        lead = (*p.q.shape[:2], n)
        scores, prefix, suffix = Channels.apply(q, k, rows_of(decay, p))
        read, write = (without_tiny(t.exp2()).unflatten(0, lead) for t in (prefix, suffix))
        return Weights(read, write, scores=scores, keep=read[..., -1, :])
    if decay.dim() == 1:
        decay = decay[None, :, None].expand(1, -1, tokens)
    g = F.pad(decay, (0, -tokens % c)).unflatten(-1, (-1, c))
    gate = None
    if p.gate is not None:
        gate = F.pad(p.gate.to(p.accumulate), (0, -tokens % c), value=-torch.inf).unflatten(-1, (-1, c))
        g = g.expand(gate.shape)
    prefix, suffix = g.cumsum(-1), F.pad(g.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
    if gate is None or p.m is None:
        pairs, _ = Pairs.apply(g, None, None)
        return _with_carry(Weights(_by_token(prefix), _by_token(suffix), pairs), prefix[..., -1], p)
    reach, whole = suffix + gate, prefix[..., -1]
    maxima = _maxima(whole.detach(), reach.detach().amax(-1), p.m)
    before, after = torch.cat([p.m[..., None], maxima[..., :-1]], -1), finite(maxima)
    since = prefix + before[..., None]
    pairs, rows = Pairs.apply(g, gate, since.detach())
    read, write = _by_token(since - rows), _by_token(reach - after[..., None])
    return _with_carry(Weights(read, write, pairs, rows=rows, end=maxima[..., -1]), whole + before - after, p)


def _by_token(log: Tensor) -> Tensor:
    """Factors ``(..., n, C, 1)`` of rows from their logs."""
    return without_tiny(log.exp())[..., None]


def _maxima(whole: Tensor, peak: Tensor, m: Tensor) -> Tensor:
    """``m_c = max(whole_c + m_{c-1}, peak_c)`` over ``(..., n)`` chunks, from ``m (...)`` before the first."""
    written = (logs_between(whole) + peak[..., None, :]).amax(-1)
    return torch.maximum(written, whole.cumsum(-1) + m[..., None])


def _with_carry(w: Weights, log: Tensor, p: Problem) -> Weights:
    """Adds how states pass chunks, from the log ``(..., n)`` of what a chunk keeps."""
    w.keep = log.exp()[..., None]
    if p.beta is None:
        w.carry, _ = Pairs.apply(log, None, None)
        w.first = w.keep[..., 0, :]
    return w
