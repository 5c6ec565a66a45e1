"""The layer around any core: projections, rotary positions, norms of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import attention, attention_weights
from manyheads.common import scopes
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.engine.tiled.bias import Pair
from manyheads.mask import Causal, Dense, Mask, as_mask

Positions = tuple[Tensor, Tensor]


class Attention(nn.Module):
    r"""Multi-head attention around any core, in place of ``torch.nn.MultiheadAttention``.

    $$\mathrm{out} = \mathrm{core}(W_q x_q + b_q,\; W_k x_k + b_k,\; W_v x_v + b_v)\,W_o^\top + b_o$$

    with normalised queries and keys if ``qk_norm`` and rotated ones if ``rope``. Parameters carry the names
    and shapes of torch's layer, so that state dicts load in both directions when neither adds anything.

    Args:
        embed_dim: Width E of the queries that come and of the output.
        num_heads: Query heads Hq; E must be a multiple.
        dropout: Share of attention weights dropped in training, in [0, 1).
        bias: Whether the projections have biases.
        kdim: Width of the keys that come; default E.
        vdim: Width of the values that come; default E.
        batch_first: Whether tensors are (B, N, E); else (N, B, E), as in torch.
        kv_heads: Key and value heads; default Hq. Fewer make grouped-query attention.
        core: ``core(q, k, v, *, ...)`` on (B, H, N, D) tensors; default exact attention. It is given only the
            keyword arguments that the call needs: ``mask``, ``positions``, ``key_padding``, ``bias``,
            ``dropout_p``.
        rope: Rotation of queries and keys by logical position.
        qk_norm: Whether queries and keys get an RMS norm per head, before the rotation.

    Raises:
        ValueError: Widths or heads that do not divide.

    Conventions:
        The masks of the call mean what they mean in torch: True in ``key_padding_mask`` and in a boolean
        ``attn_mask`` hides. ``mask`` is a mask of this library, where True shows. A query that may attend to
        nothing gives the output bias where torch gives NaN. ``is_causal`` without ``attn_mask`` is causal
        aligned to the end, where torch raises. An ``attn_mask`` costs its area: prefer ``mask="causal"``.

    Source:
        Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.2.2.

    Example:
        >>> layer = Attention(32, 4, kv_heads=2, batch_first=True, rope=RoPE())
        >>> out, weights = layer(torch.randn(1, 10, 32), mask="causal & window(4)", need_weights=False)
        >>> out.shape, weights
        (torch.Size([1, 10, 32]), None)
    """

    in_proj_weight: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        kv_heads: int | None = None,
        core: Callable[..., Any] | None = None,
        rope: RoPE | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of num_heads={num_heads}, got {kv_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first = dropout, batch_first
        self.core = attention if core is None else core
        self.rope = rope
        # torch's encoder layer takes a fused path around this layer when it reads True here
        self._qkv_same_embed_dim = False
        inner = kv_heads * self.head_dim
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(embed_dim + 2 * inner, embed_dim))
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim))
            self.k_proj_weight = nn.Parameter(torch.empty(inner, self.kdim))
            self.v_proj_weight = nn.Parameter(torch.empty(inner, self.vdim))
        self.in_proj_bias = nn.Parameter(torch.empty(embed_dim + 2 * inner)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the projections as torch's layer does: uniform by Xavier, biases zero."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name, None) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @classmethod
    def from_torch(cls, layer: nn.MultiheadAttention, *, core: Callable[..., Any] | None = None) -> Attention:
        """Builds the layer that computes what a layer of torch computes, with a copy of its parameters.

        Args:
            layer: A ``torch.nn.MultiheadAttention``.
            core: The core to put into it; default exact attention.

        Returns:
            The new layer, on the device and in the dtype and mode of the old one.

        Raises:
            UnsupportedError: The layer was built with ``add_bias_kv`` or ``add_zero_attn``.

        Example:
            >>> old = nn.MultiheadAttention(8, 2, batch_first=True)
            >>> x = torch.randn(1, 5, 8)
            >>> torch.allclose(old(x, x, x)[0], Attention.from_torch(old)(x, x, x)[0], atol=1e-6)
            True
        """
        if layer.bias_k is not None or layer.add_zero_attn:
            raise UnsupportedError("nn.Attention does not support add_bias_kv and add_zero_attn")
        new = cls(
            layer.embed_dim,
            layer.num_heads,
            layer.dropout,
            layer.in_proj_bias is not None,
            kdim=layer.kdim,
            vdim=layer.vdim,
            batch_first=layer.batch_first,
            core=core,
        )
        new.to(layer.out_proj.weight)
        new.load_state_dict(layer.state_dict(), strict=True)
        return new.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | str | Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from a query sequence to a key sequence.

        Args:
            query: (N, B, E), or (B, N, E) with ``batch_first``, or (N, E).
            key: Same layout, width ``kdim``; default the query.
            value: Same layout, width ``vdim``; default the key.
            key_padding_mask: (B, Nk) or (Nk,), True or minus infinity at padding.
            need_weights: Whether to return the attention weights too, which takes Nq x Nk memory per head; by
                default, as in torch, with the exact core, and not with another or inside a parallel context.
            attn_mask: (Nq, Nk) or (B * Hq, Nq, Nk), boolean with True hiding, or floating and added to the
                scores.
            average_attn_weights: Whether returned weights are averaged over heads.
            is_causal: Whether a query sees no later key; ``attn_mask``, when given, has the word instead.
            mask: A mask of this library, its text, or a boolean tensor with True showing; combined with the
                others.
            positions: Logical positions of queries and keys, for the mask and the rotation.

        Returns:
            The output in the layout of the query, and the weights (B, Nq, Nk), (B, Hq, Nq, Nk) if not
            averaged, or None. Weights are those before dropout.

        Raises:
            ValueError: Shapes that do not fit.
            UnsupportedError: Weights asked of another core than exact attention.
        """
        key = query if key is None else key
        value = key if value is None else value
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                "query: expected 2 or 3 dimensions, the same as key and value, got "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        single = query.dim() == 2
        if query is key is value:
            q, k, v = self._project(self._batched(query))
        else:
            q, k, v = self._project(self._batched(query), self._batched(key), self._batched(value))
        asked = self._masks(q, k, attn_mask, key_padding_mask, is_causal, mask)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions is not None:
            asked["positions"] = positions
        if self.rope is not None:
            at = positions or _usual_positions(q, k)
            q, k = self.rope(q, at[0]), self.rope(k, at[1])
        weights = None
        if (self.core is attention and not scopes.active) if need_weights is None else need_weights:
            weights = self._weights(q, k, asked)
            weights = weights.mean(1) if average_attn_weights else weights
        if self.training and self.dropout:
            asked["dropout_p"] = self.dropout
        out = self.out_proj(self.core(q, k, v, **asked).transpose(1, 2).flatten(2))
        if single:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _batched(self, x: Tensor) -> Tensor:
        """Any of the layouts as (B, N, E)."""
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (B, H, N, D), from one sequence or from three."""
        inner = self.kv_heads * self.head_dim
        sizes = [self.embed_dim, inner, inner]
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.split(sizes)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        if len(inputs) == 1 and self.in_proj_weight is not None:
            projected = F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).split(sizes, dim=-1)
        else:
            inputs = inputs * 3 if len(inputs) == 1 else inputs
            projected = tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        return q, k, v

    def _masks(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        mask: Mask | str | Tensor | None,
    ) -> dict[str, Any]:
        """The keyword arguments of the core that the masks of a call amount to."""
        asked: dict[str, Any] = {}
        parts = [] if mask is None else [as_mask(mask)]
        if attn_mask is not None:
            hidden, bias = _split_attn_mask(attn_mask, q, k)
            if hidden is not None:
                parts.append(Dense(~hidden))
            if bias is not None:
                asked["bias"] = Pair(bias)
        elif is_causal:
            parts.append(Causal())
        if parts:
            whole = parts[0]
            for part in parts[1:]:
                whole = whole & part
            asked["mask"] = whole
        if key_padding_mask is not None:
            asked["key_padding"] = ~_hidden_keys(key_padding_mask, k)
        return asked

    def _weights(self, q: Tensor, k: Tensor, asked: dict[str, Any]) -> Tensor:
        if self.core is not attention:
            raise UnsupportedError("need_weights: only the exact core has weights to return; pass need_weights=False")
        return attention_weights(q, k, **asked)

    def extra_repr(self) -> str:
        """Sizes, and whatever differs from the plain layer."""
        parts = [f"{self.embed_dim}, {self.num_heads}"]
        if self.kv_heads != self.num_heads:
            parts.append(f"kv_heads={self.kv_heads}")
        if self.rope is not None:
            parts.append(f"rope={self.rope}")
        if self.core is not attention and not isinstance(self.core, nn.Module):
            parts.append(f"core={getattr(self.core, '__name__', self.core)}")
        return ", ".join(parts)


def _usual_positions(q: Tensor, k: Tensor) -> Positions:
    """Logical positions when the caller gives none."""
    if scopes.active:  # this process holds a part of the sequence
        own = scopes.active[-1].positions().to(q.device)
        return own, own
    q_pos = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
    return q_pos, torch.arange(k.shape[2], device=k.device)


def _split_attn_mask(given: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What an ``attn_mask`` hides and what it adds, each broadcastable to (B, H, Nq, Nk) or None."""
    (batch, heads, nq), nk = q.shape[:3], k.shape[2]
    if tuple(given.shape) not in ((nq, nk), (batch * heads, nq, nk)):
        raise ValueError(
            f"attn_mask: expected (Nq, Nk) = {(nq, nk)} or (B * H, Nq, Nk) = {(batch * heads, nq, nk)}, "
            f"got {tuple(given.shape)}"
        )
    full = given[None, None] if given.dim() == 2 else given.unflatten(0, (batch, heads))
    if full.dtype == torch.bool:
        return full, None
    if not full.is_floating_point():
        raise TypeError(f"attn_mask: expected a boolean or floating tensor, got {full.dtype}")
    hidden = full == float("-inf")
    bias = full.masked_fill(hidden, 0.0)
    adds = bias.requires_grad or bool(bias.any())
    return (hidden if bool(hidden.any()) else None), (bias if adds else None)


def _hidden_keys(given: Tensor, k: Tensor) -> Tensor:
    """A ``key_padding_mask`` as a boolean (B, Nk), True at padding."""
    batched = given[None] if given.dim() == 1 else given
    if tuple(batched.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_padding_mask: expected (B, Nk) = {(k.shape[0], k.shape[2])}, got {tuple(given.shape)}")
    if batched.dtype == torch.bool:
        return batched
    hidden = batched == float("-inf")
    if not batched.is_floating_point() or bool((batched.masked_fill(hidden, 0.0) != 0).any()):
        raise ValueError("key_padding_mask: expected True or minus infinity at padding and nothing else")
    return hidden
