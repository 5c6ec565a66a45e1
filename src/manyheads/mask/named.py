"""Names of the literature, each a composition of primitives."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Mask
from .documents import Document, Earlier, Prefix
from .primitives import Block, Causal, Periodic, Sink, Window
from .store import integers, whole

__all__ = [
    "block_causal",
    "block_causal_document",
    "causal_blockwise",
    "causal_by_document",
    "causal_document",
    "chunked",
    "dilated_window",
    "fixed",
    "full_document",
    "global_sliding_window",
    "prefix_lm_causal",
    "prefix_lm_document",
    "shared_question",
    "sliding_window",
    "sliding_window_causal",
    "streaming",
    "strided",
]


def sliding_window(window: int) -> Mask:
    """Keys nearer than ``window`` on both sides: ``Window(window)``.

    Args:
        window: Keys on a side, the query's own included; at least 1.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import sliding_window
        >>> sliding_window(3)
        window(3)
    """
    return Window(window)


def sliding_window_causal(window: int) -> Mask:
    """The last ``window`` keys, the query's own included.

    Args:
        window: Keys on a side, the query's own included; at least 1.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import sliding_window_causal
        >>> sliding_window_causal(3).dense(5).sum(-1).flatten().tolist()
        [1, 2, 3, 3, 3]
    """
    return Causal() & Window(window)


def streaming(window: int, sink: int) -> Mask:
    """The last ``window`` keys and the first ``sink`` keys, causally.

    Args:
        window: Keys on a side, the query's own included; at least 1.
        sink: First keys that every query keeps; at least 0.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Source:
        Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).

    Example:
        >>> from manyheads.mask import streaming
        >>> streaming(2, 1)
        causal & (window(2) | sink(1))
    """
    return Causal() & (Window(window) | Sink(sink))


def dilated_window(window: int, dilation: int) -> Mask:
    """``window`` keys on each side, the query's own included, ``dilation`` apart.

    Args:
        window: Keys on a side, the query's own included; at least 1.
        dilation: Distance between neighbours; at least 1.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Source:
        Longformer (arXiv 2004.05150), section 3.1.

    Example:
        >>> from manyheads.mask import dilated_window
        >>> dilated_window(2, 3).dense(7)[0, 0, 3].int().tolist()
        [1, 0, 0, 1, 0, 0, 1]
    """
    window, dilation = whole(window, "window", 1), whole(dilation, "dilation", 1)
    reach = Window((window - 1) * dilation + 1)
    return reach & Periodic(dilation) if dilation > 1 else reach


def strided(window: int, stride: int) -> Mask:
    """The last ``window`` keys, and every ``stride``-th key before, causally.

    Args:
        window: Keys on a side, the query's own included; at least 1.
        stride: Distance between the keys kept beyond the window; at least 1.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Source:
        Sparse Transformers (arXiv 1904.10509), the strided pattern.

    Example:
        >>> from manyheads.mask import strided
        >>> strided(2, 3).dense(7)[0, 0, 6].int().tolist()
        [1, 0, 0, 1, 0, 1, 1]
    """
    return Causal() & (Window(window) | Periodic(stride))


def fixed(block: int, summary: int = 1) -> Mask:
    """The query's own block of ``block`` keys, and the last ``summary`` keys of every block, causally.

    Args:
        block: Tokens per block; at least 1.
        summary: Keys at the end of every block that all later queries see; at most ``block``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Source:
        Sparse Transformers (arXiv 1904.10509), the fixed pattern.

    Example:
        >>> from manyheads.mask import fixed
        >>> fixed(3).dense(7)[0, 0, 6].int().tolist()
        [0, 0, 1, 0, 0, 1, 1]
    """
    block, summary = whole(block, "block", 1), whole(summary, "summary", 1)
    if summary > block:
        raise ValueError(f"summary: expected at most the block {block}, got {summary}")
    mask: Mask = Block(Window(1), block)
    for n in range(summary):
        mask = mask | Periodic(block, block - 1 - n, of="key")
    return Causal() & mask


def chunked(size: int) -> Mask:
    """Causal within chunks of ``size`` tokens, nothing across.

    Args:
        size: Tokens per block; at least 1.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import chunked
        >>> chunked(2).dense(4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    return Causal() & Block(Window(1), size)


def block_causal(size: int) -> Mask:
    """Every token sees its own block of ``size`` tokens and all blocks before it.

    Args:
        size: Tokens per block; at least 1.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import block_causal
        >>> block_causal(2).dense(4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    return Block(Causal(), size)


def full_document(lens: Any) -> Mask:
    """Every token sees its own document: ``Document(lens)``.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import full_document
        >>> full_document([2, 3])
        document([2, 3])
    """
    return Document(lens)


def causal_document(lens: Any) -> Mask:
    """Causal within each document.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import causal_document
        >>> causal_document([2, 3])
        causal & document([2, 3])
    """
    return Causal() & Document(lens)


def causal_by_document(lens: Any) -> Mask:
    """Every document sees itself and all documents before it, entirely.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import causal_by_document
        >>> causal_by_document([1, 2]).dense(3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    """
    return Document(lens) | Earlier(lens)


def block_causal_document(lens: Any, block: int) -> Mask:
    """Within each document, every block of ``block`` tokens sees itself and the blocks before it.

    Blocks are counted from position 0; documents that begin inside a block share it with their neighbour, but
    never see the neighbour.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``.
        block: Tokens per block; at least 1.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import block_causal_document
        >>> block_causal_document([4, 2], 2)
        document([4, 2]) & block(causal, 2)
    """
    return Document(lens) & Block(Causal(), block)


def shared_question(lens: Any) -> Mask:
    """Document 0 is a question, the others its answers: each is causal, and sees the question.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import shared_question
        >>> shared_question([2, 1, 1]).dense(4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    """
    return Causal() & (Document(lens) | Prefix(integers(lens, "lens").array[..., 0]))


def causal_blockwise(lens: Any) -> Mask:
    """Causal within each document; the last one sees everything before it.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import causal_blockwise
        >>> causal_blockwise([1, 1, 2]).dense(4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    array = integers(lens, "lens").array
    return Causal() & (Document(lens) | ~Prefix(np.sum(array[..., :-1], -1), side="query"))


def prefix_lm_causal(prefix: Any) -> Mask:
    """The first ``prefix`` keys are visible to all; the rest is causal.

    Args:
        prefix: Prefix length, or one per batch entry ``(B,)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import prefix_lm_causal
        >>> prefix_lm_causal(2)
        prefix(2) | causal
    """
    return Prefix(prefix) | Causal()


def prefix_lm_document(prefix: Any, lens: Any) -> Mask:
    """The same prefix length within every document; a document shorter than it is full.

    Args:
        prefix: Prefix length, or one per batch entry ``(B,)``.
        lens: Document lengths, ``(n,)`` or ``(B, n)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Example:
        >>> from manyheads.mask import prefix_lm_document
        >>> prefix_lm_document(2, [1, 3])
        document([1, 3]) & (prefix(2, lens=[1, 3]) | causal)
    """
    return Document(lens) & (Prefix(prefix, lens=lens) | Causal())


def global_sliding_window(window: int, globals: Any) -> Mask:
    """A window, and ``globals`` first tokens that see all and are seen by all.

    Args:
        window: Keys on a side, the query's own included; at least 1.
        globals: Number of first tokens, or one per batch entry ``(B,)``.

    Raises:
        TypeError: Not integers.
        ValueError: An argument out of its range.

    Source:
        Longformer (arXiv 2004.05150), section 3.1.

    Example:
        >>> from manyheads.mask import global_sliding_window
        >>> global_sliding_window(1, 1).dense(3)[0, 0].int().tolist()
        [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    """
    return Window(window) | Prefix(globals) | Prefix(globals, side="query")
