"""Triton kernels of recurrences: sums of decays, states at the borders of chunks, and what is read inside chunks."""

from .carry import carry
from .mix import mix
from .sums import sums

__all__ = ["carry", "mix", "sums"]
