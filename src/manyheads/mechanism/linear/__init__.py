"""Mechanisms whose memory is a state of fixed size: linear attention in its many forms."""

from __future__ import annotations

from .branches import NATSConfig
from .favor import Performer, favor_attention
from .gated_delta import gated_delta
from .kernelized import linear_attention
from .lightning import decay_slopes, lightning_attention
from .mlstm import mlstm
from .natsl import natsl
from .rat import rat
from .taylor import Expansion, taylor_attention

__all__ = [
    "Expansion",
    "NATSConfig",
    "Performer",
    "decay_slopes",
    "favor_attention",
    "gated_delta",
    "lightning_attention",
    "linear_attention",
    "mlstm",
    "natsl",
    "rat",
    "taylor_attention",
]
