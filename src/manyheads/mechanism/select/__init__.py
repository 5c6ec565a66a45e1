"""Selectors as small functions on tensors: cut into blocks, score, choose; what mechanisms compose.

Scores are float32, ids int32 with -1 after the last, shapes static; nothing here waits for a GPU.

| step | functions |
|---|---|
| cut into blocks, per document | `cut`, `block_causal`, `block_documents`, `own_blocks` |
| score blocks | `pool`, `pooled_scores`, `max_scores`, `centroid_scores`, `centroid_weights` |
| score pairs | `low_bit_scores`, `scores_at` |
| choose | `top_k`, `top_p`, `above`, `nearest_centroids`, with `Forced` blocks |
| from coarse to fine | `coarse_to_fine`, `expand`, `refine`, `members`, `ids_of` |
| another order of keys | `reorder`, `permute`, `inverse`, `check_permutation` |
| what was chosen, as a matrix | `pairs` |
| training | `index_loss`, `with_loss`, `Warmup`, `gated`, `straight_through` |
| calibration | `Calibration`, `save`, `load` |
"""

from __future__ import annotations

from .blocks import Cut, block_causal, block_documents, cut, own_blocks, pool
from .calibration import Calibration, load, save
from .choose import Forced, above, top_k, top_p
from .clusters import centroid_scores, centroid_weights, ids_of, members, nearest_centroids
from .coarse import coarse_to_fine, expand, refine, scores_at
from .estimate import low_bit_scores
from .losses import index_loss
from .matrix import pairs
from .order import check_permutation, inverse, permute, reorder
from .scores import max_scores, pooled_scores
from .training import Warmup, gated, straight_through, with_loss

__all__ = [
    "Calibration",
    "Cut",
    "Forced",
    "Warmup",
    "above",
    "block_causal",
    "block_documents",
    "centroid_scores",
    "centroid_weights",
    "check_permutation",
    "coarse_to_fine",
    "cut",
    "expand",
    "gated",
    "ids_of",
    "index_loss",
    "inverse",
    "load",
    "low_bit_scores",
    "max_scores",
    "members",
    "nearest_centroids",
    "own_blocks",
    "pairs",
    "permute",
    "pool",
    "pooled_scores",
    "refine",
    "reorder",
    "save",
    "scores_at",
    "straight_through",
    "top_k",
    "top_p",
    "with_loss",
]
