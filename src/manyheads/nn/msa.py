"""The layer of MiniMax sparse attention: grouped heads, and an index that learns which blocks of keys they need."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from manyheads.common.rope import RoPE
from manyheads.mask import Mask, TileLayout
from manyheads.mechanism.select import with_loss
from manyheads.mechanism.sparse.msa import DEFAULT, MSAConfig, msa, selection, train_msa

from .cached import CachedAttention
from .inputs import check_tokens, join_heads, split_heads


class MSACache(NamedTuple):
    """Keys and values of earlier tokens, and what the index remembers of them.

    Attributes:
        k: (B, Hkv, n, D), normalised and rotated.
        v: (B, Hkv, n, D).
        index_k: (B, n, Di), likewise.
    """

    k: Tensor
    v: Tensor
    index_k: Tensor


class MSA(CachedAttention):
    """Grouped-query attention to the blocks of keys that a learned index finds best.

    Two projections are added to those of attention: an index query for each key head, and one index key. In training
    the index learns beside everything else: its divergence from attention adds its gradient in the backward pass, and
    reaches nothing but the two projections; the loss of the network does not reach them. Set ``warm`` for the first
    phase, in which attention sees all keys and the index learns from all of them; :func:`warm_up` does so in a network.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Query heads.
        kv_heads: Key and value heads; ``num_heads`` by default. The query heads of one attend to the same blocks.
        head_dim: Width of a head; ``embed_dim / num_heads`` by default.
        index_dim: Width of the index; that of a head by default.
        config: Sizes.
        qk_norm: Whether queries and keys, those of the index too, get an RMS norm per head.
        rope: Rotation of the same by position.
        loss_weight: Multiplies the gradient of the divergence; with an optimiser that normalises gradients it hardly
            matters.
        order: Loop order, see :func:`manyheads.engine.tiled.tiled`.

    Attributes:
        warm: Whether attention is dense for now.
        index_loss: The divergence in the last training step, a scalar without gradient; None before.

    Raises:
        ValueError: Widths or heads that do not divide.

    Conventions:
        A gradient scaler that multiplies the loss does not multiply the gradient of the index.

    Source:
        Lai et al., MiniMax Sparse Attention, arXiv 2606.13392.

    Example:
        >>> layer = MSA(32, 4, kv_heads=2, config=MSAConfig(block=8, keep=2))
        >>> x = torch.randn(2, 40, 32)
        >>> layer(x).square().mean().backward()
        >>> layer.index_loss > 0, layer.index_q_proj.weight.grad.norm() > 0, layer.chosen(x).shape
        (tensor(True), tensor(True), torch.Size([2, 2, 40, 2]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        index_dim: int | None = None,
        config: MSAConfig = DEFAULT,
        qk_norm: bool = False,
        rope: RoPE | None = None,
        loss_weight: float = 1.0,
        order: str = "auto",
    ) -> None:
        super().__init__(embed_dim, num_heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, rope=rope)
        self.index_dim = self.head_dim if index_dim is None else index_dim
        if self.index_dim < 1:
            raise ValueError(f"index_dim: expected at least 1, got {index_dim}")
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight: expected a number >= 0, got {loss_weight}")
        self.config, self.loss_weight, self.order, self.warm = config, loss_weight, order, False
        self.index_q_proj = nn.Linear(embed_dim, self.kv_heads * self.index_dim, bias=False)
        self.index_k_proj = nn.Linear(embed_dim, self.index_dim, bias=False)
        for name in ("index_q", "index_k"):
            self.add_module(f"{name}_norm", nn.RMSNorm(self.index_dim) if qk_norm else nn.Identity())
        self.index_loss: Tensor | None = None

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.config.block

    @property
    def keep(self) -> int:
        """Blocks that a query attends to."""
        return self.config.keep

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        mask: Mask | str | None = None,
        cache: MSACache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, MSACache]:
        """Mixes tokens; in training the index learns.

        Args:
            x: (B, N, C).
            mask: None or causal, or packed documents.
            cache: What came before; the tokens of ``x`` are the last. The index does not learn then.
            return_cache: Also return what comes before the next token.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For another shape.
            UnsupportedError: For another mask, or a cache with packed documents.
        """
        q, k, v, index_q, index_k = self._inputs(x, cache)
        learns = self.training and torch.is_grad_enabled() and cache is None
        if learns or self.warm:
            out, loss = train_msa(
                q, k, v, index_q=index_q, index_k=index_k, config=self.config, mask=mask, warm=self.warm,
                order=self.order,
            )  # fmt: skip
            if learns:
                out = with_loss(out, loss * self.loss_weight)
                self.index_loss = loss.detach()
        else:
            found = msa(q, k, v, index_q=index_q, index_k=index_k, config=self.config, mask=mask, order=self.order)
            assert isinstance(found, Tensor)
            out = found
        y = self.o_proj(join_heads(out))
        return (y, MSACache(k, v, index_k)) if return_cache else y

    @torch.no_grad()
    def chosen(self, x: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """What each query attends to, or would if the layer is warming up.

        Args:
            x: (B, N, C).
            mask: As for :meth:`forward`.

        Returns:
            int32 (B, Hkv, N, keep) blocks, -1 for none; with packed documents (B, Hkv, N, keep * block) tokens.
        """
        q, k, v, index_q, index_k = self._inputs(x, None)
        found = selection(q, k, v, index_q=index_q, index_k=index_k, config=self.config, mask=mask)
        return found.ids if isinstance(found, TileLayout) and found.ids is not None else found  # type: ignore[return-value]

    def _inputs(self, x: Tensor, cache: MSACache | None) -> tuple[Tensor, ...]:
        """Queries, keys and values, and those of the index, which learn from an input without gradient."""
        check_tokens(x, self.embed_dim)
        seen = 0 if cache is None else cache.k.shape[2]
        at = torch.arange(seen, seen + x.shape[1], device=x.device)
        q, k = self._heads("q", x, self.num_heads, at), self._heads("k", x, self.kv_heads, at)
        v, fixed = split_heads(self.v_proj(x), self.kv_heads), x.detach()
        index_q = self._heads("index_q", fixed, self.kv_heads, at)
        index_k = self._heads("index_k", fixed, 1, at)[:, 0]
        if cache is not None:
            k, v = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2)
            index_k = torch.cat([cache.index_k, index_k], 1)
        return q, k, v, index_q, index_k

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{super().extra_repr()}, index_dim={self.index_dim}, {self.config}"


