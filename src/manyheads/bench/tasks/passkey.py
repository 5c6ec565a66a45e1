"""Passkey retrieval: a few marked digits somewhere in noise, asked for at the end."""

from __future__ import annotations

import torch
from torch import Generator

from .base import Batch, Task

_DIGITS, _WORDS = 10, 16
_MARK, _ASK = _DIGITS + _WORDS, _DIGITS + _WORDS + 1


def task(length: int = 64, digits: int = 4) -> Task:
    """Makes the task.

    Args:
        length: Tokens of an example.
        digits: Digits of the key.

    Returns:
        The task: noise of words and digits, in it at a random place ``MARK d1 ... dn``, at the end ``ASK d1 ...``;
        from ``ASK`` on, the next digit of the key.

    Raises:
        ValueError: A length that has no room for the key.

    Source:
        Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300, section 4.2, with tokens in place of sentences.

    Example:
        >>> task(16, 2).draw(1, torch.Generator().manual_seed(0), False).judged.sum()
        tensor(2)
    """
    if digits < 1 or length < 2 * digits + 2:
        raise ValueError(f"length: expected at least {2 * max(digits, 1) + 2} for {digits} digits, got {length}")

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        inputs = torch.randint(_DIGITS + _WORDS, (count, length), generator=generator)
        key = torch.randint(_DIGITS, (count, digits), generator=generator)
        place = torch.randint(length - 2 * digits, (count, 1), generator=generator)
        marked = torch.cat((torch.full((count, 1), _MARK), key), 1)
        inputs.scatter_(1, place + torch.arange(digits + 1), marked)
        inputs[:, -digits] = _ASK
        inputs[:, length - digits + 1 :] = key[:, :-1]
        targets = torch.zeros_like(inputs)
        targets[:, -digits:] = key
        judged = torch.zeros_like(inputs, dtype=torch.bool)
        judged[:, -digits:] = True
        return Batch(inputs, targets, judged, judged)

    return Task(
        "passkey",
        f"{digits} marked digits in {length} tokens of noise",
        _ASK + 1,
        _DIGITS,
        length,
        "accuracy",
        1 / _DIGITS,
        draw,
    )
