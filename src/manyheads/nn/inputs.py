"""What every layer that maps tokens to tokens checks and does to its input."""

from __future__ import annotations

from torch import Tensor

from manyheads.engine.scan.problem import starts_of
from manyheads.mask import Mask
from manyheads.mechanism.carrier import order
from manyheads.spec import Spec


def check_tokens(x: Tensor, width: int) -> None:
    """Checks tokens ``(B, N, C)``.

    Raises:
        TypeError: For what is not a floating tensor.
        ValueError: For another shape.

    Example:
        >>> import torch
        >>> check_tokens(torch.ones(2, 8), 8)
        Traceback (most recent call last):
        ...
        ValueError: x: expected tokens (B, N, C=8), got shape (2, 8)
    """
    _check(x, width, 3, f"tokens (B, N, C={width})")


def check_token(x: Tensor, width: int) -> None:
    """Checks one token per batch entry, ``(B, C)``.

    Raises:
        TypeError: For what is not a floating tensor.
        ValueError: For another shape.

    Example:
        >>> import torch
        >>> check_token(torch.ones(2, 8), 8)
    """
    _check(x, width, 2, f"one token (B, C={width})")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Channels as heads: ``(B, N, H D)`` to ``(B, H, N, D)``, or ``(B, H D)`` to ``(B, H, D)``.

    Example:
        >>> import torch
        >>> split_heads(torch.ones(2, 5, 12), 3).shape
        torch.Size([2, 3, 5, 4])
    """
    split = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2) if x.dim() == 3 else split


def join_heads(x: Tensor) -> Tensor:
    """Heads as channels: ``(B, H, N, D)`` to ``(B, N, H D)``, or ``(B, H, D)`` to ``(B, H D)``.

    Example:
        >>> import torch
        >>> join_heads(torch.ones(2, 3, 5, 4)).shape
        torch.Size([2, 5, 12])
    """
    return (x.transpose(1, 2) if x.dim() == 4 else x).flatten(-2)


def document_starts(spec: Spec, mask: Mask | str | None, x: Tensor) -> Tensor | None:
    """Where documents after the first begin, bool ``(1|B, N)``; None for a mask without documents.

    Args:
        spec: The mechanism that refuses other masks.
        mask: None or causal, or packed documents.
        x: (B, N, C).

    Raises:
        UnsupportedError: For another mask.

    Example:
        >>> import torch
        >>> from manyheads.spec import find
        >>> document_starts(find("exact"), "causal & document([1, 2])", torch.ones(1, 3, 8)).int().tolist()
        [[0, 1, 0]]
    """
    _, lens = order(spec, mask, x[:, None])
    return None if lens is None else starts_of(lens, x.shape[0], x.shape[1], x.device)


def _check(x: Tensor, width: int, dims: int, what: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected {what} in floating point, got {got}")
    if x.dim() != dims or x.shape[-1] != width:
        raise ValueError(f"x: expected {what}, got shape {tuple(x.shape)}")
