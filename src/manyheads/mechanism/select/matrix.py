"""What was chosen, as a matrix of pairs: for references, tests and reports."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.mask import TileLayout

from .blocks import Cut


def pairs(
    chosen: Any, q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], *, parts: Cut | None = None
) -> Bool[Tensor, "B Hq Nq Nk"]:
    """The chosen pairs as a matrix, quadratic in the number of tokens.

    Args:
        chosen: What ``Spec.selection`` returns: a :class:`manyheads.mask.TileLayout`; token ids
            ``(B|1, 1|Hkv|Hq, Nq, K)``, negative for none; a tuple ``(layout, order)`` whose key column c is key
            ``order[b, h, c]``; or such a matrix itself, bool and broadcast.
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        parts: The cut of packed documents, when a layout is one of padded tokens.

    Returns:
        bool (B, Hq, Nq, Nk) on the device of ``q``, heads of a group repeated.

    Raises:
        TypeError: For anything else.
        ValueError: For other numbers of tokens or heads.

    Example:
        >>> q = torch.ones(1, 1, 2, 4)
        >>> pairs(torch.tensor([[[[0, -1], [1, 0]]]]), q, q)[0, 0].int().tolist()
        [[1, 0], [1, 1]]
    """
    shape = (*q.shape[:3], k.shape[2])
    if isinstance(chosen, TileLayout):
        dense = chosen.dense().to(q.device)
        if parts is not None:
            dense = parts.restore(parts.restore(dense, dim=2), dim=3)
        return _fitting(dense, shape)
    if isinstance(chosen, tuple) and len(chosen) == 2:
        layout, order = chosen
        columns = pairs(layout, q, k, parts=parts)
        order = _heads(order, shape[1])[:, :, None].expand(shape).to(q.device)
        return torch.zeros_like(columns).scatter(3, order.long(), columns)
    if not isinstance(chosen, Tensor) or chosen.dim() != 4 or chosen.is_floating_point():
        got = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"chosen: expected a layout, token ids, (layout, order) or a matrix of pairs, got {got}")
    if chosen.dtype == torch.bool:
        return _fitting(chosen.to(q.device), shape)
    if chosen.shape[2] != shape[2]:
        raise ValueError(f"chosen: expected ids of {shape[2]} queries, got shape {tuple(chosen.shape)}")
    ids = _heads(chosen, shape[1]).to(q.device).long().expand(*shape[:3], -1)
    ids = torch.where(ids < 0, shape[3], ids)
    found = torch.zeros(*shape[:3], shape[3] + 1, dtype=torch.bool, device=q.device)
    return found.scatter(3, ids, True)[..., :-1]


def _fitting(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    if matrix.shape[2:] != shape[2:]:
        raise ValueError(f"chosen: expected pairs of {shape[2]} x {shape[3]} tokens, got {tuple(matrix.shape[2:])}")
    return _heads(matrix, shape[1]).expand(shape)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Repeats what key heads share for their query heads."""
    if heads % x.shape[1]:
        raise ValueError(f"chosen: expected {heads} heads or a divisor, got shape {tuple(x.shape)}")
    return x.repeat_interleave(heads // x.shape[1], 1)
