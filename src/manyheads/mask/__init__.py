"""Masks: which query may attend to which key, as values that combine and compile to tiles."""

from __future__ import annotations

from .adapters import (
    from_bool,
    from_cu_seqlens,
    from_flash_window,
    from_flex,
    from_hf_window,
    from_natten,
    from_sdpa,
    to_flex,
)
from .algebra import PerBatch, PerHead
from .base import Leaf, Mask
from .data import BlockMap, Dense
from .documents import Document, Earlier, Prefix
from .layout import TileLayout
from .named import (
    block_causal,
    block_causal_document,
    causal_blockwise,
    causal_by_document,
    causal_document,
    chunked,
    dilated_window,
    fixed,
    full_document,
    global_sliding_window,
    prefix_lm_causal,
    prefix_lm_document,
    shared_question,
    sliding_window,
    sliding_window_causal,
    streaming,
    strided,
)
from .neighborhood import Neighborhood, grid_permutation
from .predicate import Predicate
from .primitives import Block, Causal, Full, Periodic, Sink, Window
from .rectangles import Rectangles
from .show import later_key, show
from .text import as_mask, parse

__all__ = [
    "Block",
    "BlockMap",
    "Causal",
    "Dense",
    "Document",
    "Earlier",
    "Full",
    "Leaf",
    "Mask",
    "Neighborhood",
    "PerBatch",
    "PerHead",
    "Periodic",
    "Predicate",
    "Prefix",
    "Rectangles",
    "Sink",
    "TileLayout",
    "Window",
    "as_mask",
    "block_causal",
    "block_causal_document",
    "causal_blockwise",
    "causal_by_document",
    "causal_document",
    "chunked",
    "dilated_window",
    "fixed",
    "from_bool",
    "from_cu_seqlens",
    "from_flash_window",
    "from_flex",
    "from_hf_window",
    "from_natten",
    "from_sdpa",
    "full_document",
    "global_sliding_window",
    "grid_permutation",
    "later_key",
    "parse",
    "prefix_lm_causal",
    "prefix_lm_document",
    "shared_question",
    "show",
    "sliding_window",
    "sliding_window_causal",
    "streaming",
    "strided",
    "to_flex",
]
