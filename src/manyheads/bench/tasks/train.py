"""Trains one small model on one task, the same way for every mechanism."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from typing import Protocol as Protocol_

import torch
from torch import Generator, nn

from manyheads.common.rope import RoPE
from manyheads.model import Config, Decoder
from manyheads.model.position import Position

from .base import Task

_VALIDATION, _TEST = 10_000_019, 10_000_079
"""Seeds of the examples that choose a learning rate and of those that a score is reported on."""
_EVALUATED = 64
"""Examples read together when a model is judged."""


@dataclass(frozen=True)
class Protocol:
    """How models are made and trained: the same for every mechanism of a task.

    Attributes:
        steps: Updates.
        batch: Examples of an update.
        rates: Learning rates that are tried with the first seed; the one with the lower loss on validation examples
            is used for all seeds.
        width, depth, heads: Of the decoder.
        conv: Taps of the short convolution before every mixer.
        position: How attention knows order; recurrences know it themselves.
        judged: Examples of the validation and of the test.
    """

    steps: int
    batch: int = 32
    rates: tuple[float, ...] = (2e-3, 5e-3)
    width: int = 64
    depth: int = 2
    heads: int = 4
    conv: int = 3
    position: Position = RoPE()
    judged: int = 512

    def decoder(self, task: Task, mixers: str | tuple[str, ...]) -> Config:
        """The network for a task."""
        return Config(
            task.inputs,
            task.outputs,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mixers=mixers,
            conv=self.conv,
            position=self.position,
            tokens=task.tokens,
            tied=False,
        )


class Steps(Protocol_):
    """What training reads of a protocol."""

    @property
    def steps(self) -> int:
        """Updates."""

    @property
    def batch(self) -> int:
        """Examples of an update."""


class Trained(NamedTuple):
    """What a training came to.

    Attributes:
        score: On test examples, in the task's unit; NaN after it diverged.
        validation: Loss on validation examples, infinite after it diverged.
        curve: Mean training loss of each twentieth of the steps.
        parameters: Learned numbers.
        seconds: From the first step to the score.
    """

    score: float
    validation: float
    curve: tuple[float, ...]
    parameters: int
    seconds: float


def train(
    task: Task,
    mixers: str | tuple[str, ...],
    protocol: Protocol,
    *,
    seed: int,
    rate: float,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Trains a decoder and judges it.

    Training examples depend on the seed and not on the mechanism; validation and test examples on neither. AdamW
    (0.9, 0.95), weight decay 0.01, gradients clipped at norm 1, a twentieth of the steps to warm up, then a cosine to
    a tenth of the rate.

    Args:
        task: What to learn.
        mixers: Mixer of each layer, as in ``Config``.
        protocol: Sizes and steps.
        seed: Of weights and training examples.
        rate: The highest learning rate.
        say: Told now and then how far it is.

    Returns:
        Score, curve and counts.

    Example:
        >>> from manyheads.bench.tasks import recall
        >>> found = train(recall.task(2, 2, 4), "linear", Protocol(2, judged=8), seed=0, rate=1e-3)
        >>> 0 <= found.score <= 1, len(found.curve)
        (True, 2)
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = Decoder(protocol.decoder(task, mixers))
        losses = learn(model, task, protocol, seed, rate, say)
        if math.isfinite(losses[-1]):
            validation, _ = judge(model, task, protocol.judged, _VALIDATION)
            _, score = judge(model, task, protocol.judged, _TEST)
    if not math.isfinite(losses[-1]):
        return Trained(math.nan, math.inf, (), model.parameter_count(), time.perf_counter() - start)
    return Trained(score, validation, twentieths(losses), model.parameter_count(), time.perf_counter() - start)


def judge(model: nn.Module, task: Task, count: int, seed: int) -> tuple[float, float]:
    """Loss and score on held-out examples.

    Args:
        model: From inputs to answers.
        task: What is asked.
        count: Examples.
        seed: Draws them.

    Returns:
        The loss over taught tokens and the score over judged ones.
    """
    batch = task.draw(count, Generator().manual_seed(seed), True)
    with torch.no_grad():
        answers = torch.cat([model(part) for part in batch.inputs.split(_EVALUATED)])
    return float(task.loss(answers, batch)), task.score(answers, batch)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums come in the same order wherever the model is trained, and small products are not cut up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learn(
    model: nn.Module,
    task: Task,
    protocol: Steps,
    seed: int,
    rate: float,
    say: Callable[[str], None] = lambda text: None,
    *,
    before: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Updates a model.

    Args:
        model: From inputs to answers.
        task: What to learn.
        protocol: How many steps of how many examples.
        seed: Of the training examples.
        rate: The highest learning rate.
        say: Told now and then how far it is.
        before: Called with the number of each step before it, such as to end a phase.

    Returns:
        The loss of each step, the last one not finite if it diverged.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm(step, protocol.steps))
    examples = Generator().manual_seed(seed)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(protocol.steps):
        before(step)
        batch = task.draw(protocol.batch, examples, False)
        loss = task.loss(model(batch.inputs), batch)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, protocol.steps // 20) == 0:
            left = (time.perf_counter() - start) / (step + 1) * (protocol.steps - step - 1)
            say(f"step {step + 1} of {protocol.steps}, loss {losses[-1]:.3f}, about {left:.0f} s left")
    return losses


def _warm(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def twentieths(losses: list[float]) -> tuple[float, ...]:
    """The mean loss of each twentieth of the steps."""
    size = max(1, len(losses) // 20)
    parts = [losses[at : at + size] for at in range(0, len(losses), size)]
    return tuple(round(sum(part) / len(part), 5) for part in parts)
