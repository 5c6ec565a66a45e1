"""The layer of RAT: shared queries and keys, gated averages in chunks, attention across chunks, an output gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.common.rope import RoPE
from manyheads.mask import Mask
from manyheads.mechanism.linear.rat import RATState, rat, step

from .inputs import check_token, check_tokens, join_heads, split_heads

_ROPE = RoPE()


class RAT(nn.Module):
    r"""Recurrence in chunks, attention across chunks.

    $$y = W_o\big(\sigma(z) \odot \mathrm{rat}(q, k, v;\; g = \sigma(\gamma + b))\big), \qquad
    (z, v, \gamma, q, k) = W x$$

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Number of heads.
        groups: Different queries and keys; head h uses those of group ``h mod groups``.
        chunk: Tokens of a chunk. 1 is attention, the whole sequence a recurrence.
        rope: Rotation by the number of the chunk; None for none.
        whole: Whether the layer normalises its input and adds it to its output, as published. A block that does so
            itself wants False.
        norm_eps: Epsilon of that norm.

    Raises:
        ValueError: Widths, heads or groups that do not divide.

    Conventions:
        The gate bias starts at ``log U(1, chunk - 1)``: channels forget after one token to about a chunk. The hybrid
        of the paper alternates these layers with attention to a window of 1024 tokens.

    Source:
        Wei et al., RAT, arXiv 2507.04416, section 3.

    Example:
        >>> layer = RAT(32, 4, chunk=4)
        >>> x = torch.randn(2, 9, 32)
        >>> y = layer(x)
        >>> first, cache = layer.step(x[:, 0])
        >>> y.shape, torch.allclose(first, y[:, 0], atol=1e-5)
        (torch.Size([2, 9, 32]), True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        groups: int = 2,
        chunk: int = 16,
        rope: RoPE | None = _ROPE,
        whole: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        if groups < 1 or num_heads % groups:
            raise ValueError(f"groups: expected a divisor of num_heads={num_heads}, got {groups}")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk: expected a positive number of tokens, got {chunk!r}")
        self.embed_dim, self.num_heads, self.groups, self.chunk, self.rope = embed_dim, num_heads, groups, chunk, rope
        self.shared = groups * (embed_dim // num_heads)
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim + 2 * self.shared, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.norm = nn.RMSNorm(embed_dim, eps=norm_eps) if whole else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws projections with deviation 0.02, and gate biases as described above."""
        nn.init.normal_(self.in_proj.weight, std=0.02)
        nn.init.normal_(self.out_proj.weight, std=0.02)
        with torch.no_grad():
            if self.chunk > 1:
                self.gate_bias.uniform_(1, max(self.chunk - 1, 1)).log_()
            else:
                self.gate_bias.fill_(-10.0)  # there is nothing before a token that a gate could keep
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self, x: Tensor, *, mask: Mask | str | None = None, cache: RATState | None = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, RATState]:
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
        gate, q, k, v, forget = self._inputs(x)
        found = rat(
            q, k, v, forget=forget, chunk=self.chunk, rope=self.rope, mask=mask, state=cache, return_state=return_cache
        )
        if isinstance(found, Tensor):
            return self._out(x, gate, found)
        return self._out(x, gate, found[0]), found[1]

    def step(self, x: Tensor, cache: RATState | None = None) -> tuple[Tensor, RATState]:
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
        gate, q, k, v, forget = self._inputs(x)
        out, cache = step(q, k, v, cache, forget=forget, chunk=self.chunk, rope=self.rope)
        return self._out(x, gate, out), cache

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output gate, and queries, keys, values and gates by head."""
        width = self.embed_dim
        parts = self.in_proj(x if self.norm is None else self.norm(x))
        z, v, gamma, q, k = parts.split([width, width, width, self.shared, self.shared], -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        forget = torch.sigmoid(gamma.to(wide) + self.gate_bias.to(wide))
        copies = self.num_heads // self.groups
        q, k = (t.repeat(*(1,) * (x.dim() - 1), copies) for t in (q, k))
        return torch.sigmoid(z), *(split_heads(t, self.num_heads) for t in (q, k, v, forget))

    def _out(self, x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        y = self.out_proj(gate * join_heads(out))
        return y if self.norm is None else x + y

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.embed_dim}, {self.num_heads}, groups={self.groups}, chunk={self.chunk}"
