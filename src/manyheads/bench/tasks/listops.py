"""ListOps: nested minimum, maximum, median and sum modulo 10 of lists of digits, generated."""

from __future__ import annotations

import torch
from torch import Generator

from .base import Batch, Task

OPERATORS = ("min", "max", "med", "sum")
CLOSE, PAD = 14, 15
"""Tokens: digits 0 to 9, opening operators 10 to 13, the closing bracket, padding in front."""


def value(operator: int, arguments: list[int]) -> int:
    """What an operator makes of its arguments.

    Args:
        operator: Place in ``OPERATORS``.
        arguments: Digits, at least one.

    Returns:
        A digit; the median of an even number is the lower of the middle two.

    Example:
        >>> [value(i, [7, 5, 2, 9]) for i in range(4)]
        [2, 9, 5, 3]
    """
    if operator == 0:
        return min(arguments)
    if operator == 1:
        return max(arguments)
    if operator == 2:
        return sorted(arguments)[(len(arguments) - 1) // 2]
    return sum(arguments) % 10


def task(length: int = 48, depth: int = 3, arguments: int = 4) -> Task:
    """Makes the task.

    Args:
        length: Tokens; shorter expressions have padding in front.
        depth: How deep lists may be nested.
        arguments: The most arguments of an operator; 2 are the least.

    Returns:
        The task: at the last bracket the value of the whole. The values of inner lists are taught at their own
        brackets, but not judged.

    Raises:
        ValueError: A length below that of the shortest list.

    Source:
        Nangia and Bowman, ListOps, arXiv 1804.06028, with shorter lists.

    Example:
        >>> task(12).draw(2, torch.Generator().manual_seed(0), False).judged[:, -1]
        tensor([True, True])
    """
    if length < arguments + 2:
        raise ValueError(f"length: expected at least {arguments + 2}, got {length}")

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        inputs = torch.full((count, length), PAD)
        targets, taught = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
        numbers = iter(torch.randint(1 << 30, (count * length * 8,), generator=generator).tolist())
        for line in range(count):
            tokens, answers = _expression(numbers, length, depth, arguments)
            start = length - len(tokens)
            inputs[line, start:] = torch.tensor(tokens)
            for at, answer in answers.items():
                targets[line, start + at], taught[line, start + at] = answer, True
        judged = torch.zeros_like(taught)
        judged[:, -1] = True
        return Batch(inputs, targets, taught, judged)

    return Task("listops", f"nested lists of up to {length} tokens", PAD + 1, 10, length, "accuracy", 0.1, draw)


def _expression(numbers, length: int, depth: int, most: int) -> tuple[list[int], dict[int, int]]:  # type: ignore[no-untyped-def]
    """Tokens of a random list that fits, and the value at each of its brackets."""
    tokens: list[int] = []
    answers: dict[int, int] = {}

    def grow(level: int, room: int) -> int:
        operator, size = next(numbers) % 4, 2 + next(numbers) % (most - 1)
        tokens.append(10 + operator)
        left, found = room - 2 - size, []
        for _ in range(size):
            # a list in place of a digit takes at least so much more room
            if level < depth and left >= most + 1 and next(numbers) % 3 < 2:
                before = len(tokens)
                found.append(grow(level + 1, left + 1))
                left -= len(tokens) - before - 1
            else:
                found.append(next(numbers) % 10)
                tokens.append(found[-1])
        answers[len(tokens)] = value(operator, found)
        tokens.append(CLOSE)
        return answers[len(tokens) - 1]

    grow(1, length)
    return tokens, answers
