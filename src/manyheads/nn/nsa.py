"""The layer of native sparse attention: projections, learned compression of windows, and a gate for each branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.mask import Mask, TileLayout
from manyheads.mechanism.sparse.nsa import DEFAULT, Compression, NSAConfig, nsa, selection

from .cached import CachedAttention, LayerCache
from .inputs import check_tokens, join_heads, split_heads


class NSA(CachedAttention):
    r"""Compressed windows, selected blocks and the latest keys, each with a gate that all heads share.

    $$y = W_o \sum_i \sigma(W_g x)_i\, o_i$$

    See :func:`manyheads.mechanism.sparse.nsa` for the branches. Every window of keys, with a learned vector added for
    each of its places, goes through a learned map of all its channels; every window of values through another.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Query heads.
        kv_heads: Key and value heads; ``num_heads`` by default. The query heads of one select the same blocks.
        head_dim: Width of a head; ``embed_dim / num_heads`` by default.
        config: Sizes, and the rotation, which acts after compression.
        order: Loop order of the selected branch, see :func:`manyheads.engine.tiled.tiled`.

    Raises:
        ValueError: Widths or heads that do not divide.

    Conventions:
        Compression starts as the average of a window. A step compresses all windows of the cache anew.

    Source:
        Yuan et al., Native Sparse Attention, arXiv 2502.11089; sizes and projections as released with Yan et al., Flash
        Sparse Attention, arXiv 2508.18224.

    Example:
        >>> layer = NSA(32, 4, kv_heads=2, config=NSAConfig(kernel=8, stride=4, block=8, keep=3, window=8))
        >>> x = torch.randn(2, 40, 32)
        >>> layer(x).shape, layer.chosen(x).shape
        (torch.Size([2, 40, 32]), torch.Size([2, 2, 40, 3]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        config: NSAConfig = DEFAULT,
        order: str = "auto",
    ) -> None:
        super().__init__(embed_dim, num_heads, kv_heads=kv_heads, head_dim=head_dim)
        self.config, self.order = config, order
        size = self.kv_heads, config.kernel * self.head_dim, self.head_dim
        self.compress_key = nn.Parameter(torch.empty(size))
        self.compress_value = nn.Parameter(torch.empty(size))
        self.place = nn.Parameter(torch.empty(self.kv_heads, config.kernel, self.head_dim))
        self.gate_proj = nn.Linear(embed_dim, 3, bias=False)
        self.reset_compression()

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.config.block

    @property
    def keep(self) -> int:
        """Blocks that a query selects."""
        return self.config.keep

    def reset_compression(self) -> None:
        """Makes compression the average of a window, and draws what is added to its places."""
        nn.init.normal_(self.place, std=0.02)
        with torch.no_grad():
            for weight in (self.compress_key, self.compress_value):
                same = torch.eye(self.head_dim, dtype=weight.dtype, device=weight.device) / self.config.kernel
                weight.copy_(same.repeat(self.config.kernel, 1))

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        mask: Mask | str | None = None,
        cache: LayerCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, LayerCache]:
        """Mixes tokens.

        Args:
            x: (B, N, C).
            mask: None or causal, or packed documents.
            cache: What came before; the tokens of ``x`` are the last.
            return_cache: Also return what comes before the next token.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For another shape.
            UnsupportedError: For another mask, or a cache with packed documents.
        """
        q, k, v = self._heads_of(x, cache)
        gates = torch.sigmoid(self.gate_proj(x)).unbind(-1)
        out = nsa(
            q,
            k,
            v,
            gate_compressed=gates[0][:, None],
            gate_selected=gates[1][:, None],
            gate_window=gates[2][:, None],
            compression=self.compression,
            config=self.config,
            mask=mask,
            order=self.order,
        )
        y = self.o_proj(join_heads(out))
        return (y, LayerCache(k, v, k.shape[2])) if return_cache else y

    @torch.no_grad()
    def chosen(self, x: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """What each query selects.

        Args:
            x: (B, N, C).
            mask: As for :meth:`forward`.

        Returns:
            int32 (B, Hkv, N, keep) blocks, -1 for none; with packed documents (B, Hkv, N, keep * block) tokens.
        """
        q, k, v = self._heads_of(x, None)
        found = selection(q, k, v, compression=self.compression, config=self.config, mask=mask)
        return found.ids if isinstance(found, TileLayout) and found.ids is not None else found  # type: ignore[return-value]

    @property
    def compression(self) -> Compression:
        """The weights of the windows."""
        return Compression(self.compress_key, self.compress_value, self.place)

    def _heads_of(self, x: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        check_tokens(x, self.embed_dim)
        at = torch.arange(x.shape[1], device=x.device)  # nothing is rotated yet
        q, k = self._heads("q", x, self.num_heads, at), self._heads("k", x, self.kv_heads, at)
        v = split_heads(self.v_proj(x), self.kv_heads)
        if cache is not None:
            k, v = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2)
        return q, k, v

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{super().extra_repr()}, {self.config}"
