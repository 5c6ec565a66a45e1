"""Which kind of configuration a call of this engine takes."""

from __future__ import annotations

from ..configs import KINDS as _OF

KERNELS = ("forward", "rows_backward", "keys_backward")
KINDS = _OF["forward"]
"""See ``engine.configs``."""


def kind_of(plain: bool, features: int, pair: bool = False) -> str:
    """The kind of a call.

    Args:
        plain: Whether it is softmax over masked scores and nothing else.
        features: How many of these it uses: ALiBi or a cap, a relative table, a value for each block, dropout,
            skipping, another weight than the softmax.
        pair: Whether it has a bias for every pair or key, which is one more.

    Returns:
        One of ``KINDS``.

    Example:
        >>> kind_of(True, 0), kind_of(False, 1), kind_of(False, 2), kind_of(False, 1, pair=True)
        ('plain', 'general', 'heavy', 'heavy')
    """
    if plain:
        return "plain"
    return "heavy" if features + pair > 1 else "general"
