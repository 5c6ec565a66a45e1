"""The layer of local linear attention: projections, norms of queries and keys, a learned ridge."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.engine.solve import Solver
from manyheads.mechanism.regression.local_linear import RIDGE, local_linear_attention

from .cached import CachedAttention


class LocalLinearAttention(CachedAttention):
    r"""A ridge regression around every query, in place of an attention layer.

    $$y = W_o\, \mathrm{lla}\big(\mathrm{norm}(W_q x), \mathrm{norm}(W_k x), W_v x;\; \lambda = e^{\eta}\big)$$

    with one $\eta$ for each head. Norms are on by default: the distance between queries and keys matters here.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Query heads.
        ridge: Where $\lambda$ starts, above 0, relative to weights that sum to one.
        learn_ridge: Whether it is a parameter.
        solver: How the systems are solved, see :class:`~manyheads.engine.solve.Solver`.
        qk_norm: Whether queries and keys get an RMS norm per head.
        **options: ``kv_heads``, ``head_dim``, ``bias``, ``rope`` and ``window`` of
            :class:`~manyheads.nn.cached.CachedAttention`.

    Raises:
        ValueError: Widths, heads or windows that make no sense, or a ridge that is not positive.

    Source:
        Zuo et al., Local Linear Attention, arXiv 2510.01450.

    Example:
        >>> layer = LocalLinearAttention(32, 4, kv_heads=2)
        >>> x = torch.randn(2, 9, 32)
        >>> y, cache = layer(x[:, :8], return_cache=True)
        >>> last, _ = layer.step(x[:, 8], cache)
        >>> torch.allclose(last, layer(x)[:, 8], atol=1e-4)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        ridge: float = RIDGE,
        learn_ridge: bool = True,
        solver: Solver | str = "auto",
        qk_norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, qk_norm=qk_norm, **options)
        if not 0.0 < ridge < math.inf:
            raise ValueError(f"ridge: expected a positive number, got {ridge}")
        self.solver = solver if isinstance(solver, Solver) else Solver(solver)
        self.log_ridge = nn.Parameter(torch.full((num_heads,), math.log(ridge)), requires_grad=learn_ridge)

    def core(self, queries: dict[str, Tensor], k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        """:func:`~manyheads.mechanism.regression.local_linear.local_linear_attention` on heads."""
        ridge = self.log_ridge.to(torch.promote_types(k.dtype, torch.float32)).exp()
        out = local_linear_attention(queries["q"], k, v, ridge=ridge, solver=self.solver, **asked)
        assert isinstance(out, Tensor)
        return out
