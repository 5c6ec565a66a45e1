"""The lightning indexer of DeepSeek Sparse Attention and the cheaper ways to its choice."""

from __future__ import annotations

from .method import Flat, Index, index_tokens
from .pooled import PooledKeys
from .scoring import index_scores

__all__ = ["Flat", "Index", "PooledKeys", "index_scores", "index_tokens"]
