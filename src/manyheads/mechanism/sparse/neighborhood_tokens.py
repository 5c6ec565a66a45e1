"""Tokens of a grid in the order of boxes, padded to whole boxes: what a kernel over tiles of tokens wants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from manyheads.mask.neighborhood import grid_shape, per_axis

PerAxis = int | Sequence[int]


def permute_tokens(
    x: Float[Tensor, "B H N D"], *, shape: Sequence[int], box: PerAxis, dilation: PerAxis = 1
) -> tuple[Float[Tensor, "BG H M D"], Bool[Tensor, "G M"]]:
    """Residue classes of a dilation as entries of the batch, and in each the tokens of a box next to each other.

    Each axis is padded to a multiple of ``box * dilation``; what is padded is zero and not ``real``.

    Args:
        x: ``(B, H, N, D)``, N the product of ``shape``, last axis fastest.
        shape: Sizes of the grid, 1 to 3 of them.
        box: Cells of a box along each axis, one number or one per axis.
        dilation: Distance of neighbours along each axis; G is the product.

    Returns:
        ``(B G, H, M, D)``, the classes of one entry of the batch after each other, and which of the ``(G, M)`` tokens
        are no padding.

    Raises:
        ValueError: A shape that does not make N tokens, sizes below 1.

    Example:
        >>> x = torch.arange(8.0).view(1, 1, 8, 1)
        >>> tokens, real = permute_tokens(x, shape=(2, 4), box=2)
        >>> tokens.flatten().tolist(), bool(real.all())
        ([0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0], True)
    """
    grid, sizes, steps = _sizes(x.shape[2], shape, box, dilation)
    tokens = _forward(x, grid, sizes, steps)
    real = _forward(x.new_ones(1, 1, math.prod(grid), 1, dtype=torch.bool), grid, sizes, steps)
    return tokens, real[:, 0, :, 0]


def unpermute_tokens(
    x: Float[Tensor, "BG H M D"], *, shape: Sequence[int], box: PerAxis, dilation: PerAxis = 1
) -> Float[Tensor, "B H N D"]:
    """Undoes :func:`permute_tokens`; padding is dropped.

    Args:
        x: ``(B G, H, M, D)``.
        shape, box, dilation: As they were.

    Returns:
        ``(B, H, N, D)``.

    Raises:
        ValueError: Tokens or a batch that do not belong to these sizes.

    Example:
        >>> x = torch.randn(2, 3, 35, 4)
        >>> options = {"shape": (5, 7), "box": (2, 3), "dilation": (1, 2)}
        >>> torch.equal(unpermute_tokens(permute_tokens(x, **options)[0], **options), x)
        True
    """
    grid, sizes, steps = _sizes(math.prod(shape), shape, box, dilation)
    counts = [-(-n // (size * step)) for n, size, step in zip(grid, sizes, steps, strict=True)]
    tokens, groups, n = math.prod(counts) * math.prod(sizes), math.prod(steps), len(grid)
    if x.shape[2] != tokens or x.shape[0] % groups:
        raise ValueError(f"x: expected (B * {groups}, H, {tokens}, D), got {tuple(x.shape)}")
    x = x.reshape(-1, *steps, x.shape[1], *counts, *sizes, x.shape[3])
    cells = itertools.chain.from_iterable((2 + n + a, 2 + 2 * n + a, 1 + a) for a in range(n))
    x = x.permute(0, 1 + n, *cells, x.dim() - 1)
    whole = [count * size * step for count, size, step in zip(counts, sizes, steps, strict=True)]
    x = x.reshape(*x.shape[:2], *whole, x.shape[-1])
    return x[(slice(None), slice(None), *map(slice, grid))].flatten(2, 1 + n)


def _forward(x: Tensor, grid: tuple[int, ...], sizes: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    n = len(grid)
    x = x.unflatten(2, grid)
    short = [-length % (size * step) for length, size, step in zip(grid, sizes, steps, strict=True)]
    x = pad(x, (0, 0, *itertools.chain.from_iterable((0, more) for more in reversed(short))))
    split = [
        part
        for length, size, step in zip(x.shape[2:-1], sizes, steps, strict=True)
        for part in (length // (size * step), size, step)
    ]
    x = x.reshape(*x.shape[:2], *split, x.shape[-1])
    order = [2 + 3 * a + part for part in (2, 0, 1) for a in range(n)]
    x = x.permute(0, *order[:n], 1, *order[n:], x.dim() - 1)
    return x.reshape(x.shape[0] * math.prod(steps), x.shape[1 + n], -1, x.shape[-1])


def _sizes(
    tokens: int, shape: Sequence[int], box: PerAxis, dilation: PerAxis
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    grid = grid_shape(tuple(shape))
    if math.prod(grid) != tokens:
        raise ValueError(f"shape: expected a grid of N={tokens} tokens, got {grid}")
    return grid, per_axis(box, len(grid), "box"), per_axis(dilation, len(grid), "dilation")
