"""The masks that the benchmark knows by name: twelve static ones and two that are drawn block by block."""

from __future__ import annotations

import re
from dataclasses import dataclass

from manyheads.common.errors import unknown
from manyheads.mask import Mask, as_mask
from manyheads.mask.longca import LONG, STATIC, block_sparse, longca, variable_block_sparse
from manyheads.mask.sampling import default_distribution

DYNAMIC = ("uniform_block_sparse", "variable_block_sparse")
"""Random blocks, other ones for each head: what a selector would choose."""
MASKS = (*STATIC, *DYNAMIC)
KEPT = (0.1, 0.2, 0.5, 0.8, 1.0)
"""Shares of key blocks that are kept, of which ``USUAL`` stands where no share is named."""
USUAL = 0.2
BLOCKS = {"uniform_block_sparse": 64, "variable_block_sparse": 256}
"""Tokens of a block, on average where blocks vary; the usual ones."""
SIZES = {"uniform_block_sparse": (64, 128), "variable_block_sparse": (256, 512, 1024)}
DRAWN = ("full_document", "causal_document", "share_question", "causal_blockwise", "prefix_lm_document")
"""Masks whose document lengths are drawn from the histogram for their length."""
AREAS = {
    "full": 1.0,
    "causal": 0.5,
    "full_document": 0.2,
    "causal_document": 0.1,
    "sliding_window": 0.3,
    "sliding_window_causal": 0.2,
    "share_question": 0.3,
    "causal_blockwise": 0.3,
    "prefix_lm_causal": 0.75,
    "prefix_lm_document": 0.2,
    "global_sliding_window": 0.7,
    "block_causal_document": 0.4,
}
"""Shares of visible pairs, roughly, for estimates of time before anything is drawn."""


@dataclass(frozen=True)
class Sparse:
    """A block-sparse mask before it is drawn.

    Attributes:
        name: One of ``DYNAMIC``.
        kept: Share of key blocks that each query block keeps.
        block: Tokens of a block, on average where blocks vary.
    """

    name: str
    kept: float = USUAL
    block: int = 64

    @property
    def text(self) -> str:
        """How it stands on the command line and in the names of cases.

        Example:
            >>> Sparse("uniform_block_sparse", 0.5).text
            'uniform_block_sparse(0.5,64)'
        """
        return f"{self.name}({self.kept:g},{self.block})"

    def mask(self, length: int, heads: int, seed: int) -> Mask:
        """Draws the mask.

        Args:
            length: Tokens.
            heads: Query heads, each with blocks of its own.
            seed: Seed of sizes and choices.
        """
        if self.name == "uniform_block_sparse":
            return block_sparse(length, ratio=self.kept, heads=heads, block=self.block, seed=seed)
        average = min(self.block, length)
        return variable_block_sparse(
            length, ratio=self.kept, heads=heads, average=average, minimum=min(128, average), seed=seed
        )


def sparse(text: str) -> Sparse | None:
    """Reads the name of a block-sparse mask, with or without the share kept and the size of the blocks.

    Args:
        text: ``"uniform_block_sparse"``, ``"uniform_block_sparse(0.5)"`` or ``"uniform_block_sparse(0.5,128)"``.

    Returns:
        What it says, ``None`` if it names no block-sparse mask.

    Raises:
        ValueError: The share is not above 0 and at most 1, or the block is empty.

    Example:
        >>> sparse("variable_block_sparse(0.5)")
        Sparse(name='variable_block_sparse', kept=0.5, block=256)
        >>> sparse("causal") is None
        True
    """
    found = re.fullmatch(r"(\w+)(?:\(\s*([\d.]+)\s*(?:,\s*(\d+)\s*)?\))?", text.strip())
    if found is None or found.group(1) not in DYNAMIC:
        return None
    name, kept, block = found.groups()
    try:
        made = Sparse(name, float(kept or USUAL), int(block or BLOCKS[name]))
    except ValueError:
        made = Sparse(name, 0.0)
    if not 0 < made.kept <= 1 or made.block < 1:
        raise ValueError(f"mask: expected {name}(kept share above 0 and at most 1, tokens of a block), got {text!r}")
    return made


def resolve(mask: str, length: int, seed: int, heads: int = 8) -> Mask:
    """Builds a mask from what stands on the command line.

    Args:
        mask: Name of a static mask (its documents and windows are drawn by the seed), of a block-sparse one, or
            the text of any mask.
        length: Tokens.
        seed: Seed of what is drawn.
        heads: Query heads, for masks that differ from head to head.

    Returns:
        The mask.

    Raises:
        ValueError: Neither a name nor a text that parses; the nearest name is suggested.

    Example:
        >>> resolve("causal & window(8)", 64, 0).text
        'causal & window(8)'
        >>> resolve("uniform_block_sparse(0.5)", 256, 0, heads=2).shape
        (1, 2)
    """
    if mask in STATIC + LONG:
        return longca(mask, length, seed=seed).mask
    if (drawn := sparse(mask)) is not None:
        return drawn.mask(length, heads, seed)
    try:
        return as_mask(mask)
    except ValueError:
        if mask.isidentifier():
            raise unknown("mask", mask, MASKS + LONG) from None
        raise


def lengths_from(mask: str, length: int) -> str | None:
    """What the document lengths of a mask are drawn from.

    Args:
        mask: Name of a mask.
        length: Tokens.

    Returns:
        Name of the histogram, ``None`` for a mask without drawn documents.

    Example:
        >>> lengths_from("causal_document", 8192), lengths_from("causal_document", 65_536), lengths_from("full", 64)
        ('pile', 'prolong64k', None)
    """
    return default_distribution(length) if mask in DRAWN + LONG else None


def likely_area(mask: str) -> float:
    """The share of pairs that a mask will show, roughly, before it is drawn.

    Example:
        >>> likely_area("uniform_block_sparse(0.1)"), likely_area("causal & window(9)")
        (0.1, 0.5)
    """
    drawn = sparse(mask)
    return drawn.kept if drawn is not None else AREAS.get(mask, 0.5)
