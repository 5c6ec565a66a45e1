"""Memory that the parts of one call use in turn."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_KEPT = 32 * 2**20  # bytes that a thread keeps from one call to the next
_threads = threading.local()


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
        self._held: dict[tuple[str, torch.dtype, torch.device, bool], Tensor] = {}

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
        key, size = (name, dtype or like.dtype, like.device, torch.is_inference_mode_enabled()), math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = like.new_empty(size, dtype=key[1])
        return held[:size].view(shape)

    @property
    def nbytes(self) -> float:
        """Bytes that are held; infinity with some on a device where another stream could still be reading them."""
        held = self._held.values()
        return sum(t.nbytes for t in held) if all(t.device.type == "cpu" for t in held) else math.inf


@contextlib.contextmanager
def borrowed() -> Iterator[Scratch]:
    """Scratch memory for one call, which the next call of this thread finds again unless it is large.

    A call inside a call gets memory of its own.

    Example:
        >>> with borrowed() as scratch:
        ...     first = scratch("scores", (2, 3), torch.zeros(1)).data_ptr()
        >>> with borrowed() as scratch:
        ...     scratch("scores", (2, 3), torch.zeros(1)).data_ptr() == first
        True
    """
    found: Scratch | None = getattr(_threads, "scratch", None)
    _threads.scratch = None
    scratch = Scratch() if found is None else found
    try:
        yield scratch
    finally:
        if scratch.nbytes <= _KEPT:
            _threads.scratch = scratch
