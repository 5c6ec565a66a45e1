"""From which position on a cheaper indexer is the faster one."""

from __future__ import annotations

HISA = 1.5
"""Times the tokens of the candidate blocks: before that position the flat scan is as fast, and gives more."""
MISA = 2
"""Times the tokens to keep: before that position choosing heads costs what it saves."""


def crossing(how: str, keep: int, options: list[int]) -> int:
    """The first position whose tokens are chosen the cheap way; the flat scan chooses for those before.

    The rule counts positions in a document and nothing else, so that a token's choice depends neither on the queries
    beside it nor on the documents around.

    Args:
        how: ``"flat"``, ``"hisa"`` or ``"misa"``.
        keep: Tokens to choose.
        options: Of the operator: the last one is the position that the caller asks for, or -1.

    Returns:
        A position.

    Example:
        >>> crossing("hisa", 2048, [128, 64, -1]), crossing("hisa", 2048, [128, 64, 0])
        (12288, 0)
    """
    if how == "flat":
        return 2**62
    if options[-1] >= 0:
        return options[-1]
    return int(HISA * options[0] * options[1]) if how == "hisa" else MISA * keep
