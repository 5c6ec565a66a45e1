"""Mechanisms that look at some of the pairs."""

from __future__ import annotations

from .neighborhood import neighborhood_attention

__all__ = ["neighborhood_attention"]
