"""The Triton backend: what it refuses, and the launches of a problem."""

from __future__ import annotations

from torch import Tensor

from ..gpu import refuse as refuse
from .problem import Grads, Problem


def refuse_call(q: Tensor, v: Tensor) -> list[str]:
    """Why the kernels cannot take some tensors; empty when they can."""
    return ["it has no kernels yet; use backend='blocked'"]


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of a problem."""
    raise NotImplementedError


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of a problem."""
    raise NotImplementedError
