"""Lower triangular systems whose rows are made on demand: forward substitution by blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .result import full_precision

Rows = Callable[..., Tensor]


def triangular(rows: Rows, b: Tensor, *params: Tensor, block: int = 64, unit: bool = False) -> Tensor:
    r"""Solves ``L x = b`` for lower triangular ``L`` that is never held whole.

    ``x_I = L_II^-1 (b_I - L_I,<I x_<I)`` for one block ``I`` of rows after another. Gradients are implicit: the
    transposed system is solved from the last block to the first, with the rows made again. Memory is
    ``N * (E + block)``.

    Args:
        rows: ``rows(i0, i1, *params)`` gives rows ``i0`` to ``i1`` of ``L``, ``(..., i1 - i0, i1)``. What lies above
            the diagonal is not read.
        b: Right-hand sides ``(..., N, E)``; float32 or float64. The dimensions before the last two must hold those
            of the rows.
        *params: Tensors that the rows are made of and that may need gradients.
        block: Rows made together.
        unit: Whether to take the diagonal for ones without reading it.

    Returns:
        ``x`` in the shape of ``b``.

    Raises:
        ValueError: For shapes that do not fit, or a zero on the diagonal.
        TypeError: For other dtypes.

    Example:
        >>> full = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [3.0, 2.0, 4.0]])
        >>> triangular(lambda i0, i1: full[i0:i1, :i1], torch.tensor([[2.0], [3.0], [11.0]]), block=2)
        tensor([[1.],
                [2.],
                [1.]])
    """
    full_precision("b", b)
    if b.dim() < 2:
        raise ValueError(f"b: expected shape (..., N, E), got {tuple(b.shape)}")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block: expected a positive number of rows, got {block!r}")
    return _Implicit.apply(rows, block, unit, b, *params)


class _Implicit(torch.autograd.Function):
    """A solve whose gradient is the transposed one."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, block: int, unit: bool, b: Tensor, *params: Tensor) -> Tensor:
        x, n = torch.empty_like(b), b.shape[-2]
        for i0 in range(0, n, block):
            i1 = min(i0 + block, n)
            part = _made(rows, i0, i1, params, b, unit)
            rest = b[..., i0:i1, :] - part[..., :i0] @ x[..., :i0, :]
            x[..., i0:i1, :] = torch.linalg.solve_triangular(part[..., i0:], rest, upper=False, unitriangular=unit)
        ctx.rows, ctx.block, ctx.unit = rows, block, unit
        ctx.save_for_backward(x, *params)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        wants = ctx.needs_input_grad[4:]
        fresh = [p.detach().requires_grad_(w) for p, w in zip(params, wants, strict=True)]
        live = [p for p in fresh if p.requires_grad]
        totals: list[Tensor | None] = [None] * len(live)
        left, db, n = dx.clone(), torch.empty_like(dx), dx.shape[-2]
        for i0 in reversed(range(0, n, ctx.block)):
            i1 = min(i0 + ctx.block, n)
            with torch.enable_grad():
                made = _made(ctx.rows, i0, i1, fresh, x, ctx.unit)
            part = made.detach()
            y = torch.linalg.solve_triangular(
                part[..., i0:].mT, left[..., i0:i1, :], upper=True, unitriangular=ctx.unit
            )
            db[..., i0:i1, :] = y
            left[..., :i0, :] -= part[..., :i0].mT @ y
            if live and made.requires_grad:
                grad = -(y @ x[..., :i1, :].mT).tril(i0 - 1 if ctx.unit else i0)
                got = torch.autograd.grad(made, live, grad.sum_to_size(made.shape), allow_unused=True)
                totals = [t if g is None else g if t is None else t + g for t, g in zip(totals, got, strict=True)]
        found = iter(totals)
        return None, None, None, db, *[next(found) if w else None for w in wants]


def _made(rows: Rows, i0: int, i1: int, params: Any, b: Tensor, unit: bool) -> Tensor:
    """Some rows, checked."""
    part = rows(i0, i1, *params)
    if part.dim() < 2 or tuple(part.shape[-2:]) != (i1 - i0, i1):
        raise ValueError(
            f"rows: expected (..., {i1 - i0}, {i1}) for rows {i0} to {i1}, got shape {tuple(part.shape)}"
        )
    if part.dtype != b.dtype:
        raise ValueError(f"rows: expected the dtype of b, {b.dtype}, got {part.dtype}")
    if not unit and b.device.type == "cpu":
        zero = part.detach()[..., i0:].diagonal(dim1=-2, dim2=-1) == 0
        if bool(zero.any()):
            row = i0 + int(zero.flatten(0, -2).any(0).nonzero()[0]) if zero.dim() > 1 else i0 + int(zero.nonzero()[0])
            raise ValueError(f"rows: row {row} has a zero on its diagonal; the system is singular")
    return part
