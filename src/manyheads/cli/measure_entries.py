"""What configurations of the kernels by key tiles are checked and timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.engine.tiled import tiled
from manyheads.lab.search import Place
from manyheads.mask import Causal, TileLayout
from manyheads.testing import assert_within_budget, sample_qkv

KERNELS = ("entries_forward", "entries_backward")
_GROUP, _BLOCK = 4, 64


def call(
    place: Place, qkv: tuple[Tensor, ...], *, keep: int = 16, backend: str = "triton"
) -> Callable[[], Any]:
    """Forward or backward over blocks of 64 keys at random, one list for each query and key head, causal.

    Args:
        place: The row of the table: its kernel says whether outputs or gradients are wanted.
        qkv: Queries, keys and values.
        keep: Blocks of a query, at most.
        backend: Of the engine.

    Returns:
        A call that gives the output, or a tuple of gradients.

    Example:
        >>> place = Place("entries_backward", "sm_90", 64, 4, "plain")
        >>> qkv = sample_qkv(1, 2, 5, kv_heads=1, width=8, seed=0)
        >>> [tuple(t.shape) for t in call(place, qkv, keep=1, backend="blocked")()]
        [(1, 2, 5, 8), (1, 1, 5, 8), (1, 1, 5, 8)]
    """
    q, k, v = qkv
    (batch, lists, keys, _), (heads, queries) = k.shape, q.shape[1:3]
    blocks = -(-keys // _BLOCK)
    drawn = torch.rand(batch, lists, queries, blocks, generator=torch.Generator().manual_seed(13))
    ids = drawn.topk(min(keep, blocks), -1).indices.to(q.device)
    layout = TileLayout.from_ids(ids, nq=queries, nk=keys, tile=(1, _BLOCK), mask=Causal(), batch=batch, heads=heads)
    order = "auto" if backend == "reference" else "keys"
    if place.kernel == "entries_forward":
        return lambda: tiled(q, k, v, layout, order=order, backend=backend)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = tiled(leaves[0], leaves[1], leaves[2], layout, order=order, backend=backend)
    assert isinstance(out, Tensor)
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def problem(place: Place, tokens: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """The call that is timed: groups of four heads, four key heads, sixteen blocks of a query."""
    drawn = sample_qkv(1, 4 * _GROUP, tokens, kv_heads=4, width=place.width, dtype=dtype, seed=7)
    return call(place, tuple(t.to(device) for t in drawn))


def agrees(place: Place, device: str, dtype: torch.dtype) -> None:
    """Compares the kernels with the reference on a small, odd problem.

    Raises:
        AssertionError: They differ by more than rounding.
    """
    drawn = sample_qkv(1, 6, 70, kv_heads=2, keys=300, width=place.width, dtype=dtype, seed=11)
    found = {}
    for name, backend, where, kind in (
        ("exact", "reference", "cpu", torch.float64), ("plain", "reference", "cpu", dtype),
        ("got", "triton", device, dtype),
    ):  # fmt: skip
        result = call(place, tuple(t.to(where, kind) for t in drawn), keep=3, backend=backend)()
        found[name] = [result] if isinstance(result, Tensor) else list(result)
    for got, exact, plain in zip(found["got"], found["exact"], found["plain"], strict=True):
        assert_within_budget(got.cpu(), exact.double(), plain, what=place.kernel)
