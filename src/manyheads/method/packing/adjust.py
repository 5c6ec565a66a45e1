"""Optimiser settings that keep training on packed rows equal to training on sequences."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from manyheads.common.errors import unknown

RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
"""How the learning rate grows with the number of sequences per step: its power."""


@dataclass(frozen=True)
class Hyperparameters:
    """What changes with the number of sequences in an optimiser step.

    Attributes:
        batch_size: Rows per step.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
    """

    batch_size: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999


def adjust(
    settings: Hyperparameters, factor: float, *, keep: str = "sequences", rule: str = "linear"
) -> Hyperparameters:
    """Carries settings for unpacked training over to packed rows.

    A row of ``p`` sequences is ``p`` rows of the unpacked batch. Either as many sequences as before make a step
    (the batch shrinks to ``batch_size / p`` rows and nothing else changes), or as many rows as before do, and one
    step stands for ``p``: moments decay by ``beta**p`` and the learning rate grows.

    Args:
        settings: What unpacked training uses, tuned for Adam or LAMB.
        factor: The packing factor ``p``, sequences per row, at least 1; ``Packing.factor``.
        keep: ``"sequences"`` per step, or ``"rows"`` per step.
        rule: How the learning rate grows with ``keep="rows"``: ``"linear"`` (by ``p``), ``"sqrt"`` or ``"none"``.

    Returns:
        The settings for packed training.

    Raises:
        ValueError: A factor below 1, or an unknown ``keep`` or ``rule``.

    Source:
        Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027, section 3.

    Example:
        >>> adjust(Hyperparameters(256, 1e-3), 2.0)
        Hyperparameters(batch_size=128, lr=0.001, beta1=0.9, beta2=0.999)
        >>> adjust(Hyperparameters(256, 1e-3), 2.0, keep="rows").beta1
        0.81
    """
    if not factor >= 1:
        raise ValueError(f"factor: expected at least 1 sequence per row, got {factor}")
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if keep == "sequences":
        return dataclasses.replace(settings, batch_size=max(1, round(settings.batch_size / factor)))
    if keep != "rows":
        raise unknown("keep", keep, ("sequences", "rows"))
    return dataclasses.replace(
        settings,
        lr=settings.lr * factor ** RULES[rule],
        beta1=settings.beta1**factor,
        beta2=settings.beta2**factor,
    )
