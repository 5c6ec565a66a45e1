"""Mechanisms that look at some of the pairs."""

from __future__ import annotations

from .blasst import blasst
from .dsa import dsa
from .hisa import HISA, hisa
from .misa import MISA, misa
from .msa import MSAConfig, Trained, msa, train_msa
from .neighborhood import neighborhood_attention
from .neighborhood_parts import neighborhood_average, neighborhood_scores
from .neighborhood_tokens import permute_tokens, unpermute_tokens
from .nsa import Compression, NSAConfig, compress, nsa
from .pbs import PBS, pbs
from .pooled import pooled_topk
from .sale import SALE, sale

__all__ = [
    "Compression",
    "HISA",
    "MISA",
    "MSAConfig",
    "NSAConfig",
    "PBS",
    "SALE",
    "Trained",
    "blasst",
    "compress",
    "dsa",
    "hisa",
    "misa",
    "msa",
    "neighborhood_attention",
    "neighborhood_average",
    "neighborhood_scores",
    "nsa",
    "pbs",
    "permute_tokens",
    "pooled_topk",
    "sale",
    "train_msa",
    "unpermute_tokens",
]
