"""What configurations of the scan engine are checked and timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.engine.scan import scan
from manyheads.lab.search import Place
from manyheads.testing import assert_within_budget, sample_qkv


def call(place: Place, qkv: tuple[Tensor, ...], *, gated: bool = False, backend: str = "triton") -> Callable[[], Any]:
    """Forward or backward of the engine under a decay per token.

    Args:
        place: The row of the table: its kind says whether outputs, gradients, or also those of the decay are wanted.
        qkv: Queries, keys and values.
        gated: Whether also under an input gate, and normalised.
        backend: Of the engine.

    Returns:
        A call that gives the output, or a tuple of gradients.

    Example:
        >>> place = Place("mix", "sm_90", 64, 4, "sums")
        >>> qkv = sample_qkv(1, 1, 5, width=8, seed=0)
        >>> [tuple(t.shape) for t in call(place, qkv, backend="blocked")()]
        [(1, 1, 5, 8), (1, 1, 5, 8), (1, 1, 5, 8), (1, 1, 5)]
    """
    q, k, v = qkv
    draws = torch.Generator().manual_seed(13)
    shape, wide = q.shape[:3], torch.promote_types(q.dtype, torch.float32)
    decay, gate = (torch.rand(shape, generator=draws).to(q.device, wide) for _ in range(2))
    decay = -0.1 * decay
    options: dict[str, Any] = {"scale": q.shape[3] ** -0.5, "backend": backend}
    if gated:
        options |= {"gate": gate, "normalise": "max1"}
    if place.kind == "forward":
        return lambda: scan(q, k, v, decay=decay, **options)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *([decay] if place.kind == "sums" else []))]
    out = scan(*leaves[:3], decay=leaves[3] if place.kind == "sums" else decay, **options)
    assert isinstance(out, Tensor)
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def agrees(place: Place, device: str, dtype: torch.dtype) -> None:
    """Compares the kernels with the reference on a small, odd, gated problem.

    Args:
        place: The row of the table.
        device: Where the kernels run.
        dtype: Of queries, keys and values.

    Raises:
        AssertionError: They differ by more than rounding.
    """
    qkv = sample_qkv(2, 4, 150, kv_heads=2, width=place.width, dtype=dtype, seed=11)

    def results(backend: str, where: str, kind: torch.dtype) -> list[Tensor]:
        found = call(place, tuple(t.to(where, kind) for t in qkv), gated=True, backend=backend)()
        return [found] if isinstance(found, Tensor) else list(found)

    exact, plain = results("reference", "cpu", torch.float64), results("reference", "cpu", dtype)
    for i, (a, r, s) in enumerate(zip(results("triton", device, dtype), exact, plain, strict=True)):
        # the gradient of a decay stays wide, of factors that were rounded once
        coarse = r.to(dtype) if a.dtype != dtype else s
        assert_within_budget(a.cpu(), r.double(), coarse, what=f"result {i}")
