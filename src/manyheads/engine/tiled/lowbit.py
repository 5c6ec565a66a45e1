"""Scores from queries and keys of 8 or 4 bits: quantised for each token, what smoothing took put back exactly.

Whole numbers up to 127 are exact in bfloat16, and their products add up exactly in float32 up to a width of 1040; so
on a processor with fast bfloat16 products a low-bit score costs what a bfloat16 one costs.

Keys lose their mean over tokens, and at 4 bits queries do as well (SageAttention, 2024): ``q_i . k_j`` is the product
of what is left, plus a number per query, plus a number per key, both kept in full precision. The gradient passes
straight through the rounding: it is that of exact scores, at the weights of the low-bit ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...common.quantise import quantise, smoothed
from . import products
from .problem import Problem

BITS = {"int8": 8, "int4": 4}


class Operands(NamedTuple):
    """One call's queries and keys as whole numbers, and what their products are scaled and shifted by.

    Attributes:
        q: Whole numbers in bfloat16 ``(B, Hq, Nq, D)``.
        k: ``(B, Hkv, Nk, D)``.
        q_steps: ``(B, Hq, Nq)``.
        k_steps: ``(B, Hkv, Nk)``.
        row: ``(B, Hq, Nq)``, what smoothing took from all scores of a query.
        column: ``(B, Hq, Nk)``, and of a key.
    """

    q: Tensor
    k: Tensor
    q_steps: Tensor
    k_steps: Tensor
    row: Tensor
    column: Tensor

    def part(self, at: tuple[slice, slice, slice], kv: slice, keys: Tensor) -> Operands:
        """Those of some queries and keys."""
        b, h, _ = at
        return Operands(
            self.q[at], self.k[b, kv][:, :, keys], self.q_steps[at], self.k_steps[b, kv][:, :, keys],
            self.row[at], self.column[b, h][:, :, keys],
        )  # fmt: skip

    def scores(self) -> Tensor:
        """``q k^T`` before the scale, ``(B, Hq, Nq, Nk)``."""
        b, h, m, d = self.q.shape
        kv, columns = self.k.shape[1:3]
        rows = self.q.reshape(b * kv, h // kv * m, d)
        s = products.scores(rows, self.k.reshape(b * kv, columns, d)).to(self.q_steps.dtype)
        s = s.view(b, kv, h // kv, m, columns) * self.k_steps[:, :, None, None]
        s = s.view(b, h, m, columns).mul_(self.q_steps[..., None])
        return s.add_(self.row[..., None]).add_(self.column[:, :, None])


def operands(p: Problem) -> Operands:
    """Smooths and quantises the queries and keys of a problem.

    Args:
        p: A problem whose ``qk`` is not exact.

    Returns:
        What its scores are computed from.
    """
    bits = BITS[p.qk]
    parts = smoothed(p.q, p.k, queries=bits == 4)
    q, k = quantise(parts.queries, bits), quantise(parts.keys, bits)
    whole = torch.bfloat16
    return Operands(q.values.to(whole), k.values.to(whole), q.steps, k.steps, parts.row, parts.column)


def refuse(qk: str) -> list[str]:
    """Why the Triton kernels cannot take a precision; empty when they can."""
    if qk == "exact":
        return []
    return [f"no kernel multiplies queries and keys in few bits (qk {qk!r}); use backend='blocked' or qk='exact'"]
