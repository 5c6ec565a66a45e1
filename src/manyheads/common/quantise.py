"""Symmetric quantisation of queries and keys to 8 or 4 bits, with the smoothing that makes 4 bits enough.

A group of tokens shares one scale, ``max |x| / 127`` or ``max |x| / 7``; values are whole numbers of that scale. What a
few channels have in common over all tokens would eat most of the range, so the mean over tokens is taken off first:
of the keys, which adds the same number to all scores of a query and leaves a softmax as it is, and of the queries,
which adds a number per key that is put back exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor
from torch.nn.functional import pad

LEVELS = {8: 127, 4: 7}
"""Largest whole number of each width; the range is symmetric."""


class Quantised(NamedTuple):
    """Whole numbers and their scales.

    Attributes:
        values: int8 ``(..., N, D)``, from ``-LEVELS[bits]`` to ``LEVELS[bits]``.
        scale: ``(..., ceil(N / block))``: value of one step, float32 (float64 for float64 inputs); positive.
        block: Tokens that share a scale.
        bits: 8 or 4.
    """

    values: Int8[Tensor, "... N D"]
    scale: Float[Tensor, "... T"]
    block: int
    bits: int

    @property
    def steps(self) -> Float[Tensor, "... N"]:
        """The scale of every token."""
        if self.block == 1:
            return self.scale
        return self.scale.repeat_interleave(self.block, dim=-1)[..., : self.values.shape[-2]]

    def dequantise(self) -> Float[Tensor, "... N D"]:
        """The numbers that the values stand for, in the dtype of the scale."""
        return self.values.to(self.scale.dtype) * self.steps[..., None]

    def packed(self) -> UInt8[Tensor, "... N bytes"]:
        """The values as bytes: two to a byte at 4 bits."""
        return pack_int4(self.values) if self.bits == 4 else self.values.view(torch.uint8)


def quantise(x: Float[Tensor, "... N D"], bits: int = 8, *, block: int = 1) -> Quantised:
    """Rounds to the nearest whole number of a scale that each ``block`` of tokens shares.

    ``values = round(x / scale)`` with ``scale = max |x| / LEVELS[bits]`` over the block, so that no element is off by
    more than half a scale.

    Args:
        x: ``(..., N, D)``, floating and finite.
        bits: 8 or 4.
        block: Tokens that share a scale; the last block may be shorter.

    Returns:
        :class:`Quantised`.

    Raises:
        TypeError: For what is not a floating tensor.
        ValueError: For another number of bits, a block below 1, or fewer than two dimensions.

    Example:
        >>> got = quantise(torch.tensor([[7.0, -3.4], [0.25, 1.0]]), bits=4)
        >>> got.values.tolist(), got.scale.tolist()[0]
        ([[7, -3], [2, 7]], 1.0)
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating tensor (..., N, D), got {got}")
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., N, D), got shape {tuple(x.shape)}")
    if bits not in LEVELS:
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    if block < 1:
        raise ValueError(f"block: expected at least 1 token, got {block}")
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    top = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    if block > 1:
        tokens = top.shape[-1]
        top = pad(top, (0, -tokens % block)).unflatten(-1, (-(-tokens // block), block)).amax(-1)
    scale = (top / LEVELS[bits]).clamp_min(torch.finfo(top.dtype).tiny)  # a block of zeros has one too
    empty = Quantised(torch.empty_like(wide, dtype=torch.int8), scale, block, bits)
    return empty._replace(values=(wide / empty.steps[..., None]).round_().to(torch.int8))


def pack_int4(values: Int8[Tensor, "... D"]) -> UInt8[Tensor, "... bytes"]:
    """Puts two 4-bit numbers in a byte, the earlier one in the low half; an odd width is filled up with zero.

    Args:
        values: int8 ``(..., D)``, each from -8 to 7.

    Returns:
        uint8 ``(..., ceil(D / 2))``.

    Raises:
        TypeError: For another dtype.

    Example:
        >>> pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist()
        [241, 7]
    """
    if values.dtype != torch.int8:
        raise TypeError(f"values: expected int8, got {values.dtype}")
    nibbles = pad(values, (0, values.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: UInt8[Tensor, "... bytes"], width: int) -> Int8[Tensor, "... D"]:
    """Reads back what :func:`pack_int4` wrote.

    Args:
        packed: uint8 ``(..., ceil(width / 2))``.
        width: Numbers in a row.

    Returns:
        int8 ``(..., width)``.

    Raises:
        TypeError: For another dtype.
        ValueError: For a width that does not fit the bytes.

    Example:
        >>> unpack_int4(torch.tensor([241, 7], dtype=torch.uint8), 3).tolist()
        [1, -1, 7]
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    if packed.shape[-1] != -(-width // 2):
        raise ValueError(f"width: {packed.shape[-1]} bytes hold {2 * packed.shape[-1]} numbers, got {width}")
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :width]
    signed: Tensor = (nibbles ^ 8).view(torch.int8) - 8
    return signed


class Smoothed(NamedTuple):
    """Queries and keys without their means, and what that took from the scores.

    ``q_i . k_j = queries_i . keys_j + row_i + column_j``, exactly.

    Attributes:
        queries: ``(B, Hq, Nq, D)`` in the dtype of the sums.
        keys: ``(B, Hkv, Nk, D)``.
        row: ``(B, Hq, Nq)``: the same for all keys of a query, so a softmax does not need it, but its lse does.
        column: ``(B, Hq, Nk)``.
    """

    queries: Float[Tensor, "B Hq Nq D"]
    keys: Float[Tensor, "B Hkv Nk D"]
    row: Float[Tensor, "B Hq Nq"]
    column: Float[Tensor, "B Hq Nk"]


def smoothed(
    q: Float[Tensor, "B Hq Nq D"], k: Float[Tensor, "B Hkv Nk D"], *, queries: bool = True, keys: bool = True
) -> Smoothed:
    """Takes the mean over tokens off the keys of each key head and off the queries of each query head.

    Args:
        q: ``(B, Hq, Nq, D)``, floating.
        k: ``(B, Hkv, Nk, D)``; ``Hq`` is a multiple of ``Hkv``.
        queries: Whether the queries lose their mean.
        keys: Whether the keys do.

    Returns:
        :class:`Smoothed`, in float32 (float64 for float64 inputs).

    Example:
        >>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8) + 10
        >>> s = smoothed(q, k)
        >>> dots = s.queries @ s.keys.repeat_interleave(2, 1).mT + s.row[..., None] + s.column[..., None, :]
        >>> torch.allclose(dots, q @ k.repeat_interleave(2, 1).mT, atol=1e-3)
        True
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide), k.to(wide)
    group = q.shape[1] // max(1, k.shape[1])
    k_mean = k.mean(2, keepdim=True) if keys and k.shape[2] else torch.zeros_like(k[:, :, :1]).sum(2, keepdim=True)
    row = (q @ k_mean.repeat_interleave(group, dim=1).mT)[..., 0]
    if keys:
        k = k - k_mean
    if not queries or not q.shape[2]:
        return Smoothed(q, k, row, k.new_zeros(*q.shape[:2], k.shape[2]))
    q_mean = q.mean(2, keepdim=True)
    column = (q_mean.unflatten(1, (k.shape[1], group))[..., 0, :] @ k.mT).flatten(1, 2)
    return Smoothed(q - q_mean, k, row, column)
