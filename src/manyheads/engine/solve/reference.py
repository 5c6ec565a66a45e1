"""The definitions: every pair at once, plain and quadratic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tiled.problem import Problem
from ..tiled.reference import recording, warn_if_huge, weights
from .normal import factors


def probe(p: Problem, r: Tensor) -> tuple[Tensor, Tensor]:
    """``(1 + c) sum_j p_j v_j - sum_j p_j s_j v_j`` with ``s_j = r . k_j`` and ``c = sum_j p_j s_j``."""
    warn_if_huge(p)
    shares, lse = weights(p, p.layout.dense().to(p.q.device))
    k, v = (t.repeat_interleave(p.group, dim=1) for t in (p.k, p.v))
    turned = shares * (r.to(shares.dtype) @ k.to(shares.dtype).mT)
    mean, other = (t.to(v.dtype).to(shares.dtype) @ v.to(shares.dtype) for t in (shares, turned))
    return ((1.0 + turned.sum(-1, keepdim=True)) * mean - other).to(v.dtype), lse


def local_linear(p: Problem, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """``v_mean + Cov_p(v, k) (Cov_p(k, k) + ridge I)^-1 (q - k_mean)``, query by query."""
    warn_if_huge(p)
    shares, lse = weights(p, p.layout.dense().to(p.q.device))
    k, v = (t.repeat_interleave(p.group, dim=1).to(shares.dtype) for t in (p.k, p.v))
    empty = lse == -torch.inf
    centre = shares @ k
    z = k[:, :, None] - centre[:, :, :, None]
    away = (p.q.to(shares.dtype) - centre).masked_fill(empty[..., None], 0.0)
    added = ridge.to(shares.dtype)[:, None].expand(p.q.shape[:3]).masked_fill(empty, 1.0)
    matrix = torch.einsum("bhij,bhijd,bhije->bhide", shares, z, z)
    matrix = matrix + torch.diag_embed(added[..., None].expand_as(centre))
    if bool((added == 0).any()):
        factors(matrix.detach().flatten(0, -3), added.detach().flatten())  # refuses systems without a solution
    rho = torch.linalg.solve(matrix, away)
    tilted = shares * (1.0 + torch.einsum("bhijd,bhid->bhij", z, rho))
    return (tilted @ v).to(p.v.dtype), lse


def gradients(
    call: Callable[..., tuple[Tensor, Tensor]],
    leaves: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
) -> list[Tensor]:
    """Gradients of ``call(*leaves)`` by automatic differentiation of it."""
    with recording():
        fresh = [t.detach().requires_grad_() for t in leaves]
        out, lse = call(*fresh)
        results, seeds = [out], [dout.to(out.dtype)]
        if dlse is not None:
            results.append(lse)
            seeds.append(dlse.to(lse.dtype).masked_fill(lse == -torch.inf, 0.0))
        got = torch.autograd.grad(results, fresh, seeds, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, got, strict=True)]
