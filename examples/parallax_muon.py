"""Train a small Parallax model with Muon, as its authors recommend, and with AdamW.

Muon orthogonalises the updates of matrices; embeddings, norms and the output go to AdamW as usual.
The task is recall: pairs of a key and a value, then one of the keys again, whose value is to be named.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.common.rope import RoPE
from manyheads.nn import Parallax

SYMBOLS, PAIRS, WIDTH, STEPS = 24, 6, 64, 40


class Model(nn.Module):
    """Two layers of Parallax with MLPs between an embedding and a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.mixers = nn.ModuleList(Parallax(WIDTH, 4, qk_norm=True, rope=RoPE()) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(5))
        self.out = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.out(self.norms[4](x))


def batch(generator: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor]:
    """Sequences ``k1 v1 k2 v2 ... k`` and the value of the last key."""
    half = SYMBOLS // 2
    keys = torch.rand(size, half, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(half, SYMBOLS, (size, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (size, 1), generator=generator)
    pairs = torch.stack([keys, values], dim=-1).flatten(1)
    return torch.cat([pairs, keys.gather(1, asked)], dim=1), values.gather(1, asked)[:, 0]


def optimisers(model: Model, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers and AdamW for the rest, or AdamW for all."""
    inside = [p for part in (model.mixers, model.mlps) for p in part.parameters() if p.dim() == 2]
    known = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in known]
    first = torch.optim.Muon(inside, lr=2e-2) if muon else torch.optim.AdamW(inside, lr=3e-3)
    return [first, torch.optim.AdamW(rest, lr=3e-3)]


for name, muon in (("Muon", True), ("AdamW", False)):
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), Model()
    steppers = optimisers(model, muon)
    for _ in range(STEPS):
        tokens, target = batch(generator)
        loss = F.cross_entropy(model(tokens)[:, -1], target)
        model.zero_grad()
        loss.backward()
        for stepper in steppers:
            stepper.step()
    print(f"{name}: loss {loss.item():.3f} after {STEPS} steps; guessing a value is {math.log(SYMBOLS / 2):.3f}")
