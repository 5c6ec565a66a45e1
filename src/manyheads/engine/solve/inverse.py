"""Inverses by matrix products alone: the Newton-Schulz iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .result import Solution, checked_choice, default_tolerance, full_precision, report


def newton_schulz(
    a: Tensor, *, tol: float | None = None, max_steps: int = 64, unconverged: str = "warn"
) -> Solution:
    r"""Inverts many matrices at once by ``X <- X (2 I - A X)``, which doubles the correct digits of every step.

    It starts from ``A^T / (|A|_1 |A|_inf)``, from which it converges for every invertible matrix, in about
    ``2 log2(cond A)`` steps and a few more. Matrices that are done are frozen.

    Args:
        a: ``(..., D, D)``, float32 or float64.
        tol: Largest ``|I - A X|_F / sqrt(D)``; by default the rounding unit to the power of 0.6.
        max_steps: Most steps.
        unconverged: What to do when a matrix is not done (it may be singular): ``"warn"``, ``"raise"`` or
            ``"ignore"``.

    Returns:
        A :class:`Solution` with ``x`` the inverses; its gradient ``-X^T dX X^T`` needs no iteration.

    Raises:
        ValueError: For shapes, numbers or choices that make no sense.
        TypeError: For other dtypes.
        ConvergenceError: With ``unconverged="raise"``.

    Example:
        >>> found = newton_schulz(torch.tensor([[2.0, 1.0], [0.0, 4.0]]))
        >>> (found.x * 1000).round().tolist(), found.converged
        ([[500.0, -125.0], [0.0, 250.0]], tensor(True))
    """
    full_precision("a", a)
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] == 0:
        raise ValueError(f"a: expected shape (..., D, D) with D > 0, got {tuple(a.shape)}")
    asked = default_tolerance(a.dtype) if tol is None else float(tol)
    if not 0.0 < asked < 1.0:
        raise ValueError(f"tol: expected a number in (0, 1), got {tol}")
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    checked_choice(unconverged)
    x, residual, steps, converged = _Inverse.apply(a, asked, max_steps)
    report("newton_schulz", residual, converged, asked, unconverged)
    return Solution(x, residual, steps, converged)


class _Inverse(torch.autograd.Function):
    """An inverse, whose gradient is two products with it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, tol: float, most: int) -> tuple[Tensor, ...]:
        found = _iterate(a, tol, most)
        ctx.save_for_backward(found.x)
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return -(x.mT @ dx @ x.mT), None, None


def _iterate(a: Tensor, tol: float, most: int) -> Solution:
    size = a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1)
    x = a.mT / size.masked_fill(size == 0, 1.0)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    steps = torch.zeros(a.shape[:-2], dtype=torch.int64, device=a.device)
    product = a @ x
    residual = _left(eye, product)
    for _ in range(most):
        active = residual > tol
        if not bool(active.any()):
            break
        x = torch.where(active[..., None, None], 2.0 * x - x @ product, x)
        product = a @ x
        residual = _left(eye, product)
        steps += active
    return Solution(x, residual, steps, residual <= tol)


def _left(eye: Tensor, product: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(eye - product) / eye.shape[0] ** 0.5
