"""Layers around attention."""

from __future__ import annotations

from .attention import Attention

__all__ = ["Attention"]
