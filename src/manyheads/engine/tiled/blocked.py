"""The CPU path, on any device: dense pieces of the layout, by whichever way was measured to win."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import boxes, flash, inverted, passes, products, skipping
from .order import by_keys
from .problem import Grads, Problem


def uses_fused(p: Problem) -> bool:
    """Whether a problem goes to torch's fused kernel piece by piece, rather than to products and passes."""
    return p.plain and p.q.device.type == "cpu" and p.q.shape[3] > 0 and products.fused_wins(p.q.dtype)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of a problem."""
    if skipping.serves(p) and products.fused_wins(p.q.dtype):
        p = skipping.narrowed(p)
        done = skipping.whole(p)
        if done is not None:
            return done
    way: Any = boxes if p.boxes is not None else flash if uses_fused(p) else passes
    return (inverted if by_keys(p, "blocked") else way).forward(p)


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of a problem from its saved output and log-normaliser; rows that see nothing have none."""
    if dlse is not None:
        dlse = dlse.masked_fill(lse == -math.inf, 0.0)
    if skipping.serves(p) and products.fused_wins(p.q.dtype):
        p = skipping.narrowed(p)
    way: Any = boxes if p.boxes is not None else flash if uses_fused(p) and p.sink is None else passes
    return (inverted if by_keys(p, "blocked") else way).backward(p, out, lse, dout, dlse)
