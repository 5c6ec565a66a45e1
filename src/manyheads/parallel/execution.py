"""One scheme on one deal: what a call of attention does on every rank, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common.errors import unknown
from . import heads as division
from .collectives import Link, phase
from .deal import Deal
from .fetch import Gather, GroupCast
from .heads import Heads, Scheme
from .ring import Ring, around, windows
from .steps import Call

SCHEMES = ("ring", "gather", "ulysses", "hybrid", "double_ring", "groupcast")
"""Every scheme, by name."""

_DIVIDING = ("ulysses", "hybrid", "double_ring")  # may divide heads among ranks


class Execution:
    """A scheme over the ranks of a link, for one way of dealing the tokens.

    Rank ``r`` is place ``r % degree`` of group ``r // degree``: the ranks of a group divide the heads, and equal
    places of all groups form a ring.

    Args:
        link: All ranks.
        deal: Which tokens each holds.
        scheme: One of `SCHEMES`.
        degree: Ranks that divide the heads; 1 for none.
        window: Ranks of a window of the double ring.
        rows: For group-cast: ``rows(rank, source)``, which tokens of ``source`` some query of ``rank`` sees.

    Raises:
        ValueError: A degree or window that does not divide.
    """

    def __init__(
        self,
        link: Link,
        deal: Deal,
        scheme: str,
        degree: int = 1,
        window: int | None = None,
        rows: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        world = link.world
        index = [deal.index(r) for r in range(world)]
        group, place = divmod(link.rank, degree)
        self.link, self.deal, self.degree = link, deal, degree
        self.heads: Heads | None = None
        if degree > 1:
            near = range(group * degree, (group + 1) * degree)
            self.heads = Heads(link.among(near), [index[r] for r in near])
        ring = link.among(range(place, world, degree))
        tokens = [_together(index[g * degree : (g + 1) * degree]) for g in range(world // degree)]
        self.scheme = _scheme(scheme, ring, tokens, window, rows)

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Output and log-normaliser of this rank's queries over all keys, and what the backward needs."""
        if self.heads is not None:
            call = self._own(call, q, k)
            q, k, v = self.heads.divide(q, k, v)
        out, lse = call.closed(*self.scheme.forward(call, q, k, v))
        final = out.to(v.dtype)
        # gradients of biases and sinks sum whole rows, where the rounding of a half-precision output would show
        kept = out if call.terms or call.sink is not None else final
        saved = (q, k, v, kept, lse)
        if self.heads is not None:
            final, lse = self.heads.unite(final), self.heads.unite(lse)
        return final, lse, saved

    def backward(
        self, call: Call, saved: Sequence[Tensor], grads: tuple[Tensor, Tensor | None], shape: tuple[int, int]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor], Tensor | None]:
        """Gradients of this rank's ``q, k, v``, and its shares of those of biases and sink.

        Args:
            call: The call of the forward.
            saved: What it kept.
            grads: Of output and log-normaliser.
            shape: Query heads and key heads of the call.
        """
        q, k, v, out, lse = saved
        dout, dlse = grads
        if self.heads is not None:
            call = self._own(call, q, k, shape)
            dout = self.heads.divide_one(dout)
            dlse = None if dlse is None else self.heads.divide_one(dlse)
        if dlse is not None:
            dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
        shared = call.shared()
        call.sink_grad((out, lse), (dout, dlse), shared)
        dq, dk, dv = self.scheme.backward(call, (q, k, v), (out, lse), (dout, dlse), shared)
        if self.heads is not None:
            dq = self.heads.unite(dq)
            dk, dv = self.heads.unite_summed(dk, dv, *shape)
        terms = [g.to(t.tensor.dtype) for g, t in zip(shared.terms, call.terms, strict=True)]
        sink = None if call.sink is None or shared.sink is None else shared.sink.to(call.sink.dtype)
        return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)), terms, sink

    def _own(self, call: Call, q: Tensor, k: Tensor, shape: tuple[int, int] | None = None) -> Call:
        assert self.heads is not None
        sizes = (q.shape[1], k.shape[1]) if shape is None else shape
        return call.on_heads(*self.heads.parts(*sizes)[self.heads.link.rank])


def refuse(scheme: str, degree: int, heads: int, kv_heads: int) -> list[str]:
    """Why a scheme cannot take a number of heads; empty when it can.

    Args:
        scheme: One of `SCHEMES`.
        degree: Ranks that divide the heads.
        heads: Query heads.
        kv_heads: Key heads.
    """
    return [f"scheme {scheme!r}: {reason}" for reason in division.refuse(heads, kv_heads, degree)]


