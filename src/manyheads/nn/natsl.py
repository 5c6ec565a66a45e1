"""The layer of NAtS-L: it learns which chunks to keep for attention and which to fold into a memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.common.errors import unknown
from manyheads.mask import Mask
from manyheads.mechanism.carrier import order
from manyheads.mechanism.linear.branches import (
    Branches,
    NATSConfig,
    NATSState,
    branches,
    branches_step,
    split_channels,
)
from manyheads.mechanism.linear.chunks import cut
from manyheads.mechanism.linear.gated_delta import unit_length
from manyheads.mechanism.linear.natsl import SPEC, choose, gated_norm

from .gated_delta import GatedDeltaNet, by_head
from .inputs import check_token, check_tokens, join_heads

MEMORIES = ("gated-delta", "delta", "gated")
"""Gated DeltaNet; DeltaNet, which never fades; an additive memory that fades, as in Mamba-2."""

_CONFIG = NATSConfig(split=2)


class NATSCache(NamedTuple):
    """What a NAtS-L layer remembers.

    Attributes:
        state: Memory, keys and values.
        convs: Last tokens before the convolutions of queries, keys and values; None without convolutions.
        total: (B, C) sum of the inputs of the current chunk, in float32 (float64 for float64).
    """

    state: NATSState
    convs: tuple[Tensor, Tensor, Tensor] | None
    total: Tensor


class NATSL(GatedDeltaNet):
    r"""Gated DeltaNet and softmax attention in one layer, with the same queries, keys and values.

    The type of a chunk, for every head, is the larger of two scores $W_t\, \mathrm{mean}(x)$ over its tokens. Weights
    of the two branches, for every attention head, are $\mathrm{softmax}(W_m q)$. See
    :func:`manyheads.mechanism.linear.natsl.natsl` for what the branches compute.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Heads of the memory.
        head_dim: Width of their queries and keys; 3/4 of ``C / num_heads`` by default, about 6 C^2 parameters.
        expand_v: Width of values by that of keys.
        config: Chunks, attention heads made of one head (2 or 3 as published), what learns.
        type_heads: Heads with types of their own, a divisor of ``num_heads``; all by default.
        memory: ``"gated-delta"``, ``"delta"`` or ``"gated"``.
        gumbel: Whether types are drawn in training instead of taken.
        conv: Tokens of the short convolutions; 0 for none.
        gate: Whether the output is gated.
        negative: Whether the overwritten share goes up to 2.
        norm_eps: Epsilon of the norms.

    Raises:
        ValueError: For sizes that do not fit, or an unknown memory.

    Conventions:
        No positions are encoded: the memory and the convolutions know the order.

    Source:
        Deng et al., Neural Attention Search Linear, arXiv 2602.03681, section 3.

    Example:
        >>> layer = NATSL(32, 2, config=NATSConfig(chunk=4, split=2))
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
        config: NATSConfig = _CONFIG,
        type_heads: int | None = None,
        memory: str = "gated-delta",
        gumbel: bool = False,
        conv: int = 4,
        gate: bool = True,
        negative: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, head_dim=head_dim, expand_v=expand_v, conv=conv, gate=gate, negative=negative,
            norm_eps=norm_eps, chunk=config.chunk,
        )  # fmt: skip
        if memory not in MEMORIES:
            raise unknown("memory of NATSL", str(memory), MEMORIES)
        self.config, self.kind, self.gumbel = config, memory, gumbel
        self.type_heads = num_heads if type_heads is None else type_heads
        if self.type_heads < 1 or num_heads % self.type_heads:
            raise ValueError(f"type_heads: expected a divisor of num_heads={num_heads}, got {type_heads}")
        for name, width in (("head_dim", self.head_dim), ("expand_v", self.value_dim)):
            if width % config.split:
                raise ValueError(f"{name}: gives a width of {width}, no multiple of config.split = {config.split}")
        self.attn_heads = num_heads * config.split
        if memory == "delta":
            self.register_module("a_proj", None)
            self.register_parameter("log_rate", None)
            self.register_parameter("decay_bias", None)
        elif memory == "gated":
            self.register_module("b_proj", None)
        self.types = nn.Linear(embed_dim, 2 * self.type_heads, bias=False)
        self.mix = nn.Linear(num_heads * self.head_dim, 2 * self.attn_heads, bias=False)
        self.qk_weight = nn.Parameter(torch.ones(2, self.head_dim // config.split))
        self.norm_weight = nn.Parameter(torch.ones(2, self.value_dim // config.split))
        for module in (self.types, self.mix):
            nn.init.normal_(module.weight, std=0.02)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        mask: Mask | str | None = None,
        cache: NATSCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, NATSCache]:
        """Mixes tokens.

        Args:
            x: (B, N, C).
            mask: None or causal, or packed documents.
            cache: What came before.
            return_cache: Also return what came before the next token; not for packed documents.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For another shape.
            UnsupportedError: For another mask, or a cache with packed documents.
        """
        check_tokens(x, self.embed_dim)
        _, lens = order(SPEC, mask, x[:, None])
        q, k, v, convs = self._inputs(x, mask, None if cache is None else cache.convs, return_cache)
        attend, total = self._types(x, lens, cache)
        decay, beta, scaled = self._memory_gates(x, v)
        found, state = branches(
            self._memory_inputs(q, k, scaled),
            self._attention_inputs(q, k, v),
            decay=decay,
            beta=beta,
            attend=attend,
            config=self.config,
            lens=lens,
            state=None if cache is None else cache.state,
        )
        y = self._mixed(x, q, found)
        return (y, NATSCache(state, convs, total)) if return_cache else y

    def step(self, x: Tensor, cache: NATSCache | None = None) -> tuple[Tensor, NATSCache]:  # type: ignore[override]
        """One token after the other; the type of a chunk is decided by its last token.

        Args:
            x: (B, C).
            cache: What came before.

        Returns:
            (B, C) and the new cache.

        Raises:
            ValueError: For another shape.
        """
        check_token(x, self.embed_dim)
        one = x[:, None]
        q, k, v, convs = self._inputs(one, None, None if cache is None else cache.convs, True)
        attend, total = self._types(one, None, cache)
        decay, beta, scaled = self._memory_gates(one, v)
        both = self._memory_inputs(q, k, scaled), self._attention_inputs(q, k, v)
        first, second = ((a[:, :, 0], b[:, :, 0], c[:, :, 0]) for a, b, c in both)
        found, state = branches_step(
            first,
            second,
            None if cache is None else cache.state,
            decay=None if decay is None else decay[:, :, 0],
            beta=None if beta is None else beta[:, :, 0],
            attend=attend[:, :, 0],
            config=self.config,
        )
        y = self._mixed(one, q, Branches(*(t[:, :, None] for t in found)))
        return y[:, 0], NATSCache(state, convs, total)

    def _types(self, x: Tensor, lens: Tensor | None, cache: NATSCache | None) -> tuple[Tensor, Tensor]:
        """The type of every token's chunk, (B, types, N), and the sum of the inputs of the last chunk begun."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if not x.shape[1]:
            total = x.new_zeros(x.shape[0], x.shape[2], dtype=wide) if cache is None else cache.total
            return x.new_zeros(x.shape[0], self.type_heads, 0), total
        begun = 0 if cache is None else cache.state.attention.k.shape[2]
        size = self.config.chunk
        chunks = cut(x.shape[1], size, lens, offset=begun, device=x.device)
        sums = chunks.split(x.to(wide)[:, None]).sum(3)[:, 0]
        if cache is not None:
            sums = torch.cat([sums[:, :1] + cache.total[:, None], sums[:, 1:]], 1)
        logits = self.types((sums / size).to(x.dtype)).unflatten(-1, (self.type_heads, 2))
        attend = choose(logits.to(sums.dtype), gumbel=self.gumbel and self.training).transpose(1, 2)
        last = sums[:, -1] if (begun + x.shape[1]) % size else torch.zeros_like(sums[:, -1])
        return chunks.join(attend[..., None].expand(-1, -1, -1, size)), last

    def _memory_gates(self, x: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Decay and overwritten share (B, H, N), either None, and the values that are written."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.kind == "delta":
            beta = torch.sigmoid(by_head(self.b_proj(x)).to(wide))
            return None, 2 * beta if self.negative else beta, v
        if self.kind == "gated":
            steps = F.softplus(by_head(self.a_proj(x)).to(wide) + self.decay_bias.to(wide)[:, None])
            decay = -self.log_rate.to(wide).exp()[:, None] * steps
            return decay, None, (v * steps[..., None]).to(v.dtype)
        return *self._gates(x), v

    def _memory_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind != "gated":
            q, k = unit_length(q), unit_length(k)
        return q * self.head_dim**-0.5, k, v

    def _attention_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_channels(t, self.config.split) for t in (q, k, v))
        weights = self.qk_weight.to(q.dtype)
        q, k = (F.rms_norm(t, w.shape, w, self.norm_eps) for t, w in zip((q, k), weights, strict=True))
        return q, k, v

    def _mixed(self, x: Tensor, q: Tensor, found: Branches) -> Tensor:
        """Both branches normalised, weighted and gated, through the last projection."""
        mix = self.mix(join_heads(q)).unflatten(-1, (self.attn_heads, 2)).softmax(-1).transpose(1, 2)
        gate = None
        if self.g_proj is not None:
            gate = self.g_proj(x).unflatten(-1, (self.attn_heads, -1)).transpose(1, 2)
        out = gated_norm(
            split_channels(found.memory, self.config.split),
            found.attention,
            weights=(self.norm_weight[0], self.norm_weight[1]),
            mix=mix,
            gate=gate,
            eps=self.norm_eps,
        )
        return self.o_proj(join_heads(out))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.embed_dim}, {self.num_heads}, memory={self.kind!r}, {self.config}"
