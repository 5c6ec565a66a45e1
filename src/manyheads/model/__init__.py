"""Small networks around any mechanism: one decoder, one encoder."""

from __future__ import annotations

from .config import Config
from .decoder import Cache, Decoder
from .encoder import Encoder
from .mixers import build, names, parse
from .position import Learned, NoPE, Sinusoidal, Slopes

__all__ = [
    "Cache",
    "Config",
    "Decoder",
    "Encoder",
    "Learned",
    "NoPE",
    "Sinusoidal",
    "Slopes",
    "build",
    "names",
    "parse",
]
