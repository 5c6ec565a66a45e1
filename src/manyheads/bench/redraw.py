"""The mask and the problem behind a row: read from its text, or drawn again from its case and seed."""

from __future__ import annotations

from typing import NamedTuple

from manyheads.bench.measure import DENSITY_TILE
from manyheads.bench.naming import mask_name
from manyheads.bench.planning.simulate import PACKED, named
from manyheads.bench.row import Row
from manyheads.bench.workload import Problem
from manyheads.mask import Mask


class Drawn(NamedTuple):
    """A mask as a row used it.

    Attributes:
        mask: The mask.
        queries, keys: Tokens.
        batch, heads: Of the call; 1 where the row's shape does not say.
    """

    mask: Mask
    queries: int
    keys: int
    batch: int = 1
    heads: int = 1


def drawn(row: Row) -> Drawn | None:
    """The mask of a row.

    Args:
        row: A row with a mask, and the shape ``batch x heads x tokens x width`` or a length.

    Returns:
        The mask; ``None`` where it cannot be had: one that is drawn again must have the row's text and as many pairs.

    Example:
        >>> drawn(Row("layouts", "causal-64", "manyheads", mask="causal", length=64))
        Drawn(mask=causal, queries=64, keys=64, batch=1, heads=1)
    """
    try:
        parts = [[int(n) for n in part.split(":")] for part in (row.shape or "").split("x")]
    except ValueError:
        parts = []
    if len(parts) == 4:
        (batch, heads), tokens = (parts[0][0], parts[1][0]), parts[2]
    else:
        (batch, heads), tokens = (1, 1), [row.length or 0]
    if row.mask is None or not tokens[0]:
        return None
    try:
        found = Drawn(_mask_of(row, tokens[-1], heads), tokens[0], tokens[-1], batch, heads)
        layout = found.mask.tiles(found.queries, found.keys, tile=DENSITY_TILE, batch=batch, heads=heads)
    except (ValueError, TypeError):
        return None
    return found if found.mask.text == row.mask and row.pairs in (None, layout.pairs) else None


def problem_of(row: Row) -> Problem | None:
    """The problem that a row measured.

    Args:
        row: A row of a suite with shapes ``batch x heads x tokens x width``.

    Returns:
        The problem; ``None`` where its mask cannot be had or the shape is another.

    Example:
        >>> problem_of(Row("masks", "causal-64-float32", "sdpa", shape="1x8:2x64x32", mask="causal")).kv_heads
        2
    """
    parts = (row.shape or "").split("x")
    found = drawn(row) if len(parts) == 4 else None
    if found is None:
        return None
    heads, widths = ([int(n) for n in part.split(":")] for part in (parts[1], parts[3]))
    return Problem(
        found.mask,
        found.queries,
        found.keys,
        batch=found.batch,
        heads=heads[0],
        kv_heads=heads[-1],
        width=widths[0],
        value_width=widths[-1],
        dtype=row.dtype or "float32",
        phase=row.phase,
    )


def _mask_of(row: Row, length: int, heads: int) -> Mask:
    name = mask_name(row) or "full"
    return named(name, length, seed=row.seed or 0, lengths=row.lengths if name in PACKED else None, heads=heads)
