"""What rows are called where people read them: in the summary and in the report."""

from __future__ import annotations

import re

from manyheads.bench.row import Row
from manyheads.bench.suites.patterns import MASKS
from manyheads.mask.longca import LONG

_NAMED = re.compile(r"(\w+)(?:\([\d.,\s]*\))?(?=-)")
"""A name at the beginning of a case, with the numbers that some masks take."""


def mask_name(row: Row) -> str | None:
    """What people call the mask of a row: its name on the command line, or its text.

    Args:
        row: Any row.

    Returns:
        The name; ``None`` if the row has no mask.

    Example:
        >>> mask_name(Row("masks", "prefix_lm_causal-1024-float32", "sdpa", mask="prefix($0) | causal"))
        'prefix_lm_causal'
        >>> mask_name(Row("masks", "uniform_block_sparse(0.5,64)-1024-float32", "sdpa", mask="blockmap($0)"))
        'uniform_block_sparse(0.5,64)'
        >>> mask_name(Row("targets", "dense-8x4096x64", "sdpa", mask="full"))
        'full'
    """
    if row.mask is None:
        return None
    found = _NAMED.match(row.case) if row.suite == "masks" else None
    return found[0] if found and found[1] in MASKS + LONG else row.mask


def place(row: Row) -> str:
    """The work of a row in words.

    Args:
        row: Any row.

    Returns:
        Mask, length, dtype and phase, or the case where there is no mask.

    Example:
        >>> place(Row("masks", "a", "sdpa", phase="forward+backward", mask="causal", length=8192, dtype="float32"))
        'causal, 8,192 tokens, float32, forward+backward'
    """
    name = mask_name(row)
    if name is None:
        return f"{row.suite}/{row.case}"
    parts = [name, None if row.length is None else f"{row.length:,} tokens", row.dtype]
    return ", ".join(part for part in (*parts, None if row.phase == "forward" else row.phase) if part)
