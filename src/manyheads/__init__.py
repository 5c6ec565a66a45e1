"""Attention for PyTorch: every efficient mechanism behind one API with one set of meanings."""

from __future__ import annotations

from .attention import Explanation, attention, attention_weights, explain
from .common.errors import UnsupportedError
from .engine.merge import merge
from .engine.result import Attn
from .engine.tiled import ALiBi, Bias, Pair, PerBlock, PerKey, Relative
from .mask import *  # noqa: F403
from .mask import __all__ as _masks
from .mask.layout import TileLayout

__version__ = "0.1.0"

__all__ = [
    "ALiBi", "Attn", "Bias", "Explanation", "Pair", "PerBlock", "PerKey", "Relative", "TileLayout", "UnsupportedError",
    "attention", "attention_weights", "explain", "merge", *_masks,
]  # fmt: skip
