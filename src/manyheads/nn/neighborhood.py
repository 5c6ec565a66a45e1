"""Layers of neighbourhood attention over lines, images and videos, with the names of NATTEN's modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.mask import Neighborhood
from manyheads.mechanism.sparse.neighborhood import neighborhood_attention
from manyheads.mechanism.sparse.neighborhood_parts import neighborhood_average, neighborhood_scores

PerAxis = int | Sequence[int]


class _Neighborhood(nn.Module):
    axes: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        like = Neighborhood((2**30,) * self.axes, kernel_size, stride, dilation, is_causal)  # checks, and one per axis
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kernel_size, self.stride, self.dilation = like.window, like.stride, like.dilation
        self.is_causal = like.causal
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * w - 1 for w in like.window))) if rel_pos_bias else None
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: ``(B, *shape, C)``.

        Returns:
            As ``x``.

        Raises:
            ValueError: Another number of axes, other channels, or an axis that has no room for the window.
        """
        if x.dim() != self.axes + 2 or x.shape[-1] != self.embed_dim:
            letters = ", ".join("XYZ"[: self.axes])
            raise ValueError(f"x: expected (B, {letters}, C={self.embed_dim}), got shape {tuple(x.shape)}")
        shape = tuple(x.shape[1:-1])
        parts = self.qkv(x).view(x.shape[0], math.prod(shape), 3, self.num_heads, self.head_dim)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        grid: dict[str, Any] = {"shape": shape, "window": self.kernel_size, "stride": self.stride}
        grid |= {"dilation": self.dilation, "causal": self.is_causal}
        if self.rpb is None:
            out: Any = neighborhood_attention(q, k, v, scale=self.scale, **grid)
        else:
            s = neighborhood_scores(q, k, table=self.rpb, scale=self.scale, **grid)
            out = neighborhood_average(s.softmax(-1), v, **grid)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

    def extra_repr(self) -> str:
        """Sizes."""
        grid = f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
        return f"{self.embed_dim}, {self.num_heads}, {grid}, is_causal={self.is_causal}"


class NeighborhoodAttention1D(_Neighborhood):
    """Attention of each token of a line ``(B, X, C)`` to its nearest tokens.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Number of heads.
        kernel_size: Tokens seen along each axis, one number or one per axis, at least 2.
        stride: So many neighbouring queries share one window.
        dilation: Distance between neighbouring tokens of a window.
        is_causal: Whether a token sees only itself and what lies before it, along every axis or each.
        qkv_bias: Whether queries, keys and values have biases.
        qk_scale: Multiplies the scores; default head width ** -0.5.
        proj_drop: Share of outputs dropped in training.
        rel_pos_bias: Learn a bias for each head and relative position, ``rpb (H, 2 kernel_size - 1, ...)``, as the
            first Neighborhood Attention Transformers do; it takes the way through separate scores.

    Raises:
        ValueError: Widths and heads that do not divide, or windows, strides, dilations out of range.

    Conventions:
        Arguments, their order, and the state dict (``qkv``, ``proj``, in NATTEN's older modules ``rpb``) are those of
        NATTEN, so that its checkpoints load.

    Source:
        Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143.

    Example:
        >>> NeighborhoodAttention1D(32, 4, kernel_size=5, is_causal=True)(torch.randn(2, 11, 32)).shape
        torch.Size([2, 11, 32])
    """

    axes = 1


class NeighborhoodAttention2D(_Neighborhood):
    """Attention of each token of an image ``(B, X, Y, C)`` to its nearest tokens.

    Arguments are those of :class:`NeighborhoodAttention1D`.

    Example:
        >>> layer = NeighborhoodAttention2D(32, 4, kernel_size=(3, 5), dilation=(2, 1))
        >>> layer(torch.randn(2, 6, 7, 32)).shape
        torch.Size([2, 6, 7, 32])
    """

    axes = 2


class NeighborhoodAttention3D(_Neighborhood):
    """Attention of each token of a video ``(B, X, Y, Z, C)`` to its nearest tokens.

    Arguments are those of :class:`NeighborhoodAttention1D`.

    Example:
        >>> layer = NeighborhoodAttention3D(32, 4, kernel_size=(2, 3, 3), is_causal=(True, False, False))
        >>> layer(torch.randn(1, 4, 5, 6, 32)).shape
        torch.Size([1, 4, 5, 6, 32])
    """

    axes = 3
