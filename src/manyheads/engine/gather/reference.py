"""The definition: every listed key of every query head, plain and large."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..tiled.reference import recording
from .problem import Grads, Problem, listed


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser by the definition, in the accumulation dtype up to the last cast."""
    (b, h, nq, _), hkv, nk = p.q.shape, *p.k.shape[1:3]
    repeats = 1 if p.ids.shape[1] in (1, h) else h // p.ids.shape[1]
    ids = p.ids.repeat_interleave(repeats, 1).expand(b, h, nq, p.ids.shape[3])
    seen = listed(ids, nk)
    batch = torch.arange(b, device=ids.device)[:, None, None, None]
    head = torch.arange(h, device=ids.device)[:, None, None] // max(1, h // max(1, hkv))
    at = batch, head, ids.masked_fill(~seen, 0).long()
    k, v = (_rows(t, at, seen).to(p.accumulate) for t in (p.k, p.v))
    s = torch.einsum("bhid,bhijd->bhij", p.q.to(p.accumulate), k) * p.scale
    if p.softcap:
        s = p.softcap * torch.tanh(s / p.softcap)
    s, empty = s.masked_fill(~seen, -math.inf), ~seen.any(-1)
    if p.sink is not None:
        s = torch.cat([s, p.sink.to(s.dtype)[:, None, None].expand(b, h, nq, 1)], -1)
        empty = torch.zeros_like(empty)
    lse = torch.logsumexp(s.masked_fill(empty[..., None], 0.0), -1)
    shares = torch.exp(s - lse[..., None])[..., : ids.shape[3]]
    out = torch.einsum("bhij,bhijd->bhid", shares.to(p.v.dtype).to(p.accumulate), v)
    return out.to(p.v.dtype), lse.masked_fill(empty, -math.inf)


def _rows(t: Tensor, at: tuple[Tensor, ...], seen: Tensor) -> Tensor:
    """Listed rows ``(B, Hq, Nq, K, D)``, zeros where there is none."""
    return t[at].masked_fill(~seen[..., None], 0.0) if t.shape[2] else t.new_zeros(*seen.shape, t.shape[3])


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of :func:`forward` by automatic differentiation of it."""
    leaves = [p.q, p.k, p.v, *([] if p.sink is None else [p.sink])]
    with recording():
        fresh = [t.detach().requires_grad_() for t in leaves]
        q, k, v, *sink = fresh
        results = forward(replace(p, q=q, k=k, v=v, sink=sink[0] if sink else None))
        seeds = [dout, torch.zeros_like(lse) if dlse is None else dlse.masked_fill(lse == -math.inf, 0.0)]
        got = torch.autograd.grad(results, fresh, seeds, allow_unused=True)
    return Grads(*[torch.zeros_like(t) if g is None else g for t, g in zip(leaves, got, strict=True)])
