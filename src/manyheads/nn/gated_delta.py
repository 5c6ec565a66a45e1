"""The layer of Gated DeltaNet: short convolutions, the gated delta rule, a gated norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism.linear.gated_delta import gated_delta, gates, step

from .inputs import check_token, check_tokens, split_heads
from .shortconv import ShortConv


class DeltaCache(NamedTuple):
    """What a Gated DeltaNet layer remembers.

    Attributes:
        memory: The state of the recurrence.
        convs: Last tokens before the convolutions of queries, keys and values; None without convolutions.
    """

    memory: State
    convs: tuple[Tensor, Tensor, Tensor] | None


class GatedDeltaNet(nn.Module):
    r"""Gated DeltaNet in place of attention.

    $$y = W_o\big(\mathrm{RMS}(o) \odot \mathrm{silu}(W_g x)\big)$$

    with $o$ the gated delta rule of :func:`manyheads.mechanism.linear.gated_delta.gated_delta` on convolved
    projections, decay $-e^{A} \mathrm{softplus}(W_a x + \delta)$ and overwritten share $\sigma(W_b x)$.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Number of heads.
        head_dim: Width of queries and keys of a head; 3/4 of ``C / num_heads`` by default, with which the layer has
            about 6 C^2 parameters.
        expand_v: Width of values by that of keys.
        conv: Tokens of the short convolutions; 0 for none.
        gate: Whether the output is gated.
        negative: Whether the overwritten share goes up to 2, for negative eigenvalues.
        norm_eps: Epsilon of the norm.
        chunk: As in the mechanism.

    Raises:
        ValueError: For sizes that do not fit.

    Source:
        Yang et al., Gated Delta Networks, arXiv 2412.06464, section 3.4; negative eigenvalues after Grazzi et al.,
        arXiv 2411.12537.

    Example:
        >>> layer = GatedDeltaNet(32, 2)
        >>> x = torch.randn(1, 9, 32)
        >>> y = layer(x)
        >>> first, cache = layer.step(x[:, 0])
        >>> y.shape, torch.allclose(first, y[:, 0], atol=1e-5)
        (torch.Size([1, 9, 32]), True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        conv: int = 4,
        gate: bool = True,
        negative: bool = False,
        norm_eps: float = 1e-5,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1:
            raise ValueError(f"num_heads: expected at least 1 head and 1 channel, got {num_heads} and {embed_dim}")
        head_dim = 3 * embed_dim // (4 * num_heads) if head_dim is None else head_dim
        value_dim = head_dim * expand_v
        if head_dim < 1 or value_dim < 1 or value_dim != int(value_dim):
            raise ValueError(f"expand_v: gives values of width {value_dim} for head_dim={head_dim}")
        if conv < 0:
            raise ValueError(f"conv: expected a number of tokens or 0 for none, got {conv}")
        self.embed_dim, self.num_heads, self.head_dim, self.value_dim = embed_dim, num_heads, head_dim, int(value_dim)
        self.negative, self.norm_eps, self.chunk = negative, norm_eps, chunk
        keys, values = num_heads * head_dim, num_heads * self.value_dim
        self.q_proj = nn.Linear(embed_dim, keys, bias=False)
        self.k_proj = nn.Linear(embed_dim, keys, bias=False)
        self.v_proj = nn.Linear(embed_dim, values, bias=False)
        self.a_proj = nn.Linear(embed_dim, num_heads, bias=False)
        self.b_proj = nn.Linear(embed_dim, num_heads, bias=False)
        self.g_proj = nn.Linear(embed_dim, values, bias=False) if gate else None
        self.o_proj = nn.Linear(values, embed_dim, bias=False)
        self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.decay_bias = nn.Parameter(torch.empty(num_heads))
        self.convs = nn.ModuleList(ShortConv(w, conv) for w in (keys, keys, values)) if conv else None
        self.norm_weight = nn.Parameter(torch.ones(self.value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates uniform in (0, 16), decay biases so that time steps lie between 0.001 and 0.1, as in Mamba-2."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        draw_decay(self.log_rate, self.decay_bias)
        nn.init.ones_(self.norm_weight)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | str | None = None,
        cache: DeltaCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, DeltaCache]:
        """Mixes tokens.

        Args:
            x: (B, N, C).
            mask: None or causal, or packed documents.
            cache: What came before.
            return_cache: Also return what came before the next token.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For another shape.
        """
        check_tokens(x, self.embed_dim)
        q, k, v, kept = self._inputs(x, mask, None if cache is None else cache.convs, return_cache)
        decay, beta = self._gates(x)
        memory = None if cache is None else cache.memory
        o, memory = gated_delta(
            q, k, v, decay=decay, beta=beta, mask=mask, state=memory, return_state=True, chunk=self.chunk
        )
        y = self._out(x, o.transpose(1, 2))
        assert memory is not None
        return (y, DeltaCache(memory, kept)) if return_cache else y

    def step(self, x: Tensor, cache: DeltaCache | None = None) -> tuple[Tensor, DeltaCache]:
        """One token after the other.

        Args:
            x: (B, C).
            cache: What came before.

        Returns:
            (B, C) and the new cache.

        Raises:
            ValueError: For another shape.
        """
        check_token(x, self.embed_dim)
        q, k, v, kept = self._inputs(x, None, None if cache is None else cache.convs, True)
        decay, beta = self._gates(x)
        o, memory = step(q, k, v, None if cache is None else cache.memory, decay=decay, beta=beta)
        return self._out(x, o), DeltaCache(memory, kept)

    def _inputs(
        self, x: Tensor, mask: Mask | str | None, before: tuple[Tensor, Tensor, Tensor] | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """Queries, keys and values by head, and what the convolutions remember."""
        projected = [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)]
        found, kept = convolved(self.convs, projected, before, mask, keep)
        q, k, v = (split_heads(t, self.num_heads) for t in found)
        return q, k, v, kept

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and overwritten share, ``(B, H, N)`` or ``(B, H)``."""
        a, b = (by_head(p(x)) for p in (self.a_proj, self.b_proj))
        decay, beta = gates(a, b, self.log_rate, self.decay_bias)
        return decay, 2 * beta if self.negative else beta

    def _out(self, x: Tensor, o: Tensor) -> Tensor:
        """The gated norm and the last projection; ``o`` is ``(B, [N,] H, Dv)``."""
        normed = F.rms_norm(o, (self.value_dim,), self.norm_weight.to(o.dtype), self.norm_eps).flatten(-2)
        return self.o_proj(normed if self.g_proj is None else normed * F.silu(self.g_proj(x)))


def by_head(x: Tensor) -> Tensor:
    """Numbers of heads, ``(B, N, H)`` to contiguous ``(B, H, N)``; ``(B, H)`` stays.

    Example:
        >>> by_head(torch.ones(2, 5, 3)).shape
        torch.Size([2, 3, 5])
    """
    return x.transpose(1, 2).contiguous() if x.dim() == 3 else x


def convolved(
    convs: nn.ModuleList | None,
    parts: list[Tensor],
    before: tuple[Tensor, Tensor, Tensor] | None,
    mask: Mask | str | None,
    keep: bool,
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor] | None]:
    """Queries, keys and values through their short convolutions, or through SiLU alone where there are none.

    Args:
        convs: Three :class:`ShortConv`, or None.
        parts: Three of ``(B, N, C)``, or of ``(B, C)`` for one token.
        before: What the convolutions remember; nothing by default.
        mask: None or causal, or packed documents.
        keep: Whether to return what they remember next.

    Returns:
        The three results, and the new memory or None.

    Example:
        >>> convolved(None, [torch.zeros(1, 2, 4)] * 3, None, None, True)[1] is None
        True
    """
    if convs is None:
        return [F.silu(t) for t in parts], None
    outs: list[Tensor] = []
    kept: list[Tensor] = []
    for conv, t, past in zip(convs, parts, before or (None,) * 3, strict=True):
        if t.dim() == 2:
            assert isinstance(conv, ShortConv)
            out, new = conv.step(t, past)
        elif keep:
            out, new = conv(t, mask=mask, cache=past, return_cache=True)
        else:
            out, new = conv(t, mask=mask, cache=past), t
        outs.append(out)
        kept.append(new)
    return outs, (kept[0], kept[1], kept[2]) if keep else None


def draw_decay(log_rate: Tensor, bias: Tensor) -> None:
    """Draws rates and time steps as Mamba-2 does: ``e^A`` uniform in (0, 16), ``softplus(bias)`` in (0.001, 0.1).

    Args:
        log_rate: (H,) A, written to.
        bias: (H,) written to.

    Example:
        >>> a, b = torch.empty(8), torch.empty(8)
        >>> draw_decay(a, b)
        >>> bool((a.exp() <= 16).all() and (F.softplus(b) < 0.11).all())
        True
    """
    with torch.no_grad():
        log_rate.uniform_(1e-3, 16).log_()
        steps = bias.uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
