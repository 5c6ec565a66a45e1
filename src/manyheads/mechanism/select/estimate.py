"""Scores from few bits: every pair, but of small whole numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.common.quantise import quantise, smoothed

from .scores import groups


def low_bit_scores(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    bits: int = 4,
    *,
    smooth: bool = True,
    scale: float | None = None,
) -> Float[Tensor, "B Hq Nq Nk"]:
    """Estimates all scores from whole numbers of 4 or 8 bits, one scale for each token.

    With smoothing the mean over tokens is taken off keys and queries first; what that of the queries adds to each key
    is put back exactly, and what that of the keys adds to each row is put back too, so that this estimates the scores
    themselves and not only their differences within a row.

    Args:
        q: (B, Hq, Nq, D). Call it on some queries at a time: the result has a number for each pair.
        k: (B, Hkv, Nk, D).
        bits: 4 or 8.
        smooth: Whether to take the means off.
        scale: Multiplies the products; D ** -0.5 by default.

    Returns:
        Float32 (float64 for float64) (B, Hq, Nq, Nk).

    Raises:
        ValueError: Another number of bits, or heads that form no groups.

    Source:
        Zhang et al., SageAttention2, arXiv 2411.10958; used to select by SALE, arXiv 2505.24179.

    Example:
        >>> q, k = torch.randn(1, 2, 5, 64), torch.randn(1, 1, 7, 64) + 3
        >>> float((low_bit_scores(q, k, 8) - q @ k.mT / 8).abs().max()) < 0.1
        True
    """
    group = groups(q, k)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if smooth:
        queries, keys, row, column = smoothed(q, k)
    else:
        queries, keys = q.to(wide), k.to(wide)
    rows, columns = quantise(queries, bits), quantise(keys, bits)
    left = rows.values.to(wide).unflatten(1, (k.shape[1], group)).flatten(2, 3)
    found = (left @ columns.values.to(wide).mT).unflatten(2, (group, q.shape[2])).flatten(1, 2)
    found = found * rows.steps[..., None] * columns.steps.repeat_interleave(group, 1)[:, :, None]
    if smooth:
        found = found + row[..., None] + column[:, :, None]
    return found * (q.shape[3] ** -0.5 if scale is None else scale)
