"""What attention layers with projections of their own share: heads, norms, rotation, a cache of keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.common.rope import RoPE
from manyheads.mask import Causal, Mask, Window, as_mask

from .inputs import check_token, check_tokens, join_heads, split_heads


class LayerCache(NamedTuple):
    """Keys and values of earlier tokens, as a layer keeps them.

    Attributes:
        k: (B, Hkv, n, D), normalised and rotated.
        v: (B, Hkv, n, D).
        seen: Tokens so far; more than n where a window lets go of some.
    """

    k: Tensor
    v: Tensor
    seen: int


class CachedAttention(nn.Module):
    """Projects tokens, calls a core on heads, and keeps keys and values for the tokens that follow.

    A subclass names in ``QUERIES`` what it projects beside keys and values, ``q`` first, and writes ``core``.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Query heads.
        kv_heads: Key and value heads; ``num_heads`` by default.
        head_dim: Width of a head; ``embed_dim / num_heads`` by default.
        bias: Whether projections to heads have biases; the one back never has.
        qk_norm: Whether queries and keys, and what else the core multiplies with keys, get an RMS norm per head.
        rope: Rotation of the same by position.
        window: Keys that a query sees, itself included; all by default.

    Raises:
        ValueError: Widths, heads or windows that make no sense.
    """

    QUERIES: tuple[str, ...] = ("q",)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rope: RoPE | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        if num_heads < 1 or embed_dim < 1 or (head_dim is None and embed_dim % num_heads):
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of num_heads={num_heads}, got {kv_heads}")
        width = embed_dim // num_heads if head_dim is None else head_dim
        if width < 1:
            raise ValueError(f"head_dim: expected at least 1, got {head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1 key, got {window}")
        self.embed_dim, self.num_heads, self.kv_heads, self.head_dim = embed_dim, num_heads, kv_heads, width
        self.rope, self.window = rope, window
        for name in self.QUERIES:
            self.add_module(f"{name}_proj", nn.Linear(embed_dim, num_heads * width, bias=bias))
        self.k_proj = nn.Linear(embed_dim, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(num_heads * width, embed_dim, bias=False)
        for name in (*self.QUERIES, "k"):
            self.add_module(f"{name}_norm", nn.RMSNorm(width) if qk_norm else nn.Identity())

    def core(self, queries: dict[str, Tensor], k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        """Attention itself.

        Args:
            queries: What ``QUERIES`` names, each (B, H, Nq, D).
            k: (B, Hkv, Nk, D).
            v: (B, Hkv, Nk, D).
            asked: ``mask`` and perhaps ``key_padding``.

        Returns:
            (B, H, Nq, D).
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | str | Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: LayerCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, LayerCache]:
        """Mixes tokens.

        Args:
            x: (B, N, C).
            mask: What sees what; causal by default. The window of the layer comes on top. Packed documents are
                ``Document(lengths) & Causal()``.
            key_padding: bool (B, N), True for real tokens, such as those behind padding on the left.
            cache: What came before; the tokens of ``x`` are the last.
            return_cache: Also return what comes before the next token.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For another shape, or padding beside a cache.
            TypeError: For what is not floating.
        """
        check_tokens(x, self.embed_dim)
        if key_padding is not None and (cache is not None or return_cache):
            raise ValueError("key_padding: has no meaning beside a cache, which holds real tokens only")
        seen = 0 if cache is None else cache.seen
        at = torch.arange(seen, seen + x.shape[1], device=x.device)
        queries = {name: self._heads(name, x, self.num_heads, at) for name in self.QUERIES}
        k, v = self._heads("k", x, self.kv_heads, at), split_heads(self.v_proj(x), self.kv_heads)
        if cache is not None:
            k, v = torch.cat([cache.k, k], dim=2), torch.cat([cache.v, v], dim=2)
        whole = Causal() if mask is None else as_mask(mask)
        asked: dict[str, Any] = {"mask": whole if self.window is None else whole & Window(self.window)}
        if key_padding is not None:
            asked["key_padding"] = key_padding
        y = self.o_proj(join_heads(self.core(queries, k, v, **asked)))
        if not return_cache:
            return y
        if self.window is not None:
            first = max(0, k.shape[2] - self.window + 1)
            k, v = k[:, :, first:], v[:, :, first:]
        return y, LayerCache(k, v, seen + x.shape[1])

    def step(self, x: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, LayerCache]:
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
        y, cache = self.forward(x[:, None], cache=cache, return_cache=True)
        return y[:, 0], cache

    def _heads(self, name: str, x: Tensor, heads: int, at: Tensor) -> Tensor:
        """Projected, normalised, rotated: (B, H, N, D)."""
        got = self.get_submodule(f"{name}_norm")(split_heads(self.get_submodule(f"{name}_proj")(x), heads))
        return got if self.rope is None else self.rope(got, at)

    def extra_repr(self) -> str:
        """Sizes, and whatever differs from the plain layer."""
        parts = [f"{self.embed_dim}, {self.num_heads}"]
        if self.kv_heads != self.num_heads:
            parts.append(f"kv_heads={self.kv_heads}")
        parts += [f"{name}={value}" for name in ("rope", "window") if (value := getattr(self, name)) is not None]
        return ", ".join(parts)
