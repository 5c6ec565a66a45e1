"""The layer of recursive least squares: short convolutions, a ridge regression to the tokens so far, a norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.mask import Mask
from manyheads.mechanism.regression.least_squares import SPEC, LeastSquaresState, least_squares, step

from .gated_delta import convolved
from .inputs import check_token, check_tokens, document_starts, join_heads, split_heads
from .shortconv import ShortConv

Convs = tuple[Tensor, Tensor, Tensor]


class LeastSquaresCache(NamedTuple):
    """What a least-squares layer remembers.

    Attributes:
        memory: The state of the recursion.
        convs: Last tokens before the convolutions of queries, keys and values; None without convolutions.
    """

    memory: LeastSquaresState
    convs: Convs | None


class LeastSquares(nn.Module):
    r"""Recursive least squares in place of attention: every token adds a pair, and reads the best linear fit.

    $$y = W_o\, \mathrm{RMS}(M_t^\top q_t), \qquad
    M_t = \arg\min_M \sum_{i \le t} \gamma_h^{t-i} |v_i - M^\top k_i|^2 + \lambda_h \gamma_h^t |M|^2$$

    on convolved projections, queries and keys of length one. One such layer recalls what followed a token, as soon as
    its convolution gives a value the key of the token before.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Number of heads; C is a multiple.
        conv: Tokens of the short convolutions; 0 for none.
        activation: What follows the convolutions: ``"silu"`` or ``"none"``.
        ridge: Where the ridge of every head starts; it is learned.
        forget: Whether every head learns a decay, which starts at a memory of about 1000 tokens.

    Raises:
        ValueError: For sizes that do not fit, or a ridge that is not positive.

    Conventions:
        Without convolutions the layer has 4 C^2 parameters, one ridge and one decay per head, and a norm of
        ``C / num_heads``.

    Source:
        Wang et al., Test-time regression, arXiv 2501.12352, section 4.

    Example:
        >>> layer = LeastSquares(32, 2)
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
        conv: int = 4,
        activation: str = "silu",
        ridge: float = 0.1,
        forget: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        if conv < 0:
            raise ValueError(f"conv: expected a number of tokens or 0 for none, got {conv}")
        if not 0.0 < ridge < math.inf:
            raise ValueError(f"ridge: expected a positive number, got {ridge}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(4)
        )
        self.convs = (
            nn.ModuleList(ShortConv(embed_dim, conv, activation=activation) for _ in range(3)) if conv else None
        )
        self.log_ridge = nn.Parameter(torch.full((num_heads,), math.log(ridge)))
        self.forget = nn.Parameter(torch.full((num_heads,), math.log(math.expm1(1e-3)))) if forget else None
        self.norm_weight = nn.Parameter(torch.ones(self.head_dim))
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | str | None = None,
        cache: LeastSquaresCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, LeastSquaresCache]:
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
        document_starts(SPEC, mask, x)  # refuses other masks before anything is computed
        q, k, v, kept = self._inputs(x, mask, None if cache is None else cache.convs, return_cache)
        o, memory = least_squares(
            q, k, v, decay=self._decay(), ridge=self.log_ridge.exp(), mask=mask,
            state=None if cache is None else cache.memory, return_state=True,
        )  # fmt: skip
        y = self._out(o)
        return (y, LeastSquaresCache(memory, kept)) if return_cache else y

    def step(self, x: Tensor, cache: LeastSquaresCache | None = None) -> tuple[Tensor, LeastSquaresCache]:
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
        memory = None if cache is None else cache.memory
        o, memory = step(q, k, v, memory, decay=self._decay(), ridge=self.log_ridge.exp())
        return self._out(o), LeastSquaresCache(memory, kept)

    def _inputs(
        self, x: Tensor, mask: Mask | str | None, before: Convs | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Convs | None]:
        """Queries and keys of length one and values, by head, and what the convolutions remember."""
        parts, kept = [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)], None
        if self.convs is not None:
            parts, kept = convolved(self.convs, parts, before, mask, keep)
        q, k, v = (split_heads(t, self.num_heads) for t in parts)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, kept

    def _decay(self) -> Tensor | None:
        return None if self.forget is None else -F.softplus(self.forget)

    def _out(self, o: Tensor) -> Tensor:
        return self.o_proj(join_heads(F.rms_norm(o, (self.head_dim,), self.norm_weight.to(o.dtype))))
