"""From which position on a cheaper indexer is the faster one."""

from __future__ import annotations

HISA = 1.375
"""Times the tokens of the candidate blocks: before that position the flat scan is as fast, and finds more."""
RERANK = 4
"""Times the tokens that are scored again: the same for heads that only make a short list."""


def crossing(how: str, keep: int, options: list[int]) -> int:
    """The first position whose tokens are chosen the cheap way; the flat scan chooses for those before.

    The factors were measured on a processor with AMX, in bfloat16, with 64 index heads of width 128 and some 64
    queries at a time, between 2,560 and 24,576 tokens. A few heads alone are faster wherever there is a choice at all.
    The rule counts positions in a document and nothing else, so that a token's choice depends neither on the queries
    beside it nor on the documents around.

    Args:
        how: ``"flat"``, ``"hisa"`` or ``"misa"``.
        keep: Tokens to choose.
        options: Of the operator: the last one is the position that the caller asks for, or -1.

    Returns:
        A position.

    Example:
        >>> crossing("hisa", 2048, [128, 64, -1]), crossing("misa", 2048, [128, 8, 0, -1])
        (11264, 2048)
        >>> crossing("misa", 2048, [128, 8, 4096, -1]), crossing("hisa", 2048, [128, 64, 0])
        (16384, 0)
    """
    if how == "flat":
        return 2**62
    if options[-1] >= 0:
        return options[-1]
    if how == "hisa":
        return int(HISA * options[0] * options[1])
    return max(keep, RERANK * options[2])
