"""What a task is: batches drawn from a generator, and how an answer is scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """Some examples of a task.

    Attributes:
        inputs: Token ids ``(B, N)``, or floats ``(B, N, inputs)``.
        targets: Token ids ``(B, N)``, or floats ``(B, N, outputs)``: what should come out at each token.
        taught: bool ``(B, N)``: tokens whose loss is learned from.
        judged: bool ``(B, N)``: tokens that the score is taken over.
    """

    inputs: Tensor
    targets: Tensor
    taught: Tensor
    judged: Tensor


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        name: One word.
        description: One line.
        inputs: Size of the vocabulary, or channels of real-valued input.
        outputs: Classes, or channels of a real-valued answer.
        length: Tokens N of an example.
        unit: What the score is: ``"accuracy"``, ``"bits a byte"`` or ``"relative error"`` (squared, over the
            variance of the targets).
        chance: The score of a model that has learned nothing but frequencies.
        draw: ``draw(count, generator, held_out)``: fresh examples; held-out ones come from other text where there is
            text, and from other draws elsewhere.
        tokens: Whether inputs are token ids.
        source: Where examples come from, with a digest for what is not drawn.
    """

    name: str
    description: str
    inputs: int
    outputs: int
    length: int
    unit: str
    chance: float
    draw: Callable[[int, Generator, bool], Batch] = field(repr=False)
    tokens: bool = True
    source: str = "drawn"

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""
        return self.unit == "accuracy"

    @property
    def regression(self) -> bool:
        """Whether answers are real-valued."""
        return self.unit == "relative error"

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """The mean loss over the taught tokens.

        Args:
            answers: ``(B, N, outputs)``.
            batch: What was asked.

        Returns:
            A scalar: cross entropy in nats, or the squared error over the variance of the targets.
        """
        given, wanted = answers[batch.taught], batch.targets[batch.taught]
        return _squared(given, wanted) if self.regression else F.cross_entropy(given, wanted)

    def score(self, answers: Tensor, batch: Batch) -> float:
        """The score over the judged tokens, in the task's unit.

        Args:
            answers: ``(B, N, outputs)``.
            batch: What was asked.
        """
        given, wanted = answers[batch.judged], batch.targets[batch.judged]
        if self.regression:
            return float(_squared(given, wanted))
        if self.higher:
            return float((given.argmax(-1) == wanted).double().mean())
        return float(F.cross_entropy(given.double(), wanted)) / math.log(2)


def everywhere(targets: Tensor) -> Tensor:
    """A mask of all tokens of targets that are ids."""
    return torch.ones(targets.shape[:2], dtype=torch.bool)


def _squared(given: Tensor, wanted: Tensor) -> Tensor:
    return (given - wanted).square().mean() / wanted.var()
