"""Needles: pairs of a key and its value somewhere in noise, and whether a selector finds the block that they are in."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from .base import Batch, Task

SYMBOLS, WORDS = 16, 16


class Selects(Protocol):
    """A mixer that chooses blocks of keys for each query."""

    block: int
    keep: int

    def chosen(self, x: Tensor, *, mask: str | None = None) -> Tensor:
        """Blocks ``(B, G, N, keep)`` of tokens ``x (B, N, C)``, -1 for none."""


def task(length: int = 160, needles: int = 8, questions: int = 64) -> Task:
    """Makes the task.

    Args:
        length: Tokens of an example.
        needles: Pairs of a key and its value, somewhere in the noise; all keys of an example differ.
        questions: Questions at the end, each a key whose value is asked for; each key about equally often.

    Returns:
        The task: noise with ``key value`` here and there, then keys only. Tokens below 16 are keys, the next 16 values,
        the rest noise; answers are numbered from 0.

    Raises:
        ValueError: More needles than there are keys or room.

    Example:
        >>> batch = task(32, 2, 4).draw(3, torch.Generator().manual_seed(0), False)
        >>> batch.inputs.shape, int(batch.judged.sum())
        (torch.Size([3, 32]), 12)
    """
    room = (length - questions) // 2
    if not 1 <= needles <= min(SYMBOLS, room):
        raise ValueError(f"needles: expected 1 to {min(SYMBOLS, max(room, 0))}, got {needles}")

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        inputs = torch.randint(WORDS, (count, length), generator=generator) + 2 * SYMBOLS
        keys = torch.rand(count, SYMBOLS, generator=generator).argsort(1)[:, :needles]
        values = torch.randint(SYMBOLS, (count, needles), generator=generator)
        places = 2 * torch.rand(count, room, generator=generator).argsort(1)[:, :needles]
        inputs.scatter_(1, places, keys).scatter_(1, places + 1, values + SYMBOLS)
        asked = torch.rand(count, questions, generator=generator).argsort(1) % needles
        inputs[:, length - questions :] = keys.gather(1, asked)
        targets = torch.zeros_like(inputs)
        targets[:, length - questions :] = values.gather(1, asked)
        judged = torch.zeros_like(inputs, dtype=torch.bool)
        judged[:, length - questions :] = True
        return Batch(inputs, targets, judged, judged)

    what = f"the values of {needles} keys in {length - questions} tokens of noise, asked for {questions} times"
    return Task("needle", what, 2 * SYMBOLS + WORDS, SYMBOLS, length, "accuracy", 1 / SYMBOLS, draw)


def places(inputs: Tensor) -> Tensor:
    """Where the answer to each question stands.

    Args:
        inputs: Examples (B, N).

    Returns:
        (B, N): the place of the value that a key is asked for; -1 where nothing is asked, that is at everything but a
        key that stood earlier.

    Example:
        >>> places(torch.tensor([[33, 5, 21, 40, 5, 5]])).tolist()
        [[-1, -1, -1, -1, 2, 2]]
    """
    same = (inputs[:, :, None] == inputs[:, None]) & (inputs < SYMBOLS)[:, :, None]
    first = same.int().argmax(-1)  # a key stands before its value once, and is asked for after that
    at = torch.arange(inputs.shape[1])
    asked = (inputs < SYMBOLS) & (first < at)
    return torch.where(asked, first + 1, -1)


def recall(model: nn.Module, inputs: Tensor) -> list[float]:
    """How often each selecting layer of a decoder keeps the block that holds the answer.

    Questions whose answer stands in a block that every query keeps, its own or one just before it, do not occur: the
    answers are followed by noise or other questions, and those whose block is the query's own are left out.

    Args:
        model: A decoder whose mixers have ``chosen`` and ``block``.
        inputs: Examples (B, N).

    Returns:
        One share for each such layer: over questions and groups of heads.

    Raises:
        ValueError: No layer selects.
    """
    kept = chosen(model, inputs)
    if not kept:
        raise ValueError("model: no layer selects blocks")
    return [found(ids, block, inputs) for ids, block in kept]


def chosen(model: nn.Module, inputs: Tensor) -> list[tuple[Tensor, int]]:
    """What each selecting layer chooses, and the tokens of its blocks."""
    kept: list[tuple[Tensor, int]] = []

    def look(layer: Any, given: tuple[Tensor, ...], options: dict[str, object]) -> None:
        kept.append((layer.chosen(given[0]), int(layer.block)))

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in model.modules() if hasattr(m, "chosen")]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def at_random(ids: Tensor, block: int, generator: Generator) -> Tensor:
    """As many blocks for each query as a selector kept, its own among them and the others drawn from earlier ones.

    Args:
        ids: (B, G, N, K), -1 for none.
        block: Tokens of a block.
        generator: Draws them.

    Returns:
        Like ``ids``.

    Example:
        >>> ids = torch.tensor([0, 0, 1, 1, 2, 2])[None, None, :, None].expand(-1, -1, -1, 2).clone()
        >>> at_random(ids, 2, torch.Generator().manual_seed(0))[0, 0, -1].tolist()[0]
        2
    """
    tokens = ids.shape[2]
    blocks = -(-tokens // block)
    own = torch.arange(tokens) // block
    score = torch.rand(*ids.shape[:3], blocks, generator=generator)
    score = score.masked_fill(torch.arange(blocks) > own[:, None], -1.0)
    score.scatter_(3, own[None, None, :, None].expand(*ids.shape[:3], 1), 2.0)
    best = score.topk(min(ids.shape[3], blocks), -1)
    drawn = torch.where(best.values >= 0, best.indices, -1)
    count = (ids >= 0).sum(-1, keepdim=True)
    return torch.where(torch.arange(drawn.shape[-1]) < count, drawn, -1)


def found(ids: Tensor, block: int, inputs: Tensor) -> float:
    """How often chosen blocks hold the answer; arguments as for :func:`at_random` and :func:`recall`."""
    place = places(inputs)
    wanted = place // block
    asked = (place >= 0) & (wanted != torch.arange(inputs.shape[1]) // block)
    hit = (ids == wanted[:, None, :, None]).any(-1) & asked[:, None]
    return float(hit.sum()) / max(1, int(asked.sum()) * ids.shape[1])
