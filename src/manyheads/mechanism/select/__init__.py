"""Selectors as small functions on tensors: cut into blocks, score, choose; what mechanisms compose."""

from __future__ import annotations

from .blocks import Cut, block_causal, block_documents, cut, own_blocks, pool
from .choose import Forced, above, top_k, top_p
from .pairs import pairs
from .scores import pooled_scores

__all__ = [
    "Cut",
    "Forced",
    "above",
    "block_causal",
    "block_documents",
    "cut",
    "own_blocks",
    "pairs",
    "pool",
    "pooled_scores",
    "top_k",
    "top_p",
]
