"""Which loop is the outer one: query tiles that visit their key tiles, or key tiles that are met by their queries.

The rule, in this one place. A key tile is a dense operand for all the queries that chose it; a query tile is one only
when it has enough rows. So key tiles are outermost where a layout of chosen tiles has few queries a tile:

- on a CPU, below ``FEW`` queries a tile: copying the keys of every query costs more than the products with them;
- on a GPU, for one query a tile and at most ``GROUP`` query heads that share a choice (FSA, 2025): more of them fill a
  matrix instruction, and partial results, which cost memory traffic, are not needed.

Everywhere else, and for whatever the key-outer loop does not compute, query tiles are outermost. Values are the same.
"""

from __future__ import annotations

from ...common.errors import UnsupportedError
from ...mask.layout import TileLayout
from .problem import Problem

FEW = 16
"""Queries of a tile below which key tiles are outermost on a CPU."""

GROUP = 8
"""Query heads of a choice up to which key tiles are outermost on a GPU."""


def by_keys(p: Problem, backend: str) -> bool:
    """Whether key tiles are outermost in a problem.

    Args:
        p: The problem.
        backend: ``"blocked"`` or ``"triton"``.

    Raises:
        UnsupportedError: The caller asked for it, and it cannot be; with the reasons.
    """
    if p.order == "queries" or (p.order == "auto" and p.layout.ids is None):
        return False
    reasons = refuse(p.layout, backend, p.plain, p.qk)
    if p.order == "keys":
        if reasons:
            raise UnsupportedError(f"order 'keys' cannot take this call: {'; '.join(reasons)}; use order='auto'")
        return True
    return not reasons and prefers(p.layout, backend, p.q.shape[1], p.k.shape[1])


def refuse(layout: TileLayout, backend: str, plain: bool = True, qk: str = "exact") -> list[str]:
    """Why key tiles cannot be outermost; empty when they can.

    Args:
        layout: Of the call.
        backend: ``"blocked"``, ``"triton"`` or ``"reference"``.
        plain: Whether the call is a softmax over masked scores and nothing else but a sink.
        qk: In what queries and keys are multiplied.
    """
    if backend == "reference":
        return ["the reference has no loops; use backend='blocked'"]
    reasons = []
    if layout.ids is None:
        reasons.append("the layout has runs, which masks make; lists of chosen tiles come from TileLayout.from_ids")
    elif backend == "blocked" and layout.ids.device.type != "cpu":
        reasons.append("on a GPU only backend='triton' has it")
    if layout.ids is not None and layout.batch * layout.heads * layout.ids.shape[2:].numel() >= 2**31:
        reasons.append("there are more than 2^31 chosen tiles")
    if backend == "triton" and layout.tile[0] != 1:
        reasons.append(f"the kernels take one query a tile, not {layout.tile[0]}")
    if backend == "triton" and (layout.tile[1] < 16 or layout.tile[1] & (layout.tile[1] - 1)):
        reasons.append(f"the kernels take key tiles of a power of two from 16, not {layout.tile[1]}")
    if qk != "exact":
        reasons.append(f"products in {qk} run by query tiles only")
    elif not plain:
        reasons.append("bias, softcap, dropout, skipping and weights other than the softmax run by query tiles only")
    return reasons


def prefers(layout: TileLayout, backend: str, heads: int, kv_heads: int) -> bool:
    """Whether the rule puts key tiles outermost where they can be.

    Example:
        >>> import torch
        >>> ids = torch.zeros(1, 2, 8, 1, dtype=torch.int64)
        >>> nsa = TileLayout.from_ids(ids, nq=8, nk=64, tile=(1, 64), heads=32)
        >>> prefers(nsa, "blocked", 32, 2), prefers(nsa, "triton", 32, 2)
        (True, False)
    """
    if backend == "triton":
        return layout.tile[0] == 1 and sharing(layout, heads, kv_heads) <= GROUP
    return layout.tile[0] < FEW


def describe(layout: TileLayout, backend: str, heads: int, kv_heads: int, plain: bool = True) -> str:
    """Which loop is the outer one in a call, and why, for ``explain``.

    Example:
        >>> from manyheads import Causal
        >>> describe(Causal().tiles(64, tile=(16, 16)), "blocked", 1, 1)
        'query tiles are outermost: the layout has runs, which masks make; lists of chosen tiles come from ...'
    """
    reasons = refuse(layout, backend, plain)
    if reasons:
        return f"query tiles are outermost: {'; '.join(reasons)}"
    shared, size = sharing(layout, heads, kv_heads), layout.tile[0]
    rows = f"queries of a tile: {size}, heads that share a choice: {shared}"
    if prefers(layout, backend, heads, kv_heads):
        return f"key tiles are outermost ({rows}): each is multiplied with all the queries that chose it"
    return f"query tiles are outermost ({rows}): they fill products by themselves"


def sharing(layout: TileLayout, heads: int, kv_heads: int) -> int:
    """How many neighbouring query heads of a key head have one list of tiles: all of its group, or one.

    Args:
        layout: Any.
        heads: Query heads of the call.
        kv_heads: Its key heads.
    """
    group = heads // max(1, kv_heads)
    return max(1, group) if layout.index.shape[1] == 1 or same(layout, group) else 1


def same(layout: TileLayout, group: int) -> bool:
    """Whether the query heads of every group visit the same tiles."""
    index = layout.index
    if group == 1 or index.shape[1] == 1:
        return True
    if layout.ids is not None and index.device.type != "cpu":
        # nobody waits for an index on a device: where there are fewer lists than heads, each serves its neighbours
        return index.shape[1] // max(1, layout.ids.shape[1]) % group == 0
    split = index.reshape(index.shape[0], -1, group)
    return bool((split == split[..., :1]).all())
