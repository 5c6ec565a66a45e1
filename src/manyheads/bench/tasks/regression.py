"""In-context regression of a function that changes: a linear map and a region of its own for each segment."""

from __future__ import annotations

import torch
from torch import Generator

from .base import Batch, Task

_NOISE = 0.05
_SPREAD = 0.7


def task(length: int = 64, segments: int = 4, width: int = 4, outputs: int = 2) -> Task:
    """Makes the task.

    Args:
        length: Tokens of an example.
        segments: Pieces of equal length, each with its own function.
        width: Channels of x.
        outputs: Channels of y.

    Returns:
        The task. In segment s, ``x ~ c_s + 0.7 N(0, 1)`` and ``y = b_s + A_s (x - c_s) + 0.05 N(0, 1)`` with the
        center ``c_s ~ N(0, 1)``, the offset ``b_s ~ N(0, 1)`` and the entries of ``A_s ~ N(0, 1 / width)``. Token t
        holds the last pair and the next question, ``(x_{t-1}, y_{t-1}, x_t)``; the answer is ``y_t``. The first token
        of a segment, about which nothing can be known, is not judged.

    Raises:
        ValueError: Segments that do not divide the length.

    Source:
        The piecewise linear test-time regression of Local Linear Attention, arXiv 2510.01450; sizes are our own.

    Example:
        >>> task(8, 2).draw(3, torch.Generator().manual_seed(0), False).inputs.shape
        torch.Size([3, 8, 10])
    """
    if segments < 1 or length % segments:
        raise ValueError(f"segments: expected a divisor of length={length}, got {segments}")

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(count, *shape, generator=generator)

        center, offset = normal(segments, 1, width), normal(segments, 1, outputs)
        slope = normal(segments, width, outputs) / width**0.5
        away = _SPREAD * normal(segments, length // segments, width)
        y = offset + away @ slope + _NOISE * normal(segments, length // segments, outputs)
        x, y = (center + away).flatten(1, 2), y.flatten(1, 2)
        before = torch.cat((x, y), 2).roll(1, 1)
        before[:, 0] = 0
        judged = (torch.arange(length) % (length // segments) > 0).expand(count, length)
        return Batch(torch.cat((before, x), 2), y, torch.ones_like(judged), judged)

    return Task(
        "regression",
        f"a linear function that changes {segments - 1} times in {length} pairs",
        2 * width + outputs,
        outputs,
        length,
        "relative error",
        1.0,
        draw,
        tokens=False,
    )
