"""Contexts inside which a call of attention means more than its own tensors say.

A module of a higher layer enters one; the front door asks here, so that it need not know that layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from .errors import UnsupportedError


class Scope(Protocol):
    """What the front door hands its calls to."""

    @property
    def attend(self) -> Callable[..., Any]:
        """Runs a call of ``attention``, with its arguments."""

    @property
    def explain(self) -> Callable[..., Any]:
        """Answers a call of ``explain``, with its arguments."""

    def positions(self) -> Tensor:
        """Logical positions of the tokens that this process holds."""


active: list[Scope] = []
"""The contexts that are entered, the innermost last."""


def refuse_inside(what: str) -> None:
    """Raises where a call inside a context would see only this process's tokens.

    Args:
        what: The function that was called.

    Raises:
        UnsupportedError: Inside a context.

    Example:
        >>> refuse_inside("tiled")
    """
    if active:
        raise UnsupportedError(
            f"{what}: inside a parallel context it would see only the tokens of this rank; use manyheads.attention"
        )
