"""Triton kernels over a tile layout: forward, gradients by query tiles, gradients by key tiles."""

from .backward import keys_backward, row_products, rows_backward
from .forward import forward
from .parts import exp2_polynomial

__all__ = ["exp2_polynomial", "forward", "keys_backward", "row_products", "rows_backward"]
