"""Conjugate gradients for many symmetric positive definite systems at once, without their matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .result import Solution, checked_choice, default_tolerance, full_precision, report

Matvec = Callable[..., Tensor]


def conjugate_gradient(
    matvec: Matvec,
    b: Tensor,
    *params: Tensor,
    tol: float | None = None,
    max_steps: int | None = None,
    start: Tensor | None = None,
    unconverged: str = "warn",
) -> Solution:
    r"""Solves ``A x = b`` for many symmetric positive definite ``A`` that are known by their products only.

    Every system is frozen as soon as its own residual is small, so that one hard system does not spoil the others by
    rounding. The residual that ends it is computed anew from ``x``, not carried along.

    Gradients are implicit: with ``y = A^-1 dx`` from one more solve, ``db = y`` and ``dA = -y x^T``, which reaches
    ``params`` through one product. Memory does not grow with the steps.

    Args:
        matvec: ``matvec(x, *params)`` gives ``A x`` in the shape of ``x``; ``A`` must be symmetric.
        b: Right-hand sides ``(..., D)``, one system for each index before the last; float32 or float64.
        *params: Tensors that ``A`` is made of and that may need gradients. What ``matvec`` reads otherwise is constant.
        tol: Residual asked for, relative to ``b``; by default the rounding unit to the power of 0.6.
        max_steps: Most steps of a system; ``4 * D`` by default.
        start: Where to begin, in the shape of ``b``; zero by default.
        unconverged: What to do when a system is not done: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        A :class:`Solution`; a system with ``b = 0`` is done at once.

    Raises:
        ValueError: For shapes, numbers or choices that make no sense.
        TypeError: For other dtypes.
        ConvergenceError: With ``unconverged="raise"``.

    Example:
        >>> a = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> found = conjugate_gradient(lambda x, a: x @ a, torch.tensor([[1.0, 2.0]]), a)
        >>> found.x, found.steps
        (tensor([[0.0909, 0.6364]]), tensor([2]))
    """
    full_precision("b", b)
    if b.dim() < 1 or b.shape[-1] == 0:
        raise ValueError(f"b: expected shape (..., D) with D > 0, got {tuple(b.shape)}")
    if start is not None and start.shape != b.shape:
        raise ValueError(f"start: expected the shape of b, {tuple(b.shape)}, got {tuple(start.shape)}")
    asked = default_tolerance(b.dtype) if tol is None else float(tol)
    if not 0.0 < asked < 1.0:
        raise ValueError(f"tol: expected a number in (0, 1), got {tol}")
    most = 4 * b.shape[-1] if max_steps is None else int(max_steps)
    if most < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    checked_choice(unconverged)
    x, residual, steps, converged = _Implicit.apply(matvec, (asked, most, unconverged), start, b, *params)
    report("conjugate_gradient", residual, converged, asked, unconverged)
    return Solution(x, residual, steps, converged)


class _Implicit(torch.autograd.Function):
    """A solve whose gradient is another solve."""

    @staticmethod
    def forward(
        ctx: Any, matvec: Matvec, how: tuple[float, int, str], start: Tensor | None, b: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        def product(x: Tensor) -> Tensor:
            got = matvec(x, *params)
            if got.shape != b.shape:
                shapes = f"{tuple(b.shape)}, got {tuple(got.shape)}"
                raise ValueError(f"matvec: expected a product of the shape of b, {shapes}")
            return got

        found = iterate(product, b, how[0], how[1], start)
        ctx.matvec, ctx.how = matvec, how
        ctx.save_for_backward(found.x, *params)
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        tol, most, unconverged = ctx.how
        found = iterate(lambda t: ctx.matvec(t, *params), dx, tol, most)
        report("conjugate_gradient (gradient)", found.residual, found.converged, tol, unconverged)
        wants = ctx.needs_input_grad[4:]
        grads: list[Tensor | None] = [None] * len(params)
        if any(wants):
            with torch.enable_grad():
                fresh = [p.detach().requires_grad_(w) for p, w in zip(params, wants, strict=True)]
                product = ctx.matvec(x.detach(), *fresh)
            live = [p for p in fresh if p.requires_grad]
            got = iter(torch.autograd.grad(product, live, -found.x, allow_unused=True))
            grads = [next(got) if w else None for w in wants]
        return None, None, None, found.x, *grads


def iterate(
    matvec: Callable[[Tensor], Tensor], b: Tensor, tol: float, most: int, start: Tensor | None = None
) -> Solution:
    """The iteration itself, without gradients and without complaints.

    Args:
        matvec: ``A x`` for ``x`` in the shape of ``b``.
        b: ``(..., D)``.
        tol: Relative residual at which a system is frozen.
        most: Most steps.
        start: Where to begin; zero by default.

    Returns:
        A :class:`Solution`.
    """
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - matvec(x)
    size = torch.linalg.vector_norm(b, dim=-1)
    enough = (tol * size).square()
    steps = torch.zeros(b.shape[:-1], dtype=torch.int64, device=b.device)
    direction, rr = r.clone(), r.square().sum(-1)
    active = rr > enough
    broken = torch.zeros_like(active)
    believed = torch.full_like(rr, torch.inf)
    pause = 1 if b.device.type == "cpu" else 8  # steps between two looks at a device's results
    for step in range(most):
        if step % pause == 0 and not bool(active.any()):
            # what was carried along says that all are done: believe only a residual computed anew
            r = b - matvec(x)
            rr = r.square().sum(-1)
            # where going on did not halve it, rounding is the reason
            active = (rr > enough) & ~broken & (rr < believed / 4)
            believed = rr
            if not bool(active.any()):
                break
            direction = r.clone()
        product = matvec(direction)
        bend = (direction * product).sum(-1)
        broken = broken | (active & ~(bend > 0))
        active = active & (bend > 0)
        length = torch.where(active, rr / bend.masked_fill(~active, 1.0), 0.0)[..., None]
        x = torch.addcmul(x, length, direction)
        r = torch.addcmul(r, length, product, value=-1)
        new = r.square().sum(-1)
        steps += active
        turn = torch.where(active, new / rr.masked_fill(~active, 1.0), 0.0)[..., None]
        direction = torch.addcmul(r, turn, direction)
        rr = torch.where(active, new, rr)
        active = active & (rr > enough)
    left = torch.linalg.vector_norm(b - matvec(x), dim=-1)
    residual = left / size.masked_fill(size == 0, 1.0)
    return Solution(x, residual, steps, left <= tol * size)
