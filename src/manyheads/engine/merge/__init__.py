"""Combines partial attention results over disjoint keys, exactly and differentiably."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..result import Attn

__all__ = ["merge"]


def merge(*parts: tuple[Float[Tensor, "*rows Dv"], Float[Tensor, "*rows"]]) -> Attn:
    """The result over the union of disjoint key sets, from the results over each.

    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p``: associative and commutative, so rings,
    cascades, prefix reuse and local-plus-global attention are all merges. Statistics are float32 (float64 for float64).

    Args:
        *parts: Pairs ``(out, lse)``: ``out (B, H, N, Dv)`` and natural-log ``lse (B, H, N)``. A part that saw no key
            has ``lse = -inf`` and counts for nothing.

    Returns:
        The merged pair, ``out`` in the dtype of the first part. Rows that no part saw keep 0 and ``-inf``.

    Raises:
        ValueError: With fewer than one part, or shapes that differ.
        TypeError: For a part that is not a pair of tensors.

    Example:
        >>> import manyheads as mh
        >>> q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
        >>> whole = mh.attention(q, k, v)
        >>> halves = [mh.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
        >>> bool(torch.allclose(merge(*halves).out, whole, atol=1e-6))
        True
    """
    _check(parts)
    outs, lses = [p[0] for p in parts], torch.stack([p[1] for p in parts])
    acc = torch.float64 if lses.dtype == torch.float64 else torch.float32
    lses = lses.to(acc)
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)  # a constant shift: it drops out of value and gradient
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (top + torch.log(total)).masked_fill(nothing, -torch.inf)
    shares = (weights / total)[..., None]
    out = sum(share * o.to(acc) for share, o in zip(shares, outs, strict=True))
    assert isinstance(out, Tensor)
    return Attn(out.to(outs[0].dtype), lse)


def _check(parts: tuple[Attn | tuple[Tensor, Tensor], ...]) -> None:
    if not parts:
        raise ValueError("merge: expected at least one (out, lse) pair, got none")
    for i, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2 or not all(isinstance(t, Tensor) for t in part):
            raise TypeError(f"merge: part {i} must be a pair of tensors (out, lse), got {type(part).__name__}")
        out, lse = part
        if out.dim() < 2 or out.shape[:-1] != lse.shape:
            raise ValueError(
                f"merge: part {i} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; "
                "expected (..., N, Dv) and (..., N)"
            )
        if out.shape != parts[0][0].shape:
            raise ValueError(f"merge: part {i} has out of shape {tuple(out.shape)}, part 0 {tuple(parts[0][0].shape)}")
