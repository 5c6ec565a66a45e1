"""What configurations of the gather engine are checked and timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.engine.gather import gather
from manyheads.lab.search import Place
from manyheads.testing import assert_within_budget, sample_qkv

_GROUP = 16


def call(
    place: Place, qkv: tuple[Tensor, ...], *, listed: int = 2048, padding: float = 0.0, backend: str = "triton"
) -> Callable[[], Any]:
    """Forward or backward of the engine over ids at random, each list shared by the heads of a group.

    Args:
        place: The row of the table: its kernel says whether outputs or gradients are wanted.
        qkv: Queries, keys and values.
        listed: Ids of a query, at most.
        padding: Share of them that are none.
        backend: Of the engine.

    Returns:
        A call that gives the output, or a tuple of gradients.

    Example:
        >>> place = Place("listed_rows", "sm_90", 64, 4, "lists")
        >>> qkv = sample_qkv(1, 2, 5, kv_heads=1, width=8, seed=0)
        >>> [tuple(t.shape) for t in call(place, qkv, listed=3, backend="blocked")()]
        [(1, 2, 5, 8), (1, 1, 5, 8), (1, 1, 5, 8)]
    """
    q, k, v = qkv
    draws = torch.Generator().manual_seed(13)
    (batch, heads, keys, _), queries = k.shape, q.shape[2]
    ids = torch.randint(keys, (batch, heads, queries, min(listed, keys)), generator=draws, dtype=torch.int32)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=draws) < padding, -1).to(q.device)
    if place.kernel == "listed":
        return lambda: gather(q, k, v, ids, backend=backend)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = gather(leaves[0], leaves[1], leaves[2], ids, backend=backend)
    assert isinstance(out, Tensor)
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def problem(place: Place, tokens: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """The call that is timed: groups of 16 heads, two key heads, an eighth of the tokens as queries.

    Args:
        place: The row of the table.
        tokens: Keys.
        dtype: Of queries, keys and values.
        device: Where.

    Returns:
        See :func:`call`.
    """
    drawn = sample_qkv(
        1, 2 * _GROUP, max(tokens // 8, 1), kv_heads=2, keys=tokens, width=place.width, dtype=dtype, seed=7
    )
    return call(place, tuple(t.to(device) for t in drawn))


def agrees(place: Place, device: str, dtype: torch.dtype) -> None:
    """Compares the kernels with the reference on a small, odd problem with padding.

    Args:
        place: The row of the table.
        device: Where the kernels run.
        dtype: Of queries, keys and values.

    Raises:
        AssertionError: They differ by more than rounding.
    """
    qkv = sample_qkv(2, 6, 50, kv_heads=2, keys=90, width=place.width, dtype=dtype, seed=11)

    def results(backend: str, where: str, kind: torch.dtype) -> list[Tensor]:
        given = tuple(t.to(where, kind) for t in qkv)
        found = call(place, given, listed=75, padding=0.3, backend=backend)()
        return [found] if isinstance(found, Tensor) else list(found)

    exact, plain = results("reference", "cpu", torch.float64), results("reference", "cpu", dtype)
    for i, (a, r, s) in enumerate(zip(results("triton", device, dtype), exact, plain, strict=True)):
        assert_within_budget(a.cpu(), r.double(), s, what=f"result {i}")
