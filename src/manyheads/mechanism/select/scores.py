"""How well blocks of queries and blocks of keys match."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from manyheads.common.errors import unknown

from .blocks import check_block, pool

SHARES = ("group", "head")
_HELD = 1 << 23  # scores held at a time


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


def max_scores(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    *,
    k_block: int,
    causal: bool = True,
    scale: float | None = None,
    share: str = "group",
    rows: int | None = None,
) -> Float[Tensor, "B S Nq Tk"]:
    """The best product of each query with a key of each block, no exponential taken.

    Its :func:`top_k` is that of the blocks' largest softmax weights. Every pair is multiplied, some queries at a time.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        k_block: Keys of a block.
        causal: Whether only keys up to a query's own position count; the last query stands at the last key.
        scale: Multiplies the products; D ** -0.5 by default.
        share: ``"group"``: the average over the query heads of a key head of each pair, then the best; ``"head"``: one
            for each query head.
        rows: Queries at a time; by default so many that some million scores are held.

    Returns:
        Float32 (float64 for float64) (B, Hkv or Hq, Nq, Tk); -inf for a block of which a query sees nothing.

    Raises:
        ValueError: A block or number of rows below 1, heads that form no groups, or an unknown name.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[[1.0], [3.0], [2.0]]]])
        >>> max_scores(x, x, k_block=2)[0, 0].tolist()
        [[1.0, -inf], [9.0, -inf], [6.0, 4.0]]
    """
    check_block(k_block, "k_block")
    if share not in SHARES:
        raise unknown("share", share, SHARES)
    group, wide = groups(q, k), torch.float64 if q.dtype == torch.float64 else torch.float32
    nq, nk = q.shape[2], k.shape[2]
    queries = q.to(wide).unflatten(1, (k.shape[1], group)) * (q.shape[3] ** -0.5 if scale is None else scale)
    queries = queries.mean(2, keepdim=True) if share == "group" else queries
    blocks = -(-nk // k_block)
    keys = pad(k.to(wide), (0, 0, 0, blocks * k_block - nk))[:, :, None]
    at = torch.arange(blocks * k_block, device=q.device)
    if rows is None:
        rows = max(1, _HELD // max(1, queries.shape[:3].numel() * nk))
    check_block(rows, "rows")
    found = []
    for start in range(0, max(1, nq), rows):
        products = queries[:, :, :, start : start + rows] @ keys.mT
        place = torch.arange(start, min(start + rows, nq), device=q.device) + (nk - nq)
        hidden = at > (place[:, None] if causal else nk - 1)
        found.append(products.masked_fill(hidden, float("-inf")).unflatten(4, (blocks, k_block)).amax(5).flatten(1, 2))
    return torch.cat(found, 2)


def groups(q: Tensor, k: Tensor) -> int:
    """Query heads for each key head.

    Raises:
        ValueError: Heads that form no groups.
    """
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: its {q.shape[1]} heads must be a multiple of the {k.shape[1]} heads of k")
    return q.shape[1] // k.shape[1]
