"""Memory that the parts of one call use in turn."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Memory by name for what lives as long as one part of a call, given out again to the next part.

    Fresh memory of this size comes as new pages on a CPU, which cost as much as a product over them. Never to be used
    where gradients are recorded: they would find their inputs overwritten.

    Example:
        >>> scratch, like = Scratch(), torch.zeros(1)
        >>> scratch("scores", (2, 3), like).data_ptr() == scratch("scores", (3, 1), like).data_ptr()
        True
    """

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory.

        Args:
            name: What it is for; what was last given out under this name and dtype is overwritten.
            shape: Of the result.
            like: Gives the device, and the dtype by default.
            dtype: Of the result.

        Returns:
            A contiguous tensor.
        """
        key, size = (name, dtype or like.dtype), math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = like.new_empty(size, dtype=key[1])
        return held[:size].view(shape)
