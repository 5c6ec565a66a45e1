"""The layer of Parallax: projections of queries, probes, keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from manyheads.mechanism.regression.parallax import parallax

from .cached import CachedAttention


class Parallax(CachedAttention):
    r"""Softmax attention corrected along a learned probe, in place of an attention layer.

    $$y = W_o\, \mathrm{parallax}(W_q x, W_k x, W_v x;\; r = W_r x)$$

    Beside an attention layer it has one more projection, as large as that of the queries. Only keys and values are
    kept for decoding. Parameters carry the names of flash-linear-attention's layer, whose queries, probes and keys
    are always rotated (``rope=RoPE()``).

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Query heads.
        **options: ``kv_heads``, ``head_dim``, ``bias``, ``qk_norm``, ``rope`` and ``window`` of
            :class:`~manyheads.nn.cached.CachedAttention`; norm and rotation act on queries, probes and keys.

    Raises:
        ValueError: Widths, heads or windows that make no sense.

    Conventions:
        Probes start as torch's linear layers do. The published gains are from training with Muon
        (``torch.optim.Muon`` for the projections, which are matrices; see ``examples/parallax_muon.py``).

    Source:
        Zuo et al., Parallax: Parameterized Local Linear Attention, arXiv 2605.29157.

    Example:
        >>> import torch
        >>> layer = Parallax(32, 4, kv_heads=2, qk_norm=True, window=5)
        >>> x = torch.randn(2, 9, 32)
        >>> y, cache = layer(x[:, :8], return_cache=True)
        >>> last, cache = layer.step(x[:, 8], cache)
        >>> torch.allclose(last, layer(x)[:, 8], atol=1e-5), cache.seen, cache.k.shape[2]
        (True, 9, 4)
    """

    QUERIES = ("q", "r")

    def core(self, queries: dict[str, Tensor], k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        """:func:`~manyheads.mechanism.regression.parallax.parallax` on heads."""
        out = parallax(queries["q"], k, v, r=queries["r"], **asked)
        assert isinstance(out, Tensor)
        return out
