"""The local linear estimate in blocks: three passes forward, and gradients through one more solve.

With ``rho = (Cov_p(k, k) + ridge I)^-1 (q - k_mean)`` the output is the average corrected along the probe ``-rho``.
Backward, let ``y`` solve the same systems for the gradient of ``rho``. What ``rho`` owes to queries and keys is then
what the correction would owe to them if the keys stood beside the values, with ``-y`` for their cotangent and
``q - ridge * rho`` for their output: one backward pass of the correction serves both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..tiled import blocked as averages
from ..tiled.problem import Problem
from . import blocked
from .normal import Solver, solve


def forward(p: Problem, ridge: Tensor, solver: Solver, keep: int) -> tuple[Tensor, ...]:
    """Output, log-normaliser, and for gradients ``rho``, mean keys and mean values."""
    p = widened(p)
    centre, lse = averages.forward(replace(p, v=p.k))
    rho = solve(p, lse, centre, p.q - centre, ridge, solver)
    stats = blocked.forward(p, -rho, 2 if keep > 1 else 0)
    return stats.out, lse, rho, centre, stats.mean


def backward(
    p: Problem,
    ridge: Tensor,
    solver: Solver,
    saved: tuple[Tensor, ...],
    dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and ridge, in the accumulation dtype."""
    p = widened(p)
    out, lse, rho, centre, mean = saved
    dout, out = dout.to(p.q.dtype), out.to(p.q.dtype)
    stats = blocked.Stats(out, lse, mean, -(rho * centre).sum(-1))
    y = solve(p, lse, centre, -blocked.probe_gradient(p, stats, dout), ridge, solver)
    wide = blocked.Stats(
        torch.cat([out, p.q - ridge[:, None, None] * rho], -1), lse, torch.cat([mean, centre], -1), stats.level
    )
    beside = replace(p, v=torch.cat([p.v, p.k], -1))
    dq, _, dk, dv = blocked.backward(beside, -rho, wide, torch.cat([dout, -y], -1), dlse)
    width = p.v.shape[3]
    return dq + y, dk + dv[..., width:], dv[..., :width], -(y * rho).sum((0, 2, 3))


def widened(p: Problem) -> Problem:
    """The same problem in the accumulation dtype, in which all of it is computed."""
    q, k, v = (t.to(p.accumulate) for t in (p.q, p.k, p.v))
    return replace(p, q=q, k=k, v=v)
