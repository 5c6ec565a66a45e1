"""The definition: every pair at once, plain and quadratic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ...common.quantise import quantise, smoothed
from .bias import Block, Term
from .dropout import keep
from .problem import Grads, Problem

_WARN_PAIRS = 2**28
_warned = False


def scores(p: Problem) -> Tensor:
    """``cap(scale * q k^T) + bias`` for every pair, ``(B, Hq, Nq, Nk)`` in the accumulation dtype."""
    k = p.k.to(p.accumulate).repeat_interleave(p.group, dim=1)
    s = p.q.to(p.accumulate) @ k.transpose(-1, -2)
    if p.qk != "exact":
        s = s + (_low_bit(p) - s).detach()  # gradients pass straight through the rounding
    s = s * p.scale
    if p.softcap:
        s = p.softcap * torch.tanh(s / p.softcap)
    for term in p.terms:
        s = s + term.values(_everything(p)).to(s.dtype)
    return s


def _low_bit(p: Problem) -> Tensor:
    """Products of smoothed queries and keys rounded to 8 or 4 bits, what smoothing took put back."""
    bits = {"int8": 8, "int4": 4}[p.qk]
    parts = smoothed(p.q.detach(), p.k.detach(), queries=bits == 4)
    q, k = (quantise(t, bits).dequantise() for t in (parts.queries, parts.keys))
    dots = q @ k.repeat_interleave(p.group, dim=1).transpose(-1, -2)
    return dots + parts.row[..., None] + parts.column[:, :, None]


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser by the definition, in the accumulation dtype up to the last cast."""
    warn_if_huge(p)
    allowed = p.layout.dense().to(p.q.device)
    if p.skip_threshold:
        allowed = allowed & _kept_tiles(p, scores(p), allowed)
    shares, lse = weights(p, allowed)
    return _average(p, shares), lse


def weights(p: Problem, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised weights ``(B, Hq, Nq, Nk)`` over the allowed pairs, and their log-normaliser."""
    s = scores(p)
    if not p.weight.softmax:
        assert p.weight.value is not None
        raw = p.weight.value(s).masked_fill(~allowed, 0.0)
        total = raw.sum(-1)
        if not p.weight.normalised:
            return raw, torch.log(total)
        return raw / total.masked_fill(total == 0, 1.0)[..., None], torch.log(total)
    empty = ~allowed.any(-1, keepdim=True)
    s = s.masked_fill(~allowed, -math.inf)
    if p.sink is not None:
        extra = p.sink.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)
        s, empty = torch.cat([s, extra], dim=-1), torch.zeros_like(empty)
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    return torch.exp(s - lse)[..., : p.k.shape[2]], lse.masked_fill(empty, -math.inf)[..., 0]


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of :func:`forward` by automatic differentiation of it."""
    leaves = [p.q, p.k, p.v, *([p.sink] if p.sink is not None else []), *(t.tensor for t in p.terms)]
    with recording():
        fresh = [t.detach().requires_grad_() for t in leaves]
        again = _with_leaves(p, fresh)
        out_again, lse_again = forward(again)
        results, seeds = [out_again], [dout]
        if dlse is not None:
            results.append(lse_again)
            seeds.append(dlse.to(lse.dtype).masked_fill(lse == -math.inf, 0.0))
        live = [(r, g) for r, g in zip(results, seeds, strict=True) if r.requires_grad]
        got = torch.autograd.grad([r for r, _ in live], fresh, [g for _, g in live], allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, got, strict=True)]
    sink = grads.pop(3) if p.sink is not None else None
    dq, dk, dv = (g.to(p.result(g.dtype)) for g in grads[:3])
    terms = [g.to(p.term_result(t)) for g, t in zip(grads[3:], p.terms, strict=True)]
    return Grads(dq, dk, dv, sink, terms)


@contextmanager
def recording() -> Iterator[None]:
    """Records gradients even inside an operator, below which torch has switched the recording off."""
    c = torch._C
    excluded = c._dispatch_tls_local_exclude_set()
    # without the last, which sharded tensors switch off too, writing into a view would not be recorded
    for key in (c.DispatchKey.AutogradFunctionality, c.DispatchKey.AutogradOther, c.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _average(p: Problem, shares: Tensor) -> Tensor:
    if p.dropout_p:
        at = _everything(p)
        batch, head = (torch.arange(n, device=p.q.device) + at for n, at in zip(p.q.shape[:2], p.origin, strict=True))
        kept = keep(p.seed, batch, head, at.q_pos, at.k_pos, p.dropout_p)
        shares = shares * kept / (1.0 - p.dropout_p)
    v = p.v.repeat_interleave(p.group, dim=1)
    return (shares.to(p.v.dtype).to(p.accumulate) @ v.to(p.accumulate)).to(p.result(p.v.dtype))


def _kept_tiles(p: Problem, s: Tensor, allowed: Tensor) -> Tensor:
    """Tiles in storage order; one is dropped when no row of it comes near that row's running maximum."""
    bm, bn = p.layout.tile
    s = s.detach().masked_fill(~allowed, -math.inf)
    kept = torch.ones_like(s, dtype=torch.bool)
    floor = math.log(p.skip_threshold)
    for q0 in range(0, s.shape[2], bm):
        rows = s[:, :, q0 : q0 + bm]
        best = rows.new_full(rows.shape[:3], -math.inf)
        for k0 in range(0, s.shape[3], bn):
            top = rows[..., k0 : k0 + bn].amax(-1)
            new = torch.maximum(best, top)
            skip = ~((top - new >= floor) & (top > -math.inf)).any(-1)
            kept[:, :, q0 : q0 + bm, k0 : k0 + bn] &= ~skip[:, :, None, None]
            best = torch.where(skip[..., None], best, new)
    return kept


def _everything(p: Problem) -> Block:
    nk = p.k.shape[2]
    cols = torch.arange(nk, device=p.q.device)
    return Block(slice(0, p.q.shape[0]), slice(0, p.q.shape[1]), slice(0, p.q.shape[2]), cols, p.q_pos, p.k_pos)


def _with_leaves(p: Problem, fresh: list[Tensor]) -> Problem:
    q, k, v, *rest = fresh
    sink = rest.pop(0) if p.sink is not None else None
    terms = tuple(_replaced(t, x) for t, x in zip(p.terms, rest, strict=True))
    return replace(p, q=q, k=k, v=v, terms=terms, sink=sink)


def _replaced(term: Term, tensor: Tensor) -> Term:
    return replace(term, tensor=tensor)  # type: ignore[type-var]


def warn_if_huge(p: Problem) -> None:
    """Says once that a quadratic reference is about to hold very many pairs."""
    global _warned
    if not _warned and p.q.shape[0] * p.q.shape[1] * p.q.shape[2] * p.k.shape[2] > _WARN_PAIRS:
        _warned = True
        warnings.warn(
            "the reference backend computes every pair; above 2^28 pairs expect it to be slow and large",
            stacklevel=4,
        )
