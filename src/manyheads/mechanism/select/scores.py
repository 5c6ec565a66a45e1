"""How well blocks of queries and blocks of keys match."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.common.errors import unknown

from .blocks import pool

SHARES = ("group", "head")


def pooled_scores(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    *,
    q_block: int,
    k_block: int,
    how: str = "mean",
    scale: float | None = None,
    share: str = "group",
    real: Bool[Tensor, "#B Nk"] | None = None,
) -> Float[Tensor, "B S Tq Tk"]:
    """Products of pooled queries and pooled keys.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        q_block: Queries of a block.
        k_block: Keys of a block.
        how: As for :func:`pool`.
        scale: Multiplies the products; D ** -0.5 by default.
        share: ``"group"``: one score for each key head, the average over its query heads; ``"head"``: one for each
            query head.
        real: bool (B|1, N): tokens that count, on both sides, such as ``Cut.real``.

    Returns:
        Float32 (float64 for float64) of shape (B, Hkv or Hq, Tq, Tk). Differentiable.

    Raises:
        ValueError: A block below 1, heads that form no groups, or an unknown name.

    Example:
        >>> import torch
        >>> q, k = torch.ones(1, 4, 6, 2), torch.ones(1, 2, 5, 2)
        >>> pooled_scores(q, k, q_block=2, k_block=2, scale=1.0).shape
        torch.Size([1, 2, 3, 3])
    """
    if share not in SHARES:
        raise unknown("share", share, SHARES)
    group = groups(q, k)
    queries, keys = pool(q, q_block, how, real=real), pool(k, k_block, how, real=real)
    queries = queries.unflatten(1, (k.shape[1], group)) * (q.shape[3] ** -0.5 if scale is None else scale)
    if share == "group":
        return queries.mean(2) @ keys.mT
    return (queries.flatten(2, 3) @ keys.mT).unflatten(2, (group, -1)).flatten(1, 2)


def groups(q: Tensor, k: Tensor) -> int:
    """Query heads for each key head.

    Raises:
        ValueError: Heads that form no groups.
    """
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: its {q.shape[1]} heads must be a multiple of the {k.shape[1]} heads of k")
    return q.shape[1] // k.shape[1]
