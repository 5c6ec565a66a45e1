"""What the tests of the indexers share: drawn index tensors, and choices as sets."""

from __future__ import annotations

import torch

from manyheads.mechanism.sparse.indexer import Index, index_tokens


def drawn(n=150, queries=None, heads=6, width=8, batch=2, seed=0, dtype=torch.float64):
    """Normal index queries, keys and weights; the weights have both signs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries or n, width), (batch, n, width), (batch, heads, queries or n))
    return Index(*(torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes))


def chosen(index, keep, method=None, **more):
    """The choice as a matrix, bool (B, Nq, Nk)."""
    ids = index_tokens(index, keep=keep, method=method, **more).long()
    n = index.k.shape[1]
    return ids.new_zeros(*ids.shape[:2], n + 1, dtype=torch.bool).scatter(2, ids.where(ids >= 0, n), True)[..., :n]


def recall(index, keep, method):
    """The share of the flat choice that a method finds."""
    flat, found = chosen(index, keep), chosen(index, keep, method)
    return float((flat & found).sum() / flat.sum())
