"""K-means: centres of vectors, found by Lloyd's steps from a k-means++ start."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

_AT_ONCE = 1 << 24  # distances held at a time


class Clusters(NamedTuple):
    """Vectors in groups.

    Attributes:
        centroids: ``(..., K, D)``: the mean of each group's vectors, after normalisation where that was asked for; a
            group that lost all of its vectors keeps its last centre.
        labels: int64 ``(..., N)``: the group of each vector.
        sizes: int64 ``(..., K)``: vectors of each group.
    """

    centroids: Float[Tensor, "... K D"]
    labels: Int64[Tensor, "... N"]
    sizes: Int64[Tensor, "... K"]

    def means(self, x: Float[Tensor, "... N E"]) -> Float[Tensor, "... K E"]:
        """The mean of other vectors of the same tokens in each group; 0 for an empty group."""
        return _sums(x, self.labels, self.sizes.shape[-1]) / self.sizes.clamp(min=1)[..., None].to(x.dtype)


def kmeans(
    x: Float[Tensor, "... N D"],
    clusters: int,
    *,
    steps: int = 20,
    normalise: bool = False,
    generator: torch.Generator | None = None,
) -> Clusters:
    """Groups vectors so that each is near the mean of its group; every leading axis by itself.

    The start is k-means++: each first centre is a vector drawn with a chance that grows with its squared distance from
    the centres before. Then ``steps`` times every vector joins its nearest centre and every centre moves to the mean of
    its vectors. The squared distances never grow from one step to the next. Distances are made some vectors at a time.

    Args:
        x: ``(..., N, D)``, finite.
        clusters: Groups K, from 1 to N.
        steps: How often centres move; 0 for the start alone.
        normalise: Take the direction of each vector only.
        generator: Draws the start; on the device of ``x``. PyTorch's own by default.

    Returns:
        :class:`Clusters`, in float32 (float64 for float64), on the device of ``x``. No gradient.

    Raises:
        TypeError: For what is not a floating tensor.
        ValueError: For a shape, number of clusters or number of steps out of range.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.2]])
        >>> found = kmeans(x, 2, generator=torch.Generator().manual_seed(0))
        >>> sorted(round(float(c), 2) for c in found.centroids), found.sizes.tolist()
        ([0.05, 5.1], [2, 2])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating tensor (..., N, D), got {got}")
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., N, D), got shape {tuple(x.shape)}")
    if not 1 <= clusters <= x.shape[-2]:
        raise ValueError(f"clusters: expected from 1 to the N={x.shape[-2]} vectors, got {clusters}")
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    lead = x.shape[:-2]
    flat = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).reshape(-1, *x.shape[-2:])
    if normalise:
        flat = torch.nn.functional.normalize(flat, dim=-1)
    centroids = _start(flat, clusters, generator)
    for _ in range(steps):
        labels, _ = nearest(flat, centroids)
        sizes = _sizes(labels, clusters)
        sums = _sums(flat, labels, clusters)
        centroids = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], centroids)
    labels, _ = nearest(flat, centroids)
    sizes = _sizes(labels, clusters)
    return Clusters(*(t.reshape(*lead, *t.shape[1:]) for t in (centroids, labels, sizes)))


def nearest(
    x: Float[Tensor, "*B N D"], centroids: Float[Tensor, "*B K D"]
) -> tuple[Int64[Tensor, "*B N"], Float[Tensor, "*B N"]]:
    """The nearest centre of each vector.

    Args:
        x: ``(..., N, D)``.
        centroids: ``(..., K, D)``.

    Returns:
        int64 ``(..., N)``: the index of the centre, the lower of two equally near ones; ``(..., N)``: the squared
        distance, at least 0.

    Example:
        >>> nearest(torch.tensor([[1.0], [9.0]]), torch.tensor([[0.0], [8.0]]))
        (tensor([0, 1]), tensor([1., 1.]))
    """
    square = centroids.square().sum(-1)[..., None, :]
    held = max(1, centroids.shape[:-1].numel())
    found = []
    for part in x.split(max(1, _AT_ONCE // held), -2):
        gaps = square - 2 * part @ centroids.mT
        gap, label = gaps.min(-1)
        found.append((label, (gap + part.square().sum(-1)).clamp(min=0)))
    return torch.cat([label for label, _ in found], -1), torch.cat([gap for _, gap in found], -1)


def _start(x: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    """Centres by k-means++: (M, K, D)."""
    many, n, _ = x.shape
    first = torch.randint(n, (many, 1), generator=generator, device=x.device)
    chosen, gap = [_row(x, first)], torch.full((many, n), torch.inf, dtype=x.dtype, device=x.device)
    for _ in range(clusters - 1):
        gap = torch.minimum(gap, (x - chosen[-1]).square().sum(-1))
        chance = torch.where(gap.sum(-1, keepdim=True) > 0, gap, 1.0)  # all vectors are centres already
        chosen.append(_row(x, torch.multinomial(chance, 1, generator=generator)))
    return torch.cat(chosen, 1)


def _row(x: Tensor, at: Int[Tensor, "M 1"]) -> Tensor:
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def _sums(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    empty = x.new_zeros(*x.shape[:-2], clusters, x.shape[-1])
    return empty.scatter_add(-2, labels[..., None].expand_as(x), x)


def _sizes(labels: Tensor, clusters: int) -> Tensor:
    empty = labels.new_zeros(*labels.shape[:-1], clusters)
    return empty.scatter_add(-1, labels, torch.ones_like(labels))
