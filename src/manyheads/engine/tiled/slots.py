"""Biases as the kernels take them: at most one of each of four kinds, sums of equal kinds added up before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bias import ALiBi, Pair, PerBlock, PerKey, Relative, Term


class Slots(NamedTuple):
    """The four tensors and what the kernels must know of them.

    Attributes:
        slopes: ``(H,)`` float32, or None.
        table: ``(H|1, 2R - 1)``, or None.
        pair: ``(B|1, H|1, Nq|1, Nk)``, or None.
        block: ``(B|1, H|1, Tq, Tk)``, or None.
        size: Tokens of a block.
    """

    slopes: Tensor | None = None
    table: Tensor | None = None
    pair: Tensor | None = None
    block: Tensor | None = None
    size: tuple[int, int] = (0, 0)

    def arguments(self, nothing: Tensor, scale: float, softcap: float) -> dict[str, Any]:
        """Keyword arguments of every kernel.

        Biases of pairs start the product of the scores where they can: without a cap between, and divided by a scale
        that keeps them finite.
        """
        joined = not softcap and abs(scale) > 2.0**-20
        table, pair, block = self.table, self.pair, self.block
        return {
            "slopes": nothing if self.slopes is None else self.slopes,
            "table": nothing if table is None else table,
            "pair": nothing if pair is None else pair,
            "block": nothing if block is None else block,
            "table_h": 0 if table is None or table.shape[0] == 1 else table.stride(0),
            "reach": 0 if table is None else table.shape[1] // 2,
            **dict(zip(("pair_b", "pair_h", "pair_q", "pair_k"), _steps(pair, 4), strict=True)),
            **dict(zip(("block_b", "block_h", "block_q"), _steps(block, 4)[:3], strict=True)),
            "ALIBI": self.slopes is not None,
            "RELATIVE": table is not None,
            "PAIR": 0 if pair is None else 2 if joined else 1,
            "BLOCK_Q": self.size[0],
            "BLOCK_K": self.size[1],
        }


def refuse(terms: Sequence[Term]) -> list[str]:
    """Why some terms cannot be one call's bias."""
    reasons = []
    widths = {t.tensor.shape[1] for t in terms if isinstance(t, Relative)}
    if len(widths) > 1:
        reasons.append(f"bias: two Relative tables of different reach ({sorted(widths)} entries)")
    sizes = {t.block for t in terms if isinstance(t, PerBlock)}
    if len(sizes) > 1:
        reasons.append(f"bias: two PerBlock of different block sizes {sorted(sizes)}")
    return reasons


def slots_of(terms: Sequence[Term]) -> Slots:
    """The four slots of some terms, contiguous and in float32 where they are small.

    Args:
        terms: Terms that :func:`refuse` has nothing against.

    Returns:
        Their slots; equal kinds are added in float32.
    """

    def total(*kinds: type[Term]) -> Tensor | None:
        some = [t.tensor[:, :, None] if isinstance(t, PerKey) else t.tensor for t in terms if isinstance(t, kinds)]
        if len(some) == 1:
            return some[0]
        return sum((t.to(torch.float32) for t in some[1:]), some[0].to(torch.float32)) if some else None

    slopes, table, pair, block = total(ALiBi), total(Relative), total(Pair, PerKey), total(PerBlock)
    size = next((t.block for t in terms if isinstance(t, PerBlock)), (0, 0))
    return Slots(
        None if slopes is None else slopes.to(torch.float32).contiguous(),
        None if table is None else _plain(table),
        None if pair is None else _plain(pair),
        None if block is None else _plain(block),
        size,
    )


def _plain(t: Tensor) -> Tensor:
    """With neighbouring entries of the last dimension; float64 has no kernel."""
    t = t.to(torch.float32) if t.dtype == torch.float64 else t
    return t if t.stride(-1) == 1 else t.contiguous()


def _steps(t: Tensor | None, dims: int) -> list[int]:
    """Strides, 0 where a dimension is shared."""
    return [0] * dims if t is None else [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
