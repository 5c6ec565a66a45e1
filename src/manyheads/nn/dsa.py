"""The layer of DeepSeek Sparse Attention: heads that read one latent per token, and an indexer that chooses tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manyheads.attention import attention
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.engine.gather import gather
from manyheads.engine.result import Attn
from manyheads.mask import Mask
from manyheads.mechanism import select
from manyheads.mechanism.carrier import order
from manyheads.mechanism.sparse.dsa import SPEC
from manyheads.mechanism.sparse.indexer import Flat, Index, PooledKeys, index_tokens
from manyheads.mechanism.sparse.indexer.method import Method

from .inputs import check_tokens, join_heads, split_heads


@dataclass(frozen=True)
class DSAConfig:
    """Sizes of :class:`DSA`; those of DeepSeek-V3.2 by default.

    Attributes:
        query_rank: Width of the latent that queries, and those of the indexer, are made of.
        latent_dim: Width of the latent that is key and value.
        nope_dim: Channels of a head that are not rotated.
        rope_dim: Channels of a head that are; and of the indexer.
        value_dim: Channels of a head's value.
        index_heads: Heads of the indexer.
        index_dim: Width of one, at least ``rope_dim``.
        keep: Tokens that a query reads.

    Raises:
        ValueError: Numbers out of range.
    """

    query_rank: int = 1536
    latent_dim: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    index_heads: int = 64
    index_dim: int = 128
    keep: int = 2048

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}: expected a positive integer, got {value!r}")
        if self.rope_dim % 2 or self.rope_dim > self.index_dim:
            raise ValueError(
                f"rope_dim: expected an even width of at most index_dim={self.index_dim}, got {self.rope_dim}"
            )


class DSACache(NamedTuple):
    """What is kept of earlier tokens.

    Attributes:
        latent: (B, 1, n, latent_dim + rope_dim): the latent, and the rotated channels that all heads share.
        pooled: Keys of the indexer with the means of their blocks; the next call adds to it.
    """

    latent: Tensor
    pooled: PooledKeys


class Indexer(nn.Module):
    """Queries, keys and head weights that score tokens.

    Args:
        embed_dim: Width C of the tokens.
        config: Sizes.
        base: Of the rotation.
    """

    def __init__(self, embed_dim: int, config: DSAConfig, base: float) -> None:
        super().__init__()
        self.heads = config.index_heads
        self.wq_b = nn.Linear(config.query_rank, config.index_heads * config.index_dim, bias=False)
        self.wk = nn.Linear(embed_dim, config.index_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.index_dim)
        self.weights_proj = nn.Linear(embed_dim, config.index_heads, bias=False)
        self.rope = RoPE(base, width=config.rope_dim)

    def forward(self, x: Tensor, latent: Tensor, positions: Tensor) -> Index:
        """What scores are made of.

        Args:
            x: (B, N, C).
            latent: (B, N, query_rank).
            positions: (N,).

        Returns:
            (B, Hi, N, Di), (B, N, Di), (B, Hi, N).
        """
        q = self.rope(split_heads(self.wq_b(latent), self.heads), positions)
        k = self.rope(self.k_norm(self.wk(x))[:, None], positions)[:, 0]
        return Index(q, k, self.weights_proj(x).transpose(1, 2) * self.heads**-0.5)


_DEFAULT = DSAConfig()
_FLAT = Flat()


class DSA(nn.Module):
    r"""Latent attention to the tokens that an indexer chooses, in place of an attention layer.

    $$c_s = \mathrm{norm}(W_{kv} x_s), \qquad o_{th} = W^{UV}_h \sum_{s \in S_t} \mathrm{softmax}_s\big(
    q^{N\top}_{th} W^{UK}_h c_s + q^{R\top}_{th} k^R_s\big)\, c_s$$

    Heads never meet keys of their own: their projections are applied to queries and results, so that each token is one
    latent vector and some rotated channels, for all heads. In training the indexer learns beside everything else: its
    divergence from attention adds its own gradient in the backward pass and reaches nothing but the indexer; the loss
    of the network does not reach it. Set ``warm`` for the first phase, in which attention is dense and the indexer
    learns from all tokens.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Heads H.
        config: Sizes.
        indexer: How tokens are chosen: :class:`~manyheads.mechanism.sparse.indexer.Flat` by default, or
            :class:`~manyheads.mechanism.sparse.HISA` or :class:`~manyheads.mechanism.sparse.MISA` of a trained model.
        rope_base: Base of the rotation.
        loss_weight: Multiplies the gradient of the divergence.

    Attributes:
        warm: Whether attention is dense for now.
        index_loss: The divergence in the last training step, a scalar without gradient; None before.

    Raises:
        ValueError: Widths or heads below 1.

    Conventions:
        Parameters carry the names of the released models. Their channels of attention turn in neighbouring pairs,
        those of the indexer in halves. The 8-bit scores and the Hadamard rotation before them are left out.

    Source:
        DeepSeek-AI, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention, 2025.

    Example:
        >>> sizes = DSAConfig(16, 12, 8, 4, 8, index_heads=2, index_dim=8, keep=5)
        >>> layer = DSA(32, 4, config=sizes)
        >>> x = torch.randn(2, 20, 32)
        >>> layer(x).square().mean().backward()
        >>> layer.index_loss > 0, layer.indexer.wk.weight.grad.norm() > 0, layer.chosen(x).shape
        (tensor(True), tensor(True), torch.Size([2, 1, 20, 5]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        config: DSAConfig = _DEFAULT,
        indexer: Method = _FLAT,
        rope_base: float = 10000.0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1:
            raise ValueError(f"embed_dim: expected positive widths and heads, got {embed_dim} and {num_heads}")
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight: expected a number >= 0, got {loss_weight}")
        indexer.call(config.keep)  # refuses sizes that do not fit
        self.embed_dim, self.num_heads, self.config, self.method = embed_dim, num_heads, config, indexer
        self.loss_weight, self.warm = loss_weight, False
        self.index_loss: Tensor | None = None
        self.scale = (config.nope_dim + config.rope_dim) ** -0.5
        self.rope = RoPE(rope_base, interleaved=True)
        self.q_a_proj = nn.Linear(embed_dim, config.query_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.query_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(config.query_rank, num_heads * (config.nope_dim + config.rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(embed_dim, config.latent_dim + config.rope_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.latent_dim, eps=1e-6)
        self.kv_b_proj = nn.Linear(config.latent_dim, num_heads * (config.nope_dim + config.value_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * config.value_dim, embed_dim, bias=False)
        self.indexer = Indexer(embed_dim, config, rope_base)

    @property
    def keep(self) -> int:
        """Tokens that a query reads."""
        return self.config.keep

    def forward(
        self, x: Tensor, *, mask: Mask | str | None = None, cache: DSACache | None = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, DSACache]:
        """Mixes tokens; in training the indexer learns.

        Args:
            x: (B, N, C).
            mask: None or causal, or packed documents.
            cache: What came before; the tokens of ``x`` are the last. The indexer does not learn then.
            return_cache: Also return what comes before the next token.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For another shape.
            UnsupportedError: For another mask, or a cache with packed documents.
        """
        check_tokens(x, self.embed_dim)
        _, lens = order(SPEC, mask, x[:, None])
        if cache is not None and lens is not None:
            raise UnsupportedError("cache: it holds one document in each entry, got a mask of packed documents")
        q, latent, index = self._inputs(x, cache)
        learns = self.training and torch.is_grad_enabled() and cache is None
        pooled = None if cache is None else cache.pooled
        if pooled is None and return_cache:
            pooled = PooledKeys(getattr(self.method, "block", 128)).append(index.k)
        found: Tensor | Attn
        ids, values = None, latent[..., : self.config.latent_dim]
        if self.warm:
            found = attention(q, latent, values, mask="causal" if mask is None else mask, scale=self.scale)
        else:
            kept = pooled if lens is None else None
            ids = index_tokens(index, keep=self.keep, method=self.method, lens=lens, pooled=kept)[:, None]
            found = gather(q, latent, values, ids, scale=self.scale)
        out = found if isinstance(found, Tensor) else found.out
        if learns:
            loss = select.index_loss(
                q, latent, index.q, index.k[:, None], ids, weights=index.w, scale=self.scale, lens=lens
            )  # fmt: skip
            out = select.with_loss(out, loss * self.loss_weight)
            self.index_loss = loss.detach()
        y = self._output(out)
        if not return_cache:
            return y
        assert pooled is not None
        return y, DSACache(latent, pooled)

    @torch.no_grad()
    def chosen(self, x: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """What each query reads, or would if the layer is warming up.

        Args:
            x: (B, N, C).
            mask: As for :meth:`forward`.

        Returns:
            int32 (B, 1, N, keep) tokens, -1 for none.
        """
        q, _, index = self._inputs(x, None)
        _, lens = order(SPEC, mask, q)
        return index_tokens(index, keep=self.keep, method=self.method, lens=lens)[:, None]

    def _inputs(self, x: Tensor, cache: DSACache | None) -> tuple[Tensor, Tensor, Index]:
        """Queries that meet latents, the latents, and what the indexer reads, learnt from inputs without gradient."""
        check_tokens(x, self.embed_dim)
        config, seen = self.config, 0 if cache is None else cache.latent.shape[2]
        at = torch.arange(seen, seen + x.shape[1], device=x.device)
        rank = self.q_a_layernorm(self.q_a_proj(x))
        q = split_heads(self.q_b_proj(rank), self.num_heads)
        fixed, turning = q.split([config.nope_dim, config.rope_dim], -1)
        to_latent = self._per_head()[:, : config.nope_dim]
        q = torch.cat([fixed @ to_latent, self.rope(turning, at)], -1)
        given, shared = self.kv_a_proj_with_mqa(x).split([config.latent_dim, config.rope_dim], -1)
        latent = torch.cat([self.kv_a_layernorm(given)[:, None], self.rope(shared[:, None], at)], -1)
        index = self.indexer(x.detach(), rank.detach(), at)
        if cache is not None:
            latent = torch.cat([cache.latent, latent], 2)
            index = index._replace(k=cache.pooled.append(index.k).keys)
        return q, latent, index

    def _output(self, out: Tensor) -> Tensor:
        """From averages of latents to tokens."""
        return self.o_proj(join_heads(out @ self._per_head()[:, self.config.nope_dim :].mT))

    def _per_head(self) -> Tensor:
        """What makes keys and values of a latent, (H, nope_dim + value_dim, latent_dim)."""
        return self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.embed_dim}, {self.num_heads}, {self.config}, indexer={self.method}"
