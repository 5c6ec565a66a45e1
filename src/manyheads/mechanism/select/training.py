"""Parts of training: from dense to sparse over the steps, and gates that learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Warmup:
    """A schedule from dense to sparse attention.

    While it is dense an indexer learns from attention to everything; then the number of kept blocks falls by equal
    steps to what the model will keep.

    Attributes:
        dense: Training steps with everything kept.
        ramp: Further steps over which the number falls; 0 to switch at once.

    Raises:
        ValueError: Negative numbers.

    Example:
        >>> warmup = Warmup(dense=100, ramp=40)
        >>> [warmup.keep(step, 16, blocks=64) for step in (0, 99, 120, 140, 10**6)]
        [64, 64, 40, 16, 16]
    """

    dense: int
    ramp: int = 0

    def __post_init__(self) -> None:
        for name in ("dense", "ramp"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of steps >= 0, got {getattr(self, name)}")

    def is_dense(self, step: int) -> bool:
        """Whether everything is kept at a step, counted from 0."""
        return step < self.dense

    def keep(self, step: int, keep: int, *, blocks: int) -> int:
        """How many blocks are kept at a step.

        Args:
            step: Training step, from 0.
            keep: Blocks kept in the end.
            blocks: Blocks that there are; no more are ever kept.

        Returns:
            A number from ``min(keep, blocks)`` to ``blocks``.

        Raises:
            ValueError: ``keep`` or ``blocks`` below 1, or a negative step.
        """
        if step < 0:
            raise ValueError(f"step: expected a number >= 0, got {step}")
        if keep < 1 or blocks < 1:
            name, value = ("keep", keep) if keep < 1 else ("blocks", blocks)
            raise ValueError(f"{name}: expected at least 1 block, got {value}")
        least = min(keep, blocks)
        left = self.dense + self.ramp - step
        if self.is_dense(step):
            return blocks
        return least if left <= 0 else least + -(-(blocks - least) * left // (self.ramp + 1))


def gated(outs: Sequence[Float[Tensor, "B H N D"]], gates: Float[Tensor, "B S N O"]) -> Float[Tensor, "B H N D"]:
    """The sum of the outputs of several branches, each times its gate.

    Args:
        outs: O tensors (B, H, N, D).
        gates: (B, S, N, O), S is H or 1: values, such as a sigmoid of a projection; any dtype of floats.

    Returns:
        (B, H, N, D) in the dtype of the outputs, summed in that of the wider. Differentiable in both.

    Raises:
        ValueError: Another number of gates than of outputs, or shapes that do not fit.

    Example:
        >>> one = torch.ones(1, 2, 3, 4)
        >>> gated([one, 10 * one], torch.tensor([1.0, 0.5]).expand(1, 1, 3, 2)).unique()
        tensor([6.])
    """
    if not outs or gates.dim() != 4 or gates.shape[-1] != len(outs):
        raise ValueError(f"gates: expected (B, H|1, N, O={len(outs)}), got {tuple(gates.shape)}")
    for i, out in enumerate(outs):
        fits = out.shape == outs[0].shape and gates.shape[0] == out.shape[0] and gates.shape[2] == out.shape[2]
        if not fits or gates.shape[1] not in (1, out.shape[1]):
            raise ValueError(f"outs[{i}]: shape {tuple(out.shape)} does not fit gates {tuple(gates.shape)}")
    total = outs[0] * gates[..., 0, None]
    for i, out in enumerate(outs[1:], 1):
        total = total + out * gates[..., i, None]
    return total.to(outs[0].dtype)


def straight_through(logits: Float[Tensor, "*B O"], *, temperature: float = 1.0) -> Float[Tensor, "*B O"]:
    """The best of some options as one and the others as zero, with the gradient of their softmax.

    Args:
        logits: (..., O).
        temperature: Divides the logits of the softmax; positive.

    Returns:
        (..., O) of zeros and ones, one a row; of equal logits the first.

    Raises:
        ValueError: A temperature that is not positive.

    Example:
        >>> straight_through(torch.tensor([0.1, 0.7, 0.3])).tolist()
        [0.0, 1.0, 0.0]
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    soft = (logits / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


def with_loss(x: Float[Tensor, "*shape"], loss: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Hands a tensor through; in the backward pass a loss beside it gets the gradient 1.

    So a layer trains its indexer wherever its output is used, whatever the loss of the model is.

    Args:
        x: Any tensor that takes part in the loss of the model.
        loss: A scalar; multiply it by its weight.

    Returns:
        ``x``.

    Example:
        >>> x, w = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        >>> with_loss(x, 2 * w).sum().backward()
        >>> w.grad
        tensor(2.)
    """
    found: Tensor = _Beside.apply(x, loss)
    return found


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
