"""Triton kernels over a tile layout: by query tiles, gradients by key tiles, and chosen tiles by key tile."""

from .backward import keys_backward, row_products, rows_backward
from .entries import entries_backward, entries_forward, merge_entries, total_pieces
from .forward import forward
from .parts import exp2_polynomial

__all__ = [
    "entries_backward", "entries_forward", "exp2_polynomial", "forward", "keys_backward", "merge_entries",
    "row_products", "rows_backward", "total_pieces",
]  # fmt: skip
