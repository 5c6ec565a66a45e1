"""How a score becomes a weight: the softmax, the sigmoid, or a classical kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import unknown


@dataclass(frozen=True, slots=True)
class Weight:
    """A non-negative function of the score, and whether the weights of a row are made to sum to one.

    Attributes:
        name: What callers write.
        value: Score to weight, elementwise; None for the softmax, which is computed relative to the row maximum.
        slope: Derivative of ``value``, from the score and the weight.
        normalised: Whether the output is divided by the sum of the weights.
    """

    name: str
    value: Callable[[Tensor], Tensor] | None
    slope: Callable[[Tensor, Tensor], Tensor] | None
    normalised: bool = True

    @property
    def softmax(self) -> bool:
        """Whether this is the softmax."""
        return self.value is None


def _relu(s: Tensor) -> Tensor:
    return s.clamp_min(0.0)


def _step(s: Tensor, _: Tensor) -> Tensor:
    return (s > 0).to(s.dtype)


def _epanechnikov(s: Tensor) -> Tensor:
    return (1.0 - s * s).clamp_min(0.0)


def _cone(s: Tensor) -> Tensor:
    return (1.0 - s.clamp_min(0.0).sqrt()).clamp_min(0.0)


def _cone_slope(s: Tensor, w: Tensor) -> Tensor:
    """At the tip, where the cone has no slope, 0."""
    inside = (w > 0) & (s > 0)
    return torch.where(inside, -0.5 * torch.where(inside, s, 1.0).rsqrt(), 0.0)


WEIGHTS = {
    w.name: w
    for w in (
        Weight("softmax", None, None),
        Weight("sigmoid", torch.sigmoid, lambda s, w: w * (1.0 - w), normalised=False),
        Weight("relu", _relu, _step),
        Weight("boxcar", lambda s: (s.abs() <= 1.0).to(s.dtype), lambda s, w: torch.zeros_like(s)),
        Weight("triangular", lambda s: (1.0 - s.abs()).clamp_min(0.0), lambda s, w: -torch.sign(s) * (w > 0)),
        Weight("epanechnikov", _epanechnikov, lambda s, w: -2.0 * s * (w > 0)),
        Weight("gaussian", lambda s: torch.exp(-0.5 * s * s), lambda s, w: -s * w),
        Weight("cone", _cone, _cone_slope),
        Weight("constant", torch.ones_like, lambda s, w: torch.zeros_like(s)),
    )
}
"""Every weight by name. The classical kernels act on the score itself, so ``gaussian`` is ``exp(-s^2 / 2)``;
``cone`` is ``1 - sqrt(s)``, the triangular kernel of a distance for scores that are squared distances."""


def weight_named(name: str) -> Weight:
    """Looks up a weight.

    Args:
        name: One of ``WEIGHTS``.

    Returns:
        The weight.

    Raises:
        ValueError: For an unknown name, with the nearest.

    Example:
        >>> weight_named("sigmoid").normalised
        False
    """
    try:
        return WEIGHTS[name]
    except KeyError:
        raise unknown("weight", name, WEIGHTS) from None
