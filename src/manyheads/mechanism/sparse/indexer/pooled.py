"""Means of blocks of index keys, kept up to date while tokens arrive."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.engine.scratch import Scratch

PIECE = 2**18
"""Elements of keys that are summed at once."""


class PooledKeys:
    """Index keys and the mean of each block of them, for decoding.

    The newest block is the mean of the tokens that it has so far. Appending costs as much as what is appended; memory
    doubles when it is full.

    Args:
        block: Tokens of a block.

    Raises:
        ValueError: A block without tokens.

    Example:
        >>> pooled = PooledKeys(2)
        >>> pooled.append(torch.tensor([[[1.0], [3.0], [5.0]]])).means[0, :, 0].tolist()
        [2.0, 5.0]
        >>> pooled.append(torch.tensor([[[6.0]]])).means[0, :, 0].tolist(), len(pooled)
        ([2.0, 5.5], 4)
    """

    def __init__(self, block: int = 128) -> None:
        """Holds no token."""
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block: expected a positive number of tokens, got {block!r}")
        self.block, self._tokens = block, 0
        self._keys: Tensor | None = None
        self._sums: Tensor | None = None

    def __len__(self) -> int:
        """Tokens so far."""
        return self._tokens

    @property
    def keys(self) -> Float[Tensor, "B N D"]:
        """The keys so far, ``(B, N, D)``, a view that later appends do not move."""
        assert self._keys is not None, "append keys first"
        return self._keys[:, : self._tokens]

    @property
    def means(self) -> Float[Tensor, "B M D"]:
        """``(B, ceil(N / block), D)`` in float32 (float64 for float64)."""
        assert self._sums is not None, "append keys first"
        blocks = -(-self._tokens // self.block)
        means = self._sums[:, :blocks] / self.block
        if (rest := self._tokens % self.block) and blocks:
            means[:, -1] = self._sums[:, blocks - 1] / rest
        return means

    def append(self, keys: Float[Tensor, "B T D"]) -> PooledKeys:
        """Adds the keys of the next tokens.

        Args:
            keys: (B, T, D).

        Returns:
            Itself.

        Raises:
            ValueError: Keys of another shape than those before.
        """
        if keys.dim() != 3 or (self._keys is not None and keys.shape[::2] != self._keys.shape[::2]):
            held = "(B, T, D)" if self._keys is None else f"(B={self._keys.shape[0]}, T, D={self._keys.shape[2]})"
            raise ValueError(f"keys: expected shape {held}, got {tuple(keys.shape)}")
        keys = keys.detach()
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        end = self._tokens + keys.shape[1]
        blocks = -(-end // self.block)
        self._keys = _room(self._keys, end, keys, keys.dtype)
        self._sums = _room(self._sums, blocks, keys, wide)
        self._keys[:, self._tokens : end] = keys
        of = torch.arange(self._tokens, end, device=keys.device) // self.block
        self._sums.index_add_(1, of, keys.to(wide))
        self._tokens = end
        return self


def _room(held: Tensor | None, length: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for so many rows, the rows held so far first and zeros after them."""
    if held is not None and held.shape[1] >= length:
        return held
    before = 0 if held is None else held.shape[1]
    room = like.new_zeros(like.shape[0], max(length, 2 * before), like.shape[2], dtype=dtype)
    if held is not None:
        room[:, :before] = held
    return room


def block_means(k: Tensor, block: int, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Means of the blocks of keys ``(n, D)``, the last one of its own tokens: ``(ceil(n / block), D)``."""
    width, blocks = k.shape[1], -(-k.shape[0] // block)
    means = torch.empty(blocks, width, dtype=dtype, device=k.device)
    some = max(1, PIECE // (block * width))
    for first in range(0, blocks, some):
        part = k[first * block : (first + some) * block]
        keys = scratch("wide keys", tuple(part.shape), means)
        keys.copy_(part)
        whole = part.shape[0] // block
        torch.mean(keys[: whole * block].view(whole, block, width), 1, out=means[first : first + whole])
        if whole * block < part.shape[0]:
            torch.mean(keys[whole * block :], 0, out=means[first + whole])
    return means


def running_means(k: Tensor, block: int, first: int, dtype: torch.dtype) -> Tensor:
    """For each token from ``first`` on, the mean of its block's keys up to it: ``(n - first, D)``."""
    start = first // block * block
    part = k[start:].to(dtype)
    blocks = -(-part.shape[0] // block)
    padded = torch.nn.functional.pad(part, (0, 0, 0, blocks * block - part.shape[0])).unflatten(0, (blocks, block))
    count = torch.arange(1, block + 1, device=k.device, dtype=dtype)
    return (padded.cumsum(1) / count[:, None]).flatten(0, 1)[first - start : part.shape[0]]
