"""Multi-query associative recall: pairs of keys and values, then keys whose values are asked for."""

from __future__ import annotations

import torch
from torch import Generator

from .base import Batch, Task


def task(pairs: int = 16, queries: int = 16, symbols: int = 32) -> Task:
    """Makes the task.

    Args:
        pairs: Keys with a value; all keys of an example differ, values are free.
        queries: Questions after the pairs; each key is asked about equally often, in random order.
        symbols: How many keys there are, and how many values.

    Returns:
        The task: tokens ``k1 v1 k2 v2 ... q1 q2 ...``; at each question the value of that key. Keys are tokens below
        ``symbols``, values those above; answers are numbered from 0.

    Raises:
        ValueError: More pairs than keys, or questions that are no multiple of pairs.

    Source:
        Arora et al., Zoology, arXiv 2312.04927, without gaps between questions.

    Example:
        >>> task(2, 2, 8).draw(1, torch.Generator().manual_seed(0), False).inputs.shape
        torch.Size([1, 6])
    """
    if pairs > symbols:
        raise ValueError(f"pairs: expected at most symbols={symbols}, got {pairs}")
    if queries % pairs:
        raise ValueError(f"queries: expected a multiple of pairs={pairs}, got {queries}")

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        keys = torch.rand(count, symbols, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(symbols, (count, pairs), generator=generator)
        context = torch.stack((keys, values + symbols), 2).flatten(1)
        asked = torch.rand(count, queries, generator=generator).argsort(1) % pairs
        inputs = torch.cat((context, keys.gather(1, asked)), 1)
        targets = torch.zeros_like(inputs)
        targets[:, 2 * pairs :] = values.gather(1, asked)
        judged = torch.zeros_like(inputs, dtype=torch.bool)
        judged[:, 2 * pairs :] = True
        return Batch(inputs, targets, judged, judged)

    return Task(
        "recall",
        f"the values of {pairs} keys, asked for {queries} times",
        2 * symbols,
        symbols,
        2 * pairs + queries,
        "accuracy",
        1 / pairs,
        draw,
    )
