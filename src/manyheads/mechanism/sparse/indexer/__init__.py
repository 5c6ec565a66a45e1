"""The lightning indexer of DeepSeek Sparse Attention and the cheaper ways to its choice."""

from __future__ import annotations

from .method import Flat, Index, index_tokens
from .pooled import PooledKeys
from .sample import TUNINGS, clustered_index, flat_scan_of, index_of_heads, recall
from .scoring import index_scores

__all__ = [
    "Flat",
    "Index",
    "PooledKeys",
    "TUNINGS",
    "clustered_index",
    "flat_scan_of",
    "index_of_heads",
    "index_scores",
    "index_tokens",
    "recall",
]
