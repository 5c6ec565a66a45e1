"""What an iterative solver gives back, and what it does when it is not done."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...common.errors import unknown

Unconverged = Literal["warn", "raise", "ignore"]
_CHOICES = ("warn", "raise", "ignore")


class ConvergenceError(ArithmeticError):
    """An iteration ended before its residual was as small as asked."""


class Solution(NamedTuple):
    """Solutions of many systems, and how far each one came.

    Attributes:
        x: The solutions.
        residual: Norm of what is left, relative to the right-hand side, for each system.
        steps: Steps that each system took before it was frozen, int64.
        converged: Whether its residual is at most the tolerance, bool.
    """

    x: Tensor
    residual: Tensor
    steps: Tensor
    converged: Tensor


def checked_choice(unconverged: str) -> str:
    """The choice itself.

    Raises:
        ValueError: For a name that does not exist, with the nearest.
    """
    if unconverged not in _CHOICES:
        raise unknown("choice of unconverged", str(unconverged), _CHOICES)
    return unconverged


def report(what: str, residual: Tensor, converged: Tensor, tol: float, unconverged: str) -> None:
    """Warns of systems that did not converge, or raises.

    Args:
        what: Who solved, for the message.
        residual: Relative residuals.
        converged: Which systems are done.
        tol: What was asked.
        unconverged: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Raises:
        ConvergenceError: With ``"raise"``, when some system is not done.
    """
    if unconverged == "ignore" or bool(converged.all()):
        return
    worst = float(residual.nan_to_num(nan=float("inf")).max())
    left = int((~converged).sum())
    text = (
        f"{what}: {left} of {converged.numel()} systems did not converge: relative residual up to {worst:.2g}, "
        f"asked for {tol:.2g}; allow more steps, a larger tolerance or a larger ridge"
    )
    if unconverged == "raise":
        raise ConvergenceError(text)
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def default_tolerance(dtype: torch.dtype) -> float:
    """What a well-conditioned system reaches without effort: the rounding unit to the power of 0.6."""
    return float(torch.finfo(dtype).eps**0.6)


def full_precision(name: str, t: Tensor) -> None:
    """Checks that a tensor is one that a solver can work in.

    Raises:
        TypeError: For what is not float32 or float64.
    """
    if not isinstance(t, Tensor) or t.dtype not in (torch.float32, torch.float64):
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected a tensor in float32 or float64, got {got}")
