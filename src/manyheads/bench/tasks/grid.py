"""A task on an image grid, and the protocol by which layers that look at parts of an image are compared on it.

Everything that could be tuned stands here and was fixed before any run that is reported: sizes, steps, the learning
rate, seeds. Models differ in nothing but which cells a layer lets each other see.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manyheads.nn.neighborhood import NeighborhoodAttention2D

from .base import Batch, Task, everywhere
from .train import Trained, judge, learn, one_thread, twentieths

SEEDS = (0, 1, 2)
"""Of weights and training images, as reported."""

LAYOUTS: dict[str, str] = {
    "neighborhood": "the cells nearest to each",
    "blocks": "a fixed block of as many cells, wherever in it the cell lies",
    "global": "every cell",
    "untrained": "the cells nearest to each, with the weights it was born with",
}
"""What a layer lets a cell see."""


def task(side: int = 12, generations: int = 1) -> Task:
    """Makes the task: the Game of Life, so many generations on.

    Args:
        side: Cells of a side of the image.
        generations: Steps of the rule; cells within this distance decide.

    Returns:
        The task: images of cells that are alive with probability 0.35, row by row; for each cell whether it is alive
        afterwards. Cells beyond the edge are dead.

    Raises:
        ValueError: Fewer than three cells or no generation.

    Example:
        >>> batch = task(8).draw(2, Generator().manual_seed(0), False)
        >>> batch.inputs.shape, int(batch.targets.max())
        (torch.Size([2, 64]), 1)
    """
    if side < 3 or generations < 1:
        raise ValueError(f"side, generations: expected at least 3 and 1, got {side} and {generations}")

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        cells = (torch.rand(count, side, side, generator=generator) < _ALIVE).long()
        after = cells
        for _ in range(generations):
            after = _next(after)
        inputs, targets = cells.flatten(1), after.flatten(1)
        return Batch(inputs, targets, everywhere(targets), everywhere(targets))

    frequent = draw(64, Generator().manual_seed(1), True).targets.double().mean()
    name = "life" if generations == 1 else f"life-{generations}"
    words = f"the Game of Life on {side} x {side} cells, {generations} generation{'s' * (generations > 1)} on"
    return Task(name, words, 2, 2, side * side, "accuracy", float(max(frequent, 1 - frequent)), draw)


_ALIVE = 0.35


def _next(cells: Tensor) -> Tensor:
    """One generation of ``(B, X, Y)``: a cell lives with three neighbours, or with two if it lived."""
    around = F.avg_pool2d(cells[:, None].float(), 3, 1, 1, divisor_override=1)[:, 0] - cells
    return ((around == 3) | ((around == 2) & (cells == 1))).long()


@dataclass(frozen=True)
class GridProtocol:
    """How the models of this task are made and trained.

    Attributes:
        steps: Updates.
        batch: Images of an update.
        rate: The highest learning rate, for every layout alike.
        width, heads, depth: Of the model.
        window: Cells along each axis that a local layer sees.
        judged: Images of the test.
    """

    steps: int = 250
    batch: int = 8
    rate: float = 5e-3
    width: int = 32
    heads: int = 4
    depth: int = 2
    window: int = 3
    judged: int = 128


class GridModel(nn.Module):
    """A small network over an image: attention with a learned relative position bias and a perceptron, in turn.

    Args:
        side: Cells of a side.
        layout: A name in ``LAYOUTS``.
        protocol: Sizes.

    Raises:
        ValueError: Another layout, or blocks that do not fit.

    Example:
        >>> GridModel(9, "neighborhood", GridProtocol())(torch.ones(2, 81, dtype=torch.long)).shape
        torch.Size([2, 81, 2])
    """

    def __init__(self, side: int, layout: str, protocol: GridProtocol) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            from manyheads.common.errors import unknown

            raise unknown("layout", layout, LAYOUTS)
        self.side = side
        window = side if layout == "global" else protocol.window
        stride = window if layout == "blocks" else 1
        width = protocol.width
        self.embed = nn.Embedding(2, width)
        self.mixers = nn.ModuleList(
            NeighborhoodAttention2D(width, protocol.heads, window, stride, rel_pos_bias=True)
            for _ in range(protocol.depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * protocol.depth))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(protocol.depth)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, cells: Tensor) -> Tensor:
        """Answers of ``(B, N)`` cells, ``(B, N, 2)``."""
        x = self.embed(cells).unflatten(1, (self.side, self.side))
        for layer, (mixer, feed) in enumerate(zip(self.mixers, self.feeds, strict=True)):
            x = x + mixer(self.norms[2 * layer](x))
            x = x + feed(self.norms[2 * layer + 1](x))
        return self.head(x.flatten(1, 2))


def train(layout: str, protocol: GridProtocol | None = None, *, seed: int, side: int = 12) -> Trained:
    """Trains a model whose layers see what a layout says, and judges it on images of its own.

    Args:
        layout: A name in ``LAYOUTS``.
        protocol: Sizes and steps; the reported ones by default.
        seed: Of weights and training images.
        side: Cells of a side.

    Returns:
        Accuracy over all cells of the test images, and how it was reached.

    Raises:
        ValueError: Another layout.

    Example:
        >>> found = train("untrained", GridProtocol(judged=4), seed=0, side=6)
        >>> 0 <= found.score <= 1
        True
    """
    protocol = GridProtocol() if protocol is None else protocol
    asked, start = task(side), time.perf_counter()
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = GridModel(side, layout, protocol)
        if layout != "untrained":
            losses = learn(model, asked, protocol, seed, protocol.rate)
        loss, score = judge(model, asked, protocol.judged, _TEST)
    count = sum(p.numel() for p in model.parameters())
    return Trained(score, loss, twentieths(losses), count, time.perf_counter() - start)


_TEST = 10_000_103
