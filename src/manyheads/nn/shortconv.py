"""A short causal convolution of every channel: lets a token's keys and values know the few tokens before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.common.errors import UnsupportedError, unknown
from manyheads.common.scopes import refuse_inside
from manyheads.mask import Mask
from manyheads.mechanism.linear.gated_delta import SPEC

from .inputs import check_token, check_tokens, document_starts

ACTIVATIONS = {"silu": F.silu, "none": None}
"""What may follow the convolution."""


class ShortConv(nn.Module):
    r"""Causal depthwise convolution: $y_t = \phi(\sum_{s < w} W_s \odot x_{t-s} + b)$.

    Args:
        width: Channels C.
        kernel: Tokens w that an output sees, itself included.
        activation: ``"silu"`` or ``"none"``.
        bias: Whether there is a bias.

    Raises:
        ValueError: For an unknown activation, or a kernel without tokens.

    Conventions:
        The weight is ``(C, w)``, the newest token last, as in the usual CUDA kernels for this operation.

    Source:
        Fu et al., Hungry Hungry Hippos, arXiv 2212.14052, whose shift it generalises; Yang et al., Gated Delta
        Networks, arXiv 2412.06464, section 3.4.

    Example:
        >>> conv = ShortConv(3, kernel=2, activation="none")
        >>> _ = torch.nn.init.constant_(conv.weight, 1.0)
        >>> conv(torch.arange(4.0).view(1, 4, 1).expand(-1, -1, 3))[0, :, 0].tolist()
        [0.0, 1.0, 3.0, 5.0]
    """

    def __init__(self, width: int, kernel: int = 4, *, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation of ShortConv", str(activation), ACTIVATIONS)
        if width < 1 or kernel < 1:
            raise ValueError(f"kernel: expected at least 1 token and 1 channel, got {kernel} and {width}")
        self.width, self.kernel, self.activation = width, kernel, activation
        self.weight = nn.Parameter(torch.empty(width, kernel))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws as torch's convolutions do: uniform within one over the root of the kernel."""
        bound = self.kernel**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, *, mask: Mask | str | None = None, cache: Tensor | None = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolves tokens.

        Args:
            x: (B, N, C).
            mask: None or causal, or packed documents (``Document(lens) & Causal()``), whose tokens do not meet.
            cache: The ``w - 1`` tokens before, (B, w - 1, C); zeros by default.
            return_cache: Also return the cache for what comes next.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For other shapes.
            UnsupportedError: For another mask, a cache with documents, or inside a parallel context.
        """
        refuse_inside("ShortConv")
        check_tokens(x, self.width)
        starts = document_starts(SPEC, mask, x)
        if starts is not None and (cache is not None or return_cache):
            raise UnsupportedError("ShortConv: a cache with packed documents; convolve the documents one by one")
        before = self._cache(cache, x)
        padded = torch.cat([before, x], 1)
        if not x.shape[1]:
            out = x
        elif starts is None:
            out = F.conv1d(padded.mT, self.weight[:, None], self.bias, groups=self.width).mT
        else:
            out = self._packed(padded, starts)
        out = self._active(out)
        return (out, padded[:, x.shape[1] :]) if return_cache else out

    def step(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token.

        Args:
            x: (B, C).
            cache: The tokens before, (B, w - 1, C); zeros by default.

        Returns:
            (B, C) and the new cache.

        Raises:
            ValueError: For other shapes.
        """
        check_token(x, self.width)
        window = torch.cat([self._cache(cache, x), x[:, None]], 1)
        out = (window * self.weight.mT).sum(1)
        return self._active(out if self.bias is None else out + self.bias), window[:, 1:]

    def _packed(self, padded: Tensor, starts: Tensor) -> Tensor:
        """The sum over shifts, without tokens from before a document's start."""
        batch, tokens = padded.shape[0], starts.shape[-1]
        place = torch.arange(tokens, device=starts.device).expand_as(starts)
        since = place - torch.where(starts, place, 0).cummax(-1).values  # tokens before this one in its document
        out = padded.new_zeros(batch, tokens, self.width)
        for back in range(self.kernel):
            first = self.kernel - 1 - back
            seen = (since >= back)[..., None]
            out = out + torch.where(seen, padded[:, first : first + tokens], 0.0) * self.weight[:, first]
        return out if self.bias is None else out + self.bias

    def _cache(self, cache: Tensor | None, x: Tensor) -> Tensor:
        shape = (x.shape[0], self.kernel - 1, self.width)
        if cache is None:
            return x.new_zeros(shape)
        if not isinstance(cache, Tensor) or tuple(cache.shape) != shape:
            got = tuple(cache.shape) if isinstance(cache, Tensor) else type(cache).__name__
            raise ValueError(f"cache: expected the last tokens (B, kernel - 1, C) = {shape}, got {got}")
        return cache.to(x.dtype)

    def _active(self, out: Tensor) -> Tensor:
        function = ACTIVATIONS[self.activation]
        return out if function is None else function(out)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.width}, kernel={self.kernel}, activation={self.activation!r}, bias={self.bias is not None}"
