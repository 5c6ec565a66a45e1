"""What a compiler that traces Python is to take as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Fn = TypeVar("Fn", bound=Callable[..., object])


def constant(fn: Fn) -> Fn:
    """Marks a function whose result ``torch.compile`` takes for a constant instead of tracing into it.

    For functions from plain numbers to a mask: the compiler guards the numbers, the mask stays a value
    of the host. It does what ``torch.compiler.assume_constant_result`` does, without importing the compiler,
    which takes seconds.

    Args:
        fn: A function of hashable host values.

    Returns:
        The same function.

    Example:
        >>> @constant
        ... def window(size: int) -> str:
        ...     return f"window({size})"
        >>> window(3)
        'window(3)'
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
