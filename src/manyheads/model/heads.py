"""Mixers made of projections around a core: exact attention keeps keys and values, the others a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import attention
from manyheads.engine.scan import State
from manyheads.engine.tiled.bias import ALiBi
from manyheads.mask import Mask
from manyheads.mechanism.linear.lightning import lightning_attention
from manyheads.mechanism.linear.lightning import step as lightning_step
from manyheads.nn.cached import CachedAttention


class Softmax(CachedAttention):
    """Exact attention over all tokens or a window, with rotated or sloped positions.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Query heads.
        slopes: A penalty on distance for each head, ``(H,)``.
        **options: As :class:`~manyheads.nn.cached.CachedAttention`.

    Example:
        >>> import torch
        >>> Softmax(8, 2, window=3)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    slopes: Tensor | None

    def __init__(self, embed_dim: int, num_heads: int, *, slopes: Tensor | None = None, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.register_buffer("slopes", slopes, persistent=False)

    def core(self, queries: dict[str, Tensor], k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        """:func:`~manyheads.attention` on heads."""
        if self.slopes is not None:
            asked["bias"] = ALiBi(self.slopes)
        return _tensor(attention(queries["q"], k, v, **asked))


class StateMixer(nn.Module):
    """Projections around a mechanism with a state; what comes next needs a memory of fixed size only.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Query heads.
        core: All tokens: ``core(q (B, H, N, D), k, v, *, mask) -> (B, H, N, D)``. A module is trained with the rest.
        advance: One token: ``advance(q (B, H, D), k, v, state) -> (out (B, H, D), state)``.
        kv_heads: Key heads; ``num_heads`` by default.
        norm: Whether the output of every head is scaled to root mean square 1, in place of a denominator.

    Example:
        >>> import torch
        >>> from manyheads.mechanism.linear.kernelized import linear_attention, step
        >>> layer, x = StateMixer(8, 2, linear_attention, step), torch.randn(1, 5, 8)
        >>> first, state = layer.step(x[:, 0])
        >>> torch.allclose(layer(x)[:, 0], first, atol=1e-5)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        core: Callable[..., Any],
        advance: Callable[..., tuple[Tensor, Any]],
        *,
        kv_heads: int | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads = num_heads, num_heads if kv_heads is None else kv_heads
        self.width, self.norm = embed_dim // num_heads, norm
        self.in_proj = nn.Linear(embed_dim, self.width * (self.heads[0] + 2 * self.heads[1]), bias=False)
        self.core, self.advance = core, advance
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """From ``(B, N, C)`` to ``(B, N, C)``; causal by default."""
        q, k, v = (t.transpose(1, 2) for t in self._heads(x))
        out = self.core(q, k, v, mask="causal" if mask is None else mask)
        return self.out_proj(self._normed(out).transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """One token ``(B, C)`` after those that the state has seen."""
        out, state = self.advance(*self._heads(x), cache)
        return self.out_proj(self._normed(out).flatten(1)), state

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, shared = self.heads
        q, k, v = self.in_proj(x).unflatten(-1, (-1, self.width)).split([heads, shared, shared], -2)
        return q, k, v

    def _normed(self, out: Tensor) -> Tensor:
        return F.rms_norm(out, out.shape[-1:], eps=1e-6) if self.norm else out


class Lightning(nn.Module):
    """The core of Lightning Attention with its fixed decays: queries and keys through SiLU, then the fading sum.

    Args:
        slopes: ``(H,)``, as of :func:`~manyheads.mechanism.linear.lightning.decay_slopes`.
    """

    slopes: Tensor

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """All tokens ``(B, H, N, D)``."""
        return _tensor(lightning_attention(F.silu(q), F.silu(k), v, slopes=self.slopes, mask=mask))

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token ``(B, H, D)``."""
        return lightning_step(F.silu(q), F.silu(k), v, state, slopes=self.slopes)


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found
