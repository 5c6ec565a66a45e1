"""Centroid lookup: which groups of keys a query looks for, and the keys that they hold."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from .choose import top_k
from .scores import groups


def centroid_scores(
    q: Float[Tensor, "B Hq Nq D"], centroids: Float[Tensor, "#B Hkv K D"], *, scale: float | None = None
) -> Float[Tensor, "B Hq Nq K"]:
    """Products of queries and centroids, float32 (float64 for float64).

    Args:
        q: (B, Hq, Nq, D).
        centroids: (B|1, Hkv, K, D); see :func:`manyheads.common.kmeans.kmeans` and ``Clusters.means``.
        scale: Multiplies the products; D ** -0.5 by default.

    Returns:
        (B, Hq, Nq, K).

    Raises:
        ValueError: Heads that form no groups.

    Example:
        >>> centroid_scores(torch.ones(1, 2, 3, 4), torch.ones(1, 1, 5, 4)).shape
        torch.Size([1, 2, 3, 5])
    """
    group, wide = groups(q, centroids), torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.to(wide).unflatten(1, (centroids.shape[1], group)).flatten(2, 3)
    scores = rows @ centroids.to(wide).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    return scores.unflatten(2, (group, q.shape[2])).flatten(1, 2)


def centroid_weights(
    scores: Float[Tensor, "B Hq Nq K"], sizes: Integer[Tensor, "#B Hkv K"]
) -> Float[Tensor, "B Hq Nq K"]:
    r"""What softmax weight one key of each group would have if all its keys lay at the centroid.

    $$S_i = e^{c_i} / \sum_j n_j e^{c_j}, \qquad \sum_i n_i S_i = 1$$

    Args:
        scores: (B, Hq, Nq, K), c from :func:`centroid_scores`.
        sizes: (B|1, Hkv, K), keys n of each group; those without keys get weight 0.

    Returns:
        (B, Hq, Nq, K). Zero where no group holds a key.

    Raises:
        ValueError: Shapes that do not fit.

    Source:
        Hooper et al., Squeezed Attention, arXiv 2411.09688, section 4.

    Example:
        >>> centroid_weights(torch.zeros(1, 1, 1, 2), torch.tensor([[[3, 1]]])).flatten().tolist()
        [0.25, 0.25]
    """
    heads, own = scores.shape[1], sizes.shape[1]
    if sizes.shape[-1] != scores.shape[-1] or not own or heads % own or sizes.shape[0] not in (1, scores.shape[0]):
        raise ValueError(f"sizes: expected (B, Hkv, K={scores.shape[-1]}), got {tuple(sizes.shape)}")
    n = sizes.to(scores.dtype).repeat_interleave(heads // own, 1)[:, :, None]
    logs = scores.masked_fill(n == 0, float("-inf"))
    total = (logs + n.clamp(min=1).log()).logsumexp(-1, keepdim=True)
    return torch.where(n == 0, 0.0, (logs - total).exp().nan_to_num(nan=0.0))


def nearest_centroids(
    q: Float[Tensor, "B Hq Nq D"],
    centroids: Float[Tensor, "#B Hkv K D"],
    keep: int,
    *,
    sizes: Integer[Tensor, "#B Hkv K"] | None = None,
) -> Int[Tensor, "B Hq Nq keep"]:
    """The groups whose centroids have the largest products with each query.

    Args:
        q: (B, Hq, Nq, D).
        centroids: (B|1, Hkv, K, D).
        keep: Groups for each query, 1 to K.
        sizes: (B|1, Hkv, K): groups without keys are never kept; by default all have some.

    Returns:
        int32 (B, Hq, Nq, keep): ascending, -1 after the last.

    Raises:
        ValueError: ``keep`` out of range, or shapes that do not fit.

    Example:
        >>> centroids = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]])
        >>> nearest_centroids(torch.tensor([[[[3.0, 1.0]]]]), centroids, 2).flatten().tolist()
        [0, 2]
    """
    scores = centroid_scores(q, centroids, scale=1.0)
    held = None if sizes is None else (sizes > 0).repeat_interleave(q.shape[1] // sizes.shape[1], 1)[:, :, None]
    return top_k(scores, keep, visible=held)


def members(
    kept: Bool[Tensor, "B H Tq K"], labels: Integer[Tensor, "#B Hkv N"], most: int | None = None
) -> Int[Tensor, "B H Tq most"]:
    """The keys of chosen groups.

    Args:
        kept: (B, H, Tq, K): the groups that each row chose, such as ``weights > threshold``.
        labels: (B|1, Hkv, N): the group of each key.
        most: Keys kept at most, the first ones; N by default.

    Returns:
        int32 (B, H, Tq, most): ascending keys, -1 after the last.

    Raises:
        ValueError: Shapes that do not fit, or ``most`` out of range.

    Example:
        >>> members(torch.tensor([[[[False, True]]]]), torch.tensor([[[1, 0, 1]]])).flatten().tolist()
        [0, 2, -1]
    """
    heads, own = kept.shape[1], labels.shape[1]
    if labels.dim() != 3 or not own or heads % own or labels.shape[0] not in (1, kept.shape[0]):
        raise ValueError(f"labels: expected (B={kept.shape[0]}, Hkv, N), got {tuple(labels.shape)}")
    at = labels.long().repeat_interleave(heads // own, 1)[:, :, None].expand(*kept.shape[:3], -1)
    return ids_of(kept.gather(3, at), most)


def ids_of(kept: Bool[Tensor, "B H Tq N"], most: int | None = None) -> Int[Tensor, "B H Tq most"]:
    """Bools as padded ids.

    Args:
        kept: (B, H, Tq, N).
        most: Width of the result, 1 to N: the first so many of a row are listed; N by default.

    Returns:
        int32 (B, H, Tq, most): ascending, -1 after the last.

    Raises:
        ValueError: ``most`` out of range.

    Example:
        >>> ids_of(torch.tensor([[[[True, False, True]]]]), 2).flatten().tolist()
        [0, 2]
    """
    n = kept.shape[-1]
    most = n if most is None else most
    if not 1 <= most <= n:
        raise ValueError(f"most: expected from 1 to the N={n} that there are, got {most}")
    at = torch.arange(n, device=kept.device, dtype=torch.int32)
    found = torch.where(kept, at, n).sort(-1).values[..., :most]
    return torch.where(found < n, found, -1)
