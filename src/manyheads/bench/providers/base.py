"""What a provider is, and the words that other packages have for masks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from manyheads.bench.workload import Problem
from manyheads.mask import Causal, Document, Full, Mask, Window
from manyheads.mask.algebra import And

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

MASK_PAIRS = 2**29
"""Above this many pairs no N x N boolean mask is made; heads with masks of their own count each."""
SCORES = 2**27
"""Above this many pairs over batch and heads no package that keeps all scores is worth waiting for."""


class Provider(Protocol):
    """One way to compute attention.

    A provider that does not compute the same thing, such as one with random features or 8-bit products, also has an
    attribute ``lossy`` that is true: its error is shown beside its time, and it is in no ratio.
    """

    @property
    def name(self) -> str:
        """How it is chosen on the command line and called in the rows."""

    @property
    def package(self) -> str:
        """The distribution whose version stands in every row."""

    def refuse(self, problem: Problem) -> str | None:
        """Why this problem is not for this provider, ``None`` if it is; looks at the shape only."""

    def prepare(self, problem: Problem) -> Forward:
        """Does what is done once per problem (masks, compilation set-up) and returns the call to time."""


@dataclass(frozen=True)
class Form:
    """A mask in the words that most packages have: a band, within documents.

    Attributes:
        left: Keys visible before the query, itself not counted; ``None`` for all.
        right: Keys visible after the query; ``None`` for all, 0 for causal.
        lengths: Lengths of packed documents, ``None`` for one.
    """

    left: int | None = None
    right: int | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.right == 0

    @property
    def plain(self) -> bool:
        """Whether it is everything, or causal and nothing more: what every package knows."""
        return self.left is None and self.right in (None, 0) and self.lengths is None

    @property
    def pair(self) -> tuple[int, int]:
        """``(left, right)`` with -1 for no limit, as the FlashAttention family writes windows."""
        return (-1 if self.left is None else self.left, -1 if self.right is None else self.right)


def form_of(mask: Mask) -> Form | None:
    """Puts a mask into the words of other packages.

    Args:
        mask: Any mask.

    Returns:
        Its form; ``None`` for a mask that they have no words for.

    Example:
        >>> from manyheads.mask import as_mask
        >>> form_of(as_mask("causal & window(512)"))
        Form(left=511, right=0, lengths=None)
        >>> form_of(as_mask("window(8) | sink(4)")) is None
        True
    """
    left: int | None = None
    right: int | None = None
    lengths: tuple[int, ...] | None = None
    for part in mask.parts if isinstance(mask, And) else (mask,):
        if isinstance(part, Causal):
            right = 0
        elif isinstance(part, Window):
            left, right = _least(left, part.left), _least(right, part.right)
        elif isinstance(part, Document) and lengths is None and part.q_lens.ndim == 1:
            if not np.array_equal(part.q_lens, part.k_lens):
                return None
            lengths = tuple(int(n) for n in part.q_lens if n)
        elif not isinstance(part, Full):
            return None
    return Form(left, right, lengths)


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def first_reason(*reasons: tuple[object, str]) -> str | None:
    """The first reason whose condition holds.

    Example:
        >>> first_reason((False, "too long"), (True, "no GPU"))
        'no GPU'
    """
    return next((text for holds, text in reasons if holds), None)


def _least(reach: int | None, window: int | None) -> int | None:
    """The shorter of a reach and a side of ``Window``, which counts the query itself."""
    if window is None:
        return reach
    return window - 1 if reach is None else min(reach, window - 1)
