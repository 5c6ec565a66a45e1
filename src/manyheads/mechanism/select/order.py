"""Another order of the keys, segment by segment, that gathers the important ones into few blocks; and its inverse."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from .blocks import check_block


def reorder(scores: Float[Tensor, "B H N"], segment: int) -> Int64[Tensor, "B H N"]:
    """Sorts tokens by falling score inside each complete segment; the incomplete last one stays as it is.

    A query that sees whole segments before its own one sees the same keys in any such order.

    Args:
        scores: (B, H, N), one for each token.
        segment: Tokens of a segment.

    Returns:
        int64 (B, H, N): the token that comes first, second and so on. Equal scores keep their order.

    Raises:
        ValueError: A segment below 1, or scores of another shape.

    Example:
        >>> reorder(torch.tensor([[[1.0, 2.0, 5.0, 7.0, 9.0]]]), 2).flatten().tolist()
        [1, 0, 3, 2, 4]
    """
    check_block(segment, "segment")
    if scores.dim() != 3 or not scores.is_floating_point():
        raise ValueError(f"scores: expected floating (B, H, N), got {scores.dtype} {tuple(scores.shape)}")
    n = scores.shape[2]
    whole = n // segment * segment
    at = torch.arange(n, device=scores.device)
    if not whole:
        return at.expand(scores.shape).clone()
    parts = scores.detach()[..., :whole].unflatten(2, (whole // segment, segment))
    order = parts.sort(dim=-1, descending=True, stable=True).indices
    found = (order + at[:whole:segment, None]).flatten(2)
    return torch.cat((found, at[whole:].expand(*scores.shape[:2], -1)), 2)


def inverse(permutation: Integer[Tensor, "*B N"]) -> Int64[Tensor, "*B N"]:
    """The order that undoes an order: where each token went.

    Args:
        permutation: (..., N), such as :func:`reorder` gives.

    Returns:
        int64 (..., N).

    Raises:
        ValueError: On the CPU, for what is no permutation; see :func:`check_permutation`.

    Example:
        >>> inverse(torch.tensor([2, 0, 1])).tolist()
        [1, 2, 0]
    """
    check_permutation(permutation)
    at = torch.arange(permutation.shape[-1], device=permutation.device).expand(permutation.shape)
    return torch.empty_like(at).scatter(-1, permutation.long(), at)


def permute(x: Float[Tensor, "B H N D"], permutation: Integer[Tensor, "#B P N"]) -> Float[Tensor, "B S N D"]:
    """Tokens in another order, differentiable.

    Args:
        x: (B, H, N, D).
        permutation: (B|1, P, N): P is 1, H, or a multiple of H, when each head of x is needed in P / H orders.

    Returns:
        (B, max(H, P), N, D).

    Raises:
        ValueError: Shapes that do not fit.

    Example:
        >>> permute(torch.tensor([[[[1.0], [2.0], [3.0]]]]), torch.tensor([[[2, 0, 1]]])).flatten().tolist()
        [3.0, 1.0, 2.0]
    """
    (batch, heads, n, width), own = x.shape, permutation.shape
    if len(own) != 3 or own[0] not in (1, batch) or own[2] != n or (own[1] != 1 and own[1] % heads):
        raise ValueError(f"permutation: expected (B={batch}, 1 or a multiple of H={heads}, N={n}), got {tuple(own)}")
    if own[1] > heads:
        x = x.repeat_interleave(own[1] // heads, 1)
    at = permutation.long()[..., None].expand(batch, x.shape[1], n, width)
    return x.gather(2, at)


def check_permutation(permutation: Integer[Tensor, "*B N"], *, segment: int | None = None) -> None:
    """Refuses what is no order of the numbers from 0 to N - 1. Looks at values on the CPU only.

    Args:
        permutation: (..., N).
        segment: Tokens of a segment that none may leave; by default they may go anywhere.

    Raises:
        TypeError: Not integers.
        ValueError: A number that is missing, comes twice, or left its segment.

    Example:
        >>> check_permutation(torch.tensor([1, 0, 2, 2]))
        Traceback (most recent call last):
        ...
        ValueError: permutation: expected each number from 0 to 3 once in a row, got [1, 0, 2, 2]
    """
    if not isinstance(permutation, Tensor) or permutation.is_floating_point() or permutation.dtype == torch.bool:
        got = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise TypeError(f"permutation: expected integers (..., N), got {got}")
    if segment is not None:
        check_block(segment, "segment")
    if permutation.device.type != "cpu" or torch.compiler.is_compiling():
        return
    rows = permutation.reshape(-1, permutation.shape[-1])
    at = torch.arange(rows.shape[1])
    wrong = (rows.sort(-1).values != at).any(-1)
    if bool(wrong.any()):
        first = rows[wrong][0].tolist()
        shown = f"{first}" if len(first) <= 16 else f"{first[:16]} ..."
        raise ValueError(f"permutation: expected each number from 0 to {rows.shape[1] - 1} once in a row, got {shown}")
    if segment is not None and bool((rows // segment != at // segment).any()):
        raise ValueError(f"permutation: a token left its segment of {segment}")
