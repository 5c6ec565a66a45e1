"""The normal equations of every query: ``(Cov_p(k, k) + ridge I) x = b``, directly or by conjugate gradients."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import unknown
from ..tiled import products
from ..tiled.passes import Strip, flat, stacked, strips
from ..tiled.plan import Plan, fetch, plan_of
from ..tiled.problem import Problem
from .blocked import chunks, exponentials, hidden, pairs
from .conjugate import iterate
from .result import Solution, checked_choice, report

METHODS = ("direct", "cg")
_DIRECT_WIDTH = 32  # width of the keys up to which moments are formed
_FEATURES = 1 << 22  # products of keys held at once
_MOMENTS = 1 << 23  # entries of the matrices of a batch of queries
_KEPT = 1 << 22  # weights of a strip that are kept over the sweeps rather than made again


@dataclass(frozen=True)
class Solver:
    """How the system of every query is solved.

    Forming the ``D x D`` matrices takes ``D (D + 1)`` operations for a pair of tokens and a factorisation for every
    query; a step of conjugate gradients takes ``4 D`` and two passes over the weights, whatever the conditioning.
    ``auto`` forms them up to width 32, where both were measured to cost the same; at width 64 and ridges from 0.01
    the iteration took half the time, at 128 a fifth. Choose ``"direct"`` for tiny ridges or strongly correlated keys,
    which cost the iteration many steps.

    Args:
        method: ``"auto"``, ``"direct"`` (moments and Cholesky factors, a few queries at a time) or ``"cg"``
            (conjugate gradients, matrix-free).
        tol: Relative residual for ``"cg"``. By default as small as rounding lets it become, down to the rounding unit
            to the power of 3/4; what stays above its square root counts as not converged.
        steps: Most steps for ``"cg"``; ``4 * D`` by default.
        unconverged: ``"warn"``, ``"raise"`` or ``"ignore"`` when some query is not done after them.

    Raises:
        ValueError: For names that do not exist or numbers out of range.

    Example:
        >>> Solver("cg", tol=1e-4).steps is None
        True
    """

    method: str = "auto"
    tol: float | None = None
    steps: int | None = None
    unconverged: str = "warn"

    def __post_init__(self) -> None:
        if self.method not in ("auto", *METHODS):
            raise unknown("solver", str(self.method), ("auto", *METHODS))
        if self.tol is not None and not 0.0 < self.tol < 1.0:
            raise ValueError(f"tol: expected a number in (0, 1), got {self.tol}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        checked_choice(self.unconverged)

    def chosen(self, width: int) -> str:
        """The method for keys of a width."""
        return self.method if self.method != "auto" else "direct" if width <= _DIRECT_WIDTH else "cg"

    @property
    def text(self) -> str:
        """All of it in one line, as operators carry it."""
        return f"{self.method} {self.tol or 0.0!r} {self.steps or 0} {self.unconverged}"

    @classmethod
    def read(cls, text: str) -> Solver:
        """The solver behind its text."""
        method, tol, steps, unconverged = text.split()
        return cls(method, float(tol) or None, int(steps) or None, unconverged)


def solve(p: Problem, lse: Tensor, mean: Tensor, b: Tensor, ridge: Tensor, solver: Solver) -> Tensor:
    """Solutions ``x_i`` of every query's system.

    Args:
        p: Queries, keys, layout and scale, in float32 or float64.
        lse: ``(B, H, Nq)``, ``-inf`` for queries that see nothing: they get 0.
        mean: Mean keys ``(B, H, Nq, D)``.
        b: Right-hand sides ``(B, H, Nq, D)``.
        ridge: ``(H,)``.
        solver: How.

    Returns:
        ``(B, H, Nq, D)``.

    Raises:
        ValueError: For a system that is singular under a ridge of 0.
        ConvergenceError: When iterations run out and the solver is to raise.
    """
    plan, x = plan_of(p.layout), torch.zeros_like(b)
    direct = solver.chosen(p.k.shape[3]) == "direct"
    unit = torch.finfo(b.dtype).eps
    tol, enough = (unit**0.75, unit**0.5) if solver.tol is None else (solver.tol, solver.tol)
    left = []
    for strip in strips(p, plan):
        if not strip.row.segments:
            continue
        at = (strip.b, strip.h, slice(strip.row.q0, strip.row.q1))
        added = ridge[strip.h, None, None].expand(*b[at].shape[:3], 1)
        seen, centre, sides, added = (stacked(t, p) for t in (lse[at][..., None], mean[at], b[at], added))
        task = _Task(p, plan, strip, seen, centre, sides, added)
        if direct:
            found = task.direct()
        else:
            found, residual, *_ = task.iterated(tol, solver.steps or 4 * b.shape[3])
            left.append(residual.flatten())
        x[at] = found.view(x[at].shape)
    if left:
        residual = torch.cat(left)
        converged = residual <= enough
        if not bool((ridge > 0).all()) and not bool(converged.all()):
            raise singular(int((~converged).sum()))
        report("local_linear", residual, converged, enough, solver.unconverged)
    return x


def singular(number: int) -> ValueError:
    """The error for queries whose keys do not span the space and that have no ridge."""
    return ValueError(
        f"ridge: 0 leaves the systems of {number} queries singular: they see too few keys, or keys in a subspace; "
        "expected a positive ridge, such as 1e-2"
    )


@dataclass
class _Task:
    """The systems of one strip, stacked as ``(Z, R)``, relative to the average of their mean keys."""

    p: Problem
    plan: Plan
    strip: Strip
    lse: Tensor
    mean: Tensor
    b: Tensor
    ridge: Tensor

    def __post_init__(self) -> None:
        self.empty = self.lse == -torch.inf
        seen = (~self.empty).sum(1, keepdim=True).clamp_min(1)
        self.centre = self.mean.sum(1, keepdim=True) / seen  # covariances do not see it, rounding does
        self.mean = (self.mean - self.centre).masked_fill(self.empty, 0.0)
        self.b = self.b.masked_fill(self.empty, 0.0)
        self.ridge = self.ridge.masked_fill(self.empty, 1.0)

    def sweep(self, columns: int | None = None) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """Starts sweeps over normalised weights ``(Z, R, C)`` and centred keys ``(Z, C, D)``, some keys at a time.

        The weights of a strip that is small enough are made once for all sweeps.
        """
        p, strip = self.p, self.strip

        def made() -> Iterator[tuple[Tensor, Tensor]]:
            q = stacked(p.q[strip.b, strip.h, strip.row.q0 : strip.row.q1], p)
            for segments in chunks(self.plan, strip, columns):
                k = flat(fetch(p.k[strip.b, strip.kv], segments))
                s = hidden(p, self.plan, strip, products.scores(q, k), segments)
                yield exponentials(s, p.scale, self.lse), k - self.centre

        if pairs(strip) > _KEPT:
            return made
        kept = list(made())
        return lambda: iter(kept)

    def direct(self) -> Tensor:
        """By moments and Cholesky factors."""
        z, n, d = self.b.shape
        i, j = torch.tril_indices(d, d, device=self.b.device)
        batch = max(1, _MOMENTS // (d * d))  # queries of one key head whose matrices are held at once
        sweep = self.sweep(max(1, _FEATURES // i.numel()))
        x = torch.empty_like(self.b)
        for h, r0 in itertools.product(range(z), range(0, n, batch)):
            rows = slice(r0, r0 + batch)
            mean, ridge = self.mean[h, rows], self.ridge[h, rows]
            moments = mean.new_zeros(mean.shape[0], i.numel())
            for weights, k in sweep():
                moments.addmm_(weights[h, rows], k[h][:, i] * k[h][:, j])
            matrix = moments.new_zeros(mean.shape[0], d, d)
            matrix[:, i, j] = moments - mean[:, i] * mean[:, j]
            matrix.diagonal(dim1=1, dim2=2).add_(ridge)
            x[h, rows] = torch.cholesky_solve(self.b[h, rows, :, None], factors(matrix, ridge[:, 0]))[..., 0]
        return x

    def iterated(self, tol: float, most: int) -> Solution:
        """By conjugate gradients; a step is one sweep over the keys."""
        sweep = self.sweep()

        def matvec(x: Tensor) -> Tensor:
            level = (x * self.mean).sum(-1, keepdim=True)
            y = self.ridge * x
            for weights, k in sweep():
                t = products.scores(x, k).sub_(level).mul_(weights)
                y = y.add_(products.average(t, k)).sub_(t.sum(-1, keepdim=True) * self.mean)
            return y

        return iterate(matvec, self.b, tol, most)


def factors(matrix: Tensor, ridge: Tensor) -> Tensor:
    """Cholesky factors of normal matrices.

    Args:
        matrix: ``(R, D, D)`` with the lower triangle filled, the ridge on its diagonal.
        ridge: ``(R,)``.

    Returns:
        Lower triangular ``(R, D, D)``.

    Raises:
        ValueError: Where a matrix without a ridge is singular up to rounding.
    """
    size = matrix.diagonal(dim1=1, dim2=2).amax(-1)
    noise = 8 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps * size
    factor, bad = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=1, dim2=2).amin(-1).square()
    lost = (ridge == 0) & ((bad != 0) | ~(pivots > noise))
    if bool(lost.any()):
        raise singular(int(lost.sum()))
    failed = bad != 0
    if bool(failed.any()):
        warnings.warn(
            f"ridge: {float(ridge[failed].max()):.2g} is below the rounding of the moments of {int(failed.sum())} "
            f"queries; up to {float(noise[failed].max()):.2g} is added to make them definite",
            RuntimeWarning,
            stacklevel=2,
        )
        matrix = matrix + torch.diag_embed((failed * noise)[:, None].expand(matrix.shape[:2]))
        factor = torch.linalg.cholesky_ex(matrix)[0]
    return factor
