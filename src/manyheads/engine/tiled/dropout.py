"""Dropout that depends on what a weight is, not on when it is computed."""

from __future__ import annotations

import torch
from torch import Tensor

_A, _B = 0x7FEB352D, -2073254261  # the odd multipliers of a 32-bit mixing function (lowbias32)


def _mix(x: Tensor) -> Tensor:
    """Scrambles int32 values so that nearby inputs give unrelated outputs; wraps, never overflows to an error."""
    x = x ^ _shift(x, 16)
    x = x * _A
    x = x ^ _shift(x, 15)
    x = x * _B
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 values."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def keep(seed: int, batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor, p: float) -> Tensor:
    """Which weights survive: a pure function of seed, batch, head and logical positions.

    Forward, backward, recomputation and every shard of a distributed run call this with the same logical
    arguments and so agree without any stored mask.

    Args:
        seed: Any integer.
        batch, head: Integer indices, global, broadcastable to ``(B, H)``.
        q_pos, k_pos: Integer logical positions ``(B|1, M)`` and ``(B|1, C)``.
        p: Probability of dropping, in ``[0, 1)``.

    Returns:
        bool ``(B, H, M, C)``, True with probability ``1 - p``.

    Example:
        >>> b, i = torch.zeros(1, dtype=torch.int32), torch.arange(100)[None]
        >>> bool(0.45 < keep(0, b, b, i, i, 0.5).float().mean() < 0.55)
        True
    """
    as32 = torch.int32
    seed32 = (seed ^ (seed >> 32)) & 0x7FFFFFFF
    plane = _mix(_mix(batch.to(as32) + seed32)[:, None] + head.to(as32)[None, :])
    row = _mix(plane[:, :, None] + q_pos.to(as32)[:, None, :])
    bits = _mix(row[..., None] + _mix(k_pos.to(as32))[:, None, None, :])
    return (bits & 0x7FFFFFFF) >= int(p * 2**31)
