"""State tracking: the product of the permutations so far."""

from __future__ import annotations

import itertools

import torch
from torch import Generator, Tensor

from .base import Batch, Task, everywhere


def table(objects: int) -> Tensor:
    """The products of all permutations of some objects.

    Args:
        objects: How many, 2 to 5.

    Returns:
        ``(n!, n!)``: at ``[a, b]`` the number of "first a, then b"; permutations are numbered in the order of
        ``itertools.permutations``, the identity is 0.

    Raises:
        ValueError: Another number of objects.

    Example:
        >>> table(2)
        tensor([[0, 1],
                [1, 0]])
    """
    if not 2 <= objects <= 5:
        raise ValueError(f"objects: expected 2 to 5, got {objects}")
    every = list(itertools.permutations(range(objects)))
    number = {p: i for i, p in enumerate(every)}
    return torch.tensor([[number[tuple(b[a[i]] for i in range(objects))] for b in every] for a in every])


def task(objects: int = 3, length: int = 32) -> Task:
    """Makes the task.

    Args:
        objects: Permuted objects: 2 is parity, 3 the smallest group that is not commutative, 5 the smallest that no
            circuit of constant depth is believed to follow.
        length: Tokens of an example; the later half is judged.

    Returns:
        The task: a permutation at each token, and there the product of all so far.

    Source:
        Merrill et al., The Illusion of State in State-Space Models, arXiv 2404.08819.

    Example:
        >>> task(2, 6).inputs
        2
    """
    products = table(objects)
    size = len(products)

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        inputs = torch.randint(size, (count, length), generator=generator)
        targets = inputs.clone()
        for at in range(1, length):
            targets[:, at] = products[targets[:, at - 1], inputs[:, at]]
        judged = everywhere(targets)
        judged[:, : length // 2] = False
        return Batch(inputs, targets, everywhere(targets), judged)

    what = "parity" if objects == 2 else f"the product of permutations of {objects} objects"
    return Task("states", f"{what} so far, {length} tokens", size, size, length, "accuracy", 1 / size, draw)
