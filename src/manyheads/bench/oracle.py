"""Is the result right? Float64 on sampled rows, and what torch's own attention gets wrong there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.bench.workload import Problem
from manyheads.mask import Mask

ALLOWED = 1.5
"""A result may err by this much more than torch's attention in the same dtype."""
PLAIN = 2.0
"""The same for the plain reference, whose own rounding is what error budgets elsewhere are made of."""

_CELLS = {"cpu": 2**24, "cuda": 2**28}  # scores held at once in float64: 128 MiB, 2 GiB


@dataclass(frozen=True)
class Truth:
    """What attention should give on some query rows.

    Attributes:
        rows: Query rows ``(R,)`` that were computed.
        exact: Float64 results: the rows of the output, then the gradients if the problem has them.
        peer: The same from torch's attention in the dtype of the inputs.
        dout: Upstream gradient, zero outside the rows; ``None`` for a forward problem.
    """

    rows: Tensor
    exact: tuple[Tensor, ...]
    peer: tuple[Tensor, ...]
    dout: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the truth.

    Attributes:
        error: Largest absolute difference, over the output and the gradients.
        norm: Frobenius norm of the difference over that of the truth, the worst of the output and gradients.
        limit: What ``error`` may be, for the part where it is closest to it.
        gate: ``"green"``, ``"red"`` or ``"lossy"``.
    """

    error: float
    norm: float
    limit: float
    gate: str

    def fields(self) -> dict[str, float | str]:
        """The fields of a ``Row`` that say this."""
        return {"error": self.error, "error_norm": self.norm, "error_limit": self.limit, "gate": self.gate}


def visible(mask: Mask, rows: np.ndarray, nq: int, nk: int) -> Tensor:
    """Evaluates a mask on some query rows, straight from its definition.

    Args:
        mask: The mask.
        rows: Query rows ``(R,)``.
        nq: Query tokens.
        nk: Key tokens.

    Returns:
        Bool ``(B|1, H|1, R, Nk)``.

    Example:
        >>> from manyheads.mask import Causal
        >>> visible(Causal(), np.array([1]), 3, 3)[0, 0].tolist()
        [[True, True, False]]
    """
    b, h = mask.shape
    out = torch.zeros(b, h, len(rows), nk, dtype=torch.bool)
    for i in range(b):
        for j in range(h):
            one = mask.at(i, j)
            q_pos, k_pos = one.default_positions(nq, nk)
            q = one.coords(q_pos[rows][:, None], "q", nq)
            k = one.coords(k_pos[None, :], "k", nk)
            out[i, j] = torch.from_numpy(np.broadcast_to(one.allows(q, k), (len(rows), nk)).copy())
    return out


def truth(problem: Problem, q: Tensor, k: Tensor, v: Tensor, *, rows: int = 256) -> Truth:
    """Computes sampled rows in float64, and what torch's attention makes of them in the dtype of the inputs.

    For a problem with gradients the upstream gradient is zero outside the sampled rows, so that the gradients
    of k and v are exact as well.

    Args:
        problem: What is computed.
        q: ``(B, Hq, Nq, D)``.
        k: ``(B, Hkv, Nk, D)``.
        v: ``(B, Hkv, Nk, Dv)``.
        rows: Most rows to sample; fewer when they would need too much memory.

    Returns:
        The sampled rows, exact and from torch.
    """
    nq, nk = q.shape[2], k.shape[2]
    count = min(nq, rows, max(16, _CELLS[q.device.type] // max(nk, 1) // max(q.shape[1], 1)))
    picked = np.random.default_rng(problem.seed).choice(nq, size=count, replace=False)
    picked[0], picked[-1] = 0, nq - 1
    picked = np.unique(picked)
    seen = visible(problem.mask, picked, nq, nk).to(q.device)
    index = torch.from_numpy(picked).to(q.device)
    sampled = q[:, :, index]
    upstream: Tensor | None = None
    dout: Tensor | None = None
    if problem.backward:
        generator = torch.Generator().manual_seed(problem.seed + 1)
        upstream = torch.randn(*sampled.shape[:3], v.shape[3], generator=generator).to(q)
        dout = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        dout[:, :, index] = upstream
    scale = q.shape[3] ** -0.5 if problem.scale is None else problem.scale
    exact = _attend(sampled.double(), k.double(), v.double(), seen, scale, upstream)
    peer = _attend(sampled, k, v, seen, scale, upstream)
    return Truth(index, exact, peer, dout)


def judge(found: tuple[Tensor, ...], known: Truth, *, allowed: float = ALLOWED, lossy: bool = False) -> Verdict:
    """Compares a result with the truth.

    Green is a result whose largest and Frobenius errors are both at most ``allowed`` times those of torch's
    attention, plus one unit of float32 rounding, in the output and in each gradient. An approximation that misses
    this is lossy rather than red.

    Args:
        found: The sampled rows of the output, then the gradients: as in ``Truth.exact``.
        known: The truth.
        allowed: How much more than torch a result may err.
        lossy: Whether the provider says that it approximates.

    Returns:
        The verdict; NaN or Inf is red.
    """
    worst: tuple[float, float, float] = (0.0, 0.0, 0.0)
    closest, gate, finite = -1.0, "green", True
    eps = torch.finfo(torch.float32).eps
    for a, r, s in zip(found, known.exact, known.peer, strict=True):
        size = (float(r.abs().max()), float(r.norm()))
        mine = (a.double() - r).detach()
        peer = (s.double() - r).detach()
        error, norm = float(mine.abs().max()), float(mine.norm())
        limit = allowed * float(peer.abs().max()) + eps * size[0]
        norm_limit = allowed * float(peer.norm()) + eps * size[1]
        if not (error <= limit and norm <= norm_limit):
            gate = "red"
            finite = finite and bool(np.isfinite(norm))
        share = error / limit if limit else float(error > 0)
        if not share <= closest:
            closest = share
            worst = (error, norm / size[1] if size[1] else norm, limit)
    error, norm, limit = (x if np.isfinite(x) else 1e300 for x in worst)
    return Verdict(error, norm, limit, "lossy" if gate == "red" and lossy and finite else gate)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, upstream: Tensor | None) -> tuple[Tensor, ...]:
    """Torch's attention under a boolean mask, and its gradients; float64 takes the plain formula."""
    with torch.set_grad_enabled(upstream is not None):
        if upstream is not None:
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        attend = _plain if q.dtype == torch.float64 else _fused
        out = attend(q, k, v, seen, scale)
        if upstream is None:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype)))


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.is_cuda:
        # with grouped heads and a mask a GPU has but the plain formula in float32, which is no peer in half precision
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        gqa = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)


def _plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The definition, head by head; a row that sees nothing is zero."""
    group = q.shape[1] // k.shape[1]
    seen = seen.expand(q.shape[0], q.shape[1], -1, -1)
    batches = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h // group].T * scale
            weights = scores.masked_fill(~seen[b, h], float("-inf")).softmax(-1)
            weights = weights.masked_fill(~seen[b, h].any(-1, keepdim=True), 0.0)
            heads.append(weights @ v[b, h // group])
        batches.append(torch.stack(heads))
    return torch.stack(batches)
