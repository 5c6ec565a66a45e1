"""Attention on many devices: how tokens are dealt, what is exchanged, and how partial results merge."""

from __future__ import annotations

from .collectives import RankError, counted, slow_links
from .context import Context, context, positions, shard, unshard
from .deal import DEALS, Deal, deal
from .execution import SCHEMES
from .loss import next_tokens, token_loss

__all__ = [
    "DEALS",
    "SCHEMES",
    "Context",
    "Deal",
    "RankError",
    "context",
    "counted",
    "deal",
    "next_tokens",
    "positions",
    "shard",
    "slow_links",
    "token_loss",
    "unshard",
]
