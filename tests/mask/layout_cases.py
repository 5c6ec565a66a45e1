"""Random calls for layouts: a mask, sizes, tiles, positions and padding from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manyheads.mask import (
    Block,
    BlockMap,
    Causal,
    Dense,
    Document,
    Earlier,
    Mask,
    Periodic,
    Predicate,
    Prefix,
    Rectangles,
    Sink,
    Window,
)
from manyheads.mask.build import build


def odd_product(q, k):
    """A rule without structure."""
    return (q * k) % 3 == 1


def random_mask(r: random.Random, n: int, depth: int = 2) -> Mask:
    """A composition of masks that cover ``n`` positions."""
    kind = r.randrange(16 if depth else 12)
    if kind == 12:
        return ~random_mask(r, n, depth - 1)
    if kind in (13, 14, 15):
        a, b = random_mask(r, n, depth - 1), random_mask(r, n, depth - 1)
        return a & b if kind == 13 else a | b
    bits = np.random.default_rng(r.randrange(1 << 30))
    side = r.choice([3, 8, 11, n])
    cuts = sorted(r.randint(0, n) for _ in range(4))
    lens = np.diff([0, *cuts, n]).tolist()
    makers = (
        Causal,
        lambda: Window(r.randint(1, n)),
        lambda: Window(left=r.randint(1, n), right=r.randint(1, n)),
        lambda: Sink(r.randint(0, 5)),
        lambda: Periodic(r.choice([1, 3, 8, 1 << 40]), r.randint(0, 3), of=r.choice(["difference", "key", "query"])),
        lambda: Prefix(r.randint(0, n), side=r.choice(["key", "query"])),
        lambda: Document(lens),
        lambda: Earlier(lens),
        lambda: Rectangles([sorted(cuts[:2])], [sorted(cuts[2:])], [r.randrange(4)]),
        lambda: BlockMap(bits.random((-(-n // side),) * 2) < 0.5, block=side, q_len=n, k_len=n),
        lambda: Dense(bits.random((n, n)) < 0.3) if n < 80 else Predicate(odd_product),
        lambda: Block(Causal() & Window(r.randint(1, 4)), side),
    )
    return makers[kind]()


@dataclass
class Call:
    """One random call."""

    mask: Mask
    nq: int
    nk: int
    tile: tuple[int, int]
    positions: tuple[torch.Tensor, torch.Tensor] | None
    padding: torch.Tensor | None
    keyed: bool

    def layout(self, tile=None, **changes: Any):
        """The compiled layout, past the cache."""
        known = {"positions": self.positions, "key_padding": self.padding, "keyed": self.keyed}
        return build(self.mask, self.nq, self.nk, tile=tile or self.tile, cache=False, **{**known, **changes})

    def dense(self):
        """What it must show."""
        seen = self.mask.dense(self.nq, self.nk, positions=self.positions)
        return seen if self.padding is None else seen & self.padding[:, None, None, :]


def random_call(seed: int) -> Call:
    """A call drawn from a seed."""
    r = random.Random(seed)
    n = r.randint(1, 150)
    mask = random_mask(r, n)
    positions, nq, nk = None, n, n
    if r.random() < 0.4:
        nq, nk = r.randint(1, n), r.randint(1, n)
        rows = r.choice([(), (2,)])
        at = np.random.default_rng(seed)
        drawn = [at.integers(0, n, (*rows, size)) for size in (nq, nk)]
        positions = (torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1]))
    padding = None
    if r.random() < 0.4:
        padding = torch.from_numpy(np.random.default_rng(seed + 1).random((2, nk)) < r.random())
    tile = (r.choice([1, 3, 8, 16, 64, 128]), r.choice([1, 4, 8, 20, 64, 128]))
    return Call(mask, nq, nk, tile, positions, padding, r.random() < 0.7)