def index_loss(network: nn.Module) -> Tensor:
    """The divergences of all indices of a network in its last training step, summed; for a log.

    Args:
        network: Any module with :class:`MSA` layers in it.

    Returns:
        A scalar without gradient: the layers add their own in the backward pass.

    Raises:
        ValueError: When no layer has taken a training step.

    Example:
        >>> layers = nn.Sequential(MSA(8, 2), MSA(8, 2))
        >>> _ = layers(torch.randn(1, 5, 8))
        >>> index_loss(layers).shape
        torch.Size([])
    """
    found = [m.index_loss for m in network.modules() if isinstance(m, MSA) and m.index_loss is not None]
    if not found:
        raise ValueError("network: expected MSA layers that took a training step, got none")
    return torch.stack(found).sum()


def warm_up(network: nn.Module, warm: bool = True) -> int:
    """Begins or ends the phase of dense attention in all :class:`MSA` layers of a network.

    Args:
        network: Any module.
        warm: Whether attention is to see all keys.

    Returns:
        How many layers there are.

    Example:
        >>> layer = MSA(8, 2)
        >>> warm_up(layer), layer.warm, warm_up(layer, False), layer.warm
        (1, True, 1, False)
    """
    layers = [m for m in network.modules() if isinstance(m, MSA)]
    for layer in layers:
        layer.warm = warm
    return len(layers)
