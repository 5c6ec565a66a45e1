"""The definition twice: token by token, and every pair at once."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autodiff
from .problem import Problem, by_token, divide, finite, with_ones
from .step import advance


def recurrent(p: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output ``(B, H, N, Dv)`` in the accumulation dtype, final state and final ``m``, one token after the other."""
    q, k, v = _wide(p)
    decay = by_token(p)
    beta, gate = (None if t is None else t.to(p.accumulate) for t in (p.beta, p.gate))
    state, m, rows = p.state, p.m, []
    for t in range(q.shape[2]):
        b, i = (None if x is None else x[:, :, t] for x in (beta, gate))
        now = decay if decay is None or decay.dim() == 1 else decay[:, :, t]
        row, state, m = advance(state, m, q[:, :, t], k[:, :, t], v[:, :, t], now, b, i, p.normalise)
        rows.append(row)
    out = torch.stack(rows, 2) if rows else v.new_zeros(*q.shape[:3], p.v.shape[3])
    return out, state, m


def parallel(p: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""The same by all pairs, ``O = ((Q K^T) * exp(L)) V`` with ``L_ij = sum_{j<r<=i} g_r + i_j`` for ``j <= i``.

    With the delta rule the values are replaced by what is really written, the solution ``U`` of
    ``U + tril(diag(beta) (K K^T) * exp(L), -1) U = diag(beta) (V - exp(b) K S_0)``.
    """
    q, k, v = _wide(p)
    b, h, n, d = q.shape
    g = by_token(p)
    if g is None:
        g = q.new_zeros(1, 1, n)
    elif g.dim() == 1:
        g = g[None, :, None].expand(1, h, n)
    if g.dim() == 4:
        between = _between(g.movedim(-1, 2)).movedim(2, -1)  # (B, H, N, N, D)
        scores = torch.einsum("bhid,bhjd,bhijd->bhij", q, k, between.exp())
        since, until = g.cumsum(2), between[:, :, -1:].flatten(2, 3)
    else:
        between, since = _between(g), g.cumsum(2)
        scores = (q @ k.mT) * between.exp()
        since, until = since[..., None], between[:, :, -1, :, None]
    m = end = None
    if p.gate is not None and p.m is not None:
        log = between + p.gate.to(p.accumulate)[:, :, None]
        rows = torch.maximum(log.amax(-1), since[..., 0] + p.m[..., None]).detach()
        m, end = finite(rows), rows[:, :, -1]
        scores = (q @ k.mT) * (log - m[..., None]).exp()
        since = since + (p.m[..., None] - m)[..., None]
        until = log[:, :, -1, :, None] - m[:, :, -1:, None]
    read, last = since.exp() * q, since[:, :, -1:].mT.exp()
    if p.beta is not None:
        beta = p.beta.to(p.accumulate)[..., None]
        system = torch.eye(n, dtype=q.dtype, device=q.device) + (beta * (k @ k.mT) * between.exp()).tril(-1)
        v = torch.linalg.solve_triangular(system, beta * (v - since.exp() * k @ p.state), upper=False)
    total = scores @ v + read @ p.state
    state = last * p.state + (until.exp() * k).mT @ v
    return divide(total, p.normalise, m), state, end


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Output, final state and ``m`` by the recurrence; nothing is kept for the backward."""
    out, state, m = recurrent(p)
    return out.to(p.v.dtype), state, m, p.state.new_zeros(0), p.state.new_zeros(0)


def backward(
    p: Problem, saved: tuple[Tensor, Tensor], dout: Tensor | None, dstate: Tensor | None, wants: list[bool]
) -> list[Tensor | None]:
    """Gradients of the tensors of a problem, by automatic differentiation of the recurrence."""

    def run(fresh: Problem) -> list[Tensor]:
        out, state, _ = recurrent(fresh)
        return [out.to(p.v.dtype), state]

    # clones, because a gradient may be the one that came in
    return [None if g is None else g.clone() for g in autodiff.gradients(p, run, [dout, dstate], wants)]


def _wide(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, and keys and values of every query head, in the accumulation dtype."""
    q = p.q.to(p.accumulate) * p.scale
    k, v = (t.to(p.accumulate).repeat_interleave(p.group, 1) for t in (p.k, p.v))
    return q, k, with_ones(v) if p.normalise else v


def _between(g: Tensor) -> Tensor:
    """``sum_{j<r<=i} g_r`` for ``j <= i``, else ``-inf``, for ``g (..., N)``; sums alone, for the sake of ``-inf``."""
    n = g.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=g.device).tril(-1)
    steps = g[..., None].expand(*g.shape, n).masked_fill(~lower, 0.0)  # g_r where r > j
    return steps.cumsum(-2).masked_fill(lower.mT, -torch.inf)
