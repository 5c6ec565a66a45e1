"""Triton kernels over lists of ids: forward, gradients of queries, gradients of keys and values."""

from .backward import listed_keys, listed_rows
from .forward import listed

__all__ = ["listed", "listed_keys", "listed_rows"]