def degree_of(scheme: str, world: int, degree: int | None) -> int | None:
    """How many ranks divide the heads, where that does not depend on the heads.

    Args:
        scheme: One of `SCHEMES`.
        world: Ranks.
        degree: What the caller asked for; by default all under ``"ulysses"`` and 1 under the others, but for
            ``"hybrid"``.

    Returns:
        The number, or None for ``"hybrid"`` without a degree: see :func:`widest`.

    Raises:
        ValueError: An unknown scheme, a degree that does not divide ``world``, or one that the scheme has no use for.

    Example:
        >>> degree_of("hybrid", 8, None), degree_of("ulysses", 8, None), degree_of("ring", 8, None)
        (None, 8, 1)
    """
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    if degree is None:
        return None if scheme == "hybrid" else world if scheme == "ulysses" else 1
    if degree < 1 or world % degree:
        raise ValueError(f"degree: expected a divisor of {world} ranks, got {degree}")
    if (scheme == "ulysses" and degree != world) or (scheme not in _DIVIDING and degree != 1):
        raise ValueError(f"degree: scheme {scheme!r} takes {world if scheme == 'ulysses' else 1}, got {degree}")
    return degree


def widest(world: int, heads: int, kv_heads: int) -> int:
    """The most ranks, up to the 8 of a node, among which heads can be divided.

    Args:
        world: Ranks.
        heads: Query heads.
        kv_heads: Key heads.

    Example:
        >>> widest(16, 12, 4), widest(8, 8, 2), widest(5, 8, 8)
        (4, 8, 1)
    """
    fits = [d for d in range(1, min(8, world) + 1) if world % d == 0 and not division.refuse(heads, kv_heads, d)]
    return max(fits, default=1)


def window_of(world: int, window: int | None) -> int:
    """Ranks of a window of the double ring: by default a divisor of the ring, so that windows are at least as long as
    they are many.

    Example:
        >>> window_of(8, None), window_of(7, None), window_of(16, None)
        (4, 7, 4)
    """
    if window is None:
        return next(s for s in range(1, world + 1) if world % s == 0 and s >= world // s)
    if window < 1 or world % window:
        raise ValueError(f"window: expected a divisor of the ring's {world} ranks, got {window}")
    return window


def _scheme(
    name: str,
    link: Link,
    index: Sequence[Tensor],
    window: int | None,
    rows: Callable[[int, int], Tensor] | None,
) -> Scheme:
    if name == "gather":
        return Gather(link, index)
    if name == "groupcast":
        assert rows is not None
        return GroupCast(link, index, rows)
    if name == "double_ring":
        return Ring(link, index, windows(link.world, link.rank, window_of(link.world, window)))
    return Ring(link, index, around(link.world, link.rank))


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts)).sort().values


class Recorded(torch.autograd.Function):
    """A call on many ranks as one node, which keeps the scheme: its backward may run outside the context."""

    @staticmethod
    def forward(ctx: Any, execution: Execution, call: Call, *tensors: Any) -> tuple[Tensor, Tensor]:
        """Runs the scheme; ``tensors`` are q, k, v, the sink and the tensors of the biases."""
        ctx.set_materialize_grads(False)
        q, k, v, sink, *terms = tensors
        with phase("forward"):
            out, lse, saved = execution.forward(call, q, k, v)
        # a recomputation outside the context would save other shapes, and be caught by torch for it
        marker = q.new_empty(0, 0, execution.link.world)
        ctx.save_for_backward(marker, *saved, sink, *terms)
        ctx.execution, ctx.shape = execution, (q.shape[1], k.shape[1])
        empty = torch.empty(0)  # saved tensors take their places again
        ctx.call = replace(call, sink=None, terms=tuple(replace(t, tensor=empty) for t in call.terms))  # type: ignore[type-var]
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        """Runs the scheme backward."""
        _, q, k, v, out, lse, sink, *tensors = ctx.saved_tensors
        terms = tuple(replace(t, tensor=x) for t, x in zip(ctx.call.terms, tensors, strict=True))
        call = replace(ctx.call, sink=sink, terms=terms, bias_grads=any(ctx.needs_input_grad[6:]))
        execution: Execution = ctx.execution
        if dout is None:
            n = execution.deal.counts[execution.link.rank]
            dout = out.new_zeros(q.shape[0], ctx.shape[0], n, v.shape[3])
        with phase("backward"):
            own, dterms, dsink = execution.backward(call, (q, k, v, out, lse), (dout.to(v.dtype), dlse), ctx.shape)
        return None, None, *own, dsink, *dterms
